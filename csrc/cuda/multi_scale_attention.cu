// Aggregation at every scale and attention of `multi_scale_attention`, in one launch or in two.
//
// qkv is [B, H, W, heads * 3 * D], out [B, H, W, (1 + scales) * heads * D]. A block has one head
// of one image and a tile of its tokens, with the halo that the depthwise convolution needs, in
// shared memory at the storage type; of a tile of all tokens nothing but qkv is read and nothing
// but out is written. Where there are several tiles, a first launch leaves each tile's state, from
// k and v, in global memory, and a second adds them in order and computes the output, from q: each
// reads its own part of qkv, so that nothing is filtered twice but halos.
//
// What is filtered, aggregated and summed is float32; products round their operands to TF32, which
// has float32's range and no fewer bits than the 16-bit types, or are sums of three (float32). The
// channels that a product sums over are taken in the order in which the last product left them in
// registers. Rows in shared memory are 8 floats longer than D: a fragment's pairs, and the columns
// that a state's product reads, are then in different banks. The algorithm is Figure 2 of
// EfficientViT (arXiv 2205.14756).
#include "primitives.cuh"

using namespace evsam;

namespace {

// Of a block, which takes 16 tokens a warp in a step; long rows leave no room for more.
template <int D>
inline constexpr int kWarpsFor = D <= 32 ? 8 : 4;

enum Part { kQ, kK, kV };

// Bits of `phases`.
constexpr int kState = 1;
constexpr int kOutput = 2;

template <typename T>
__device__ __forceinline__ float4 load4(const T* from) {
  if constexpr (sizeof(T) == 4) {
    return *reinterpret_cast<const float4*>(from);
  } else {
    const uint2 bits = *reinterpret_cast<const uint2*>(from);
    const T* values = reinterpret_cast<const T*>(&bits);
    return {to_float(values[0]), to_float(values[1]), to_float(values[2]), to_float(values[3])};
  }
}

template <typename T>
__device__ __forceinline__ void store4(T* to, float4 value) {
  if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<float4*>(to) = value;
  } else {
    uint2 bits;
    T* values = reinterpret_cast<T*>(&bits);
    values[0] = from_float<T>(value.x), values[1] = from_float<T>(value.y);
    values[2] = from_float<T>(value.z), values[3] = from_float<T>(value.w);
    *reinterpret_cast<uint2*>(to) = bits;
  }
}

// A power of two, at most 1, that takes magnitudes up to `*largest` to what float16 holds.
__device__ __forceinline__ float power_below(const float* largest) {
  return largest == nullptr ? 1.0f : exp2f(-ceilf(fmaxf(log2f(*largest / 32768.0f), 0.0f)));
}

__device__ __forceinline__ float relu(float x) { return x < 0 ? 0.0f : x; }  // Keeps a NaN.

template <typename T, int D, Float32 float32>
struct Attention {
  static constexpr int kWarps = kWarpsFor<D>;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = 16 * kWarps;  // tokens of a step
  static constexpr int kPitch = D + 8;
  static constexpr int kSteps = D / 8;
  static constexpr int kQuads = D / 4;
  static constexpr int kStateSize = (D + 8) * kPitch;  // floats of a scale's state: [v and 1, k]

  const T* qkv;
  const T* depth_weight;  // [scales, heads * 3, kernel * kernel, D]
  const T* depth_bias;    // [scales, heads * 3, D]
  const T* group_weight;  // [scales, heads * 3, D, D]
  const T* group_bias;    // [scales, heads * 3, D]
  T* out;
  int height, width, heads, scales, kernel, tile_height, tile_width;
  float unscale;  // of qkv as it is stored

  T* map;  // [parts, tile_height + kernel - 1, tile_width + kernel - 1, D]
  float* filters;  // [2, kernel * kernel, D]
  float* groups;   // [2, D, kPitch]
  float* rows;     // [2, kRows, kPitch]
  float* states;   // [1 + scales, D + 8, kPitch]
  int top, left, head, image, warp, lane;

