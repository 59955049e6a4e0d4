// What follows a convolution.
#pragma once

namespace evsam {

// gelu is the tanh approximation.
enum class Activation { none, relu, relu6, hswish, silu, gelu };

}  // namespace evsam
