// channel_moments: per channel the sums of x, x^2 and |x| over all positions, and over the samples the sum of the
// square of the mean of |x| over the sample's positions. One reading of x.
//
// A task takes a range of samples, or a part of one sample's positions, and a tile of channels. Two ways through
// memory:
//   by columns  channels are innermost (tokens, channels-last): a row is the tile's channels at one position;
//   by rows     positions are innermost (channel-first): a row is a run of positions of one channel.
// Each task writes sums of its own, which finish() adds up in order. Positions that the mask leaves out are not read
// where they are rows, and read as zero where they are columns.

#include <cstring>

#include "layout.h"

namespace obc::cpu {

namespace {

enum Role { kPosition, kSample, kChannel };

constexpr int kMoments = 4;
// Channels of one task: its three vectors of sums stay in the first-level cache beside twelve rows.
constexpr int64_t kTile = 256;
// Positions that one reading of a row of positions sums.
constexpr int64_t kLongRow = 8192;
// Rows that are read in one go by columns: at the end of them none are prefetched.
constexpr int64_t kRowsAtOnce = 512;
// Tasks that are enough for any machine's threads, and additions in a row that keep rounding that of short sums.
constexpr int64_t kTasks = 64;
constexpr int64_t kAdditions = 512;

std::vector<Dim> of_role(const std::vector<Dim>& dims, int role) {
  std::vector<Dim> members;
  for (const Dim& dim : dims) {
    if (dim.role == role) members.push_back(dim);
  }
  return members;
}

template <class Acc>
class ChannelMoments : public Plan {
 public:
  // `alone`: every sample has one position, and the samples came as positions.
  ChannelMoments(
      const Pair& pair, bool masked, const std::vector<Dim>& dims, int64_t channels, bool alone, void* const results[]
  )
      : pair_(pair),
        mask_(masked ? static_cast<const uint8_t*>(pair.second) : nullptr),
        alone_(alone),
        channels_(channels),
        samples_(of_role(dims, kSample)),
        channel_(of_role(dims, kChannel)),
        positions_(of_role(dims, kPosition)) {
    for (int m = 0; m < kMoments; ++m) results_[m] = static_cast<Acc*>(results[m]);
    count_positions();
  }

  void run(int64_t task) const override {
    const int64_t tile = task % tiles_, part = task / tiles_ % parts_, range = task / tiles_ / parts_;
    const int64_t channel = tile * tile_, count = std::min(tile_, channels_ - channel);
    const int64_t begin = part * part_, end = std::min(begin + part_, units_);
    Acc* sums[kMoments];
    for (int m = 0; m < kMoments; ++m) {
      sums[m] = partial_.get() + ((range * parts_ + part) * kMoments + m) * stride_ + channel;
      std::memset(sums[m], 0, count * sizeof(Acc));
    }
    alignas(kAlignment) Acc absolute[kTile] = {};
    const int64_t last = std::min((range + 1) * range_, sample_count_);
    for (int64_t sample = range * range_; sample < last; ++sample) {
      Offsets base;
      for_each_run(samples_, sample, sample + 1, [&](const Offsets& at, int64_t) { base = at; });
      if (!channel_.empty()) base.add(channel_[0], channel);
      read(base, begin, end, count, sums[0], sums[1], absolute);
      add_sample(sample, count, absolute, sums[2], sums[3]);
    }
  }

  void finish(int64_t begin, int64_t end) const override {
    const int64_t count = end - begin, ranges = ceil_div(sample_count_, range_);
    Acc* out[kMoments];
    for (int m = 0; m < kMoments; ++m) {
      out[m] = results_[m] + begin;
      std::memset(out[m], 0, count * sizeof(Acc));
    }
    Acc* const absolute = parts_ > 1 ? absolute_.get() + begin : nullptr;  // of one sample
    if (parts_ > 1) std::memset(absolute, 0, count * sizeof(Acc));
    for (int64_t range = 0; range < ranges; ++range) {
      for (int64_t part = 0; part < parts_; ++part) {
        const Acc* sums = partial_.get() + (range * parts_ + part) * kMoments * stride_ + begin;
        for (int64_t c = 0; c < count; ++c) out[0][c] += sums[c];
        for (int64_t c = 0; c < count; ++c) out[1][c] += sums[stride_ + c];
        Acc* const total = parts_ > 1 ? absolute : out[2];
        for (int64_t c = 0; c < count; ++c) total[c] += sums[2 * stride_ + c];
        if (parts_ > 1) continue;
        for (int64_t c = 0; c < count; ++c) out[3][c] += sums[3 * stride_ + c];
      }
      if (parts_ > 1) add_mean_squares(range, count, absolute, out[2], out[3]);
    }
    if (alone_) std::memcpy(out[3], out[1], count * sizeof(Acc));
  }

