// Converts a pair of strided arrays to what the kernels walk. Everything here runs on the host.
#pragma once

#include <numeric>
#include <optional>

#include "cpu/layout.h"
#include "rows.h"
#include "tiles.h"

namespace obc::cuda {

using cpu::ceil_div;
using cpu::continues;
using cpu::Dim;

// `dims`, outermost first, as axes; nothing if there are too many.
inline std::optional<Axes> axes_of(const std::vector<Dim>& dims) {
  if (dims.size() > kMaxAxes) return std::nullopt;
  Axes axes = {1, {1}, {0}, {0}};
  if (!dims.empty()) axes.count = static_cast<int64_t>(dims.size());
  for (size_t d = 0; d < dims.size(); ++d) {
    axes.sizes[d] = dims[d].size;
    axes.first[d] = dims[d].first;
    axes.second[d] = dims[d].second;
  }
  return axes;
}

inline bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0; }

// Whether every axis but the last `skipped` ones keeps both arrays at a multiple of `items`.
inline bool multiples(const Axes& axes, int64_t items, int64_t skipped = 0) {
  for (int64_t d = 0; d < axes.count - skipped; ++d) {
    if (axes.sizes[d] > 1 && (axes.first[d] % items != 0 || axes.second[d] % items != 0)) return false;
  }
  return true;
}

// Chooses tile and reading of a matrix with known channels and terms. `together` neighbouring channels are never
// separated; returns false if a tile can't hold as many.
inline bool choose_tile(Matrix& m, int item, int64_t together = 1) {
  const int64_t vector = vector_items(item);
  const int64_t columns = m.channels * m.terms;
  const int64_t unit = m.channel_stride * together;  // columns that must stay together
  const bool vectors = m.column.first == 1 && m.column.second == 1 && aligned(m.first) && aligned(m.second) &&
                       (m.groups == 1 || (m.group.first % vector == 0 && m.group.second % vector == 0)) &&
                       multiples(m.lines, vector) && m.width % vector == 0 && m.last_width % vector == 0;
  m.reading = !vectors                                          ? Reading::kStrided
              : columns <= most_columns(Reading::kNarrow, item) ? Reading::kNarrow
                                                                : Reading::kWide;
  const int64_t most = most_columns(m.reading, item);
  const int64_t step = vectors ? std::lcm(unit, vector) : unit;
  if (columns <= most) {
    m.tile_columns = std::max<int64_t>(columns, 1);
  } else if (m.term_stride > 1 || step > most) {
    return false;
  } else {
    m.tile_columns = most / step * step;
  }
  m.tile_channels = std::max<int64_t>(m.tile_columns / m.terms, 1);
  m.tiles = std::max<int64_t>(ceil_div(m.channels, m.tile_channels), 1);
  return true;
}

// Rows that a block reads in one step: the lines that its warps read at once, in whole rows.
inline int64_t step_rows(const Matrix& m, int item) {
  return ceil_div(kWarps * lines_at_once(m.reading, item), m.lines_per_row);
}

// Steps in all its items, if each item had one.
inline int64_t steps(const Matrix& m, int item) {
  const int64_t rows = m.line_count / m.lines_per_row;
  return m.groups * m.tiles * std::max<int64_t>(ceil_div(rows, step_rows(m, item)), 1);
}

// Partial line sums of a chunk that its last item alone adds up: 128 loads per thread, eight round trips to the cache.
constexpr int64_t kMostLinePartials = 128 * kThreads;

inline void choose_chunks(Matrix& m, int64_t steps_per_item, bool line_sums, int item) {
  const int64_t step_lines = step_rows(m, item) * m.lines_per_row;
  if (line_sums)
    steps_per_item = std::min(steps_per_item, std::max(kMostLinePartials / (step_lines * m.tiles), int64_t{1}));
  m.chunk_lines = steps_per_item * step_lines;
  m.chunks = std::max<int64_t>(ceil_div(m.line_count, m.chunk_lines), 1);
  m.sections = ceil_div(m.chunks, kFanIn);
}

// For a matrix with its own launch: as many chunks as make one wave of blocks.
inline void choose_chunks(Matrix& m, bool line_sums, int item) {
  const int64_t side_by_side = m.groups * m.tiles;
  const int64_t chunks = std::max<int64_t>(kBlocks / side_by_side, 1);
  choose_chunks(m, ceil_div(steps(m, item) / side_by_side, chunks), line_sums, item);
}

inline int64_t items(const Matrix& m) { return m.groups * m.chunks * m.tiles; }

// Scratch memory of a launch while it is being divided.
struct Space {
  int64_t partials = 0;
  int64_t counters = 0;
};

inline int64_t take(int64_t& from, int64_t size) {
  const int64_t place = from;
  from += size;
  return place;
}

