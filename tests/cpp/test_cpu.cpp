// The CPU operators as a C++ program uses them, without torch and Python, against the formulas written as loops.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/threads.h"

namespace {

using namespace obc::cpu;

int failures = 0;

void expect_close(const char* what, double actual, double truth, double magnitude) {
  if (std::abs(actual - truth) <= 1e-5 * magnitude) return;
  std::printf("%s: %.9g instead of %.9g\n", what, actual, truth);
  failures += 1;
}

void expect(const char* what, bool holds) {
  if (holds) return;
  std::printf("%s does not hold\n", what);
  failures += 1;
}

void in_this_thread(int64_t tasks, int64_t, ParallelFor::Body body, const void* context) { body(0, tasks, context); }

// Small grains too, so that every range boundary and every partial sum is somebody else's.
void in_three_threads(int64_t tasks, int64_t, ParallelFor::Body body, const void* context) {
  run_in_threads(3, tasks, 1, body, context);
}

constexpr ParallelFor kSerial = {in_this_thread};
constexpr ParallelFor kThreaded = {in_three_threads};

// Values in [-1, 1), the same in every run.
std::vector<float> numbers(int64_t count, uint32_t seed) {
  std::vector<float> values(count);
  for (float& value : values) {
    seed = seed * 1664525u + 1013904223u;
    value = static_cast<float>(static_cast<int32_t>(seed)) / 2147483648.0f;
  }
  return values;
}

struct Tensor {
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;
  std::vector<float> first, second;

  explicit Tensor(std::vector<int64_t> shape) : sizes(std::move(shape)), strides(sizes.size()) {
    int64_t count = 1;
    for (size_t d = sizes.size(); d-- > 0; count *= sizes[d]) strides[d] = count;
    first = numbers(count, 1);
    second = numbers(count, 2);
  }

