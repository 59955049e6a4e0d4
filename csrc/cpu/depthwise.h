// Depthwise convolution of a few channels that lie in cache, with their padding.
// Included by kernels: everything is private to the including file.
#pragma once

#include <cstdint>

#include "map.h"
#include "scratch.h"

namespace evsam::EVSAM_ISA {
namespace {

// Weights and bias as vectors of channels.
struct DepthwiseWeights {
  float* bias;  // [channels], filled up with zeros
  float* taps;  // [kernel][kernel][channels], filled up with zeros
  std::int64_t channels, kernel;

  DepthwiseWeights(Pieces& pieces, std::int64_t channels, std::int64_t kernel)
      : bias(pieces.take<float>(round_up(channels))),
        taps(pieces.take<float>(kernel * kernel * round_up(channels))),
        channels(channels),
        kernel(kernel) {}

  // For maps whose elements are `scale` times what they stand for.
  template <class Storage>
  void pack(const void* weight, const void* biases, float scale = 1) const {
    const auto* from = static_cast<const Storage*>(weight);
    pack_bias<Storage>(biases, channels, bias);
    const std::int64_t count = kernel * kernel;
    for (std::int64_t tap = 0; tap < count; ++tap)
      for (std::int64_t c = 0; c < round_up(channels); ++c)
        taps[tap * round_up(channels) + c] =
            c < channels ? static_cast<float>(wide(from[c * count + tap])) / scale : 0;
  }
};

// One row of outputs for one vector of channels, into sink(x, value). `padded` is where the kernel's
// first tap lies for the row's first output; its rows and pixels are line_stride and pixel_stride
// elements apart. kernel is that of the weights, or 0 where it is not known at compile time.
template <int kernel, class From, class Sink>
EVSAM_INLINE void filter_row(const From* padded, std::int64_t line_stride, std::int64_t pixel_stride,
                             std::int64_t stride, std::int64_t width, const DepthwiseWeights& weights,
                             std::int64_t channel, const Sink& sink) {
  constexpr int at_once = 8;
  const std::int64_t size = kernel > 0 ? kernel : weights.kernel;
  const std::int64_t tap_stride = round_up(weights.channels), step = stride * pixel_stride;
  const Vec bias = load(weights.bias + channel);
  std::int64_t x = 0;
  for (; x + at_once <= width; x += at_once) {
    const float* tap = weights.taps + channel;
    Vec values[at_once];
#pragma GCC unroll 8
    for (int i = 0; i < at_once; ++i) values[i] = bias;
    for (std::int64_t ky = 0; ky < size; ++ky)
      for (std::int64_t kx = 0; kx < size; ++kx, tap += tap_stride) {
        const Vec weight = load(tap);
        const From* from = padded + x * step + ky * line_stride + kx * pixel_stride;
#pragma GCC unroll 8
        for (int i = 0; i < at_once; ++i) values[i] = fma(load(from + i * step), weight, values[i]);
      }
#pragma GCC unroll 8
    for (int i = 0; i < at_once; ++i) sink(x + i, values[i]);
  }
  for (; x < width; ++x) {
    const float* tap = weights.taps + channel;
    Vec value = bias;
    for (std::int64_t ky = 0; ky < size; ++ky)
      for (std::int64_t kx = 0; kx < size; ++kx, tap += tap_stride)
        value = fma(load(padded + x * step + ky * line_stride + kx * pixel_stride), load(tap), value);
    sink(x, value);
  }
}

}  // namespace
}  // namespace evsam::EVSAM_ISA
