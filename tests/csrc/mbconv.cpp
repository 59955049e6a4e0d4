// Runs mbconv on buffers of exactly the size it may touch, for a sanitizer to watch, and checks the
// result against a plain double computation.

#include "evsam/mbconv.h"

#include "support.h"

namespace {

using namespace support;

void check(DType dtype, std::int64_t batch, std::int64_t height, std::int64_t width,
           const evsam::MBConvShape& shape, int turn, bool stay = false) {
  const auto activation = static_cast<Activation>(turn % 6);
  const bool biases = turn % 3 != 0, has_residual = turn % 2 != 0;
  const int num_threads = 1 + turn % 3;
  const std::int64_t taps = shape.kernel * shape.kernel, mid = shape.mid_channels;
  const Map x{sequence(batch * height * width * shape.in_channels, 1), batch, height, width,
              shape.in_channels};
  const Values expand = weights(mid * shape.in_channels, shape.in_channels, 2);
  const Values depth = weights(mid * taps, taps, 3);
  const Values point = weights(shape.out_channels * mid, mid, 4);
  const Values expand_bias = biases ? sequence(mid, 5) : Values();
  const Values depth_bias = biases ? sequence(mid, 6) : Values();
  const Values point_bias = biases ? sequence(shape.out_channels, 7) : Values();
  const Map expanded = convolved(x, expand, expand_bias, mid, 1, 1, 1, 1, activation);
  const Map filtered =
      convolved(expanded, depth, depth_bias, mid, shape.kernel, shape.stride, 1, mid, activation);
  Map expected =
      convolved(filtered, point, point_bias, shape.out_channels, 1, 1, 1, 1, Activation::none);
  const Values residual = sequence(expected.values.size(), 8);
  if (has_residual) add(expected, residual);

  const Tensor x_in(dtype, x.values), expand_in(dtype, expand), depth_in(dtype, depth);
  const Tensor point_in(dtype, point), expand_bias_in(dtype, expand_bias);
  const Tensor depth_bias_in(dtype, depth_bias), point_bias_in(dtype, point_bias);
  const evsam::MBConvWeights from{expand_in.data(), biases ? expand_bias_in.data() : nullptr,
                                  depth_in.data(),  biases ? depth_bias_in.data() : nullptr,
                                  point_in.data(),  biases ? point_bias_in.data() : nullptr,
                                  shape,            dtype,
                                  stay};
  const PackedWeights packed(evsam::mbconv_pack, from);
  const auto call = [&](void* y, const void* residual) {
    evsam::mbconv({x_in.data(), y, residual, packed.data(), stay ? expand_in.data() : nullptr,
                   stay ? point_in.data() : nullptr, batch, height, width, shape, activation, dtype,
                   num_threads});
  };
  const std::string what = join({batch, height, width, shape.in_channels, mid, shape.out_channels,
                                 shape.kernel, shape.stride, turn});
  compare_written(what, dtype, expected.values, residual, has_residual, call);
  failed |= !x_in.unchanged();
}

}  // namespace

int main() {
  return run([](DType dtype) {
    int turn = 0;
    for (std::int64_t kernel : {1, 3, 5, 7})
      for (std::int64_t stride : {1, 2, 3}) {
        check(dtype, 1, 7, 5, {13, 27, 5, kernel, stride}, turn++);
        check(dtype, 2, 4, 6, {1, 33, 40, kernel, stride}, turn++);
        check(dtype, 1, 9, 11, {32, 64, 32, kernel, stride}, turn++);
      }
    check(dtype, 2, 8, 8, {32, 160, 64, 3, 1}, turn++);
    check(dtype, 1, 1, 1, {1, 1, 1, 3, 1}, turn++);
    check(dtype, 0, 4, 4, {32, 64, 32, 3, 1}, turn++);
    // In forms: the expansion where the input's lines are even, the projection where the output's are.
    for (std::int64_t width : {4, 7, 18})
      for (std::int64_t stride : {1, 2}) {
        for (bool stay : {false, true}) {
          check(dtype, 2, 9, width, {128, 256, 128, 3, stride}, turn++, stay);
          check(dtype, 1, 15, 2 * width, {128, 192, 192, 3, stride}, turn++, stay);
          // Whole pairs of panels of short vectors, yet no whole blocks.
          check(dtype, 1, 9, 2 * width, {128, 144, 144, 3, stride}, turn++, stay);
        }
      }
    // So large that bfloat16 weights stay, too: with whole runs of blocks that are multiplied at once, and without.
    for (bool stay : {false, true})
      for (std::int64_t stride : {1, 2}) check(dtype, 1, 3, 4, {544, 1952, 576, 3, stride}, turn++, stay);
    // So wide that a few lines at a time fill L2, and several of them overlap.
    check(dtype, 1, 12, 150, {2, 40, 3, 3, 1}, turn++);
    check(dtype, 1, 13, 150, {2, 40, 3, 3, 2}, turn++);
    check(dtype, 1, 13, 150, {2, 40, 3, 5, 1}, turn++);
  });
}
