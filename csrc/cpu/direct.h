// Convolution of any shape: the pixels under the kernel are laid out as the rows of a product's left
// operand (im2col), a few output pixels at a time, so that they stay in L2.
// Included by kernels: everything is private to the including file.
#pragma once

#include <cstdint>

#include "evsam/conv_act.h"
#include "map.h"
#include "scratch.h"

namespace evsam::EVSAM_ISA {
namespace {

// One group's weights after another.
template <class Storage>
struct DirectWeights {
  using E = Element<Storage>;

  DirectWeights(Pieces pieces, const ConvShape& conv) : pieces_(pieces), conv_(conv) {}

  std::int64_t bytes() const {
    Pieces pieces = pieces_;
    for (std::int64_t g = 0; g < conv_.groups; ++g) next(pieces);
    return pieces.bytes();
  }

  Matrix<E> group(std::int64_t index) const {
    Pieces pieces = pieces_;
    Pieces one;
    next(one);
    pieces.take<char>(one.bytes() * index);
    return next(pieces);
  }

  void pack(const void* weight, const void* bias) const {
    const auto* from = static_cast<const Storage*>(weight);
    const auto* biases = static_cast<const Storage*>(bias);
    const std::int64_t taps = conv_.kernel * conv_.kernel;
    for (std::int64_t g = 0; g < conv_.groups; ++g) {
      const Matrix<E> to = group(g);
      const std::int64_t channels = to.rows / taps, first = g * to.columns;
      const auto at = [&](std::int64_t k, std::int64_t n) {
        return wide(from[((first + n) * channels + k % channels) * taps + k / channels]);
      };
      pack_matrix<Storage>(at, biases == nullptr ? nullptr : biases + first, to);
    }
  }

 private:
  Matrix<E> next(Pieces& pieces) const {
    const std::int64_t taps = conv_.kernel * conv_.kernel;
    return Matrix<E>(pieces, taps * (conv_.in_channels / conv_.groups),
                     conv_.out_channels / conv_.groups);
  }

  Pieces pieces_;
  ConvShape conv_;
};

// Lays out what the kernel sees of one group at output pixels [first, first + count) of all images.
template <class Storage, class E>
void gather(const Map<Storage>& in, const ConvShape& conv, std::int64_t group, std::int64_t first,
            std::int64_t count, const Operand<E>& to) {
  const std::int64_t height = size_after(in.height, conv.stride);
  const std::int64_t width = size_after(in.width, conv.stride);
  const std::int64_t channels = in.channels / conv.groups;
  const std::int64_t padding = conv.kernel / 2 * conv.dilation;
  // Taps of one row of the kernel that are adjacent in memory are copied as one.
  const bool adjacent = conv.dilation == 1 && conv.groups == 1;
  for (std::int64_t row = 0; row < count; ++row) {
    const std::int64_t pixel = first + row, image = pixel / (height * width);
    const std::int64_t top = pixel / width % height * conv.stride - padding;
    const std::int64_t left = pixel % width * conv.stride - padding;
    std::int64_t column = 0;
    for (std::int64_t ky = 0; ky < conv.kernel; ++ky) {
      const std::int64_t y = top + ky * conv.dilation;
      const bool inside = y >= 0 && y < in.height;
      const Storage* line = in.x + (image * in.height + (inside ? y : 0)) * in.width * in.channels;
      if (!inside) {
        copy<Storage>(nullptr, conv.kernel * channels, to, row, column);
      } else if (adjacent) {
        const std::int64_t begin = most(left, 0), end = least(left + conv.kernel, in.width);
        const std::int64_t before = (begin - left) * channels, copied = (end - begin) * channels;
        const std::int64_t after = (left + conv.kernel - end) * channels;
        copy<Storage>(nullptr, before, to, row, column);
        copy(line + begin * channels, copied, to, row, column + before);
        copy<Storage>(nullptr, after, to, row, column + before + copied);
      } else {
        for (std::int64_t kx = 0; kx < conv.kernel; ++kx) {
          const std::int64_t x = left + kx * conv.dilation;
          const Storage* from = line + x * in.channels + group * channels;
          copy(x >= 0 && x < in.width ? from : nullptr, channels, to, row, column + kx * channels);
        }
      }
      column += conv.kernel * channels;
    }
    copy<Storage>(nullptr, round_up(column) - column, to, row, column);
  }
}

// Output pixels that a thread works on at once, with `columns` columns of operands for each.
template <class E>
std::int64_t pixels_at_once(std::int64_t pixels, std::int64_t columns, int num_threads) {
  constexpr std::int64_t bytes = 384 << 10, highest = 8 * max_rows;
  const std::int64_t fitting = bytes / (columns * static_cast<std::int64_t>(sizeof(E)));
  const std::int64_t shared = quotient_up(pixels, 2 * num_threads);
  return most(least(least(fitting, highest), shared), max_rows);
}

}  // namespace
}  // namespace evsam::EVSAM_ISA
