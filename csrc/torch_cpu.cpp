// Registers the CPU kernels with torch as obc_cpu::<op>, on LibTorch's stable ABI: one build serves torch 2.11 and
// later.
//
// Schemas come from the table in python/obc/backends/operators.py. python/obc/ops checks the arguments before, because
// errors raised behind the ABI lose their message before torch 2.13. Only end_row returns a position, of a bad group.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "schemas.h"
#include "tensors.h"

namespace {

using obc::dtype_of;
using obc::empty;
using obc::empty_sums;
using obc::pair_of;
using obc::Tensor;
using obc::cpu::Pair;

void run_parallel(int64_t tasks, int64_t grain, obc::cpu::ParallelFor::Body body, const void* context) {
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

constexpr obc::cpu::ParallelFor kParallel = {run_parallel};

Tensor channel_dot(const Tensor& activation, const Tensor& grad, int64_t channel_dim, bool per_sample) {
  const int64_t channels = activation.size(channel_dim);
  const Tensor out =
      per_sample ? empty_sums({activation.size(0), channels}, activation) : empty_sums({channels}, activation);
  obc::cpu::channel_dot(pair_of(activation, grad), channel_dim, per_sample, out.mutable_data_ptr(), kParallel);
  return out;
}

using Tensors = std::vector<Tensor>;
using OptionalTensors = std::vector<std::optional<Tensor>>;

std::tuple<Tensors, Tensors> weight_dot_list(
    const Tensors& weights,
    const Tensors& grads,
    const std::optional<OptionalTensors>& biases,
    const std::optional<OptionalTensors>& bias_grads,
    const std::optional<std::vector<int64_t>>& groups,
    const std::optional<std::vector<bool>>& transposed
) {
  const size_t count = weights.size();
  Tensors out_dots, in_dots;
  std::vector<Pair> bias_pairs(count);
  std::vector<obc::cpu::WeightDot> layers;
  for (size_t i = 0; i < count; ++i) {
    const Tensor& weight = weights[i];
    const int64_t group_count = groups ? (*groups)[i] : 1;
    const bool swapped = transposed && (*transposed)[i];
    const Pair* bias = nullptr;
    if (biases && (*biases)[i]) {
      bias_pairs[i] = pair_of(*(*biases)[i], *(*bias_grads)[i]);
      bias = &bias_pairs[i];
    }
    const Tensor row_dot = empty_sums({weight.size(0)}, weight);
    const Tensor column_dot = empty_sums({weight.size(1) * group_count}, weight);
    layers.push_back(
        {pair_of(weight, grads[i]),
         bias,
         group_count,
         swapped,
         row_dot.mutable_data_ptr(),
         column_dot.mutable_data_ptr()}
    );
    out_dots.push_back(swapped ? column_dot : row_dot);
    in_dots.push_back(swapped ? row_dot : column_dot);
  }
  obc::cpu::weight_dot(layers, kParallel);
  return {out_dots, in_dots};
}

std::tuple<Tensor, Tensor> weight_dot(
    const Tensor& weight,
    const Tensor& grad,
    const std::optional<Tensor>& bias,
    const std::optional<Tensor>& bias_grad,
    int64_t groups,
    bool transposed
) {
  const auto [out_dots, in_dots] = weight_dot_list(
      {weight},
      {grad},
      OptionalTensors{bias},
      OptionalTensors{bias_grad},
      std::vector<int64_t>{groups},
      std::vector<bool>{transposed}
  );
  return {out_dots[0], in_dots[0]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> weight_moments(const Tensor& weight, const Tensor& grad) {
  const int64_t rows = weight.size(0);
  const Tensor sums[5] = {
      empty_sums({rows}, weight),
      empty_sums({rows}, weight),
      empty_sums({rows}, weight),
      empty_sums({rows}, weight),
      empty_sums({rows}, weight)
  };
  void* const moments[5] = {
      sums[0].mutable_data_ptr(),
      sums[1].mutable_data_ptr(),
      sums[2].mutable_data_ptr(),
      sums[3].mutable_data_ptr(),
      sums[4].mutable_data_ptr()
  };
  obc::cpu::weight_moments(pair_of(weight, grad), moments, kParallel);
  return {sums[0], sums[1], sums[2], sums[3], sums[4]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> channel_moments(
    const Tensor& x, int64_t channel_dim, const std::optional<Tensor>& mask
) {
  const int64_t channels = x.size(channel_dim);
  const Tensor sums[4] =
      {empty_sums({channels}, x), empty_sums({channels}, x), empty_sums({channels}, x), empty_sums({channels}, x)};
  void* const moments[4] =
      {sums[0].mutable_data_ptr(), sums[1].mutable_data_ptr(), sums[2].mutable_data_ptr(), sums[3].mutable_data_ptr()};
  const obc::MaskedPair pair(x, channel_dim, mask);
  obc::cpu::channel_moments(pair.pair, channel_dim, mask.has_value(), moments, kParallel);
  return {sums[0], sums[1], sums[2], sums[3]};
}

std::tuple<Tensor, int64_t> end_row(
    const Tensor& scores, const Tensor& row, double loss_scale, const std::optional<Tensor>& groups
) {
  const obc::cpu::EndRow arguments = {
      dtype_of(scores),
      scores.mutable_data_ptr(),
      scores.numel(),
      scores.stride(0),
      row.mutable_data_ptr(),
      row.numel(),
      row.stride(0),
      groups ? static_cast<const int64_t*>(groups->const_data_ptr()) : nullptr,
      groups ? groups->stride(0) : 0,
      loss_scale
  };
  const Tensor finite = empty({}, aoti_torch_dtype_bool(), scores);
  const int64_t bad_group = obc::cpu::end_row(arguments, static_cast<bool*>(finite.mutable_data_ptr()));
  return {finite, bad_group};
}

}  // namespace

STABLE_TORCH_LIBRARY(obc_cpu, library) { OBC_CPU_OPERATORS(OBC_DEFINE_CPU); }

STABLE_TORCH_LIBRARY_IMPL(obc_cpu, CPU, library) { OBC_CPU_OPERATORS(OBC_IMPLEMENT); }
