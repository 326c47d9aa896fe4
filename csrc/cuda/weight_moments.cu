// weight_moments: per row of dim 0, the sums of wg, (wg)^2, |wg|, w^2 and |w| in one pass over both arrays.
//
// Shapes: w and g (rows, ...), any strides, each its own; five results (rows,).
// Bytes: both inputs once; with few rows, partial sums of at most 264 blocks written and read once.
// Accumulation: float32, float64 for float64 input.
//
// In a transposed weight, whose rows are adjacent, a warp's loads lie a row apart: each fetches 32 bytes for one
// element, and neighbouring warps find the rest in the cache if it is still there.

#include "plan.h"

namespace obc::cuda {

namespace {

enum Role { kColumn, kRow };
constexpr int kMoments = 5;

}  // namespace

bool weight_moments(const Pair& weight, void* const moments[kMoments], Context& context) {
  std::vector<Dim> columns;
  for (int64_t d = 1; d < weight.dims; ++d) {
    columns.push_back({weight.sizes[d], weight.first_strides[d], weight.second_strides[d], kColumn});
  }
  const Dim row = {weight.sizes[0], weight.first_strides[0], weight.second_strides[0], kRow};
  if (row.size == 0) return true;
  if (cpu::count(columns) == 0) {
    const size_t bytes = row.size * (weight.dtype == Dtype::float64 ? sizeof(double) : sizeof(float));
    for (int m = 0; m < kMoments; ++m) context.check(cudaMemsetAsync(moments[m], 0, bytes, context.stream));
    return true;
  }
  const std::optional<Rows> rows = rows_of(weight, {row}, cpu::canonical(std::move(columns)), false);
  if (!rows) return false;
  for_type(weight.dtype, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    Results<Accumulator<T>, kMoments> results;
    for (int m = 0; m < kMoments; ++m) results.sums[m] = static_cast<Accumulator<T>*>(moments[m]);
    run_rows<T, kMoments>(*rows, results, context);
  });
  return true;
}

}  // namespace obc::cuda
