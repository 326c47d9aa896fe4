// Registers the CUDA kernels with torch as obc_cuda::<op>, on LibTorch's stable ABI: one build serves torch 2.11 and
// later, and needs neither a torch with CUDA nor a GPU.
//
// Schemas come from the table in python/obc/backends/operators.py; python/obc/ops checks the arguments before.
// weight_dot_list takes layers of one dtype.

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

// The dispatch key of the operators; the emulation in the tests runs them on CPU tensors.
#ifndef OBC_CUDA_DISPATCH_KEY
#define OBC_CUDA_DISPATCH_KEY CUDA
#endif

// How many counters are cleared at once before captures; the tests use fewer, so that they run out.
#ifndef OBC_CUDA_RESERVE
#define OBC_CUDA_RESERVE (1 << 18)
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

// The counters of a stream. They are zero between any two of its kernels, so no call has to clear them. When larger
// ones are needed, the smaller ones are kept, because another thread may be about to launch a kernel that uses them.
struct Counters {
  std::vector<Tensor> memory;
  int64_t count = 0;
};

// Zeroed counters of a device for captured calls: each call keeps some permanently, because its graph may be replayed
// on any stream. They are cleared before any capture, so that a graph has no node for it.
struct Reserve {
  std::vector<Tensor> memory;
  uint32_t* next = nullptr;
  int64_t left = 0;
};

// An output shared by several blocks needs one, and there are rarely more such outputs than blocks in a launch (264):
// enough for about a thousand calls. Calls that find none left clear counters in their own graph.
constexpr int64_t kReserve = OBC_CUDA_RESERVE;
constexpr size_t kMostReserves = 16;

// Never destroyed, because at exit torch's allocators may be gone before these tensors.
std::mutex& state_mutex() {
  static auto& mutex = *new std::mutex;
  return mutex;
}

std::map<std::pair<int32_t, cudaStream_t>, Counters>& stream_counters() {
  static auto& counters = *new std::map<std::pair<int32_t, cudaStream_t>, Counters>;
  return counters;
}

std::map<int32_t, Reserve>& reserves() {
  static auto& reserves = *new std::map<int32_t, Reserve>;
  return reserves;
}

// One operator call: its device made current, its stream, and memory that torch's allocator reuses in stream order.
class Call : public obc::cuda::Context {
 public:
  explicit Call(const Tensor& on)
      : Context(current_stream(on.get_device_index())), guard_(on.get_device_index()), on_(on) {
    // The library has its own CUDA runtime, which torch's guard does not inform of the device.
    check(cudaSetDevice(on.get_device_index()));
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(stream, &status));
    capturing_ = status != cudaStreamCaptureStatusNone;
  }

  void* scratch(int64_t bytes) override {
    if (bytes == 0) return nullptr;
    memory_.push_back(empty({bytes}, aoti_torch_dtype_uint8(), on_));
    return memory_.back().mutable_data_ptr();
  }

  uint32_t* counters(int64_t count) override {
    if (count == 0) return nullptr;
    const std::lock_guard<std::mutex> lock(state_mutex());
    if (capturing_) return of_graph(count);
    fill_reserve();
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
  // Counters that a graph keeps, because it may be replayed on any stream, concurrently with this one.
  uint32_t* of_graph(int64_t count) {
    Reserve& reserve = reserves()[on_.get_device_index()];
    if (reserve.left < count) return zeros(scratch(count * sizeof(uint32_t)), count);
    reserve.left -= count;
    return std::exchange(reserve.next, reserve.next + count);
  }

  // Ensures at least half a reserve for the next capture. Waits until the counters are cleared, because a replay may
  // come on a stream that is not ordered after this one.
  void fill_reserve() {
    Reserve& reserve = reserves()[on_.get_device_index()];
    if (reserve.left >= kReserve / 2 || reserve.memory.size() == kMostReserves) return;
    reserve.memory.push_back(empty({kReserve}, aoti_torch_dtype_int32(), on_));
    reserve.next = zeros(reserve.memory.back().mutable_data_ptr(), kReserve);
    reserve.left = kReserve;
    // This must not disturb another thread's capture.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    check(cudaThreadExchangeStreamCaptureMode(&mode));
    const cudaError_t waited = cudaStreamSynchronize(stream);
    check(cudaThreadExchangeStreamCaptureMode(&mode));
    check(waited);
  }

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

// Everything that a plan depends on: of the tensors' addresses only the remainders modulo 16 bytes.
std::vector<int64_t> key_of(const std::vector<WeightDot>& layers) {
  std::vector<int64_t> key;
  const auto add = [&](const Pair& pair) {
    key.insert(key.end(), {static_cast<int64_t>(pair.dtype), pair.dims});
    for (const void* data : {pair.first, pair.second}) key.push_back(reinterpret_cast<uintptr_t>(data) % 16);
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

struct Planned {
  std::vector<int64_t> key;
  obc::cuda::Worklist worklist;
};

// A process scores few models at a time.
constexpr size_t kKeptPlans = 8;

using PlanPointer = std::shared_ptr<const Planned>;

// The most recently used first; guarded by state_mutex.
std::list<PlanPointer>& kept_plans() {
  static auto& plans = *new std::list<PlanPointer>;
  return plans;
}

// The cached plan of these layers, or a new one; null if a layer has too many axes.
PlanPointer plan_of(const std::vector<WeightDot>& layers) {
  std::vector<int64_t> key = key_of(layers);
  const std::lock_guard<std::mutex> lock(state_mutex());
  std::list<PlanPointer>& all = kept_plans();
  const auto found = std::find_if(all.begin(), all.end(), [&](const auto& one) { return one->key == key; });
  if (found != all.end()) {
    all.splice(all.begin(), all, found);
    return all.front();
  }
  auto planned = std::make_shared<Planned>();
  if (!obc::cuda::plan_weight_dot_list(layers, planned->worklist)) return nullptr;
  planned->key = std::move(key);
  all.push_front(planned);
  if (all.size() > kKeptPlans) all.pop_back();
  return planned;
}

// Whether all layers could be run.
bool run_list(const std::vector<WeightDot>& layers, Call& call) {
  const PlanPointer planned = plan_of(layers);
  if (!planned) return false;
  obc::cuda::weight_dot_list(planned->worklist, layers, call);
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
    if (run_list(listed, call)) continue;
    Tensors copies;
    for (size_t i = begin; i < end; ++i) {
      copies.push_back(torch::stable::contiguous(weights[i]));
      copies.push_back(torch::stable::contiguous(grads[i]));
      listed[i - begin].weight = pair_of(*(copies.end() - 2), copies.back());
    }
    run_list(listed, call);
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

STABLE_TORCH_LIBRARY(obc_cuda, library) { OBC_CUDA_OPERATORS(OBC_DEFINE_CUDA); }

STABLE_TORCH_LIBRARY_IMPL(obc_cuda, OBC_CUDA_DISPATCH_KEY, library) { OBC_CUDA_OPERATORS(OBC_IMPLEMENT); }
