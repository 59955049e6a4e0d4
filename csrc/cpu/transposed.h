// The right matrix of a product as the weights of a 1x1 convolution lie, row by row of its transpose: nothing that
// is packed would be read as it is. Two panels at a time are written from it just before they are multiplied with.
// Included by kernels: everything is private to the including file.
#pragma once

#include <cstdint>

#include "matrix.h"

namespace evsam::EVSAM_ISA {
namespace {

// Of [columns][stride] elements those from a column and a row on.
template <class Storage>
struct Transposed {
  const Storage* elements;
  std::int64_t stride;
  float larger;  // a power of two that they are multiplied by where panels are bfloat16

  Transposed from(std::int64_t row, std::int64_t column) const {
    return {elements + column * stride + row, stride, larger};
  }

  // Writes `lanes` columns from the first rows, lanes * in_step<E> of them, to a panel.
  EVSAM_INLINE void write(float* to) const {
    Vec x[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) x[i] = load(elements + i * stride);
    transpose(x);
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) store(to + i * panel, x[i]);
  }

#if defined(__AVX512BF16__)
  EVSAM_INLINE void write(BFloat16* to) const {
    Vec x[lanes];  // of two rows each
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      constexpr std::uint32_t upper = 0xffff0000;
      Bits pair;
      __builtin_memcpy(&pair, elements + i * stride, sizeof pair);
      const Vec first = (Vec)(pair << 16) * larger, second = (Vec)(pair & upper) * larger;
      x[i] = (Vec)((Bits)first >> 16 | ((Bits)second & upper));
    }
    transpose(x);
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) __builtin_memcpy(to + 2 * i * panel, &x[i], sizeof x[i]);
  }
#endif
};

// The panels of so many columns, [columns / panel][blocks][32][panel].
template <class E, class Storage>
void write_panels(const Transposed<Storage>& b, std::int64_t columns, std::int64_t blocks, E* to) {
  for (std::int64_t column = 0; column < columns; column += panel, to += blocks * block * panel)
    for (std::int64_t k = 0; k < blocks * block; k += lanes * in_step<E>)
      for (std::int64_t half = 0; half < panel; half += lanes)
        b.from(k, column + half).write(to + k * panel + half * in_step<E>);
}

// What tiles fetch while they compute: of a matrix the rows of some blocks in so many columns; then `rows` rows of as
// many blocks of a left matrix, a_stride apart, unless a is null.
template <class E, class Storage>
struct Ahead {
  Transposed<Storage> b;
  std::int64_t columns, blocks;
  const E* a = nullptr;
  std::int64_t a_stride = 0, rows = 0;

  // Columns that follow one another are fetched as one piece, others a line of each at a time.
  bool is_whole() const { return b.stride == blocks * block; }

  // Tiles that fetch, each as many cache lines.
  std::int64_t of_right(std::int64_t lines) const {
    return quotient_up(is_whole() ? columns * b.stride : blocks * block,
                       (is_whole() ? lines : 1) * cache_line<Storage>);
  }
  std::int64_t of_left_block(std::int64_t lines) const {
    return quotient_up(rows * block, lines * cache_line<E>);
  }
  std::int64_t count(std::int64_t lines) const { return of_right(lines) + blocks * of_left_block(lines); }

  Fetch operator()(std::int64_t turn, std::int64_t lines) const {
    const std::int64_t left = turn - of_right(lines);
    if (left < 0)
      return is_whole() ? Fetch(b.elements + turn * lines * cache_line<Storage>)
                        : Fetch(b.elements + turn * cache_line<Storage>, b.stride);
    const std::int64_t of_block = of_left_block(lines);
    return Fetch(a + left / of_block * a_stride + left % of_block * lines * cache_line<E>);
  }
};

// c[rows][columns] = a[rows][32 * blocks] times panels as write_panels() leaves them, or added to c, as multiply() of
// matrix.h.
template <class E, class Storage>
void multiply(std::int64_t rows, std::int64_t columns, std::int64_t blocks, const E* a, std::int64_t a_stride,
              const E* panels, float* c, std::int64_t c_stride, bool accumulate,
              const Ahead<E, Storage>& ahead) {
  const std::int64_t tiles = quotient_up(rows, Tall::rows);
  for (std::int64_t first = 0; first < blocks; first += panel_blocks<E>) {
    const std::int64_t count = least(panel_blocks<E>, blocks - first);
    const std::int64_t lines = count * block / in_step<E>;  // fetched by a tile
    // The last tiles fetch: what was there earlier would have to give way to the panels again.
    const std::int64_t of_panels = columns / panel * tiles;
    std::int64_t turn = first + count < blocks ? -of_panels : least(ahead.count(lines) - of_panels, 0);
    for (std::int64_t column = 0; column < columns; column += panel) {
      const E* from = panels + (column * blocks + first * panel) * block;
      for (std::int64_t t = 0; t < tiles; ++t, ++turn) {
        const std::int64_t begin = rows * t / tiles, end = rows * (t + 1) / tiles;
        // Tiles that have nothing to fetch fetch what they read.
        tile_of<Tall>(end - begin, a + first * a_stride + begin * block, a_stride, count, from,
                      turn < 0 ? Fetch(from) : ahead(turn, lines),
                      Finish{c + begin * c_stride + column, c_stride, accumulate || first > 0});
      }
    }
  }
}

}  // namespace
}  // namespace evsam::EVSAM_ISA
