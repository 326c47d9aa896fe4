// Registers the CUDA kernels with torch as obc_cuda::<op>, on LibTorch's stable ABI: one build serves torch 2.11 and
// later, and needs neither a torch with CUDA nor a GPU.
//
// Schemas come from the table in python/obc/backends/operators.py; python/obc/ops checks the arguments before they come
// here. weight_dot_list takes layers of one dtype.

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/kernels.h"
#include "schemas.h"
#include "tensors.h"

// The dispatch key under which the operators are registered; the emulation of the tests runs them on CPU tensors.
#ifndef OBC_CUDA_DISPATCH_KEY
#define OBC_CUDA_DISPATCH_KEY CUDA
#endif

namespace {

using obc::dtype_of;
using obc::empty;
using obc::empty_sums;
using obc::MaskedPair;
using obc::pair_of;
using obc::Tensor;
using obc::cpu::Pair;
using obc::cpu::WeightDot;
using torch::stable::accelerator::DeviceGuard;
using Tensors = std::vector<Tensor>;

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// The counters of a stream: zero between any two of its kernels, so that no call has to clear them. Smaller ones that
// were outgrown are kept too: another thread may be about to launch a kernel over them.
struct Counters {
  std::vector<Tensor> memory;
  int64_t count = 0;
};

// Never destroyed: tensors may not outlive torch's allocators at exit.
std::mutex& state_mutex() {
  static auto& mutex = *new std::mutex;
  return mutex;
}

std::map<std::pair<int32_t, cudaStream_t>, Counters>& stream_counters() {
  static auto& counters = *new std::map<std::pair<int32_t, cudaStream_t>, Counters>;
  return counters;
}

// One operator call: its device made current, its stream, and memory that torch's allocator reuses in stream order.
class Call : public obc::cuda::Context {
 public:
  explicit Call(const Tensor& on)
      : Context(current_stream(on.get_device_index())), guard_(on.get_device_index()), on_(on) {
    // The library has a CUDA runtime of its own, which torch's guard does not tell of the device.
    check(cudaSetDevice(on.get_device_index()));
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(stream, &status));
    capturing_ = status != cudaStreamCaptureStatusNone;
  }

  // A captured graph is replayed on any stream, beside whatever runs on this one: it shares no state with eager calls.
  bool capturing() const { return capturing_; }

  void* scratch(int64_t bytes) override {
    if (bytes == 0) return nullptr;
    memory_.push_back(empty({bytes}, aoti_torch_dtype_uint8(), on_));
    return memory_.back().mutable_data_ptr();
  }

  uint32_t* counters(int64_t count) override {
    if (count == 0) return nullptr;
    if (capturing_) return zeros(scratch(count * sizeof(uint32_t)), count);
    const std::lock_guard<std::mutex> lock(state_mutex());
    Counters& mine = stream_counters()[{on_.get_device_index(), stream}];
    if (mine.count < count) {
      const int64_t size = std::max<int64_t>(2 * count, 4096);  // grows seldom
      mine.memory.push_back(empty({size}, aoti_torch_dtype_int32(), on_));
      zeros(mine.memory.back().mutable_data_ptr(), size);
      mine.count = size;
    }
    return static_cast<uint32_t*>(mine.memory.back().mutable_data_ptr());
  }

  void check(cudaError_t error) override { STD_CUDA_CHECK(error); }

 private:
  uint32_t* zeros(void* memory, int64_t count) {
    check(cudaMemsetAsync(memory, 0, count * sizeof(uint32_t), stream));
    return static_cast<uint32_t*>(memory);
  }

  const DeviceGuard guard_;
  const Tensor& on_;
  bool capturing_ = false;
  std::vector<Tensor> memory_;
};

