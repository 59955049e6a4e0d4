// NHWC maps as convolutions read and write them, and the operand that stays between two products.
// Included by kernels: everything is private to the including file.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "activation.h"
#include "matrix.h"
#include "scratch.h"
#include "simd.h"

namespace evsam::EVSAM_ISA {
namespace {

inline std::int64_t size_after(std::int64_t size, std::int64_t stride) {
  return (size - 1) / stride + 1;
}

template <class Storage>
struct Map {
  const Storage* x;
  std::int64_t batch, height, width, channels;

  std::int64_t pixels() const { return batch * height * width; }
};

// Kernels work on several pixels at once, whose rows are numbered from 0. What they compute goes to a
// sink: sink(row) returns a function that is called with a column and a vector of values from that column
// on. It holds all it needs by value, so that compilers keep it in registers.

// Adds the residual and writes to the output map, or to one that stays in the caches as it is read at once.
template <class Storage, bool stays = false>
struct Output {
  Storage* y;
  const Storage* residual;  // null for none
  std::int64_t channels;

  struct Line {
    Storage* y;
    const Storage* residual;
    std::int64_t count;
    bool whole;  // what is sent is aligned

    EVSAM_INLINE void operator()(std::int64_t column, Vec value) const {
      if (column >= count) return;
      if (residual != nullptr) value += load(residual + column, count - column);
      if constexpr (same<Storage, float> && !stays) {
        if (whole) return send(y + column, value);
      }
      store(y + column, value, count - column);
    }

    // Two vectors that follow one another.
    EVSAM_INLINE void operator()(std::int64_t column, Vec value, Vec next) const {
#if defined(__AVX512BF16__)
      if constexpr (same<Storage, BFloat16> && !stays) {
        if (whole && column + 2 * lanes <= count) {
          if (residual != nullptr) {
            value += load(residual + column);
            next += load(residual + column + lanes);
          }
          return send(y + column, value, next);
        }
      }
#endif
      (*this)(column, value);
      (*this)(column + lanes, next);
    }
  };

  // `count` channels of a pixel from `first` on.
  EVSAM_INLINE Line line(std::int64_t pixel, std::int64_t first, std::int64_t count) const {
    const std::int64_t at = pixel * channels + first;
    const bool whole = reinterpret_cast<std::uintptr_t>(y + at) % sizeof(Vec) == 0 && count % lanes == 0;
    return {y + at, residual == nullptr ? nullptr : residual + at, count, whole};
  }
  EVSAM_INLINE Line line(std::int64_t pixel) const { return line(pixel, 0, channels); }
};

// Keeps the rows as the left operand of the next product.
template <class E>
struct Operand {
  E* elements;
  std::int64_t rows;

  struct Line {
    E* elements;
    std::int64_t stride;

    EVSAM_INLINE void operator()(std::int64_t column, Vec value) const {
      put(elements + column / block * stride + column % block, value);
    }
  };

  std::int64_t stride() const { return rows * block; }
  E* at(std::int64_t row, std::int64_t column) const {
    return elements + column / block * stride() + row * block + column % block;
  }
  EVSAM_INLINE Line operator()(std::int64_t row) const { return {elements + row * block, stride()}; }
  // The rows from `row` on.
  Operand from(std::int64_t row) const { return {elements + row * block, rows}; }
};

// Writes a block of a row of an operand.
template <class Storage, class E>
EVSAM_INLINE void put_block(E* to, const Storage* from) {
#pragma GCC unroll 8
  for (int i = 0; i < block; i += lanes) put(to + i, load(from + i));
}
#if defined(__AVX512BF16__)
EVSAM_INLINE void put_block(BFloat16* to, const BFloat16* from) {
  constexpr int sign = 0x8000, smallest_normal = 0x80, infinity = 0x7f80;
  constexpr int larger = __builtin_ctz(static_cast<int>(headroom<BFloat16>)) * smallest_normal;
  const __m512i bits = _mm512_loadu_si512(from);
  const __m512i size = _mm512_andnot_si512(_mm512_set1_epi16(static_cast<short>(sign)), bits);
  const __mmask32 some = _mm512_test_epi16_mask(size, size);
  // Subnormal numbers come last in this order, as those do that are not finite or would not be.
  const __m512i order = _mm512_sub_epi16(size, _mm512_set1_epi16(smallest_normal));
  const __m512i end = _mm512_set1_epi16(infinity - larger - smallest_normal);
  if (__builtin_expect(_mm512_mask_cmpge_epu16_mask(some, order, end) != 0, 0))
    return put_block<BFloat16, BFloat16>(to, from);
  // To multiply by a power of two is to add to the exponent.
  _mm512_storeu_si512(to, _mm512_mask_add_epi16(bits, some, bits, _mm512_set1_epi16(larger)));
}
#endif

// Copies `count` elements, or zeros where `from` is null, to a row of an operand from a column on.
template <class Storage, class E>
void copy(const Storage* from, std::int64_t count, const Operand<E>& to, std::int64_t row,
          std::int64_t column) {
  while (count > 0) {
    const std::int64_t run = least(count, block - column % block);
    E* elements = to.at(row, column);
    if (from != nullptr && run == block) {
      for (; count >= block; count -= block, column += block, from += block, elements += to.stride())
        put_block(elements, from);
      continue;
    }
    std::int64_t i = 0;
    for (; i + lanes <= run; i += lanes) put(elements + i, from == nullptr ? zero() : load(from + i));
    if (i < run) {
      alignas(64) E room[lanes];
      put(room, from == nullptr ? zero() : load(from + i, run - i));
      for (std::int64_t k = i; k < run; ++k) elements[k] = room[k - i];
    }
    if (from != nullptr) from += run;
    column += run;
    count -= run;
  }
}

// Copies a whole row of `count` elements, filled up with zeros.
template <class Storage, class E>
void copy_row(const Storage* from, std::int64_t count, const Operand<E>& to, std::int64_t row) {
  copy(from, count, to, row, 0);
  copy<Storage>(nullptr, round_up(count) - count, to, row, count);
}

// A 1x1 convolution's weights, or those of one group of another convolution.
template <class E>
struct Matrix {
  float* bias;   // [columns], filled up with zeros
  float* scale;  // of products with panels
  E* panels;
  std::int64_t rows, columns;

