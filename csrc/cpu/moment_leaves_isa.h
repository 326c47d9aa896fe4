// The leaf kernels of channel_moments for one instruction set: a part of leaves_isa.h, which includes this file, by the
// same rules.

namespace obc::cpu::OBC_ISA {

template <class Type>
OBC_INLINE void magnitude(const typename Type::Vector& value, typename Type::Vector& to) {
  to = (typename Type::Vector)((typename Type::Bits)value & Type::kMagnitude);
}

// Sets to zero what the mask leaves out, NaN included.
template <class Type, bool kMasked>
OBC_INLINE void apply_mask(const void* mask, int64_t count, typename Type::Vector& value) {
  if constexpr (kMasked) {
    typename Type::Vector words = {};
    __builtin_memcpy(&words, mask, count * sizeof(typename Type::Acc));
    value = (typename Type::Vector)((typename Type::Bits)value & (typename Type::Bits)words);
  }
}

// sum += value with the same rounding, computed as value * 1 + sum in the units that multiply.
OBC_INLINE void add_by_multiplying(const Floats& value, Floats& sum) {
#if OBC_FMA && OBC_VECTOR_BYTES == 64
  sum = (Floats)_mm512_fmadd_ps((__m512)value, _mm512_set1_ps(1.0F), (__m512)sum);
#elif OBC_FMA
  sum = (Floats)_mm256_fmadd_ps((__m256)value, _mm256_set1_ps(1.0F), (__m256)sum);
#else
  sum += value;
#endif
}
OBC_INLINE void add_by_multiplying(const Doubles& value, Doubles& sum) {
#if OBC_FMA && OBC_VECTOR_BYTES == 64
  sum = (Doubles)_mm512_fmadd_pd((__m512d)value, _mm512_set1_pd(1.0), (__m512d)sum);
#elif OBC_FMA
  sum = (Doubles)_mm256_fmadd_pd((__m256d)value, _mm256_set1_pd(1.0), (__m256d)sum);
#else
  sum += value;
#endif
}

// Adds a vector, its squares and its magnitudes to three sums. Processors multiply and add in different units. If the
// sum of x runs in those that multiply, each kind of unit has two operations, instead of one and three.
template <class Type>
OBC_INLINE void add_powers(
    const typename Type::Vector& value,
    typename Type::Vector& sum,
    typename Type::Vector& square,
    typename Type::Vector& absolute
) {
  typename Type::Vector size;
  magnitude<Type>(value, size);
  add_by_multiplying(value, sum);
  square += value * value;
  absolute += size;
}

// Cuts each vector into blocks of 2 * kHalf lanes and adds the second half of a block to the first. The result takes
// the sums of a block of a and of the same block of b in turn.
template <int kHalf, class Vector, class Integers, int... kLane>
OBC_INLINE void fold_lanes(const Vector& a, const Vector& b, Vector& to, std::integer_sequence<int, kLane...>) {
  constexpr int kLanes = sizeof...(kLane);
  constexpr auto first = [](int lane) {
    return lane / (2 * kHalf) * 2 * kHalf + lane % kHalf + lane / kHalf % 2 * kLanes;
  };
#if defined(__clang__) || __GNUC__ >= 12
  to = __builtin_shufflevector(a, b, first(kLane)...) + __builtin_shufflevector(a, b, (first(kLane) + kHalf)...);
#else  // Clang has no __builtin_shuffle, older versions of GCC have no __builtin_shufflevector
  constexpr Integers kFirst = {first(kLane)...};
  to = __builtin_shuffle(a, b, kFirst) + __builtin_shuffle(a, b, kFirst + kHalf);
#endif
}

// Sums up as many vectors as they have lanes, all at once; lane i of the first one is then the sum of vector i. The
// order of additions is that of total().
template <class Type, int kHalf>
OBC_INLINE void total_each(typename Type::Vector* vectors) {
  constexpr int kLanes = kVectorBytes / sizeof(typename Type::Acc);
  for (int i = 0; i < kHalf; ++i) {
    fold_lanes<kHalf, typename Type::Vector, typename Type::Shuffle>(
        vectors[i],
        vectors[i + kHalf],
        vectors[i],
        std::make_integer_sequence<int, kLanes>()
    );
  }
  if constexpr (kHalf > 1) total_each<Type, kHalf / 2>(vectors);
}

// The powers of one row, summed into one vector each.
template <class Type, bool kOffsets, bool kMasked>
OBC_INLINE void sum_row(
    const Row<Type, kOffsets>& row,
    const typename Leaves<typename Type::Acc>::Bits* mask,
    int64_t columns,
    typename Type::Vector& sum,
    typename Type::Vector& square,
    typename Type::Vector& absolute
) {
  using Vector = typename Type::Vector;
  constexpr int kUnits = 128 / kVectorBytes;
  constexpr int64_t kLanes = Row<Type, kOffsets>::kLanes;
  constexpr int64_t kStep = kUnits * kLanes;
  Vector units[3][kUnits] = {};
  int64_t j = 0;
  for (; j + kStep <= columns; j += kStep) {
    for (int u = 0; u < kUnits; ++u) {
      Vector value;
      row.load(j + u * kLanes, value);
      apply_mask<Type, kMasked>(mask + j + u * kLanes, kLanes, value);
      add_powers<Type>(value, units[0][u], units[1][u], units[2][u]);
    }
  }
  for (int u = 0; u < kUnits; ++u, j += kLanes) {
    if (j >= columns) break;
    const int64_t count = columns - j < kLanes ? columns - j : kLanes;
    Vector value;
    if (count == kLanes) {
      row.load(j, value);
    } else {
      row.load_last(j, count, value);
    }
    apply_mask<Type, kMasked>(mask + j, count, value);
    add_powers<Type>(value, units[0][u], units[1][u], units[2][u]);
  }
  for (int half = kUnits / 2; half > 0; half /= 2) {
    for (int m = 0; m < 3; ++m) {
      for (int u = 0; u < half; ++u) units[m][u] += units[m][u + half];
    }
  }
  sum = units[0][0];
  square = units[1][0];
  absolute = units[2][0];
}

template <class Type, bool kOffsets, bool kMasked>
OBC_TARGET void row_sums(
    Matrix x,
    const typename Leaves<typename Type::Acc>::Bits* mask,
    int64_t rows,
    int64_t columns,
    typename Type::Acc* sum,
    typename Type::Acc* square,
    typename Type::Acc* absolute
) {
  using Vector = typename Type::Vector;
  constexpr int64_t kLanes = Row<Type, kOffsets>::kLanes;
  typename Type::Acc* const sums[3] = {sum, square, absolute};
  for (int64_t r = 0; r < rows; r += kLanes) {
    const int64_t count = rows - r < kLanes ? rows - r : kLanes;
    Vector moments[3][kLanes];
    for (int64_t i = count; i < kLanes; ++i) moments[0][i] = moments[1][i] = moments[2][i] = Vector{};
    for (int64_t i = 0; i < count; ++i) {
      sum_row<Type, kOffsets, kMasked>(
          Row<Type, kOffsets>(x, r + i),
          mask,
          columns,
          moments[0][i],
          moments[1][i],
          moments[2][i]
      );
    }
    for (int m = 0; m < 3; ++m) {
      total_each<Type, kLanes / 2>(moments[m]);
      Vector before;
      if (count == kLanes) {
        __builtin_memcpy(&before, sums[m] + r, sizeof(before));
        before += moments[m][0];
        __builtin_memcpy(sums[m] + r, &before, sizeof(before));
      } else {
        load_first(sums[m] + r, count, before);
        before += moments[m][0];
        store_first(sums[m] + r, count, before);
      }
    }
  }
}

// Sums kRows rows in registers, then adds the sums to memory: with four rows a quarter of the additions there. The
// processor does not predict rows that follow after a gap in memory, so the next `kAhead` rows are prefetched into the
// first-level cache, which holds them where the tile is narrow; from the second level they come a quarter slower.
template <class Type, bool kOffsets, int kRows, int kAhead>
OBC_INLINE void add_column_moments(
    const Matrix& x, const int64_t* starts, int64_t columns, typename Type::Acc* const (&sums)[3]
) {
  using Vector = typename Type::Vector;
  using Element = typename Type::Element;
  constexpr int64_t kLanes = Row<Type, kOffsets>::kLanes;
  const Element* data[kRows];
  const Element* ahead[kAhead + 1];
  for (int r = 0; r < kRows; ++r) data[r] = static_cast<const Element*>(x.data) + starts[r];
  for (int r = 0; r < kAhead; ++r) ahead[r] = static_cast<const Element*>(x.data) + starts[kRows + r];
  for (int64_t j = 0; j < columns; j += kLanes) {
    const int64_t count = columns - j;
    Vector moments[3];
    if constexpr (!kOffsets) {
      for (int r = 0; r < kAhead; ++r) __builtin_prefetch(ahead[r] + j, 0, 3);
    }
    for (int r = 0; r < kRows; ++r) {
      const Row<Type, kOffsets> row({data[r], 0, x.offsets}, 0);
      Vector value;
      if (count >= kLanes) {
        row.load(j, value);
      } else {
        row.load_last(j, count, value);
      }
      if (r > 0) {
        add_powers<Type>(value, moments[0], moments[1], moments[2]);
      } else {
        moments[0] = value;
        moments[1] = value * value;
        magnitude<Type>(value, moments[2]);
      }
    }
    for (int m = 0; m < 3; ++m) {
      Vector sum;
      if (count >= kLanes) {
        __builtin_memcpy(&sum, sums[m] + j, sizeof(sum));
        sum += moments[m];
        __builtin_memcpy(sums[m] + j, &sum, sizeof(sum));
      } else {
        load_first(sums[m] + j, count, sum);
        sum += moments[m];
        store_first(sums[m] + j, count, sum);
      }
    }
  }
}

template <class Type, bool kOffsets>
OBC_TARGET void column_moments(
    Matrix x,
    const int64_t* starts,
    int64_t rows,
    int64_t columns,
    typename Type::Acc* sum,
    typename Type::Acc* square,
    typename Type::Acc* absolute
) {
  typename Type::Acc* const sums[3] = {sum, square, absolute};
  int64_t r = 0;
  for (; r + 12 <= rows; r += 4) add_column_moments<Type, kOffsets, 4, 8>(x, starts + r, columns, sums);
  for (; r + 4 <= rows; r += 4) add_column_moments<Type, kOffsets, 4, 0>(x, starts + r, columns, sums);
  for (; r < rows; ++r) add_column_moments<Type, kOffsets, 1, 0>(x, starts + r, columns, sums);
}

}  // namespace obc::cpu::OBC_ISA