 protected:
  // Adds the positions [begin, end), counted in the units of the subclass, of the `count` channels that begin at
  // `base`.
  virtual void read(
      const Offsets& base, int64_t begin, int64_t end, int64_t count, Acc* sum, Acc* square, Acc* absolute
  ) const = 0;

  // Units of positions, the most channels of a task, and the fewest units that a task should have.
  void set_tasks(int64_t units, int64_t tile, int64_t least) {
    units_ = units;
    tile_ = std::min(tile, channels_);
    tiles_ = ceil_div(channels_, tile_);
    const auto ranges_of = [&](int64_t size, int64_t others) {
      const int64_t wanted = std::min(ceil_div(kTasks, others), ceil_div(size, least));
      return std::max({int64_t{1}, wanted, ceil_div(size, kAdditions)});
    };
    part_ = ceil_div(units_, ranges_of(units_, sample_count_ * tiles_));
    parts_ = ceil_div(units_, part_);
    // Only whole samples share a task.
    const int64_t ranges =
        parts_ > 1 ? sample_count_ : std::min(sample_count_, ranges_of(sample_count_ * units_, tiles_));
    range_ = ceil_div(sample_count_, ranges);
    stride_ = aligned<Acc>(channels_);
    partial_ = scratch<Acc>(ceil_div(sample_count_, range_) * parts_ * kMoments * stride_);
    if (parts_ > 1) absolute_ = scratch<Acc>(channels_);
    tasks = ceil_div(sample_count_, range_) * parts_ * tiles_;
    task_size = range_ * ceil_div(position_count_, parts_) * tile_;
    results = channels_;
    result_size = ceil_div(sample_count_, range_) * parts_ * kMoments;
  }

  bool counts(const Offsets& at) const { return !mask_ || mask_[at.second]; }

  const Pair pair_;
  const uint8_t* const mask_;
  const bool alone_;
  const int64_t channels_;
  const std::vector<Dim> samples_, channel_, positions_;
  int64_t sample_count_ = 1, position_count_ = 1;

 private:
  void count_positions() {
    sample_count_ = cpu::count(samples_);
    position_count_ = cpu::count(positions_);
    if (!mask_ || alone_) return;
    present_.assign(sample_count_, 0);
    for (int64_t sample = 0; sample < sample_count_; ++sample) {
      Offsets base;
      for_each_run(samples_, sample, sample + 1, [&](const Offsets& at, int64_t) { base = at; });
      for_each_run(positions_, 0, position_count_, [&](Offsets at, int64_t length) {
        at.second += base.second;
        for (int64_t i = 0; i < length; ++i, positions_.empty() ? void() : at.add(positions_.back(), 1)) {
          present_[sample] += counts(at);
        }
      });
    }
  }

  void add_sample(int64_t sample, int64_t count, Acc* absolute, Acc* total, Acc* mean_square) const {
    if (parts_ > 1) {
      std::memcpy(total, absolute, count * sizeof(Acc));
      return;
    }
    add_mean_squares(sample, count, absolute, total, mean_square);
  }

  // Adds one sample's sums of |x| to the total, the squares of their means to the other, and zeros them.
  void add_mean_squares(int64_t sample, int64_t count, Acc* absolute, Acc* total, Acc* mean_square) const {
    const int64_t present = present_.empty() ? position_count_ : present_[sample];
    const Acc share = Acc(1) / Acc(std::max<int64_t>(present, 1));
    for (int64_t c = 0; c < count; ++c) {
      const Acc sum = absolute[c], mean = sum * share;
      total[c] += sum;
      mean_square[c] += mean * mean;
      absolute[c] = 0;
    }
  }

  Acc* results_[kMoments];
  std::vector<int64_t> present_;  // positions of each sample that the mask keeps; empty: all
  int64_t units_ = 1, tile_ = 1, tiles_ = 1, part_ = 1, parts_ = 1, range_ = 1, stride_ = 1;
  Scratch<Acc> partial_, absolute_;
};

// A unit is a position.
template <class Acc>
class ByColumns : public ChannelMoments<Acc> {
 public:
  template <class... Arguments>
  explicit ByColumns(const Arguments&... arguments) : ChannelMoments<Acc>(arguments...), columns_({this->channel_[0]}) {
    this->set_tasks(this->position_count_, kTile, kGrain / std::min(kTile, this->channels_));
  }

