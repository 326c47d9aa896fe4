// weight_dot: row and column sums of w * g in one pass over both arrays; weight_dot_list: for a whole model at once.
//
//   row_dot[r]       = sum over columns k, kernel s of w[r, k, s] * g[r, k, s]
//   column_dot[g, k] = sum over rows r of group g, kernel s of w[r, k, s] * g[r, k, s]
//
// Shapes: w and g (rows, K, *kernel), any strides, each its own; rows = groups * rows per group. Rows are out channels
// and columns in channels, or vice versa in a transposed convolution; bias * bias_grad is added to the out channels.
// Bytes: both inputs once; partial sums, one per line and tile and one per column and chunk (1/512 and 1/128 of the
// elements of a 4096 x 4096 float32 weight), written and read once. Accumulation: float32, float64 for float64 input.
//
// The outer of rows and columns in memory forms the lines of the matrix in tiles.h, so transposed weights are read
// along memory too. Kernel positions directly inside a channel are columns, others lines. A depthwise layer is one
// line, in which each row sum is a column sum, and sums over a conv group give the other side.

#include <limits>

#include "plan.h"

namespace obc::cuda {

namespace {

enum Role { kKernel, kRow, kColumn };

struct Layer {
  Matrix matrix;
  Output columns;
  Output lines;
  int64_t lines_are_rows;   // lines are the weight's rows, columns its columns; else vice versa
  int64_t coarse_channels;  // rows per group of a depthwise layer, 0 for all others
};

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) weight_dot_kernel(
    const __grid_constant__ Layer layer,
    Accumulator<T>* column_results,
    Accumulator<T>* line_results,
    Accumulator<T>* partials,
    uint32_t* counters
) {
  __shared__ Accumulator<T> shared[kShared<T>];
  const Matrix& m = layer.matrix;
  const int64_t items = m.groups * m.chunks * m.tiles;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    run_item<T, true>(
        m,
        item,
        layer.columns,
        column_results,
        &layer.lines,
        line_results,
        layer.coarse_channels,
        partials,
        counters,
        shared
    );
  }
}

constexpr int64_t kLayerWords = sizeof(Layer) / sizeof(int64_t);
static_assert(sizeof(Layer) % sizeof(int64_t) == 0, "a layer is copied word by word");

// Layers as the parameter of one launch, and the first item of each.
struct Listed {
  int64_t count;
  int64_t items;
  int64_t begins[kMostListed];
  Layer layers[kMostListed];
  void* columns[kMostListed];  // results of a layer's columns and lines
  void* lines[kMostListed];
};
// Two pointers come beside it.
static_assert(sizeof(Listed) + 2 * sizeof(void*) <= 32764, "more than the parameters of a kernel can carry");

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) weight_dot_list_kernel(
    const __grid_constant__ Listed listed, Accumulator<T>* partials, uint32_t* counters
) {
  using Acc = Accumulator<T>;
  static_assert(kMostListed <= kThreads, "a thread looks at one layer");
  __shared__ Acc shared[kShared<T>];
  __shared__ int64_t words[kLayerWords];
  for (int64_t item = blockIdx.x; item < listed.items; item += gridDim.x) {
    // The item's layer is the last of those that begin at or before it.
    const bool begun = threadIdx.x < listed.count && listed.begins[threadIdx.x] <= item;
    const int index = __syncthreads_count(begun) - 1;
    const int64_t* const record = reinterpret_cast<const int64_t*>(&listed.layers[index]);
    if (threadIdx.x < kLayerWords) words[threadIdx.x] = record[threadIdx.x];
    __syncthreads();
    const Layer& layer = *reinterpret_cast<const Layer*>(words);
    run_item<T, true>(
        layer.matrix,
        item - listed.begins[index],
        layer.columns,
        static_cast<Acc*>(listed.columns[index]),
        &layer.lines,
        static_cast<Acc*>(listed.lines[index]),
        layer.coarse_channels,
        partials,
        counters,
        shared
    );
  }
}

std::vector<Dim> dims_of(const Pair& weight, int64_t rows) {
  std::vector<Dim> dims;
  for (int64_t d = 0; d < weight.dims; ++d) {
    const int role = d == 0 ? kRow : d == 1 ? kColumn : kKernel;
    dims.push_back({d == 0 ? rows : weight.sizes[d], weight.first_strides[d], weight.second_strides[d], role});
  }
  return dims;
}

Output output_of(int64_t per_group, const Pair* bias) {
  Output output = {per_group, 1, nullptr, nullptr, 0, 0};
  if (bias) {
    output.bias = bias->first;
    output.bias_grad = bias->second;
    output.bias_stride = bias->first_strides[0];
    output.bias_grad_stride = bias->second_strides[0];
  }
  return output;
}

