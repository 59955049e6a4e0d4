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

// Prompts that a tile of the shared maps is read for, while it is in L2.
constexpr std::int64_t prompts_at_once = 4;

// Calls body(position) for the first position of every vector of a tile.
template <class Body>
EVSAM_INLINE void over_positions(const Body& body) {
#pragma GCC unroll 16
  for (std::int64_t at = 0; at < positions; at += lanes) body(at);
}

// Rows of the largest panel of sums, and vectors of a row that it takes at once, which leaves registers for
// the operands.
#if defined(__AVX512F__)
constexpr int panel_rows = 7, at_once = 4;
#else
constexpr int panel_rows = 6, at_once = 2;
#endif

// The same for panels of few rows, whose sums would otherwise wait for one another: as many as there are
// registers for sums.
constexpr int vectors_for(int rows) {
  constexpr int of_a_row = positions / lanes, registers = 12;
  const int most_at_once = rows < 1 ? 1 : registers / rows;
  return most_at_once < at_once ? at_once : most_at_once < of_a_row ? most_at_once : of_a_row;
}

// Row i is the sum over k < inner of a[k][i] b[k][:], the strides being those of k.
struct Product {
  std::int64_t inner;
  const float* a;
  std::int64_t a_stride;
  const float* b;
  std::int64_t b_stride = positions;
};

constexpr Product nothing = {};

// What becomes of a panel's sums: they are added to what c holds, or to a value for each row.
struct Store {
  float* c;
  const float* start = nullptr;  // [rows], or null
  std::int64_t stride = positions;

  template <int rows, int vectors>
  EVSAM_INLINE void begin(std::int64_t at, Vec (&sums)[rows][vectors]) const {
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v)
        sums[i][v] = start == nullptr ? load(c + i * stride + at + v * lanes) : broadcast(start[i]);
  }

  template <int rows, int vectors>
  EVSAM_INLINE void end(std::int64_t at, const Vec (&sums)[rows][vectors]) const {
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) store(c + i * stride + at + v * lanes, sums[i][v]);
  }
};

// Or they are multiplied by `with` [rows][64], and what that comes to in all rows is added to `to` [64].
struct Dot {
  const float* with;
  float* to;

  template <int rows, int vectors>
  EVSAM_INLINE void begin(std::int64_t, Vec (&sums)[rows][vectors]) const {
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) sums[i][v] = zero();
  }

  template <int rows, int vectors>
  EVSAM_INLINE void end(std::int64_t at, const Vec (&sums)[rows][vectors]) const {
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) {
      Vec total = load(to + at + v * lanes);
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i)
        total = fma(sums[i][v], load(with + i * positions + at + v * lanes), total);
      store(to + at + v * lanes, total);
    }
  }
};

// A panel's columns from `at` on, as many as some vectors hold.
template <int rows, int vectors>
EVSAM_INLINE void add_product(const Product& product, std::int64_t at, Vec (&sums)[rows][vectors]) {
  const float *a = product.a, *b = product.b + at;
  for (std::int64_t k = 0; k < product.inner; ++k, a += product.a_stride, b += product.b_stride) {
    Vec columns[vectors];
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) columns[v] = load(b + v * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const Vec value = broadcast(a[i]);
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) sums[i][v] = fma(value, columns[v], sums[i][v]);
    }
  }
}

template <int rows, int vectors, class Use>
EVSAM_INLINE void panel_columns(const Product& one, const Product& other, std::int64_t at,
                                const Use& use) {
  Vec sums[rows][vectors];
  use.begin(at, sums);
  add_product(one, at, sums);
  add_product(other, at, sums);
  use.end(at, sums);
}

// The sum of two products of a few rows.
template <int rows, class Use>
__attribute__((noinline)) void panel_of_rows(const Product& one, const Product& other, const Use& use) {
  constexpr int vectors = vectors_for(rows), rest = positions / lanes % vectors;
  std::int64_t at = 0;
  for (; at + vectors * lanes <= positions; at += vectors * lanes)
    panel_columns<rows, vectors>(one, other, at, use);
  if constexpr (rest > 0) panel_columns<rows, rest>(one, other, at, use);
}

constexpr float zeros[panel_rows] = {};

template <class Use, int rows = panel_rows>
void panel_of(std::int64_t count, const Product& one, const Product& other, const Use& use) {
  if (count == rows) return panel_of_rows<rows>(one, other, use);
  if constexpr (rows > 1) panel_of<Use, rows - 1>(count, one, other, use);
}

