// Masks from the image's keys: two transposed convolutions and the product with a vector of each mask.
#pragma once

#include <cstdint>

namespace evsam {

// Everything is float32; products may be of bfloat16. Positions lie in tiles of 64, row by row of the image.
struct UpscaleMasksArgs {
  // The first convolution of the keys, less its mean over the channels of a pixel; the four pixels that
  // a position becomes one after another.
  const float* base;     // [tiles, 4 * mid_channels, 64]
  const float* scales;   // [batch, tiles, 64]
  const float* basis;    // [batch, tiles, rank, 64]
  const float* rows;     // [batch, rank, 4 * mid_channels]
  const float* offsets;  // [4 * mid_channels]
  const float* norm_weight;  // [mid_channels]
  const float* norm_bias;    // [mid_channels]
  double eps;
  const float* weight;  // [mid_channels, 4, out_channels], of the second convolution
  const float* bias;    // [out_channels]
  const std::int64_t* first;  // [batch + 1], number of the first mask of each prompt
  const float* vectors;       // [out_channels, masks]
  float* masks;               // [masks, 4 * height, 4 * width]
  std::int64_t batch, height, width, rank, mid_channels, out_channels;
  // Whether what the convolutions multiply may be rounded to bfloat16: it is where an instruction multiplies that.
  bool bfloat16;
  int num_threads;  // at most this many; the result does not depend on it
};

// x = scales base + basis rows + offsets; y = gelu(x / sqrt(mean of x^2 + eps) norm_weight + norm_bias);
// z = gelu(y weight + bias); a pixel of a mask is its vector times z. Throws std::bad_alloc.
void upscale_masks(const UpscaleMasksArgs& args);

}  // namespace evsam
