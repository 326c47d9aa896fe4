// obc._native: how this build was made, and the CPU kernels on NumPy arrays for programs without torch.
//
// The arguments are checked in python/obc/integrations/numpy.py. The interpreter's lock is released while a kernel
// runs. A call that is large enough starts threads (OBC_NUM_THREADS, by default one per processor).

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/greedy.h"
#include "cpu/kernels.h"
#include "cpu/threads.h"

namespace py = pybind11;

namespace {

using obc::cpu::Dtype;
using obc::cpu::Pair;

int64_t thread_count() {
  static const int64_t count = [] {
    const char* wanted = std::getenv("OBC_NUM_THREADS");
    const int64_t threads = wanted ? std::atoll(wanted) : std::thread::hardware_concurrency();
    return std::max<int64_t>(threads, 1);
  }();
  return count;
}

void run_parallel(int64_t tasks, int64_t grain, obc::cpu::ParallelFor::Body body, const void* context) {
  obc::cpu::run_in_threads(thread_count(), tasks, grain, body, context);
}

constexpr obc::cpu::ParallelFor kParallel = {run_parallel};

Dtype dtype_of(const py::array& array) {
  switch (array.dtype().char_()) {
    case 'd':
      return Dtype::float64;
    case 'e':
      return Dtype::float16;
    default:
      return Dtype::float32;
  }
}

std::vector<int64_t> strides_of(const py::array& array) {
  std::vector<int64_t> strides(array.strides(), array.strides() + array.ndim());
  for (int64_t& stride : strides) stride /= array.itemsize();
  return strides;
}

// A Pair, together with the memory that it points to.
struct Arrays {
  Arrays(const py::array& first, const py::array& second)
      : sizes(first.shape(), first.shape() + first.ndim()),
        first_strides(strides_of(first)),
        second_strides(strides_of(second)),
        pair{
            dtype_of(first),
            first.ndim(),
            sizes.data(),
            first.data(),
            first_strides.data(),
            second.data(),
            second_strides.data()
        } {}

  Arrays(const Arrays&) = delete;
  Arrays& operator=(const Arrays&) = delete;