  Matrix(Pieces& pieces, std::int64_t rows, std::int64_t columns, bool has_panels = true)
      : bias(pieces.take<float>(round_up(columns))),
        scale(pieces.take<float>(1)),
        panels(pieces.take<E>(has_panels ? packed_size(rows, columns) : 0)),
        rows(rows),
        columns(columns) {}

  std::int64_t blocks() const { return blocks_of(rows); }
  std::int64_t panel_size() const { return round_up(rows) * panel; }
  const E* panel_at(std::int64_t column) const { return panels + column * round_up(rows); }
};

template <class Storage>
double wide(Storage value) {
  float single;
  convert(value, single);
  return single;
}
inline double wide(float value) { return value; }

template <class Storage>
void pack_bias(const void* from, std::int64_t count, float* to) {
  const auto* bias = static_cast<const Storage*>(from);
  for (std::int64_t i = 0; i < round_up(count); ++i)
    to[i] = bias == nullptr || i >= count ? 0 : static_cast<float>(wide(bias[i]));
}

// Packs the matrix whose element in row k and column n is at(k, n), a double.
template <class Storage, class E, class At>
void pack_matrix(const At& at, const void* bias, const Matrix<E>& to) {
  pack_bias<Storage>(bias, to.columns, to.bias);
  const double larger = weight_headroom<E>(to.rows, to.columns, at);
  *to.scale = static_cast<float>(1 / (larger * headroom<E>));
  pack(to.rows, to.columns, to.panels,
       [&](std::int64_t k, std::int64_t n) { return at(k, n) * larger; });
}

// Packs a matrix stored as [columns][rows].
template <class Storage, class E>
void pack_pointwise(const void* from, const void* bias, const Matrix<E>& to) {
  const auto* weight = static_cast<const Storage*>(from);
  pack_matrix<Storage>(
      [&](std::int64_t k, std::int64_t n) { return wide(weight[n * to.rows + k]); }, bias, to);
}

// Room for the sums of one product, of so many columns at once that its left operand is read once for all
// of them.
struct Sums {
  static constexpr std::int64_t columns = 256;

  float* elements;  // [rows][stride(columns)]

  Sums(Pieces& pieces, std::int64_t rows) : elements(pieces.take<float>(rows * stride(columns))) {}

  // A cache line more keeps rows off the same places in L1.
  static constexpr std::int64_t stride(std::int64_t columns) { return columns + 16; }
};

// The tasks of a product of a whole image: so many rows at once that weights are read seldom, but that
// the sums stay in L2.
template <class E>
struct ProductTasks {
  static constexpr std::int64_t most_rows = 280;

  std::int64_t rows, columns, rows_at_once, across, count;

  ProductTasks(std::int64_t rows, std::int64_t columns, int num_threads)
      : rows(rows), columns(columns), across(quotient_up(columns, Sums::columns)) {
    const std::int64_t down =
        most(quotient_up(num_threads, across), quotient_up(rows, most_rows));
    rows_at_once = quotient_up(quotient_up(rows, down), max_rows) * max_rows;
    count = quotient_up(rows, rows_at_once) * across;
  }

