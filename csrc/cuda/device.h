// Building blocks of the kernels: element types, 16-byte loads, walks over strided axes, sums in a fixed order.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <utility>

#include "kernels.h"

namespace obc::cuda {

constexpr int kLanes = 32;  // threads of a warp
constexpr uint32_t kAllLanes = 0xffffffff;
// Two blocks of eight warps per multiprocessor leave each thread the 128 registers that eight 16-byte loads and their
// sums need. 16 warps then have up to 64 KiB in flight; bandwidth times latency requires about 25 KiB (4.3 TB/s and
// 0.7 us over 132 multiprocessors).
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kLanes;
constexpr int kBlocksPerProcessor = 2;
// Blocks of a launch with enough work: two on each of 132 multiprocessors. The number does not depend on the device, so
// that every device splits a sum in the same way. More blocks would mean more partial sums for the last one to add.
constexpr int kBlocks = 264;
constexpr int kVectorBytes = 16;

template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

__device__ inline float widen(float value) { return value; }
__device__ inline double widen(double value) { return value; }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float widen(__half value) { return __half2float(value); }

// kItems neighbouring elements, loaded at once. A launch reads them once, so they should be evicted first.
template <class T, int kItems>
struct Loaded {
  static_assert(kItems * sizeof(T) == kVectorBytes, "one vector or one element");
  uint4 raw;

  __device__ void clear() { raw = make_uint4(0, 0, 0, 0); }
  __device__ void load(const T* from) { raw = __ldcs(reinterpret_cast<const uint4*>(from)); }
  __device__ void unpack(Accumulator<T> (&values)[kItems]) const {
    T items[kItems];
    memcpy(items, &raw, kVectorBytes);
#pragma unroll
    for (int i = 0; i < kItems; ++i) values[i] = widen(items[i]);
  }
};

template <class T>
struct Loaded<T, 1> {
  Accumulator<T> value;

  __device__ void clear() { value = 0; }
  __device__ void load(const T* from) { value = widen(__ldg(from)); }
  __device__ void unpack(Accumulator<T> (&values)[1]) const { values[0] = value; }
};

// A place in the two arrays, in elements.
struct Place {
  int64_t first;
  int64_t second;
};

// Axes outermost first; index = ((i0 * size1 + i1) * size2 + i2) ...; at least one axis.
struct Axes {
  int64_t count;
  int64_t sizes[kMaxAxes];
  int64_t first[kMaxAxes];
  int64_t second[kMaxAxes];
};

// a / b for non-negative numbers. Most fit in 32 bits; a 64-bit division is a subroutine call.
__device__ inline int64_t quotient(int64_t a, int64_t b) {
  if ((a | b) >> 32 == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

__device__ inline Place place(const Axes& axes, int64_t index) {
  Place at = {0, 0};
#pragma unroll 1  // usually one axis and no step: four copies of a division would only fill the instruction cache
  for (int d = static_cast<int>(axes.count) - 1; d > 0; --d) {
    const int64_t outer = quotient(index, axes.sizes[d]);
    const int64_t rest = index - outer * axes.sizes[d];
    at.first += rest * axes.first[d];
    at.second += rest * axes.second[d];
    index = outer;
  }
  at.first += index * axes.first[0];
  at.second += index * axes.second[0];
  return at;
}

// The sum over the lanes of a warp, returned in all of them; the tree makes it the same in all.
template <class Acc>
__device__ Acc warp_sum(Acc value) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

// Whether this block is the last of `count` to get here; it then sees everything that the others wrote before. Leaves
// the counter at zero. Every thread of the block must call it.
__device__ inline bool last_of(uint32_t* counter, int64_t count) {
  if (count == 1) {
    __syncthreads();
    return true;
  }
  __threadfence();
  __syncthreads();
  const uint32_t most = static_cast<uint32_t>(count - 1);
  const bool last = __syncthreads_or(threadIdx.x == 0 && atomicInc(counter, most) == most);
  if (last) __threadfence();
  return last;
}

// How many threads share one output in add_up; at the end one of them adds their sums.
constexpr int kSharers = 32;

// store(i, sum of load(i, j) over j < terms) for all i < count, by the whole block and in a fixed order. `shared` has
// kThreads accumulators. Neighbouring threads take neighbouring i.
template <class Acc, class Load, class Store>
__device__ void add_up(int64_t count, int64_t terms, Acc* shared, const Load& load, const Store& store) {
  for (int64_t begin = 0; begin < count; begin += kThreads) {
    const int outputs = static_cast<int>(count - begin < kThreads ? count - begin : kThreads);
    int sharers = kThreads / outputs < kSharers ? kThreads / outputs : kSharers;
    if (terms < sharers) sharers = terms < 1 ? 1 : static_cast<int>(terms);
    const int output = static_cast<int>(threadIdx.x) % outputs, share = static_cast<int>(threadIdx.x) / outputs;
    Acc sum = 0;
    if (share < sharers) {
      // The loads of 16 terms are in flight at once: each comes from the level-2 cache.
#pragma unroll 16
      for (int64_t j = share; j < terms; j += sharers) sum += load(begin + output, j);
    }
    if (sharers > 1) {
      __syncthreads();
      shared[threadIdx.x] = sum;
      __syncthreads();
      if (share == 0) {
#pragma unroll 4
        for (int other = 1; other < sharers; ++other) sum += shared[other * outputs + output];
      }
    }
    if (share == 0) store(begin + output, sum);
  }
  __syncthreads();
}

// Runs kernel(arguments...) on the context's stream. Cooperative blocks are all resident at once.
template <class... Parameters, class... Arguments>
void launch(
    Context& context,
    void (*kernel)(Parameters...),
    int64_t blocks,
    int threads,
    bool cooperative,
    Arguments&&... arguments
) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = context.stream;
  config.attrs = &attribute;
  config.numAttrs = cooperative ? 1 : 0;
  context.check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
}

// Blocks for `items` that a grid strides over.
inline int64_t grid(int64_t items) {
  constexpr int64_t kMost = int64_t{1} << 30;  // a grid has fewer than 2^31 blocks
  return items < kMost ? items : kMost;
}

// Calls f with a null pointer to the element type of `dtype`.
template <class F>
void for_type(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::float32:
      return f(static_cast<const float*>(nullptr));
    case Dtype::float64:
      return f(static_cast<const double*>(nullptr));
    case Dtype::bfloat16:
      return f(static_cast<const __nv_bfloat16*>(nullptr));
    case Dtype::float16:
      return f(static_cast<const __half*>(nullptr));
  }
}

inline int element_size(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

}  // namespace obc::cuda
