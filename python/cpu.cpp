// The module evsam_kernels._cpu: checks what Python passes and calls the C++ kernels without the GIL.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include <cstdint>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "evsam/attend_keys.h"
#include "evsam/conv_act.h"
#include "evsam/fused_mbconv.h"
#include "evsam/isa.h"
#include "evsam/layer_norm_2d.h"
#include "evsam/map_values.h"
#include "evsam/mbconv.h"
#include "evsam/measure_masks.h"
#include "evsam/multi_scale_attention.h"
#include "evsam/relu_linear_attention.h"
#include "evsam/update_keys.h"
#include "evsam/upsample_add.h"
#include "evsam/upscale_masks.h"
#include "launches.h"
#include "packed.h"

namespace py = pybind11;

namespace {

// The address of a tensor's first element, as Tensor.data_ptr() gives it.
using Address = std::int64_t;

std::int64_t size_of(evsam::DType dtype) {
  switch (dtype) {
    case evsam::DType::float16:
    case evsam::DType::bfloat16: return 2;
    case evsam::DType::float32: return 4;
    case evsam::DType::float64: return 8;
  }
  return 0;
}

evsam::DType compute_dtype(evsam::DType dtype) {
  return dtype == evsam::DType::float64 ? dtype : evsam::DType::float32;
}

void check(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

evsam::DType parse_dtype(const std::string& name) {
  if (name == "float16") return evsam::DType::float16;
  if (name == "bfloat16") return evsam::DType::bfloat16;
  if (name == "float32") return evsam::DType::float32;
  check(name == "float64",
        "dtype must be float16, bfloat16, float32 or float64, got '" + name + "'");
  return evsam::DType::float64;
}

void check_at_least(const char* name, std::int64_t value, std::int64_t least) {
  check(value >= least, std::string(name) + " must be at least " + std::to_string(least) +
                            ", got " + std::to_string(value));
}

// The pointer to `count` elements. PyTorch gives tensors without elements the address 0.
void* pointer(const char* name, Address address, evsam::DType dtype, std::int64_t count) {
  check(address > 0 || (address == 0 && count == 0),
        std::string(name) + " must be the address of a tensor's elements, got " +
            std::to_string(address));
  check(address % size_of(dtype) == 0,
        std::string(name) + " must be aligned to its element size, got " + std::to_string(address));
  return reinterpret_cast<void*>(address);
}

const void* optional_pointer(const char* name, std::optional<Address> address, evsam::DType dtype,
                             std::int64_t count) {
  return address.has_value() ? pointer(name, *address, dtype, count) : nullptr;
}

// The product of `sizes`, as many elements of `dtype`, whose size in bytes must fit.
std::int64_t element_count(const std::vector<std::int64_t>& sizes, evsam::DType dtype) {
  std::int64_t count = 1;
  for (const std::int64_t size : sizes) {
    check(size == 0 || count <= std::numeric_limits<std::int64_t>::max() / size / size_of(dtype),
          "a tensor would have more elements than memory can hold");
    count *= size;
  }
  return count;
}

// The type of what is stored as one of the types that convolutions and attention take.
evsam::DType parse_storage_dtype(const std::string& name) {
  const evsam::DType dtype = parse_dtype(name);
  check(dtype != evsam::DType::float64, "dtype must be float16, bfloat16 or float32, got 'float64'");
  return dtype;
}

evsam::Activation parse_activation(const std::optional<std::string>& name) {
  using evsam::Activation;
  if (!name.has_value()) return Activation::none;
  if (*name == "relu") return Activation::relu;
  if (*name == "relu6") return Activation::relu6;
  if (*name == "hswish") return Activation::hswish;
  if (*name == "silu") return Activation::silu;
  check(*name == "gelu",
        "activation must be None, relu, relu6, hswish, silu or gelu, got '" + *name + "'");
  return Activation::gelu;
}

void check_kernel(std::int64_t kernel) {
  check(kernel >= 1 && kernel % 2 == 1,
        "kernel must be odd and at least 1, got " + std::to_string(kernel));
}

std::int64_t size_after(std::int64_t size, std::int64_t stride) { return (size - 1) / stride + 1; }

// The part that all convolutions' arguments have in common: maps, sizes and packed weights.
template <class Args, class Packed>
Args map_arguments(const Packed& packed, Address x, Address y, std::optional<Address> residual,
                   std::int64_t batch, std::int64_t height, std::int64_t width, std::int64_t stride,
                   std::int64_t in_channels, std::int64_t out_channels, int num_threads) {
  packed.check_isa();
  check_at_least("batch", batch, 0);
  check_at_least("height", height, 1);
  check_at_least("width", width, 1);
  check_at_least("num_threads", num_threads, 1);
  const evsam::DType dtype = packed.dtype();
  const std::int64_t in_count = element_count({batch, height, width, in_channels}, dtype);
  const std::int64_t out_count = element_count(
      {batch, size_after(height, stride), size_after(width, stride), out_channels}, dtype);
  Args args{};
  args.x = pointer("x", x, dtype, in_count);
  args.y = pointer("y", y, dtype, out_count);
  args.residual = optional_pointer("residual", residual, dtype, out_count);
  args.packed = packed.data();
  args.batch = batch;
  args.height = height;
  args.width = width;
  args.dtype = dtype;
  args.num_threads = num_threads;
  return args;
}

void layer_norm_2d(Address x, Address y, std::optional<Address> weight, std::optional<Address> bias,
                   std::int64_t rows, std::int64_t channels, double eps,
                   const std::string& dtype_name, int num_threads, Launches* later) {
  check_at_least("rows", rows, 0);
  check_at_least("channels", channels, 1);
  check_at_least("num_threads", num_threads, 1);
  const evsam::DType dtype = parse_dtype(dtype_name);
  const evsam::DType affine_dtype = compute_dtype(dtype);
  const std::int64_t count = element_count({rows, channels}, dtype);
  evsam::LayerNorm2dArgs args;
  args.x = pointer("x", x, dtype, count);
  args.y = pointer("y", y, dtype, count);
  args.weight = optional_pointer("weight", weight, affine_dtype, channels);
  args.bias = optional_pointer("bias", bias, affine_dtype, channels);
  args.rows = rows;
  args.channels = channels;
  args.eps = eps;
  args.dtype = dtype;
  args.num_threads = num_threads;
  launch(evsam::layer_norm_2d, args, later);
}

void trim() {
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
}

using ConvActPacked = Packed<evsam::ConvActWeights, evsam::conv_act_pack>;
using FusedMBConvPacked = Packed<evsam::FusedMBConvWeights, evsam::fused_mbconv_pack>;
using MBConvPacked = Packed<evsam::MBConvWeights, evsam::mbconv_pack>;
using MultiScaleAttentionPacked =
    Packed<evsam::MultiScaleAttentionWeights, evsam::multi_scale_attention_pack>;

ConvActPacked pack_conv_act(Address weight, std::optional<Address> bias, std::int64_t in_channels,
                            std::int64_t out_channels, std::int64_t kernel, std::int64_t stride,
                            std::int64_t dilation, std::int64_t groups,
                            const std::string& dtype_name) {
  check_at_least("in_channels", in_channels, 1);
  check_at_least("out_channels", out_channels, 1);
  check_kernel(kernel);
  check_at_least("stride", stride, 1);
  check_at_least("dilation", dilation, 1);
  check_at_least("groups", groups, 1);
  check(in_channels % groups == 0 && out_channels % groups == 0,
        "groups must divide in_channels and out_channels, got " + std::to_string(groups));
  evsam::ConvActWeights weights{};
  weights.dtype = parse_storage_dtype(dtype_name);
  const std::int64_t count =
      element_count({out_channels, in_channels / groups, kernel, kernel}, weights.dtype);
  weights.weight = pointer("weight", weight, weights.dtype, count);
  weights.bias = optional_pointer("bias", bias, weights.dtype, out_channels);
  weights.conv = {in_channels, out_channels, kernel, stride, dilation, groups};
  return ConvActPacked(weights);
}

void conv_act(const ConvActPacked& packed, Address x, Address y, std::optional<Address> residual,
              std::int64_t batch, std::int64_t height, std::int64_t width,
              const std::optional<std::string>& activation, int num_threads, Launches* later) {
  const evsam::ConvShape& conv = packed.weights().conv;
  auto args = map_arguments<evsam::ConvActArgs>(packed, x, y, residual, batch, height, width,
                                                conv.stride, conv.in_channels, conv.out_channels,
                                                num_threads);
  args.conv = conv;
  args.activation = parse_activation(activation);
  launch(evsam::conv_act, args, later);
}

FusedMBConvPacked pack_fused_mbconv(Address spatial_weight, std::optional<Address> spatial_bias,
                                    Address point_weight, std::optional<Address> point_bias,
                                    std::int64_t in_channels, std::int64_t mid_channels,
                                    std::int64_t out_channels, std::int64_t kernel,
                                    std::int64_t stride, bool large_maps,
                                    const std::string& dtype_name) {
  check_at_least("in_channels", in_channels, 1);
  check_at_least("mid_channels", mid_channels, 1);
  check_at_least("out_channels", out_channels, 1);
  check_kernel(kernel);
  check_at_least("stride", stride, 1);
  evsam::FusedMBConvWeights weights{};
  const evsam::DType dtype = weights.dtype = parse_storage_dtype(dtype_name);
  weights.spatial_weight =
      pointer("spatial_weight", spatial_weight, dtype,
              element_count({mid_channels, in_channels, kernel, kernel}, dtype));
  weights.spatial_bias = optional_pointer("spatial_bias", spatial_bias, dtype, mid_channels);
  weights.point_weight = pointer("point_weight", point_weight, dtype,
                                 element_count({out_channels, mid_channels}, dtype));
  weights.point_bias = optional_pointer("point_bias", point_bias, dtype, out_channels);
  weights.shape = {in_channels, mid_channels, out_channels, kernel, stride, large_maps};
  return FusedMBConvPacked(weights);
}

void fused_mbconv(const FusedMBConvPacked& packed, Address x, Address y,
                  std::optional<Address> residual, std::int64_t batch, std::int64_t height,
                  std::int64_t width, const std::optional<std::string>& activation,
                  int num_threads, Launches* later) {
  const evsam::FusedMBConvShape& shape = packed.weights().shape;
  auto args = map_arguments<evsam::FusedMBConvArgs>(packed, x, y, residual, batch, height, width,
                                                    shape.stride, shape.in_channels,
                                                    shape.out_channels, num_threads);
  args.shape = shape;
  args.activation = parse_activation(activation);
  launch(evsam::fused_mbconv, args, later);
}

MBConvPacked pack_mbconv(Address expand_weight, std::optional<Address> expand_bias,
                         Address depth_weight, std::optional<Address> depth_bias,
                         Address point_weight, std::optional<Address> point_bias,
                         std::int64_t in_channels, std::int64_t mid_channels,
                         std::int64_t out_channels, std::int64_t kernel, std::int64_t stride,
                         const std::string& dtype_name, bool stay) {
  check_at_least("in_channels", in_channels, 1);
  check_at_least("mid_channels", mid_channels, 1);
  check_at_least("out_channels", out_channels, 1);
  check_kernel(kernel);
  check_at_least("stride", stride, 1);
  evsam::MBConvWeights weights{};
  const evsam::DType dtype = weights.dtype = parse_storage_dtype(dtype_name);
  check(!stay || dtype == evsam::DType::float32, "stay must be False for " + dtype_name);
  weights.stay = stay;
  weights.expand_weight = pointer("expand_weight", expand_weight, dtype,
                                  element_count({mid_channels, in_channels}, dtype));
  weights.expand_bias = optional_pointer("expand_bias", expand_bias, dtype, mid_channels);
  weights.depth_weight = pointer("depth_weight", depth_weight, dtype,
                                 element_count({mid_channels, kernel, kernel}, dtype));
  weights.depth_bias = optional_pointer("depth_bias", depth_bias, dtype, mid_channels);
  weights.point_weight = pointer("point_weight", point_weight, dtype,
                                 element_count({out_channels, mid_channels}, dtype));
  weights.point_bias = optional_pointer("point_bias", point_bias, dtype, out_channels);
  weights.shape = {in_channels, mid_channels, out_channels, kernel, stride};
  return MBConvPacked(weights);
}

void mbconv(const MBConvPacked& packed, std::optional<Address> expand_weight,
            std::optional<Address> point_weight, Address x, Address y,
            std::optional<Address> residual, std::int64_t batch, std::int64_t height, std::int64_t width,
            const std::optional<std::string>& activation, int num_threads, Launches* later) {
  const evsam::MBConvShape& shape = packed.weights().shape;
  auto args = map_arguments<evsam::MBConvArgs>(packed, x, y, residual, batch, height, width,
                                               shape.stride, shape.in_channels, shape.out_channels,
                                               num_threads);
  check(expand_weight.has_value() == packed.weights().stay && point_weight.has_value() == packed.weights().stay,
        "expand_weight and point_weight must be given where they stay, and be None where they do not");
  args.expand_weight = optional_pointer("expand_weight", expand_weight, args.dtype, 1);
  args.point_weight = optional_pointer("point_weight", point_weight, args.dtype, 1);
  args.shape = shape;
  args.activation = parse_activation(activation);
  launch(evsam::mbconv, args, later);
}

using Addresses = std::vector<Address>;

MultiScaleAttentionPacked pack_multi_scale_attention(
    Address qkv_weight, std::optional<Address> qkv_bias, const Addresses& depth_weights,
    const Addresses& depth_biases, const Addresses& group_weights, const Addresses& group_biases,
    Address proj_weight, std::optional<Address> proj_bias, std::int64_t in_channels,
    std::int64_t heads, std::int64_t head_dim, std::int64_t out_channels,
    const std::vector<std::int64_t>& kernels, const std::string& dtype_name) {
  check_at_least("in_channels", in_channels, 1);
  check_at_least("heads", heads, 1);
  check_at_least("head_dim", head_dim, 1);
  check_at_least("out_channels", out_channels, 1);
  const std::size_t scales = kernels.size();
  check(scales <= static_cast<std::size_t>(evsam::max_scales),
        "kernels must hold at most " + std::to_string(evsam::max_scales) + " scales, got " +
            std::to_string(scales));
  check(depth_weights.size() == scales && group_weights.size() == scales &&
            (depth_biases.empty() || depth_biases.size() == scales) &&
            (group_biases.empty() || group_biases.size() == scales),
        "weights and biases must hold one tensor per scale");
  evsam::MultiScaleAttentionWeights weights{};
  const evsam::DType dtype = weights.dtype = parse_storage_dtype(dtype_name);
  const std::int64_t width = element_count({heads, 3, head_dim}, dtype);
  weights.shape.in_channels = in_channels;
  weights.shape.heads = heads;
  weights.shape.head_dim = head_dim;
  weights.shape.out_channels = out_channels;
  weights.shape.scales = static_cast<std::int64_t>(scales);
  for (std::size_t s = 0; s < scales; ++s) {
    const std::int64_t kernel = kernels[s];
    check_kernel(kernel);
    weights.shape.kernels[s] = kernel;
    weights.depth_weights[s] = pointer("depth_weights", depth_weights[s], dtype,
                                       element_count({width, kernel, kernel}, dtype));
    weights.group_weights[s] = pointer("group_weights", group_weights[s], dtype,
                                       element_count({width, head_dim}, dtype));
    if (!depth_biases.empty())
      weights.depth_biases[s] = pointer("depth_biases", depth_biases[s], dtype, width);
    if (!group_biases.empty())
      weights.group_biases[s] = pointer("group_biases", group_biases[s], dtype, width);
  }
  weights.qkv_weight =
      pointer("qkv_weight", qkv_weight, dtype, element_count({width, in_channels}, dtype));
  weights.qkv_bias = optional_pointer("qkv_bias", qkv_bias, dtype, width);
  const std::int64_t attended = element_count({1 + weights.shape.scales, heads, head_dim}, dtype);
  weights.proj_weight =
      pointer("proj_weight", proj_weight, dtype, element_count({out_channels, attended}, dtype));
  weights.proj_bias = optional_pointer("proj_bias", proj_bias, dtype, out_channels);
  return MultiScaleAttentionPacked(weights);
}

void multi_scale_attention(const MultiScaleAttentionPacked& packed, Address x, Address y,
                           std::optional<Address> residual, std::int64_t batch,
                           std::int64_t height, std::int64_t width, double eps, int num_threads, Launches* later) {
  const evsam::MultiScaleAttentionShape& shape = packed.weights().shape;
  auto args = map_arguments<evsam::MultiScaleAttentionArgs>(
      packed, x, y, residual, batch, height, width, 1, shape.in_channels, shape.out_channels,
      num_threads);
  args.shape = shape;
  args.eps = eps;
  launch(evsam::multi_scale_attention, args, later);
}

void relu_linear_attention(Address qkv, Address y, std::int64_t batch, std::int64_t tokens,
                           std::int64_t heads, std::int64_t head_dim, double eps,
                           const std::string& dtype_name, int num_threads, Launches* later) {
  check_at_least("batch", batch, 0);
  check_at_least("tokens", tokens, 1);
  check_at_least("heads", heads, 1);
  check_at_least("head_dim", head_dim, 1);
  check_at_least("num_threads", num_threads, 1);
  evsam::ReluLinearAttentionArgs args{};
  args.dtype = parse_storage_dtype(dtype_name);
  const std::int64_t count = element_count({batch, tokens, heads, 3, head_dim}, args.dtype);
  args.qkv = pointer("qkv", qkv, args.dtype, count);
  args.y = pointer("y", y, args.dtype, count / 3);
  args.batch = batch;
  args.tokens = tokens;
  args.heads = heads;
  args.head_dim = head_dim;
  args.eps = eps;
  args.num_threads = num_threads;
  launch(evsam::relu_linear_attention, args, later);
}

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

py::tuple update_keys(const Array<float>& tokens, const Array<float>& queries,
                      const Optional& offsets, const Optional& scales, const Optional& basis,
                      const Optional& row_tokens, const std::vector<ThreeArrays>& updates,
                      const Array<float>& square, const Array<float>& base,
                      const Array<float>& rows, double eps, int num_threads) {
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
  Array<float> new_basis({batch, tiles, new_rank, tile_positions});
  Array<float> new_scales({batch, tiles, tile_positions});
  args.new_basis = new_basis.mutable_data();
  args.new_scales = new_scales.mutable_data();
  {
    const py::gil_scoped_release without_gil;
    evsam::update_keys(args);
  }
  return py::make_tuple(new_basis, new_scales);
}

void upscale_masks(const Array<float>& base, const Array<float>& scales,
                   const Array<float>& basis, const Array<float>& rows,
                   const Array<float>& offsets, const Array<float>& norm_weight,
                   const Array<float>& norm_bias, double eps, const Array<float>& weight,
                   const Array<float>& bias, const Array<std::int64_t>& first,
                   const Array<float>& vectors, Array<float> masks, std::int64_t height,
                   std::int64_t width, int num_threads) {
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

void upsample_add(const Addresses& maps,
                  const std::vector<std::pair<std::int64_t, std::int64_t>>& sizes, Address y,
                  std::int64_t batch, std::int64_t height, std::int64_t width,
                  std::int64_t channels, const std::string& dtype_name, int num_threads, Launches* later) {
  check(!maps.empty(), "maps must hold at least one map");
  check(sizes.size() == maps.size(), "sizes must hold one size per map");
  check_at_least("batch", batch, 0);
  check_at_least("height", height, 1);
  check_at_least("width", width, 1);
  check_at_least("channels", channels, 1);
  check_at_least("num_threads", num_threads, 1);
  evsam::UpsampleAddArgs args{};
  args.dtype = parse_storage_dtype(dtype_name);
  std::vector<evsam::UpsampleAddMap> checked;
  for (std::size_t i = 0; i < maps.size(); ++i) {
    const auto [map_height, map_width] = sizes[i];
    check_at_least("the height of a map", map_height, 1);
    check_at_least("the width of a map", map_width, 1);
    const std::int64_t count = element_count({batch, map_height, map_width, channels}, args.dtype);
    checked.push_back({pointer("maps", maps[i], args.dtype, count), map_height, map_width});
  }
  args.maps = checked.data();
  args.count = static_cast<std::int64_t>(checked.size());
  args.y = pointer("y", y, args.dtype, element_count({batch, height, width, channels}, args.dtype));
  args.batch = batch;
  args.height = height;
  args.width = width;
  args.channels = channels;
  args.num_threads = num_threads;
  if (later == nullptr) {
    const py::gil_scoped_release without_gil;
    return evsam::upsample_add(args);
  }
  later->add([args, checked](const Launches::Maps& all) {
    evsam::UpsampleAddArgs found = args;
    std::vector<evsam::UpsampleAddMap> maps = checked;
    for (evsam::UpsampleAddMap& map : maps) map.x = Launches::found(map.x, all);
    found.maps = maps.data();
    found.y = Launches::found(args.y, all);
    evsam::upsample_add(found);
  });
}

template <class T>
void bind_packed(py::module_& module, const char* name) {
  py::class_<T>(module, name, "Weights in the form that the kernels of one instruction set read.")
      .def_property_readonly("nbytes", &T::bytes, "Bytes that they take.")
      .def_property_readonly("isa", &T::isa, "Name of the instruction set.");
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  using namespace py::literals;
  module.doc() = "C++ kernels of evsam_kernels; tensors are passed as addresses and sizes.";

  module.def("available_isas", &evsam::available_isas,
             "Names of the instruction sets that were built and run on this CPU, the plainest first.");
  module.def("isa", &evsam::isa, "Name of the instruction set in use.");
  module.def("use_isa", &evsam::use_isa, "name"_a,
             "Use this instruction set from now on, in place of what EVSAM_CPU_ISA says.");
  module.def("trim", &trim, py::call_guard<py::gil_scoped_release>(),
             "Give the system back what is free in the heap, where the C library can do that.");

  py::class_<Launches>(module, "Launches", "Launches of kernels that are repeated with other maps.")
      .def(py::init<>())
      .def_static("stand_in", &Launches::stand_in, "number"_a,
                  "What a launch that is added is given as the address of map `number`.")
      .def("run", &Launches::run, "maps"_a, py::call_guard<py::gil_scoped_release>(),
           "All of them, in turn, the maps being at these addresses.");

  module.def("layer_norm_2d", &layer_norm_2d, py::kw_only(), "x"_a, "y"_a, "weight"_a, "bias"_a,
             "rows"_a, "channels"_a, "eps"_a, "dtype"_a, "num_threads"_a, "later"_a = py::none(),
             "LayerNorm over rows of channels; see csrc/include/evsam/layer_norm_2d.h.");

  bind_packed<ConvActPacked>(module, "ConvActPacked");
  bind_packed<FusedMBConvPacked>(module, "FusedMBConvPacked");
  bind_packed<MBConvPacked>(module, "MBConvPacked");
  bind_packed<MultiScaleAttentionPacked>(module, "MultiScaleAttentionPacked");

  module.def("pack_conv_act", &pack_conv_act, py::kw_only(), "weight"_a, "bias"_a, "in_channels"_a,
             "out_channels"_a, "kernel"_a, "stride"_a, "dilation"_a, "groups"_a,
             "dtype"_a, "Weights for conv_act; see csrc/include/evsam/conv_act.h.");
  module.def("conv_act", &conv_act, py::kw_only(), "packed"_a, "x"_a, "y"_a, "residual"_a,
             "batch"_a, "height"_a, "width"_a, "activation"_a, "num_threads"_a, "later"_a = py::none(),
             "Convolution, bias, activation, residual; see csrc/include/evsam/conv_act.h.");
  module.def("pack_fused_mbconv", &pack_fused_mbconv, py::kw_only(), "spatial_weight"_a,
             "spatial_bias"_a, "point_weight"_a, "point_bias"_a, "in_channels"_a, "mid_channels"_a,
             "out_channels"_a, "kernel"_a, "stride"_a, "large_maps"_a, "dtype"_a,
             "Weights for fused_mbconv; see csrc/include/evsam/fused_mbconv.h.");
  module.def("fused_mbconv", &fused_mbconv, py::kw_only(), "packed"_a, "x"_a, "y"_a, "residual"_a,
             "batch"_a, "height"_a, "width"_a, "activation"_a, "num_threads"_a, "later"_a = py::none(),
             "Convolution, activation, 1x1 convolution; see csrc/include/evsam/fused_mbconv.h.");
  module.def("pack_mbconv", &pack_mbconv, py::kw_only(), "expand_weight"_a, "expand_bias"_a,
             "depth_weight"_a, "depth_bias"_a, "point_weight"_a, "point_bias"_a, "in_channels"_a,
             "mid_channels"_a, "out_channels"_a, "kernel"_a, "stride"_a, "dtype"_a, "stay"_a,
             "Weights for mbconv; see csrc/include/evsam/mbconv.h.");
  module.def("mbconv", &mbconv, py::kw_only(), "packed"_a, "expand_weight"_a, "point_weight"_a, "x"_a,
             "y"_a, "residual"_a, "batch"_a, "height"_a, "width"_a, "activation"_a, "num_threads"_a, "later"_a = py::none(),
             "1x1, depthwise and 1x1 convolution; see csrc/include/evsam/mbconv.h.");
  module.def("pack_multi_scale_attention", &pack_multi_scale_attention, py::kw_only(),
             "qkv_weight"_a, "qkv_bias"_a, "depth_weights"_a, "depth_biases"_a, "group_weights"_a,
             "group_biases"_a, "proj_weight"_a, "proj_bias"_a, "in_channels"_a, "heads"_a,
             "head_dim"_a, "out_channels"_a, "kernels"_a, "dtype"_a,
             "Weights for multi_scale_attention; see csrc/include/evsam/multi_scale_attention.h.");
  module.def("multi_scale_attention", &multi_scale_attention, py::kw_only(), "packed"_a, "x"_a,
             "y"_a, "residual"_a, "batch"_a, "height"_a, "width"_a, "eps"_a, "num_threads"_a, "later"_a = py::none(),
             "The LiteMLA block; see csrc/include/evsam/multi_scale_attention.h.");
  module.def("relu_linear_attention", &relu_linear_attention, py::kw_only(), "qkv"_a, "y"_a,
             "batch"_a, "tokens"_a, "heads"_a, "head_dim"_a, "eps"_a, "dtype"_a, "num_threads"_a, "later"_a = py::none(),
             "Linear attention of every head; see csrc/include/evsam/relu_linear_attention.h.");
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
  module.def("map_values", &map_values, py::kw_only(), "values"_a, "groups"_a, "num_threads"_a,
             "Values of tokens times tables; see csrc/include/evsam/map_values.h.");
  module.def("update_keys", &update_keys, py::kw_only(), py::arg("tokens").noconvert(),
             py::arg("queries").noconvert(), py::arg("offsets").noconvert(),
             py::arg("scales").noconvert(), py::arg("basis").noconvert(),
             py::arg("row_tokens").noconvert(), "updates"_a, py::arg("square").noconvert(),
             py::arg("base").noconvert(), py::arg("rows").noconvert(),
             "eps"_a, "num_threads"_a,
             "Softmax over tokens and LayerNorm's scale; see csrc/include/evsam/update_keys.h.");
  module.def("upscale_masks", &upscale_masks, py::kw_only(), py::arg("base").noconvert(),
             py::arg("scales").noconvert(), py::arg("basis").noconvert(),
             py::arg("rows").noconvert(), py::arg("offsets").noconvert(),
             py::arg("norm_weight").noconvert(), py::arg("norm_bias").noconvert(), "eps"_a,
             py::arg("weight").noconvert(), py::arg("bias").noconvert(),
             py::arg("first").noconvert(), py::arg("vectors").noconvert(), py::arg("masks").noconvert(), "height"_a, "width"_a,
             "num_threads"_a,
             "Masks from the image's keys; see csrc/include/evsam/upscale_masks.h.");
  module.def("upsample_add", &upsample_add, py::kw_only(), "maps"_a, "sizes"_a, "y"_a, "batch"_a,
             "height"_a, "width"_a, "channels"_a, "dtype"_a, "num_threads"_a, "later"_a = py::none(),
             "Sum of resized maps of these sizes (height, width); see csrc/include/evsam/upsample_add.h.");
}
