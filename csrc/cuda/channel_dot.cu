// channel_dot: r[n, c] = sum over positions p of a[n, c, p] * g[n, c, p]      (rows n only with per_sample)
//
// Shapes: a and g (N, C, P), any strides, each its own; P is the product of all other dimensions.
// Bytes: both inputs once; partial sums of at most 264 blocks' outputs written and read once.
// Accumulation: float32, float64 for float64 input.
//
// Two ways through memory:
//   by rows   the innermost dimension is summed (channel-first): rows.h;
//   by tiles  the innermost dimension is kept (channels-last, tokens), or it is short, summed and directly inside a
//             kept one (channel-first with few positions, whose rows are not aligned to 16 bytes): tiles.h. Short
//             lines that are adjacent in memory are read as one.

#include "plan.h"

namespace obc::cuda {

namespace {

enum Role { kSummed, kSample, kChannel };

// A kept channel with at most this many positions is read together with its neighbours.
constexpr int64_t kFewPositions = 256;

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) channel_dot_kernel(
    const __grid_constant__ Matrix m,
    Accumulator<T>* out,
    Accumulator<T>* partials,
    uint32_t* counters,
    const __grid_constant__ Output columns
) {
  __shared__ Accumulator<T> shared[kShared<T>];
  const int64_t items = m.groups * m.chunks * m.tiles;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    run_item<T, false>(m, item, columns, out, nullptr, nullptr, 0, partials, counters, shared);
  }
}

// Lines shorter than half a tile that are adjacent in memory become one line with many repeats of the channels.
void widen_lines(Matrix& m, int item) {
  const int64_t most = most_columns(Reading::kWide, item), vector = vector_items(item);
  const int64_t unit = std::lcm(m.channels, vector);
  const bool adjacent = m.terms == 1 && m.lines.count == 1 && m.lines.first[0] == m.channels &&
                        m.lines.second[0] == m.channels && m.column.first == 1 && m.column.second == 1;
  const int64_t elements = m.line_count * m.channels;
  const bool vectors = adjacent && unit <= most && elements % vector == 0 && aligned(m.first) && aligned(m.second) &&
                       (m.groups == 1 || (m.group.first % vector == 0 && m.group.second % vector == 0));
  const int64_t width = vectors ? most / unit * unit : most_columns(Reading::kStrided, item) / m.channels * m.channels;
  if (!adjacent || width < 2 * m.channels) return;
  m.terms = std::min(width / m.channels, m.line_count);
  m.term_stride = m.channels;
  m.width = m.terms * m.channels;
  m.line_count = ceil_div(elements, m.width);
  m.last_width = elements - (m.line_count - 1) * m.width;
  m.lines.sizes[0] = m.line_count;
  m.lines.first[0] = m.lines.second[0] = m.width;
}

// The matrix of an inner kept dimension, or nothing if this way does not apply.
std::optional<Matrix> plan_tiles(const Pair& pair, std::vector<Dim> dims, Output& output) {
  const int item = element_size(pair.dtype);
  if (dims.empty()) return std::nullopt;
  Matrix m = {};
  m.first = pair.first;
  m.second = pair.second;
  m.terms = m.channel_stride = m.term_stride = 1;
  const Dim inner = dims.back();
  m.column = {inner.first, inner.second};
  if (inner.role == kSummed) {
    if (dims.size() < 2 || inner.size > kFewPositions) return std::nullopt;
    dims.pop_back();
    if (dims.back().role == kSummed || !continues(dims.back(), inner)) return std::nullopt;
    m.terms = m.channel_stride = inner.size;
  }
  m.channels = dims.back().size;
  output.stride = dims.back().out;
  m.width = m.last_width = m.channels * m.terms;
  dims.pop_back();
  m.groups = 1;
  std::vector<Dim> lines;
  m.line_count = 1;
  for (const Dim& dim : dims) {
    if (dim.role == kSummed) {
      lines.push_back(dim);
      m.line_count *= dim.size;
    } else {
      m.groups = dim.size;
      m.group = {dim.first, dim.second};
      output.group_stride = dim.out;
    }
  }
  // Nothing is summed over lines: adjacent samples become channels of one line.
  if (lines.empty() && m.groups > 1 && m.group.first == m.width * m.column.first &&
      m.group.second == m.width * m.column.second && output.group_stride == m.channels * output.stride) {
    m.channels *= m.groups;
    m.width = m.last_width = m.channels * m.terms;
    m.groups = 1;
  }
  m.lines_per_row = 1;
  const std::optional<Axes> axes = axes_of(lines);
  if (!axes) return std::nullopt;
  m.lines = *axes;
  if (m.line_count > 1) widen_lines(m, item);
  if (!choose_tile(m, item)) return std::nullopt;
  return m;
}

std::optional<Rows> plan_rows(const Pair& pair, const std::vector<Dim>& dims) {
  std::vector<Dim> kept, summed;
  for (const Dim& dim : dims) (dim.role == kSummed ? summed : kept).push_back(dim);
  // Samples before channels, as in the result.
  std::sort(kept.begin(), kept.end(), [](const Dim& a, const Dim& b) { return a.role < b.role; });
  return rows_of(pair, kept, summed, true);
}

template <class T>
void run_tiles(Matrix& m, const Output& output, void* out, Context& context) {
  using Acc = Accumulator<T>;
  choose_chunks(m, false, sizeof(T));
  Space space;
  place_partials(m, false, space);
  Acc* const partials = static_cast<Acc*>(context.scratch(space.partials * sizeof(Acc)));
  launch(
      context,
      channel_dot_kernel<T>,
      grid(items(m)),
      kThreads,
      false,
      m,
      static_cast<Acc*>(out),
      partials,
      context.counters(space.counters),
      output
  );
}

}  // namespace

bool channel_dot(const Pair& pair, int64_t channel_dim, bool per_sample, void* out, Context& context) {
  const int64_t channels = pair.sizes[channel_dim], samples = per_sample ? pair.sizes[0] : 1;
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
  if (samples * channels == 0) return true;
  if (cpu::count(dims) == 0) {
    const size_t bytes = samples * channels * (pair.dtype == Dtype::float64 ? sizeof(double) : sizeof(float));
    context.check(cudaMemsetAsync(out, 0, bytes, context.stream));
    return true;
  }
  dims = cpu::canonical(std::move(dims));
  bool planned = true;
  for_type(pair.dtype, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    Output output = {};
    if (std::optional<Matrix> m = plan_tiles(pair, dims, output)) {
      run_tiles<T>(*m, output, out, context);
    } else if (const std::optional<Rows> rows = plan_rows(pair, dims)) {
      run_rows<T, 1>(*rows, {{static_cast<Accumulator<T>*>(out)}}, context);
    } else {
      planned = false;
    }
  });
  return planned;
}

}  // namespace obc::cuda
