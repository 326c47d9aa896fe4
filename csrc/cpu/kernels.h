// The CPU kernels of obc. They take raw pointers, sizes, strides and a parallel-for, and know nothing of torch or
// Python.
//
// Strides count elements and may be zero or negative. Inputs are read in their own type and summed in float (double
// for float64). Results depend on shapes, strides and values alone: not on the number of threads, nor on the
// instruction set. Arguments arrive checked; nothing here throws except std::bad_alloc before any work has begun.
#pragma once

#include <cstdint>
#include <vector>

namespace obc::cpu {

enum class Dtype { float32, float64, bfloat16, float16 };

int64_t item_size(Dtype dtype);

// Runs body(begin, end, context) over disjoint ranges that cover [0, tasks). Every range but the last has at least
// `grain` tasks; one range may cover everything.
struct ParallelFor {
  using Body = void (*)(int64_t begin, int64_t end, const void* context);
  void (*run)(int64_t tasks, int64_t grain, Body body, const void* context);

  template <class F>
  void operator()(int64_t tasks, int64_t grain, const F& f) const {
    if (tasks <= grain) {
      f(0, tasks);
      return;
    }
    const Body body = [](int64_t begin, int64_t end, const void* context) {
      (*static_cast<const F*>(context))(begin, end);
    };
    run(tasks, grain, body, &f);
  }
};

// Two arrays of the same shape and type, such as a tensor and its gradient; each has its own strides.
struct Pair {
  Dtype dtype;
  int64_t dims;
  const int64_t* sizes;
  const void* first;
  const int64_t* first_strides;
  const void* second;
  const int64_t* second_strides;
};

// out[c], or out[n, c] with per_sample (n along dim 0): the sum of first * second over everything else.
// `out` is contiguous, float (double for float64).
void channel_dot(const Pair& pair, int64_t channel_dim, bool per_sample, void* out, const ParallelFor& parallel);

// One layer of weight_dot: `weight` is (rows, columns, *kernel). row_dot[r] is the sum over row r, column_dot[g, c]
// over column c within the rows of group g. Where `bias` is given, its products are added to the out channels'
// sums: row_dot, or column_dot if `transposed`.
struct WeightDot {
  Pair weight;
  const Pair* bias;
  int64_t groups;
  bool transposed;
  void* row_dot;
  void* column_dot;
};

// All layers in one parallel region.
void weight_dot(const std::vector<WeightDot>& layers, const ParallelFor& parallel);

// Per row of dim 0, five contiguous vectors: sum wg, sum (wg)^2, sum |wg|, sum w^2, sum |w|.
void weight_moments(const Pair& weight, void* const moments[5], const ParallelFor& parallel);

// Per channel, four contiguous vectors: sum x, sum x^2, sum |x|, and over the samples along dim 0 the sum of
// (mean over the sample's positions of |x|)^2. `pair` is x and, where `masked`, a mask of bytes with stride 0 along the
// channels: positions where it is 0 are skipped. Without a mask the second array is x again.
void channel_moments(
    const Pair& pair, int64_t channel_dim, bool masked, void* const moments[4], const ParallelFor& parallel
);

struct EndRow {
  Dtype dtype;  // float32 or float64
  void* scores;
  int64_t scores_size;
  int64_t scores_stride;
  void* row;
  int64_t row_size;
  int64_t row_stride;
  const int64_t* groups;  // may be null: then scores_size == row_size
  int64_t groups_stride;
  double loss_scale;
};

// scores[groups[c]] += (row[c] / loss_scale)^2 if every square is finite (then `finite` is set), and row = 0 in any
// case. Returns -1; or, having changed nothing, the position of the first group that is out of range or less than its
// predecessor.
int64_t end_row(const EndRow& arguments, bool* finite);

// The instruction set that the kernels use here, chosen once: "x86-64-v4", "x86-64-v3" or "baseline". The
// environment variable OBC_CPU_ISA lowers it (the bits stay the same; tests compare them).
const char* instruction_set();

}  // namespace obc::cpu
