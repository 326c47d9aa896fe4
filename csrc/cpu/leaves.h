// The leaf kernels: sums of products over a (rows, columns) matrix, compiled once per instruction set.
//
// Every operator is built from these. A leaf runs in one thread, allocates nothing, and sums in an order that depends
// on (rows, columns) only: lanes are 128 bytes (row_dots) or 64 bytes wide on any registers, the compiler must not
// contract to fused multiply-add, and a remainder shorter than the lanes is padded with zeros.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels.h"

namespace obc::cpu {

// A (rows, columns) view: element (r, j) is data[r * row_stride + j], or, if `offsets` is given,
// data[r * row_stride + offsets[j]]. In a pair either both have offsets or neither.
struct Matrix {
  const void* data;
  int64_t row_stride;
  const int64_t* offsets;
};

template <class Acc>
struct Leaves {
  // sums[r * sums_stride] = sum_j a[r, j] * g[r, j]
  void (*row_dots)(Matrix a, Matrix g, int64_t rows, int64_t columns, Acc* sums, int64_t sums_stride);
  // sums[j] += sum_r a[r, j] * g[r, j]. `far`: the matrices are not in the second-level cache, so prefetching rows
  // pays; the sums are the same.
  void (*column_sums)(Matrix a, Matrix g, int64_t rows, int64_t columns, bool far, Acc* sums);
  // Both in one pass: row_sums[r] += ..., column_sums[j] += ...
  void (*row_column_sums)(Matrix a, Matrix g, int64_t rows, int64_t columns, bool far, Acc* row_sums, Acc* column_sums);
  // sums[m * sums_stride + r] = sum_j of wg, (wg)^2, |wg|, w^2, |w| for m = 0 ... 4
  void (*row_moments)(Matrix w, Matrix g, int64_t rows, int64_t columns, Acc* sums, int64_t sums_stride);

  using Bits = std::conditional_t<sizeof(Acc) == 8, uint64_t, uint32_t>;
  // sum[r] += sum_j x[r, j], square[r] and absolute[r] likewise of x^2 and |x|; where `mask` is given, of the x whose
  // mask[j] is all ones; the others' are zero.
  void (*row_sums)(Matrix x, const Bits* mask, int64_t rows, int64_t columns, Acc* sum, Acc* square, Acc* absolute);
  // sum[j] += sum_r x[r, j] and so on, of `rows` rows that begin starts[r] elements after the matrix.
  void (*column_moments)(
      Matrix x, const int64_t* starts, int64_t rows, int64_t columns, Acc* sum, Acc* square, Acc* absolute
  );
};

// The leaves for inputs of `dtype`; Acc is double exactly for float64.
template <class Acc>
const Leaves<Acc>& leaves(Dtype dtype);

}  // namespace obc::cpu