  Pair pair() const {
    return {
        Dtype::float32,
        static_cast<int64_t>(sizes.size()),
        sizes.data(),
        first.data(),
        strides.data(),
        second.data(),
        strides.data()
    };
  }
};

void test_channel_dot() {
  const int64_t samples = 5, channels = 37, positions = 700;
  const Tensor t({samples, channels, positions});
  std::vector<float> serial(channels), threaded(channels);
  channel_dot(t.pair(), 1, false, serial.data(), kSerial);
  channel_dot(t.pair(), 1, false, threaded.data(), kThreaded);
  expect("channel_dot is the same in any number of threads", serial == threaded);
  for (int64_t c = 0; c < channels; ++c) {
    double truth = 0, magnitude = 0;
    for (int64_t n = 0; n < samples; ++n) {
      for (int64_t p = 0; p < positions; ++p) {
        const int64_t i = (n * channels + c) * positions + p;
        truth += double(t.first[i]) * t.second[i];
        magnitude += std::abs(double(t.first[i]) * t.second[i]);
      }
    }
    expect_close("channel_dot", serial[c], truth, magnitude);
  }
}

void test_weight_dot() {
  const int64_t rows = 36, columns = 19, kernel = 9, groups = 2;
  const Tensor t({rows, columns, 3, 3}), bias({rows});
  std::vector<float> row_dot(rows), column_dot(groups * columns);
  const Pair bias_pair = bias.pair();
  weight_dot({{t.pair(), &bias_pair, groups, false, row_dot.data(), column_dot.data()}}, kThreaded);
  std::vector<double> of_rows(rows), of_columns(groups * columns), row_size(rows), column_size(groups * columns);
  for (int64_t i = 0; i < rows * columns * kernel; ++i) {
    const int64_t row = i / kernel / columns, column = row / (rows / groups) * columns + i / kernel % columns;
    const double product = double(t.first[i]) * t.second[i];
    of_rows[row] += product;
    row_size[row] += std::abs(product);
    of_columns[column] += product;
    column_size[column] += std::abs(product);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const double product = double(bias.first[r]) * bias.second[r];
    expect_close("weight_dot rows", row_dot[r], of_rows[r] + product, row_size[r] + std::abs(product));
  }
  for (int64_t k = 0; k < groups * columns; ++k) {
    expect_close("weight_dot columns", column_dot[k], of_columns[k], column_size[k]);
  }
}

void test_weight_moments() {
  const int64_t rows = 11, columns = 1000;
  const Tensor t({rows, columns});
  std::vector<std::vector<float>> sums(5, std::vector<float>(rows));
  void* const moments[5] = {sums[0].data(), sums[1].data(), sums[2].data(), sums[3].data(), sums[4].data()};
  weight_moments(t.pair(), moments, kSerial);
  for (int64_t r = 0; r < rows; ++r) {
    double truth[5] = {};
    for (int64_t k = 0; k < columns; ++k) {
      const double w = t.first[r * columns + k], product = w * t.second[r * columns + k];
      truth[0] += product;
      truth[1] += product * product;
      truth[2] += std::abs(product);
      truth[3] += w * w;
      truth[4] += std::abs(w);
    }
    for (int m = 0; m < 5; ++m) expect_close("weight_moments", sums[m][r], truth[m], m == 0 ? truth[2] : truth[m]);
  }
}

void test_channel_moments() {
  const int64_t samples = 5, channels = 37, positions = 700;
  const Tensor t({samples, channels, positions});
  std::vector<uint8_t> mask(samples * positions);
  for (size_t p = 0; p < mask.size(); ++p) mask[p] = p % 3 != 0;
  const std::vector<int64_t> mask_strides = {positions, 0, 1};
  for (const bool masked : {false, true}) {
    Pair pair = t.pair();
    if (masked) {
      pair.second = mask.data();
      pair.second_strides = mask_strides.data();
    } else {
      pair.second = pair.first;
    }
    std::vector<std::vector<float>> sums(8, std::vector<float>(channels));
    void* pointers[8];
    for (int m = 0; m < 8; ++m) pointers[m] = sums[m].data();
    channel_moments(pair, 1, masked, pointers, kSerial);
    channel_moments(pair, 1, masked, pointers + 4, kThreaded);
    expect(
        "channel_moments is the same in any number of threads",
        std::equal(sums.begin(), sums.begin() + 4, sums.begin() + 4)
    );
    for (int64_t c = 0; c < channels; ++c) {
      double truth[4] = {};
      for (int64_t n = 0; n < samples; ++n) {
        double absolute = 0, count = 0;
        for (int64_t p = 0; p < positions; ++p) {
          if (masked && !mask[n * positions + p]) continue;
          const double x = t.first[(n * channels + c) * positions + p];
          truth[0] += x;
          truth[1] += x * x;
          absolute += std::abs(x);
          count += 1;
        }
        truth[2] += absolute;
        truth[3] += absolute / count * (absolute / count);
      }
      for (int m = 0; m < 4; ++m) expect_close("channel_moments", sums[m][c], truth[m], m == 0 ? truth[2] : truth[m]);
    }
  }
}

// Shapes for every way through memory that has partial sums, in many threads against one.
void test_threads() {
  const std::vector<std::vector<int64_t>> shapes =
      {{64, 48, 24, 24}, {3, 5, 30000}, {4099, 129}, {70001, 3}, {9, 700, 7}, {2, 5000, 16}};
  for (const std::vector<int64_t>& shape : shapes) {
    const Tensor t(shape);
    for (const bool per_sample : {false, true}) {
      for (int64_t dim = per_sample ? 1 : 0; dim < static_cast<int64_t>(shape.size()); ++dim) {
        const int64_t size = shape[dim] * (per_sample ? shape[0] : 1);
        std::vector<float> serial(size), threaded(size);
        channel_dot(t.pair(), dim, per_sample, serial.data(), kSerial);
        channel_dot(t.pair(), dim, per_sample, threaded.data(), kThreaded);
        expect("channel_dot is the same in one thread and in three", serial == threaded);
      }
    }
    for (int64_t dim = 1; dim < static_cast<int64_t>(shape.size()); ++dim) {
      Pair pair = t.pair();
      pair.second = pair.first;
      std::vector<std::vector<float>> sums(8, std::vector<float>(shape[dim]));
      void* results[8];
      for (int m = 0; m < 8; ++m) results[m] = sums[m].data();
      channel_moments(pair, dim, false, results, kSerial);
      channel_moments(pair, dim, false, results + 4, kThreaded);
      expect(
          "channel_moments is the same in one thread and in three",
          std::equal(sums.begin(), sums.begin() + 4, sums.begin() + 4)
      );
    }
    std::vector<std::vector<float>> moments(10, std::vector<float>(shape[0]));
    void* pointers[10];
    for (int m = 0; m < 10; ++m) pointers[m] = moments[m].data();
    weight_moments(t.pair(), pointers, kSerial);
    weight_moments(t.pair(), pointers + 5, kThreaded);
    expect(
        "weight_moments is the same in one thread and in three",
        std::equal(moments.begin(), moments.begin() + 5, moments.begin() + 5)
    );
  }
  std::vector<Tensor> weights;
  for (const std::vector<int64_t>& shape : shapes) weights.emplace_back(shape);
  std::vector<std::vector<float>> sums[2];
  for (const bool threaded : {false, true}) {
    std::vector<WeightDot> layers;
    for (const Tensor& weight : weights) {
      sums[threaded].emplace_back(weight.sizes[0]);
      sums[threaded].emplace_back(weight.sizes[1]);
    }
    for (size_t i = 0; i < weights.size(); ++i) {
      layers.push_back(
          {weights[i].pair(), nullptr, 1, false, sums[threaded][2 * i].data(), sums[threaded][2 * i + 1].data()}
      );
    }
    weight_dot(layers, threaded ? kThreaded : kSerial);
  }
  expect("weight_dot of a list is the same in one thread and in three", sums[0] == sums[1]);
}

void test_end_row() {
  std::vector<float> scores = {1, 1, 1}, row = {2, 4, 6};
  const std::vector<int64_t> groups = {0, 2, 2}, descending = {2, 0, 2};
  EndRow arguments = {Dtype::float32, scores.data(), 3, 1, row.data(), 3, 1, groups.data(), 1, 2.0};
  bool finite = false;
  expect("end_row takes ascending groups", end_row(arguments, &finite) == -1 && finite);
  expect("end_row adds the squares of its groups", scores == std::vector<float>({2, 1, 14}));
  expect("end_row clears the row", row == std::vector<float>({0, 0, 0}));
  arguments.groups = descending.data();
  expect("end_row names the first group that descends", end_row(arguments, &finite) == 1);
  arguments.groups = groups.data();
  row = {1, std::numeric_limits<float>::infinity(), 1};
  expect("end_row sees what is not finite", end_row(arguments, &finite) == -1 && !finite);
  expect("end_row then adds nothing", scores == std::vector<float>({2, 1, 14}));
}

}  // namespace

int main() {
  test_channel_dot();
  test_channel_moments();
  test_weight_dot();
  test_weight_moments();
  test_threads();
  test_end_row();
  std::printf("%s, %d failures\n", instruction_set(), failures);
  return failures == 0 ? 0 : 1;
}
