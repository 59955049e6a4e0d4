// 3x3 convolution with stride 1 or 2 in fewer multiplications (Winograd 1980; Lavin and Gray, arXiv
// 1509.09308). Included by kernels: everything is private to the including file.
//
// A tile of the map is transformed (input), multiplied point by point of the transform with the weights
// transformed alike, which is one product of matrices per point over many tiles and all channels, and
// transformed back (output). Transforms in two dimensions are those in one, applied to rows and columns.
//
// Of several tiles (a scheme's `tiles`; fewer load weights too often, more leave L2) the transformed map
// stays in L2; weights stream past it, some columns at a time, whose products are transformed back at
// once. Weights are transformed in double when they are packed.
#pragma once

#include <cstdint>

#include "activation.h"
#include "evsam/conv_act.h"
#include "map.h"
#include "scratch.h"

namespace evsam::EVSAM_ISA {
namespace {

// Three outputs of a 3-tap filter from 5 products, with the points +-3/8, +-5/4 and infinity: 25 / 9 = 2.8
// multiplications an output in place of 9. Rounding errors are half of those of four outputs, which take
// 2.25 and leave the error budget of float32 with the best points there are. These points were searched
// for.
struct ThreeOutputs {
  static constexpr int points = 5, outputs = 3, stride = 1, tiles = 21;
  static constexpr double p = 0.375, q = 1.25;

  static int kernel_of(int point) { return point; }
  static constexpr int kernels = 5;
  static double kernel(int point, int tap) {
    constexpr double in_p = 1 / (2 * p * (p * p - q * q)), in_q = 1 / (2 * q * (q * q - p * p));
    constexpr double rows[kernels][3] = {{in_p, in_p * p, in_p * p * p},
                                         {-in_p, in_p * p, -in_p * p * p},
                                         {in_q, in_q * q, in_q * q * q},
                                         {-in_q, in_q * q, -in_q * q * q},
                                         {0, 0, 1}};
    return rows[point][tap];
  }

  EVSAM_INLINE static void input(const Vec (&d)[points], Vec (&v)[points]) {
    const Vec pp = broadcast(p * p), qq = broadcast(q * q);
    const Vec odd_p = fnma(qq, d[1], d[3]), even_p = fnma(qq, d[0], d[2]);
    v[0] = fma(broadcast(p), even_p, odd_p);
    v[1] = fnma(broadcast(p), even_p, odd_p);
    const Vec odd_q = fnma(pp, d[1], d[3]), even_q = fnma(pp, d[0], d[2]);
    v[2] = fma(broadcast(q), even_q, odd_q);
    v[3] = fnma(broadcast(q), even_q, odd_q);
    v[4] = fma(broadcast(p * p * q * q), d[0], fnma(broadcast(p * p + q * q), d[2], d[4]));
  }

  EVSAM_INLINE static void output(const Vec (&m)[points], Vec (&y)[outputs]) {
    const Vec even_p = m[0] + m[1], odd_p = m[0] - m[1];
    const Vec even_q = m[2] + m[3], odd_q = m[2] - m[3];
    y[0] = even_p + even_q;
    y[1] = fma(broadcast(p), odd_p, broadcast(q) * odd_q);
    y[2] = fma(broadcast(p * p), even_p, fma(broadcast(q * q), even_q, m[4]));
  }
};

// Two outputs of a 3-tap filter from 4 products, with the points 0, +-1 and infinity: 4 multiplications
// an output, and two thirds of the rounding errors, for operands of few bits.
struct TwoOutputs {
  static constexpr int points = 4, outputs = 2, stride = 1, tiles = 42;

  static int kernel_of(int point) { return point; }
  static constexpr int kernels = 4;
  static double kernel(int point, int tap) {
    constexpr double rows[kernels][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};
    return rows[point][tap];
  }

  EVSAM_INLINE static void input(const Vec (&d)[points], Vec (&v)[points]) {
    v[0] = d[0] - d[2];
    v[1] = d[1] + d[2];
    v[2] = d[2] - d[1];
    v[3] = d[3] - d[1];
  }

  EVSAM_INLINE static void output(const Vec (&m)[points], Vec (&y)[outputs]) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] + m[3];
  }
};

// Three outputs of a 3-tap filter with stride 2 from 7 products. The outer taps see every other element:
// three outputs of a 2-tap filter from 4 products with the points 0, +-1 and infinity. The middle tap
// sees the elements between and is applied to each.
struct Strided {
  static constexpr int points = 7, outputs = 3, stride = 2, tiles = 28;

  static int kernel_of(int point) { return point < 4 ? point : 4; }
  static constexpr int kernels = 5;
  static double kernel(int index, int tap) {
    constexpr double rows[kernels][3] = {
        {1, 0, 0}, {0.5, 0, 0.5}, {0.5, 0, -0.5}, {0, 0, 1}, {0, 1, 0}};
    return rows[index][tap];
  }

  EVSAM_INLINE static void input(const Vec (&d)[points], Vec (&v)[points]) {
    v[0] = d[0] - d[4];
    v[1] = d[2] + d[4];
    v[2] = d[4] - d[2];
    v[3] = d[6] - d[2];
    v[4] = d[1];
    v[5] = d[3];
    v[6] = d[5];
  }

