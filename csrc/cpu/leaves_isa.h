// The leaf kernels for one instruction set. leaves.cpp includes this file once for each, with
//   OBC_ISA           the namespace,
//   OBC_VECTOR_BYTES  the width of its registers,
//   OBC_F16C          1 where it converts float16 by one instruction,
//   OBC_FMA           1 where it has fused multiply-add,
//   OBC_MASKS         1 where it reads and writes parts of a vector by AVX-512 masks,
//   OBC_TARGET        the function attribute that switches it on.
// It has no include guard, and every function carries the attribute, so nothing here can leak into code for older
// machines.

namespace obc::cpu::OBC_ISA {

#define OBC_INLINE OBC_TARGET inline __attribute__((always_inline))

constexpr int kVectorBytes = OBC_VECTOR_BYTES;
typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef double Doubles __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint64_t LongWords __attribute__((vector_size(kVectorBytes)));
typedef int32_t Integers __attribute__((vector_size(kVectorBytes)));
typedef int64_t LongIntegers __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));

// The first `count` elements of a vector, fewer than it has, from or to memory; the others are zero.
#if OBC_MASKS
OBC_INLINE void load_first(const float* from, int64_t count, Floats& to) {
  to = (Floats)_mm512_maskz_loadu_ps((1u << count) - 1, from);
}
OBC_INLINE void load_first(const double* from, int64_t count, Doubles& to) {
  to = (Doubles)_mm512_maskz_loadu_pd((1u << count) - 1, from);
}
OBC_INLINE void load_first(const uint16_t* from, int64_t count, Halves& to) {
  to = (Halves)_mm256_maskz_loadu_epi16((1u << count) - 1, from);
}
OBC_INLINE void store_first(float* to, int64_t count, const Floats& from) {
  _mm512_mask_storeu_ps(to, (1u << count) - 1, (__m512)from);
}
OBC_INLINE void store_first(double* to, int64_t count, const Doubles& from) {
  _mm512_mask_storeu_pd(to, (1u << count) - 1, (__m512d)from);
}
#else
template <class Element, class Vector>
OBC_INLINE void load_first(const Element* from, int64_t count, Vector& to) {
  Element padded[sizeof(Vector) / sizeof(Element)] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = from[i];
  __builtin_memcpy(&to, padded, sizeof(to));
}
template <class Element, class Vector>
OBC_INLINE void store_first(Element* to, int64_t count, const Vector& from) {
  Element padded[sizeof(Vector) / sizeof(Element)];
  __builtin_memcpy(padded, &from, sizeof(from));
  for (int64_t i = 0; i < count; ++i) to[i] = padded[i];
}
#endif

// For each dtype: the vector in memory, and its conversion to a vector of accumulators.
struct Float32 {
  using Element = float;
  using Acc = float;
  using Stored = Floats;
  using Vector = Floats;
  using Bits = Words;
  using Shuffle = Integers;
  static constexpr uint32_t kMagnitude = 0x7fffffff;
  static OBC_INLINE void widen(const Floats& stored, Floats& to) { to = stored; }
};

struct Float64 {
  using Element = double;
  using Acc = double;
  using Stored = Doubles;
  using Vector = Doubles;
  using Bits = LongWords;
  using Shuffle = LongIntegers;
  static constexpr uint64_t kMagnitude = 0x7fffffffffffffff;
  static OBC_INLINE void widen(const Doubles& stored, Doubles& to) { to = stored; }
};

struct BFloat16 : Float32 {
  using Element = uint16_t;
  using Stored = Halves;
  static OBC_INLINE void widen(const Halves& stored, Floats& to) {
    to = (Floats)(__builtin_convertvector(stored, Words) << 16);
  }
};

struct Float16 : Float32 {
  using Element = uint16_t;
  using Stored = Halves;
  static OBC_INLINE void widen(const Halves& stored, Floats& to) {
#if OBC_F16C && OBC_VECTOR_BYTES == 64
    to = (Floats)_mm512_maskz_cvtph_ps(0xffff, (__m256i)stored);
#elif OBC_F16C
    to = (Floats)_mm256_cvtph_ps((__m128i)stored);
#else
    const Words bits = __builtin_convertvector(stored, Words);
    const Words sign = (bits & 0x8000) << 16;
    const Words magnitude = bits & 0x7fff;
    // Subnormals are converted through integers, so that a processor that flushes float subnormals reads them right.
    const Floats subnormal = __builtin_convertvector((Integers)magnitude, Floats) * 0x1p-24F;
    const Words rebias = (Words)(magnitude >= 0x7c00) & ((255 - 31 - 112) << 23);
    const Words normal = (magnitude << 13) + (112 << 23) + rebias;
    const Words is_subnormal = (Words)(magnitude < 0x0400);
    to = (Floats)(sign | (is_subnormal & (Words)subnormal) | (~is_subnormal & normal));
#endif
  }
};

