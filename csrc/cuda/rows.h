// Sums over all positions of each output: channel_dot where the positions lie innermost, weight_moments.
//
// Positions are counted in loads (16-byte vectors, or single elements). A warp sums an output if there are enough
// outputs to fill the device, or few positions each. Otherwise a block does, or several blocks sum a share each and the
// last one to finish adds the shares.
//
// Runs of adjacent elements that do not begin at a multiple of 16 bytes (maps of 17 x 17, one run per sample) are
// peeled: the elements before the first and after the last whole vector of a run are read one by one.
#pragma once

#include "device.h"

namespace obc::cuda {

constexpr int kLoadsAtOnce = 4;  // of each of the two arrays

struct Rows {
  const void* first;
  const void* second;
  bool vectors;
  Axes outputs;
  int64_t count;
  Axes positions;
  int64_t length;  // loads per output, an upper bound if peeled
  int64_t peeled;  // elements of a run if its vectors begin at different elements, else 0
  bool by_warp;
  int64_t splits;  // 1 if a warp sums an output
  int64_t share;   // loads of one split
};

// A sum over positions of some functions of a and g.
template <int kMoments, class Acc>
__device__ void add_moments(Acc (&sums)[kMoments], Acc a, Acc g) {
  const Acc product = a * g;
  sums[0] += product;
  if constexpr (kMoments == 5) {
    sums[1] += product * product;
    sums[2] += fabs(product);
    sums[3] += a * a;
    sums[4] += fabs(a);
  }
}

// Loads of both arrays, all in flight before the first of them is used.
template <class T, int kItems>
struct Loads {
  Loaded<T, kItems> first[kLoadsAtOnce], second[kLoadsAtOnce];

