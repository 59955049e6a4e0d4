// Mask logits upscaled and thresholded, without the upscaled logits ever being in memory.
#pragma once

#include <cstdint>

namespace evsam {

// One axis of a resizing: output position i is the sum of three neighbouring input positions.
struct ResizedAxis {
  const std::int32_t* first;  // [size], the first of the three; never falls along the axis
  const float* weights;       // [3][size]
  std::int64_t size;          // of the output, at least 1
};

struct MeasureMasksArgs {
  const float* logits;  // [count, in_height, in_width], both at least 3
  std::int64_t count, in_height, in_width;
  ResizedAxis rows, columns;
  float inner, threshold, outer;  // inner >= threshold >= outer
  // How far a value may be off, as a part of the largest magnitude it is made of.
  float tolerance;
  std::uint8_t* masks;     // [count, rows, columns], 1 where above the threshold; or null
  std::int64_t* counts;    // [count][2], values above inner and above outer
  std::int64_t* boxes;     // [count][4], outermost columns and rows of the mask; zeros for none
  std::uint8_t* doubtful;  // [count], 1 where a value is too close to inner, threshold or outer
  int num_threads;         // at most this many; the result does not depend on it
};

// Throws std::bad_alloc.
void measure_masks(const MeasureMasksArgs& args);

}  // namespace evsam
