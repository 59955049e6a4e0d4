// The mask decoder's and the mask generator's part of the module evsam_kernels._cpu: arrays of NumPy, checked and
// handed to the C++ kernels without the GIL.

#include "masks.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "checks.h"
#include "evsam/attend_keys.h"
#include "evsam/attend_tokens.h"
#include "evsam/conv_act.h"
#include "evsam/feed_forward.h"
#include "evsam/map_values.h"
#include "evsam/measure_masks.h"
#include "evsam/update_keys.h"
#include "evsam/upscale_masks.h"
#include "packed.h"

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

// For every output position the first of the input positions that it is a sum of, and their weights.
using Sums = std::tuple<Array<std::int32_t>, Array<float>>;
// One axis: both resizings at once, that to the frame, and that of the picture to the image.
using Axis = std::tuple<Sums, Sums, Sums>;

// Checks the sums of `taps` of `in_size` positions, and returns how many they are.
std::int64_t check_sums(const std::string& name, const Sums& sums, std::int64_t taps,
                        std::int64_t in_size, bool rising) {
  const auto& [first, weights] = sums;
  check(first.ndim() == 1 && first.shape(0) >= 1, name + " must have one position or more");
  const std::int64_t size = first.shape(0);
  check(weights.ndim() == 2 && weights.shape(0) == taps && weights.shape(1) == size,
        name + " must have weights of the shape [" + std::to_string(taps) + ", " +
            std::to_string(size) + "]");
  std::int64_t before = 0;
  for (std::int64_t i = 0; i < size; ++i) {
    const std::int64_t here = first.data()[i];
    check(before <= here && here + taps <= in_size,
          name + " must begin at positions " + (rising ? "that rise " : "") + "from 0 to at most " +
              std::to_string(in_size - taps));
    if (rising) before = here;
  }
  return size;
}

evsam::LinearAxis linear_axis(const Sums& sums) {
  const auto& [first, weights] = sums;
  return {first.data(), weights.data(), first.shape(0)};
}

evsam::ResizedAxis resized_axis(const std::string& name, const Axis& axis, std::int64_t in_size) {
  const auto& [both, to_frame, to_image] = axis;
  const std::int64_t size = check_sums(name, both, 3, in_size, true);
  const std::int64_t frame = check_sums(name + "' frame", to_frame, 2, in_size, false);
  check(check_sums(name + "' image", to_image, 2, frame, false) == size,
        name + " must have as many positions in the image as of both resizings at once");
  return {std::get<0>(both).data(), std::get<1>(both).data(), size, linear_axis(to_frame),
          linear_axis(to_image)};
}

evsam::ResizedMaps resized_maps(const Array<float>& logits, const Axis& rows, const Axis& columns) {
  check(logits.ndim() == 3, "logits must have three axes");
  return {logits.data(), logits.shape(0), logits.shape(1), logits.shape(2),
          resized_axis("rows", rows, logits.shape(1)),
          resized_axis("columns", columns, logits.shape(2))};
}

py::tuple measure_masks(const Array<float>& logits, const Axis& rows, const Axis& columns,
                        float inner, float threshold, float outer, float tolerance, bool resolve,
                        std::optional<Array<std::uint8_t>> masks, int num_threads) {
  check_at_least("num_threads", num_threads, 1);
  evsam::MeasureMasksArgs args{};
  args.maps = resized_maps(logits, rows, columns);
  args.inner = inner;
  args.threshold = threshold;
  args.outer = outer;
  args.tolerance = tolerance;
  args.resolve = resolve;
  const std::int64_t count = args.maps.count;
  if (masks.has_value()) {
    check(masks->ndim() == 3 && masks->shape(0) == count &&
              masks->shape(1) == args.maps.rows.size && masks->shape(2) == args.maps.columns.size,
          "masks must hold a map of the output's size for each of the logits");
    args.masks = masks->mutable_data();
  }
  Array<std::int64_t> counts({count, std::int64_t{2}}), boxes({count, std::int64_t{4}});
  Array<std::uint8_t> doubtful(count);
  args.counts = counts.mutable_data();
  args.boxes = boxes.mutable_data();
  args.doubtful = doubtful.mutable_data();
  args.num_threads = num_threads;
  {
    const py::gil_scoped_release without_gil;
    evsam::measure_masks(args);
  }
  return py::make_tuple(counts, boxes, doubtful);
}

