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
template <class T>
struct ProductOf {
  std::int64_t inner;
  const T* a;
  std::int64_t a_stride;
  const T* b;
  std::int64_t b_stride = positions;
};

using Product = ProductOf<float>;
constexpr Product nothing = {};

// The same with scales [64] b + offsets [:][64] in place of b.
struct ScaledProduct : Product {
  const float *scales, *offsets;
};

// Elements of a product, and what is made of them: lanes of b, one of a, and their product added to a sum.
EVSAM_INLINE Vec columns_at(const float* b) { return load(b); }
EVSAM_INLINE Vec value_at(const float* a) { return broadcast(*a); }
EVSAM_INLINE Vec add_product(Vec sum, Vec value, Vec columns) { return fma(value, columns, sum); }

#if defined(__AVX512BF16__)
// Elements of two neighbouring k as bfloat16, which one instruction multiplies and adds up.
struct Pair {
  BFloat16 first, second;
};

EVSAM_INLINE __m512bh columns_at(const Pair* b) { return (__m512bh)_mm512_loadu_si512(b); }
EVSAM_INLINE __m512bh value_at(const Pair* a) {
  int pair;
  __builtin_memcpy(&pair, a, sizeof pair);
  return (__m512bh)_mm512_set1_epi32(pair);
}
EVSAM_INLINE Vec add_product(Vec sum, __m512bh value, __m512bh columns) {
  return _mm512_dpbf16_ps(sum, value, columns);
}

// Writes lanes of pairs.
EVSAM_INLINE void put_pairs(Pair* to, Vec first, Vec second) {
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(second, first);  // all of one behind all of the other
  Bits side_by_side;
  for (std::uint32_t lane = 0; lane < lanes; ++lane) side_by_side[lane] = lane | (lanes + lane) << 16;
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16((__m512i)side_by_side, halves));
}

// to[k][:] = pairs of rows 2 k and 2 k + 1 of `from`, whole vectors of them, to_stride apart. An odd last row is
// paired with zeros.
inline void pair_rows(std::int64_t rows, std::int64_t columns, const float* from, std::int64_t stride,
                      Pair* to, std::int64_t to_stride) {
  for (std::int64_t k = 0; k < rows; k += 2, from += 2 * stride, to += to_stride)
    for (std::int64_t n = 0; n < columns; n += lanes)
      put_pairs(to + n, load(from + n, columns - n),
                k + 1 < rows ? load(from + stride + n, columns - n) : zero());
}
#endif

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
template <int rows, int vectors, class T>
EVSAM_INLINE void add_columns(const ProductOf<T>& product, std::int64_t at, Vec (&sums)[rows][vectors]) {
  const T *a = product.a, *b = product.b + at;
  for (std::int64_t k = 0; k < product.inner; ++k, a += product.a_stride, b += product.b_stride) {
    decltype(columns_at(b)) columns[vectors];
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) columns[v] = columns_at(b + v * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const auto value = value_at(a + i);
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) sums[i][v] = add_product(sums[i][v], value, columns[v]);
    }
  }
}

// Vector by vector: registers do not hold four of them and what makes another one.
template <int rows, int vectors>
EVSAM_INLINE void add_columns(const ScaledProduct& product, std::int64_t at, Vec (&sums)[rows][vectors]) {
  const float *a = product.a, *b = product.b + at, *scales = product.scales + at, *offsets = product.offsets + at;
  for (std::int64_t k = 0; k < product.inner; ++k, a += product.a_stride, b += positions, offsets += positions)
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) {
      const Vec columns = fma(load(b + v * lanes), load(scales + v * lanes), load(offsets + v * lanes));
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i) sums[i][v] = fma(broadcast(a[i]), columns, sums[i][v]);
    }
}

template <int rows, int vectors, class One, class Other, class Use>
EVSAM_INLINE void panel_columns(const One& one, const Other& other, std::int64_t at, const Use& use) {
  Vec sums[rows][vectors];
  use.begin(at, sums);
  add_columns(one, at, sums);
  add_columns(other, at, sums);
  use.end(at, sums);
}