  __device__ void clear() {
#pragma unroll
    for (int n = 0; n < kLoadsAtOnce; ++n) {
      first[n].clear();
      second[n].clear();
    }
  }
  template <int kMoments>
  __device__ void add_to(Accumulator<T> (&sums)[kMoments]) const {
#pragma unroll
    for (int n = 0; n < kLoadsAtOnce; ++n) {
      Accumulator<T> left[kItems], right[kItems];
      first[n].unpack(left);
      second[n].unpack(right);
#pragma unroll
      for (int i = 0; i < kItems; ++i) add_moments(sums, left[i], right[i]);
    }
  }
};

// The sums over the loads `begin + step * n` below `end` of an output with several peeled runs. A load is a vector of a
// run; a run that begins late has one vector less, and its last load is empty. Load v also reads the v-th of the single
// elements.
template <class T, int kItems, int kMoments>
__device__ void read_runs(
    const Rows& r,
    const T* first,
    const T* second,
    int64_t begin,
    int64_t end,
    int64_t step,
    Accumulator<T> (&sums)[kMoments]
) {
  const int64_t room = r.positions.sizes[r.positions.count - 1];
  for (int64_t position = begin; position < end; position += kLoadsAtOnce * step) {
    Loads<T, kItems> loads;
    loads.clear();
#pragma unroll
    for (int n = 0; n < kLoadsAtOnce; ++n) {
      const int64_t here = position + n * step;
      if (here >= end) continue;
      const int64_t load = here - quotient(here, room) * room;
      const Place at = place(r.positions, here);
      const T* const a_run = first + at.first - load * kItems;
      const T* const g_run = second + at.second - load * kItems;
      const int64_t head = (kItems - reinterpret_cast<uintptr_t>(a_run) / sizeof(T) % kItems) % kItems;
      const int64_t vectors = (r.peeled - head) / kItems, single = r.peeled - vectors * kItems;
      if (load < vectors) {
        loads.first[n].load(first + at.first + head);
        loads.second[n].load(second + at.second + head);
      }
      if (load < single) {
        const int64_t element = load < head ? load : load + vectors * kItems;
        add_moments(sums, widen(__ldg(a_run + element)), widen(__ldg(g_run + element)));
      }
    }
    loads.add_to(sums);
  }
}

// The same for positions on one axis, which needs no divisions or multiplications. Vectors are adjacent, so the loads
// of one round lie at constant distances.
template <class T, int kItems, int kMoments>
__device__ void read_axis(
    const Rows& r,
    const T* first,
    const T* second,
    int64_t begin,
    int64_t end,
    int64_t step,
    Accumulator<T> (&sums)[kMoments]
) {
  const Place stride = kItems > 1 ? Place{kItems, kItems} : Place{r.positions.first[0], r.positions.second[0]};
  const T* a = first + begin * stride.first;
  const T* g = second + begin * stride.second;
  const Place jump = {step * stride.first, step * stride.second};
  for (int64_t position = begin; position < end; position += kLoadsAtOnce * step) {
    Loads<T, kItems> loads;
    loads.clear();
#pragma unroll
    for (int n = 0; n < kLoadsAtOnce; ++n) {
      if (position + n * step >= end) continue;
      loads.first[n].load(a + n * jump.first);
      loads.second[n].load(g + n * jump.second);
    }
    loads.add_to(sums);
    a += kLoadsAtOnce * jump.first;
    g += kLoadsAtOnce * jump.second;
  }
}

// The sums over the loads `begin + step * n` below `end`, of one output.
template <class T, int kItems, int kMoments>
__device__ void read_positions(
    const Rows& r, int64_t output, int64_t begin, int64_t end, int64_t step, Accumulator<T> (&sums)[kMoments]
) {
  const Place start = place(r.outputs, output);
  const T* first = static_cast<const T*>(r.first) + start.first;
  const T* second = static_cast<const T*>(r.second) + start.second;
  if constexpr (kItems > 1 && kMoments == 1) {
    if (r.peeled > 0 && r.positions.count > 1) {
      read_runs<T, kItems>(r, first, second, begin, end, step, sums);
      return;
    }
  }
  if (kItems > 1 && r.peeled > 0) {
    const int64_t head = (kItems - reinterpret_cast<uintptr_t>(first) / sizeof(T) % kItems) % kItems;
    const int64_t vectors = (r.peeled - head) / kItems, rest = r.peeled - vectors * kItems;
    // Fewer elements than two vectors have, one for each of the first threads of the output.
    if (begin < rest) {
      const int64_t at = begin < head ? begin : begin + vectors * kItems;
      add_moments(sums, widen(__ldg(first + at)), widen(__ldg(second + at)));
    }
    first += head;
    second += head;
    if (end > vectors) end = vectors;
  }
  if (r.positions.count == 1) {
    read_axis<T, kItems>(r, first, second, begin, end, step, sums);
    return;
  }
  for (int64_t position = begin; position < end; position += kLoadsAtOnce * step) {
    Loads<T, kItems> loads;
    loads.clear();
#pragma unroll
    for (int n = 0; n < kLoadsAtOnce; ++n) {
      if (position + n * step >= end) continue;
      const Place at = place(r.positions, position + n * step);
      loads.first[n].load(first + at.first);
      loads.second[n].load(second + at.second);
    }
    loads.add_to(sums);
  }
}

template <class Acc, int kMoments>
struct Results {
  Acc* sums[kMoments];
};

// Partial sums are (splits, kMoments, count), counters (count).
template <class T, int kItems, int kMoments>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) rows_kernel(
    const __grid_constant__ Rows r,
    Accumulator<T>* partials,
    uint32_t* counters,
    const __grid_constant__ Results<Accumulator<T>, kMoments> results
) {
  using Acc = Accumulator<T>;
  __shared__ Acc warp_sums[kMoments * kWarps];
  __shared__ Acc scratch[kThreads];
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;

  if (r.by_warp) {
    for (int64_t output = blockIdx.x * int64_t{kWarps} + warp; output < r.count;
         output += gridDim.x * int64_t{kWarps}) {
      Acc sums[kMoments] = {};
      read_positions<T, kItems>(r, output, lane, r.length, kLanes, sums);
#pragma unroll
      for (int m = 0; m < kMoments; ++m) {
        const Acc sum = warp_sum(sums[m]);
        if (lane == 0) results.sums[m][output] = sum;
      }
    }
    return;
  }

  for (int64_t item = blockIdx.x; item < r.count * r.splits; item += gridDim.x) {
    const int64_t output = item / r.splits, split = item % r.splits;
    const int64_t begin = split * r.share;
    const int64_t end = begin + r.share < r.length ? begin + r.share : r.length;
    Acc sums[kMoments] = {};
    read_positions<T, kItems>(r, output, begin + threadIdx.x, end, kThreads, sums);
#pragma unroll
    for (int m = 0; m < kMoments; ++m) {
      const Acc sum = warp_sum(sums[m]);
      if (lane == 0) warp_sums[m * kWarps + warp] = sum;
    }
    __syncthreads();
    const auto of_warps = [&](int64_t moment, int64_t term) { return warp_sums[moment * kWarps + term]; };
    add_up(kMoments, kWarps, scratch, of_warps, [&](int64_t moment, Acc sum) {
      if (r.splits == 1) {
        results.sums[moment][output] = sum;
      } else {
        partials[(split * kMoments + moment) * r.count + output] = sum;
      }
    });
    if (r.splits > 1 && last_of(counters + output, r.splits)) {
      const auto of_splits = [&](int64_t moment, int64_t from) {
        return __ldcg(partials + (from * kMoments + moment) * r.count + output);
      };
      add_up(kMoments, r.splits, scratch, of_splits, [&](int64_t moment, Acc sum) {
        results.sums[moment][output] = sum;
      });
    }
  }
}

}  // namespace obc::cuda
