// Column sums, and optionally line sums, of the product of two matrices, tile by tile: channel_dot and weight_dot.
//
// The arrays are `groups` matrices of `line_count` lines by `columns` columns. An item is a tile of columns by a chunk
// of lines, read once by one block: each warp takes some lines at a time, each lane some columns. At the end of an item
// the warps' column sums are added in shared memory and combined into channels: a channel has `terms` columns (the
// kernel positions of a weight, the few positions of a small feature map, or the repeats of a widened line).
//
// Whatever an item can't finish goes to the partial sums: column sums if there are several chunks, line sums always (a
// row of a weight may have several lines). The last of the items that share an output adds them up. Many chunks are
// added in two rounds, first in sections, so that the last item does not have to add all their sums alone.
#pragma once

#include "device.h"

namespace obc::cuda {

// How a warp reads lines.
enum class Reading : int64_t {
  kWide,     // 16-byte vectors, several per line at once
  kNarrow,   // 16-byte vectors, one from each of several lines: lines of at most 32 vectors
  kStrided,  // single elements of any stride
};

__host__ __device__ constexpr int vector_items(int item_size) { return kVectorBytes / item_size; }
// A thread's registers hold 16 (float64: 8) column sums in addition to eight vectors.
__host__ __device__ constexpr int wide_unroll(int item_size) { return item_size == 2 ? 2 : 4; }
// Partial sums that one thread adds at once, with all their loads in flight. Then at most 264 chunks need two rounds.
constexpr int kFanIn = 16;
constexpr int kVectorsAtOnce = 4;  // of each of the two arrays
constexpr int kStridedUnroll = 4;
constexpr int kStridedLines = 2;

// Columns that one tile can have.
__host__ __device__ constexpr int64_t most_columns(Reading reading, int item_size) {
  return kLanes * (reading == Reading::kStrided  ? kStridedUnroll
                   : reading == Reading::kNarrow ? vector_items(item_size)
                                                 : vector_items(item_size) * wide_unroll(item_size));
}

// Lines that a warp reads at once.
__host__ __device__ constexpr int64_t lines_at_once(Reading reading, int item_size) {
  return reading == Reading::kStrided  ? kStridedLines
         : reading == Reading::kNarrow ? kVectorsAtOnce
                                       : kVectorsAtOnce / wide_unroll(item_size);
}

struct Matrix {
  const void* first;
  const void* second;
  Reading reading;

  int64_t groups;
  Place group;  // strides
  Axes lines;   // of one group
  int64_t line_count;
  int64_t lines_per_row;
  int64_t width;       // columns that a line has
  int64_t last_width;  // and the last one
  Place column;        // strides; both 1 where vectors are read

  int64_t channels;
  int64_t terms;
  int64_t channel_stride;  // channel k owns the columns k * channel_stride + t * term_stride
  int64_t term_stride;

  int64_t tile_columns;
  int64_t tile_channels;
  int64_t tiles;
  int64_t chunk_lines;  // a multiple of lines_per_row
  int64_t chunks;

  int64_t sections;

