// Runs layer_norm_2d on buffers of exactly the size it may touch, for a sanitizer to watch, and checks
// the result against a plain double computation.

#include "evsam/layer_norm_2d.h"

#include "support.h"

namespace {

using namespace support;

void check(DType dtype, std::int64_t rows, std::int64_t channels, bool affine, int num_threads) {
  const DType wide = dtype == DType::float64 ? DType::float64 : DType::float32;
  const double eps = 1.0 / 1024;
  const Values x = sequence(rows * channels, 1), weight = sequence(channels, 2);
  Values expected(x.size());
  for (std::int64_t r = 0; r < rows; ++r) {
    double mean = 0, variance = 0;
    for (std::int64_t c = 0; c < channels; ++c) mean += x[r * channels + c] / channels;
    for (std::int64_t c = 0; c < channels; ++c)
      variance += std::pow(x[r * channels + c] - mean, 2) / channels;
    for (std::int64_t c = 0; c < channels; ++c) {
      double& value = expected[r * channels + c];
      value = (x[r * channels + c] - mean) / std::sqrt(variance + eps);
      if (affine) value = value * weight[c] + weight[c];
    }
  }
  const Tensor x_in(dtype, x), weight_in(wide, weight);
  Tensor y(dtype, rows * channels);
  const void* vector = affine ? weight_in.data() : nullptr;
  evsam::layer_norm_2d(
      {x_in.data(), y.data(), vector, vector, rows, channels, eps, dtype, num_threads});
  compare(join({rows, channels, affine, num_threads}), dtype, expected, y);
  failed |= !x_in.unchanged();
}

void check_all(DType dtype) {
  for (std::int64_t channels : {1, 3, 8, 17, 64, 100})
    for (std::int64_t rows : {0, 1, 5, 700})
      for (bool affine : {false, true})
        for (int num_threads : {1, 3}) check(dtype, rows, channels, affine, num_threads);
}

}  // namespace

int main() {
  return run([](DType dtype) {
    check_all(dtype);
    if (dtype == DType::float32) check_all(DType::float64);
  });
}