  __device__ int map_width() const { return tile_width + kernel - 1; }
  __device__ int map_size() const { return (tile_height + kernel - 1) * map_width() * D; }

  __device__ void set_up(void* shared, int parts) {
    map = static_cast<T*>(shared);
    filters = reinterpret_cast<float*>(map + parts * map_size());
    groups = filters + 2 * kernel * kernel * D;
    rows = groups + 2 * D * kPitch;
    states = rows + 2 * kRows * kPitch;
    const int across = (width + tile_width - 1) / tile_width;
    top = blockIdx.x / across * tile_height;
    left = blockIdx.x % across * tile_width;
    head = blockIdx.y;
    image = blockIdx.z;
    warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
  }

  // Starts the copies of one part of the tile, zeros outside of the image.
  __device__ void copy(Part part, int slot) {
    constexpr int chunks = D / kChunk<T>;
    T* to = map + slot * map_size();
    const T* from = qkv + (head * 3 + part) * D;
    for (int i = threadIdx.x; i < map_size() / kChunk<T>; i += kThreads) {
      const int pixel = i / chunks;
      const int y = top + pixel / map_width() - kernel / 2;
      const int x = left + pixel % map_width() - kernel / 2;
      const bool there = y >= 0 && y < height && x >= 0 && x < width;
      const int64_t at = there ? (int64_t(image) * height + y) * width + x : 0;
      copy_async(to + i * kChunk<T>, from + at * heads * 3 * D + i % chunks * kChunk<T>, there);
    }
  }

  // Loads the weights with which a scale (1 and up) aggregates a part.
  __device__ void load_weights(int scale, Part part, int slot) {
    const int64_t group = int64_t(scale - 1) * heads * 3 + head * 3 + part;
    const int taps = kernel * kernel;
    for (int i = threadIdx.x; i < taps * kQuads; i += kThreads) {
      const float4 value = load4(depth_weight + group * taps * D + i * 4);
      *reinterpret_cast<float4*>(filters + slot * taps * D + i * 4) = value;
    }
    for (int i = threadIdx.x; i < D * kQuads; i += kThreads) {
      const float4 value = load4(group_weight + group * D * D + i * 4);
      float* to = groups + (slot * D + i / kQuads) * kPitch + i % kQuads * 4;
      *reinterpret_cast<float4*>(to) = value;
    }
  }

  // Position in the tile of a token of it; of the first token where there is no such token.
  __device__ bool position(int token, int& y, int& x) const {
    y = token / tile_width;
    x = token % tile_width;
    const bool there = y < tile_height && top + y < height && left + x < width;
    if (!there) y = x = 0;
    return there;
  }

  __device__ float* rows_of_warp(int slot) const {
    return rows + (slot * kRows + 16 * warp) * kPitch;
  }

