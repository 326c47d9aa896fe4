// end_row: scores[groups[c]] += (row[c] / loss_scale)^2 for all c if every square is finite, then row = 0.
//
// Shapes: row (C,), groups (C,) ascending, or null: groups[c] = c; scores (G,). Any strides.
// Bytes: row and groups read twice (the second time from cache); row written once; scores of the groups that occur
// read and written once.
// Accumulation: the dtype of row.
//
// One launch, two passes: the first checks whether everything is finite, the second adds and clears. A row too large
// for one block is shared by many, which wait for each other between the passes and must therefore all be resident; a
// cooperative launch ensures that. In the second pass the thread at a group's first channel walks through the group,
// adds its squares in order and clears them; the whole warp finishes a long group. No two warps write one score, and
// no block clears what another still has to read.

#include "cpu/layout.h"
#include "device.h"

namespace obc::cuda {

namespace {

constexpr int kRowThreads = 1024;
// Channels of one block. With so few passes over them another block would not help, because waiting costs about as much
// as eight consecutive loads.
constexpr int64_t kChannelsPerBlock = 8 * kRowThreads;

// Members of a group that a single thread adds.
constexpr int64_t kWalk = 32;

template <class Acc>
struct Row {
  Acc* scores;
  int64_t scores_size;
  int64_t scores_stride;
  Acc* row;
  int64_t size;
  int64_t stride;
  const int64_t* groups;
  int64_t groups_stride;
  Acc loss_scale;

  __device__ int64_t group(int64_t c) const { return groups ? groups[c * groups_stride] : c; }
  __device__ Acc square(int64_t c) const {
    const Acc scaled = row[c * stride] / loss_scale;
    return scaled * scaled;
  }
  // Returns the square of channel c and clears the channel.
  __device__ Acc take(int64_t c) const {
    const Acc squared = square(c);
    row[c * stride] = 0;
    return squared;
  }
  // Whether channel c can be added: a finite square, and a group in range and not below the one before.
  __device__ bool good(int64_t c) const {
    const Acc squared = square(c);
    if (!(squared - squared == 0)) return false;
    if (!groups) return true;
    const int64_t mine = group(c);
    return mine >= (c == 0 ? 0 : group(c - 1)) && mine < scores_size;
  }
};

// Counters of any_block: blocks that have arrived, whether all have, blocks that have left.
constexpr int64_t kMeetingCounters = 3;

// Waits until every block of the launch gets here, and tells each whether any of them passed `flag`; `flags` has one
// word per block. The last block to leave clears what the others waited for, so the counters are left at zero.
__device__ bool any_block(bool flag, uint32_t* counters, uint32_t* flags) {
  flag = __syncthreads_or(flag);
  if (gridDim.x == 1) return flag;
  if (threadIdx.x == 0) {
    const uint32_t last = gridDim.x - 1;
    volatile uint32_t* const all_here = counters + 1;
    flags[blockIdx.x] = flag;
    __threadfence();
    if (atomicInc(counters, last) == last) {
      *all_here = 1;
    } else {
      while (*all_here == 0) __nanosleep(32);
    }
    __threadfence();
    if (atomicInc(counters + 2, last) == last) *all_here = 0;
  }
  __syncthreads();
  bool any = false;
  for (unsigned block = threadIdx.x; block < gridDim.x; block += blockDim.x) any |= __ldcg(flags + block) != 0;
  return __syncthreads_or(any);
}

template <class Acc>
__global__ void __launch_bounds__(kRowThreads, 1) end_row_kernel(
    const __grid_constant__ Row<Acc> r, bool* finite, uint32_t* counters, uint32_t* flags
) {
  const int64_t first = blockIdx.x * int64_t{kRowThreads} + threadIdx.x, step = gridDim.x * int64_t{kRowThreads};
  bool bad = false;
#pragma unroll 4
  for (int64_t c = first; c < r.size; c += step) bad |= !r.good(c);
  bad = any_block(bad, counters, flags);
  if (blockIdx.x == 0 && threadIdx.x == 0) *finite = !bad;
  if (bad) {
    for (int64_t c = first; c < r.size; c += step) r.row[c * r.stride] = 0;
    return;
  }
  const int lane = threadIdx.x % kLanes;
  for (int64_t c = first; c - lane < r.size; c += step) {
    const int64_t mine = c < r.size ? r.group(c) : 0;
    const bool begins = c < r.size && (c == 0 || r.group(c - 1) != mine);
    Acc sum = 0;
    int64_t member = c;
    while (begins && member < r.size && member < c + kWalk && r.group(member) == mine) sum += r.take(member++);
    uint32_t unfinished = __ballot_sync(kAllLanes, begins && member == c + kWalk);
    for (; unfinished != 0; unfinished &= unfinished - 1) {
      const int owner = __ffs(static_cast<int>(unfinished)) - 1;
      const int64_t group = __shfl_sync(kAllLanes, mine, owner);
      Acc rest = 0;
      for (int64_t at = __shfl_sync(kAllLanes, member, owner) + lane; at < r.size && r.group(at) == group;
           at += kLanes) {
        rest += r.take(at);
      }
      rest = warp_sum(rest);
      if (lane == owner) sum += rest;
    }
    if (begins) r.scores[mine * r.scores_stride] += sum;
  }
}

template <class Acc>
void run(const cpu::EndRow& given, bool* finite, Context& context) {
  const Row<Acc> row = {
      static_cast<Acc*>(given.scores),
      given.scores_size,
      given.scores_stride,
      static_cast<Acc*>(given.row),
      given.row_size,
      given.row_stride,
      given.groups,
      given.groups_stride,
      static_cast<Acc>(given.loss_scale)
  };
  int device = 0, processors = 0;
  context.check(cudaGetDevice(&device));
  context.check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  const int64_t wanted = cpu::ceil_div(given.row_size, kChannelsPerBlock);
  const int64_t blocks = std::max<int64_t>(std::min<int64_t>(wanted, processors), 1);
  uint32_t* const flags = static_cast<uint32_t*>(context.scratch(blocks > 1 ? blocks * sizeof(uint32_t) : 0));
  uint32_t* const counters = context.counters(blocks > 1 ? kMeetingCounters : 0);
  launch(context, end_row_kernel<Acc>, blocks, kRowThreads, blocks > 1, row, finite, counters, flags);
}

}  // namespace

void end_row(const cpu::EndRow& arguments, bool* finite, Context& context) {
  if (arguments.dtype == Dtype::float64) {
    run<double>(arguments, finite, context);
  } else {
    run<float>(arguments, finite, context);
  }
}

}  // namespace obc::cuda
