// Runs conv_act on buffers of exactly the size it may touch, for a sanitizer to watch, and checks the
// result against a plain double computation.

#include "evsam/conv_act.h"

#include "support.h"

namespace {

using namespace support;

struct Case {
  std::int64_t batch, height, width;
  evsam::ConvShape conv;
  Activation activation;
  bool bias, residual;
};

void check(DType dtype, const Case& c, int num_threads) {
  const evsam::ConvShape& conv = c.conv;
  const std::int64_t part = conv.in_channels / conv.groups, taps = conv.kernel * conv.kernel;
  const Map x{sequence(c.batch * c.height * c.width * conv.in_channels, 1), c.batch, c.height,
              c.width, conv.in_channels};
  const Values weight = weights(conv.out_channels * part * taps, part * taps, 2);
  const Values bias = c.bias ? sequence(conv.out_channels, 3) : Values();
  Map expected = convolved(x, weight, bias, conv.out_channels, conv.kernel, conv.stride,
                           conv.dilation, conv.groups, c.activation);
  const Values residual = sequence(expected.values.size(), 4);
  if (c.residual) add(expected, residual);

  const Tensor x_in(dtype, x.values), weight_in(dtype, weight), bias_in(dtype, bias);
  const evsam::ConvActWeights from{weight_in.data(), c.bias ? bias_in.data() : nullptr, conv, dtype};
  const PackedWeights packed(evsam::conv_act_pack, from);
  const auto call = [&](void* y, const void* residual) {
    evsam::conv_act({x_in.data(), y, residual, packed.data(), c.batch, c.height, c.width, conv, c.activation, dtype,
                     num_threads});
  };
  const std::string what =
      join({c.batch, c.height, c.width, conv.in_channels, conv.out_channels, conv.kernel,
            conv.stride, conv.dilation, conv.groups, static_cast<int>(c.activation), num_threads});
  compare_written(what, dtype, expected.values, residual, c.residual, call);
  failed |= !x_in.unchanged();
}

}  // namespace

int main() {
  return run([](DType dtype) {
    int turn = 0;
    const auto each = [&](std::int64_t batch, std::int64_t height, std::int64_t width,
                          const evsam::ConvShape& conv) {
      const auto activation = static_cast<Activation>(turn % 6);
      const bool bias = turn % 3 != 0, residual = turn % 2 != 0;
      check(dtype, {batch, height, width, conv, activation, bias, residual}, 1 + turn % 3);
      ++turn;
    };
    for (std::int64_t kernel : {1, 3, 5, 7})
      for (std::int64_t stride : {1, 2, 3})
        for (std::int64_t dilation : {1, 2}) {
          each(1, 7, 5, {13, 27, kernel, stride, dilation, 1});
          each(2, 4, 6, {8, 12, kernel, stride, dilation, 4});
          each(1, 5, 6, {40, 40, kernel, stride, dilation, 40});
        }
    // Through transforms: every remainder of tiles and of columns.
    for (std::int64_t stride : {1, 2}) {
      for (std::int64_t size : {1, 2, 3, 4, 5, 6, 13})
        each(1, size, 14 - size, {32, 40, 3, stride, 1, 1});
      each(2, 9, 8, {64, 72, 3, stride, 1, 1});
    }
    // Few channels, read in place.
    for (std::int64_t stride : {1, 2, 3}) each(2, 9, 16, {3, 33, 3, stride, 1, 1});
    each(1, 1, 1, {1, 1, 1, 1, 1, 1});
    each(0, 4, 4, {32, 8, 3, 1, 1, 1});
    each(1, 16, 16, {96, 64, 1, 1, 1, 1});
  });
}