Array<float> resize_masks(const Array<float>& logits, const Axis& rows, const Axis& columns,
                          const Array<std::int64_t>& wanted) {
  evsam::ResizeMasksArgs args{};
  args.maps = resized_maps(logits, rows, columns);
  check(wanted.ndim() == 1, "wanted must have one axis");
  for (std::int64_t i = 0; i < wanted.shape(0); ++i)
    check(0 <= wanted.data()[i] && wanted.data()[i] < args.maps.rows.size,
          "wanted must be rows of the output, from 0 to " + std::to_string(args.maps.rows.size - 1));
  args.wanted = wanted.data();
  args.wanted_count = wanted.shape(0);
  Array<float> resized({args.maps.count, args.wanted_count, args.maps.columns.size});
  args.resized = resized.mutable_data();
  {
    const py::gil_scoped_release without_gil;
    evsam::resize_masks(args);
  }
  return resized;
}

// The elements of an array, whose shape must be as given.
template <class T>
T* elements(const char* name, const Array<T>& array, const std::vector<std::int64_t>& shape) {
  bool fits = array.ndim() == static_cast<py::ssize_t>(shape.size());
  for (std::size_t axis = 0; fits && axis < shape.size(); ++axis)
    fits = array.shape(static_cast<py::ssize_t>(axis)) == shape[axis];
  std::string wanted;
  for (const std::int64_t size : shape) wanted += (wanted.empty() ? "" : ", ") + std::to_string(size);
  check(fits, std::string(name) + " must have shape [" + wanted + "]");
  return const_cast<T*>(array.data());
}

template <class T>
T* elements(const char* name, const std::optional<Array<T>>& array,
            const std::vector<std::int64_t>& shape) {
  return array.has_value() ? elements(name, *array, shape) : nullptr;
}

using Optional = std::optional<Array<float>>;
constexpr std::int64_t tile_positions = 64;

py::tuple attend_keys(const Array<float>& queries, const Array<float>& keys,
                      const Array<float>& values, const Optional& offsets, const Optional& scales,
                      const Optional& basis, const Optional& row_queries, std::int64_t positions,
                      int num_threads) {
  check(queries.ndim() == 4, "queries must have four axes");
  check_at_least("positions", positions, 1);
  check_at_least("num_threads", num_threads, 1);
  const bool first = !basis.has_value();
  check(first || basis->ndim() == 4, "basis must have four axes");
  for (const Optional* other : {&offsets, &scales, &row_queries})
    check(other->has_value() != first, "offsets, scales, basis and row_queries go together");
  evsam::AttendKeysArgs args{};
  args.batch = queries.shape(0), args.heads = queries.shape(1);
  args.head_dim = queries.shape(2), args.tokens = queries.shape(3);
  args.rank = first ? 0 : basis->shape(2);
  check(args.head_dim % 16 == 0, "head_dim must be a multiple of 16");
  args.positions = positions;
  args.num_threads = num_threads;
  const std::int64_t tiles = (positions - 1) / tile_positions + 1;
  const std::int64_t inner = args.heads * args.head_dim;
  args.queries = queries.data();
  args.keys = elements("keys", keys, {tiles, inner, tile_positions});
  args.values = elements("values", values, {tiles * tile_positions, inner});
  args.offsets = elements("offsets", offsets, {tiles, inner, tile_positions});
  args.scales = elements("scales", scales, {args.batch, tiles, tile_positions});
  args.basis = elements("basis", basis, {args.batch, tiles, args.rank, tile_positions});
  args.row_queries =
      elements("row_queries", row_queries, {args.batch, args.heads, args.rank, args.tokens});
  Array<float> shared({args.batch, args.heads, args.tokens, args.head_dim});
  Array<float> of_basis({args.batch, args.heads, args.tokens, args.rank});
  args.shared = shared.mutable_data();
  args.of_basis = of_basis.mutable_data();
  {
    const py::gil_scoped_release without_gil;
    evsam::attend_keys(args);
  }
  return py::make_tuple(shared, of_basis);
}