// Reads vectors from one row of a matrix.
template <class Type, bool kOffsets>
struct Row {
  using Element = typename Type::Element;
  using Vector = typename Type::Vector;
  static constexpr int64_t kLanes = kVectorBytes / sizeof(typename Type::Acc);

  const Element* data;
  const int64_t* offsets;

  OBC_INLINE Row(const Matrix& matrix, int64_t row)
      : data(static_cast<const Element*>(matrix.data) + row * matrix.row_stride), offsets(matrix.offsets) {}

  OBC_INLINE void load(int64_t column, Vector& to) const {
    typename Type::Stored stored;
    if constexpr (kOffsets) {
      Element gathered[kLanes];
      for (int64_t lane = 0; lane < kLanes; ++lane) gathered[lane] = data[offsets[column + lane]];
      __builtin_memcpy(&stored, gathered, sizeof(stored));
    } else {
      __builtin_memcpy(&stored, data + column, sizeof(stored));
    }
    Type::widen(stored, to);
  }

  // The last `count` columns of the row, padded with zeros.
  OBC_INLINE void load_last(int64_t column, int64_t count, Vector& to) const {
    typename Type::Stored stored;
    if constexpr (kOffsets) {
      Element gathered[kLanes] = {};
      for (int64_t lane = 0; lane < count; ++lane) gathered[lane] = data[offsets[column + lane]];
      __builtin_memcpy(&stored, gathered, sizeof(stored));
    } else {
      load_first(data + column, count, stored);
    }
    Type::widen(stored, to);
  }
};

// The sum of all lanes: the upper half is added to the lower half, again and again.
template <class Acc, int kUnits, class Vector>
OBC_INLINE Acc total(const Vector (&units)[kUnits]) {
  typedef Acc Quarter __attribute__((vector_size(16)));
  constexpr int kQuarters = kUnits * kVectorBytes / 16;
  Quarter quarters[kQuarters];
  __builtin_memcpy(quarters, units, sizeof(quarters));
  for (int half = kQuarters / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) quarters[i] += quarters[i + half];
  }
  Acc lanes[16 / sizeof(Acc)];
  __builtin_memcpy(lanes, quarters, sizeof(lanes));
  if constexpr (sizeof(Acc) == 4) return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
  return lanes[0] + lanes[1];
}

template <class Type, bool kOffsets>
OBC_TARGET void row_dots(
    Matrix a, Matrix g, int64_t rows, int64_t columns, typename Type::Acc* sums, int64_t sums_stride
) {
  using Vector = typename Type::Vector;
  constexpr int kUnits = 128 / kVectorBytes;
  constexpr int64_t kLanes = Row<Type, kOffsets>::kLanes;
  constexpr int64_t kStep = kUnits * kLanes;
  for (int64_t r = 0; r < rows; ++r) {
    const Row<Type, kOffsets> row_a(a, r), row_g(g, r);
    Vector units[kUnits] = {};
    int64_t j = 0;
    for (; j + kStep <= columns; j += kStep) {
      for (int u = 0; u < kUnits; ++u) {
        Vector x, y;
        row_a.load(j + u * kLanes, x);
        row_g.load(j + u * kLanes, y);
        units[u] += x * y;
      }
    }
    for (int u = 0; u < kUnits; ++u, j += kLanes) {
      if (j >= columns) break;
      const int64_t count = columns - j;
      Vector x, y;
      if (count >= kLanes) {
        row_a.load(j, x);
        row_g.load(j, y);
      } else {
        row_a.load_last(j, count, x);
        row_g.load_last(j, count, y);
      }
      units[u] += x * y;
    }
    sums[r * sums_stride] = total<typename Type::Acc>(units);
  }
}

