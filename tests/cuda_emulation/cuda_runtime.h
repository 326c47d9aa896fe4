// CUDA's execution model on the host, for tests: the kernels of csrc/cuda, compiled by a C++ compiler, run thread by
// thread as fibers that change places at barriers, shuffles and waits. It stands before the toolkit's headers on the
// include path and has what those kernels use, nothing more.
//
// A block that deadlocks, leaves threads behind at a barrier or shuffles with an incomplete warp ends the process with
// a message. The order in which threads run is a switch: results that depend on it betray a missing barrier.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after the other; a cooperative launch must not use it

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x) : x(x) {}
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

// Those of the thread that is running.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

// Runs `body` in every thread of the launch and returns when all have ended.
void run(unsigned blocks, unsigned threads, bool cooperative, const std::function<void()>& body);
// The sum over the block of `value`, after all its threads have come here.
int barrier(int value);
// What each lane of this warp hands in, after all have; good until the next call.
const uint64_t* exchange(uint64_t value);
void pause();
bool capturing();
extern int64_t vector_loads;  // 16-byte loads so far
extern int64_t memsets;       // memory cleared so far, in calls

}  // namespace emulation

inline void __syncthreads() { emulation::barrier(0); }
inline int __syncthreads_count(int predicate) { return emulation::barrier(predicate != 0); }
inline int __syncthreads_or(int predicate) { return emulation::barrier(predicate != 0) != 0; }
inline void __threadfence() {}
inline void __nanosleep(unsigned) { emulation::pause(); }

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = emulation::exchange(bits)[lane];
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
template <class T>
T __shfl_xor_sync(unsigned lanes, T value, int offset) {
  return __shfl_sync(lanes, value, static_cast<int>(threadIdx.x % 32) ^ offset);
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  const uint64_t* const votes = emulation::exchange(predicate != 0);
  unsigned ballot = 0;
  for (int lane = 0; lane < 32; ++lane) ballot |= static_cast<unsigned>(votes[lane]) << lane;
  return ballot;
}
inline int __ffs(int bits) { return __builtin_ffs(bits); }

inline uint32_t atomicInc(uint32_t* address, uint32_t most) {
  const uint32_t before = *address;
  *address = before >= most ? 0 : before + 1;
  return before;
}
template <class T>
T __ldcs(const T* address) {
  // A vector load faults on the device where the address is no multiple of its size.
  if (reinterpret_cast<uintptr_t>(address) % alignof(T) != 0) __builtin_trap();
  emulation::vector_loads += 1;
  return *address;
}
template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}

using cudaStream_t = struct EmulatedStream*;
enum cudaError_t { cudaSuccess };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative };

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  union {
    int cooperative;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = emulation::capturing() ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  emulation::memsets += 1;
  return cudaSuccess;
}
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 3;  // multiprocessors: enough for a launch whose blocks wait for each other
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments
) {
  const std::tuple<std::decay_t<Parameters>...> parameters(std::forward<Arguments>(arguments)...);
  const bool cooperative = config->numAttrs > 0 && config->attrs[0].val.cooperative;
  emulation::run(config->gridDim.x, config->blockDim.x, cooperative, [&] { std::apply(kernel, parameters); });
  return cudaSuccess;
}