Array<float> attend_tokens(const Array<float>& queries, const Array<float>& keys, const Array<float>& values,
                           std::int64_t heads, int num_threads) {
  check(queries.ndim() == 3, "queries must have three axes");
  check_at_least("heads", heads, 1);
  check_at_least("num_threads", num_threads, 1);
  const std::int64_t batch = queries.shape(0), tokens = queries.shape(1), columns = queries.shape(2);
  check(columns % heads == 0, "heads must divide the columns of queries");
  evsam::AttendTokensArgs args{};
  args.queries = queries.data();
  args.keys = elements("keys", keys, {batch, tokens, columns});
  args.values = elements("values", values, {batch, tokens, columns});
  args.batch = batch, args.tokens = tokens, args.heads = heads, args.head_dim = columns / heads;
  args.num_threads = num_threads;
  Array<float> y({batch, tokens, columns});
  args.y = y.mutable_data();
  {
    const py::gil_scoped_release without_gil;
    evsam::attend_tokens(args);
  }
  return y;
}

using PackedLayer = Packed<evsam::ConvActWeights, evsam::conv_act_pack>;

Array<float> feed_forward(const std::vector<const PackedLayer*>& layers, const Array<float>& x, const Optional& residual,
                          const Optional& norm_weight, const Optional& norm_bias, double eps, int num_threads) {
  check_at_least("layers", static_cast<std::int64_t>(layers.size()), 1);
  check(x.ndim() == 2, "x must have two axes");
  check(norm_weight.has_value() == norm_bias.has_value(), "norm_weight and norm_bias go together");
  check_at_least("num_threads", num_threads, 1);
  std::int64_t columns = x.shape(1);
  std::vector<evsam::LinearLayer> checked;
  for (const PackedLayer* layer : layers) {
    check(layer != nullptr, "layers must not be None");
    layer->check_isa();
    const evsam::ConvShape& shape = layer->weights().conv;
    check(layer->dtype() == evsam::DType::float32 && shape.kernel == 1 && shape.stride == 1 && shape.groups == 1,
          "layers must be 1x1 convolutions in float32");
    check(shape.in_channels == columns, "a layer takes " + std::to_string(shape.in_channels) +
                                            " columns where there are " + std::to_string(columns));
    columns = shape.out_channels;
    checked.push_back({layer->data(), shape.in_channels, columns});
  }
  evsam::FeedForwardArgs args{};
  args.layers = checked.data();
  args.layer_count = static_cast<std::int64_t>(checked.size());
  args.x = x.data();
  args.rows = x.shape(0);
  args.residual = elements("residual", residual, {args.rows, columns});
  args.norm_weight = elements("norm_weight", norm_weight, {columns});
  args.norm_bias = elements("norm_bias", norm_bias, {columns});
  args.eps = eps;
  args.num_threads = num_threads;
  Array<float> y({args.rows, columns});
  args.y = y.mutable_data();
  {
    const py::gil_scoped_release without_gil;
    evsam::feed_forward(args);
  }
  return y;
}

using ThreeArrays = std::tuple<Array<float>, Array<float>, Array<float>>;

Array<float> map_values(const std::vector<ThreeArrays>& values, std::int64_t groups, int num_threads) {
  check_at_least("values", static_cast<std::int64_t>(values.size()), 1);
  check_at_least("groups", groups, 1);
  check_at_least("num_threads", num_threads, 1);
  const auto& [of_first, last_of_first, first_table] = values[0];
  check(of_first.ndim() == 4, "differences must have four axes");
  check(first_table.ndim() == 2, "table must have two axes");
  evsam::MapValuesArgs args{};
  args.batch = of_first.shape(0), args.heads = of_first.shape(1);
  args.head_dim = of_first.shape(2), args.others = of_first.shape(3);
  args.block_count = static_cast<std::int64_t>(values.size());
  args.groups = groups;
  args.columns = first_table.shape(1) / groups;
  args.num_threads = num_threads;
  const std::int64_t features = args.heads * args.head_dim + 1;
  std::vector<evsam::MappedValues> blocks;
  for (const auto& [differences, last, table] : values)
    blocks.push_back(
        {elements("differences", differences, {args.batch, args.heads, args.head_dim, args.others}),
         elements("last", last, {args.batch, features}),
         elements("table", table, {features, groups * args.columns})});
  args.blocks = blocks.data();
  const std::int64_t rank = args.block_count * (args.heads * args.others + 1);
  Array<float> rows({args.batch, groups, rank, args.columns});
  args.rows = rows.mutable_data();
  {
    const py::gil_scoped_release without_gil;
    evsam::map_values(args);
  }
  return rows;
}

