// end_row: scores[groups[c]] += (row[c] / loss_scale)^2, then row = 0; nothing is added if a square is not finite.
//
// The squares replace the row while they are checked, so each division is done once; the second half reads them from
// cache.

#include <limits>

#include "kernels.h"

namespace obc::cpu {

namespace {

// The position of the first group that is outside [0, size) or less than the one before it; -1 if all are valid.
int64_t first_bad_group(const EndRow& arguments) {
  int64_t least = 0;
  for (int64_t c = 0; c < arguments.row_size; ++c) {
    const int64_t group = arguments.groups[c * arguments.groups_stride];
    if (group < least || group >= arguments.scores_size) return c;
    least = group;
  }
  return -1;
}

template <class Acc>
bool square(Acc* row, int64_t size, int64_t stride, Acc loss_scale) {
  int infinite = 0;
  for (int64_t c = 0; c < size; ++c) {
    const Acc scaled = row[c * stride] / loss_scale;
    const Acc squared = scaled * scaled;
    infinite |= !(squared <= std::numeric_limits<Acc>::max());  // true for NaN as well
    row[c * stride] = squared;
  }
  return infinite == 0;
}

template <class Acc>
void add(const EndRow& arguments, const Acc* row) {
  Acc* scores = static_cast<Acc*>(arguments.scores);
  for (int64_t c = 0; c < arguments.row_size; ++c) {
    const int64_t group = arguments.groups ? arguments.groups[c * arguments.groups_stride] : c;
    scores[group * arguments.scores_stride] += row[c * arguments.row_stride];
  }
}

template <class Acc>
bool end(const EndRow& arguments) {
  Acc* row = static_cast<Acc*>(arguments.row);
  const bool finite = square(row, arguments.row_size, arguments.row_stride, static_cast<Acc>(arguments.loss_scale));
  if (finite) add(arguments, row);
  for (int64_t c = 0; c < arguments.row_size; ++c) row[c * arguments.row_stride] = 0;
  return finite;
}

}  // namespace

int64_t end_row(const EndRow& arguments, bool* finite) {
  if (arguments.groups) {
    if (const int64_t bad = first_bad_group(arguments); bad >= 0) return bad;
  }
  *finite = arguments.dtype == Dtype::float64 ? end<double>(arguments) : end<float>(arguments);
  return -1;
}

}  // namespace obc::cpu
