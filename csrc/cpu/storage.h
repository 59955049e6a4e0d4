// Element types as kernels see them, and their conversion to and from the type they compute in.
// Included by kernels: everything is private to the including file.
//
// Narrowing rounds to nearest, ties to even, keeps subnormals, and a NaN stays one. The results are
// the same with every instruction set, whether or not it has an instruction for the conversion.
// AVX512_BF16's vcvtneps2bf16 turns subnormals to zero and is used for anything else.
#pragma once

#include <cstdint>

namespace evsam::EVSAM_ISA {
namespace {

struct Float16 {
  std::uint16_t bits;
};

struct BFloat16 {
  std::uint16_t bits;
};

inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(std::uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// The bits of 2^exponent as a float.
constexpr std::uint32_t power_of_two(int exponent) {
  return static_cast<std::uint32_t>(exponent + 127) << 23;
}

constexpr std::uint32_t float_infinity = power_of_two(128);

inline void convert(BFloat16 from, float& to) { to = float_of(std::uint32_t{from.bits} << 16); }

inline void convert(Float16 from, float& to) {
  // Exponent and mantissa where a float has them, the exponent's bias still that of float16.
  const std::uint32_t magnitude = (from.bits & 0x7fffu) << 13;
  const std::uint32_t normal = magnitude + (112u << 23);
  const std::uint32_t infinite_or_nan = magnitude + (224u << 23);
  // A subnormal is given the leading one of 2^-14, and 2^-14 is subtracted again: both are exact.
  const std::uint32_t subnormal =
      bits_of(float_of(magnitude + power_of_two(-14)) - float_of(power_of_two(-14)));
  const std::uint32_t rebiased = magnitude < (1u << 23)    ? subnormal
                                 : magnitude < (31u << 23) ? normal
                                                           : infinite_or_nan;
  to = float_of(rebiased | (from.bits & 0x8000u) << 16);
}

inline void convert(float from, BFloat16& to) {
  const std::uint32_t bits = bits_of(from);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const std::uint32_t quiet_nan = (bits >> 16) | 0x40u;
  to.bits = static_cast<std::uint16_t>((bits & 0x7fffffffu) > float_infinity ? quiet_nan : rounded);
}

inline void convert(float from, Float16& to) {
  const std::uint32_t bits = bits_of(from);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  const std::uint32_t normal =
      (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // A float at 0.5 has its last bit where float16's subnormals have theirs: adding 0.5 rounds there.
  const std::uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const std::uint32_t infinite = 0x7c00u;
  const std::uint32_t quiet_nan = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  const std::uint32_t result = magnitude > float_infinity       ? quiet_nan
                               : magnitude >= power_of_two(16)  ? infinite
                               : magnitude >= power_of_two(-14) ? normal
                                                                : subnormal;
  to.bits = static_cast<std::uint16_t>(result | (bits >> 16 & 0x8000u));
}

}  // namespace
}  // namespace evsam::EVSAM_ISA
