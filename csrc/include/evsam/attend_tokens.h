// Attention of a few tokens to one another.
#pragma once

#include <cstdint>

namespace evsam {

// Everything is float32, [batch, tokens, heads * head_dim].
struct AttendTokensArgs {
  const float *queries, *keys, *values;
  float* y;
  std::int64_t batch, tokens, heads, head_dim;
  int num_threads;  // at most this many; the result does not depend on it
};

// y = softmax(queries keys^T / sqrt(head_dim)) values, head by head. Throws std::bad_alloc.
void attend_tokens(const AttendTokensArgs& args);

}  // namespace evsam
