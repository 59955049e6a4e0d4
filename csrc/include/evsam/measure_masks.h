// Mask logits upscaled and thresholded, without the upscaled logits ever being in memory.
#pragma once

#include <cstdint>

namespace evsam {

// One axis of one resizing: output position i is a[first[i]] weights[0][i] + a[first[i] + 1] weights[1][i].
struct LinearAxis {
  const std::int32_t* first;  // [size]
  const float* weights;       // [2][size]
  std::int64_t size;          // of the output, at least 1
};

// One axis of two resizings, that to the frame and that of the picture in its corner to the image. Both
// at once, output position i is the sum of three neighbouring input positions.
struct ResizedAxis {
  const std::int32_t* first;  // [size], the first of the three; never falls along the axis
  const float* weights;       // [3][size]
  std::int64_t size;          // of the image, at least 1
  LinearAxis to_frame, to_image;
};

struct ResizedMaps {
  const float* logits;  // [count, in_height, in_width], both at least 3
  std::int64_t count, in_height, in_width;
  ResizedAxis rows, columns;
};

struct MeasureMasksArgs {
  ResizedMaps maps;
  float inner, threshold, outer;  // inner >= threshold >= outer
  // How far a value may be off, as a part of the largest magnitude of its map.
  float tolerance;
  bool resolve;  // whether values that close to inner, threshold or outer are those of `resize_masks`
  std::uint8_t* masks;     // [count, rows, columns], 1 where above the threshold; or null
  std::int64_t* counts;    // [count][2], values above inner and above outer
  std::int64_t* boxes;     // [count][4], outermost columns and rows of the mask; zeros for none
  std::uint8_t* doubtful;  // [count], 1 where a value is close and not resolved, or one is not finite
  int num_threads;         // at most this many; the result does not depend on it
};

// Throws std::bad_alloc.
void measure_masks(const MeasureMasksArgs& args);

struct ResizeMasksArgs {
  ResizedMaps maps;
  const std::int64_t* wanted;  // [wanted_count], rows of the output
  std::int64_t wanted_count;
  float* resized;  // [count, wanted_count, columns]
};

// The logits after one resizing and the other, each of which rounds a b + c d as fma(a, b, c d): first
// along the columns, then along the rows.
void resize_masks(const ResizeMasksArgs& args);

}  // namespace evsam