Tensor channel_dot(const Tensor& activation, const Tensor& grad, int64_t channel_dim, bool per_sample) {
  Call call(activation);
  const int64_t channels = activation.size(channel_dim);
  const Tensor out =
      per_sample ? empty_sums({activation.size(0), channels}, activation) : empty_sums({channels}, activation);
  void* const sums = out.mutable_data_ptr();
  if (!obc::cuda::channel_dot(pair_of(activation, grad), channel_dim, per_sample, sums, call)) {
    const Tensor a = torch::stable::contiguous(activation), g = torch::stable::contiguous(grad);
    obc::cuda::channel_dot(pair_of(a, g), channel_dim, per_sample, sums, call);
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> channel_moments(
    const Tensor& x, int64_t channel_dim, const std::optional<Tensor>& mask
) {
  Call call(x);
  const int64_t channels = x.size(channel_dim);
  Tensors sums;
  void* moments[4];
  for (void*& moment : moments) {
    sums.push_back(empty_sums({channels}, x));
    moment = sums.back().mutable_data_ptr();
  }
  const MaskedPair pair(x, channel_dim, mask);
  if (!obc::cuda::channel_moments(pair.pair, channel_dim, mask.has_value(), moments, call)) {
    const Tensor copy = torch::stable::contiguous(x);
    std::optional<Tensor> mask_copy;
    if (mask) mask_copy = torch::stable::contiguous(*mask);
    const MaskedPair copies(copy, channel_dim, mask_copy);
    obc::cuda::channel_moments(copies.pair, channel_dim, mask.has_value(), moments, call);
  }
  return {sums[0], sums[1], sums[2], sums[3]};
}

std::tuple<Tensor, Tensor> weight_dot(
    const Tensor& weight,
    const Tensor& grad,
    const std::optional<Tensor>& bias,
    const std::optional<Tensor>& bias_grad,
    int64_t groups,
    bool transposed
) {
  Call call(weight);
  const Tensor row_dot = empty_sums({weight.size(0)}, weight),
               column_dot = empty_sums({weight.size(1) * groups}, weight);
  Pair bias_pair;
  if (bias) bias_pair = pair_of(*bias, *bias_grad);
  WeightDot layer = {
      pair_of(weight, grad),
      bias ? &bias_pair : nullptr,
      groups,
      transposed,
      row_dot.mutable_data_ptr(),
      column_dot.mutable_data_ptr()
  };
  if (!obc::cuda::weight_dot(layer, call)) {
    const Tensor w = torch::stable::contiguous(weight), g = torch::stable::contiguous(grad);
    layer.weight = pair_of(w, g);
    obc::cuda::weight_dot(layer, call);
  }
  if (transposed) return {column_dot, row_dot};
  return {row_dot, column_dot};
}

using OptionalTensors = std::vector<std::optional<Tensor>>;

// Everything that a worklist is made of, and where it runs.
std::vector<int64_t> key_of(const std::vector<WeightDot>& layers, int32_t device, cudaStream_t stream) {
  std::vector<int64_t> key = {device, reinterpret_cast<int64_t>(stream)};
  const auto add = [&](const Pair& pair) {
    key.insert(key.end(), {static_cast<int64_t>(pair.dtype), pair.dims});
    key.insert(key.end(), {reinterpret_cast<int64_t>(pair.first), reinterpret_cast<int64_t>(pair.second)});
    for (const int64_t* values : {pair.sizes, pair.first_strides, pair.second_strides}) {
      key.insert(key.end(), values, values + pair.dims);
    }
  };
  for (const WeightDot& layer : layers) {
    key.insert(key.end(), {layer.groups, layer.transposed, layer.bias != nullptr});
    add(layer.weight);
    if (layer.bias) add(*layer.bias);
  }
  return key;
}

struct Prepared {
  std::vector<int64_t> key;
  obc::cuda::Worklist worklist;
  Tensor table;
};

// A model's gradients come in few sets of buffers.
constexpr size_t kPreparedWorklists = 8;

using PreparedPointer = std::shared_ptr<const Prepared>;

// The most recently used first; guarded by state_mutex.
std::list<PreparedPointer>& prepared_worklists() {
  static auto& prepared = *new std::list<PreparedPointer>;
  return prepared;
}

// Null where a layer has too many axes.
PreparedPointer prepare(const std::vector<WeightDot>& layers, std::vector<int64_t> key, const Tensor& on, Call& call) {
  auto prepared = std::make_shared<Prepared>();
  if (!obc::cuda::plan_weight_dot_list(layers, prepared->worklist)) return nullptr;
  prepared->key = std::move(key);
  prepared->table = empty({static_cast<int64_t>(prepared->worklist.table.size())}, aoti_torch_dtype_int64(), on);
  obc::cuda::upload(prepared->worklist.table, static_cast<int64_t*>(prepared->table.mutable_data_ptr()), call);
  return prepared;
}

// The worklist of these layers from those kept, or a new one.
PreparedPointer kept_or_new(const std::vector<WeightDot>& layers, const Tensor& on, Call& call) {
  std::vector<int64_t> key = key_of(layers, on.get_device_index(), call.stream);
  const std::lock_guard<std::mutex> lock(state_mutex());
  std::list<PreparedPointer>& all = prepared_worklists();
  const auto found = std::find_if(all.begin(), all.end(), [&](const auto& one) { return one->key == key; });
  if (found != all.end()) {
    all.splice(all.begin(), all, found);
    return all.front();
  }
  PreparedPointer prepared = prepare(layers, std::move(key), on, call);
  if (!prepared) return nullptr;
  all.push_front(prepared);
  if (all.size() > kPreparedWorklists) all.pop_back();
  return prepared;
}

// Whether all layers could be run; `keep` says whether the same memory may come again.
bool run_list(const std::vector<WeightDot>& layers, const Tensor& on, bool keep, Call& call) {
  const PreparedPointer prepared =
      keep && !call.capturing() ? kept_or_new(layers, on, call) : prepare(layers, {}, on, call);
  if (!prepared) return false;
  const int64_t* const table = static_cast<const int64_t*>(prepared->table.const_data_ptr());
  obc::cuda::weight_dot_list(prepared->worklist, table, layers, call);
  return true;
}

std::tuple<Tensors, Tensors> weight_dot_list(
    const Tensors& weights,
    const Tensors& grads,
    const OptionalTensors& biases,
    const OptionalTensors& bias_grads,
    const std::vector<int64_t>& groups,
    const std::vector<bool>& transposed
) {
  Call call(weights[0]);
  const size_t count = weights.size();
  std::vector<Pair> bias_pairs(count);
  std::vector<WeightDot> layers;
  Tensors out_dots, in_dots;
  for (size_t i = 0; i < count; ++i) {
    const Tensor& weight = weights[i];
    if (biases[i]) bias_pairs[i] = pair_of(*biases[i], *bias_grads[i]);
    const Tensor row_dot = empty_sums({weight.size(0)}, weight);
    const Tensor column_dot = empty_sums({weight.size(1) * groups[i]}, weight);
    layers.push_back(
        {pair_of(weight, grads[i]),
         biases[i] ? &bias_pairs[i] : nullptr,
         groups[i],
         transposed[i],
         row_dot.mutable_data_ptr(),
         column_dot.mutable_data_ptr()}
    );
    out_dots.push_back(transposed[i] ? column_dot : row_dot);
    in_dots.push_back(transposed[i] ? row_dot : column_dot);
  }
  for (size_t begin = 0; begin < count; begin += obc::cuda::kMostListed) {
    const size_t end = std::min(begin + obc::cuda::kMostListed, count);
    std::vector<WeightDot> listed(layers.begin() + begin, layers.begin() + end);
    if (run_list(listed, weights[0], true, call)) continue;
    Tensors copies;
    for (size_t i = begin; i < end; ++i) {
      copies.push_back(torch::stable::contiguous(weights[i]));
      copies.push_back(torch::stable::contiguous(grads[i]));
      listed[i - begin].weight = pair_of(*(copies.end() - 2), copies.back());
    }
    run_list(listed, weights[0], false, call);
  }
  return {out_dots, in_dots};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> weight_moments(const Tensor& weight, const Tensor& grad) {
  Call call(weight);
  const int64_t rows = weight.size(0);
  Tensors sums;
  void* moments[5];
  for (void*& moment : moments) {
    sums.push_back(empty_sums({rows}, weight));
    moment = sums.back().mutable_data_ptr();
  }
  if (!obc::cuda::weight_moments(pair_of(weight, grad), moments, call)) {
    const Tensor w = torch::stable::contiguous(weight), g = torch::stable::contiguous(grad);
    obc::cuda::weight_moments(pair_of(w, g), moments, call);
  }
  return {sums[0], sums[1], sums[2], sums[3], sums[4]};
}

Tensor end_row(const Tensor& scores, const Tensor& row, double loss_scale, const std::optional<Tensor>& groups) {
  Call call(scores);
  const Tensor finite = empty({}, aoti_torch_dtype_bool(), scores);
  obc::cuda::end_row(
      {dtype_of(scores),
       scores.mutable_data_ptr(),
       scores.numel(),
       scores.stride(0),
       row.mutable_data_ptr(),
       row.numel(),
       row.stride(0),
       groups ? static_cast<const int64_t*>(groups->const_data_ptr()) : nullptr,
       groups ? groups->stride(0) : 0,
       loss_scale},
      static_cast<bool*>(finite.mutable_data_ptr()),
      call
  );
  return finite;
}

}  // namespace

STABLE_TORCH_LIBRARY(obc_cuda, library) {
  OBC_DEFINE(CUDA, channel_dot);
  OBC_DEFINE(CUDA, channel_moments);
  OBC_DEFINE(CUDA, weight_dot);
  OBC_DEFINE(CUDA, weight_dot_list);
  OBC_DEFINE(CUDA, weight_moments);
  OBC_DEFINE(CUDA, end_row);
}

STABLE_TORCH_LIBRARY_IMPL(obc_cuda, OBC_CUDA_DISPATCH_KEY, library) {
  library.impl("channel_dot", TORCH_BOX(&channel_dot));
  library.impl("channel_moments", TORCH_BOX(&channel_moments));
  library.impl("weight_dot", TORCH_BOX(&weight_dot));
  library.impl("weight_dot_list", TORCH_BOX(&weight_dot_list));
  library.impl("weight_moments", TORCH_BOX(&weight_moments));
  library.impl("end_row", TORCH_BOX(&end_row));
}
