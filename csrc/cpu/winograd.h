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

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "activation.h"
#include "evsam/conv_act.h"
#include "map.h"
#include "scratch.h"
#include "strassen.h"

namespace evsam::EVSAM_ISA {
namespace {

// Four outputs of a 3-tap filter from 6 products, with the points 0, +-sqrt(1/2), +-sqrt(2) and infinity:
// 36 / 16 = 2.25 multiplications an output in place of 9. The usual points 0, +-1, +-2 double the rounding
// errors; the powers of these and their inverses are balanced.
struct FourOutputs {
  static constexpr int points = 6, outputs = 4, stride = 1, tiles = 28;
  static constexpr double a = 0.70710678118654752, b = 2 * a;

  static int kernel_of(int point) { return point; }
  static constexpr int kernels = 6;
  static double kernel(int point, int tap) {
    constexpr double rows[kernels][3] = {{1, 0, 0},
                                         {-2.0 / 3, -2.0 / 3 * a, -2.0 / 3 * a * a},
                                         {-2.0 / 3, 2.0 / 3 * a, -2.0 / 3 * a * a},
                                         {1.0 / 6, b / 6, b * b / 6},
                                         {1.0 / 6, -b / 6, b * b / 6},
                                         {0, 0, 1}};
    return rows[point][tap];
  }

  EVSAM_INLINE static void input(const Vec (&d)[points], Vec (&v)[points]) {
    const Vec two = broadcast(2), half = broadcast(0.5f), sum = broadcast(2.5f);
    v[0] = fnma(sum, d[2], d[0] + d[4]);
    const Vec even_a = fnma(two, d[2], d[4]), odd_a = fnma(two, d[1], d[3]);
    v[1] = fma(broadcast(a), odd_a, even_a);
    v[2] = fnma(broadcast(a), odd_a, even_a);
    const Vec even_b = fnma(half, d[2], d[4]), odd_b = fnma(half, d[1], d[3]);
    v[3] = fma(broadcast(b), odd_b, even_b);
    v[4] = fnma(broadcast(b), odd_b, even_b);
    v[5] = fnma(sum, d[3], d[1] + d[5]);
  }

  EVSAM_INLINE static void output(const Vec (&m)[points], Vec (&y)[outputs]) {
    const Vec even_a = m[1] + m[2], odd_a = m[1] - m[2];
    const Vec even_b = m[3] + m[4], odd_b = m[3] - m[4];
    y[0] = m[0] + even_a + even_b;
    y[1] = fma(broadcast(a), odd_a, broadcast(b) * odd_b);
    y[2] = fma(broadcast(0.5f), even_a, broadcast(2) * even_b);
    y[3] = fma(broadcast(a / 2), odd_a, fma(broadcast(2 * b), odd_b, m[5]));
  }
};

// Three outputs of a 3-tap filter from 5 products, with the points +-3/8, +-5/4 and infinity: 25 / 9 = 2.8
// multiplications an output, and half the rounding errors. These points were searched for.
struct ThreeOutputs {
  static constexpr int points = 5, outputs = 3, stride = 1, tiles = 28;
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

// Four outputs of a 3-tap filter with stride 2 from 9 products. The outer taps see every other element:
// four outputs of a 2-tap filter from 5 products with the points of ThreeOutputs. The middle tap sees the
// elements between and is applied to each.
struct FourStrided {
  static constexpr int points = 9, outputs = 4, stride = 2, tiles = 14;
  static constexpr double p = 0.375, q = 1.25;

  static int kernel_of(int point) { return point < 5 ? point : 5; }
  static constexpr int kernels = 6;
  static double kernel(int index, int tap) {
    constexpr double in_p = 1 / (2 * p * (p * p - q * q)), in_q = 1 / (2 * q * (q * q - p * p));
    constexpr double rows[kernels][3] = {{in_p, 0, in_p * p},  {-in_p, 0, in_p * p},
                                         {in_q, 0, in_q * q},  {-in_q, 0, in_q * q},
                                         {0, 0, 1},            {0, 1, 0}};
    return rows[index][tap];
  }

  EVSAM_INLINE static void input(const Vec (&d)[points], Vec (&v)[points]) {
    const Vec outer[5] = {d[0], d[2], d[4], d[6], d[8]};
    Vec transformed[5];
    ThreeOutputs::input(outer, transformed);
#pragma GCC unroll 5
    for (int i = 0; i < 5; ++i) v[i] = transformed[i];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) v[5 + i] = d[2 * i + 1];
  }

