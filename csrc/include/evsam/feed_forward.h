// Linear layers of rows, a residual and LayerNorm.
#pragma once

#include <cstdint>

namespace evsam {

// What conv_act_pack wrote of a 1x1 convolution with the same instruction set.
struct LinearLayer {
  const void* packed;
  std::int64_t in_columns, out_columns;
};

// Everything is float32.
struct FeedForwardArgs {
  const LinearLayer* layers;  // [layer_count], each taking as many columns as the one before gives
  const float* x;             // [rows, in_columns of the first layer]
  const float* residual;      // [rows, out_columns of the last layer]; null for none
  const float* norm_weight;   // [out_columns]; null for no LayerNorm, as norm_bias
  const float* norm_bias;
  float* y;                   // [rows, out_columns], overlaps nothing else
  std::int64_t layer_count, rows;
  double eps;
  int num_threads;  // at most this many; the result does not depend on it
};

// y = LayerNorm(residual + the last layer of relu of the layer before of ... x). Throws std::bad_alloc.
void feed_forward(const FeedForwardArgs& args);

}  // namespace evsam
