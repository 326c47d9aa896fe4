// The leaf kernels for one instruction set. leaves.cpp includes this file once for each, with
//   OBC_ISA           the namespace,
//   OBC_VECTOR_BYTES  the width of its registers,
//   OBC_F16C          1 where it converts float16 by one instruction,
//   OBC_TARGET        the function attribute that switches it on.
// No include guard, and every function carries the attribute: nothing here can leak into code for older machines.

namespace obc::cpu::OBC_ISA {

#define OBC_INLINE OBC_TARGET inline __attribute__((always_inline))

constexpr int kVectorBytes = OBC_VECTOR_BYTES;
typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef double Doubles __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint64_t LongWords __attribute__((vector_size(kVectorBytes)));
typedef int32_t Integers __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));

// How elements of each dtype become a vector of accumulators.
struct Float32 {
  using Element = float;
  using Acc = float;
  using Vector = Floats;
  using Bits = Words;
  static constexpr uint32_t kMagnitude = 0x7fffffff;
  static OBC_INLINE void load(const float* from, Floats& to) { __builtin_memcpy(&to, from, sizeof(to)); }
};

struct Float64 {
  using Element = double;
  using Acc = double;
  using Vector = Doubles;
  using Bits = LongWords;
  static constexpr uint64_t kMagnitude = 0x7fffffffffffffff;
  static OBC_INLINE void load(const double* from, Doubles& to) { __builtin_memcpy(&to, from, sizeof(to)); }
};

struct BFloat16 : Float32 {
  using Element = uint16_t;
  static OBC_INLINE void load(const uint16_t* from, Floats& to) {
    Halves halves;
    __builtin_memcpy(&halves, from, sizeof(halves));
    to = (Floats)(__builtin_convertvector(halves, Words) << 16);
  }
};

struct Float16 : Float32 {
  using Element = uint16_t;
  static OBC_INLINE void load(const uint16_t* from, Floats& to) {
#if OBC_F16C && OBC_VECTOR_BYTES == 64
    to = (Floats)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif OBC_F16C
    to = (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
    Halves halves;
    __builtin_memcpy(&halves, from, sizeof(halves));
    const Words bits = __builtin_convertvector(halves, Words);
    const Words sign = (bits & 0x8000) << 16;
    const Words magnitude = bits & 0x7fff;
    // Subnormals by way of integers, so that a processor that flushes float subnormals reads them right too.
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
    if constexpr (kOffsets) {
      Element gathered[kLanes];
      for (int64_t lane = 0; lane < kLanes; ++lane) gathered[lane] = data[offsets[column + lane]];
      Type::load(gathered, to);
    } else {
      Type::load(data + column, to);
    }
  }

  // The last `count` columns, padded with zeros to a buffer of `width`.
  OBC_INLINE void load_rest(int64_t column, int64_t count, Element* buffer, int64_t width) const {
    for (int64_t i = 0; i < width; ++i) buffer[i] = Element{};
    for (int64_t i = 0; i < count; ++i) buffer[i] = kOffsets ? data[offsets[column + i]] : data[column + i];
  }
};

// The sum of all lanes, halves onto halves.
template <class Acc, int kUnits, class Vector>
OBC_INLINE Acc total(const Vector (&units)[kUnits]) {
  constexpr int kLanes = kUnits * kVectorBytes / sizeof(Acc);
  Acc lanes[kLanes];
  __builtin_memcpy(lanes, units, sizeof(lanes));
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

template <class Type, bool kOffsets>
OBC_TARGET void row_dots(
    Matrix a, Matrix g, int64_t rows, int64_t columns, typename Type::Acc* sums, int64_t sums_stride
) {
  using Vector = typename Type::Vector;
  using Element = typename Type::Element;
  constexpr int kUnits = 128 / kVectorBytes;
  constexpr int64_t kLanes = kVectorBytes / sizeof(typename Type::Acc);
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
    if (j < columns) {
      Element rest_a[kStep], rest_g[kStep];
      row_a.load_rest(j, columns - j, rest_a, kStep);
      row_g.load_rest(j, columns - j, rest_g, kStep);
      for (int u = 0; u < kUnits; ++u) {
        Vector x, y;
        Type::load(rest_a + u * kLanes, x);
        Type::load(rest_g + u * kLanes, y);
        units[u] += x * y;
      }
    }
    sums[r * sums_stride] = total<typename Type::Acc>(units);
  }
}

// Adds kRows rows (a power of two) to the column sums, pairs first, and to their row sums if kRowSums.
template <class Type, bool kOffsets, bool kRowSums, int kRows>
OBC_INLINE void add_rows(
    const Matrix& a,
    const Matrix& g,
    int64_t first_row,
    int64_t columns,
    typename Type::Acc* row_sums,
    typename Type::Acc* column_sums
) {
  using Acc = typename Type::Acc;
  using Vector = typename Type::Vector;
  using Element = typename Type::Element;
  constexpr int kUnits = 64 / kVectorBytes;
  constexpr int64_t kLanes = kVectorBytes / sizeof(Acc);
  constexpr int64_t kStep = kUnits * kLanes;

  Vector units[kRows][kUnits] = {};
  int64_t j = 0;
  for (; j + kStep <= columns; j += kStep) {
    for (int u = 0; u < kUnits; ++u) {
      const int64_t column = j + u * kLanes;
      Vector products[kRows];
      for (int r = 0; r < kRows; ++r) {
        Vector x, y;
        Row<Type, kOffsets>(a, first_row + r).load(column, x);
        Row<Type, kOffsets>(g, first_row + r).load(column, y);
        products[r] = x * y;
        if constexpr (kRowSums) units[r][u] += products[r];
      }
      for (int half = kRows / 2; half > 0; half /= 2) {
        for (int r = 0; r < half; ++r) products[r] += products[r + half];
      }
      Vector sum;
      __builtin_memcpy(&sum, column_sums + column, sizeof(sum));
      sum += products[0];
      __builtin_memcpy(column_sums + column, &sum, sizeof(sum));
    }
  }
  if (const int64_t rest = columns - j; rest > 0) {
    Acc sums[kStep] = {};
    for (int r = 0; r < kRows; ++r) {
      Element rest_a[kStep], rest_g[kStep];
      Row<Type, kOffsets>(a, first_row + r).load_rest(j, rest, rest_a, kStep);
      Row<Type, kOffsets>(g, first_row + r).load_rest(j, rest, rest_g, kStep);
      for (int u = 0; u < kUnits; ++u) {
        Vector x, y, sum;
        Type::load(rest_a + u * kLanes, x);
        Type::load(rest_g + u * kLanes, y);
        const Vector product = x * y;
        if constexpr (kRowSums) units[r][u] += product;
        __builtin_memcpy(&sum, sums + u * kLanes, sizeof(sum));
        sum += product;
        __builtin_memcpy(sums + u * kLanes, &sum, sizeof(sum));
      }
    }
    for (int64_t i = 0; i < rest; ++i) column_sums[j + i] += sums[i];
  }
  if constexpr (kRowSums) {
    for (int r = 0; r < kRows; ++r) row_sums[first_row + r] += total<Acc>(units[r]);
  }
}

template <class Type, bool kOffsets>
OBC_TARGET void column_sums(Matrix a, Matrix g, int64_t rows, int64_t columns, typename Type::Acc* sums) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) add_rows<Type, kOffsets, false, 4>(a, g, r, columns, nullptr, sums);
  for (; r < rows; ++r) add_rows<Type, kOffsets, false, 1>(a, g, r, columns, nullptr, sums);
}