  // Offsets, in accumulators and counters. Partial column sums are (groups, chunks, channels), those of sections
  // (groups, sections, channels), partial line sums (tiles, groups, line_count); counters are (groups, tiles,
  // sections), (groups, tiles) and (groups, chunks).
  int64_t column_partials;
  int64_t section_partials;
  int64_t line_partials;
  int64_t column_counters;
  int64_t section_counters;
  int64_t line_counters;
};

// The sum of channel (or row) i of a group goes to group * group_stride + i * stride. If bias is given,
// bias[i] * bias_grad[i] is added to it, and the strides are those of one contiguous vector.
struct Output {
  int64_t group_stride;
  int64_t stride;
  const void* bias;
  const void* bias_grad;
  int64_t bias_stride;
  int64_t bias_grad_stride;
};

template <class T>
__device__ void store_sum(
    const Output& output, Accumulator<T>* sums, int64_t group, int64_t channel, Accumulator<T> sum
) {
  const int64_t index = group * output.group_stride + channel * output.stride;
  if (output.bias) {
    const T* bias = static_cast<const T*>(output.bias);
    const T* grad = static_cast<const T*>(output.bias_grad);
    sum += widen(bias[index * output.bias_stride]) * widen(grad[index * output.bias_grad_stride]);
  }
  sums[index] = sum;
}

// Shared memory of one block: the column sums of its warps, then kThreads accumulators for add_up.
template <class T>
constexpr int kShared = kWarps * most_columns(Reading::kWide, sizeof(T)) + kThreads;

// Reads the lines [begin, end) of one group and one tile. Writes each warp's column sums to `shared` and, if requested,
// each line's sum to `line_sums`.
template <class T, int kItems, int kUnroll, int kLines, bool kLineSums>
__device__ void read_lines(
    const Matrix& m,
    int64_t group,
    int64_t column,
    int64_t begin,
    int64_t end,
    Accumulator<T>* line_sums,
    Accumulator<T>* shared
) {
  using Acc = Accumulator<T>;
  constexpr int kColumns = kLanes * kItems * kUnroll;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  // Vectors are adjacent, so one address serves a whole line.
  const Place step = kItems > 1 ? Place{1, 1} : m.column;
  const T* const first = static_cast<const T*>(m.first) + group * m.group.first + (column + lane * kItems) * step.first;
  const T* const second =
      static_cast<const T*>(m.second) + group * m.group.second + (column + lane * kItems) * step.second;

  // The beginning of a warp's next lines if lines have one axis, which needs no multiplications.
  const bool one_axis = m.lines.count == 1;
  const int64_t first_line = begin + warp * kLines;
  const T* a_next = first + first_line * m.lines.first[0];
  const T* g_next = second + first_line * m.lines.second[0];

  Acc sums[kUnroll][kItems] = {};
  for (int64_t line = first_line; line < end; line += kWarps * kLines) {
    Loaded<T, kItems> a[kLines][kUnroll], g[kLines][kUnroll];
#pragma unroll
    for (int l = 0; l < kLines; ++l) {
      int64_t width = (line + l + 1 == m.line_count ? m.last_width : m.width) - column;
      if (width > m.tile_columns) width = m.tile_columns;
      if (line + l >= end) width = 0;
      const T *a_line = a_next + l * m.lines.first[0], *g_line = g_next + l * m.lines.second[0];
      if (!one_axis) {
        const Place at = place(m.lines, line + l);
        a_line = first + at.first;
        g_line = second + at.second;
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        a[l][u].clear();
        g[l][u].clear();
        if ((u * kLanes + lane) * kItems < width) {
          a[l][u].load(a_line + u * kLanes * kItems * step.first);
          g[l][u].load(g_line + u * kLanes * kItems * step.second);
        }
      }
    }
#pragma unroll
    for (int l = 0; l < kLines; ++l) {
      Acc total = 0;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        Acc left[kItems], right[kItems];
        a[l][u].unpack(left);
        g[l][u].unpack(right);
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          const Acc product = left[i] * right[i];
          sums[u][i] += product;
          if (kLineSums) total += product;
        }
      }
      if (kLineSums) {
        total = warp_sum(total);
        if (lane == 0 && line + l < end) line_sums[line + l] = total;
      }
    }
    a_next += kWarps * kLines * m.lines.first[0];
    g_next += kWarps * kLines * m.lines.second[0];
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) shared[warp * kColumns + (u * kLanes + lane) * kItems + i] = sums[u][i];
  }
}

