// weight_dot: row sums and column sums of w * g for a weight (rows, columns, *kernel) in `groups` blocks of rows.
//
// The outermost of rows and columns in memory gives the rows of the matrix that is read (for a transposed weight that
// is the columns), everything inside it the columns. A task reads a chunk of rows by a tile of columns once and leaves
// partial sums of both kinds; finish() adds the partial sums in order and then the kernel positions of each column.
// Where a group has one row or one column, channel_dot gives the one side and its sums the other.

#include <cstring>

#include "channel_dot.h"
#include "layout.h"

namespace obc::cpu {

namespace {

enum Role { kKernel, kRow, kColumn, kGroup };

// Columns that one task reads: their sums stay in the first-level cache.
constexpr int64_t kTile = 4096;

template <class Acc>
class OnePass : public Plan {
 public:
  OnePass(const WeightDot& layer, std::vector<Dim> dims) : pair_(layer.weight), columns_(take_columns(dims)) {
    for (const Dim& dim : dims) {
      if (dim.role == kGroup) {
        group_ = dim;
      } else if (dim.role == kKernel) {
        outer_kernel_.push_back(dim);
      } else {
        row_ = dim;
      }
    }
    by_row_ = static_cast<Acc*>(row_.role == kRow ? layer.row_dot : layer.column_dot);
    by_column_ = static_cast<Acc*>(row_.role == kRow ? layer.column_dot : layer.row_dot);

    tiles_ = ceil_div(columns_.count(), kTile);
    tile_ = ceil_div(ceil_div(columns_.count(), tiles_), 64) * 64;
    tiles_ = ceil_div(columns_.count(), tile_);
    chunk_ = ceil_div(row_.size, row_chunks(row_.size, tiles_ * group_.size));
    chunks_ = ceil_div(row_.size, chunk_);
    row_sums_ = scratch<Acc>(tiles_ * group_.size * row_.size);
    column_sums_ = scratch<Acc>(group_.size * chunks_ * columns_.count());
    tasks = group_.size * chunks_ * tiles_;
    task_size = chunk_ * std::min(tile_, columns_.count()) * cpu::count(outer_kernel_);
    results = group_.size * kept_;
    result_size = chunks_ * before_ * after_;
  }

  void run(int64_t task) const override {
    const int64_t tile = task % tiles_, chunk = task / tiles_ % chunks_, group = task / tiles_ / chunks_;
    const int64_t column = tile * tile_, length = std::min(tile_, columns_.count() - column);
    const int64_t row = chunk * chunk_, rows = std::min(chunk_, row_.size - row);
    Acc* row_sums = row_sums_.get() + (tile * group_.size + group) * row_.size + row;
    Acc* column_sums = column_sums_.get() + (group * chunks_ + chunk) * columns_.count() + column;
    std::memset(row_sums, 0, rows * sizeof(Acc));
    std::memset(column_sums, 0, length * sizeof(Acc));
    for_each_run(outer_kernel_, 0, cpu::count(outer_kernel_), [&](Offsets at, int64_t positions) {
      at.add(group_, group);
      at.add(row_, row);
      for (int64_t p = 0; p < positions; ++p) {
        const Matrix w = columns_.first(pair_, at, row_.first, column);
        const Matrix g = columns_.second(pair_, at, row_.second, column);
        leaves<Acc>(pair_.dtype).row_column_sums(w, g, rows, length, far_, row_sums, column_sums);
        if (!outer_kernel_.empty()) at.add(outer_kernel_.back(), 1);
      }
    });
  }

  // Of the sums by column; those by row are shared out in proportion.
  void finish(int64_t begin, int64_t end) const override {
    const int64_t rows = group_.size * row_.size;
    const int64_t row = rows * begin / results, last_row = rows * end / results;
    std::memcpy(by_row_ + row, row_sums_.get() + row, (last_row - row) * sizeof(Acc));
    for (int64_t tile = 1; tile < tiles_; ++tile) {
      for (int64_t r = row; r < last_row; ++r) by_row_[r] += row_sums_[tile * rows + r];
    }
    while (begin < end) {
      const int64_t group = begin / kept_, first = begin % kept_, last = std::min(kept_, first + end - begin);
      finish_columns(column_sums_.get() + group * chunks_ * columns_.count(), first, last, by_column_ + group * kept_);
      begin += last - first;
    }
  }

