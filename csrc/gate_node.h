// The autograd node of a gate: an identity whose backward computes channel_dot(activation, gradient) and adds it to the
// gate's gradient, a slice of the flat row, as AccumulateGrad would: in place, or by a new tensor under create_graph.
// No Python runs in it. python/obc/scoring/reading/gates.py is the definition, to the bit.
#pragma once

#include <ATen/TensorUtils.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cpu/kernels.h"

namespace obc::gates {

using at::Tensor;
using torch::autograd::AccumulateGrad;
using torch::autograd::Node;
using torch::autograd::variable_list;
// A std::shared_ptr in some versions of torch, an intrusive pointer in others.
using NodePtr = decltype(torch::autograd::Edge::function);

template <class T>
auto make_node() {
  if constexpr (std::is_same_v<NodePtr, std::shared_ptr<Node>>) {
    return std::shared_ptr<T>(new T(), [](T* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<T>();
  }
}

// --- the operator ------------------------------------------------------------------------------------------------

inline void run_parallel(int64_t tasks, int64_t grain, obc::cpu::ParallelFor::Body body, const void* context) {
  struct Call {
    obc::cpu::ParallelFor::Body body;
    const void* context;
  } call = {body, context};
  const auto run = [](int64_t begin, int64_t end, void* of) {
    const Call& call = *static_cast<const Call*>(of);
    call.body(begin, end, call.context);
  };
  // torch's own threads, without OpenMP in this library.
  TORCH_CHECK(torch_parallel_for(0, tasks, grain, run, &call) == 0, "obc: torch's parallel_for failed");
}

constexpr obc::cpu::ParallelFor kParallel = {run_parallel};

inline std::optional<obc::cpu::Dtype> dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return obc::cpu::Dtype::float32;
    case at::kDouble:
      return obc::cpu::Dtype::float64;
    case at::kBFloat16:
      return obc::cpu::Dtype::bfloat16;
    case at::kHalf:
      return obc::cpu::Dtype::float16;
    default:
      return std::nullopt;
  }
}

inline at::ScalarType accumulation_dtype(const Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Whether the tensor has only a device and autograd to dispatch on: no subclass, transform, lazy zero or negation.
inline bool is_plain(const Tensor& tensor) {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet plain(
      {DispatchKey::CPU,
       DispatchKey::CUDA,
       DispatchKey::AutogradCPU,
       DispatchKey::AutogradCUDA,
       DispatchKey::AutocastCPU,
       DispatchKey::AutocastCUDA,
       DispatchKey::ADInplaceOrView}
  );
  return (tensor.key_set().raw_repr() & ~plain.raw_repr()) == 0;
}

inline bool kernel_serves(const Tensor& activation, const Tensor& grad) {
  return activation.is_cpu() && grad.is_cpu() && is_plain(activation) && is_plain(grad) &&
         activation.scalar_type() == grad.scalar_type() && activation.sizes() == grad.sizes();
}

// Where channel_dot is added, and how.
struct Dot {
  int64_t channel_dim;
  bool per_sample;
  int64_t fold;
};

inline void run_kernel(const Tensor& activation, const Tensor& grad, const Dot& dot, void* out) {
  const obc::cpu::Pair pair = {
      *dtype_of(activation),
      activation.dim(),
      activation.sizes().data(),
      activation.const_data_ptr(),
      activation.strides().data(),
      grad.const_data_ptr(),
      grad.strides().data()
  };
  obc::cpu::channel_dot(pair, dot.channel_dim, dot.per_sample, out, kParallel);
}

// The same as _folded_dot in gates.py.
inline Tensor folded_dot(const Tensor& activation, const Tensor& grad, const Dot& dot) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("obc::channel_dot", "")
                             .typed<Tensor(const Tensor&, const Tensor&, int64_t, bool)>();
  const Tensor sums = op.call(activation, grad, dot.channel_dim, dot.per_sample);
  return dot.fold == 1 ? sums : sums.unflatten(-1, {dot.fold, -1}).sum(-2);
}

// --- the node ----------------------------------------------------------------------------------------------------

// One gate may be used by several nodes, and backwards may run in several threads.
inline std::mutex accumulation;

template <class T>
void add_strided(const T* sums, const Tensor& target) {
  T* out = static_cast<T*>(target.unsafeGetTensorImpl()->mutable_data());
  const int64_t columns = target.size(-1), stride = target.stride(-1);
  const int64_t rows = target.dim() == 2 ? target.size(0) : 1, row_stride = target.dim() == 2 ? target.stride(0) : 0;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) out[r * row_stride + c * stride] += sums[r * columns + c];
  }
}

