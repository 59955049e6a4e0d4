// softmax(Q K^T / sqrt(32)) V for q, k, v [heads, tokens, 32] in float32, in the manner of flash
// attention: a thread per query, keys and values by tiles of 32 through shared memory, the running
// maximum and sum in registers.
constexpr int WIDTH = 32, TILE = 32;

extern "C" __global__ void attention(const float* q, const float* k, const float* v, float* out,
                                     int tokens) {
    __shared__ float keys[TILE][WIDTH], values[TILE][WIDTH];
    const size_t head = size_t(blockIdx.y) * tokens * WIDTH;
    const int query = blockIdx.x * blockDim.x + threadIdx.x;
    float own[WIDTH], sums[WIDTH];
    for (int d = 0; d < WIDTH; d++) {
        own[d] = query < tokens ? q[head + query * WIDTH + d] : 0;
        sums[d] = 0;
    }
    float largest = -INFINITY, weight = 0;
    for (int first = 0; first < tokens; first += TILE) {
        const int count = min(TILE, tokens - first);
        for (int i = threadIdx.x; i < count * WIDTH; i += blockDim.x) {
            keys[i / WIDTH][i % WIDTH] = k[head + first * WIDTH + i];
            values[i / WIDTH][i % WIDTH] = v[head + first * WIDTH + i];
        }
        __syncthreads();
        for (int key = 0; key < count; key++) {
            float score = 0;
            for (int d = 0; d < WIDTH; d++) score += own[d] * keys[key][d];
            score *= 0.17677669f;
            const float before = largest;
            largest = fmaxf(largest, score);
            const float shrink = expf(before - largest), grow = expf(score - largest);
            weight = weight * shrink + grow;
            for (int d = 0; d < WIDTH; d++) sums[d] = sums[d] * shrink + grow * values[key][d];
        }
        __syncthreads();
    }
    if (query < tokens)
        for (int d = 0; d < WIDTH; d++) out[head + query * WIDTH + d] = sums[d] / weight;
}