// Calls body(begin, count) for the panels that rows are split into evenly.
template <class Body>
EVSAM_INLINE void over_panels(std::int64_t rows, const Body& body) {
  const std::int64_t panels = quotient_up(rows, panel_rows);
  for (std::int64_t p = 0; p < panels; ++p) {
    const std::int64_t begin = rows * p / panels;
    body(begin, rows * (p + 1) / panels - begin);
  }
}

// The product's rows from one on.
EVSAM_INLINE Product from_row(const Product& product, std::int64_t row) {
  if (product.inner == 0) return nothing;
  return {product.inner, product.a + row, product.a_stride, product.b, product.b_stride};
}

// c[rows][64] = the sum of two products.
inline void multiply(std::int64_t rows, const Product& one, const Product& other, float* c) {
  over_panels(rows, [&](std::int64_t begin, std::int64_t count) {
    panel_of(count, from_row(one, begin), from_row(other, begin), Store{c + begin * positions, zeros});
  });
}

// to[64] += the sum over rows of a product times `with` [rows][64].
inline void add_dot(std::int64_t rows, const Product& product, const float* with, float* to) {
  over_panels(rows, [&](std::int64_t begin, std::int64_t count) {
    panel_of(count, from_row(product, begin), nothing, Dot{with + begin * positions, to});
  });
}

// Copies the left operand of a product for `multiply_packed`: [panels][inner][rows of a panel].
inline void pack_rows(std::int64_t rows, std::int64_t inner, const float* a, std::int64_t a_stride,
                      float* to) {
  over_panels(rows, [&](std::int64_t begin, std::int64_t count) {
    for (std::int64_t k = 0; k < inner; ++k)
      for (std::int64_t i = begin; i < begin + count; ++i) *to++ = a[k * a_stride + i];
  });
}

// Some columns of a panel alone.
template <int rows, int vectors, class Use>
__attribute__((noinline)) void columns_of_rows(const Product& product, std::int64_t at, const Use& use) {
  panel_columns<rows, vectors>(product, nothing, at, use);
}

template <int vectors, class Use, int rows = panel_rows>
void columns_of_panel(std::int64_t count, const Product& product, std::int64_t at, const Use& use) {
  if (count == rows) return columns_of_rows<rows, vectors>(product, at, use);
  if constexpr (rows > 1) columns_of_panel<vectors, Use, rows - 1>(count, product, at, use);
}

// A product of a packed left operand [rows][inner], `use(row)` being what becomes of the panel from that row
// on. For operands of many rows that lie far apart: a few columns of b stay in L1 while all of a passes by in
// order.
template <class UseOf>
void multiply_packed(std::int64_t rows, std::int64_t inner, const float* a, const float* b,
                     const UseOf& use) {
  for (std::int64_t at = 0; at < positions; at += at_once * lanes)
    over_panels(rows, [&](std::int64_t begin, std::int64_t count) {
      columns_of_panel<at_once>(count, {inner, a + begin * inner, count, b}, at, use(begin));
    });
}

// to[n][k] = from[k][n] for k < rows, and 0 for k from there to `columns`, whole vectors.
inline void transpose_positions(std::int64_t rows, const float* from, std::int64_t columns, float* to) {
  for (std::int64_t k = 0; k < columns; k += lanes)
    for (std::int64_t n = 0; n < positions; n += lanes) {
      Vec x[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) x[i] = k + i < rows ? load(from + (k + i) * positions + n) : zero();
      transpose(x);
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) store(to + (n + i) * columns + k, x[i]);
    }
}

// Asks for a part of so many rows of a tile that is read next, which takes long where it is not in L2.
EVSAM_INLINE void fetch_part(const float* from, std::int64_t rows, std::int64_t part, std::int64_t parts) {
  const std::int64_t lines = rows * positions / cache_line<float>;
  for (std::int64_t line = lines * part / parts; line < lines * (part + 1) / parts; ++line)
    __builtin_prefetch(from + line * cache_line<float>, 0, 2);
}

// to[row][:] = scale[:] * base[row][:] + offset[row][:].
inline void scale_and_add(std::int64_t rows, const float* base, const float* scale, const float* offset, float* to) {
  constexpr int vectors = positions / lanes;
  Vec scales[vectors];
#pragma GCC unroll 16
  for (int v = 0; v < vectors; ++v) scales[v] = load(scale + v * lanes);
  for (std::int64_t row = 0; row < rows; ++row, base += positions, offset += positions, to += positions)
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v)
      store(to + v * lanes, fma(load(base + v * lanes), scales[v], load(offset + v * lanes)));
}

}  // namespace
}  // namespace evsam::EVSAM_ISA