  EVSAM_INLINE static void output(const Vec (&m)[points], Vec (&y)[outputs]) {
    const Vec even_p = m[0] + m[1], odd_p = m[0] - m[1];
    const Vec even_q = m[2] + m[3], odd_q = m[2] - m[3];
    y[0] = even_p + even_q + m[5];
    y[1] = fma(broadcast(p), odd_p, fma(broadcast(q), odd_q, m[6]));
    y[2] = fma(broadcast(p * p), even_p, fma(broadcast(q * q), even_q, m[7]));
    y[3] = fma(broadcast(p * p * p), odd_p, fma(broadcast(q * q * q), odd_q, m[4] + m[8]));
  }
};

inline bool has_winograd(const ConvShape& conv) {
  return conv.kernel == 3 && conv.stride <= 2 && conv.dilation == 1 && conv.groups == 1 &&
         conv.in_channels % block == 0;
}

// Calls use(scheme) with the scheme of a convolution whose products have elements E.
template <class E, class Use>
auto with_scheme(const ConvShape& conv, const Use& use) {
  if (conv.stride == 2) return use(FourStrided{});
  return use(Choice<sizeof(E) == 2, TwoOutputs, ThreeOutputs>{});
}

// The same for a convolution of large maps whose result is rounded and summed up by another product: the
// errors of that one leave more room.
template <class E, class Use>
auto with_larger_scheme(const ConvShape& conv, const Use& use) {
  if (conv.stride == 2) return use(FourStrided{});
  if constexpr (sizeof(E) == 4) {
    // A plain sum over 9 * 64 products is still more accurate than the transform of four outputs, beside a value that
    // is far larger than the others.
    if (conv.in_channels > 64) return use(FourOutputs{});
  }
  return use(ThreeOutputs{});
}

// Columns that are multiplied and transformed back together.
constexpr std::int64_t columns_at_once = 64;

// The kernels of a transform are rounded one after another, and each makes up for what it can of the errors
// of those before it (as in Frantar et al., arXiv 2210.17323, of a layer's weights): by the form below, this
// takes a quarter (two outputs) to three fifths (four) off the squared error that comes from weights.
//
// For a map of independent elements that error is a quadratic form e^T M e of the kernels' errors e; in one
// dimension M_ij is the sum of (A^T A)_pq (B B^T)_pq over the points p of kernel i and q of kernel j, A being
// the transform of outputs and B that of inputs, and in two it is the Kronecker product of that with itself.
// With M = L^T D L, where L has ones on its diagonal and zeros above it, D is what remains of each kernel's
// error, and row i of L what kernel i is made smaller by of the errors before it.
template <class Scheme>
struct Rounding {
  static constexpr int points = Scheme::points, outputs = Scheme::outputs, kernels = Scheme::kernels;

  double made_up_for[kernels][kernels];  // L in one dimension

  Rounding() {
    double in[points][points], out[points][outputs];
    for (int one = 0; one < points; ++one) {
      Vec unit[points], transformed[points], result[outputs];
      for (int i = 0; i < points; ++i) unit[i] = broadcast(i == one ? 1 : 0);
      Scheme::input(unit, transformed);
      Scheme::output(unit, result);
      for (int i = 0; i < points; ++i) in[i][one] = first_of(transformed[i]);
      for (int i = 0; i < outputs; ++i) out[one][i] = first_of(result[i]);
    }
    double form[kernels][kernels] = {};
    for (int p = 0; p < points; ++p)
      for (int q = 0; q < points; ++q)
        form[Scheme::kernel_of(p)][Scheme::kernel_of(q)] += dot(in[p], in[q]) * dot(out[p], out[q]);
    for (int i = kernels - 1; i >= 0; --i) {
      for (int j = 0; j < kernels; ++j) made_up_for[i][j] = form[i][j] / form[i][i];
      for (int j = 0; j < i; ++j)
        for (int k = 0; k < i; ++k) form[j][k] -= made_up_for[i][j] * form[i][k];
    }
  }

  // Calls use(kernel, element) with every kernel rounded.
  template <class E, class Use>
  void round(const double (&kernel)[kernels][kernels], const Use& use) const {
    double past[kernels][kernels];  // sum over j <= x of L_xj times the error of kernel [y][j]
    for (int y = 0; y < kernels; ++y) {
      double error[kernels];
      for (int x = 0; x < kernels; ++x) {
        past[y][x] = 0;
        for (int j = 0; j < x; ++j) past[y][x] += made_up_for[x][j] * error[j];
        double wanted = kernel[y][x] - past[y][x];
        for (int j = 0; j < y; ++j) wanted -= made_up_for[y][j] * past[j][x];
        const E rounded = element<E>(wanted);
        error[x] = wide(rounded) - kernel[y][x];
        past[y][x] += error[x];
        use(y * kernels + x, rounded);
      }
    }
  }

