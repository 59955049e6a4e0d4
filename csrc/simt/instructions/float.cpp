// Floating-point arithmetic: f32 and f64, f16 and bf16 alone and in pairs, special functions.
//
// Every result is the exact one rounded once, also where PTX allows an error (ex2.approx, div.full
// and the like). Functions without an exact double are taken from the C library in double
// precision. A NaN that f32, f16 and bf16 arithmetic makes has all bits of the mantissa set.
#include <bit>
#include <cmath>

#include "../numbers.h"
#include "elementwise.h"

namespace evsam::simt {
namespace {

inline float canonical(float value) {
  return value != value ? std::bit_cast<float>(NAN_BITS) : value;
}
inline float flush(float value) {  // subnormal numbers to zero of the same sign
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  return std::bit_cast<float>(bits & 0x7f800000u ? bits : bits & 0x80000000u);
}
template <bool ftz>
inline float source(float value) {
  return ftz ? flush(value) : value;
}
template <bool ftz, bool sat>
inline float result(float value) {
  if (sat) return value > 0 ? (value < 1 ? (ftz ? flush(value) : value) : 1.0f) : 0.0f;
  return canonical(ftz ? flush(value) : value);
}

// ---- f32, to nearest even

template <bool ftz, bool sat>
float add_f32(float a, float b) {
  return result<ftz, sat>(source<ftz>(a) + source<ftz>(b));
}
template <bool ftz, bool sat>
float sub_f32(float a, float b) {
  return result<ftz, sat>(source<ftz>(a) - source<ftz>(b));
}
template <bool ftz, bool sat>
float mul_f32(float a, float b) {
  return result<ftz, sat>(source<ftz>(a) * source<ftz>(b));
}
template <bool ftz, bool sat>
float div_f32(float a, float b) {
  return result<ftz, sat>(source<ftz>(a) / source<ftz>(b));
}

EVSAM_SIMT_CLONES
void fma_lanes(float* to, const float* a, const float* b, const float* c) {
  for (int lane = 0; lane < LANES; ++lane) to[lane] = std::fma(a[lane], b[lane], c[lane]);
}

template <bool ftz, bool sat>
void fma_f32(Warp& warp, const Instruction& instruction, Mask mask) {
  const float* from[3];
  float flushed[3][LANES];
  for (int i = 0; i < 3; ++i) {
    from[i] = warp.lanes<float>(instruction.operands[i + 1]);
    if (!ftz) continue;
    for (int lane = 0; lane < LANES; ++lane) flushed[i][lane] = flush(from[i][lane]);
    from[i] = flushed[i];
  }
  float values[LANES];
  fma_lanes(values, from[0], from[1], from[2]);
  float* to = warp.lanes<float>(instruction.operands[0]);
  for_lanes(mask, [&](int lane) { to[lane] = result<ftz, sat>(values[lane]); });
}

// ---- f32, rounded in another direction: exact up to a sticky last bit, then rounded

struct Directed {
  static double add(double a, double b, double) { return add_odd(a, b); }
  static double sub(double a, double b, double) { return add_odd(a, -b); }
  static double mul(double a, double b, double) { return a * b; }
  static double fma(double a, double b, double c) { return fma_odd(a, b, c); }
  static double div(double a, double b, double) { return div_odd(a, b); }
  static double rcp(double a, double, double) { return div_odd(1, a); }
  static double sqrt(double a, double, double) { return sqrt_odd(a); }
};

// Whether +0 is the sum of two zeros that are both positive.
inline bool all_positive_zero(const double (&values)[3], double (*f)(double, double, double)) {
  const double first = f == Directed::fma ? values[0] * values[1] : values[0];
  const double second = f == Directed::fma   ? values[2]
                        : f == Directed::sub ? -values[1]
                                             : values[1];
  return first == 0 && second == 0 && !std::signbit(first) && !std::signbit(second);
}

constexpr std::uint32_t FLUSH = 8;  // bits of `option` beside the rounding
constexpr std::uint32_t SATURATE = 16;

template <double (*f)(double, double, double)>
void directed(Warp& warp, const Instruction& instruction, Mask mask) {
  const int sources = instruction.operand_count - 1;
  const float* from[3] = {};
  for (int i = 0; i < sources; ++i) from[i] = warp.lanes<float>(instruction.operands[i + 1]);
  float* to = warp.lanes<float>(instruction.operands[0]);
  const bool ftz = instruction.option & FLUSH;
  const bool sat = instruction.option & SATURATE;
  const Rounding rounding = Rounding(instruction.option & 7);
  for (; mask; mask &= mask - 1) {
    const int lane = std::countr_zero(mask);
    double values[3] = {};
    for (int i = 0; i < sources; ++i) {
      values[i] = ftz ? flush(from[i][lane]) : from[i][lane];
    }
    const double exact = f(values[0], values[1], values[2]);
    std::uint32_t bits = std::uint32_t(encode(exact, F32, rounding));
    // A sum of opposite numbers is -0 when rounding down.
    const bool is_sum = f == Directed::add || f == Directed::sub || f == Directed::fma;
    if (is_sum && bits == 0 && rounding == Rounding::down && !all_positive_zero(values, f)) {
      bits = 0x80000000u;
    }
    const float value = std::bit_cast<float>(bits);
    to[lane] = ftz ? (sat ? result<true, true>(value) : result<true, false>(value))
                   : (sat ? result<false, true>(value) : result<false, false>(value));
  }
}

// ---- special functions of f32

template <bool ftz>
float sqrt_f32(float a) {
  return result<ftz, false>(std::sqrt(source<ftz>(a)));
}
template <bool ftz>
float rcp_f32(float a) {
  return result<ftz, false>(1.0f / source<ftz>(a));
}
template <bool ftz>
float rsqrt_f32(float a) {
  return result<ftz, false>(float(1 / std::sqrt(double(source<ftz>(a)))));
}
template <bool ftz>
float ex2_f32(float a) {
  return result<ftz, false>(float(std::exp2(double(source<ftz>(a)))));
}
template <bool ftz>
float lg2_f32(float a) {
  return result<ftz, false>(float(std::log2(double(source<ftz>(a)))));
}
template <bool ftz>
float sin_f32(float a) {
  return result<ftz, false>(float(std::sin(double(source<ftz>(a)))));
}
template <bool ftz>
float cos_f32(float a) {
  return result<ftz, false>(float(std::cos(double(source<ftz>(a)))));
}
float tanh_f32(float a) { return result<false, false>(float(std::tanh(double(a)))); }

// ---- any format: minimum and maximum, sign

template <bool ftz>
float neg_f32(float a) {
  return ftz ? flush(-a) : -a;
}
template <bool ftz>
float abs_f32(float a) {
  return ftz ? flush(std::fabs(a)) : std::fabs(a);
}

// -0 is less than +0. A NaN loses against a number, unless `nan`: then it wins.
template <bool maximal, bool nan, class T>
inline T extremum(T a, T b) {
  if (a != a || b != b) {
    if (nan || (a != a && b != b)) return std::numeric_limits<T>::quiet_NaN();
    return a != a ? b : a;
  }
  if (a == b) return std::signbit(a) == maximal ? b : a;
  return (a < b) == maximal ? b : a;
}
template <bool maximal, bool nan, bool magnitude, class T>
inline T signed_extremum(T a, T b) {  // .xorsign.abs
  if (!magnitude) return extremum<maximal, nan>(a, b);
  const T chosen = extremum<maximal, nan>(std::fabs(a), std::fabs(b));
  return std::copysign(chosen, std::signbit(a) != std::signbit(b) ? T(-1) : T(1));
}
template <bool maximal, bool nan, bool ftz, bool magnitude>
float extremum_f32(float a, float b) {
  return result<ftz, false>(
      signed_extremum<maximal, nan, magnitude>(source<ftz>(a), source<ftz>(b)));
}
template <bool maximal, bool nan, bool ftz>
float extremum_3_f32(float a, float b, float c) {
  return extremum_f32<maximal, nan, ftz, false>(extremum_f32<maximal, nan, ftz, false>(a, b), c);
}

// ---- f64

double add_f64(double a, double b) { return a + b; }
double sub_f64(double a, double b) { return a - b; }
double mul_f64(double a, double b) { return a * b; }
double div_f64(double a, double b) { return a / b; }
double fma_f64(double a, double b, double c) { return std::fma(a, b, c); }
double sqrt_f64(double a) { return std::sqrt(a); }
double rcp_f64(double a) { return 1 / a; }
double rsqrt_f64(double a) { return 1 / std::sqrt(a); }
double neg_f64(double a) { return -a; }
double abs_f64(double a) { return std::fabs(a); }
template <bool maximal>
double extremum_f64(double a, double b) {
  return extremum<maximal, false>(a, b);
}
// 20 bits of the mantissa, as rcp.approx.ftz.f64 gives.
double rcp_20_bits(double a) {
  const double flushed = std::fpclassify(a) == FP_SUBNORMAL ? std::copysign(0.0, a) : a;
  const double value = 1 / flushed;
  if (std::fpclassify(value) == FP_SUBNORMAL) return std::copysign(0.0, value);
  return std::bit_cast<double>(std::bit_cast<std::uint64_t>(value) & 0xffffffff00000000);
}
double rsqrt_20_bits(double a) {
  const double flushed = std::fpclassify(a) == FP_SUBNORMAL ? std::copysign(0.0, a) : a;
  return std::bit_cast<double>(std::bit_cast<std::uint64_t>(1 / std::sqrt(flushed)) &
                               0xffffffff00000000);
}
double copysign_f64(double a, double b) { return std::copysign(b, a); }
float copysign_f32(float a, float b) { return std::copysign(b, a); }

// ---- f16 and bf16, whose sums and products are rounded to f32 without harm: 24 bits are more than
// twice 11 plus one (S. Figueroa, "When is double rounding innocuous?", 1995)

using Half = std::uint16_t;

struct F16Format {
  static float decode(Half a) { return half_to_float(a); }
  static Half encode(float a) { return float_to_half(a); }
  static Half encode_wide(double a) { return Half(simt::encode(a, F16, Rounding::nearest_even)); }
  static constexpr Half ONE = 0x3c00;
};
struct BF16Format {
  static float decode(Half a) { return bfloat_to_float(a); }
  static Half encode(float a) { return float_to_bfloat(a); }
  static Half encode_wide(double a) { return Half(simt::encode(a, BF16, Rounding::nearest_even)); }
  static constexpr Half ONE = 0x3f80;
};

inline bool is_nan_f32(float a) { return a != a; }

// What .ftz, .sat and .relu do to a result.
enum class After { nothing, ftz, sat, ftz_sat, relu, ftz_relu };

constexpr bool flushes(After after) {
  return after == After::ftz || after == After::ftz_sat || after == After::ftz_relu;
}

template <class F, After after>
inline Half finish(Half value) {
  const float number = F::decode(value);
  if (is_nan_f32(number)) {
    return after == After::sat || after == After::ftz_sat ? Half(0) : Half(0x7fff);
  }
  // Only f16 has .ftz; its subnormal numbers have no exponent.
  if (flushes(after) && !(value & 0x7c00)) value &= 0x8000;
  if (after == After::sat || after == After::ftz_sat) {
    return number > 0 ? (number < 1 ? value : F::ONE) : Half(0);
  }
  if (after == After::relu || after == After::ftz_relu) return number > 0 ? value : Half(0);
  return value;
}
template <class F, After after>
inline float half_source(Half value) {
  if (flushes(after) && !(value & 0x7c00)) value &= 0x8000;
  return F::decode(value);
}

template <class F, After after>
Half add_half(Half a, Half b) {
  return finish<F, after>(F::encode(half_source<F, after>(a) + half_source<F, after>(b)));
}
template <class F, After after>
Half sub_half(Half a, Half b) {
  return finish<F, after>(F::encode(half_source<F, after>(a) - half_source<F, after>(b)));
}
template <class F, After after>
Half mul_half(Half a, Half b) {
  return finish<F, after>(
      F::encode_wide(double(half_source<F, after>(a)) * half_source<F, after>(b)));
}
template <class F, After after>
Half fma_half(Half a, Half b, Half c) {
  return finish<F, after>(F::encode_wide(
      fma_odd(half_source<F, after>(a), half_source<F, after>(b), half_source<F, after>(c))));
}
Half neg_half(Half a) { return a ^ 0x8000; }
Half abs_half(Half a) { return a & 0x7fff; }
Half neg_half_ftz(Half a) { return a & 0x7c00 ? Half(a ^ 0x8000) : Half(~a & 0x8000); }
Half abs_half_ftz(Half a) { return a & 0x7c00 ? Half(a & 0x7fff) : Half(0); }
template <class F, bool maximal, bool nan, bool magnitude, bool ftz>
Half extremum_half(Half a, Half b) {
  constexpr After after = ftz ? After::ftz : After::nothing;
  return finish<F, after>(F::encode(signed_extremum<maximal, nan, magnitude>(
      half_source<F, after>(a), half_source<F, after>(b))));
}
template <class F>
Half ex2_half(Half a) {
  return finish<F, After::nothing>(F::encode_wide(std::exp2(double(F::decode(a)))));
}
template <class F>
Half tanh_half(Half a) {
  return finish<F, After::nothing>(F::encode_wide(std::tanh(double(F::decode(a)))));
}

// ---- decoding

struct FloatModifiers {
  Type type = Type::none;
  Rounding rounding = Rounding::nearest_even;
  bool ftz = false, sat = false, relu = false, approximate = false;
};

FloatModifiers modifiers(Decoding& d) {
  FloatModifiers found;
  found.type = d.type();
  found.rounding = d.choose<Rounding>({{"rn", Rounding::nearest_even},
                                       {"rz", Rounding::zero},
                                       {"rm", Rounding::down},
                                       {"rp", Rounding::up}})
                       .value_or(Rounding::nearest_even);
  found.ftz = d.take("ftz");
  found.sat = d.take("sat");
  found.relu = d.take("relu");
  found.approximate = d.take("approx") || d.take("full");
  if (found.type == Type::f16 || found.type == Type::f16x2 || found.type == Type::bf16 ||
      found.type == Type::bf16x2) {
    if (found.rounding != Rounding::nearest_even) d.unsupported();
    d.set_kind(found.type == Type::f16 || found.type == Type::f16x2 ? "fp16" : "bf16");
  } else if (found.type == Type::f64) {
    if (found.rounding != Rounding::nearest_even || found.sat || found.relu) d.unsupported();
    d.set_kind("fp64");
  } else if (found.type != Type::f32) {
    d.unsupported();
  }
  return found;
}

bool is_packed(Type type) { return type == Type::f16x2 || type == Type::bf16x2; }
bool is_half(Type type) { return type == Type::f16 || type == Type::bf16 || is_packed(type); }

// f(bool_constant, bool_constant)
template <class F>
Handler with_flags(bool first, bool second, F f) {
  if (first)
    return second ? f(std::true_type(), std::true_type()) : f(std::true_type(), std::false_type());
  return second ? f(std::false_type(), std::true_type()) : f(std::false_type(), std::false_type());
}

// f.operator()<Format, After>() gives the function on halves.
template <class F>
Handler for_half(Decoding& d, const FloatModifiers& m, F f) {
  if (m.sat && m.relu) d.unsupported();
  const bool bf16 = m.type == Type::bf16 || m.type == Type::bf16x2;
  if (bf16) {
    if (m.ftz || m.sat) d.unsupported();
    return m.relu ? f.template operator()<BF16Format, After::relu>()
                  : f.template operator()<BF16Format, After::nothing>();
  }
  if (m.sat) {
    return m.ftz ? f.template operator()<F16Format, After::ftz_sat>()
                 : f.template operator()<F16Format, After::sat>();
  }
  if (m.relu) {
    return m.ftz ? f.template operator()<F16Format, After::ftz_relu>()
                 : f.template operator()<F16Format, After::relu>();
  }
  return m.ftz ? f.template operator()<F16Format, After::ftz>()
               : f.template operator()<F16Format, After::nothing>();
}

bool decode_directed(Decoding& d, const FloatModifiers& m, Handler handler) {
  if (m.type != Type::f32 || m.rounding == Rounding::nearest_even) return false;
  d.instruction().option = std::uint32_t(m.rounding) | (m.ftz ? FLUSH : 0) | (m.sat ? SATURATE : 0);
  d.instruction().execute = handler;
  return true;
}

#define EVSAM_FLOAT_PAIR(name, on_f32, on_f64, on_half, exact)               \
  void name(Decoding& d) {                                                   \
    const FloatModifiers m = modifiers(d);                                   \
    same_types(d, m.type, 2);                                                \
    Handler& execute = d.instruction().execute;                              \
    if (decode_directed(d, m, directed<exact>)) return;                      \
    if (m.type == Type::f64) {                                               \
      execute = elementwise<on_f64>;                                         \
    } else if (m.type == Type::f32) {                                        \
      if (m.relu) d.unsupported();                                           \
      execute = with_flags(m.ftz, m.sat, [](auto ftz, auto sat) -> Handler { \
        return elementwise<on_f32<ftz.value, sat.value>>;                    \
      });                                                                    \
    } else {                                                                 \
      execute = for_half(d, m, [&]<class F, After after>() -> Handler {      \
        return is_packed(m.type) ? elementwise_packed<on_half<F, after>>     \
                                 : elementwise<on_half<F, after>>;           \
      });                                                                    \
    }                                                                        \
  }
EVSAM_FLOAT_PAIR(decode_add, add_f32, add_f64, add_half, Directed::add)
EVSAM_FLOAT_PAIR(decode_sub, sub_f32, sub_f64, sub_half, Directed::sub)
EVSAM_FLOAT_PAIR(decode_mul, mul_f32, mul_f64, mul_half, Directed::mul)

void decode_fma(Decoding& d) {
  const FloatModifiers m = modifiers(d);
  same_types(d, m.type, 3);
  Handler& execute = d.instruction().execute;
  if (decode_directed(d, m, directed<Directed::fma>)) return;
  if (m.type == Type::f64) {
    execute = elementwise<fma_f64>;
  } else if (m.type == Type::f32) {
    if (m.relu) d.unsupported();
    execute = with_flags(
        m.ftz, m.sat, [](auto ftz, auto sat) -> Handler { return fma_f32<ftz.value, sat.value>; });
  } else {
    execute = for_half(d, m, [&]<class F, After after>() -> Handler {
      return is_packed(m.type) ? elementwise_packed<fma_half<F, after>>
                               : elementwise<fma_half<F, after>>;
    });
  }
}

void decode_div(Decoding& d) {
  const FloatModifiers m = modifiers(d);
  if (m.sat || m.relu || is_half(m.type)) d.unsupported();
  same_types(d, m.type, 2);
  d.set_kind(m.type == Type::f64 ? "fp64" : "special");
  if (decode_directed(d, m, directed<Directed::div>)) return;
  if (m.type == Type::f64) {
    d.instruction().execute = elementwise<div_f64>;
  } else {
    d.instruction().execute =
        m.ftz ? elementwise<div_f32<true, false>> : elementwise<div_f32<false, false>>;
  }
}

// sqrt, rcp, rsqrt: f32 with and without .ftz, f64.
template <auto f32_ftz, auto f32, auto f64, auto wide>
void decode_root(Decoding& d) {
  const FloatModifiers m = modifiers(d);
  if (m.sat || m.relu || is_half(m.type)) d.unsupported();
  same_types(d, m.type, 1);
  d.set_kind("special");
  if constexpr (wide != nullptr) {
    if (decode_directed(d, m, directed<wide>)) return;
  } else if (m.rounding != Rounding::nearest_even) {
    d.unsupported();
  }
  if (m.type == Type::f64) {
    if (m.approximate && m.ftz) {
      if (f64 == rcp_f64) {
        d.instruction().execute = elementwise<rcp_20_bits>;
      } else if (f64 == rsqrt_f64) {
        d.instruction().execute = elementwise<rsqrt_20_bits>;
      } else {
        d.unsupported();
      }
    } else {
      d.instruction().execute = elementwise<f64>;
    }
  } else {
    d.instruction().execute = m.ftz ? elementwise<f32_ftz> : elementwise<f32>;
  }
}

constexpr double (*NOT_DIRECTED)(double, double, double) = nullptr;

template <auto with_ftz, auto without>
void decode_special(Decoding& d) {
  const FloatModifiers m = modifiers(d);
  if (m.type != Type::f32 || !m.approximate || m.sat || m.relu) d.unsupported();
  same_types(d, Type::f32, 1);
  d.set_kind("special");
  d.instruction().execute = m.ftz ? elementwise<with_ftz> : elementwise<without>;
}

template <template <class> class HalfFunction, auto with_ftz, auto without>
void decode_half_special(Decoding& d) {
  const FloatModifiers m = modifiers(d);
  if (m.sat || m.relu) d.unsupported();
  same_types(d, m.type, 1);
  d.set_kind("special");
  Handler& execute = d.instruction().execute;
  if (m.type == Type::f32) {
    execute = m.ftz ? elementwise<with_ftz> : elementwise<without>;
  } else if (m.type == Type::f64) {
    d.unsupported();
  } else {
    const bool f16 = m.type == Type::f16 || m.type == Type::f16x2;
    const auto pick = [&]<class F>() -> Handler {
      return is_packed(m.type) ? elementwise_packed<HalfFunction<F>::value>
                               : elementwise<HalfFunction<F>::value>;
    };
    execute = f16 ? pick.template operator()<F16Format>() : pick.template operator()<BF16Format>();
  }
}
template <class F>
struct Ex2 {
  static constexpr auto value = ex2_half<F>;
};
template <class F>
struct Tanh {
  static constexpr auto value = tanh_half<F>;
};

template <bool maximal>
void decode_extremum(Decoding& d) {
  const bool nan = d.take("NaN");
  bool magnitude = d.take("xorsign");
  if (magnitude && !d.take("abs")) d.unsupported();
  const FloatModifiers m = modifiers(d);
  if (m.sat || m.relu || m.approximate) d.unsupported();
  Handler& execute = d.instruction().execute;
  if (m.type == Type::f32 && d.count() == 4) {
    if (magnitude) d.unsupported();
    same_types(d, m.type, 3);
    execute = with_flags(nan, m.ftz, [](auto nan, auto ftz) -> Handler {
      return elementwise<extremum_3_f32<maximal, nan.value, ftz.value>>;
    });
    return;
  }
  same_types(d, m.type, 2);
  if (m.type == Type::f64) {
    if (nan || magnitude || m.ftz) d.unsupported();
    execute = elementwise<extremum_f64<maximal>>;
  } else if (m.type == Type::f32) {
    execute = with_flags(nan, m.ftz, [&](auto nan, auto ftz) -> Handler {
      return magnitude ? elementwise<extremum_f32<maximal, nan.value, ftz.value, true>>
                       : elementwise<extremum_f32<maximal, nan.value, ftz.value, false>>;
    });
  } else {
    const bool f16 = m.type == Type::f16 || m.type == Type::f16x2;
    if (!f16 && m.ftz) d.unsupported();
    execute = with_flags(nan, magnitude, [&](auto nan, auto magnitude) -> Handler {
      const auto pick = [&]<class F, bool ftz>() -> Handler {
        return is_packed(m.type)
                   ? elementwise_packed<extremum_half<F, maximal, nan.value, magnitude.value, ftz>>
                   : elementwise<extremum_half<F, maximal, nan.value, magnitude.value, ftz>>;
      };
      if (!f16) return pick.template operator()<BF16Format, false>();
      return m.ftz ? pick.template operator()<F16Format, true>()
                   : pick.template operator()<F16Format, false>();
    });
  }
}

template <auto f32_ftz, auto f32, auto f64, auto half_ftz, auto half>
void decode_sign(Decoding& d) {
  const FloatModifiers m = modifiers(d);
  if (m.sat || m.relu) d.unsupported();
  same_types(d, m.type, 1);
  Handler& execute = d.instruction().execute;
  if (m.type == Type::f64) {
    execute = elementwise<f64>;
  } else if (m.type == Type::f32) {
    execute = m.ftz ? elementwise<f32_ftz> : elementwise<f32>;
  } else if (m.ftz) {
    execute = is_packed(m.type) ? elementwise_packed<half_ftz> : elementwise<half_ftz>;
  } else {
    execute = is_packed(m.type) ? elementwise_packed<half> : elementwise<half>;
  }
}

void decode_copysign(Decoding& d) {
  const Type type = d.type();
  same_types(d, type, 2);
  if (type == Type::f32) {
    d.instruction().execute = elementwise<copysign_f32>;
  } else if (type == Type::f64) {
    d.instruction().execute = elementwise<copysign_f64>;
  } else {
    d.unsupported();
  }
}

// testp
template <class T, bool (*f)(T)>
void test(Warp& warp, const Instruction& instruction, Mask mask) {
  const T* values = warp.lanes<T>(instruction.operands[1]);
  Mask found = 0;
  for (int lane = 0; lane < LANES; ++lane) found |= Mask(f(values[lane])) << lane;
  Mask& to = warp.predicate(instruction.operands[0]);
  to = (to & ~mask) | (found & mask);
}
template <class T>
bool is_finite(T a) {
  return std::isfinite(a);
}
template <class T>
bool is_infinite(T a) {
  return std::isinf(a);
}
template <class T>
bool is_number(T a) {
  return a == a;
}
template <class T>
bool is_nan(T a) {
  return a != a;
}
template <class T>
bool is_normal(T a) {
  return std::isnormal(a);
}
template <class T>
bool is_subnormal(T a) {
  return std::fpclassify(a) == FP_SUBNORMAL;
}

template <class T>
Handler test_handler(Decoding& d) {
  return d.require<Handler>("a property", {{"finite", test<T, is_finite<T>>},
                                           {"infinite", test<T, is_infinite<T>>},
                                           {"number", test<T, is_number<T>>},
                                           {"notanumber", test<T, is_nan<T>>},
                                           {"normal", test<T, is_normal<T>>},
                                           {"subnormal", test<T, is_subnormal<T>>}});
}

void decode_testp(Decoding& d) {
  const Type type = d.type();
  d.write(0, Type::pred);
  d.read(1, type);
  if (type != Type::f32 && type != Type::f64) d.unsupported();
  d.instruction().execute = type == Type::f32 ? test_handler<float>(d) : test_handler<double>(d);
}

}  // namespace

std::span<const Opcode> float_opcodes() {
  static constexpr Opcode OPCODES[] = {
      {"add", "fp32", decode_add},
      {"sub", "fp32", decode_sub},
      {"mul", "fp32", decode_mul},
      {"fma", "fp32", decode_fma},
      {"mad", "fp32", decode_fma},
      {"div", "special", decode_div},
      {"min", "fp32", decode_extremum<false>},
      {"max", "fp32", decode_extremum<true>},
      {"neg", "fp32", decode_sign<neg_f32<true>, neg_f32<false>, neg_f64, neg_half_ftz, neg_half>},
      {"abs", "fp32", decode_sign<abs_f32<true>, abs_f32<false>, abs_f64, abs_half_ftz, abs_half>},
      {"copysign", "fp32", decode_copysign},
      {"testp", "fp32", decode_testp},
      {"sqrt", "special", decode_root<sqrt_f32<true>, sqrt_f32<false>, sqrt_f64, &Directed::sqrt>},
      {"rcp", "special", decode_root<rcp_f32<true>, rcp_f32<false>, rcp_f64, &Directed::rcp>},
      {"rsqrt", "special", decode_root<rsqrt_f32<true>, rsqrt_f32<false>, rsqrt_f64, NOT_DIRECTED>},
      {"lg2", "special", decode_special<lg2_f32<true>, lg2_f32<false>>},
      {"sin", "special", decode_special<sin_f32<true>, sin_f32<false>>},
      {"cos", "special", decode_special<cos_f32<true>, cos_f32<false>>},
      {"ex2", "special", decode_half_special<Ex2, ex2_f32<true>, ex2_f32<false>>},
      {"tanh", "special", decode_half_special<Tanh, tanh_f32, tanh_f32>},
  };
  return OPCODES;
}

}  // namespace evsam::simt
