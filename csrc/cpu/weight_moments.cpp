// weight_moments: per row of dim 0, the sums of wg, (wg)^2, |wg|, w^2 and |w|; both arrays are read once.
//
// Every other dimension is a column. A task takes a block of rows by a tile of columns; the tiles' partial sums are
// then added in order.

#include <cstring>

#include "layout.h"

namespace obc::cpu {

namespace {

enum Role { kColumn, kRow };

constexpr int kMoments = 5;
constexpr int64_t kTile = 8192;

template <class Acc>
class WeightMoments : public Plan {
 public:
  WeightMoments(const Pair& weight, const Dim& row, const std::vector<Dim>& columns, void* const moments[kMoments])
      : pair_(weight), row_(row), columns_(columns) {
    for (int m = 0; m < kMoments; ++m) moments_[m] = static_cast<Acc*>(moments[m]);
    const int64_t length = std::min(columns_.count(), kTile);
    tiles_ = ceil_div(columns_.count(), kTile);
    block_ = std::max<int64_t>(1, kGrain / length);
    blocks_ = ceil_div(row_.size, block_);
    partial_ = scratch<Acc>(tiles_ * kMoments * row_.size);
    tasks = tiles_ * blocks_;
    task_size = std::min(block_, row_.size) * length;
    results = row_.size;
    result_size = tiles_ * kMoments;
  }

  void run(int64_t task) const override {
    const int64_t tile = task / blocks_, row = task % blocks_ * block_;
    const int64_t column = tile * kTile, length = std::min(kTile, columns_.count() - column);
    Offsets at;
    at.add(row_, row);
    const Matrix w = columns_.first(pair_, at, row_.first, column);
    const Matrix g = columns_.second(pair_, at, row_.second, column);
    Acc* sums = partial_.get() + tile * kMoments * row_.size + row;
    leaves<Acc>(pair_.dtype).row_moments(w, g, std::min(block_, row_.size - row), length, sums, row_.size);
  }

  void finish(int64_t begin, int64_t end) const override {
    for (int m = 0; m < kMoments; ++m) {
      std::memcpy(moments_[m] + begin, partial_.get() + m * row_.size + begin, (end - begin) * sizeof(Acc));
      for (int64_t tile = 1; tile < tiles_; ++tile) {
        const Acc* sums = partial_.get() + (tile * kMoments + m) * row_.size;
        for (int64_t r = begin; r < end; ++r) moments_[m][r] += sums[r];
      }
    }
  }

 private:
  const Pair pair_;
  const Dim row_;
  const Columns columns_;
  Acc* moments_[kMoments];
  int64_t tiles_, block_, blocks_;
  Scratch<Acc> partial_;
};

}  // namespace

void weight_moments(const Pair& weight, void* const moments[kMoments], const ParallelFor& parallel) {
  const bool wide = weight.dtype == Dtype::float64;
  std::vector<Dim> columns;
  for (int64_t d = 1; d < weight.dims; ++d) {
    columns.push_back({weight.sizes[d], weight.first_strides[d], weight.second_strides[d], kColumn});
  }
  const Dim row = {weight.sizes[0], weight.first_strides[0], weight.second_strides[0], kRow};
  if (row.size * count(columns) == 0) {
    for (int m = 0; m < kMoments; ++m) clear_sums(moments[m], row.size, weight.dtype);
    return;
  }
  columns = canonical(std::move(columns));
  if (wide) {
    WeightMoments<double>(weight, row, columns, moments).run_all(parallel);
  } else {
    WeightMoments<float>(weight, row, columns, moments).run_all(parallel);
  }
}

}  // namespace obc::cpu