 private:
  static double first_of(Vec v) {
    float values[lanes];
    store(values, v);
    return values[0];
  }

  template <int count>
  static double dot(const double (&a)[count], const double (&b)[count]) {
    double sum = 0;
    for (int i = 0; i < count; ++i) sum += a[i] * b[i];
    return sum;
  }
};

template <class Scheme, class Storage>
struct WinogradWeights {
  using E = Element<Storage>;

  float* bias;
  float* scale;  // of products with panels
  E* panels;     // per kernel of the transform in two dimensions a packed matrix
  std::int64_t in_channels, out_channels;

  WinogradWeights(Pieces& pieces, std::int64_t in_channels, std::int64_t out_channels)
      : bias(pieces.take<float>(round_up(out_channels))),
        scale(pieces.take<float>(1)),
        panels(pieces.take<E>(Scheme::kernels * Scheme::kernels *
                              packed_size(in_channels, out_channels))),
        in_channels(in_channels),
        out_channels(out_channels) {}

  const E* panel_at(int point, std::int64_t column) const {
    const int kernel = Scheme::kernel_of(point / Scheme::points) * Scheme::kernels +
                       Scheme::kernel_of(point % Scheme::points);
    return panels + kernel * packed_size(in_channels, out_channels) +
           column * round_up(in_channels);
  }

  void pack(const void* weight, const void* biases) const {
    constexpr int kernels = Scheme::kernels;
    const auto* from = static_cast<const Storage*>(weight);
    pack_bias<Storage>(biases, out_channels, bias);
    const auto transform = [&](std::int64_t k, std::int64_t n, double (&to)[kernels][kernels]) {
      const Storage* taps = from + (n * in_channels + k) * 9;
      double half[kernels][3] = {};
      for (int i = 0; i < kernels; ++i)
        for (int x = 0; x < 3; ++x)
          for (int y = 0; y < 3; ++y) half[i][x] += Scheme::kernel(i, y) * wide(taps[y * 3 + x]);
      for (int i = 0; i < kernels; ++i)
        for (int j = 0; j < kernels; ++j) {
          to[i][j] = 0;
          for (int x = 0; x < 3; ++x) to[i][j] += Scheme::kernel(j, x) * half[i][x];
        }
    };
    const double larger =
        weight_headroom<E>(in_channels, out_channels, [&](std::int64_t k, std::int64_t n) {
          double transformed[kernels][kernels], largest = 0;
          transform(k, n, transformed);
          for (const auto& line : transformed)
            for (const double value : line) largest = std::fmax(largest, std::fabs(value));
          return largest;
        });
    *scale = static_cast<float>(1 / (larger * headroom<E>));
    const Rounding<Scheme> rounding;
    const std::int64_t size = packed_size(in_channels, out_channels);
    for (std::int64_t n = 0; n < round_up(out_channels); ++n)
      for (std::int64_t k = 0; k < round_up(in_channels); ++k) {
        double transformed[kernels][kernels] = {};
        if (n < out_channels && k < in_channels) transform(k, n, transformed);
        for (auto& line : transformed)
          for (double& value : line) value *= larger;
        E* to = panels + packed_index<E>(in_channels, k, n);
        rounding.template round<E>(transformed, [&](int kernel, E value) { to[kernel * size] = value; });
      }
  }
};

// The rows that a tile's outputs are: as many as lie within the map, line by line.
struct Place {
  std::int64_t first, height, width;
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
  std::int64_t* pixels;  // of the output map, one for every row of what tiles give: [tiles * outputs]
  Place* places;         // [tiles]
  Storage* zeros;        // [in_channels]

