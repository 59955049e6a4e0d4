// Softmax of every row of x [rows, columns]; one block of 128 threads per row, the row in registers
// of nobody: it is read twice, and the maximum and the sum pass through shared memory.
constexpr int WARPS = 4;

struct Maximum {
    __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Sum {
    __device__ float operator()(float a, float b) const { return a + b; }
};

template <class Combine> __device__ float over_block(float value, float* partial, Combine combine) {
    for (int distance = 16; distance > 0; distance /= 2)
        value = combine(value, __shfl_xor_sync(0xffffffff, value, distance));
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
    __syncthreads();
    value = partial[0];
    for (int warp = 1; warp < WARPS; warp++) value = combine(value, partial[warp]);
    __syncthreads();  // The next reduction uses the same memory.
    return value;
}

extern "C" __global__ void softmax(const float* x, float* y, int columns) {
    __shared__ float partial[WARPS];
    const float* row = x + size_t(blockIdx.x) * columns;
    float largest = -INFINITY;
    for (int i = threadIdx.x; i < columns; i += blockDim.x) largest = fmaxf(largest, row[i]);
    largest = over_block(largest, partial, Maximum());
    float sum = 0;
    for (int i = threadIdx.x; i < columns; i += blockDim.x) sum += expf(row[i] - largest);
    sum = over_block(sum, partial, Sum());
    for (int i = threadIdx.x; i < columns; i += blockDim.x)
        y[size_t(blockIdx.x) * columns + i] = expf(row[i] - largest) / sum;
}
