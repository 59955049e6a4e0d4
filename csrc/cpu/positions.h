// Products with the positions of an image as columns, which the mask decoder's kernels are made of.
// Included by kernels: everything is private to the including file.
//
// Maps lie in tiles of 64 positions, [rows][64], so that a row of a tile is a few whole vectors and what
// follows a product (a softmax over rows, a scale per position) goes along its columns. The left operand
// of a product has its inner dimension first, [inner][rows]: the values that are broadcast together lie
// side by side, and matrices need not be packed.
#pragma once

#include "activation.h"
#include "matrix.h"
#include "simd.h"

namespace evsam::EVSAM_ISA {
namespace {

constexpr std::int64_t positions = 64;

// Calls body(position) for the first position of every vector of a tile.
template <class Body>
EVSAM_INLINE void over_positions(const Body& body) {
#pragma GCC unroll 16
  for (std::int64_t at = 0; at < positions; at += lanes) body(at);
}

// Vectors of a row that a panel of sums takes at once, which leaves registers for the operands.
#if defined(__AVX512F__)
constexpr int at_once = 4;
#else
constexpr int at_once = 2;
#endif

// c[i][:] = (accumulate ? c[i][:] : 0) + sum over k of a[k][i] b[k][:].
template <int rows>
__attribute__((noinline)) void position_panel(std::int64_t inner, const float* a,
                                              std::int64_t a_stride, const float* b, float* c,
                                              bool accumulate) {
  for (std::int64_t at = 0; at < positions; at += at_once * lanes) {
    Vec sums[rows][at_once];
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < at_once; ++v)
        sums[i][v] = accumulate ? load(c + i * positions + at + v * lanes) : zero();
    const float* values = a;
    const float* row = b + at;
    for (std::int64_t k = 0; k < inner; ++k, values += a_stride, row += positions) {
      Vec columns[at_once];
#pragma GCC unroll 4
      for (int v = 0; v < at_once; ++v) columns[v] = load(row + v * lanes);
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i) {
        const Vec value = broadcast(values[i]);
#pragma GCC unroll 4
        for (int v = 0; v < at_once; ++v) sums[i][v] = fma(value, columns[v], sums[i][v]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < at_once; ++v) store(c + i * positions + at + v * lanes, sums[i][v]);
  }
}

constexpr int panel_rows = max_rows<float>;

template <int rows = panel_rows>
void position_panel_of(std::int64_t count, std::int64_t inner, const float* a,
                       std::int64_t a_stride, const float* b, float* c, bool accumulate) {
  if (count == rows) return position_panel<rows>(inner, a, a_stride, b, c, accumulate);
  if constexpr (rows > 1)
    position_panel_of<rows - 1>(count, inner, a, a_stride, b, c, accumulate);
}

// c[rows][64] = a^T b with a [inner][a_stride], b [inner][64]; added to what c holds where `accumulate`
// is set. The rows are split evenly into panels.
inline void multiply_positions(std::int64_t rows, std::int64_t inner, const float* a,
                               std::int64_t a_stride, const float* b, float* c, bool accumulate) {
  const std::int64_t panels = quotient_up(rows, panel_rows);
  for (std::int64_t p = 0; p < panels; ++p) {
    const std::int64_t begin = rows * p / panels, end = rows * (p + 1) / panels;
    position_panel_of(end - begin, inner, a + begin, a_stride, b, c + begin * positions, accumulate);
  }
}

// to[row][:] = scale[:] * base[row][:] + offset[row][:], where a scale or offset of null is none.
inline void scale_and_add(std::int64_t rows, const float* base, const float* scale,
                          const float* offset, float* to) {
  for (std::int64_t row = 0; row < rows; ++row)
    over_positions([&](std::int64_t at) {
      const std::int64_t i = row * positions + at;
      Vec value = load(base + i);
      if (scale != nullptr) value *= load(scale + at);
      if (offset != nullptr) value += load(offset + i);
      store(to + i, value);
    });
}

}  // namespace
}  // namespace evsam::EVSAM_ISA
