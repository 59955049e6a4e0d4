// Attention of tokens to an image whose keys are a shared map and a few vectors of each prompt's own.
#pragma once

#include <cstdint>

namespace evsam {

// Everything is float32. Positions lie in tiles of 64; what lies behind the last position is not used.
struct AttendKeysArgs {
  const float* queries;  // [batch, heads, head_dim, tokens]
  const float* keys;     // [tiles, heads * head_dim, 64]
  const float* values;   // [tiles * 64, heads * head_dim]
  // These are null where `rank` is 0.
  const float* offsets;      // [tiles, heads * head_dim, 64]
  const float* scales;       // [batch, tiles, 64]
  const float* basis;        // [batch, tiles, rank, 64]
  const float* row_queries;  // [batch, heads, rank, tokens], the queries times the vectors' keys
  float* shared;             // [batch, heads, tokens, head_dim]
  float* of_basis;           // [batch, heads, tokens, rank]
  std::int64_t batch, tokens, heads, head_dim, positions, rank;  // head_dim a multiple of 16
  int num_threads;  // at most this many; the result does not depend on it
};

// With w the softmax over positions of queries (scales keys + offsets) + row_queries basis:
// shared = sum of w scales values, of_basis = sum of w basis. Throws std::bad_alloc.
void attend_keys(const AttendKeysArgs& args);

}  // namespace evsam
