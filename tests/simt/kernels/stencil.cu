// Mean of the 3 x 3 neighbourhood of every pixel of x [height, width], zeros outside; a block of
// 16 x 16 threads brings its tile and the rim round it into shared memory.
constexpr int TILE = 16, SIDE = TILE + 2;

extern "C" __global__ void stencil(const float* x, float* y, int height, int width) {
    __shared__ float tile[SIDE][SIDE];
    const int first_row = blockIdx.y * TILE, first_column = blockIdx.x * TILE;
    for (int i = threadIdx.y * TILE + threadIdx.x; i < SIDE * SIDE; i += TILE * TILE) {
        int row = first_row + i / SIDE - 1, column = first_column + i % SIDE - 1;
        bool inside = row >= 0 && row < height && column >= 0 && column < width;
        tile[i / SIDE][i % SIDE] = inside ? x[row * width + column] : 0;
    }
    __syncthreads();
    const int row = first_row + threadIdx.y, column = first_column + threadIdx.x;
    if (row >= height || column >= width) return;
    float sum = 0;
    for (int down = 0; down < 3; down++)
        for (int right = 0; right < 3; right++)
            sum += tile[threadIdx.y + down][threadIdx.x + right];
    y[row * width + column] = sum / 9;
}
