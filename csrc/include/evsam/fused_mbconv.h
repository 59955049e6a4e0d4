// k x k convolution, activation and 1x1 convolution of an NHWC map.
#pragma once

#include <cstdint>

#include "evsam/conv_act.h"

namespace evsam {

// With large_maps, meant for maps of 32 x 32 pixels and more, a first convolution of 3x3 with stride 1 takes
// fewer multiplications; its rounding errors are then about those of a plain sum over all taps and channels,
// without it half of them.
struct FusedMBConvShape {
  std::int64_t in_channels, mid_channels, out_channels;
  std::int64_t kernel, stride;  // of the first convolution
  bool large_maps;              // see above
};

struct FusedMBConvWeights {
  const void* spatial_weight;  // [mid_channels, in_channels, kernel, kernel]
  const void* spatial_bias;    // [mid_channels]; null for zeros
  const void* point_weight;    // [out_channels, mid_channels]
  const void* point_bias;      // [out_channels]; null for zeros
  FusedMBConvShape shape;
  DType dtype;  // of all of these: float16, bfloat16 or float32
};

struct FusedMBConvArgs {
  const void* x;         // [batch, height, width, in_channels]
  void* y;               // [batch, height', width', out_channels]; may be residual, overlaps nothing else
  const void* residual;  // as y; null for none
  const void* packed;    // what fused_mbconv_pack wrote with the same instruction set
  std::int64_t batch, height, width;  // of x; those of y are (size - 1) / stride + 1
  FusedMBConvShape shape;
  Activation activation;
  DType dtype;      // of x, y and residual, as that of the weights
  int num_threads;  // at most this many; the result does not depend on it
};

// Bytes that the packed weights take, which are written to `packed` (aligned to 64) unless it is null.
std::int64_t fused_mbconv_pack(const FusedMBConvWeights& weights, void* packed);

// y = conv1x1(activation(conv(x) + bias)) + bias + residual. Throws std::bad_alloc.
void fused_mbconv(const FusedMBConvArgs& args);

}  // namespace evsam
