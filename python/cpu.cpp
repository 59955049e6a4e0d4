// The module evsam_kernels._cpu: checks what Python passes and calls the C++ kernels without the GIL.

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

#include "evsam/conv_act.h"
#include "evsam/fused_mbconv.h"
#include "evsam/isa.h"
#include "evsam/layer_norm_2d.h"
#include "evsam/mbconv.h"
#include "evsam/multi_scale_attention.h"
#include "evsam/relu_linear_attention.h"
#include "evsam/upsample_add.h"
#include "checks.h"
#include "launches.h"
#include "masks.h"
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

evsam::DType parse_dtype(const std::string& name) {
  if (name == "float16") return evsam::DType::float16;
  if (name == "bfloat16") return evsam::DType::bfloat16;
  if (name == "float32") return evsam::DType::float32;
  check(name == "float64",
        "dtype must be float16, bfloat16, float32 or float64, got '" + name + "'");
  return evsam::DType::float64;
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
    const std::vector<std::int64_t>& kernels, const std::string& dtype_name, bool stay) {
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
  weights.stay = stay;
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

void multi_scale_attention(const MultiScaleAttentionPacked& packed, std::optional<Address> qkv_weight,
                           Address x, Address y, std::optional<Address> residual, std::int64_t batch,
                           std::int64_t height, std::int64_t width, double eps, int num_threads, Launches* later) {
  const evsam::MultiScaleAttentionShape& shape = packed.weights().shape;
  auto args = map_arguments<evsam::MultiScaleAttentionArgs>(
      packed, x, y, residual, batch, height, width, 1, shape.in_channels, shape.out_channels,
      num_threads);
  check(qkv_weight.has_value() == packed.weights().stay,
        "qkv_weight must be given where it stays, and be None where it does not");
  args.qkv_weight = optional_pointer("qkv_weight", qkv_weight, args.dtype, 1);
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
      .def_static("memory", &Launches::memory, "bytes"_a,
                  "Address of memory for maps that are not returned, the calling thread's until it asks for more.")
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
             "head_dim"_a, "out_channels"_a, "kernels"_a, "dtype"_a, "stay"_a,
             "Weights for multi_scale_attention; see csrc/include/evsam/multi_scale_attention.h.");
  module.def("multi_scale_attention", &multi_scale_attention, py::kw_only(), "packed"_a,
             "qkv_weight"_a, "x"_a, "y"_a, "residual"_a, "batch"_a, "height"_a, "width"_a, "eps"_a,
             "num_threads"_a, "later"_a = py::none(),
             "The LiteMLA block; see csrc/include/evsam/multi_scale_attention.h.");
  module.def("relu_linear_attention", &relu_linear_attention, py::kw_only(), "qkv"_a, "y"_a,
             "batch"_a, "tokens"_a, "heads"_a, "head_dim"_a, "eps"_a, "dtype"_a, "num_threads"_a, "later"_a = py::none(),
             "Linear attention of every head; see csrc/include/evsam/relu_linear_attention.h.");
  bind_masks(module);
  module.def("upsample_add", &upsample_add, py::kw_only(), "maps"_a, "sizes"_a, "y"_a, "batch"_a,
             "height"_a, "width"_a, "channels"_a, "dtype"_a, "num_threads"_a, "later"_a = py::none(),
             "Sum of resized maps of these sizes (height, width); see csrc/include/evsam/upsample_add.h.");
}
