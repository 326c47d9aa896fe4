// Shared by the registrations of both devices, on torch's stable ABI: converts tensors for the kernels, and makes new
// ones.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <vector>

#include "cpu/kernels.h"

namespace obc {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline cpu::Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return cpu::Dtype::float64;
    case ScalarType::BFloat16:
      return cpu::Dtype::bfloat16;
    case ScalarType::Half:
      return cpu::Dtype::float16;
    default:
      return cpu::Dtype::float32;
  }
}

inline cpu::Pair pair_of(const Tensor& first, const Tensor& second) {
  return {
      dtype_of(first),
      first.dim(),
      first.sizes().data(),
      first.const_data_ptr(),
      first.strides().data(),
      second.const_data_ptr(),
      second.strides().data()
  };
}

// A tensor and its mask. They have the same sizes except along the channels, where the mask has stride 0. Without a
// mask it is the tensor twice.
struct MaskedPair {
  MaskedPair(const Tensor& x, int64_t channel_dim, const std::optional<Tensor>& mask) : pair(pair_of(x, x)) {
    if (!mask) return;
    for (int64_t d = 0; d < mask->dim(); ++d) strides.push_back(mask->stride(d));
    strides.insert(strides.begin() + channel_dim, 0);
    pair.second = mask->const_data_ptr();
    pair.second_strides = strides.data();
  }
  MaskedPair(const MaskedPair&) = delete;
  MaskedPair& operator=(const MaskedPair&) = delete;

  std::vector<int64_t> strides;
  cpu::Pair pair;
};

// An uninitialised contiguous tensor of at most two dimensions on the device of `like`.
inline Tensor empty(std::initializer_list<int64_t> sizes, int32_t dtype, const Tensor& like) {
  int64_t strides[2] = {1, 1};
  if (sizes.size() == 2) strides[0] = sizes.begin()[1];
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()),
      sizes.begin(),
      strides,
      dtype,
      device_type,
      like.get_device_index(),
      &handle
  ));
  return Tensor(handle);
}

// The same in the accumulation dtype of `like`.
inline Tensor empty_sums(std::initializer_list<int64_t> sizes, const Tensor& like) {
  const bool wide = dtype_of(like) == cpu::Dtype::float64;
  return empty(sizes, wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(), like);
}

}  // namespace obc