  WinogradRoom(Pieces& pieces, std::int64_t tiles, std::int64_t in_channels)
      : transformed_stride(tiles * round_up(in_channels) + 64 / static_cast<int>(sizeof(E))),
        product_stride(tiles * columns_at_once + 16),
        transformed(pieces.take<E>(points * transformed_stride)),
        products(pieces.take<float>(points * product_stride)),
        pixels(pieces.take<std::int64_t>(tiles * outputs)),
        places(pieces.take<Place>(tiles)),
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

// No pixel of the map, for a row that is computed in vain.
constexpr std::int64_t outside = -1;

// Transforms the map under tile `index` and stores where its outputs belong, which are rows from `row`
// on, all of them where tiles are to be `whole`. Returns the row after them.
template <class Scheme, bool whole, class Storage>
std::int64_t transform_tile(const Map<Storage>& in, const Tiles<Scheme>& tiles, std::int64_t index,
                            std::int64_t slot, std::int64_t slots, std::int64_t row,
                            const WinogradRoom<Scheme, Storage>& room) {
  constexpr int points = Scheme::points, outputs = Scheme::outputs;
  const std::int64_t image = index / (tiles.down * tiles.across);
  const std::int64_t top = index / tiles.across % tiles.down * outputs;
  const std::int64_t left = index % tiles.across * outputs;
  const std::int64_t height = least(outputs, tiles.height - top), width = least(outputs, tiles.width - left);
  const Place place{row, whole ? outputs : height, whole ? outputs : width};
  for (std::int64_t y = 0; y < place.height; ++y)
    for (std::int64_t x = 0; x < place.width; ++x)
      room.pixels[row++] =
          y < height && x < width ? (image * tiles.height + top + y) * tiles.width + left + x : outside;
  room.places[slot] = place;

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
  return row;
}

// Transforms some columns of a tile's products back in one dimension, `from` being those of the first point.
template <class Scheme>
EVSAM_INLINE void transform_back(const float* from, std::int64_t stride,
                                 Vec (&half)[Scheme::outputs][Scheme::points]) {
  constexpr int points = Scheme::points, outputs = Scheme::outputs;
#pragma GCC unroll 9
  for (int x = 0; x < points; ++x) {
    Vec m[points], y[outputs];
#pragma GCC unroll 9
    for (int i = 0; i < points; ++i) m[i] = load(from + (i * points + x) * stride);
    Scheme::output(m, y);
#pragma GCC unroll 8
    for (int i = 0; i < outputs; ++i) half[i][x] = y[i];
  }
}

// Transforms the products of one tile back, from column `first` on, and passes them on. With `whole` all
// outputs lie within the map, and each has code of its own.
//
// Out of line, because compilers take disproportionately long over a function that holds several of
// these; and with a sink by value, so that what it holds is nevertheless in registers.
template <class Scheme, bool whole, class Storage, class Activate, class Sink>
__attribute__((noinline)) void finish_tile(const WinogradRoom<Scheme, Storage>& room,
                                           std::int64_t slot, std::int64_t first, std::int64_t end,
                                           const WinogradWeights<Scheme, Storage>& weights,
                                           Activate activate, Sink sink) {
  constexpr int points = Scheme::points, outputs = Scheme::outputs;
  const Place place = room.places[slot];
  for (std::int64_t column = first; column < end; column += lanes) {
    const float* from = room.products + slot * columns_at_once + column - first;
    Vec half[outputs][points];
    transform_back<Scheme>(from, room.product_stride, half);
    const Vec scale = broadcast(*weights.scale), bias = load(weights.bias + column);
    if constexpr (whole) {
#pragma GCC unroll 8
      for (int y = 0; y < outputs; ++y) {
        Vec line[outputs];
        Scheme::output(half[y], line);
#pragma GCC unroll 8
        for (int x = 0; x < outputs; ++x)
          sink(place.first + y * outputs + x)(column, activate(fma(line[x], scale, bias)));
      }
    } else {
      Vec lines[outputs][outputs];
#pragma GCC unroll 8
      for (int y = 0; y < outputs; ++y) Scheme::output(half[y], lines[y]);
      std::int64_t row = place.first;
#pragma GCC unroll 1
      for (int y = 0; y < place.height; ++y)
#pragma GCC unroll 1
        for (int x = 0; x < place.width; ++x)
          sink(row++)(column, activate(fma(lines[y][x], scale, bias)));
    }
  }
}

// The same for the two blocks of columns from `first` on, whose forms they become: the pair k of the left operand's
// blocks. Neighbouring pixels are the pairs of its rows.
template <class Scheme, class Storage, class Activate>
__attribute__((noinline)) void finish_tile_in_forms(const WinogradRoom<Scheme, Storage>& room, std::int64_t slot,
                                                    std::int64_t first,
                                                    const WinogradWeights<Scheme, Storage>& weights,
                                                    Activate activate, LeftForms left, std::int64_t k) {
  constexpr int outputs = Scheme::outputs;
  for (std::int64_t c = 0; c < block; c += lanes) {
    Vec half[2][outputs][Scheme::points];
    for (int part = 0; part < 2; ++part)
      transform_back<Scheme>(room.products + slot * columns_at_once + part * block + c, room.product_stride,
                             half[part]);
    const float* bias = weights.bias + first + c;
    const Vec scale = broadcast(*weights.scale), bias1 = load(bias), bias2 = load(bias + block);
    float* to = left.elements + k * left.stride() + room.places[slot].first / 2 * block + c;
#pragma GCC unroll 1
    for (int y = 0; y < outputs; ++y) {
      Vec one[outputs], two[outputs];
      Scheme::output(half[0][y], one);
      Scheme::output(half[1][y], two);
#pragma GCC unroll 4
      for (int x = 0; x < outputs; x += 2, to += block)
        left.put(to, activate(fma(one[x], scale, bias1)), activate(fma(two[x], scale, bias2)),
                 activate(fma(one[x + 1], scale, bias1)), activate(fma(two[x + 1], scale, bias2)));
    }
  }
}

// Transforms the map under tiles [first, first + count), as transform_tile. Returns the number of rows.
template <class Scheme, bool whole = false, class Storage>
std::int64_t transform_tiles(const Map<Storage>& in, const Tiles<Scheme>& tiles, std::int64_t first,
                             std::int64_t count, const WinogradRoom<Scheme, Storage>& room) {
  for (std::int64_t c = 0; c < in.channels; ++c) room.zeros[c] = Storage{};
  std::int64_t rows = 0;
  for (std::int64_t t = 0; t < count; ++t)
    rows = transform_tile<Scheme, whole>(in, tiles, first + t, t, count, rows, room);
  return rows;
}

// Columns [first, last) of activation(conv(x) + bias) at the tiles whose maps are transformed, into a sink or as the
// forms of a left operand.
template <class Scheme, class Storage, class Sink>
void convolve_columns(const WinogradWeights<Scheme, Storage>& weights, std::int64_t count, std::int64_t first,
                      std::int64_t last, const WinogradRoom<Scheme, Storage>& room, Activation activation,
                      const Sink& sink) {
  using E = Element<Storage>;
  constexpr int points = Scheme::points * Scheme::points;
  const std::int64_t columns = round_up(weights.out_channels), channels = weights.in_channels;
  for (std::int64_t begin = first; begin < last; begin += columns_at_once) {
    const std::int64_t end = least(begin + columns_at_once, last);
    for (int point = 0; point < points; ++point) {
      const E* next = weights.panel_at(point + 1 < points ? point + 1 : 0,
                                       point + 1 < points ? begin : end < columns ? end : 0);
      multiply<AccurateTile<E>>(count, end - begin, blocks_of(channels),
               room.transformed + point * room.transformed_stride, count * block,
               weights.panel_at(point, begin), channels * panel,
               room.products + point * room.product_stride, columns_at_once, false, next);
    }
    with_activation<Storage>(activation, [&](const auto& activate) {
      using Activate = std::decay_t<decltype(activate)>;
      for (std::int64_t t = 0; t < count; ++t) {
        if constexpr (same<Sink, LeftForms>) {
          finish_tile_in_forms<Scheme>(room, t, begin, weights, activate, sink, (begin - first) / columns_at_once);
        } else {
          // One that is looked up for every vector would gain nothing from so much code.
          if constexpr (!same<Activate, AnyActivation<Storage>>) {
            if (room.places[t].height == Scheme::outputs && room.places[t].width == Scheme::outputs) {
              finish_tile<Scheme, true>(room, t, begin, end, weights, activate, sink);
              continue;
            }
          }
          finish_tile<Scheme, false>(room, t, begin, end, weights, activate, sink);
        }
      }
    });
  }
}

// activation(conv(x) + bias) at tiles [first, first + count), into the sink. Returns the number of rows.
template <class Scheme, class Storage, class Sink>
std::int64_t convolve_tiles(const Map<Storage>& in, const WinogradWeights<Scheme, Storage>& weights,
                            const Tiles<Scheme>& tiles, std::int64_t first, std::int64_t count,
                            const WinogradRoom<Scheme, Storage>& room, Activation activation,
                            const Sink& sink) {
  const std::int64_t rows = transform_tiles(in, tiles, first, count, room);
  convolve_columns(weights, count, 0, round_up(weights.out_channels), room, activation, sink);
  return rows;
}

}  // namespace
}  // namespace evsam::EVSAM_ISA