// The sum of two products of a few rows.
template <int rows, class One, class Use>
__attribute__((noinline)) void panel_of_rows(const One& one, const Product& other, const Use& use) {
  constexpr int vectors = vectors_for(rows), rest = positions / lanes % vectors;
  std::int64_t at = 0;
  for (; at + vectors * lanes <= positions; at += vectors * lanes)
    panel_columns<rows, vectors>(one, other, at, use);
  if constexpr (rest > 0) panel_columns<rows, rest>(one, other, at, use);
}

constexpr float zeros[panel_rows] = {};

template <class One, class Use, int rows = panel_rows>
void panel_of(std::int64_t count, const One& one, const Product& other, const Use& use) {
  if (count == rows) return panel_of_rows<rows>(one, other, use);
  if constexpr (rows > 1) panel_of<One, Use, rows - 1>(count, one, other, use);
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
template <class One>
EVSAM_INLINE One from_row(One product, std::int64_t row) {
  if (product.inner > 0) product.a += row;
  return product;
}

// c[rows][64] = the sum of two products.
template <class One>
void multiply(std::int64_t rows, const One& one, const Product& other, float* c) {
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
template <class T>
void pack_rows(std::int64_t rows, std::int64_t inner, const T* a, std::int64_t a_stride, T* to) {
  over_panels(rows, [&](std::int64_t begin, std::int64_t count) {
    for (std::int64_t k = 0; k < inner; ++k)
      for (std::int64_t i = begin; i < begin + count; ++i) *to++ = a[k * a_stride + i];
  });
}

// Some columns of a panel alone.
template <int rows, int vectors, class T, class Use>
__attribute__((noinline)) void columns_of_rows(const ProductOf<T>& product, std::int64_t at, const Use& use) {
  panel_columns<rows, vectors>(product, ProductOf<T>{}, at, use);
}

template <int vectors, int rows = panel_rows, class T, class Use>
void columns_of_panel(std::int64_t count, const ProductOf<T>& product, std::int64_t at, const Use& use) {
  if (count == rows) return columns_of_rows<rows, vectors>(product, at, use);
  if constexpr (rows > 1) columns_of_panel<vectors, rows - 1>(count, product, at, use);
}

// A product of a packed left operand [rows][inner], `use(row)` being what becomes of the panel from that row
// on. For operands of many rows that lie far apart: a few columns of b stay in L1 while all of a passes by in
// order.
template <class T, class UseOf>
void multiply_packed(std::int64_t rows, std::int64_t inner, const T* a, const T* b, const UseOf& use) {
  for (std::int64_t at = 0; at < positions; at += at_once * lanes)
    over_panels(rows, [&](std::int64_t begin, std::int64_t count) {
      columns_of_panel<at_once>(count, ProductOf<T>{inner, a + begin * inner, count, b}, at, use(begin));
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

// How many tasks the tiles of a group of prompts are: a few tiles follow one another, so that one can fetch what the
// next one reads, unless that leaves a thread without tasks.
inline std::int64_t parts_of(std::int64_t tiles, std::int64_t groups, int num_threads) {
  constexpr std::int64_t tiles_at_once = 8, tasks_of_thread = 4;
  const std::int64_t parts = quotient_up(tiles, tiles_at_once);
  return least(tiles, most(parts, num_threads * tasks_of_thread / most(groups, 1)));
}

// Asks for a part of so many rows of a tile that is read next, which takes long where it is not in L2.
EVSAM_INLINE void fetch_part(const float* from, std::int64_t rows, std::int64_t part, std::int64_t parts) {
  const std::int64_t lines = rows * positions / cache_line<float>;
  for (std::int64_t line = lines * part / parts; line < lines * (part + 1) / parts; ++line)
    __builtin_prefetch(from + line * cache_line<float>, 0, 2);
}

}  // namespace
}  // namespace evsam::EVSAM_ISA
