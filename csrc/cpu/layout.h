// Turns a pair of strided arrays into the (rows, columns) views that the leaves read.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "kernels.h"
#include "leaves.h"

namespace obc::cpu {

// A pass over fewer elements than this is not worth waking another thread for.
constexpr int64_t kGrain = 32768;

// Inputs of more bytes than this come from the third-level cache or from memory and are prefetched. Prefetching what is
// in a nearer cache would add a fifth to the time of reading it.
constexpr int64_t kNear = int64_t{1} << 22;

// One dimension of the pair. `out` is its stride in an array of sums, filled in by the operator.
struct Dim {
  int64_t size;
  int64_t first;
  int64_t second;
  int role;
  int64_t out = 0;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How many tasks of `size` elements a thread should have at least.
inline int64_t grain_of(int64_t size) { return ceil_div(kGrain, std::max<int64_t>(size, 1)); }

// Whether `inner` continues `outer` in memory, in both arrays.
inline bool continues(const Dim& outer, const Dim& inner) {
  return outer.first == inner.size * inner.first && outer.second == inner.size * inner.second;
}

// Drops dimensions of size 1, sorts the others by their order in memory (outermost first), and joins neighbours that
// have the same role and are contiguous. So no sum depends on the order in which the caller listed the dimensions.
inline std::vector<Dim> canonical(std::vector<Dim> dims) {
  dims.erase(std::remove_if(dims.begin(), dims.end(), [](const Dim& dim) { return dim.size == 1; }), dims.end());
  const auto reach = [](const Dim& dim) { return std::abs(dim.first) + std::abs(dim.second); };
  std::stable_sort(dims.begin(), dims.end(), [&](const Dim& a, const Dim& b) { return reach(a) > reach(b); });
  std::vector<Dim> joined;
  for (const Dim& dim : dims) {
    if (!joined.empty() && joined.back().role == dim.role && continues(joined.back(), dim)) {
      const int64_t size = joined.back().size * dim.size;
      joined.back() = dim;
      joined.back().size = size;
    } else {
      joined.push_back(dim);
    }
  }
  return joined;
}

inline int64_t count(const std::vector<Dim>& dims) {
  int64_t product = 1;
  for (const Dim& dim : dims) product *= dim.size;
  return product;
}

inline bool is_far(const Pair& pair) {
  int64_t bytes = 2 * item_size(pair.dtype);
  for (int64_t d = 0; d < pair.dims; ++d) bytes *= pair.sizes[d];
  return bytes > kNear;
}

struct Offsets {
  int64_t first = 0;
  int64_t second = 0;
  int64_t out = 0;

  void add(const Dim& dim, int64_t index) {
    first += dim.first * index;
    second += dim.second * index;
    out += dim.out * index;
  }
};

// Splits positions [begin, end) of `dims`, counted in order, into runs along the last dimension and calls
// f(offsets of the run's start, its length). Without dimensions there is one position.
template <class F>
void for_each_run(const std::vector<Dim>& dims, int64_t begin, int64_t end, const F& f) {
  while (begin < end) {
    Offsets offsets;
    int64_t rest = begin;
    int64_t length = end - begin;
    for (size_t d = dims.size(); d-- > 0;) {
      const int64_t index = rest % dims[d].size;
      if (d + 1 == dims.size()) length = std::min(length, dims[d].size - index);
      offsets.add(dims[d], index);
      rest /= dims[d].size;
    }
    f(offsets, length);
    begin += length;
  }
}

// The columns of a matrix: the innermost dimensions, either contiguous or addressed by a table of offsets.
class Columns {
 public:
  explicit Columns(const std::vector<Dim>& dims) : count_(cpu::count(dims)) {
    bool contiguous = dims.empty() || (dims.back().first == 1 && dims.back().second == 1);
    for (size_t d = 1; d < dims.size(); ++d) contiguous = contiguous && continues(dims[d - 1], dims[d]);
    if (contiguous) return;
    first_.reserve(count_);
    second_.reserve(count_);
    for_each_run(dims, 0, count_, [&](const Offsets& start, int64_t length) {
      for (int64_t i = 0; i < length; ++i) {
        first_.push_back(start.first + i * dims.back().first);
        second_.push_back(start.second + i * dims.back().second);
      }
    });
  }