// Adds kRows rows from row r on, in order, to the column sums, which are read and written once for all of them. The
// processor does not predict rows that follow after a gap in memory, so the next `kAhead` rows are prefetched into the
// second-level cache.
template <class Type, bool kOffsets, bool kRowSums, int kRows, int kAhead>
OBC_INLINE void add_rows(
    const Matrix& a,
    const Matrix& g,
    int64_t r,
    int64_t columns,
    typename Type::Acc* row_sums,
    typename Type::Acc* column_sums
) {
  using Acc = typename Type::Acc;
  using Vector = typename Type::Vector;
  using Element = typename Type::Element;
  constexpr int kUnits = 128 / kVectorBytes;
  constexpr int64_t kLanes = Row<Type, kOffsets>::kLanes;
  constexpr int64_t kStep = kUnits * kLanes, kLine = 64 / sizeof(Element);
  const Element* const first_a = static_cast<const Element*>(a.data) + r * a.row_stride;
  const Element* const first_g = static_cast<const Element*>(g.data) + r * g.row_stride;
  Vector units[kRows][kUnits] = {};
  int64_t j = 0;
  for (; j + kStep <= columns; j += kStep) {
    if constexpr (!kOffsets) {
      for (int row = kRows; row < kRows + kAhead; ++row) {
        for (int64_t i = 0; i < kStep; i += kLine) {
          __builtin_prefetch(first_a + row * a.row_stride + j + i, 0, 2);
          __builtin_prefetch(first_g + row * g.row_stride + j + i, 0, 2);
        }
      }
    }
    for (int u = 0; u < kUnits; ++u) {
      Vector sum;
      __builtin_memcpy(&sum, column_sums + j + u * kLanes, sizeof(sum));
      for (int row = 0; row < kRows; ++row) {
        Vector x, y;
        Row<Type, kOffsets>({first_a, a.row_stride, a.offsets}, row).load(j + u * kLanes, x);
        Row<Type, kOffsets>({first_g, g.row_stride, g.offsets}, row).load(j + u * kLanes, y);
        const Vector product = x * y;
        if constexpr (kRowSums) units[row][u] += product;
        sum += product;
      }
      __builtin_memcpy(column_sums + j + u * kLanes, &sum, sizeof(sum));
    }
  }
  for (int u = 0; u < kUnits; ++u, j += kLanes) {
    if (j >= columns) break;
    const int64_t count = columns - j;
    Vector sum;
    if (count >= kLanes) {
      __builtin_memcpy(&sum, column_sums + j, sizeof(sum));
    } else {
      load_first(column_sums + j, count, sum);
    }
    for (int row = 0; row < kRows; ++row) {
      const Row<Type, kOffsets> row_a({first_a, a.row_stride, a.offsets}, row);
      const Row<Type, kOffsets> row_g({first_g, g.row_stride, g.offsets}, row);
      Vector x, y;
      if (count >= kLanes) {
        row_a.load(j, x);
        row_g.load(j, y);
      } else {
        row_a.load_last(j, count, x);
        row_g.load_last(j, count, y);
      }
      const Vector product = x * y;
      if constexpr (kRowSums) units[row][u] += product;
      sum += product;
    }
    if (count >= kLanes) {
      __builtin_memcpy(column_sums + j, &sum, sizeof(sum));
    } else {
      store_first(column_sums + j, count, sum);
    }
  }
  if constexpr (kRowSums) {
    for (int row = 0; row < kRows; ++row) row_sums[r + row] += total<Acc>(units[row]);
  }
}

template <class Type, bool kOffsets, bool kRowSums>
OBC_INLINE void add_all_rows(
    const Matrix& a,
    const Matrix& g,
    int64_t rows,
    int64_t columns,
    bool far,
    typename Type::Acc* row_sums,
    typename Type::Acc* column_sums
) {
  int64_t r = 0;
  if (far) {
    for (; r + 8 <= rows; r += 4) add_rows<Type, kOffsets, kRowSums, 4, 4>(a, g, r, columns, row_sums, column_sums);
  }
  for (; r + 4 <= rows; r += 4) add_rows<Type, kOffsets, kRowSums, 4, 0>(a, g, r, columns, row_sums, column_sums);
  for (; r + 2 <= rows; r += 2) add_rows<Type, kOffsets, kRowSums, 2, 0>(a, g, r, columns, row_sums, column_sums);
  if (r < rows) add_rows<Type, kOffsets, kRowSums, 1, 0>(a, g, r, columns, row_sums, column_sums);
}

template <class Type, bool kOffsets>
OBC_TARGET void column_sums(Matrix a, Matrix g, int64_t rows, int64_t columns, bool far, typename Type::Acc* sums) {
  add_all_rows<Type, kOffsets, false>(a, g, rows, columns, far, nullptr, sums);
}

template <class Type, bool kOffsets>
OBC_TARGET void row_column_sums(
    Matrix a,
    Matrix g,
    int64_t rows,
    int64_t columns,
    bool far,
    typename Type::Acc* row_sums,
    typename Type::Acc* column_sums
) {
  add_all_rows<Type, kOffsets, true>(a, g, rows, columns, far, row_sums, column_sums);
}

template <class Type>
OBC_INLINE void add_moments(
    const typename Type::Vector& w,
    const typename Type::Vector& g,
    int u,
    typename Type::Vector (*units)[64 / kVectorBytes]
) {
  using Vector = typename Type::Vector;
  using Bits = typename Type::Bits;
  const Vector product = w * g;
  units[0][u] += product;
  units[1][u] += product * product;
  units[2][u] += (Vector)((Bits)product & Type::kMagnitude);
  units[3][u] += w * w;
  units[4][u] += (Vector)((Bits)w & Type::kMagnitude);
}

