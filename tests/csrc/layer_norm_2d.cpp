// Runs layer_norm_2d on buffers of exactly the size it may touch, for a sanitizer to watch, and checks
// the result against a plain double computation.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "evsam/isa.h"
#include "evsam/layer_norm_2d.h"

namespace {

using evsam::DType;

std::size_t size_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

// Small integers and halves of them are exact in every type.
double value(std::int64_t i) { return static_cast<double>((i * 37 + i / 5 * 11) % 23 - 11) / 2; }

// value(0), value(1), ... as `dtype`.
std::vector<char> sequence(DType dtype, std::int64_t count) {
  std::vector<char> bytes(count * size_of(dtype));
  for (std::int64_t i = 0; i < count; ++i) {
    char* to = bytes.data() + i * size_of(dtype);
    const double wide = value(i);
    const float single = static_cast<float>(wide);
    std::uint32_t bits;
    std::memcpy(&bits, &single, 4);
    if (dtype == DType::float64) std::memcpy(to, &wide, 8);
    if (dtype == DType::float32) std::memcpy(to, &single, 4);
    if (dtype == DType::bfloat16) {
      const auto half = static_cast<std::uint16_t>(bits >> 16);
      std::memcpy(to, &half, 2);
    }
    if (dtype == DType::float16) {
      const std::uint32_t magnitude = bits & 0x7fffffffu;
      const std::uint32_t rebiased = magnitude == 0 ? 0 : (magnitude - (112u << 23)) >> 13;
      const auto half = static_cast<std::uint16_t>(rebiased | (bits >> 16 & 0x8000u));
      std::memcpy(to, &half, 2);
    }
  }
  return bytes;
}

double element(const std::vector<char>& bytes, DType dtype, std::int64_t i) {
  const char* from = bytes.data() + i * size_of(dtype);
  if (dtype == DType::float64) {
    double wide;
    std::memcpy(&wide, from, 8);
    return wide;
  }
  if (dtype == DType::float32) {
    float single;
    std::memcpy(&single, from, 4);
    return single;
  }
  std::uint16_t half;
  std::memcpy(&half, from, 2);
  const int mantissa_bits = dtype == DType::float16 ? 10 : 7;
  const int bias = dtype == DType::float16 ? 15 : 127;
  const int exponent = (half & 0x7fff) >> mantissa_bits;
  const double mantissa = half & ((1 << mantissa_bits) - 1);
  const double leading = exponent == 0 ? 0 : 1 << mantissa_bits;
  const int power = (exponent == 0 ? 1 : exponent) - bias - mantissa_bits;
  return (half & 0x8000 ? -1 : 1) * std::ldexp(leading + mantissa, power);
}

bool agrees(DType dtype, std::int64_t rows, std::int64_t channels, bool affine, int num_threads) {
  const DType wide = dtype == DType::float64 ? DType::float64 : DType::float32;
  const std::vector<char> x = sequence(dtype, rows * channels);
  const std::vector<char> vector = sequence(wide, channels);
  std::vector<char> y(x.size());
  const double eps = 1e-3;
  evsam::layer_norm_2d({x.data(), y.data(), affine ? vector.data() : nullptr,
                        affine ? vector.data() : nullptr, rows, channels, eps, dtype, num_threads});
  const double tolerance = dtype == DType::float64    ? 1e-13
                           : dtype == DType::float32  ? 1e-5
                           : dtype == DType::bfloat16 ? 1.0 / 256
                                                      : 1.0 / 2048;
  for (std::int64_t r = 0; r < rows; ++r) {
    double mean = 0, variance = 0;
    for (std::int64_t c = 0; c < channels; ++c) mean += value(r * channels + c) / channels;
    for (std::int64_t c = 0; c < channels; ++c)
      variance += std::pow(value(r * channels + c) - mean, 2) / channels;
    for (std::int64_t c = 0; c < channels; ++c) {
      double expected = (value(r * channels + c) - mean) / std::sqrt(variance + eps);
      if (affine) expected = expected * value(c) + value(c);
      const double actual = element(y, dtype, r * channels + c);
      if (!(std::abs(actual - expected) <= tolerance * (1 + std::abs(expected)))) {
        std::printf("[%ld, %ld] at [%ld, %ld]: %g instead of %g\n", long(rows), long(channels),
                    long(r), long(c), actual, expected);
        return false;
      }
    }
  }
  return true;
}

}  // namespace

int main() {
  bool passed = true;
  for (const std::string& isa : evsam::available_isas()) {
    evsam::use_isa(isa);
    std::printf("%s\n", isa.c_str());
    for (DType dtype : {DType::float16, DType::bfloat16, DType::float32, DType::float64})
      for (std::int64_t channels : {1, 3, 8, 17, 64, 100})
        for (std::int64_t rows : {0, 1, 5, 700})
          for (bool affine : {false, true})
            for (int num_threads : {1, 3})
              passed = agrees(dtype, rows, channels, affine, num_threads) && passed;
  }
  return passed ? 0 : 1;
}