  int64_t count() const { return count_; }
  bool contiguous() const { return first_.empty(); }

  // The two matrices that begin `offsets` into the arrays, at column `column`.
  Matrix first(const Pair& pair, const Offsets& offsets, int64_t row_stride, int64_t column) const {
    return view(pair.first, item_size(pair.dtype), offsets.first, row_stride, first_, column);
  }
  Matrix second(const Pair& pair, const Offsets& offsets, int64_t row_stride, int64_t column) const {
    return view(pair.second, item_size(pair.dtype), offsets.second, row_stride, second_, column);
  }

 private:
  static Matrix view(
      const void* data,
      int64_t item,
      int64_t offset,
      int64_t row_stride,
      const std::vector<int64_t>& offsets,
      int64_t column
  ) {
    const int64_t start = offsets.empty() ? offset + column : offset;
    const int64_t* table = offsets.empty() ? nullptr : offsets.data() + column;
    return {static_cast<const char*>(data) + start * item, row_stride, table};
  }

  int64_t count_;
  std::vector<int64_t> first_;
  std::vector<int64_t> second_;
};

// The number of chunks to split `rows` into, given `others` independent tasks. The aim is about 64 tasks in all: enough
// for any machine's threads, and few enough that partial sums stay small. A chunk has at least 32 rows, so that writing
// and rereading its column sums costs under 1/16 of reading its rows, and at most 512, which bounds rounding errors.
inline int64_t row_chunks(int64_t rows, int64_t others) {
  const int64_t wanted = std::min(ceil_div(64, std::max<int64_t>(others, 1)), ceil_div(rows, 32));
  return std::max({int64_t{1}, wanted, ceil_div(rows, 512)});
}

// Bytes of the widest vectors and of a cache line. Sums that a leaf writes begin at a multiple of it; otherwise every
// store would touch two lines.
constexpr int64_t kAlignment = 64;

struct FreeAligned {
  void operator()(void* data) const { ::operator delete(data, std::align_val_t(kAlignment)); }
};
template <class Acc>
using Scratch = std::unique_ptr<Acc[], FreeAligned>;

// Uninitialised memory for partial sums, aligned.
template <class Acc>
Scratch<Acc> scratch(int64_t size) {
  return Scratch<Acc>(static_cast<Acc*>(::operator new(size * sizeof(Acc), std::align_val_t(kAlignment))));
}

// `size` sums, rounded up to whole cache lines: where the next sums begin.
template <class Acc>
int64_t aligned(int64_t size) {
  constexpr int64_t kLine = kAlignment / sizeof(Acc);
  return ceil_div(size, kLine) * kLine;
}

// Zeros `count` sums of inputs of `dtype`. The memory of an empty array may be null, which memset must not see.
inline void clear_sums(void* sums, int64_t count, Dtype dtype) {
  if (count > 0) std::memset(sums, 0, count * (dtype == Dtype::float64 ? sizeof(double) : sizeof(float)));
}

// A reduction that is ready to run: independent tasks of about `task_size` elements each, then the last step for
// `results` sums, which reads about `result_size` partial sums for each. Both may run in parallel.
class Plan {
 public:
  virtual ~Plan() = default;
  virtual void run(int64_t task) const = 0;
  // For the results [begin, end).
  virtual void finish(int64_t begin, int64_t end) const = 0;

  int64_t tasks = 0, task_size = 1;
  int64_t results = 0, result_size = 1;

  void run_all(const ParallelFor& parallel) const {
    parallel(tasks, grain_of(task_size), [this](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) run(task);
    });
    parallel(results, grain_of(result_size), [this](int64_t begin, int64_t end) { finish(begin, end); });
  }
};

}  // namespace obc::cpu
