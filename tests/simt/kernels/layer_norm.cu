// Layer norm of every row of x [rows, columns] in bfloat16 with float32 statistics; a warp per row,
// so that no barrier is needed.
#include <cuda_bf16.h>

__device__ float over_warp(float value) {
    for (int distance = 16; distance > 0; distance /= 2)
        value += __shfl_xor_sync(0xffffffff, value, distance);
    return value;
}

extern "C" __global__ void layer_norm(const __nv_bfloat16* x, const float* weight,
                                      const float* bias, __nv_bfloat16* y, int rows, int columns,
                                      float eps) {
    const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    x += size_t(row) * columns;
    y += size_t(row) * columns;
    float sum = 0;
    for (int i = lane; i < columns; i += 32) sum += __bfloat162float(x[i]);
    const float mean = over_warp(sum) / columns;
    float squares = 0;
    for (int i = lane; i < columns; i += 32) {
        float difference = __bfloat162float(x[i]) - mean;
        squares += difference * difference;
    }
    const float scale = rsqrtf(over_warp(squares) / columns + eps);
    for (int i = lane; i < columns; i += 32)
        y[i] = __float2bfloat16((__bfloat162float(x[i]) - mean) * scale * weight[i] + bias[i]);
}