  EVSAM_INLINE static void output(const Vec (&m)[points], Vec (&y)[outputs]) {
    const Vec sum = m[1] + m[2];
    y[0] = m[0] + sum + m[4];
    y[1] = m[1] - m[2] + m[5];
    y[2] = m[3] + sum + m[6];
  }
};

// The transform with stride 1 for tensors stored as Storage.
template <class Storage>
using UnitStride = Choice<sizeof(Element<Storage>) == 2, TwoOutputs, ThreeOutputs>;

inline bool has_winograd(const ConvShape& conv) {
  return conv.kernel == 3 && conv.stride <= 2 && conv.dilation == 1 && conv.groups == 1 &&
         conv.in_channels % block == 0;
}

// Columns that are multiplied and transformed back together.
constexpr std::int64_t columns_at_once = 64;

template <class Scheme, class Storage>
struct WinogradWeights {
  using E = Element<Storage>;

  float* bias;
  E* panels;  // per kernel of the transform in two dimensions a packed matrix
  std::int64_t in_channels, out_channels;

  WinogradWeights(Pieces& pieces, std::int64_t in_channels, std::int64_t out_channels)
      : bias(pieces.take<float>(round_up(out_channels))),
        panels(pieces.take<E>(Scheme::kernels * Scheme::kernels *
                              packed_size(in_channels, out_channels))),
        in_channels(in_channels),
        out_channels(out_channels) {}

  const E* panel_at(int point_y, int point_x, std::int64_t column) const {
    const int kernel = Scheme::kernel_of(point_y) * Scheme::kernels + Scheme::kernel_of(point_x);
    return panels + kernel * packed_size(in_channels, out_channels) +
           column * round_up(in_channels);
  }

  void pack(const void* weight, const void* biases) const {
    const auto* from = static_cast<const Storage*>(weight);
    pack_bias<Storage>(biases, out_channels, bias);
    for (int i = 0; i < Scheme::kernels * Scheme::kernels; ++i)
      evsam::EVSAM_ISA::pack(
          in_channels, out_channels, panels + i * packed_size(in_channels, out_channels),
          [&](std::int64_t k, std::int64_t n) {
            double transformed = 0;
            for (int y = 0; y < 3; ++y)
              for (int x = 0; x < 3; ++x)
                transformed += Scheme::kernel(i / Scheme::kernels, y) *
                               Scheme::kernel(i % Scheme::kernels, x) *
                               wide(from[((n * in_channels + k) * 3 + y) * 3 + x]);
            return transformed;
          });
  }
};

// What one thread needs for `tiles` tiles.
template <class Scheme, class Storage>
struct WinogradRoom {
  using E = Element<Storage>;
  static constexpr int points = Scheme::points * Scheme::points;
  static constexpr int outputs = Scheme::outputs * Scheme::outputs;

  // Points lie a cache line more than a round number apart: those of one tile are read together.
  std::int64_t transformed_stride, product_stride;
  E* transformed;        // [points][in_channels / block][tiles][block]
  float* products;       // [points][tiles][columns_at_once]
  std::int64_t* pixels;  // [tiles][outputs]
  Storage* zeros;        // [in_channels]

  WinogradRoom(Pieces& pieces, std::int64_t tiles, std::int64_t in_channels)
      : transformed_stride(tiles * round_up(in_channels) + 64 / static_cast<int>(sizeof(E))),
        product_stride(tiles * columns_at_once + 16),
        transformed(pieces.take<E>(points * transformed_stride)),
        products(pieces.take<float>(points * product_stride)),
        pixels(pieces.take<std::int64_t>(tiles * outputs)),
        zeros(pieces.take<Storage>(in_channels)) {}
};

// The tiles of the output of all images.
template <class Scheme>
struct Tiles {
  std::int64_t height, width;  // of the output map
  std::int64_t down, across;
  std::int64_t count;

  template <class Storage>
  explicit Tiles(const Map<Storage>& in)
      : height(size_after(in.height, Scheme::stride)),
        width(size_after(in.width, Scheme::stride)),
        down(quotient_up(height, Scheme::outputs)),
        across(quotient_up(width, Scheme::outputs)),
        count(in.batch * down * across) {}

  // So many at once that every thread has some to do. They are the rows of products whose tiles have
  // `rows`.
  std::int64_t at_once(std::int64_t rows, int num_threads) const {
    const std::int64_t shared = least(Scheme::tiles, quotient_up(count, num_threads));
    return shared < rows ? shared : shared / rows * rows;
  }
};