  std::vector<int64_t> sizes, first_strides, second_strides;
  Pair pair;
};

py::array empty_sums(std::vector<py::ssize_t> shape, const py::array& like) {
  return py::array(py::dtype(dtype_of(like) == Dtype::float64 ? "d" : "f"), std::move(shape));
}

py::array channel_dot(const py::array& activation, const py::array& grad, int64_t channel_dim, bool per_sample) {
  const py::ssize_t channels = activation.shape(channel_dim);
  py::array out =
      per_sample ? empty_sums({activation.shape(0), channels}, activation) : empty_sums({channels}, activation);
  const Arrays arrays(activation, grad);
  void* sums = out.mutable_data();
  const py::gil_scoped_release unlocked;
  obc::cpu::channel_dot(arrays.pair, channel_dim, per_sample, sums, kParallel);
  return out;
}

using ArrayList = std::vector<py::array>;
using OptionalArrayList = std::vector<std::optional<py::array>>;

std::pair<ArrayList, ArrayList> weight_dot_list(
    const ArrayList& weights,
    const ArrayList& grads,
    const OptionalArrayList& biases,
    const OptionalArrayList& bias_grads,
    const std::vector<int64_t>& groups,
    const std::vector<bool>& transposed
) {
  ArrayList out_dots, in_dots;
  std::vector<std::unique_ptr<Arrays>> arrays;
  std::vector<obc::cpu::WeightDot> layers;
  const auto pair_of = [&](const py::array& first, const py::array& second) -> const Pair* {
    arrays.push_back(std::make_unique<Arrays>(first, second));
    return &arrays.back()->pair;
  };
  for (size_t i = 0; i < weights.size(); ++i) {
    const py::array& weight = weights[i];
    py::array row_dot = empty_sums({weight.shape(0)}, weight);
    py::array column_dot = empty_sums({weight.shape(1) * groups[i]}, weight);
    layers.push_back(
        {*pair_of(weight, grads[i]),
         biases[i] ? pair_of(*biases[i], *bias_grads[i]) : nullptr,
         groups[i],
         transposed[i],
         row_dot.mutable_data(),
         column_dot.mutable_data()}
    );
    out_dots.push_back(transposed[i] ? column_dot : row_dot);
    in_dots.push_back(transposed[i] ? row_dot : column_dot);
  }
  const py::gil_scoped_release unlocked;
  obc::cpu::weight_dot(layers, kParallel);
  return {std::move(out_dots), std::move(in_dots)};
}

ArrayList weight_moments(const py::array& weight, const py::array& grad) {
  ArrayList sums;
  void* moments[5];
  for (void*& moment : moments) {
    sums.push_back(empty_sums({weight.shape(0)}, weight));
    moment = sums.back().mutable_data();
  }
  const Arrays arrays(weight, grad);
  const py::gil_scoped_release unlocked;
  obc::cpu::weight_moments(arrays.pair, moments, kParallel);
  return sums;
}

ArrayList channel_moments(const py::array& x, int64_t channel_dim, const std::optional<py::array>& mask) {
  ArrayList sums;
  void* moments[4];
  for (void*& moment : moments) {
    sums.push_back(empty_sums({x.shape(channel_dim)}, x));
    moment = sums.back().mutable_data();
  }
  Arrays arrays(x, x);
  if (mask) {
    arrays.second_strides = strides_of(*mask);
    arrays.second_strides.insert(arrays.second_strides.begin() + channel_dim, 0);
    arrays.pair.second = mask->data();
    arrays.pair.second_strides = arrays.second_strides.data();
  }
  const py::gil_scoped_release unlocked;
  obc::cpu::channel_moments(arrays.pair, channel_dim, mask.has_value(), moments, kParallel);
  return sums;
}

// Whether every square was finite, and the position of the first bad group or -1.
std::pair<bool, int64_t> end_row(
    py::array scores, py::array row, double loss_scale, const std::optional<py::array>& groups
) {
  const obc::cpu::EndRow arguments = {
      dtype_of(scores),
      scores.mutable_data(),
      scores.size(),
      strides_of(scores)[0],
      row.mutable_data(),
      row.size(),
      strides_of(row)[0],
      groups ? static_cast<const int64_t*>(groups->data()) : nullptr,
      groups ? strides_of(*groups)[0] : 0,
      loss_scale
  };
  const py::gil_scoped_release unlocked;
  bool finite = false;
  const int64_t bad_group = obc::cpu::end_row(arguments, &finite);
  return {finite, bad_group};
}

obc::cpu::Rows rows_of(const py::array_t<double>& rows, const py::array_t<int64_t>& places) {
  return {rows.data(), strides_of(rows)[0], rows.shape(1), places.data()};
}

void row_products(
    const py::array_t<double>& rows,
    const py::array_t<int64_t>& places,
    const py::array_t<double>& vector,
    py::array_t<double> products
) {
  const obc::cpu::Rows given = rows_of(rows, places);
  double* const results = products.mutable_data();
  const py::gil_scoped_release unlocked;
  obc::cpu::row_products(given, places.size(), vector.data(), results);
}

// obc::cpu::Greedy on arrays that Python owns: contiguous float64, checked in python/obc/selection/compiled.py.
class GreedySteps {
 public:
  GreedySteps(
      const py::array_t<int64_t>& sizes,
      const std::vector<py::array_t<double>>& constants,
      const std::optional<py::array_t<double>>& unit_costs,
      const std::vector<py::array_t<double>>& state,
      bool per_cost,
      double column_factor
  )
      : sizes_(sizes), constants_(constants), unit_costs_(unit_costs), state_(state) {
    greedy_.units = state_[0].size();
    greedy_.groups = sizes_.size();
    greedy_.sizes = sizes_.data();
    greedy_.lowest_widths = constants_[0].data();
    greedy_.curvature = constants_[1].data();
    greedy_.squares = constants_[2].data();
    greedy_.rounding_of = constants_[3].data();
    greedy_.rounding_by_norm = constants_[4].data();
    greedy_.unit_costs = unit_costs_ ? unit_costs_->data() : nullptr;
    greedy_.per_cost = per_cost;
    greedy_.interacting = column_factor != 0;
    greedy_.column_factor = column_factor;
    greedy_.increments = state_[0].mutable_data();
    greedy_.widths = state_[1].mutable_data();
    greedy_.slope = state_[2].mutable_data();
    greedy_.removed_squares = state_[3].mutable_data();
    greedy_.freed = state_[4].mutable_data();
  }