void update_keys(const Array<float>& tokens, const Array<float>& queries,
                 const Optional& offsets, const Optional& scales, const Optional& basis,
                 const Optional& row_tokens, const std::vector<ThreeArrays>& updates,
                 const Array<float>& square, const Array<float>& base,
                 const Array<float>& rows, Array<float> new_basis, Array<float> new_scales, double eps,
                 int num_threads) {
  check(tokens.ndim() == 4, "tokens must have four axes");
  check(base.ndim() == 3, "base must have three axes");
  check_at_least("updates", static_cast<std::int64_t>(updates.size()), 1);
  check_at_least("num_threads", num_threads, 1);
  for (const Optional* other : {&offsets, &scales, &basis, &row_tokens})
    check(other->has_value() == (updates.size() > 1),
          "offsets, scales, basis and row_tokens belong to all blocks but the first");
  evsam::UpdateKeysArgs args{};
  args.batch = tokens.shape(0), args.heads = tokens.shape(1);
  args.head_dim = tokens.shape(2), args.others = tokens.shape(3);
  args.tiles = base.shape(0), args.channels = base.shape(1);
  args.blocks = static_cast<std::int64_t>(updates.size());
  args.eps = eps;
  args.num_threads = num_threads;
  const std::int64_t batch = args.batch, tiles = args.tiles, inner = args.heads * args.head_dim;
  const std::int64_t added = args.heads * args.others + 1, new_rank = args.blocks * added;
  const std::int64_t rank = new_rank - added;
  args.tokens = tokens.data();
  args.queries = elements("queries", queries, {tiles, inner, tile_positions});
  args.offsets = elements("offsets", offsets, {tiles, inner, tile_positions});
  args.scales = elements("scales", scales, {batch, tiles, tile_positions});
  args.basis = elements("basis", basis, {batch, tiles, rank, tile_positions});
  args.row_tokens = elements("row_tokens", row_tokens, {batch, args.heads, rank, args.others});
  std::vector<evsam::KeyUpdate> checked;
  for (const auto& [differences, last, features] : updates)
    checked.push_back(
        {elements("differences", differences, {batch, args.heads, args.head_dim, args.others}),
         elements("last", last, {batch, inner + 1}),
         elements("features", features, {tiles, inner + 1, tile_positions})});
  args.updates = checked.data();
  args.square = elements("square", square, {tiles, tile_positions});
  args.base = elements("base", base, {tiles, args.channels, tile_positions});
  args.rows = elements("rows", rows, {batch, new_rank, args.channels});
  elements("new_basis", new_basis, {batch, tiles, new_rank, tile_positions});
  elements("new_scales", new_scales, {batch, tiles, tile_positions});
  args.new_basis = new_basis.mutable_data();
  args.new_scales = new_scales.mutable_data();
  for (const float* result : {args.new_basis, args.new_scales})
    check(reinterpret_cast<std::uintptr_t>(result) % 64 == 0,
          "new_basis and new_scales must begin at multiples of 64 bytes");
  const py::gil_scoped_release without_gil;
  evsam::update_keys(args);
}

void upscale_masks(const Array<float>& base, const Array<float>& scales,
                   const Array<float>& basis, const Array<float>& rows,
                   const Array<float>& offsets, const Array<float>& norm_weight,
                   const Array<float>& norm_bias, double eps, const Array<float>& weight,
                   const Array<float>& bias, const Array<std::int64_t>& first,
                   const Array<float>& vectors, Array<float> masks, std::int64_t height,
                   std::int64_t width, bool bfloat16, int num_threads) {
  check(basis.ndim() == 4, "basis must have four axes");
  check(weight.ndim() == 3, "weight must have three axes");
  check(vectors.ndim() == 2, "vectors must have two axes");
  check_at_least("height", height, 1);
  check_at_least("width", width, 1);
  check_at_least("num_threads", num_threads, 1);
  evsam::UpscaleMasksArgs args{};
  args.batch = basis.shape(0), args.rank = basis.shape(2);
  args.mid_channels = weight.shape(0), args.out_channels = weight.shape(2);
  args.height = height, args.width = width;
  args.bfloat16 = bfloat16;
  args.eps = eps;
  args.num_threads = num_threads;
  const std::int64_t tiles = (height * width - 1) / tile_positions + 1;
  const std::int64_t mid = args.mid_channels, out = args.out_channels, count = vectors.shape(1);
  args.base = elements("base", base, {tiles, 4 * mid, tile_positions});
  args.scales = elements("scales", scales, {args.batch, tiles, tile_positions});
  args.basis = elements("basis", basis, {args.batch, tiles, args.rank, tile_positions});
  args.rows = elements("rows", rows, {args.batch, args.rank, 4 * mid});
  args.offsets = elements("offsets", offsets, {4 * mid});
  args.norm_weight = elements("norm_weight", norm_weight, {mid});
  args.norm_bias = elements("norm_bias", norm_bias, {mid});
  args.weight = elements("weight", weight, {mid, 4, out});
  args.bias = elements("bias", bias, {out});
  args.first = elements("first", first, {args.batch + 1});
  for (std::int64_t prompt = 0; prompt < args.batch; ++prompt)
    check(args.first[prompt] <= args.first[prompt + 1], "first must not fall");
  check(args.first[0] == 0 && args.first[args.batch] == count,
        "first must count the masks from 0 to " + std::to_string(count));
  args.vectors = elements("vectors", vectors, {out, count});
  elements("masks", masks, {count, 4 * height, 4 * width});
  args.masks = masks.mutable_data();
  const py::gil_scoped_release without_gil;
  evsam::upscale_masks(args);
}

}  // namespace