// Transforms the map under tile `index` and stores where its outputs belong.
template <class Scheme, class Storage>
void transform_tile(const Map<Storage>& in, const Tiles<Scheme>& tiles, std::int64_t index,
                    std::int64_t slot, std::int64_t slots, const WinogradRoom<Scheme, Storage>& room) {
  constexpr int points = Scheme::points, outputs = Scheme::outputs;
  const std::int64_t image = index / (tiles.down * tiles.across);
  const std::int64_t top = index / tiles.across % tiles.down * outputs;
  const std::int64_t left = index % tiles.across * outputs;
  for (int y = 0; y < outputs; ++y)
    for (int x = 0; x < outputs; ++x) {
      const bool inside = top + y < tiles.height && left + x < tiles.width;
      const std::int64_t pixel = (image * tiles.height + top + y) * tiles.width + left + x;
      room.pixels[(slot * outputs + y) * outputs + x] = inside ? pixel : -1;
    }

  const Storage* sources[points][points];
  for (int y = 0; y < points; ++y)
    for (int x = 0; x < points; ++x) {
      const std::int64_t in_y = top * Scheme::stride + y - 1, in_x = left * Scheme::stride + x - 1;
      const bool inside = in_y >= 0 && in_y < in.height && in_x >= 0 && in_x < in.width;
      const std::int64_t pixel = (image * in.height + in_y) * in.width + in_x;
      sources[y][x] = inside ? in.x + pixel * in.channels : room.zeros;
    }
  // What the tile to the right sees beside this: no processor foresees so many streams.
  const std::int64_t ahead = outputs * Scheme::stride * in.channels;
  for (std::int64_t c = 0; c < in.channels; c += lanes) {
    Vec half[points][points];
#pragma GCC unroll 8
    for (int x = 0; x < points; ++x) {
      Vec d[points], v[points];
      if (x >= points - outputs * Scheme::stride)
#pragma GCC unroll 8
        for (int y = 0; y < points; ++y) __builtin_prefetch(sources[y][x] + ahead + c);
#pragma GCC unroll 8
      for (int y = 0; y < points; ++y) d[y] = load(sources[y][x] + c);
      Scheme::input(d, v);
#pragma GCC unroll 8
      for (int y = 0; y < points; ++y) half[y][x] = v[y];
    }
    auto* to = room.transformed + c / block * slots * block + slot * block + c % block;
#pragma GCC unroll 8
    for (int y = 0; y < points; ++y) {
      Vec v[points];
      Scheme::input(half[y], v);
#pragma GCC unroll 8
      for (int x = 0; x < points; ++x) put(to + (y * points + x) * room.transformed_stride, v[x]);
    }
  }
}

// Transforms the products of one tile back, from column `first` on, and passes them on.
template <class Scheme, class Storage, class Activate, class Sink>
void finish_tile(const WinogradRoom<Scheme, Storage>& room, std::int64_t slot, std::int64_t first,
                 std::int64_t end, const float* bias, const Activate& activate, const Sink& sink) {
  constexpr int points = Scheme::points, outputs = Scheme::outputs;
  for (std::int64_t column = first; column < end; column += lanes) {
    const float* from = room.products + slot * columns_at_once + column - first;
    Vec half[outputs][points];
#pragma GCC unroll 8
    for (int x = 0; x < points; ++x) {
      Vec m[points], y[outputs];
#pragma GCC unroll 8
      for (int i = 0; i < points; ++i) m[i] = load(from + (i * points + x) * room.product_stride);
      Scheme::output(m, y);
#pragma GCC unroll 8
      for (int i = 0; i < outputs; ++i) half[i][x] = y[i];
    }
    const Vec offset = load(bias + column);
#pragma GCC unroll 8
    for (int y = 0; y < outputs; ++y) {
      Vec line[outputs];
      Scheme::output(half[y], line);
#pragma GCC unroll 8
      for (int x = 0; x < outputs; ++x)
        sink((slot * outputs + y) * outputs + x)(column, activate(line[x] + offset));
    }
  }
}

// activation(conv(x) + bias) at tiles [first, first + count), into the sink.
template <class Scheme, class Storage, class Sink>
void convolve_tiles(const Map<Storage>& in, const WinogradWeights<Scheme, Storage>& weights,
                    const Tiles<Scheme>& tiles, std::int64_t first, std::int64_t count,
                    const WinogradRoom<Scheme, Storage>& room, Activation activation,
                    const Sink& sink) {
  constexpr int points = Scheme::points;
  for (std::int64_t c = 0; c < in.channels; ++c) room.zeros[c] = Storage{};
  for (std::int64_t t = 0; t < count; ++t) transform_tile(in, tiles, first + t, t, count, room);
  const std::int64_t columns = round_up(weights.out_channels);
  for (std::int64_t begin = 0; begin < columns; begin += columns_at_once) {
    const std::int64_t end = least(begin + columns_at_once, columns);
    for (int y = 0; y < points; ++y)
      for (int x = 0; x < points; ++x) {
        const int point = y * points + x;
        multiply(count, end - begin, blocks_of(in.channels),
                 room.transformed + point * room.transformed_stride, count * block,
                 weights.panel_at(y, x, begin), in.channels * panel,
                 room.products + point * room.product_stride, columns_at_once);
      }
    with_activation<Storage>(activation, [&](const auto& activate) {
      for (std::int64_t t = 0; t < count; ++t)
        finish_tile<Scheme>(room, t, begin, end, weights.bias, activate, sink);
    });
  }
}

}  // namespace
}  // namespace evsam::EVSAM_ISA
