// Runs fused_mbconv on buffers of exactly the size it may touch, for a sanitizer to watch, and checks the
// result against a plain double computation.

#include "evsam/fused_mbconv.h"

#include "support.h"

namespace {

using namespace support;

void check(DType dtype, std::int64_t batch, std::int64_t height, std::int64_t width,
           const evsam::FusedMBConvShape& shape, int turn) {
  const auto activation = static_cast<Activation>(turn % 6);
  const bool biases = turn % 3 != 0, has_residual = turn % 2 != 0;
  const int num_threads = 1 + turn % 3;
  const std::int64_t taps = shape.kernel * shape.kernel, mid = shape.mid_channels;
  const Map x{sequence(batch * height * width * shape.in_channels, 1), batch, height, width,
              shape.in_channels};
  const Values spatial = weights(mid * shape.in_channels * taps, shape.in_channels * taps, 2);
  const Values point = weights(shape.out_channels * mid, mid, 3);
  const Values spatial_bias = biases ? sequence(mid, 4) : Values();
  const Values point_bias = biases ? sequence(shape.out_channels, 5) : Values();
  const Map expanded =
      convolved(x, spatial, spatial_bias, mid, shape.kernel, shape.stride, 1, 1, activation);
  Map expected =
      convolved(expanded, point, point_bias, shape.out_channels, 1, 1, 1, 1, Activation::none);
  const Values residual = sequence(expected.values.size(), 6);
  if (has_residual) add(expected, residual);

  const Tensor x_in(dtype, x.values), spatial_in(dtype, spatial), point_in(dtype, point);
  const Tensor spatial_bias_in(dtype, spatial_bias), point_bias_in(dtype, point_bias);
  const evsam::FusedMBConvWeights from{spatial_in.data(), biases ? spatial_bias_in.data() : nullptr,
                                       point_in.data(), biases ? point_bias_in.data() : nullptr,
                                       shape, dtype};
  const PackedWeights packed(evsam::fused_mbconv_pack, from);
  const auto call = [&](void* y, const void* residual) {
    evsam::fused_mbconv({x_in.data(), y, residual, packed.data(), batch, height, width, shape, activation, dtype,
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
        check(dtype, 1, 7, 5, {13, 27, 5, kernel, stride, false}, turn++);
        check(dtype, 2, 4, 6, {1, 33, 40, kernel, stride, false}, turn++);
      }
    for (bool large_maps : {false, true})
      for (std::int64_t stride : {1, 2}) {
        for (std::int64_t size : {1, 2, 3, 5, 6, 13})
          check(dtype, 1, size, 14 - size, {32, 40, 33, 3, stride, large_maps}, turn++);
        check(dtype, 2, 9, 8, {96, 96, 64, 3, stride, large_maps}, turn++);
        // In forms where tiles have four outputs: whole tiles and others, one and two steps of expanded channels.
        check(dtype, 2, 9, 16, {96, 128, 128, 3, stride, large_maps}, turn++);
        check(dtype, 1, 16, 6, {96, 192, 192, 3, stride, large_maps}, turn++);
      }
    check(dtype, 0, 4, 4, {32, 40, 32, 3, 1, false}, turn++);
    check(dtype, 1, 5, 5, {32, 288, 32, 3, 1, false}, turn++);
  });
}
