// channel_moments: per channel the sums of x, x^2 and |x|, and the sum over samples of (mean |x| of the sample)^2.
//
// Shapes: x (samples, channels, positions), any strides; positions are all other dimensions. A mask (samples,
// positions) of bytes excludes positions, which are not read.
// Bytes: x once; partial sums of `splits` parts of every sample's positions, written and read once.
// Accumulation: float32, float64 for float64 input.
//
// Two ways through memory:
//   by columns  channels are innermost: a lane reads a few neighbouring channels, position after position;
//   by rows     positions are innermost: a warp reads the positions of one sample's channel.
// A second kernel adds up the parts of each sample, squares its mean and adds up the samples, in a fixed order.

#include "plan.h"

namespace obc::cuda {

namespace {

enum Role { kPosition, kSample, kChannel };

constexpr int kSums = 3;    // x, x^2, |x|; with a mask a fourth counts positions
constexpr int kAtOnce = 8;  // loads of one thread; there is one array to read
// The most parts of one sample's positions: one thread of the second kernel adds them in a few reads of the cache.
constexpr int64_t kMostSplits = 64;

struct Input {
  const void* x;
  const uint8_t* mask;  // may be null
  int64_t samples;
  Place sample;  // strides of x and of the mask
  int64_t channels;
  int64_t channel;  // stride of x
  Axes positions;
  int64_t length;  // positions, or vectors of them by rows
  int64_t splits;
  int64_t share;  // of the length, in one split
  int64_t tiles;  // of channels, by columns
};

template <class Acc>
__device__ void add(Acc (&sums)[kSums], Acc value) {
  sums[0] += value;
  sums[1] += value * value;
  sums[2] += fabs(value);
}

// Layout of the sums: (splits, sums, samples, channels).
template <class Acc>
__device__ Acc* partial(const Input& in, Acc* partials, int64_t split, int64_t moment, int64_t sample) {
  const int64_t moments = in.mask ? kSums + 1 : kSums;
  return partials + ((split * moments + moment) * in.samples + sample) * in.channels;
}

template <class T, int kItems>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) columns_kernel(
    const __grid_constant__ Input in, Accumulator<T>* partials
) {
  using Acc = Accumulator<T>;
  constexpr int kColumns = kLanes * kItems;
  __shared__ Acc shared[kSums * kWarps * kColumns];
  __shared__ Acc counts[kWarps];
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  for (int64_t item = blockIdx.x; item < in.samples * in.splits * in.tiles; item += gridDim.x) {
    const int64_t tile = item % in.tiles, split = item / in.tiles % in.splits, sample = item / in.tiles / in.splits;
    const int64_t column = tile * kColumns, begin = split * in.share;
    const int64_t end = begin + in.share < in.length ? begin + in.share : in.length;
    const int64_t channel = column + lane * kItems;
    const T* x = static_cast<const T*>(in.x) + sample * in.sample.first + channel * in.channel;
    Acc sums[kItems][kSums] = {};
    Acc count = 0;
    for (int64_t line = begin + warp; line < end; line += kWarps * kAtOnce) {
      Loaded<T, kItems> loaded[kAtOnce];
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        loaded[n].clear();
        const int64_t here = line + n * kWarps;
        if (here >= end) continue;
        const Place at = place(in.positions, here);
        if (in.mask) {
          if (!in.mask[sample * in.sample.second + at.second]) continue;
          count += 1;
        }
        if (channel < in.channels) loaded[n].load(x + at.first);
      }
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        Acc values[kItems];
        loaded[n].unpack(values);
#pragma unroll
        for (int i = 0; i < kItems; ++i) add(sums[i], values[i]);
      }
    }
#pragma unroll
    for (int m = 0; m < kSums; ++m) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) shared[(m * kWarps + warp) * kColumns + lane * kItems + i] = sums[i][m];
    }
    if (lane == 0) counts[warp] = count;
    __syncthreads();
    const int64_t rest = in.channels - column;
    const int width = rest < kColumns ? static_cast<int>(rest) : kColumns;
    for (int index = threadIdx.x; index < kSums * kColumns; index += kThreads) {
      const int moment = index / kColumns, c = index % kColumns;
      if (c >= width) continue;
      Acc sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += shared[(moment * kWarps + w) * kColumns + c];
      partial(in, partials, split, moment, sample)[column + c] = sum;
    }
    if (in.mask) {
      Acc sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += counts[w];
      for (int c = threadIdx.x; c < width; c += kThreads) partial(in, partials, split, kSums, sample)[column + c] = sum;
    }
    __syncthreads();
  }
}

