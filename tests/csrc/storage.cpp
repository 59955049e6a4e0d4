// Checks the conversions of csrc/cpu/storage.h and simd.h against arithmetic in double: every half
// precision value one way, and the other way every value between two of them where rounding can go wrong.

#include <cmath>
#include <cstdio>
#include <vector>

#include "../../csrc/cpu/simd.h"
#include "../../csrc/cpu/storage.h"

namespace kernels = evsam::EVSAM_ISA;

namespace {

struct Format {
  int mantissa_bits;
  int bias;
  int max_exponent;
};

constexpr Format float16{10, 15, 31};
constexpr Format bfloat16{7, 127, 255};

double value_of(std::uint16_t bits, Format format) {
  const int exponent = (bits & 0x7fff) >> format.mantissa_bits;
  const double fraction = bits & ((1 << format.mantissa_bits) - 1);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == format.max_exponent) return fraction == 0 ? sign * INFINITY : NAN;
  const double leading = exponent == 0 ? 0 : 1 << format.mantissa_bits;
  return sign * std::ldexp(leading + fraction,
                           (exponent == 0 ? 1 : exponent) - format.bias - format.mantissa_bits);
}

bool same(double a, double b) {
  return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

// What kernels call, for a count of elements that leaves a remainder.
struct Loops {
  template <class From, class To>
  static void convert(const From* from, To* to, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) kernels::convert(from[i], to[i]);
  }
};

struct Vectors {
  template <class From, class To>
  static void convert(const From* from, To* to, std::int64_t count) {
    for (std::int64_t i = 0; i < count; i += kernels::lanes)
      kernels::store(to + i, kernels::load(from + i, count - i), count - i);
  }
};

template <class How, class Half>
bool widens_every_value(const char* name, Format format) {
  std::vector<Half> halves(1 << 16);
  for (std::size_t i = 0; i < halves.size(); ++i) halves[i].bits = static_cast<std::uint16_t>(i);
  halves.push_back(halves[1]);
  std::vector<float> floats(halves.size());
  How::convert(halves.data(), floats.data(), static_cast<std::int64_t>(halves.size()));
  for (std::size_t i = 0; i < halves.size(); ++i) {
    if (!same(floats[i], value_of(halves[i].bits, format))) {
      std::printf("%s 0x%04x widens to %g\n", name, halves[i].bits, floats[i]);
      return false;
    }
  }
  return true;
}

template <class How, class Half>
bool rounds_to_nearest_even(const char* name, Format format) {
  const auto infinity =
      static_cast<std::uint16_t>(format.max_exponent << format.mantissa_bits);
  std::vector<float> floats;
  std::vector<std::uint16_t> expected;
  const auto add = [&](double from, std::uint16_t to) {
    for (int sign : {1, -1}) {
      floats.push_back(static_cast<float>(sign * from));
      expected.push_back(static_cast<std::uint16_t>(to | (sign < 0 ? 0x8000 : 0)));
    }
  };
  for (std::uint16_t low = 0; low < infinity; ++low) {
    const auto high = static_cast<std::uint16_t>(low + 1);
    const double below = value_of(low, format);
    // Infinity is rounded to as if it were the value after the largest one.
    const double above =
        high < infinity ? value_of(high, format) : 2 * below - value_of(low - 1, format);
    const float middle = static_cast<float>((below + above) / 2);
    add(below, low);
    add(middle, low & 1 ? high : low);
    add(std::nextafter(middle, 0.0f), low);
    add(std::nextafter(middle, INFINITY), high);
  }
  add(INFINITY, infinity);
  // NaNs whose set bits are all lost, or whose rounding would carry past the exponent.
  for (const std::uint32_t bits : {0x7f800001u, 0x7fc00000u, 0x7fffffffu, 0xff800001u})
    floats.push_back(kernels::float_of(bits));
  std::vector<Half> halves(floats.size());
  How::convert(floats.data(), halves.data(), static_cast<std::int64_t>(floats.size()));
  for (std::size_t i = 0; i < expected.size(); ++i) {
    if (halves[i].bits != expected[i]) {
      std::printf("%a narrows to %s 0x%04x instead of 0x%04x\n", floats[i], name, halves[i].bits,
                  expected[i]);
      return false;
    }
  }
  for (std::size_t i = expected.size(); i < floats.size(); ++i) {
    if (!std::isnan(value_of(halves[i].bits, format))) {
      std::printf("a NaN narrows to %s 0x%04x\n", name, halves[i].bits);
      return false;
    }
  }
  return true;
}

template <class How>
bool passes() {
  return widens_every_value<How, kernels::Float16>("float16", float16) &&
         widens_every_value<How, kernels::BFloat16>("bfloat16", bfloat16) &&
         rounds_to_nearest_even<How, kernels::Float16>("float16", float16) &&
         rounds_to_nearest_even<How, kernels::BFloat16>("bfloat16", bfloat16);
}

}  // namespace

int main() { return passes<Loops>() && passes<Vectors>() ? 0 : 1; }