  // Rows [row, row_end) and columns [column, column_end).
  struct Task {
    std::int64_t row, row_end, column, column_end;
  };
  Task operator()(std::int64_t index) const {
    const std::int64_t row = index / across * rows_at_once, column = index % across * Sums::columns;
    return {row, least(row + rows_at_once, rows), column, least(column + Sums::columns, columns)};
  }
};

// Whether a line of a sink takes two vectors together.
template <class Line>
constexpr auto takes_two(int) -> decltype(std::declval<const Line&>()(0, zero(), zero()), bool{}) {
  return true;
}
template <class Line>
constexpr bool takes_two(long) {
  return false;
}

// Passes two vectors on to a line of a sink.
template <class Line>
EVSAM_INLINE void pass_two(const Line& line, std::int64_t column, Vec value, Vec next) {
  if constexpr (takes_two<Line>(0)) {
    line(column, value, next);
  } else {
    line(column, value);
    line(column + lanes, next);
  }
}

// activation(products + bias) of columns [first, first + columns), into the sink.
template <class E, class Activate, class Sink>
void pass_on(const float* products, std::int64_t stride, std::int64_t rows, std::int64_t first,
             std::int64_t columns, const Matrix<E>& weights, const Activate& activate,
             const Sink& sink) {
  const float* bias = weights.bias + first;
  const Vec scale = broadcast(*weights.scale);
  for (std::int64_t row = 0; row < rows; ++row) {
    const auto line = sink(row);
    const float* from = products + row * stride;
    for (std::int64_t column = 0; column < columns; column += panel) {
      const std::int64_t next = column + lanes;
      pass_two(line, first + column, activate(fma(load(from + column), scale, load(bias + column))),
               activate(fma(load(from + next), scale, load(bias + next))));
    }
  }
}

// Blocks of a product that may be summed up in registers, as a plain sum is.
constexpr std::int64_t most_blocks_in_registers = 8;

// What becomes of a tile's sums: activation(sums + bias), from a row and a column on, into the sink.
template <class Activate, class Sink>
struct FinishInto {
  static constexpr std::int64_t blocks = most_blocks_in_registers;
  static constexpr int stores = 1;

  const float *bias, *scale;
  std::int64_t row, column;
  Activate activate;
  Sink sink;

  template <int first, int end, int rows>
  EVSAM_INLINE void operator()(const Vec (&sums)[rows][2]) const {
    const Vec factor = broadcast(*scale), bias0 = load(bias + column);
    const Vec bias1 = load(bias + column + lanes);
#pragma GCC unroll 16
    for (int i = first; i < end; ++i) {
      const auto line = sink(row + i);
      pass_two(line, column, activate(fma(sums[i][0], factor, bias0)),
               activate(fma(sums[i][1], factor, bias1)));
    }
  }
  EVSAM_INLINE void next() {}
};

// All columns of activation(a * weights + bias), into the sink, for at most most_blocks_in_registers: they
// go there straight from registers, and weights so small stay in L2. Meanwhile as many cache lines from `next`
// on are fetched.
template <class Storage, class E, class Sink>
void multiply_straight_into(const Operand<E>& a, std::int64_t rows, const Matrix<E>& weights,
                            Activation activation, const Storage* next, std::int64_t lines,
                            const Sink& sink) {
  using Shape = AccurateTile<E>;
  const std::int64_t tiles = quotient_up(rows, Shape::rows);
  const std::int64_t of_tile = weights.panel_size() / (panel * in_step<E>);
  with_activation<Storage>(activation, [&](const auto& activate) {
    using Into = FinishInto<std::decay_t<decltype(activate)>, Sink>;
    for (std::int64_t column = 0; column < round_up(weights.columns); column += panel)
      for (std::int64_t t = 0; t < tiles; ++t) {
        const std::int64_t begin = rows * t / tiles, end = rows * (t + 1) / tiles;
        // Tiles that have nothing to fetch fetch what they read.
        const E* panel_in_use = weights.panel_at(column);
        tile_of<Shape>(end - begin, a.elements + begin * block, a.stride(), weights.blocks(), panel_in_use,
                       lines > 0 ? Fetch(next) : Fetch(panel_in_use),
                       Into{weights.bias, weights.scale, begin, column, activate, sink});
        next += of_tile * cache_line<Storage>;
        lines -= of_tile;
      }
  });
}

// Columns [begin, end) of activation(product + bias), into the sink; multiply(first, columns, stride) writes some of
// the product to the sums.
template <class Storage, class E, class Multiply, class Sink>
void product_into(std::int64_t rows, const Matrix<E>& weights, std::int64_t begin, std::int64_t end,
                  const Sums& sums, Activation activation, const Sink& sink, const Multiply& multiply) {
  const std::int64_t at_once = least(Sums::columns, end - begin), stride = Sums::stride(at_once);
  with_activation<Storage>(activation, [&](const auto& activate) {
    for (std::int64_t first = begin; first < end; first += at_once) {
      const std::int64_t columns = least(at_once, end - first);
      multiply(first, columns, stride);
      pass_on(sums.elements, stride, rows, first, columns, weights, activate, sink);
    }
  });
}

// Columns [begin, end) of activation(a * weights + bias), into the sink.
template <class Storage, class E, class Sink>
void multiply_into(const Operand<E>& a, std::int64_t rows, const Matrix<E>& weights,
                   std::int64_t begin, std::int64_t end, const Sums& sums, Activation activation,
                   const Sink& sink) {
  product_into<Storage>(rows, weights, begin, end, sums, activation, sink,
                        [&](std::int64_t first, std::int64_t columns, std::int64_t stride) {
                          multiply(rows, columns, weights.blocks(), a.elements, a.stride(),
                                   weights.panel_at(first), weights.panel_size(), sums.elements, stride);
                        });
}

}  // namespace
}  // namespace evsam::EVSAM_ISA
