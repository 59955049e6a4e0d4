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

// The same for panels of few rows, whose sums would wait for one another.
constexpr int vectors_for(int rows) {
  constexpr int of_a_row = positions / lanes, in_flight = 8;
  const int wanted = rows < at_once ? in_flight / rows : at_once;
  return wanted < at_once ? at_once : wanted < of_a_row ? wanted : of_a_row;
}

// c[i][:] += sum over k of a[k][i] b[k][:], for a few vectors of columns; `start` [rows], where it is not
// null, takes the place of what c holds.
template <int rows, int vectors>
EVSAM_INLINE void position_sums(std::int64_t inner, const float* a, std::int64_t a_stride,
                                const float* b, float* c, const float* start) {
  Vec sums[rows][vectors];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v)
      sums[i][v] = start == nullptr ? load(c + i * positions + v * lanes) : broadcast(start[i]);
  for (std::int64_t k = 0; k < inner; ++k, a += a_stride, b += positions) {
    Vec columns[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) columns[v] = load(b + v * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const Vec value = broadcast(a[i]);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sums[i][v] = fma(value, columns[v], sums[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) store(c + i * positions + v * lanes, sums[i][v]);
}

constexpr int panel_rows = max_rows<float>;
constexpr float zeros[panel_rows] = {};

// c[i][:] = (accumulate ? c[i][:] : 0) + sum over k of a[k][i] b[k][:].
template <int rows>
__attribute__((noinline)) void position_panel(std::int64_t inner, const float* a,
                                              std::int64_t a_stride, const float* b, float* c,
                                              bool accumulate) {
  constexpr int vectors = vectors_for(rows);
  for (std::int64_t at = 0; at < positions; at += vectors * lanes)
    position_sums<rows, vectors>(inner, a, a_stride, b + at, c + at, accumulate ? nullptr : zeros);
}

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

// Copies the left operand of a product for `multiply_packed`: [panels][inner][rows of a panel].
inline void pack_rows(std::int64_t rows, std::int64_t inner, const float* a, std::int64_t a_stride,
                      float* to) {
  const std::int64_t panels = quotient_up(rows, panel_rows);
  for (std::int64_t p = 0; p < panels; ++p) {
    const std::int64_t begin = rows * p / panels, end = rows * (p + 1) / panels;
    for (std::int64_t k = 0; k < inner; ++k)
      for (std::int64_t i = begin; i < end; ++i) *to++ = a[k * a_stride + i];
  }
}

// A few vectors of columns of a panel of a packed operand.
template <int rows>
__attribute__((noinline)) void packed_panel(std::int64_t inner, const float* a, const float* b,
                                            float* c, const float* start) {
  position_sums<rows, at_once>(inner, a, rows, b, c, start);
}

template <int rows = panel_rows>
void packed_panel_of(std::int64_t count, std::int64_t inner, const float* a, const float* b,
                     float* c, const float* start) {
  if (count == rows) return packed_panel<rows>(inner, a, b, c, start);
  if constexpr (rows > 1) packed_panel_of<rows - 1>(count, inner, a, b, c, start);
}

// c[rows][64] += a^T b like `multiply_positions`, of a packed left operand; `start` [rows], where it is not
// null, takes the place of what c holds. For operands of many rows that lie far apart: a few columns of b
// stay in L1 while all of a passes by in order.
inline void multiply_packed(std::int64_t rows, std::int64_t inner, const float* a, const float* b,
                            float* c, const float* start) {
  const std::int64_t panels = quotient_up(rows, panel_rows);
  for (std::int64_t at = 0; at < positions; at += at_once * lanes)
    for (std::int64_t p = 0; p < panels; ++p) {
      const std::int64_t begin = rows * p / panels, end = rows * (p + 1) / panels;
      packed_panel_of(end - begin, inner, a + begin * inner, b + at, c + begin * positions + at,
                      start == nullptr ? nullptr : start + begin);
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
