// Convolution of an NHWC map, bias, activation and residual.
#pragma once

#include <cstdint>

#include "evsam/activation.h"
#include "evsam/dtype.h"

namespace evsam {

// A square, odd kernel, padded by kernel / 2 * dilation zeros on every side.
struct ConvShape {
  std::int64_t in_channels;   // a multiple of groups
  std::int64_t out_channels;  // a multiple of groups
  std::int64_t kernel;
  std::int64_t stride;
  std::int64_t dilation;
  std::int64_t groups;
};

struct ConvActWeights {
  const void* weight;  // [out_channels, in_channels / groups, kernel, kernel]
  const void* bias;    // [out_channels]; null for zeros
  ConvShape conv;
  DType dtype;         // of weight and bias: float16, bfloat16 or float32
};

struct ConvActArgs {
  const void* x;         // [batch, height, width, in_channels]
  void* y;               // [batch, height', width', out_channels]; may be residual, overlaps nothing else
  const void* residual;  // as y, added after the activation; null for none
  const void* packed;    // what conv_act_pack wrote with the same instruction set
  std::int64_t batch, height, width;  // of x; those of y are (size - 1) / stride + 1
  ConvShape conv;
  Activation activation;
  DType dtype;      // of x, y and residual, as that of the weights
  int num_threads;  // at most this many; the result does not depend on it
};

// Bytes that the packed weights take, which are written to `packed` (aligned to 64) unless it is null.
std::int64_t conv_act_pack(const ConvActWeights& weights, void* packed);

// y = activation(conv(x) + bias) + residual. Throws std::bad_alloc.
void conv_act(const ConvActArgs& args);

}  // namespace evsam