void bind_masks(py::module_& module) {
  using namespace py::literals;
  module.def("measure_masks", &measure_masks, py::kw_only(), py::arg("logits").noconvert(),
             "rows"_a, "columns"_a, "inner"_a, "threshold"_a, "outer"_a, "tolerance"_a, "resolve"_a,
             py::arg("masks").noconvert(), "num_threads"_a,
             "Upscaled masks, thresholded; see csrc/include/evsam/measure_masks.h.");
  module.def("resize_masks", &resize_masks, py::kw_only(), py::arg("logits").noconvert(), "rows"_a,
             "columns"_a, "wanted"_a, "Rows of upscaled logits; see the same header.");
  module.def("attend_keys", &attend_keys, py::kw_only(), py::arg("queries").noconvert(),
             py::arg("keys").noconvert(), py::arg("values").noconvert(),
             py::arg("offsets").noconvert(), py::arg("scales").noconvert(),
             py::arg("basis").noconvert(), py::arg("row_queries").noconvert(), "positions"_a,
             "num_threads"_a,
             "Attention to shared and low-rank keys; see csrc/include/evsam/attend_keys.h.");
  module.def("attend_tokens", &attend_tokens, py::kw_only(), py::arg("queries").noconvert(),
             py::arg("keys").noconvert(), py::arg("values").noconvert(), "heads"_a, "num_threads"_a,
             "Attention of tokens to one another; see csrc/include/evsam/attend_tokens.h.");
  module.def("feed_forward", &feed_forward, py::kw_only(), "layers"_a, py::arg("x").noconvert(),
             py::arg("residual").noconvert(), py::arg("norm_weight").noconvert(),
             py::arg("norm_bias").noconvert(), "eps"_a, "num_threads"_a,
             "Linear layers, residual, LayerNorm; see csrc/include/evsam/feed_forward.h.");
  module.def("map_values", &map_values, py::kw_only(), "values"_a, "groups"_a, "num_threads"_a,
             "Values of tokens times tables; see csrc/include/evsam/map_values.h.");
  module.def("update_keys", &update_keys, py::kw_only(), py::arg("tokens").noconvert(),
             py::arg("queries").noconvert(), py::arg("offsets").noconvert(),
             py::arg("scales").noconvert(), py::arg("basis").noconvert(),
             py::arg("row_tokens").noconvert(), "updates"_a, py::arg("square").noconvert(),
             py::arg("base").noconvert(), py::arg("rows").noconvert(), py::arg("new_basis").noconvert(),
             py::arg("new_scales").noconvert(), "eps"_a, "num_threads"_a,
             "Softmax over tokens and LayerNorm's scale; see csrc/include/evsam/update_keys.h.");
  module.def("upscale_masks", &upscale_masks, py::kw_only(), py::arg("base").noconvert(),
             py::arg("scales").noconvert(), py::arg("basis").noconvert(),
             py::arg("rows").noconvert(), py::arg("offsets").noconvert(),
             py::arg("norm_weight").noconvert(), py::arg("norm_bias").noconvert(), "eps"_a,
             py::arg("weight").noconvert(), py::arg("bias").noconvert(),
             py::arg("first").noconvert(), py::arg("vectors").noconvert(),
             py::arg("masks").noconvert(), "height"_a, "width"_a, "bfloat16"_a, "num_threads"_a,
             "Masks from the image's keys; see csrc/include/evsam/upscale_masks.h.");
}