  // Lane 4 * g + t gets of 16 tokens from `first` on rows g and g + 8, of each 8 channels 2 * t and
  // 2 * t + 1: the part itself at scale 0, else its aggregation. The warp's rows are scratch.
  __device__ void values(float (&sum)[kSteps][4], int scale, Part part, int slot, int first) {
    float* scratch = rows_of_warp(slot);
    const int quad = lane % kQuads;
    const int64_t channel = (int64_t(scale - 1) * heads * 3 + head * 3 + part) * D;
    const T* at[kSteps];
    float4 filtered[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      int y, x;
      position(first + lane / kQuads + i * (128 / D), y, x);
      at[i] = map + slot * map_size() + (y * map_width() + x) * D + quad * 4;
      filtered[i] = {0, 0, 0, 0};
    }
    if (scale == 0) {
      const int centre = kernel / 2 * (map_width() + 1) * D;
#pragma unroll
      for (int i = 0; i < kSteps; ++i) filtered[i] = load4(at[i] + centre);
    } else {
      const float* filter = filters + slot * kernel * kernel * D + quad * 4;
      for (int down = 0; down < kernel; ++down) {
        for (int along = 0; along < kernel; ++along) {
          const float4 weight = *reinterpret_cast<const float4*>(filter);
          filter += D;
#pragma unroll
          for (int i = 0; i < kSteps; ++i) {
            const float4 value = load4(at[i] + (down * map_width() + along) * D);
            filtered[i].x += weight.x * value.x;
            filtered[i].y += weight.y * value.y;
            filtered[i].z += weight.z * value.z;
            filtered[i].w += weight.w * value.w;
          }
        }
      }
    }
    float4 bias = {0, 0, 0, 0};
    if (scale > 0 && depth_bias != nullptr) bias = load4(depth_bias + channel + quad * 4);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const float4 value = {filtered[i].x * unscale + bias.x, filtered[i].y * unscale + bias.y,
                            filtered[i].z * unscale + bias.z, filtered[i].w * unscale + bias.w};
      const int row = lane / kQuads + i * (128 / D);
      *reinterpret_cast<float4*>(scratch + row * kPitch + quad * 4) = value;
    }
    __syncwarp();
    const int g = lane / 4, t = lane % 4;
    float taken[kSteps][4];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const float* pair = scratch + g * kPitch + step * 8 + 2 * t;
      const float2 upper = *reinterpret_cast<const float2*>(pair);
      const float2 lower = *reinterpret_cast<const float2*>(pair + 8 * kPitch);
      taken[step][0] = upper.x, taken[step][1] = upper.y;
      taken[step][2] = lower.x, taken[step][3] = lower.y;
    }
    if (scale == 0) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        for (int i = 0; i < 4; ++i) sum[step][i] = taken[step][i];
      }
      return;
    }
