// An image attends to tokens: the softmax, and the scale of the LayerNorm that follows.
#pragma once

#include <cstdint>

namespace evsam {

// What a block of the decoder adds to the image's keys, of those that have been there and of this one.
struct KeyUpdate {
  const float* differences;  // [batch, heads, head_dim, others], values of tokens less the last one's
  const float* last;         // [batch, heads * head_dim + 1], the last one's, and 1
  const float* features;     // [tiles, heads * head_dim + 1, 64], what these times the base are made of
};

// Everything is float32. Positions lie in tiles of 64.
struct UpdateKeysArgs {
  const float* tokens;   // [batch, heads, head_dim, others], keys of tokens less the last one's
  const float* queries;  // [tiles, heads * head_dim, 64]
  // These are null in the first block.
  const float* offsets;     // [tiles, heads * head_dim, 64]
  const float* scales;      // [batch, tiles, 64]
  const float* basis;       // [batch, tiles, rank, 64]
  const float* row_tokens;  // [batch, heads, rank, others], the vectors' queries times `tokens`
  const KeyUpdate* updates;  // [blocks]
  const float* square;       // [tiles, 64], of the base
  const float* base;         // [tiles, channels, 64]
  const float* rows;         // [batch, new_rank, channels]
  double eps;
  // On whole cache lines, as they are written past the caches.
  float* new_basis;   // [batch, tiles, new_rank, 64]
  float* new_scales;  // [batch, tiles, 64]
  // A block adds heads * others + 1 to the rank, which is that of the blocks before.
  std::int64_t batch, others, heads, head_dim, tiles, channels, blocks;
  int num_threads;  // at most this many; the result does not depend on it
};

// With w the softmax over tokens of tokens (scales queries + offsets) + row_tokens basis, whose last weight
// is left out, b = [basis, w, 1] and z = scales base + b rows:
// r = 1 / sqrt(|z|^2 / channels + eps), new_basis = r b, new_scales = r scales. Throws std::bad_alloc.
void update_keys(const UpdateKeysArgs& args);

}  // namespace evsam
