// Activations, as parts of a kernel's arithmetic.
#pragma once

#include "primitives.cuh"

namespace evsam {

// As launches number them; `any` is for kernels that are told when they are launched.
enum class Activation { none, relu, relu6, hswish, silu, gelu, any };

__device__ __forceinline__ float clamp_6(float x) {
  // NaN stays NaN.
  return x < 0.0f ? 0.0f : (x > 6.0f ? 6.0f : x);
}

// A power of two, at most 1, that takes magnitudes up to `largest` to what float16 holds.
__device__ __forceinline__ float power_below(float largest) {
  const int exponent = ((__float_as_int(largest / 32768.0f) + 0x7fffff) >> 23) - 127;
  return __int_as_float((127 - min(max(exponent, 0), 126)) << 23);
}

// 1 / power, of a power of two that is not the smallest or the largest.
__device__ __forceinline__ float reciprocal_of_power(float power) {
  return __int_as_float((254 << 23) - __float_as_int(power));
}

// scale * activation(grow * sum + offset) in float32, for results that are stored as T; `scale` and
// `grow` are powers of two. What can be multiplied once for all sums or for a channel's is.
template <typename T, Activation kActivation>
class Activate {
 public:
  __device__ __forceinline__ Activate(int launched, float scale, float grow)
      : launched_(launched), scale_(scale), of_offset_(1.0f), of_sum_(grow) {
    if constexpr (kHalves) {
      of_offset_ = 0.5f * scale;
      of_sum_ = of_offset_ * grow;
      const float back = 2.0f * reciprocal_of_power(scale);
      linear_ = 0.7978845608f * back;
      cubic_ = 0.0356774081f * back * back * back;
    }
  }

  // What a channel's offset is to be given as.
  __device__ __forceinline__ float prepared(float offset) const { return of_offset_ * offset; }

  __device__ __forceinline__ float operator()(float sum, float prepared) const {
    const float x = fmaf(sum, of_sum_, prepared);
    if constexpr (kHalves) {
      // 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), of half of what is to be activated.
      return fmaf(x, tanh(x * fmaf(cubic_, x * x, linear_)), x);
    }
    switch (kActivation == Activation::any ? static_cast<Activation>(launched_) : kActivation) {
      case Activation::relu:
        return scale_ * (x < 0.0f ? 0.0f : x);
      case Activation::relu6:
        return scale_ * clamp_6(x);
      case Activation::hswish:
        return scale_ * (x * (clamp_6(x + 3.0f) / 6.0f));
      case Activation::silu:
        return scale_ * (x / (1.0f + __expf(-x)));
      case Activation::gelu:
        // The same as x / (1 + exp(-2 z)), whose exponential is exact enough for float32.
        return scale_ * (x / (1.0f + __expf(x * (-1.5957691216f - 0.0713548163f * x * x))));
      default:
        return scale_ * x;
    }
  }

 private:
  static constexpr bool kHalves = kActivation == Activation::gelu && sizeof(T) == 2;

  static __device__ __forceinline__ float tanh(float x) {
    float result;
    asm("tanh.approx.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
  }

  int launched_;
  float scale_, of_offset_, of_sum_, linear_, cubic_;
};

}  // namespace evsam
