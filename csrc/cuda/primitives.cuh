// What the kernels are made of: storage types, asynchronous copies, matrix fragments and products.
//
// Operands of products lie in shared memory with the summed axis innermost, rows of 16-byte chunks,
// swizzled. A step of a product sums over 32 bytes of that axis, 16 halves or 8 floats: then
// fragments are loaded alike for every type, as ldmatrix moves 16-byte rows whatever is in them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace evsam {

using bfloat16 = __nv_bfloat16;
using half = __half;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ half from_float<half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ bfloat16 from_float<bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// 16 bytes of elements.
template <typename T>
inline constexpr int kChunk = 16 / sizeof(T);

// Elements that one step of a product sums over.
template <typename T>
inline constexpr int kStep = 32 / sizeof(T);

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes to shared memory, or fills them with zeros where `there` is false.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool there) {
  const int bytes = there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `pending` groups of this thread's copies are under way.
template <int pending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Where chunk `chunk` of row `row` lies, in chunks, among rows of `chunks` chunks (a power of two):
// eight rows below each other, which ldmatrix reads at once, are in different banks.
template <int chunks>
__device__ __forceinline__ int swizzled(int row, int chunk) {
  static_assert((chunks & (chunks - 1)) == 0, "rows of a power of two of chunks");
  if constexpr (chunks >= 8) {
    return row * chunks + (chunk ^ (row & 7));
  } else {
    return row * chunks + (chunk ^ (row / (8 / chunks) & (chunks - 1)));
  }
}

// Four 8-row matrices of 16-byte rows; lane 8 * i + j gives row j of the ith.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same, transposed; for 16-bit elements.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// How float32 operands are multiplied: rounded to TF32, or as sums of two TF32 values.
enum class Float32 { tf32, exact };

__device__ __forceinline__ uint32_t round_to_tf32(float value) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(value));
  return rounded;
}

__device__ __forceinline__ void multiply_tf32(float (&sum)[4], const uint32_t (&a)[4],
                                              const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// sum[16 x 8] += a[16 x step] b[step x 8]. Lane 4 * g + t holds rows g and g + 8, columns 2 * t and
// 2 * t + 1 of the sum; of a and b what ldmatrix gives it.
template <typename T, Float32 float32 = Float32::tf32>
__device__ __forceinline__ void multiply(float (&sum)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  if constexpr (sizeof(T) == 4) {
    uint32_t a_high[4], b_high[2];
    for (int i = 0; i < 4; ++i) a_high[i] = round_to_tf32(__uint_as_float(a[i]));
    for (int i = 0; i < 2; ++i) b_high[i] = round_to_tf32(__uint_as_float(b[i]));
    if constexpr (float32 == Float32::exact) {
      uint32_t a_low[4], b_low[2];
      for (int i = 0; i < 4; ++i) {
        a_low[i] = round_to_tf32(__uint_as_float(a[i]) - __uint_as_float(a_high[i]));
      }
      for (int i = 0; i < 2; ++i) {
        b_low[i] = round_to_tf32(__uint_as_float(b[i]) - __uint_as_float(b_high[i]));
      }
      multiply_tf32(sum, a_low, b_low);
      multiply_tf32(sum, a_low, b_high);
      multiply_tf32(sum, a_high, b_low);
    }
    multiply_tf32(sum, a_high, b_high);
  } else if constexpr (__is_same(T, half)) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

}  // namespace evsam