template <class Type, bool kOffsets>
OBC_TARGET void row_column_sums(
    Matrix a, Matrix g, int64_t rows, int64_t columns, typename Type::Acc* row_sums, typename Type::Acc* column_sums
) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) add_rows<Type, kOffsets, true, 4>(a, g, r, columns, row_sums, column_sums);
  for (; r < rows; ++r) add_rows<Type, kOffsets, true, 1>(a, g, r, columns, row_sums, column_sums);
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
  using Element = typename Type::Element;
  constexpr int kUnits = 64 / kVectorBytes;
  constexpr int64_t kLanes = kVectorBytes / sizeof(typename Type::Acc);
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
    if (j < columns) {
      Element rest_w[kStep], rest_g[kStep];
      row_w.load_rest(j, columns - j, rest_w, kStep);
      row_g.load_rest(j, columns - j, rest_g, kStep);
      for (int u = 0; u < kUnits; ++u) {
        Vector x, y;
        Type::load(rest_w + u * kLanes, x);
        Type::load(rest_g + u * kLanes, y);
        add_moments<Type>(x, y, u, units);
      }
    }
    for (int m = 0; m < 5; ++m) sums[m * sums_stride + r] = total<typename Type::Acc>(units[m]);
  }
}

// A leaf looks once, not per element, at whether the columns are contiguous.
template <class Type>
struct Table {
  using Acc = typename Type::Acc;

  static void dots(Matrix a, Matrix g, int64_t rows, int64_t columns, Acc* sums, int64_t stride) {
    (a.offsets ? row_dots<Type, true> : row_dots<Type, false>)(a, g, rows, columns, sums, stride);
  }
  static void by_column(Matrix a, Matrix g, int64_t rows, int64_t columns, Acc* sums) {
    (a.offsets ? column_sums<Type, true> : column_sums<Type, false>)(a, g, rows, columns, sums);
  }
  static void by_both(Matrix a, Matrix g, int64_t rows, int64_t columns, Acc* row_sums, Acc* column_sums) {
    (a.offsets ? row_column_sums<Type, true>
               : row_column_sums<Type, false>)(a, g, rows, columns, row_sums, column_sums);
  }
  static void moments(Matrix w, Matrix g, int64_t rows, int64_t columns, Acc* sums, int64_t stride) {
    (w.offsets ? row_moments<Type, true> : row_moments<Type, false>)(w, g, rows, columns, sums, stride);
  }

  static constexpr Leaves<Acc> kLeaves = {dots, by_column, by_both, moments};
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
#undef OBC_TARGET
