// Activations on vectors. Included by kernels: everything is private to the including file.
#pragma once

#include <cmath>

#include "evsam/activation.h"
#include "simd.h"

namespace evsam::EVSAM_ISA {
namespace {

// Whether about 12 bits of a function are enough for what is stored as Storage.
template <class Storage>
constexpr bool coarse = false;
template <>
constexpr bool coarse<BFloat16> = true;

// 2^t for t from -126 to 126; what lies beyond is taken for the nearer of these.
//
// 2^t is 2^n 2^f, where n is the multiple of 1 / power_steps nearest to t: the first from the bits of n, the
// second a polynomial of least relative error, which is at most 2e-8, or 1.2e-4 where that is enough.
template <class Storage>
EVSAM_INLINE Vec two_to_the(Vec t) {
  constexpr int steps = power_steps;
  t = within(t, 126);
  const Vec rounder = broadcast(12582912.0f / steps);  // 1.5 * 2^23 / steps: the last bit of sums is 1 / steps
  const Vec rounded = t + rounder, f = t - (rounded - rounder);
  Vec p;
  if constexpr (coarse<Storage> && steps == 16) {
    p = fma(f, broadcast(0.693120076f), broadcast(1.00011728f));
  } else if constexpr (coarse<Storage> && steps == 8) {
    p = fma(f, broadcast(0.24019833f), broadcast(0.693309765f));
    p = fma(p, f, broadcast(1.00000011f));
  } else if constexpr (coarse<Storage>) {
    p = fma(f, broadcast(0.0551716695f), broadcast(0.242611125f));
    p = fma(p, f, broadcast(0.693260986f));
    p = fma(p, f, broadcast(0.999928073f));
  } else if constexpr (steps > 1) {
    // The fraction is small beside the step: added to it, it rounds once.
    p = fma(f, broadcast(0.0554962218f), broadcast(0.24025763f));
    p = fma(p, f, broadcast(0.693147214f)) * f;
    const Vec step = power_of_steps((Bits)rounded);
    return fma(step, p, step);
  } else {
    p = fma(f, broadcast(1.53458117e-4f), broadcast(1.33999312e-3f));
    p = fma(p, f, broadcast(9.61848896e-3f));
    p = fma(p, f, broadcast(5.55032878e-2f));
    p = fma(p, f, broadcast(2.40226469e-1f));
    p = fma(p, f, broadcast(6.93147206e-1f));
    p = fma(p, f, broadcast(1));
  }
  return p * power_of_steps((Bits)rounded);
}

// x / (1 + 2^t), which is x times the logistic function of -t ln 2.
template <class Storage>
EVSAM_INLINE Vec over_one_plus_power(Vec x, Vec t) {
  const Vec d = two_to_the<Storage>(t) + 1;
  return x * (coarse<Storage> ? coarse_reciprocal(d) : reciprocal(d));
}

template <class Storage>
EVSAM_INLINE Vec silu(Vec x) {
  return over_one_plus_power<Storage>(x, x * -1.44269504f);
}

// These keep a NaN.
EVSAM_INLINE Vec relu(Vec x) { return larger(zero(), x); }
EVSAM_INLINE Vec relu6(Vec x) { return smaller(broadcast(6), relu(x)); }

// Activations as functions of a vector.
struct Identity {
  EVSAM_INLINE Vec operator()(Vec x) const { return x; }
};

// GELU is x times the probability of a normal variable being less than x. Gelu is with the approximation of
// that by a hyperbolic tangent, ExactGelu without.
#if defined(__AVX512DQ__)

constexpr double pi = 3.14159265358979323846;

// relu(x) - f(|x|), where f(0) = 0 and f vanishes from 5.625 on: f in pieces of equal width, a polynomial on
// each, whose coefficients come from tables of one register each.
template <int degree>
class BelowRelu {
 public:
  // f takes and returns a double.
  template <class F>
  explicit BelowRelu(const F& f) {
    for (int piece = 0; piece < lanes; ++piece) fit(f, piece);
  }

  EVSAM_INLINE Vec operator()(Vec x) const {
    const Vec u = magnitude_within(x, (lanes - 1) * width);
    const Vec rounder = broadcast(12582912);  // 1.5 * 2^23: the last bit of sums is 1
    const Vec piece = fma(u, broadcast(1 / width), rounder);
    const Vec t = fnma(piece - rounder, broadcast(width), u);
    Vec p = pick(coefficients_[degree], (Bits)piece);
#pragma GCC unroll 8
    for (int i = degree - 1; i >= 0; --i) p = fma(p, t, pick(coefficients_[i], (Bits)piece));
    return positive_or_infinite(x) - p;
  }

 private:
  static constexpr float width = 0.375f;