// The matrix of one conv group with the given dimensions; false if there are too many.
bool plan_matrix(Matrix& m, const std::vector<Dim>& dims, int item, bool& lines_are_rows) {
  const auto find = [&](int role) {
    return std::find_if(dims.begin(), dims.end(), [role](const Dim& dim) { return dim.role == role; });
  };
  const auto row = find(kRow), column = find(kColumn);
  // If there is a single row or column, the other side forms the columns of one line.
  lines_are_rows = row == dims.end() || (column != dims.end() && row < column);
  const auto line = lines_are_rows ? row : column, channel = lines_are_rows ? column : row;
  const Dim one = {1, 0, 0, kColumn};
  const Dim channels = channel == dims.end() ? one : *channel;
  Dim terms = one;

  std::vector<Dim> lines, kernel;
  if (line != dims.end()) lines.push_back(*line);
  for (auto dim = dims.begin(); dim != dims.end(); ++dim) {
    if (dim->role != kKernel) continue;
    if (channel != dims.end() && dim == channel + 1 && continues(*channel, *dim)) {
      terms = *dim;
    } else {
      kernel.push_back(*dim);
    }
  }
  // A kernel larger than a tile forms lines after all; a lane's columns are then that far apart.
  for (;;) {
    m.terms = m.channel_stride = terms.size;
    m.term_stride = 1;
    m.channels = channels.size;
    m.width = m.last_width = m.channels * m.terms;
    m.column = terms.size > 1 ? Place{terms.first, terms.second} : Place{channels.first, channels.second};
    std::vector<Dim> axes = lines;
    axes.insert(axes.end(), kernel.begin(), kernel.end());
    const std::optional<Axes> walked = axes_of(axes);
    if (!walked) return false;
    m.lines = *walked;
    m.line_count = cpu::count(axes);
    m.lines_per_row = cpu::count(kernel);
    if (choose_tile(m, item)) return true;
    kernel.push_back(terms);
    terms = one;
  }
}

// A weight without elements: lines and channels whose sums are nothing but zeros and biases.
void plan_empty(Matrix& m, int64_t rows, int64_t columns, int item) {
  m.terms = m.channel_stride = m.term_stride = m.lines_per_row = 1;
  m.channels = columns;
  m.line_count = rows;
  m.lines = *axes_of({});
  choose_tile(m, item);
}

// One line of all channels of a depthwise weight, `together` of which belong to a conv group; false if not one line.
bool plan_depthwise(Matrix& m, const Pair& weight, int64_t together) {
  const std::vector<Dim> dims = cpu::canonical(dims_of(weight, weight.sizes[0]));
  if (dims.empty() || dims.size() > 2 || dims[0].role != kRow) return false;
  if (dims.size() == 2 && !continues(dims[0], dims[1])) return false;
  m.groups = m.line_count = m.lines_per_row = m.term_stride = 1;
  m.lines = *axes_of({});
  m.channels = dims[0].size;
  m.terms = m.channel_stride = dims.size() == 2 ? dims[1].size : 1;
  m.width = m.last_width = m.channels * m.terms;
  m.column = {dims.back().first, dims.back().second};
  return choose_tile(m, element_size(weight.dtype), together);
}

// Everything except chunks and places, which depend on what else is launched.
bool plan_layer(const WeightDot& given, Layer& layer) {
  const Pair& weight = given.weight;
  const int item = element_size(weight.dtype);
  const int64_t rows = weight.sizes[0] / given.groups, columns = weight.sizes[1];
  layer = {};
  Matrix& m = layer.matrix;
  m.first = weight.first;
  m.second = weight.second;
  const Pair* const row_bias = given.transposed ? nullptr : given.bias;
  const Pair* const column_bias = given.transposed ? given.bias : nullptr;
  std::vector<Dim> dims = dims_of(weight, rows);
  const bool empty = cpu::count(dims) == 0;
  if (!empty && columns == 1 && given.groups > 1 && plan_depthwise(m, weight, rows)) {
    layer.coarse_channels = rows;
    layer.columns = output_of(0, row_bias);
    layer.lines = output_of(0, column_bias);
    return true;
  }
  m = {};
  m.first = weight.first;
  m.second = weight.second;
  m.groups = given.groups;
  m.group = {rows * weight.first_strides[0], rows * weight.second_strides[0]};
  bool lines_are_rows = true;
  if (empty) {
    plan_empty(m, rows, columns, item);
  } else if (!plan_matrix(m, cpu::canonical(std::move(dims)), item, lines_are_rows)) {
    return false;
  }
  layer.lines_are_rows = lines_are_rows;
  const Output of_rows = output_of(rows, row_bias), of_columns = output_of(columns, column_bias);
  layer.lines = lines_are_rows ? of_rows : of_columns;
  layer.columns = lines_are_rows ? of_columns : of_rows;
  return true;
}

}  // namespace