// The sums over every kLanes-th of the loads [begin, end) of one sample's channel. With a mask, `count` is the number
// of kept positions. `mask` belongs to the sample.
template <bool kMasked, class T, int kItems>
__device__ void read_row(
    const Input& in,
    const T* x,
    const uint8_t* mask,
    int64_t begin,
    int64_t end,
    Accumulator<T> (&sums)[kSums],
    Accumulator<T>& count
) {
  using Acc = Accumulator<T>;
  constexpr int kLoads = kMasked ? kAtOnce / 2 : kAtOnce;  // offsets in the mask take the other registers
  const int64_t last = in.positions.second[in.positions.count - 1];
  const int64_t mask_step = kItems > 1 ? last / kItems : last;
  for (int64_t position = begin; position < end; position += kLoads * kLanes) {
    Loaded<T, kItems> loaded[kLoads];
    Place at[kLoads] = {};
#pragma unroll
    for (int n = 0; n < kLoads; ++n) {
      loaded[n].clear();
      if (position + n * kLanes >= end) continue;
      at[n] = place(in.positions, position + n * kLanes);
      loaded[n].load(x + at[n].first);
    }
#pragma unroll
    for (int n = 0; n < kLoads; ++n) {
      Acc values[kItems];
      loaded[n].unpack(values);
      const bool here = position + n * kLanes < end;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        Acc value = values[i];
        if (kMasked) {
          const bool kept = here && mask[at[n].second + i * mask_step];
          if (!kept) value = 0;  // NaN too
          count += kept ? 1 : 0;
        }
        add(sums, value);
      }
    }
  }
}

template <class T, int kItems>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) rows_of_positions_kernel(
    const __grid_constant__ Input in, Accumulator<T>* partials
) {
  using Acc = Accumulator<T>;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t items = in.samples * in.splits * in.channels;
  for (int64_t item = blockIdx.x * int64_t{kWarps} + warp; item < items; item += gridDim.x * int64_t{kWarps}) {
    const int64_t channel = item % in.channels, split = item / in.channels % in.splits;
    const int64_t sample = item / in.channels / in.splits, begin = split * in.share;
    const int64_t end = begin + in.share < in.length ? begin + in.share : in.length;
    const T* x = static_cast<const T*>(in.x) + sample * in.sample.first + channel * in.channel;
    Acc sums[kSums] = {};
    Acc count = 0;
    if (in.mask) {
      read_row<true, T, kItems>(in, x, in.mask + sample * in.sample.second, begin + lane, end, sums, count);
    } else {
      read_row<false, T, kItems>(in, x, nullptr, begin + lane, end, sums, count);
    }
#pragma unroll
    for (int m = 0; m < kSums; ++m) {
      const Acc sum = warp_sum(sums[m]);
      if (lane == 0) partial(in, partials, split, m, sample)[channel] = sum;
    }
    if (in.mask) {
      const Acc sum = warp_sum(count);
      if (lane == 0) partial(in, partials, split, kSums, sample)[channel] = sum;
    }
  }
}

// A block adds up kLanes channels; its warps share the samples. `positions` is how many a sample has without a mask;
// `alone`: every sample has one, and they came as the positions of one sample.
template <class Acc>
__global__ void __launch_bounds__(kThreads) finish_kernel(
    const __grid_constant__ Input in,
    Acc* partials,
    int64_t positions,
    bool alone,
    const __grid_constant__ Results<Acc, 4> results
) {
  __shared__ Acc shared[4][kWarps][kLanes];
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t channel = blockIdx.x * int64_t{kLanes} + lane;
  Acc sums[4] = {};
  if (channel < in.channels) {
    for (int64_t sample = warp; sample < in.samples; sample += kWarps) {
      Acc absolute = 0, count = 0;
#pragma unroll 4
      for (int64_t split = 0; split < in.splits; ++split) {
        sums[0] += __ldcg(partial(in, partials, split, 0, sample) + channel);
        sums[1] += __ldcg(partial(in, partials, split, 1, sample) + channel);
        absolute += __ldcg(partial(in, partials, split, 2, sample) + channel);
        if (in.mask) count += __ldcg(partial(in, partials, split, kSums, sample) + channel);
      }
      if (!in.mask) count = static_cast<Acc>(positions);
      const Acc mean = absolute / (count > 1 ? count : Acc(1));
      sums[2] += absolute;
      sums[3] += mean * mean;
    }
  }
#pragma unroll
  for (int m = 0; m < 4; ++m) shared[m][warp][lane] = sums[m];
  __syncthreads();
  if (warp >= 4 || channel >= in.channels) return;
  const int moment = alone && warp == 3 ? 1 : warp;
  Acc sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += shared[moment][w][lane];
  results.sums[warp][channel] = sum;
}

