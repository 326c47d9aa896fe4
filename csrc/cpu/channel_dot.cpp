// channel_dot: r[c] = sum of a[.., c, ..] * g[.., c, ..]; with per_sample r[n, c].
//
// Two ways through memory, each reading every element once:
//   by rows     the innermost dimension is summed (channel-first): row dots, one partial sum per row;
//   by columns  the innermost dimension is kept (channels-last, tokens), or it is summed but short and lies right
//               inside a kept one (channel-first with few positions): column sums over a tile of columns, whose
//               neighbours are then added up.
// Partial sums are arrays shaped like the result, one after another, added in order by finish().

#include "channel_dot.h"

#include <cstring>

namespace obc::cpu {

namespace {

enum Role { kSummed, kSample, kChannel };

// Shorter rows are summed by columns where many lie above each other, for a row's own reduction then costs more than
// its reading; where few do, each of these columns would be written and read again for one or two uses.
constexpr int64_t kShortRow = 32;
constexpr int64_t kShortLoneRow = 8;
constexpr int64_t kFewRows = 4;
// Elements of a row that one task sums.
constexpr int64_t kLongRow = 8192;
// Columns that one task sums: their sums stay in the first-level cache.
constexpr int64_t kTile = 4096;
// The same where summed positions lie inside: such rows lie far apart, and four of both inputs share the cache.
constexpr int64_t kInnerTile = 2048;

template <class Acc>
class ChannelDot : public Plan {
 public:
  ChannelDot(const Pair& pair, int64_t out_size, Acc* out) : pair_(pair), out_size_(out_size), out_(out) {}

  // out[i] = sum over p of partial[p, i].
  void finish(int64_t begin, int64_t end) const override {
    if (!partial_) return;
    std::memcpy(out_ + begin, partial_.get() + begin, (end - begin) * sizeof(Acc));
    for (int64_t p = 1; p < partials_; ++p) {
      const Acc* sums = partial_.get() + p * out_size_;
      for (int64_t i = begin; i < end; ++i) out_[i] += sums[i];
    }
  }

 protected:
  // Where the sums of partial p go: right into the result if there is no other.
  Acc* target(int64_t p) const { return partial_ ? partial_.get() + p * out_size_ : out_; }

  void set_partials(int64_t partials) {
    if (partials == 1) return;
    partials_ = partials;
    partial_ = scratch<Acc>(partials * out_size_);
    this->results = out_size_;
    this->result_size = partials;
  }

  const Pair pair_;
  const int64_t out_size_;

 private:
  Acc* out_;
  int64_t partials_ = 1;
  Scratch<Acc> partial_;
};

template <class Acc>
class ByRows : public ChannelDot<Acc> {
 public:
  ByRows(const Pair& pair, std::vector<Dim> dims, int64_t out_size, Acc* out)
      : ChannelDot<Acc>(pair, out_size, out), columns_(take_last(dims)), rows_(std::move(dims)) {
    chunks_ = ceil_div(columns_.count(), kLongRow);
    // A row's sum goes to the partial that its summed indices name.
    int64_t partials = chunks_;
    for (size_t d = rows_.size(); d-- > 0;) {
      if (rows_[d].role != kSummed) continue;
      rows_[d].out = partials * out_size;
      partials *= rows_[d].size;
    }
    this->set_partials(partials);
    const int64_t length = std::min(columns_.count(), kLongRow);
    block_ = std::max<int64_t>(1, kGrain / length);
    blocks_ = ceil_div(count(rows_), block_);
    this->tasks = blocks_ * chunks_;
    this->task_size = std::min(block_, count(rows_)) * length;
  }

  void run(int64_t task) const override {
    const int64_t chunk = task / blocks_, block = task % blocks_;
    const int64_t column = chunk * kLongRow, length = std::min(columns_.count() - column, kLongRow);
    const int64_t begin = block * block_, end = std::min(begin + block_, count(rows_));
    const Dim last = rows_.empty() ? Dim{1, 0, 0, kSummed} : rows_.back();
    for_each_run(rows_, begin, end, [&](const Offsets& at, int64_t rows) {
      const Matrix a = columns_.first(this->pair_, at, last.first, column);
      const Matrix g = columns_.second(this->pair_, at, last.second, column);
      leaves<Acc>(this->pair_.dtype).row_dots(a, g, rows, length, this->target(chunk) + at.out, last.out);
    });
  }

