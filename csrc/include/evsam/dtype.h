// The element types that tensors are stored in.
#pragma once

namespace evsam {

enum class DType { float16, bfloat16, float32, float64 };

}  // namespace evsam