inline void place_partials(Matrix& m, bool line_sums, Space& space) {
  m.column_partials = take(space.partials, m.chunks > 1 ? m.groups * m.chunks * m.channels : 0);
  m.column_counters = take(space.counters, m.chunks > 1 ? m.groups * m.tiles * m.sections : 0);
  m.section_partials = take(space.partials, m.sections > 1 ? m.groups * m.sections * m.channels : 0);
  m.section_counters = take(space.counters, m.sections > 1 ? m.groups * m.tiles : 0);
  if (!line_sums) return;
  m.line_partials = take(space.partials, m.tiles * m.groups * m.line_count);
  m.line_counters = take(space.counters, m.tiles > 1 ? m.groups * m.chunks : 0);
}

// Whether every output's positions form runs that are adjacent in both arrays, at equal distances from a multiple of 16
// bytes.
inline bool can_peel(const Rows& r, int64_t vector, int item, bool several_runs) {
  bool alike = (reinterpret_cast<uintptr_t>(r.first) - reinterpret_cast<uintptr_t>(r.second)) % kVectorBytes == 0;
  for (int64_t d = 0; d < r.outputs.count; ++d) alike &= (r.outputs.first[d] - r.outputs.second[d]) % vector == 0;
  const int64_t last = r.positions.count - 1;
  if (last > 0 && !several_runs) return false;
  for (int64_t d = 0; d < last; ++d) alike &= (r.positions.first[d] - r.positions.second[d]) % vector == 0;
  const bool adjacent = r.positions.first[last] == 1 && r.positions.second[last] == 1;
  // With fewer than two vectors there may be no whole one; with several runs each has as many loads as single elements.
  const int64_t least = last == 0 ? 2 * vector : 2 * vector * vector;
  return alike && adjacent && r.positions.sizes[last] >= least && reinterpret_cast<uintptr_t>(r.first) % item == 0;
}

// Outputs are the `kept` dimensions in that order, positions the `summed` ones; nothing if there are too many axes.
// `several_runs`: the kernel peels more than one run of an output; with five sums it has no registers for that.
inline std::optional<Rows> rows_of(
    const Pair& pair, const std::vector<Dim>& kept, const std::vector<Dim>& summed, bool several_runs
) {
  const std::optional<Axes> outputs = axes_of(kept), positions = axes_of(summed);
  if (!outputs || !positions) return std::nullopt;
  Rows r = {};
  r.first = pair.first;
  r.second = pair.second;
  r.outputs = *outputs;
  r.positions = *positions;
  r.count = cpu::count(kept);
  r.length = cpu::count(summed);
  const int64_t vector = vector_items(element_size(pair.dtype)), last = r.positions.count - 1;
  r.vectors = r.positions.first[last] == 1 && r.positions.second[last] == 1 && r.positions.sizes[last] % vector == 0 &&
              multiples(r.positions, vector, 1) && multiples(r.outputs, vector) && aligned(r.first) &&
              aligned(r.second);
  if (!r.vectors && can_peel(r, vector, element_size(pair.dtype), several_runs)) {
    r.vectors = true;
    r.peeled = r.positions.sizes[last];
  }
  if (r.vectors) {
    r.positions.sizes[last] /= vector;
    r.length = r.length / (r.peeled > 0 ? r.peeled : r.positions.sizes[last] * vector) * r.positions.sizes[last];
    r.positions.first[last] = r.positions.second[last] = vector;
  }
  // Every thread of a block should have a full set of loads, and no single warp should have more than that.
  constexpr int64_t kShare = kThreads * kLoadsAtOnce;
  r.by_warp = r.length < kShare || r.count >= kBlocks * kWarps;
  r.splits = 1;
  if (!r.by_warp) r.splits = std::min(ceil_div(kBlocks, r.count), ceil_div(r.length, kShare));
  r.share = ceil_div(r.length, r.splits);
  r.splits = ceil_div(r.length, r.share);
  return r;
}

template <class T, int kMoments>
void run_rows(const Rows& r, const Results<Accumulator<T>, kMoments>& results, Context& context) {
  using Acc = Accumulator<T>;
  const int64_t shared = r.splits > 1 ? r.count : 0;
  Acc* const partials = static_cast<Acc*>(context.scratch(shared * r.splits * kMoments * sizeof(Acc)));
  uint32_t* const counters = context.counters(shared);
  const int64_t blocks = grid(r.by_warp ? ceil_div(r.count, kWarps) : r.count * r.splits);
  const auto kernel = r.vectors ? rows_kernel<T, kVectorBytes / sizeof(T), kMoments> : rows_kernel<T, 1, kMoments>;
  launch(context, kernel, blocks, kThreads, false, r, partials, counters, results);
}

}  // namespace obc::cuda