bool weight_dot(const WeightDot& given, Context& context) {
  Layer layer;
  if (!plan_layer(given, layer)) return false;
  const int item = element_size(given.weight.dtype);
  Matrix& m = layer.matrix;
  choose_chunks(m, true, item);
  Space space;
  place_partials(m, true, space);
  for_type(given.weight.dtype, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    using Acc = Accumulator<T>;
    Acc* const partials = static_cast<Acc*>(context.scratch(space.partials * sizeof(Acc)));
    uint32_t* const counters = context.counters(space.counters);
    Acc* const of_lines = static_cast<Acc*>(layer.lines_are_rows ? given.row_dot : given.column_dot);
    Acc* const of_columns = static_cast<Acc*>(layer.lines_are_rows ? given.column_dot : given.row_dot);
    const int64_t blocks = grid(items(m));
    launch(context, weight_dot_kernel<T>, blocks, kThreads, false, layer, of_columns, of_lines, partials, counters);
  });
  return true;
}

namespace {

// Items of all layers, if each has so many steps.
int64_t all_items(std::vector<Layer>& layers, int64_t steps_per_item, int item) {
  int64_t count = 0;
  for (Layer& layer : layers) {
    choose_chunks(layer.matrix, steps_per_item, true, item);
    count += items(layer.matrix);
  }
  return count;
}

// The fixed cost of an item, in steps: finding its layer, adding up the sums of its warps and writing them. It is about
// half of the instructions of an item with one step.
constexpr int64_t kItemOverhead = 1;
constexpr int64_t kMostItemsOfBlock = 6;

// Steps per item that minimise the work of the busiest block: with few long items some blocks have one more than
// others, with many short ones each pays the fixed cost more often.
int64_t choose_steps(std::vector<Layer>& layers, int64_t all_steps, int item) {
  int64_t best = 1, least = std::numeric_limits<int64_t>::max();
  for (int64_t wanted = 1; wanted <= kMostItemsOfBlock; ++wanted) {
    const int64_t steps_per_item = std::max<int64_t>(ceil_div(all_steps, wanted * kBlocks), 1);
    const int64_t cost = ceil_div(all_items(layers, steps_per_item, item), kBlocks) * (steps_per_item + kItemOverhead);
    if (cost < least) {
      least = cost;
      best = steps_per_item;
    }
  }
  return best;
}

}  // namespace

bool plan_weight_dot_list(const std::vector<WeightDot>& given, Worklist& worklist) {
  const int item = element_size(given[0].weight.dtype);
  std::vector<Layer> layers(given.size());
  int64_t all_steps = 0;
  for (size_t i = 0; i < given.size(); ++i) {
    Layer& layer = layers[i];
    if (!plan_layer(given[i], layer)) return false;
    all_steps += steps(layer.matrix, item);
  }
  worklist.items = all_items(layers, choose_steps(layers, all_steps, item), item);
  Space space;
  for (Layer& layer : layers) place_partials(layer.matrix, true, space);
  worklist.dtype = given[0].weight.dtype;
  worklist.layers = static_cast<int64_t>(layers.size());
  worklist.partials = space.partials;
  worklist.counters = space.counters;
  worklist.table.resize(layers.size() * kLayerWords);
  std::memcpy(worklist.table.data(), layers.data(), layers.size() * sizeof(Layer));
  return true;
}

namespace {

// The layers of a plan with the memory of these tensors.
Listed listed_of(const Worklist& worklist, const std::vector<WeightDot>& given) {
  Listed listed = {};
  listed.count = worklist.layers;
  std::memcpy(listed.layers, worklist.table.data(), worklist.table.size() * sizeof(int64_t));
  for (size_t i = 0; i < given.size(); ++i) {
    Layer& layer = listed.layers[i];
    layer.matrix.first = given[i].weight.first;
    layer.matrix.second = given[i].weight.second;
    for (Output* output : {&layer.columns, &layer.lines}) {
      if (!output->bias) continue;
      output->bias = given[i].bias->first;
      output->bias_grad = given[i].bias->second;
    }
    listed.columns[i] = layer.lines_are_rows ? given[i].column_dot : given[i].row_dot;
    listed.lines[i] = layer.lines_are_rows ? given[i].row_dot : given[i].column_dot;
    listed.begins[i] = take(listed.items, items(layer.matrix));
  }
  return listed;
}

}  // namespace

void weight_dot_list(const Worklist& worklist, const std::vector<WeightDot>& layers, Context& context) {
  const Listed listed = listed_of(worklist, layers);
  for_type(worklist.dtype, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    using Acc = Accumulator<T>;
    Acc* const partials = static_cast<Acc*>(context.scratch(worklist.partials * sizeof(Acc)));
    uint32_t* const counters = context.counters(worklist.counters);
    const int64_t blocks = std::min<int64_t>(worklist.items, kBlocks);
    launch(context, weight_dot_list_kernel<T>, blocks, kThreads, false, listed, partials, counters);
  });
}

}  // namespace obc::cuda
