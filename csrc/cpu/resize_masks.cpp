// Mask logits resized with the roundings of both resizings, to tell whether PyTorch rounds like that.
//
// A pixel at a time, with nothing kept from one to the next: for a few rows.

#include "evsam/measure_masks.h"

#include "resized.h"

namespace evsam::EVSAM_ISA {

void resize_masks(const ResizeMasksArgs& args) {
  const ResizedMaps& maps = args.maps;
  float* to = args.resized;
  for (std::int64_t index = 0; index < maps.count; ++index)
    for (std::int64_t i = 0; i < args.wanted_count; ++i)
      for (std::int64_t x = 0; x < maps.columns.size; ++x)
        *to++ = resized_twice(maps, maps.logits + index * maps.in_height * maps.in_width,
                              args.wanted[i], x);
}

}  // namespace evsam::EVSAM_ISA