template <class Type, bool kOffsets>
OBC_TARGET void row_moments(
    Matrix w, Matrix g, int64_t rows, int64_t columns, typename Type::Acc* sums, int64_t sums_stride
) {
  using Vector = typename Type::Vector;
  constexpr int kUnits = 64 / kVectorBytes;
  constexpr int64_t kLanes = Row<Type, kOffsets>::kLanes;
  constexpr int64_t kStep = kUnits * kLanes;
  for (int64_t r = 0; r < rows; ++r) {
    const Row<Type, kOffsets> row_w(w, r), row_g(g, r);
    Vector units[5][kUnits] = {};
    int64_t j = 0;
    for (; j + kStep <= columns; j += kStep) {
      for (int u = 0; u < kUnits; ++u) {
        Vector x, y;
        row_w.load(j + u * kLanes, x);
        row_g.load(j + u * kLanes, y);
        add_moments<Type>(x, y, u, units);
      }
    }
    for (int u = 0; u < kUnits; ++u, j += kLanes) {
      if (j >= columns) break;
      const int64_t count = columns - j;
      Vector x, y;
      if (count >= kLanes) {
        row_w.load(j, x);
        row_g.load(j, y);
      } else {
        row_w.load_last(j, count, x);
        row_g.load_last(j, count, y);
      }
      add_moments<Type>(x, y, u, units);
    }
    for (int m = 0; m < 5; ++m) sums[m * sums_stride + r] = total<typename Type::Acc>(units[m]);
  }
}

}  // namespace obc::cpu::OBC_ISA

#include "moment_leaves_isa.h"

namespace obc::cpu::OBC_ISA {

// A leaf checks once, not per element, whether the columns are contiguous.
template <class Type>
struct Table {
  using Acc = typename Type::Acc;

  static void dots(Matrix a, Matrix g, int64_t rows, int64_t columns, Acc* sums, int64_t stride) {
    (a.offsets ? row_dots<Type, true> : row_dots<Type, false>)(a, g, rows, columns, sums, stride);
  }
  static void by_column(Matrix a, Matrix g, int64_t rows, int64_t columns, bool far, Acc* sums) {
    (a.offsets ? column_sums<Type, true> : column_sums<Type, false>)(a, g, rows, columns, far, sums);
  }
  static void by_both(Matrix a, Matrix g, int64_t rows, int64_t columns, bool far, Acc* row_sums, Acc* column_sums) {
    (a.offsets ? row_column_sums<Type, true>
               : row_column_sums<Type, false>)(a, g, rows, columns, far, row_sums, column_sums);
  }
  static void moments(Matrix w, Matrix g, int64_t rows, int64_t columns, Acc* sums, int64_t stride) {
    (w.offsets ? row_moments<Type, true> : row_moments<Type, false>)(w, g, rows, columns, sums, stride);
  }

  using Mask = const typename Leaves<Acc>::Bits*;
  static void sums(Matrix x, Mask mask, int64_t rows, int64_t columns, Acc* sum, Acc* square, Acc* absolute) {
    const auto leaf = mask ? (x.offsets ? row_sums<Type, true, true> : row_sums<Type, false, true>)
                           : (x.offsets ? row_sums<Type, true, false> : row_sums<Type, false, false>);
    leaf(x, mask, rows, columns, sum, square, absolute);
  }
  static void moments_by_column(
      Matrix x, const int64_t* starts, int64_t rows, int64_t columns, Acc* sum, Acc* square, Acc* absolute
  ) {
    (x.offsets ? column_moments<Type, true>
               : column_moments<Type, false>)(x, starts, rows, columns, sum, square, absolute);
  }

  static constexpr Leaves<Acc> kLeaves = {dots, by_column, by_both, moments, sums, moments_by_column};
};

inline const Leaves<float>& single(Dtype dtype) {
  switch (dtype) {
    case Dtype::bfloat16:
      return Table<BFloat16>::kLeaves;
    case Dtype::float16:
      return Table<Float16>::kLeaves;
    default:
      return Table<Float32>::kLeaves;
  }
}

inline const Leaves<double>& twofold() { return Table<Float64>::kLeaves; }

#undef OBC_INLINE

}  // namespace obc::cpu::OBC_ISA

#undef OBC_ISA
#undef OBC_VECTOR_BYTES
#undef OBC_F16C
#undef OBC_FMA
#undef OBC_MASKS
#undef OBC_TARGET
