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

// scale * activation(x) of a float32 sum, for a result that is stored as T; `scale` is a power of
// two.
template <typename T, Activation kActivation>
__device__ __forceinline__ float activate(float x, int launched, float scale) {
  const Activation activation =
      kActivation == Activation::any ? static_cast<Activation>(launched) : kActivation;
  switch (activation) {
    case Activation::relu:
      return scale * (x < 0.0f ? 0.0f : x);
    case Activation::relu6:
      return scale * clamp_6(x);
    case Activation::hswish:
      return scale * (x * (clamp_6(x + 3.0f) / 6.0f));
    case Activation::silu:
      return scale * (x / (1.0f + __expf(-x)));
    case Activation::gelu:
      if constexpr (sizeof(T) == 2) {
        // 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
        const float z = x * (0.7978845608f + 0.0356774081f * x * x);
        float tanh;
        asm("tanh.approx.f32 %0, %1;" : "=f"(tanh) : "f"(z));
        const float half = 0.5f * scale * x;
        return fmaf(half, tanh, half);
      } else {
        // The same as x / (1 + exp(-2 z)), whose exponential is exact enough for float32.
        return scale * (x / (1.0f + __expf(x * (-1.5957691216f - 0.0713548163f * x * x))));
      }
    default:
      return scale * x;
  }
}

}  // namespace evsam
