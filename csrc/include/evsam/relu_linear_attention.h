// ReLU linear attention over the pixels of an NHWC map.
#pragma once

#include <cstdint>

#include "evsam/dtype.h"

namespace evsam {

struct ReluLinearAttentionArgs {
  const void* qkv;  // [batch, tokens, heads, 3, head_dim]: q, k and v of every head
  void* y;          // [batch, tokens, heads, head_dim], must not overlap qkv
  std::int64_t batch, tokens, heads, head_dim;
  double eps;       // added to the denominator
  DType dtype;      // of qkv and y: float16, bfloat16 or float32
  int num_threads;  // at most this many; the result does not depend on it
};

// y = relu(q) (relu(k)^T v) / (relu(q) sum relu(k) + eps). Throws std::bad_alloc.
void relu_linear_attention(const ReluLinearAttentionArgs& args);

}  // namespace evsam