// Reads one item, adds up its columns, and finishes the channels and rows of which it is the last item. `coarse`, if
// given, also gets the sums of every `coarse_channels` neighbouring channels; such a matrix has one chunk.
template <class T, bool kLineSums>
__device__ void run_item(
    const Matrix& m,
    int64_t item,
    const Output& columns,
    Accumulator<T>* column_results,
    const Output* lines,
    Accumulator<T>* line_results,
    int64_t coarse_channels,
    Accumulator<T>* partials,
    uint32_t* counters,
    Accumulator<T>* shared
) {
  using Acc = Accumulator<T>;
  constexpr int kSize = sizeof(T), kVector = kVectorBytes / kSize, kUnroll = wide_unroll(kSize);
  Acc* const scratch = shared + kShared<T> - kThreads;
  const int64_t tile = item % m.tiles, chunk = item / m.tiles % m.chunks, group = item / m.tiles / m.chunks;
  const int64_t begin = chunk * m.chunk_lines;
  const int64_t end = begin + m.chunk_lines < m.line_count ? begin + m.chunk_lines : m.line_count;
  const int64_t column = tile * m.tile_columns;
  Acc* const line_sums = partials + m.line_partials + (tile * m.groups + group) * m.line_count;

  if (m.reading == Reading::kWide) {
    read_lines<T, kVector, kUnroll, kVectorsAtOnce / kUnroll, kLineSums>(
        m,
        group,
        column,
        begin,
        end,
        line_sums,
        shared
    );
  } else if (m.reading == Reading::kNarrow) {
    read_lines<T, kVector, 1, kVectorsAtOnce, kLineSums>(m, group, column, begin, end, line_sums, shared);
  } else {
    read_lines<T, 1, kStridedUnroll, kStridedLines, kLineSums>(m, group, column, begin, end, line_sums, shared);
  }
  __syncthreads();

  const int64_t first_channel = tile * m.tile_channels;
  const int64_t rest = m.channels - first_channel;
  const int64_t count = rest < m.tile_channels ? rest : m.tile_channels;
  const int64_t stride = most_columns(m.reading, kSize);
  // One term of a channel, of all warps.
  const auto of_tile = [&](int64_t channel, int64_t term) {
    const Acc* const column_sums = shared + channel * m.channel_stride + term * m.term_stride;
    Acc sum = column_sums[0];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) sum += column_sums[w * stride];
    return sum;
  };
  const auto finish = [&](int64_t channel, Acc sum) {
    store_sum<T>(columns, column_results, group, first_channel + channel, sum);
  };
  if (m.chunks == 1) {
    add_up(count, m.terms, scratch, of_tile, finish);
  } else {
    // Partial sums of this tile's channels: of chunk c at [c * m.channels + channel], of sections likewise.
    Acc* const of_chunks = partials + m.column_partials + group * m.chunks * m.channels + first_channel;
    Acc* const of_sections = partials + m.section_partials + group * m.sections * m.channels + first_channel;
    const int64_t section = chunk / kFanIn, first_chunk = section * kFanIn;
    const int64_t members = m.chunks - first_chunk < kFanIn ? m.chunks - first_chunk : kFanIn;
    const int64_t meeting = group * m.tiles + tile;
    add_up(count, m.terms, scratch, of_tile, [&](int64_t channel, Acc sum) {
      of_chunks[chunk * m.channels + channel] = sum;
    });
    if (last_of(counters + m.column_counters + meeting * m.sections + section, members)) {
      const auto of_members = [&](int64_t channel, int64_t member) {
        return __ldcg(of_chunks + (first_chunk + member) * m.channels + channel);
      };
      if (m.sections == 1) {
        add_up(count, members, scratch, of_members, finish);
      } else {
        add_up(count, members, scratch, of_members, [&](int64_t channel, Acc sum) {
          of_sections[section * m.channels + channel] = sum;
        });
        if (last_of(counters + m.section_counters + meeting, m.sections)) {
          const auto of_all = [&](int64_t channel, int64_t from) {
            return __ldcg(of_sections + from * m.channels + channel);
          };
          add_up(count, m.sections, scratch, of_all, finish);
        }
      }
    }
  }

  if (!kLineSums) return;
  if (coarse_channels > 0) {
    const auto of_channels = [&](int64_t group_of, int64_t index) {
      const int64_t term = quotient(index, coarse_channels);
      return of_tile(group_of * coarse_channels + index - term * coarse_channels, term);
    };
    add_up(count / coarse_channels, coarse_channels * m.terms, scratch, of_channels, [&](int64_t g, Acc sum) {
      store_sum<T>(*lines, line_results, 0, first_channel / coarse_channels + g, sum);
    });
  } else if (last_of(counters + m.line_counters + group * m.chunks + chunk, m.tiles)) {
    const int64_t first_row = begin / m.lines_per_row;
    const auto of_tiles = [&](int64_t row, int64_t term) {
      const int64_t from = quotient(term, m.lines_per_row);
      const int64_t line = (first_row + row - from) * m.lines_per_row + term;
      return __ldcg(partials + m.line_partials + (from * m.groups + group) * m.line_count + line);
    };
    add_up((end - begin) / m.lines_per_row, m.tiles * m.lines_per_row, scratch, of_tiles, [&](int64_t row, Acc sum) {
      store_sum<T>(*lines, line_results, group, first_row + row, sum);
    });
  }
}

}  // namespace obc::cuda