 private:
  // Takes everything inside the outermost of rows and columns, but for the group, off `dims`: (before, kept, after).
  std::vector<Dim> take_columns(std::vector<Dim>& dims) {
    const auto outermost =
        std::find_if(dims.begin(), dims.end(), [](const Dim& dim) { return dim.role == kRow || dim.role == kColumn; });
    std::vector<Dim> rows(dims.begin(), outermost + 1), columns;
    for (auto dim = outermost + 1; dim != dims.end(); ++dim) (dim->role == kGroup ? rows : columns).push_back(*dim);
    int64_t* beside = &before_;
    for (const Dim& dim : columns) {
      if (dim.role == kKernel) {
        *beside *= dim.size;
      } else {
        kept_ = dim.size;
        beside = &after_;
      }
    }
    dims = rows;
    return columns;
  }

  // out[k] = sum over b, a of (sum over the chunks of sums[chunk, b, k, a]), for k in [first, last).
  void finish_columns(Acc* sums, int64_t first, int64_t last, Acc* out) const {
    std::memset(out + first, 0, (last - first) * sizeof(Acc));
    for (int64_t b = 0; b < before_; ++b) {
      const int64_t begin = (b * kept_ + first) * after_, end = (b * kept_ + last) * after_;
      for (int64_t chunk = 1; chunk < chunks_; ++chunk) {
        const Acc* more = sums + chunk * columns_.count();
        for (int64_t j = begin; j < end; ++j) sums[j] += more[j];
      }
      for (int64_t k = first; k < last; ++k) {
        const Acc* positions = sums + (b * kept_ + k) * after_;
        Acc sum = positions[0];
        for (int64_t a = 1; a < after_; ++a) sum += positions[a];
        out[k] += sum;
      }
    }
  }

  const Pair pair_;
  const bool far_ = is_far(pair_);
  int64_t before_ = 1, kept_ = 1, after_ = 1;
  Columns columns_;
  Dim group_ = {1, 0, 0, kGroup};
  Dim row_ = {1, 0, 0, kRow};
  std::vector<Dim> outer_kernel_;
  Acc* by_row_;
  Acc* by_column_;
  int64_t tile_, tiles_, chunk_, chunks_;
  Scratch<Acc> row_sums_, column_sums_;
};

// Groups of one row or one column: channel_dot fills `fine` (one sum per weight row or column and group), and sums of
// `per_group` neighbours of it are `coarse`.
template <class Acc>
class OneSided : public Plan {
 public:
  OneSided(std::unique_ptr<Plan> dots, const void* fine, void* coarse, int64_t groups, int64_t per_group)
      : dots_(std::move(dots)),
        fine_(static_cast<const Acc*>(fine)),
        coarse_(static_cast<Acc*>(coarse)),
        groups_(groups),
        per_group_(per_group) {
    tasks = dots_->tasks;
    task_size = dots_->task_size;
    results = groups_;
    result_size = (1 + dots_->result_size) * per_group_;
  }

  void run(int64_t task) const override { dots_->run(task); }

  void finish(int64_t begin, int64_t end) const override {
    dots_->finish(begin * per_group_, end * per_group_);
    for (int64_t group = begin; group < end; ++group) {
      Acc sum = 0;
      for (int64_t i = 0; i < per_group_; ++i) sum += fine_[group * per_group_ + i];
      coarse_[group] = sum;
    }
  }