// Nothing if the positions have too many axes.
std::optional<Input> plan(const Pair& pair, bool masked, const std::vector<Dim>& dims) {
  Input in = {pair.first, masked ? static_cast<const uint8_t*>(pair.second) : nullptr, 1, {0, 0}, 1, 0};
  std::vector<Dim> positions;
  for (const Dim& dim : dims) {
    if (dim.role == kPosition) positions.push_back(dim);
    if (dim.role == kSample) {
      in.samples = dim.size;
      in.sample = {dim.first, dim.second};
    }
    if (dim.role == kChannel) {
      in.channels = dim.size;
      in.channel = dim.first;
    }
  }
  const std::optional<Axes> axes = axes_of(positions);
  if (!axes) return std::nullopt;
  in.positions = *axes;
  in.length = cpu::count(positions);
  return in;
}

// `least`: the fewest loads of a split.
void split(Input& in, int64_t blocks, int64_t least) {
  const int64_t wanted =
      std::min({ceil_div(kBlocks, std::max<int64_t>(blocks, 1)), ceil_div(in.length, least), kMostSplits});
  in.share = ceil_div(in.length, std::max<int64_t>(wanted, 1));
  in.splits = ceil_div(in.length, in.share);
}

// Whether every step of x but along the innermost axis keeps 16-byte loads aligned.
bool steps_fit(const Input& in, int64_t items, int64_t skipped) {
  bool fit = aligned(in.x) && (in.samples == 1 || in.sample.first % items == 0);
  for (int64_t d = 0; d < in.positions.count - skipped; ++d) {
    fit &= in.positions.sizes[d] == 1 || in.positions.first[d] % items == 0;
  }
  return fit;
}

template <class T>
void run(Input in, bool by_columns, bool alone, const Results<Accumulator<T>, 4>& results, Context& context) {
  using Acc = Accumulator<T>;
  constexpr int kVector = kVectorBytes / sizeof(T);
  const int64_t positions = in.length, last = in.positions.count - 1;
  int64_t blocks = 0;
  void (*kernel)(Input, Acc*) = nullptr;
  if (by_columns) {
    const bool vectors = in.channel == 1 && in.channels % kVector == 0 && steps_fit(in, kVector, 0);
    in.tiles = ceil_div(in.channels, kLanes * (vectors ? kVector : 1));
    split(in, in.samples * in.tiles, kWarps * kAtOnce);
    blocks = in.samples * in.splits * in.tiles;
    kernel = vectors ? columns_kernel<T, kVector> : columns_kernel<T, 1>;
  } else {
    const bool vectors = in.positions.first[last] == 1 && in.positions.sizes[last] % kVector == 0 &&
                         (in.channels == 1 || in.channel % kVector == 0) && steps_fit(in, kVector, 1);
    if (vectors) {
      in.length /= kVector;
      in.positions.sizes[last] /= kVector;
      in.positions.first[last] *= kVector;
      in.positions.second[last] *= kVector;
    }
    split(in, ceil_div(in.samples * in.channels, kWarps), kLanes * kAtOnce);
    blocks = ceil_div(in.samples * in.channels * in.splits, kWarps);
    kernel = vectors ? rows_of_positions_kernel<T, kVector> : rows_of_positions_kernel<T, 1>;
  }
  const int64_t moments = in.mask ? kSums + 1 : kSums;
  Acc* const partials =
      static_cast<Acc*>(context.scratch(in.splits * moments * in.samples * in.channels * sizeof(Acc)));
  launch(context, kernel, grid(blocks), kThreads, false, in, partials);
  const int64_t finishing = ceil_div(in.channels, kLanes);
  launch(context, finish_kernel<Acc>, finishing, kThreads, false, in, partials, positions, alone, results);
}

}  // namespace

bool channel_moments(const Pair& pair, int64_t channel_dim, bool masked, void* const moments[4], Context& context) {
  const int64_t channels = pair.sizes[channel_dim];
  std::vector<Dim> dims;
  for (int64_t d = 0; d < pair.dims; ++d) {
    const int role = d == channel_dim ? kChannel : d == 0 ? kSample : kPosition;
    dims.push_back({pair.sizes[d], pair.first_strides[d], pair.second_strides[d], role});
  }
  if (channels == 0) return true;
  if (cpu::count(dims) == 0) {
    const size_t bytes = channels * (pair.dtype == Dtype::float64 ? sizeof(double) : sizeof(float));
    for (int m = 0; m < 4; ++m) context.check(cudaMemsetAsync(moments[m], 0, bytes, context.stream));
    return true;
  }
  const bool alone = cpu::count(dims) == pair.sizes[0] * channels;
  if (alone) dims[0].role = kPosition;
  dims = cpu::canonical(std::move(dims));
  const std::optional<Input> in = plan(pair, masked, dims);
  if (!in) return false;
  const bool by_columns = !dims.empty() && dims.back().role == kChannel;
  for_type(pair.dtype, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    Results<Accumulator<T>, 4> results;
    for (int m = 0; m < 4; ++m) results.sums[m] = static_cast<Accumulator<T>*>(moments[m]);
    run<T>(*in, by_columns, alone, results, context);
  });
  return true;
}

}  // namespace obc::cuda