 protected:
  void read(
      const Offsets& base, int64_t begin, int64_t end, int64_t count, Acc* sum, Acc* square, Acc* absolute
  ) const override {
    int64_t starts[kRowsAtOnce], rows = 0;
    const Matrix x = columns_.first(this->pair_, Offsets{}, 0, 0);
    const auto flush = [&] {
      leaves<Acc>(this->pair_.dtype).column_moments(x, starts, rows, count, sum, square, absolute);
      rows = 0;
    };
    for_each_run(this->positions_, begin, end, [&](Offsets at, int64_t length) {
      at.first += base.first;
      at.second += base.second;
      for (int64_t i = 0; i < length; ++i, this->positions_.empty() ? void() : at.add(this->positions_.back(), 1)) {
        if (!this->counts(at)) continue;
        starts[rows++] = at.first;
        if (rows == kRowsAtOnce) flush();
      }
    });
    if (rows > 0) flush();
  }

 private:
  Columns columns_;
};

// A unit is a run of at most kLongRow positions along the innermost dimension.
template <class Acc>
class ByRows : public ChannelMoments<Acc> {
 public:
  template <class... Arguments>
  explicit ByRows(const Arguments&... arguments)
      : ChannelMoments<Acc>(arguments...), outer_(this->positions_), columns_(take_last(outer_)) {
    pieces_ = ceil_div(columns_.count(), kLongRow);
    const int64_t length = std::min(columns_.count(), kLongRow);
    this->set_tasks(cpu::count(outer_) * pieces_, std::min(kTile, std::max<int64_t>(1, kGrain / length)), 1);
  }

 protected:
  void read(
      const Offsets& base, int64_t begin, int64_t end, int64_t count, Acc* sum, Acc* square, Acc* absolute
  ) const override {
    const int64_t step = this->channel_.empty() ? 0 : this->channel_[0].first;
    for (int64_t unit = begin; unit < end; ++unit) {
      Offsets start = base;
      for_each_run(outer_, unit / pieces_, unit / pieces_ + 1, [&](const Offsets& at, int64_t) {
        start.first += at.first;
        start.second += at.second;
      });
      const int64_t column = unit % pieces_ * kLongRow;
      const int64_t length = std::min(columns_.count() - column, kLongRow);
      const Matrix x = columns_.first(this->pair_, start, step, column);
      Bits words[kLongRow];
      if (this->mask_) {
        for (int64_t i = 0; i < length; ++i) {
          const int64_t at = start.second + (dims_.empty() ? 0 : (column + i) * dims_[0].second);
          words[i] = this->mask_[at] ? ~Bits{0} : Bits{0};
        }
      }
      const Bits* const mask = this->mask_ ? words : nullptr;
      leaves<Acc>(this->pair_.dtype).row_sums(x, mask, count, length, sum, square, absolute);
    }
  }

 private:
  using Bits = typename Leaves<Acc>::Bits;

  // Takes the innermost position off `dims`.
  std::vector<Dim> take_last(std::vector<Dim>& dims) {
    if (dims.empty()) return {};
    dims_ = {dims.back()};
    dims.pop_back();
    return dims_;
  }

  std::vector<Dim> outer_, dims_;
  Columns columns_;
  int64_t pieces_;
};

template <class Acc, class... Arguments>
void run(const std::vector<Dim>& dims, const ParallelFor& parallel, const Arguments&... arguments) {
  if (!dims.empty() && dims.back().role == kChannel) {
    ByColumns<Acc>(arguments...).run_all(parallel);
  } else {
    ByRows<Acc>(arguments...).run_all(parallel);
  }
}

}  // namespace

void channel_moments(
    const Pair& pair, int64_t channel_dim, bool masked, void* const moments[kMoments], const ParallelFor& parallel
) {
  const int64_t channels = pair.sizes[channel_dim], samples = pair.sizes[0];
  std::vector<Dim> dims;
  for (int64_t d = 0; d < pair.dims; ++d) {
    const int role = d == channel_dim ? kChannel : d == 0 ? kSample : kPosition;
    dims.push_back({pair.sizes[d], pair.first_strides[d], pair.second_strides[d], role});
  }
  if (count(dims) == 0) {
    for (int m = 0; m < kMoments; ++m) clear_sums(moments[m], channels, pair.dtype);
    return;
  }
  const bool alone = count(dims) == samples * channels;
  if (alone && channel_dim != 0) dims[0].role = kPosition;
  dims = canonical(std::move(dims));
  if (pair.dtype == Dtype::float64) {
    run<double>(dims, parallel, pair, masked, dims, channels, alone, moments);
  } else {
    run<float>(dims, parallel, pair, masked, dims, channels, alone, moments);
  }
}

}  // namespace obc::cpu
