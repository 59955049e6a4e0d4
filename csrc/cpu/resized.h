// A pixel of mask logits that are resized twice, rounded as two bilinear resizings round. Included by
// kernels: everything is private to the including file.
#pragma once

#include "evsam/measure_masks.h"

namespace evsam::EVSAM_ISA {
namespace {

// a b + c d, where only c d is rounded before the sum.
float sum_of_products(float a, float b, float c, float d) {
  const double product = static_cast<double>(c) * d;  // Exact, and no compiler makes one step of these.
  return __builtin_fmaf(a, b, static_cast<float>(product));
}

// Row y and column x of what one resizing makes of a map, `at(row, column)` of which gives the values.
template <class At>
float resized(const LinearAxis& rows, std::int64_t y, const LinearAxis& columns, std::int64_t x,
              const At& at) {
  const float left = columns.weights[x], right = columns.weights[columns.size + x];
  float both[2];
  for (int i = 0; i < 2; ++i) {
    const std::int64_t row = rows.first[y] + i, column = columns.first[x];
    both[i] = sum_of_products(at(row, column), left, at(row, column + 1), right);
  }
  return sum_of_products(both[0], rows.weights[y], both[1], rows.weights[rows.size + y]);
}

// The same of both resizings.
float resized_twice(const ResizedMaps& maps, const float* logits, std::int64_t y, std::int64_t x) {
  const auto in_frame = [&](std::int64_t row, std::int64_t column) {
    return resized(maps.rows.to_frame, row, maps.columns.to_frame, column,
                   [&](std::int64_t i, std::int64_t j) { return logits[i * maps.in_width + j]; });
  };
  return resized(maps.rows.to_image, y, maps.columns.to_image, x, in_frame);
}

}  // namespace
}  // namespace evsam::EVSAM_ISA
