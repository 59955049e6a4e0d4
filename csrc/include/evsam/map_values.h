// What tables make of the values of tokens.
#pragma once

#include <cstdint>

namespace evsam {

// The values of tokens in a block of the decoder, and the table that maps them.
struct MappedValues {
  const float* differences;  // [batch, heads, head_dim, others], values of tokens less the last one's
  const float* last;         // [batch, heads * head_dim + 1], the last one's, and 1
  const float* table;        // [heads * head_dim + 1, groups * columns], a row for each channel of a head
};

// Everything is float32.
struct MapValuesArgs {
  const MappedValues* blocks;  // [block_count]
  float* rows;  // [batch, groups, block_count * (heads * others + 1), columns]
  std::int64_t batch, others, heads, head_dim, block_count, groups, columns;
  int num_threads;  // at most this many; the result does not depend on it
};

// A row for each token but the last and each head, of the head's rows of the table, then one of the last
// token's values and the whole table; block after block.
void map_values(const MapValuesArgs& args);

}  // namespace evsam
