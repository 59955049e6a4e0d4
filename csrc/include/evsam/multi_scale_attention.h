// The LiteMLA block on an NHWC map: qkv, aggregation at every scale, attention, projection.
#pragma once

#include <cstdint>

#include "evsam/dtype.h"

namespace evsam {

constexpr std::int64_t max_scales = 8;

struct MultiScaleAttentionShape {
  std::int64_t in_channels, heads, head_dim, out_channels;
  std::int64_t scales;               // at most max_scales, beside the qkv map itself
  std::int64_t kernels[max_scales];  // of the depthwise convolution of each
};

// With width = heads * 3 * head_dim.
struct MultiScaleAttentionWeights {
  const void* qkv_weight;                 // [width, in_channels]
  const void* qkv_bias;                   // [width]; null for zeros
  const void* depth_weights[max_scales];  // of each scale [width, kernel, kernel]
  const void* depth_biases[max_scales];   // of each scale [width]; null for zeros
  const void* group_weights[max_scales];  // of each scale [width, head_dim], in 3 * heads groups
  const void* group_biases[max_scales];   // of each scale [width]; null for zeros
  const void* proj_weight;                // [out_channels, (1 + scales) * heads * head_dim]
  const void* proj_bias;                  // [out_channels]; null for zeros
  MultiScaleAttentionShape shape;
  DType dtype;  // of all of these: float16, bfloat16 or float32
  bool stay;    // whether qkv_weight stays there for multi_scale_attention() to read
};

struct MultiScaleAttentionArgs {
  const void* x;         // [batch, height, width, in_channels]
  void* y;               // [batch, height, width, out_channels]; may be residual, overlaps nothing else
  const void* residual;  // as y; null for none
  const void* packed;    // what multi_scale_attention_pack wrote with the same instruction set
  const void* qkv_weight;  // as multi_scale_attention_pack had it, if it stays; null otherwise
  std::int64_t batch, height, width;
  MultiScaleAttentionShape shape;
  double eps;       // added to the denominator of the attention
  DType dtype;      // of x, y and residual, as that of the weights
  int num_threads;  // at most this many; the result does not depend on it
};

// Bytes that the packed weights take, which are written to `packed` (aligned to 64) unless it is null.
std::int64_t multi_scale_attention_pack(const MultiScaleAttentionWeights& weights, void* packed);

// Throws std::bad_alloc.
void multi_scale_attention(const MultiScaleAttentionArgs& args);

}  // namespace evsam