 private:
  static std::vector<Dim> take_last(std::vector<Dim>& dims) {
    if (dims.empty()) return {};
    const Dim last = dims.back();
    dims.pop_back();
    return {last};
  }

  Columns columns_;
  std::vector<Dim> rows_;
  int64_t chunks_, block_, blocks_;
};

// Columns are (repeat, kept, inner): `repeat` short rows side by side count as one, `inner` summed positions lie
// inside each kept channel; one of the two is 1.
template <class Acc>
class ByColumns : public ChannelDot<Acc> {
 public:
  ByColumns(const Pair& pair, std::vector<Dim> dims, int64_t out_size, Acc* out)
      : ChannelDot<Acc>(pair, out_size, out), columns_(take_columns(dims)) {
    for (const Dim& dim : dims) (dim.role == kSummed ? rows_ : kept_rows_).push_back(dim);
    widen();
    tile_ = std::max<int64_t>(1, (inner_ > 1 ? kInnerTile : kTile) / inner_) * inner_;
    tiles_ = ceil_div(width(), tile_);
    const int64_t rows = count(rows_), others = count(kept_rows_) * tiles_;
    chunk_ = ceil_div(rows, row_chunks(rows, others));
    chunks_ = ceil_div(rows, chunk_);
    this->set_partials(chunks_);
    this->tasks = others * chunks_;
    this->task_size = chunk_ * std::min(tile_, width());
  }

  void run(int64_t task) const override {
    const int64_t tile = task % tiles_, chunk = task / tiles_ % chunks_, sample = task / tiles_ / chunks_;
    const int64_t column = tile * tile_, length = std::min(tile_, width() - column);
    Offsets base;
    for_each_run(kept_rows_, sample, sample + 1, [&](const Offsets& at, int64_t) { base = at; });
    alignas(kAlignment) Acc sums[kTile] = {};
    const Dim last = rows_.empty() ? Dim{1, 0, 0, kSummed} : rows_.back();
    const int64_t begin = chunk * chunk_, end = std::min(begin + chunk_, count(rows_));
    for_each_run(rows_, begin, end, [&](const Offsets& at, int64_t rows) {
      add(base, at, rows, last, column, length, sums);
    });
    if (rest_ > 0 && chunk + 1 == chunks_) {
      for_each_run(outer_rows_, 0, count(outer_rows_), [&](Offsets at, int64_t runs) {
        for (int64_t i = 0; i < runs; ++i, outer_rows_.empty() ? void() : at.add(outer_rows_.back(), 1)) {
          Offsets rest = at;
          rest.add(last, last.size);
          add(base, rest, 1, last, 0, rest_ * kept_, sums);
        }
      });
    }
    store(sums, column / inner_, length, this->target(chunk) + base.out);
  }

 private:
  // Takes the innermost kept dimension, and a summed one inside it, off `dims`.
  std::vector<Dim> take_columns(std::vector<Dim>& dims) {
    std::vector<Dim> columns;
    if (dims.back().role == kSummed) {
      inner_ = dims.back().size;
      columns.push_back(dims.back());
      dims.pop_back();
    }
    kept_ = dims.back().size;
    kept_out_ = dims.back().out;
    columns.insert(columns.begin(), dims.back());
    dims.pop_back();
    return columns;
  }

  // Where rows are short and follow each other in memory, reads several as one.
  void widen() {
    if (inner_ > 1 || rows_.empty() || !columns_.contiguous()) return;
    Dim& last = rows_.back();
    if (last.first != kept_ || last.second != kept_ || kept_ * 4 > kTile) return;
    repeat_ = std::min(last.size, kTile / 2 / kept_);
    rest_ = last.size % repeat_;
    outer_rows_.assign(rows_.begin(), rows_.end() - 1);  // not in run(), where nothing may throw
    last.size /= repeat_;
    last.first *= repeat_;
    last.second *= repeat_;
  }