// Adds channel_dot to `target` by the kernel, without an intermediate tensor; false if that is not possible.
inline bool add_by_kernel(const Tensor& activation, const Tensor& grad, const Dot& dot, const Tensor& target) {
  const bool fits = dot.fold == 1 && target.defined() && target.is_cpu() && is_plain(target) &&
                    target.scalar_type() == accumulation_dtype(activation) &&
                    target.dim() == (dot.per_sample ? 2 : 1) && target.size(-1) == activation.size(dot.channel_dim) &&
                    (!dot.per_sample || target.size(0) == activation.size(0));
  if (!fits || !kernel_serves(activation, grad)) return false;
  thread_local std::vector<double> scratch;  // aligned for both types
  scratch.resize(target.numel());
  run_kernel(activation, grad, dot, scratch.data());
  const std::lock_guard<std::mutex> lock(accumulation);
  if (target.scalar_type() == at::kDouble) {
    add_strided(scratch.data(), target);
  } else {
    add_strided(reinterpret_cast<const float*>(scratch.data()), target);
  }
  target.unsafeGetTensorImpl()->bump_version();
  return true;
}

struct GateBackward : public Node {
  torch::autograd::SavedVariable activation_;
  Tensor gate_;
  Dot dot_;
  // Only on the CPU. On other devices the gate has an edge, because the engine synchronises streams only for
  // accumulators.
  bool adds_itself_ = true;

  std::string name() const override { return "GateBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    activation_.reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Tensor activation = activation_.unpack();
    variable_list results(num_outputs());
    if (!grads[0].defined()) return results;
    results[0] = grads[0];
    if (!adds_itself_) {
      if (task_should_compute_output(1)) results[1] = folded_dot(activation, grads[0], dot_);
      return results;
    }
    // With given inputs, as in autograd.grad, only these leaves accumulate.
    const auto* asked = torch::autograd::get_current_graph_task_exec_info();
    if (asked == nullptr || asked->empty()) accumulate(activation, grads[0]);
    return results;
  }

 private:
  void accumulate(const Tensor& activation, const Tensor& grad) {
    const bool graph = at::GradMode::is_enabled();
    if (!graph && add_by_kernel(activation, grad, dot_, gate_.grad())) return;
    const Tensor sums = folded_dot(activation, grad, dot_);
    const std::lock_guard<std::mutex> lock(accumulation);
    Tensor& total = gate_.mutable_grad();
    if (!total.defined()) {
      total = sums;
    } else if (graph) {
      total = total + sums;
    } else {
      total.add_(sums);
    }
  }
};

// The same as activation.view_as(activation), but without its graph. The stride of a dimension with one entry may
// change, and torch's matmul chooses its algorithm by strides.
inline Tensor alias_of(const Tensor& activation) {
  c10::TensorImpl* impl = activation.unsafeGetTensorImpl();
  Tensor alias(impl->shallow_copy_and_detach(impl->version_counter(), /*allow_tensor_metadata_change=*/true));
  const at::IntArrayRef sizes = activation.sizes();
  if (std::find(sizes.begin(), sizes.end(), 1) != sizes.end()) {
    const auto strides = at::detail::computeStride(sizes, activation.strides(), at::DimVector(sizes));
    if (strides) alias.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, *strides);
  }
  return alias;
}

// An alias of `activation` that comes from a gate. Both share a version, so in-place changes of either are noticed.
// activation and alias are two variables, so that only what follows the gate passes it.
inline Tensor pass_gate(const Tensor& activation, const Tensor& gate, const Dot& dot) {
  auto node = make_node<GateBackward>();
  node->activation_ = torch::autograd::SavedVariable(activation, /*is_output=*/false);
  node->gate_ = gate;
  node->dot_ = dot;
  node->adds_itself_ = activation.is_cpu();
  if (node->adds_itself_) {
    node->set_next_edges(torch::autograd::collect_next_edges(activation));
  } else {
    node->set_next_edges(torch::autograd::collect_next_edges(activation, gate));
  }
  Tensor alias = alias_of(activation);
  torch::autograd::set_history(alias, NodePtr(std::move(node)));
  return alias;
}

}  // namespace obc::gates