  int64_t step(const std::optional<py::array_t<double>>& column, std::optional<py::array_t<double>> reach) {
    const double* const values = column ? column->data() : nullptr;
    double* const filled = reach ? reach->mutable_data() : nullptr;
    const py::gil_scoped_release unlocked;
    return greedy_.step(values, filled);
  }

  int64_t run(
      const py::array_t<double>& rows,
      const py::array_t<int64_t>& places,
      double target,
      py::array_t<int64_t> removed,
      py::array_t<double> reach,
      py::array_t<double> states
  ) {
    const obc::cpu::Rows given = rows_of(rows, places);
    int64_t* const removed_units = removed.mutable_data();
    double* const filled = reach.mutable_data();
    double* const states_after = states.mutable_data();
    const int64_t count = removed.size();
    const py::gil_scoped_release unlocked;
    return greedy_.run(given, target, count, removed_units, filled, states_after);
  }

 private:
  const py::array_t<int64_t> sizes_;
  const std::vector<py::array_t<double>> constants_;
  const std::optional<py::array_t<double>> unit_costs_;
  std::vector<py::array_t<double>> state_;
  obc::cpu::Greedy greedy_;
};

// obc::cpu::find_rivals on arrays that Python owns: contiguous, checked in python/obc/selection/fronts.py.
void find_rivals(
    const py::array_t<int64_t>& groups,
    const py::array_t<float>& products,
    const py::array_t<double>& increments,
    const py::array_t<double>& inverse,
    const std::optional<py::array_t<double>>& unit_costs,
    const py::array_t<double>& reach,
    const py::array_t<double>& slack,
    py::array_t<uint8_t> found
) {
  const obc::cpu::Bystanders bystanders = {
      groups.size(),
      slack.size(),
      groups.data(),
      products.data(),
      increments.data(),
      inverse.data(),
      unit_costs ? unit_costs->data() : nullptr,
      reach.data(),
      slack.data(),
  };
  uint8_t* const result = found.mutable_data();
  const py::gil_scoped_release unlocked;
  obc::cpu::find_rivals(bystanders, result);
}

py::dict build_facts() {
  py::dict facts;
  facts["compiler"] = OBC_COMPILER;
  facts["flags"] = OBC_FLAGS;
  facts["torch"] = OBC_TORCH_VERSION;
  return facts;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Facts of obc's native build, and its CPU kernels on NumPy arrays.";
  module.def("build_facts", build_facts);
  module.def("instruction_set", obc::cpu::instruction_set);
  module.def("thread_count", thread_count);
  module.def("channel_dot", channel_dot);
  module.def("weight_dot_list", weight_dot_list);
  module.def("weight_moments", weight_moments);
  module.def("channel_moments", channel_moments);
  module.def("end_row", end_row);
  py::class_<GreedySteps>(module, "GreedySteps")
      .def(
          py::init<
              const py::array_t<int64_t>&,
              const std::vector<py::array_t<double>>&,
              const std::optional<py::array_t<double>>&,
              const std::vector<py::array_t<double>>&,
              bool,
              double>()
      )
      .def("step", &GreedySteps::step, py::arg("column"), py::arg("reach") = py::none())
      .def("run", &GreedySteps::run);
  module.def("row_products", row_products);
  module.def("find_rivals", find_rivals);
}