 private:
  std::unique_ptr<Plan> dots_;
  const Acc* fine_;
  Acc* coarse_;
  int64_t groups_, per_group_;
};

std::vector<Dim> weight_dims(const WeightDot& layer) {
  const Pair& weight = layer.weight;
  std::vector<Dim> dims;
  for (int64_t d = 0; d < weight.dims; ++d) {
    const int role = d == 0 ? kRow : d == 1 ? kColumn : kKernel;
    dims.push_back({weight.sizes[d], weight.first_strides[d], weight.second_strides[d], role});
  }
  if (layer.groups > 1) {
    Dim group = dims[0];
    dims[0].size /= layer.groups;
    group.size = layer.groups;
    group.role = kGroup;
    group.first *= dims[0].size;
    group.second *= dims[0].size;
    dims.push_back(group);
  }
  return canonical(std::move(dims));
}

template <class Acc>
std::unique_ptr<Plan> plan(const WeightDot& layer) {
  const int64_t rows = layer.weight.sizes[0], columns = layer.weight.sizes[1];
  const int64_t group_rows = rows / layer.groups;
  if (columns == 1) {
    auto dots = plan_channel_dot(layer.weight, 0, false, layer.row_dot);
    return std::make_unique<OneSided<Acc>>(std::move(dots), layer.row_dot, layer.column_dot, layer.groups, group_rows);
  }
  if (group_rows == 1) {
    auto dots = plan_channel_dot(layer.weight, 1, true, layer.column_dot);
    return std::make_unique<OneSided<Acc>>(std::move(dots), layer.column_dot, layer.row_dot, rows, columns);
  }
  std::vector<Dim> dims = weight_dims(layer);
  if (count(dims) == 0) {
    clear_sums(layer.row_dot, rows, layer.weight.dtype);
    clear_sums(layer.column_dot, layer.groups * columns, layer.weight.dtype);
    return nullptr;
  }
  return std::make_unique<OnePass<Acc>>(layer, std::move(dims));
}

std::unique_ptr<Plan> plan_layer(const WeightDot& layer) {
  return layer.weight.dtype == Dtype::float64 ? plan<double>(layer) : plan<float>(layer);
}

// out[o] += b[o] * gb[o], element by element: row dots of a matrix with one column.
template <class Acc>
void add_bias(const Pair& bias, void* out) {
  const Scratch<Acc> products = scratch<Acc>(bias.sizes[0]);
  leaves<Acc>(bias.dtype)
      .row_dots(
          {bias.first, bias.first_strides[0], nullptr},
          {bias.second, bias.second_strides[0], nullptr},
          bias.sizes[0],
          1,
          products.get(),
          1
      );
  for (int64_t o = 0; o < bias.sizes[0]; ++o) static_cast<Acc*>(out)[o] += products[o];
}

// Numbers the tasks of all layers, or their results, one after another.
class Shared {
 public:
  void add(int64_t count, int64_t size) {
    begins_.push_back(begins_.back() + count);
    elements_ += count * size;
  }

  // Calls f(layer, begin, end) for each layer's part of every range.
  template <class F>
  void run(const ParallelFor& parallel, const F& f) const {
    const int64_t total = begins_.back();
    parallel(total, grain_of(elements_ / std::max<int64_t>(total, 1)), [&](int64_t begin, int64_t end) {
      if (begin == end) return;
      size_t layer = std::upper_bound(begins_.begin(), begins_.end(), begin) - begins_.begin() - 1;
      for (; begin < end; ++layer) {
        const int64_t last = std::min(end, begins_[layer + 1]);
        f(layer, begin - begins_[layer], last - begins_[layer]);
        begin = last;
      }
    });
  }

 private:
  std::vector<int64_t> begins_ = {0};
  int64_t elements_ = 0;
};

}  // namespace

void weight_dot(const std::vector<WeightDot>& layers, const ParallelFor& parallel) {
  std::vector<std::unique_ptr<Plan>> plans;
  Shared tasks, results;
  for (const WeightDot& layer : layers) {
    std::unique_ptr<Plan> plan = plan_layer(layer);
    if (!plan) continue;
    tasks.add(plan->tasks, plan->task_size);
    results.add(plan->results, plan->result_size);
    plans.push_back(std::move(plan));
  }
  tasks.run(parallel, [&](size_t layer, int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) plans[layer]->run(task);
  });
  results.run(parallel, [&](size_t layer, int64_t begin, int64_t end) { plans[layer]->finish(begin, end); });
  for (const WeightDot& layer : layers) {
    if (!layer.bias || layer.bias->sizes[0] == 0) continue;
    void* out = layer.transposed ? layer.column_dot : layer.row_dot;
    if (layer.bias->dtype == Dtype::float64) {
      add_bias<double>(*layer.bias, out);
    } else {
      add_bias<float>(*layer.bias, out);
    }
  }
}

}  // namespace obc::cpu
