// counts[v] += how often v occurs in values [n], 0 <= v < 64: a histogram per block in shared
// memory, added to the whole one by atomic operations.
constexpr int BINS = 64;

extern "C" __global__ void histogram(const int* values, unsigned* counts, int n) {
    __shared__ unsigned own[BINS];
    for (int bin = threadIdx.x; bin < BINS; bin += blockDim.x) own[bin] = 0;
    __syncthreads();
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
        atomicAdd(&own[values[i]], 1u);
    __syncthreads();
    for (int bin = threadIdx.x; bin < BINS; bin += blockDim.x)
        if (own[bin]) atomicAdd(&counts[bin], own[bin]);
}
