// The CUDA kernels of obc: raw pointers, sizes, strides and a stream; nothing of torch or Python.
//
// Strides count elements and may be zero. Inputs are read in their own type and summed in float (double for float64).
// Every result depends only on shapes, strides, alignment and values: partial sums have fixed places and are added in
// a fixed order, without atomics on values. Nothing here waits for the device or reads from it, and every call can be
// captured into a CUDA graph. Callers have checked the arguments and made the device current.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "cpu/kernels.h"

namespace obc::cuda {

using cpu::Dtype;
using cpu::Pair;
using cpu::WeightDot;

// Where one call runs and where its memory comes from.
class Context {
 public:
  explicit Context(cudaStream_t stream) : stream(stream) {}
  virtual ~Context() = default;

  // Uninitialised device memory that outlives the kernels launched by this call.
  virtual void* scratch(int64_t bytes) = 0;
  // Counters that are zero and belong to this stream, or to the graph that it captures; kernels leave them zero.
  virtual uint32_t* counters(int64_t count) = 0;
  // Throws if `error` is an error.
  virtual void check(cudaError_t error) = 0;

  const cudaStream_t stream;
};

// The most axes of one kind that a kernel walks, after joining axes that continue each other. With more, the planning
// functions return false without launching anything, and the caller must copy the tensor to contiguous memory.
constexpr int kMaxAxes = 4;

// As obc::cpu::channel_dot, in device memory.
bool channel_dot(const Pair& pair, int64_t channel_dim, bool per_sample, void* out, Context& context);

// As obc::cpu::weight_dot for one layer; its parameters are kernel arguments.
bool weight_dot(const WeightDot& layer, Context& context);

// Per row of dim 0, five contiguous vectors: sum wg, sum (wg)^2, sum |wg|, sum w^2, sum |w|.
bool weight_moments(const Pair& weight, void* const moments[5], Context& context);

// As obc::cpu::channel_moments.
bool channel_moments(const Pair& pair, int64_t channel_dim, bool masked, void* const moments[4], Context& context);

// The plan of one launch for layers of one dtype. It depends only on their sizes, strides and alignment, so it serves
// all tensors that agree in these. `table` has a record of each layer.
struct Worklist {
  Dtype dtype;
  int64_t layers;
  int64_t items;
  int64_t partials;  // accumulators of scratch memory
  int64_t counters;
  std::vector<int64_t> table;
};

// The most layers of one launch. Everything about them is passed in the kernel's arguments, which may take 32,764 bytes
// (CUDA 12.1, drivers from 530 on). There is no table in device memory, so a captured graph needs none.
constexpr size_t kMostListed = 70;

// Returns false, without planning anything, if a layer has more axes than a kernel walks.
bool plan_weight_dot_list(const std::vector<WeightDot>& layers, Worklist& worklist);
// Runs the layers, which are those of the plan or equal to them except for their memory.
void weight_dot_list(const Worklist& worklist, const std::vector<WeightDot>& layers, Context& context);

// As obc::cpu::end_row, but groups that descend or leave the range of scores can't be reported without a host read;
// they make the row count as not finite, so nothing is added.
void end_row(const cpu::EndRow& arguments, bool* finite, Context& context);

}  // namespace obc::cuda