  // A piece reaches half a width to either side of its middle, from which t counts, but the first does not
  // begin before its middle and the last ends there. Interpolating at the zeros of a Chebyshev polynomial
  // is close to the least error. The two at the ends go through 0 there: x is then exact to the last bits
  // however small, and a large one is passed as it is.
  template <class F>
  void fit(const F& f, int piece) {
    const bool ends = piece == 0 || piece == lanes - 1;
    const double middle = piece * static_cast<double>(width);
    const double from = piece == 0 ? 0 : -width / 2, to = piece == lanes - 1 ? 0 : width / 2;
    const int nodes = ends ? degree : degree + 1;
    double t[degree + 1], difference[degree + 1], power[degree + 1] = {};
    for (int i = 0; i < nodes; ++i) {
      t[i] = (from + to) / 2 + (to - from) / 2 * std::cos(pi * (2 * i + 1) / (2 * nodes));
      difference[i] = ends ? (f(middle + t[i]) - f(middle)) / t[i] : f(middle + t[i]);
    }
    for (int order = 1; order < nodes; ++order)  // Newton's divided differences
      for (int i = nodes - 1; i >= order; --i)
        difference[i] = (difference[i] - difference[i - 1]) / (t[i] - t[i - order]);
    for (int i = nodes - 1; i >= 0; --i) {
      for (int k = nodes - 1; k > 0; --k) power[k] = power[k - 1] - t[i] * power[k];
      power[0] = difference[i] - t[i] * power[0];
    }
    for (int k = 0; k <= degree; ++k)
      coefficients_[k][piece] = static_cast<float>(!ends ? power[k] : k > 0 ? power[k - 1] : 0);
  }

  Vec coefficients_[degree + 1];
};

// Off by at most 2e-8, or 8e-6 where that is enough, but for rounding.
template <class Storage>
class Gelu {
 public:
  EVSAM_INLINE Vec operator()(Vec x) const { return below_(x); }

 private:
  using Table = BelowRelu<coarse<Storage> ? 3 : 5>;

  static const Table& table() {
    static const Table table([](double u) {
      return u / (1 + std::exp(std::sqrt(8 / pi) * (u + 0.044715 * u * u * u)));
    });
    return table;
  }

  const Table& below_ = table();
};

// Off by at most 6e-8 but for rounding, and by 2e-8 where |x| < 5.4; or by 8e-6 where that is enough. It holds its
// tables, so that loops keep them in registers.
template <class Storage>
class ExactGelu {
 public:
  EVSAM_INLINE Vec operator()(Vec x) const { return below_(x); }

 private:
  using Table = BelowRelu<coarse<Storage> ? 3 : 5>;

  static const Table& table() {
    static const Table table([](double u) { return u / 2 * std::erfc(u * std::sqrt(0.5)); });
    return table;
  }

  const Table below_ = table();
};

#else

template <class Storage>
struct Gelu {
  EVSAM_INLINE Vec operator()(Vec x) const {
    // 0.5 x (1 + tanh(z)) = x / (1 + exp(-2 z)) with z = sqrt(2 / pi) (x + 0.044715 x^3)
    constexpr float c = -2.302208198f;  // -2 sqrt(2 / pi) log2(e)
    const Vec t = x * fma(x * x, broadcast(c * 0.044715f), broadcast(c));
    return over_one_plus_power<Storage>(x, t);
  }
};

// The probability is 1/2 + x p(x^2) / q(x^2), fitted on [-5.2, 5.2] for the least absolute error: 1e-8.
template <class Storage>
struct ExactGelu {
  EVSAM_INLINE Vec operator()(Vec x) const {
    const Vec z = larger(smaller(x, broadcast(5.2f)), broadcast(-5.2f)), u = z * z;
    Vec p = fma(u, broadcast(1.26794201e-10f), broadcast(-2.28775044e-8f));
    p = fma(p, u, broadcast(2.95410811e-6f));
    p = fma(p, u, broadcast(1.37943598e-4f));
    p = fma(p, u, broadcast(4.29840725e-3f));
    p = fma(p, u, broadcast(3.26512854e-2f));
    p = fma(p, u, broadcast(3.98942216e-1f));
    Vec q = fma(u, broadcast(5.21109204e-5f), broadcast(1.63970629e-3f));
    q = fma(q, u, broadcast(2.71950926e-2f));
    q = fma(q, u, broadcast(2.48510182e-1f));
    q = fma(q, u, broadcast(1));
    return x * fma(z * p, reciprocal(q), broadcast(0.5f));
  }
};

#endif

template <class Storage>
struct AnyActivation {
  Activation activation;

  EVSAM_INLINE Vec operator()(Vec x) const {
    switch (activation) {
      case Activation::none: return x;
      case Activation::relu: return relu(x);
      case Activation::relu6: return relu6(x);
      case Activation::hswish: return x * relu6(x + 3) / 6;
      case Activation::silu: return silu<Storage>(x);
      case Activation::gelu: return Gelu<Storage>{}(x);
    }
    return x;
  }
};

// Calls body(function) with the activation as a function: the models' own are known to the compiler,
// any other is looked up for every vector.
template <class Storage, class Body>
EVSAM_INLINE void with_activation(Activation activation, const Body& body) {
  if (activation == Activation::none) return body(Identity{});
  if (activation == Activation::gelu) return body(Gelu<Storage>{});
  return body(AnyActivation<Storage>{activation});
}

}  // namespace
}  // namespace evsam::EVSAM_ISA
