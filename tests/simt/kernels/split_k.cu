// y [rows] = A [rows, depth] x [depth], with the depth split over blockIdx.x: every block writes its
// part of the sums, and the block of a row that comes last adds the parts up, in order.
// One block of 64 threads per row and split; arrived [rows] must be 0 and is 0 again afterwards.
extern "C" __global__ void split_k(const float* a, const float* x, float* parts, unsigned* arrived,
                                   float* y, int depth) {
    __shared__ float partial[2];
    __shared__ bool last;
    const int row = blockIdx.y, split = blockIdx.x, splits = gridDim.x;
    const int length = (depth + splits - 1) / splits;
    const int end = min(depth, (split + 1) * length);
    float sum = 0;
    for (int k = split * length + threadIdx.x; k < end; k += blockDim.x)
        sum += a[size_t(row) * depth + k] * x[k];
    for (int distance = 16; distance > 0; distance /= 2)
        sum += __shfl_xor_sync(0xffffffff, sum, distance);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        parts[row * splits + split] = partial[0] + partial[1];
        __threadfence();
        last = atomicAdd(&arrived[row], 1u) == splits - 1;
        __threadfence();
    }
    __syncthreads();
    if (last && threadIdx.x == 0) {
        float total = 0;
        for (int i = 0; i < splits; i++) total += parts[row * splits + i];
        y[row] = total;
        arrived[row] = 0;
    }
}