#pragma unroll
    for (int column = 0; column < kSteps; ++column) {
      for (int i = 0; i < 4; ++i) sum[column][i] = 0;
      product(sum[column], taken, groups + (slot * D + column * 8) * kPitch);
      if (group_bias != nullptr) {
        const T* offset = group_bias + channel + column * 8 + 2 * t;
        for (int i = 0; i < 4; ++i) sum[column][i] += to_float(offset[i % 2]);
      }
    }
  }

  // sum[16 x 8] += a[16 x D] b^T, with b's 8 rows of D in shared memory.
  __device__ void product(float (&sum)[4], const float (&a)[kSteps][4], const float* b) {
    const float* pair = b + lane / 4 * kPitch + 2 * (lane % 4);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const float2 of_b = *reinterpret_cast<const float2*>(pair + step * 8);
      const uint32_t b_bits[2] = {__float_as_uint(of_b.x), __float_as_uint(of_b.y)};
      const uint32_t a_bits[4] = {__float_as_uint(a[step][0]), __float_as_uint(a[step][2]),
                                  __float_as_uint(a[step][1]), __float_as_uint(a[step][3])};
      multiply<float, float32>(sum, a_bits, b_bits);
    }
  }

  __device__ void store_rows(const float (&value)[kSteps][4], int slot) {
    float* pair = rows_of_warp(slot) + lane / 4 * kPitch + 2 * (lane % 4);
    __syncwarp();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      *reinterpret_cast<float2*>(pair + step * 8) = {value[step][0], value[step][1]};
      *reinterpret_cast<float2*>(pair + step * 8 + 8 * kPitch) = {value[step][2], value[step][3]};
    }
  }

  // states[scale] = sum over the tile's tokens of (v, 1) relu(k)^T.
  __device__ void sum_state(int scale) {
    constexpr int columns = kSteps;
    constexpr int products = D / 16 * columns;
    constexpr int share = (products + kWarps - 1) / kWarps;
    const int g = lane / 4, t = lane % 4;
    float state[share][4] = {};
    float keys[kSteps][2] = {};  // over rows g and g + 8 of the warp
    for (int first = 0; first < tile_height * tile_width; first += kRows) {
      float value[kSteps][4];
      values(value, scale, kK, 0, first + 16 * warp);
      int y, x;
      const bool upper = position(first + 16 * warp + g, y, x);
      const bool lower = position(first + 16 * warp + g + 8, y, x);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        for (int i = 0; i < 4; ++i) {
          value[step][i] = (i < 2 ? upper : lower) ? relu(value[step][i]) : 0.0f;
        }
        for (int i = 0; i < 2; ++i) keys[step][i] += value[step][i] + value[step][i + 2];
      }
      store_rows(value, 0);
      values(value, scale, kV, 1, first + 16 * warp);
      store_rows(value, 1);
      __syncthreads();
      for (int step = 0; step < kRows / 8; ++step) {
#pragma unroll
        for (int u = 0; u < share; ++u) {
          const int index = warp + u * kWarps;
          if (index >= products) break;
          const int column = index % columns;
          const float* k = rows + (step * 8 + t) * kPitch + index / columns * 16 + g;
          const float* v = rows + (kRows + step * 8 + t) * kPitch + column * 8 + g;
          const uint32_t a[4] = {__float_as_uint(k[0]), __float_as_uint(k[8]),
                                 __float_as_uint(k[4 * kPitch]),
                                 __float_as_uint(k[4 * kPitch + 8])};
          const uint32_t b[2] = {__float_as_uint(v[0]), __float_as_uint(v[4 * kPitch])};
          multiply<float, float32>(state[u], a, b);
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int u = 0; u < share; ++u) {
      const int index = warp + u * kWarps;
      if (index >= products) break;
      float* to = states + scale * kStateSize + (index % columns * 8 + 2 * t) * kPitch +
                  index / columns * 16 + g;
      to[0] = state[u][0], to[kPitch] = state[u][1];
      to[8] = state[u][2], to[kPitch + 8] = state[u][3];
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      for (int i = 0; i < 2; ++i) {
        for (int apart = 4; apart < 32; apart *= 2) {
          keys[step][i] += __shfl_xor_sync(~0u, keys[step][i], apart);
        }
        if (g == 0) rows[warp * kPitch + step * 8 + 2 * t + i] = keys[step][i];
      }
    }
    __syncthreads();
    float* ones = states + scale * kStateSize + D * kPitch;
    for (int i = threadIdx.x; i < 8 * D; i += kThreads) {
      float sum = 0;  // Rows below the first pad it to a fragment.
      for (int of = 0; i < D && of < kWarps; ++of) sum += rows[of * kPitch + i];
      ones[i / D * kPitch + i % D] = sum;
    }
  }

  // Writes a scale's output of all tokens of the tile, multiplied by `factor`.
  __device__ void attend(int scale, float factor, float eps) {
    const float* state = states + scale * kStateSize;
    for (int first = 16 * warp; first < tile_height * tile_width; first += kRows) {
      float q[kSteps][4], result[kSteps][4];
      values(q, scale, kQ, 0, first);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        for (int i = 0; i < 4; ++i) q[step][i] = relu(q[step][i]);
      }
      float denominator[4] = {};
      product(denominator, q, state + D * kPitch);
      const float upper = __shfl_sync(~0u, denominator[0], lane & ~3) + eps;
      const float lower = __shfl_sync(~0u, denominator[2], lane & ~3) + eps;
#pragma unroll
      for (int column = 0; column < kSteps; ++column) {
        for (int i = 0; i < 4; ++i) result[column][i] = 0;
        product(result[column], q, state + column * 8 * kPitch);
        for (int i = 0; i < 4; ++i) {
          result[column][i] = result[column][i] / (i < 2 ? upper : lower) * factor;
        }
      }
      store_rows(result, 0);
      __syncwarp();
      for (int i = lane; i < 16 * kQuads; i += 32) {
        int y, x;
        if (!position(first + i / kQuads, y, x)) continue;
        const int64_t pixel = (int64_t(image) * height + top + y) * width + left + x;
        const float* from = rows_of_warp(0) + i / kQuads * kPitch + i % kQuads * 4;
        store4(out + ((pixel * (1 + scales) + scale) * heads + head) * D + i % kQuads * 4,
               *reinterpret_cast<const float4*>(from));
      }
    }
  }

  // This tile's states, [image, head, tile, 1 + scales, D + 1, D] in global memory.
  __device__ void leave_states(float* parts) {
    const int size = (1 + scales) * (D + 1) * D;
    const int64_t block = (int64_t(image) * heads + head) * gridDim.x + blockIdx.x;
    for (int i = threadIdx.x; i < size; i += kThreads) {
      const int row = i / D % (D + 1), scale = i / (D * (D + 1));
      parts[block * size + i] = states[scale * kStateSize + row * kPitch + i % D];
    }
  }

  // The sum of all tiles' states, in order, so that it is the same every time and in every block.
  __device__ void add_states(const float* parts) {
    const int size = (1 + scales) * (D + 1) * D;
    const float* from = parts + (int64_t(image) * heads + head) * gridDim.x * size;
    for (int i = threadIdx.x; i < (1 + scales) * (D + 8) * D; i += kThreads) {
      const int row = i / D % (D + 8), scale = i / (D * (D + 8));
      float sum = 0;
      for (int tile = 0; row <= D && tile < gridDim.x; ++tile) {
        sum += from[int64_t(tile) * size + (scale * (D + 1) + row) * D + i % D];
      }
      states[scale * kStateSize + row * kPitch + i % D] = sum;
    }
  }

  __device__ void run(int phases, float* parts, float factor, float eps) {
    if (phases & kState) {
      copy(kK, 0);
      copy(kV, 1);
      commit_copies();
      wait_for_copies<0>();
      for (int scale = 0; scale <= scales; ++scale) {
        if (scale > 0) {
          load_weights(scale, kK, 0);
          load_weights(scale, kV, 1);
        }
        __syncthreads();
        sum_state(scale);
      }
      __syncthreads();
    }
    if (!(phases & kOutput)) {
      leave_states(parts);
      return;
    }
    copy(kQ, 0);
    commit_copies();
    if (!(phases & kState)) add_states(parts);
    wait_for_copies<0>();
    for (int scale = 0; scale <= scales; ++scale) {
      __syncthreads();
      if (scale > 0) load_weights(scale, kQ, 0);
      __syncthreads();
      attend(scale, factor, eps);
    }
  }
};

}  // namespace

