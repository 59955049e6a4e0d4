// C [M, N] = A [M, K] B [N, K]^T in float16, accumulated in float32.
// A block computes 64 x 64 with four warps of 32 x 32; tiles of depth 32 come in by cp.async, three
// stages deep, and lie swizzled so that neither the copies nor ldmatrix meet a bank conflict.
#include <cstdint>
#include <cuda_fp16.h>

constexpr int TILE = 64, DEPTH = 32, STAGES = 3, THREADS = 128;

__device__ int swizzled(int row, int chunk) {
    return row * DEPTH + (chunk ^ (row >> 1 & 3)) * 8;
}

__device__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ void copy_16_bytes(half* to, const half* from, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(inside ? 16 : 0) : "memory");
}

__device__ void load_matrices(uint32_t (&to)[4], const half* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row)) : "memory");
}

__device__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ void load_tile(half* tile, const half* matrix, int first, int rows, int depth, int k) {
    for (int i = threadIdx.x; i < TILE * DEPTH / 8; i += THREADS) {
        int row = i / 4, chunk = i % 4;
        bool inside = first + row < rows;
        const half* from = matrix + size_t(inside ? first + row : 0) * depth + k + chunk * 8;
        copy_16_bytes(tile + swizzled(row, chunk), from, inside);
    }
}

// Dynamic shared memory: STAGES * 2 * TILE * DEPTH halves. K must be a multiple of DEPTH.
extern "C" __global__ void __launch_bounds__(THREADS)
gemm(const half* a, const half* b, half* c, int rows, int columns, int depth) {
    extern __shared__ __align__(128) half shared[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int warp_row = warp % 2 * 32, warp_column = warp / 2 * 32;
    const int first_row = blockIdx.y * TILE, first_column = blockIdx.x * TILE;
    const int steps = depth / DEPTH;

    auto load = [&](int step) {
        if (step < steps) {
            half* tile = shared + step % STAGES * 2 * TILE * DEPTH;
            load_tile(tile, a, first_row, rows, depth, step * DEPTH);
            load_tile(tile + TILE * DEPTH, b, first_column, columns, depth, step * DEPTH);
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };

    float sums[2][4][4] = {};
    for (int step = 0; step < STAGES - 1; step++) load(step);
    for (int step = 0; step < steps; step++) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
        __syncthreads();
        load(step + STAGES - 1);
        const half* tile_a = shared + step % STAGES * 2 * TILE * DEPTH;
        const half* tile_b = tile_a + TILE * DEPTH;
        for (int k = 0; k < DEPTH / 16; k++) {
            uint32_t part_a[2][4], part_b[2][4];
            for (int i = 0; i < 2; i++) {
                int row = warp_row + i * 16 + lane % 16;
                load_matrices(part_a[i], tile_a + swizzled(row, k * 2 + lane / 16));
            }
            for (int j = 0; j < 2; j++) {
                int row = warp_column + j * 16 + lane % 8 + lane / 16 * 8;
                load_matrices(part_b[j], tile_b + swizzled(row, k * 2 + lane / 8 % 2));
            }
            for (int i = 0; i < 2; i++)
                for (int j = 0; j < 4; j++)
                    multiply_add(sums[i][j], part_a[i], part_b[j / 2][j % 2 * 2],
                                 part_b[j / 2][j % 2 * 2 + 1]);
        }
    }
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 4; j++)
            for (int part = 0; part < 4; part++) {
                int row = first_row + warp_row + i * 16 + lane / 4 + part / 2 * 8;
                int column = first_column + warp_column + j * 8 + lane % 4 * 2 + part % 2;
                if (row < rows && column < columns)
                    c[size_t(row) * columns + column] = __float2half(sums[i][j][part]);
            }
}
