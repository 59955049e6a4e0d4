// 1x1 convolution, depthwise convolution and 1x1 convolution of an NHWC map.
#pragma once

#include <cstdint>

#include "evsam/activation.h"
#include "evsam/dtype.h"

namespace evsam {

struct MBConvShape {
  std::int64_t in_channels, mid_channels, out_channels;
  std::int64_t kernel, stride;  // of the depthwise convolution
};

struct MBConvWeights {
  const void* expand_weight;  // [mid_channels, in_channels]
  const void* expand_bias;    // [mid_channels]; null for zeros
  const void* depth_weight;   // [mid_channels, kernel, kernel]
  const void* depth_bias;     // [mid_channels]; null for zeros
  const void* point_weight;   // [out_channels, mid_channels]
  const void* point_bias;     // [out_channels]; null for zeros
  MBConvShape shape;
  DType dtype;  // of all of these: float16, bfloat16 or float32
  bool stay;    // whether the weights of the 1x1 convolutions stay there for mbconv() to read
};

struct MBConvArgs {
  const void* x;         // [batch, height, width, in_channels]
  void* y;               // [batch, height', width', out_channels]; may be residual, overlaps nothing else
  const void* residual;  // as y; null for none
  const void* packed;    // what mbconv_pack wrote with the same instruction set
  const void *expand_weight, *point_weight;  // as mbconv_pack had them, if they stay; null otherwise
  std::int64_t batch, height, width;  // of x; those of y are (size - 1) / stride + 1
  MBConvShape shape;
  Activation activation;  // after the first and after the second convolution
  DType dtype;      // of x, y and residual, as that of the weights
  int num_threads;  // at most this many; the result does not depend on it
};

// Bytes that the packed weights take, which are written to `packed` (aligned to 64) unless it is null.
std::int64_t mbconv_pack(const MBConvWeights& weights, void* packed);

// y = conv1x1(act(depthwise(act(conv1x1(x) + bias)) + bias)) + bias + residual. Throws std::bad_alloc.
void mbconv(const MBConvArgs& args);

}  // namespace evsam