// Dynamic shared memory: the fields of Attention that set_up() places.
#define EVSAM_KERNEL(name, T, D, float32)                                                          \
  extern "C" __global__ void __launch_bounds__(32 * kWarpsFor<D>, 1)                               \
      multi_scale_attention_##name##_##D(                                                          \
      const T* qkv, const T* depth_weight, const T* depth_bias, const T* group_weight,             \
      const T* group_bias, T* out, float* parts, const float* qkv_largest,                         \
      const float* out_largest, int height, int width, int heads, int scales, int kernel,          \
      int tile_height, int tile_width, int phases, float eps) {                                    \
    extern __shared__ __align__(16) unsigned char shared[];                                        \
    Attention<T, D, float32> attention{qkv, depth_weight, depth_bias, group_weight, group_bias,    \
                                       out, height, width, heads, scales, kernel, tile_height,     \
                                       tile_width, 1.0f / power_below(qkv_largest)};               \
    attention.set_up(shared, phases & kState ? 2 : 1);                                             \
    attention.run(phases, parts, power_below(out_largest), eps);                                   \
  }
#define EVSAM_KERNELS(name, T, float32) \
  EVSAM_KERNEL(name, T, 16, float32)    \
  EVSAM_KERNEL(name, T, 32, float32)    \
  EVSAM_KERNEL(name, T, 64, float32)

EVSAM_KERNELS(float16, half, Float32::tf32)
EVSAM_KERNELS(bfloat16, bfloat16, Float32::tf32)
EVSAM_KERNELS(tf32, float, Float32::tf32)
EVSAM_KERNELS(float32, float, Float32::exact)
