// Sum of NHWC maps after bicubic resizing to one size.
#pragma once

#include <cstdint>

#include "evsam/dtype.h"

namespace evsam {

struct UpsampleAddMap {
  const void* x;  // [batch, height, width, channels]
  std::int64_t height, width;
};

struct UpsampleAddArgs {
  const UpsampleAddMap* maps;  // [count], at least one
  std::int64_t count;
  void* y;  // [batch, height, width, channels], overlaps none of the maps
  std::int64_t batch, height, width, channels;
  DType dtype;      // of the maps and y: float16, bfloat16 or float32
  int num_threads;  // at most this many; the result does not depend on it
};

// As bicubic interpolation with a = -0.75, pixel centres at halves and borders repeated. Throws
// std::bad_alloc.
void upsample_add(const UpsampleAddArgs& args);

}  // namespace evsam
