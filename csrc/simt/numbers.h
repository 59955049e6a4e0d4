// Formats of floating-point numbers, and rounding to them.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace evsam::simt {

enum class Rounding : std::uint8_t { nearest_even, zero, down, up, nearest_away };

struct Format {
  int exponent_bits;
  int mantissa_bits;
  bool has_infinity;
  std::uint32_t nan;  // the one that arithmetic makes

  constexpr int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  constexpr int bits() const { return 1 + exponent_bits + mantissa_bits; }
  // Where infinity is, or would be: one above the largest finite number.
  constexpr std::uint64_t overflow() const {
    return has_infinity ? ((std::uint64_t(1) << exponent_bits) - 1) << mantissa_bits
                        : (std::uint64_t(1) << (exponent_bits + mantissa_bits)) - 1;
  }
};

inline constexpr Format F16{5, 10, true, 0x7fff};
inline constexpr Format BF16{8, 7, true, 0x7fff};
inline constexpr Format TF32{8, 10, true, 0x3ffff};
inline constexpr Format F32{8, 23, true, 0x7fffffff};
inline constexpr Format E4M3{4, 3, false, 0x7f};
inline constexpr Format E5M2{5, 2, true, 0x7f};

inline constexpr std::uint32_t NAN_BITS = 0x7fffffff;

// The bits of `value` in `format`. With `saturate`, what does not fit becomes the largest finite
// number.
inline std::uint64_t encode(double value, const Format& format, Rounding rounding,
                            bool saturate = false) {
  const std::uint64_t bits = std::bit_cast<std::uint64_t>(value);
  const bool negative = bits >> 63;
  const std::uint64_t sign = std::uint64_t(negative) << (format.bits() - 1);
  if (std::isnan(value)) return format.nan;
  if (value == 0) return sign;
  std::uint64_t encoded;
  if (std::isinf(value)) {
    encoded =
        saturate ? format.overflow() - 1 : (format.has_infinity ? format.overflow() : format.nan);
    return sign | encoded;
  }
  int exponent = int(bits >> 52 & 0x7ff);
  std::uint64_t significand = bits & ((std::uint64_t(1) << 52) - 1);
  if (exponent == 0) {
    exponent = 1;
  } else {
    significand |= std::uint64_t(1) << 52;
  }
  exponent -= 1023;
  const int smallest = 1 - format.bias();
  int shift = 52 - format.mantissa_bits;
  if (exponent < smallest) shift += std::min(smallest - exponent, 60 - shift);
  const std::uint64_t kept = significand >> shift;
  const std::uint64_t rest = significand & ((std::uint64_t(1) << shift) - 1);
  const std::uint64_t half = std::uint64_t(1) << (shift - 1);
  encoded = exponent < smallest
                ? kept
                : (std::uint64_t(exponent - smallest) << format.mantissa_bits) + kept;
  bool up = false;
  switch (rounding) {
    case Rounding::nearest_even:
      up = rest > half || (rest == half && (kept & 1));
      break;
    case Rounding::nearest_away:
      up = rest >= half;
      break;
    case Rounding::zero:
      break;
    case Rounding::down:
      up = rest && negative;
      break;
    case Rounding::up:
      up = rest && !negative;
      break;
  }
  encoded += up;
  if (encoded >= format.overflow()) {
    const bool away = rounding == Rounding::nearest_even || rounding == Rounding::nearest_away ||
                      rounding == (negative ? Rounding::down : Rounding::up);
    encoded = away && !saturate ? (format.has_infinity ? format.overflow() : format.nan)
                                : format.overflow() - 1;
  }
  return sign | encoded;
}

inline float half_to_float(std::uint16_t half) {
  const std::uint32_t magnitude = half & 0x7fffu;
  // A float whose exponent is too small by the difference of the biases, 112.
  float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  std::uint32_t bits = std::bit_cast<std::uint32_t>(scaled);
  bits |= magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return std::bit_cast<float>(bits | (half & 0x8000u) << 16);
}

inline float bfloat_to_float(std::uint16_t bits) {
  return std::bit_cast<float>(std::uint32_t(bits) << 16);
}

inline std::uint16_t float_to_half(float value) {
  return std::uint16_t(encode(value, F16, Rounding::nearest_even));
}

inline std::uint16_t float_to_bfloat(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fff : std::uint16_t(rounded);
}

// The value of 8 bits.
inline double decode_byte(std::uint8_t bits, const Format& format) {
  const int mantissa = bits & ((1 << format.mantissa_bits) - 1);
  const int exponent = (bits & 0x7f) >> format.mantissa_bits;
  const double sign = bits & 0x80 ? -1 : 1;
  if ((bits & 0x7fu) > format.overflow() || (!format.has_infinity && (bits & 0x7f) == 0x7f)) {
    return std::numeric_limits<double>::quiet_NaN();
  }
  if (format.has_infinity && (bits & 0x7fu) == format.overflow()) {
    return sign * std::numeric_limits<double>::infinity();
  }
  const int scale = std::max(exponent, 1) - format.bias() - format.mantissa_bits;
  return sign * std::ldexp(mantissa + (exponent ? 1 << format.mantissa_bits : 0), scale);
}

// Rounding a double that was itself rounded to odd gives what rounding the exact number would have
// (S. Boldo and G. Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
inline double nudge_to_odd(double rounded, double error) {
  const std::uint64_t bits = std::bit_cast<std::uint64_t>(rounded);
  const bool away = (error > 0) == (rounded > 0);
  const bool inexact = error != 0 && !(bits & 1) && std::isfinite(rounded);
  return std::bit_cast<double>(inexact ? bits + (away ? 1 : -1) : bits);
}

// a + b rounded to odd (D. Knuth's exact error of a sum).
inline double add_odd(double a, double b) {
  const double sum = a + b;
  const double from_b = sum - a;
  const double error = (a - (sum - from_b)) + (b - from_b);
  return nudge_to_odd(sum, error);
}

// a * b + c rounded to odd, for a and b that are floats or smaller: their product is exact.
inline double fma_odd(double a, double b, double c) { return add_odd(a * b, c); }

inline double div_odd(double a, double b) {
  const double quotient = a / b;
  const double rest = std::fma(-quotient, b, a);
  return std::isfinite(quotient) ? nudge_to_odd(quotient, b < 0 ? -rest : rest) : quotient;
}

inline double sqrt_odd(double a) {
  const double root = std::sqrt(a);
  return root > 0 && std::isfinite(root) ? nudge_to_odd(root, std::fma(-root, root, a)) : root;
}

}  // namespace evsam::simt
