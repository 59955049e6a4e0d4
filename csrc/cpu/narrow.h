// Convolution of a map of few channels, such as a picture. Included by kernels: everything is private to
// the including file.
//
// All that a row of outputs sees is copied to padded float32 lines, from which products read the pixels
// under the kernel where they lie: a row of the kernel is one run of kernel * channels elements, and
// neighbouring outputs are stride * channels apart.
#pragma once

#include <cstdint>

#include "activation.h"
#include "evsam/conv_act.h"
#include "map.h"
#include "scratch.h"

namespace evsam::EVSAM_ISA {
namespace {

// Where copying every pixel for every tap would take longer than the product.
inline bool is_narrow(const ConvShape& conv) {
  return conv.groups == 1 && conv.dilation == 1 && conv.kernel > 1 &&
         conv.kernel * conv.in_channels <= block;
}

template <class Storage>
struct NarrowWeights {
  Matrix<float> matrix;  // rows in the order [kernel][kernel][in_channels]
  ConvShape conv;

  NarrowWeights(Pieces& pieces, const ConvShape& conv)
      : matrix(pieces, conv.kernel * conv.kernel * conv.in_channels, conv.out_channels),
        conv(conv) {}

  void pack(const void* weight, const void* bias) const {
    const auto* from = static_cast<const Storage*>(weight);
    const std::int64_t channels = conv.in_channels, taps = conv.kernel * conv.kernel;
    const auto at = [&](std::int64_t k, std::int64_t n) {
      return wide(from[(n * channels + k % channels) * taps + k / channels]);
    };
    pack_matrix<Storage>(at, bias, matrix);
  }
};

// What one thread needs.
struct NarrowRoom {
  float* lines;  // [kernel][line]
  std::int64_t line;

  NarrowRoom(Pieces& pieces, const ConvShape& conv, std::int64_t width)
      : line((width + 2 * (conv.kernel / 2)) * conv.in_channels + lanes) {
    lines = pieces.take<float>(conv.kernel * line);
    if (lines == nullptr) return;
    for (std::int64_t i = 0; i < conv.kernel * line; ++i) lines[i] = 0;
  }
};

// `rows` neighbouring outputs from x on, one panel of columns, into line(i) of each.
template <int rows, class Activate, class Lines>
EVSAM_INLINE void narrow_tile(const NarrowRoom& room, const ConvShape& conv, std::int64_t x,
                              const float* panel_at, const float* bias, std::int64_t column,
                              const Activate& activate, const Lines& lines_of) {
  const std::int64_t step = conv.stride * conv.in_channels, run = conv.kernel * conv.in_channels;
  Vec sums[rows][2];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
    sums[i][0] = load(bias + column);
    sums[i][1] = load(bias + column + lanes);
  }
  for (std::int64_t ky = 0; ky < conv.kernel; ++ky) {
    const float* from = room.lines + ky * room.line + x * step;
    for (std::int64_t k = 0; k < run; ++k, panel_at += panel) {
      const Vec b0 = load(panel_at), b1 = load(panel_at + lanes);
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i) {
        const Vec value = broadcast(from[i * step + k]);
        sums[i][0] = fma(value, b0, sums[i][0]);
        sums[i][1] = fma(value, b1, sums[i][1]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
    const auto line = lines_of(x + i);
    line(column, activate(sums[i][0]));
    line(column + lanes, activate(sums[i][1]));
  }
}

// One row of outputs of one image, into lines_of(x).
template <class Storage, class Lines>
void convolve_line(const Map<Storage>& in, std::int64_t image, std::int64_t out_y,
                   const NarrowWeights<Storage>& weights, const NarrowRoom& room,
                   Activation activation, const Lines& lines_of) {
  constexpr int at_once = 6;
  const ConvShape& conv = weights.conv;
  const std::int64_t padding = conv.kernel / 2, length = in.width * in.channels;
  for (std::int64_t ky = 0; ky < conv.kernel; ++ky) {
    const std::int64_t y = out_y * conv.stride - padding + ky;
    const bool inside = y >= 0 && y < in.height;
    const Storage* from = in.x + (image * in.height + (inside ? y : 0)) * length;
    float* to = room.lines + ky * room.line + padding * in.channels;
    for (std::int64_t i = 0; i < length; i += lanes)
      store(to + i, inside ? load(from + i, length - i) : zero(), length - i);
  }
  const std::int64_t width = size_after(in.width, conv.stride);
  with_activation<Storage>(activation, [&](const auto& activate) {
    for (std::int64_t column = 0; column < round_up(conv.out_channels); column += panel) {
      const float* panel_at = weights.matrix.panel_at(column);
      std::int64_t x = 0;
      for (; x + at_once <= width; x += at_once)
        narrow_tile<at_once>(room, conv, x, panel_at, weights.matrix.bias, column, activate, lines_of);
      for (; x < width; ++x)
        narrow_tile<1>(room, conv, x, panel_at, weights.matrix.bias, column, activate, lines_of);
    }
  });
}

}  // namespace
}  // namespace evsam::EVSAM_ISA