  int64_t width() const { return repeat_ * columns_.count(); }

  void add(
      const Offsets& base, const Offsets& at, int64_t rows, const Dim& row, int64_t column, int64_t length, Acc* sums
  ) const {
    const Offsets start = {base.first + at.first, base.second + at.second};
    const Matrix a = columns_.first(this->pair_, start, row.first, column);
    const Matrix g = columns_.second(this->pair_, start, row.second, column);
    leaves<Acc>(this->pair_.dtype).column_sums(a, g, rows, length, far_, sums);
  }

  // Adds up the columns of each kept channel and writes the channels from `channel` on.
  void store(Acc* sums, int64_t channel, int64_t length, Acc* out) const {
    if (repeat_ > 1) {
      for (int64_t r = 1; r < repeat_; ++r) {
        for (int64_t k = 0; k < kept_; ++k) sums[k] += sums[r * kept_ + k];
      }
      length = kept_;
    }
    for (int64_t k = 0; k < length / inner_; ++k) {
      Acc sum = sums[k * inner_];
      for (int64_t i = 1; i < inner_; ++i) sum += sums[k * inner_ + i];
      out[(channel + k) * kept_out_] = sum;
    }
  }

  int64_t inner_ = 1, repeat_ = 1, rest_ = 0, kept_ = 1, kept_out_ = 0;
  const bool far_ = is_far(this->pair_);
  Columns columns_;
  std::vector<Dim> rows_, outer_rows_, kept_rows_;
  int64_t tile_, tiles_, chunk_, chunks_;
};

// Nothing to read: the sums are zero.
class Zeros : public Plan {
 public:
  void run(int64_t) const override {}
  void finish(int64_t, int64_t) const override {}
};

bool by_columns(const std::vector<Dim>& dims) {
  if (dims.empty()) return false;
  const Dim& last = dims.back();
  if (last.role != kSummed) return true;
  int64_t rows = 1;
  for (const Dim& dim : dims) rows *= dim.role == kSummed ? dim.size : 1;
  rows /= last.size;
  if (dims.size() < 2 || last.size > (rows < kFewRows ? kShortLoneRow : kShortRow)) return false;
  const Dim& outer = dims[dims.size() - 2];
  return outer.role != kSummed && continues(outer, last);
}

template <class Acc>
std::unique_ptr<Plan> plan(const Pair& pair, std::vector<Dim> dims, int64_t out_size, Acc* out) {
  if (by_columns(dims)) return std::make_unique<ByColumns<Acc>>(pair, std::move(dims), out_size, out);
  return std::make_unique<ByRows<Acc>>(pair, std::move(dims), out_size, out);
}

}  // namespace

std::unique_ptr<Plan> plan_channel_dot(const Pair& pair, int64_t channel_dim, bool per_sample, void* out) {
  const int64_t channels = pair.sizes[channel_dim];
  const int64_t out_size = channels * (per_sample ? pair.sizes[0] : 1);
  std::vector<Dim> dims;
  for (int64_t d = 0; d < pair.dims; ++d) {
    Dim dim = {pair.sizes[d], pair.first_strides[d], pair.second_strides[d], kSummed};
    if (d == channel_dim) {
      dim.role = kChannel;
      dim.out = 1;
    } else if (d == 0 && per_sample) {
      dim.role = kSample;
      dim.out = channels;
    }
    dims.push_back(dim);
  }
  const bool wide = pair.dtype == Dtype::float64;
  if (count(dims) == 0) {
    clear_sums(out, out_size, pair.dtype);
    return std::make_unique<Zeros>();
  }
  dims = canonical(std::move(dims));
  if (wide) return plan(pair, std::move(dims), out_size, static_cast<double*>(out));
  return plan(pair, std::move(dims), out_size, static_cast<float*>(out));
}

void channel_dot(const Pair& pair, int64_t channel_dim, bool per_sample, void* out, const ParallelFor& parallel) {
  plan_channel_dot(pair, channel_dim, per_sample, out)->run_all(parallel);
}

}  // namespace obc::cpu
