// LayerNorm over the channels of every pixel of an NHWC map.
#pragma once

#include <cstdint>

#include "evsam/dtype.h"

namespace evsam {

struct LayerNorm2dArgs {
  const void* x;       // [rows, channels], one row per pixel
  void* y;             // [rows, channels], must not overlap x
  const void* weight;  // [channels], float32 (float64 for float64 x); null for ones
  const void* bias;    // [channels], as weight; null for zeros
  std::int64_t rows;
  std::int64_t channels;
  double eps;          // added to the variance
  DType dtype;         // of x and y
  int num_threads;     // at most this many; the result does not depend on it
};

// y = (x - mean) / sqrt(variance + eps) * weight + bias with the biased variance of each row.
// Throws std::bad_alloc.
void layer_norm_2d(const LayerNorm2dArgs& args);

}  // namespace evsam
