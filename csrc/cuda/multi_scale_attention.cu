// Aggregation at every scale and attention of `multi_scale_attention`.
//
// qkv is [B, H, W, heads * 3 * D], out [B, H, W, (1 + scales) * heads * D]. A block has one head
// of one image and a tile of its tokens at a time, with the halo that the depthwise convolution
// needs, in shared memory at the storage type. A block that takes all tiles in turn, for the state
// from k and v and then for the output from q, reads nothing but qkv and writes nothing but out.
// Where that would leave multiprocessors idle, blocks take a tile each: a first launch leaves each
// tile's state in global memory, and a second adds them in order and computes the output: each
// reads its own part of qkv, so that nothing is filtered twice but halos.
//
// A warp takes 16 tokens at a time: lines of a few, so that a lane, which has four channels of one
// line, slides the depthwise convolution along it. What it leaves is aggregated by products, with
// tokens as rows for q, which meets the state next, and as columns for k and v, whose product is
// the state: so the results of these products are operands of the next ones as they lie in
// registers. Every warp sums a state of its own, and these are added pair by pair.
//
// What is filtered, aggregated and summed is float32; products round their operands to TF32, which
// has float32's range and no fewer bits than the 16-bit types, or are sums of three (float32). The
// terms of a product are taken in the order in which registers hold them. Banks: rows in shared
// memory are 8 floats longer than D where a fragment's pairs are read, 4 where its single values
// are, and the map is an odd number of pixels wide. The algorithm is Figure 2 of EfficientViT
// (arXiv 2205.14756).
#include "primitives.cuh"

using namespace evsam;

namespace {

// Of a block; long rows leave no room for more.
template <int D>
inline constexpr int kWarpsFor = D <= 32 ? 16 : 4;

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

// Keeps a NaN.
__device__ __forceinline__ float relu(float x) {
  float result;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(result) : "f"(x));
  return result;
}

template <typename T, int D, Float32 float32>
struct Attention {
  static constexpr int kWarps = kWarpsFor<D>;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kPitch = D + 8;
  static constexpr int kSteps = D / 8;
  static constexpr int kQuads = D / 4;
  static constexpr int kTiles = D / 16;
  // A warp's 16 tokens.
  static constexpr int kLines = 32 / kQuads;
  static constexpr int kColumns = 16 / kLines;
  static constexpr int kWindow = kColumns < 4 ? kColumns : 4;  // of which a lane filters at once
  static constexpr int kStateSize = (D + 8) * kPitch;  // floats of a scale's state: [v and 1, k]
  // Floats that a warp's filtered tokens take, or half of the warps' states.
  static constexpr int kScratch = 16 * kPitch;
  // Of v's channels that a warp sums at once: the state of all would take too many registers.
  static constexpr int kAtOnce = D < 32 ? D : 32;
  static constexpr int kOwnPitch = D + 4;
  static constexpr int kOwnState = (kAtOnce + 1) * kOwnPitch;

  const T* qkv;
  const T* depth_weight;  // [scales, heads * 3, kernel * kernel, D]
  const T* depth_bias;    // [scales, heads * 3, D]
  const T* group_weight;  // [scales, heads * 3, D, D]
  const T* group_bias;    // [scales, heads * 3, D]
  T* out;
  int height, width, heads, scales, kernel, tile_height, tile_width, turns, first_image;
  float unscale;  // of qkv as it is stored

  T* map;  // [parts, map_height, map_width, D]
  float* filters;  // [2, kernel * kernel, D]
  float* groups;   // [2, D, kPitch]
  float* scratch;  // [kWarps, kScratch], or [kWarps / 2, kOwnState]
  float* states;   // [1 + scales, D + 8, kPitch]
  int across, down;  // warps' tokens in the tile
  int map_width, map_height;
  int top, left, head, image, warp, lane;

  __device__ int map_size() const { return map_height * map_width * D; }

  __device__ void set_up(void* shared, int parts) {
    across = (tile_width + kColumns - 1) / kColumns;
    down = (tile_height + kLines - 1) / kLines;
    map_width = (across * kColumns + kernel - 1) | 1;
    map_height = down * kLines + kernel - 1;
    map = static_cast<T*>(shared);
    filters = reinterpret_cast<float*>(map + parts * map_size());
    groups = filters + 2 * kernel * kernel * D;
    scratch = groups + 2 * D * kPitch;
    states = scratch + max(kWarps * kScratch, kWarps / 2 * kOwnState);
    head = blockIdx.y;
    image = first_image + blockIdx.z;
    identify();
  }

  // Asks anew, so that what follows from it need not stay in registers, of which there are few.
  __device__ void identify() {
    unsigned thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    warp = thread / 32;
    lane = thread % 32;
  }

  // Of the block's tiles, of which it takes `turns` one after the other, line by line.
  __device__ void to_first_tile() {
    const int tiles_across = (width + tile_width - 1) / tile_width, first = blockIdx.x * turns;
    top = first / tiles_across * tile_height;
    left = first % tiles_across * tile_width;
  }

  __device__ void to_next_tile() {
    left += tile_width;
    if (left >= width) left = 0, top += tile_height;
  }

  // Starts the copies of one part of the tile, zeros outside of the image.
  __device__ void copy(Part part, int slot) {
    constexpr int kChunks = D / kChunk<T>;
    for (int line = warp; line < map_height; line += kWarps) {
      const int y = top + line - kernel / 2;
      const int64_t line_of_map = int64_t(image) * height + y;
      const T* from = qkv + (line_of_map * width * heads * 3 + head * 3 + part) * D;
      T* to = map + slot * map_size() + line * map_width * D;
      for (int i = lane; i < map_width * kChunks; i += 32) {
        const int x = left + i / kChunks - kernel / 2;
        const bool there = y >= 0 && y < height && x >= 0 && x < width;
        const T* at = from + x * heads * 3 * D + i % kChunks * kChunk<T>;
        copy_async(to + i * kChunk<T>, there ? at : qkv, there);
      }
    }
  }

  // Loads the weights with which a scale (1 and up) aggregates a part.
  __device__ void load_weights(int scale, Part part, int slot) {
    const int64_t group = int64_t(scale - 1) * heads * 3 + head * 3 + part;
    const int taps = kernel * kernel;
    for (int i = 32 * warp + lane; i < taps * kQuads; i += kThreads) {
      const float4 value = load4(depth_weight + group * taps * D + i * 4);
      *reinterpret_cast<float4*>(filters + slot * taps * D + i * 4) = value;
    }
    for (int i = 32 * warp + lane; i < D * kQuads; i += kThreads) {
      const float4 value = rounded_if_float(load4(group_weight + group * D * D + i * 4));
      float* to = groups + (slot * D + i / kQuads) * kPitch + i % kQuads * 4;
      *reinterpret_cast<float4*>(to) = value;
    }
  }

  // A warp's 16 tokens, by the position of the first in the tile.
  struct Tokens {
    int y, x;

    __device__ int y_of(int token) const { return y + token / kColumns; }
    __device__ int x_of(int token) const { return x + token % kColumns; }
  };

  // Calls body(tokens) for all that are the warp's.
  template <typename Body>
  __device__ void for_each(const Body& body) {
    for (int i = warp; i < across * down; i += kWarps) {
      const int line = i / across;
      body(Tokens{line * kLines, (i - line * across) * kColumns});
    }
  }

  __device__ bool is_there(const Tokens& tokens, int token) const {
    const int y = tokens.y_of(token), x = tokens.x_of(token);
    return y < tile_height && x < tile_width && top + y < height && left + x < width;
  }

  __device__ float* own_scratch() const { return scratch + warp * kScratch; }

  // Adds the convolution of a lane's tokens, the first under `at`. Its size is kKernel, or not
  // known.
  template <int kKernel>
  __device__ void slide(float4 (&sums)[kWindow], const T* at, const float* taps) const {
    const int size = kKernel > 0 ? kKernel : kernel;
#pragma unroll 1
    for (int row = 0; row < size; ++row, at += map_width * D) {
      // Column x of the map at x % kWindow.
      float4 window[kWindow];
#pragma unroll
      for (int i = 0; i < kWindow - 1; ++i) window[i] = load4(at + i * D);
#pragma unroll(kKernel > 0 ? kKernel : 1)
      for (int first = 0; first < size; first += kWindow) {
#pragma unroll
        for (int along = 0; along < kWindow; ++along) {
          if (first + along >= size) break;
          const int newest = along + kWindow - 1;
          window[newest % kWindow] = load4(at + (first + newest) * D);
          const float4 tap = *reinterpret_cast<const float4*>(taps);
          taps += D;
#pragma unroll
          for (int i = 0; i < kWindow; ++i) {
            const float4 value = window[(along + i) % kWindow];
            sums[i].x = fmaf(tap.x, value.x, sums[i].x);
            sums[i].y = fmaf(tap.y, value.y, sums[i].y);
            sums[i].z = fmaf(tap.z, value.z, sums[i].z);
            sums[i].w = fmaf(tap.w, value.w, sums[i].w);
          }
        }
      }
    }
  }

  // What a depthwise convolution makes of 16 tokens, or the tokens themselves at scale 0, as rows
  // of the warp's scratch, `pitch` apart.
  __device__ void filter(int scale, Part part, int slot, const Tokens& tokens, int pitch) {
    const int quad = lane % kQuads, line = lane / kQuads;
    const T* at = map + slot * map_size() + quad * 4 +
                  ((tokens.y + line) * map_width + tokens.x) * D;
    const float* taps = filters + slot * kernel * kernel * D + quad * 4;
    float4 bias = {0, 0, 0, 0};
    if (scale > 0 && depth_bias != nullptr) {
      bias = load4(depth_bias + channel(scale, part) + quad * 4);
    }
    float* to = own_scratch() + line * kColumns * pitch + quad * 4;
    __syncwarp();
#pragma unroll
    for (int first = 0; first < kColumns; first += kWindow, at += kWindow * D) {
      float4 filtered[kWindow];
      if (scale == 0) {
        const T* centre = at + kernel / 2 * (map_width + 1) * D;
#pragma unroll
        for (int i = 0; i < kWindow; ++i) {
          filtered[i] = rounded_if_float(scaled(load4(centre + i * D), bias));
        }
      } else {
#pragma unroll
        for (int i = 0; i < kWindow; ++i) filtered[i] = {0, 0, 0, 0};
        // The compiler knows the models' own sizes, as far as registers suffice: bfloat16's do not
        // for both on sm_86.
        if (kernel == 5) {
          slide<5>(filtered, at, taps);
        } else if (!__is_same(T, bfloat16) && kernel == 3) {
          slide<3>(filtered, at, taps);
        } else {
          slide<0>(filtered, at, taps);
        }
#pragma unroll
        for (int i = 0; i < kWindow; ++i) {
          const float4 value = scaled(filtered[i], bias);
          filtered[i] = {rounded(value.x), rounded(value.y), rounded(value.z), rounded(value.w)};
        }
      }
#pragma unroll
      for (int i = 0; i < kWindow; ++i) {
        *reinterpret_cast<float4*>(to + (first + i) * pitch) = filtered[i];
      }
    }
    __syncwarp();
  }

  __device__ float4 scaled(float4 sum, float4 bias) const {
    return {fmaf(sum.x, unscale, bias.x), fmaf(sum.y, unscale, bias.y),
            fmaf(sum.z, unscale, bias.z), fmaf(sum.w, unscale, bias.w)};
  }

  // The first channel of a part at a scale from 1 on.
  __device__ int64_t channel(int scale, Part part) const {
    return (int64_t(scale - 1) * heads * 3 + head * 3 + part) * D;
  }

  // Lane 4 * g + t gets q of 16 tokens at a scale: rows g and g + 8, of each 8 channels 2 * t and
  // 2 * t + 1.
  __device__ void queries(float (&sum)[kSteps][4], int scale, const Tokens& tokens) {
    filter(scale, kQ, 0, tokens, kPitch);
    const int g = lane / 4, t = lane % 4;
    float taken[kSteps][4];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const float* pair = own_scratch() + g * kPitch + step * 8 + 2 * t;
      const float2 upper = *reinterpret_cast<const float2*>(pair);
      const float2 lower = *reinterpret_cast<const float2*>(pair + 8 * kPitch);
      taken[step][0] = upper.x, taken[step][1] = upper.y;
      taken[step][2] = lower.x, taken[step][3] = lower.y;
    }
#pragma unroll
    for (int column = 0; column < kSteps; ++column) {
      for (int i = 0; i < 4; ++i) sum[column][i] = scale == 0 ? taken[column][i] : 0.0f;
      if (scale == 0) continue;
      product(sum[column], taken, groups + column * 8 * kPitch);
      if (group_bias != nullptr) {
        const T* offset = group_bias + channel(scale, kQ) + column * 8 + 2 * t;
        for (int i = 0; i < 4; ++i) sum[column][i] += to_float(offset[i % 2]);
      }
    }
  }

  // Lane 4 * g + t gets k or v of 16 tokens at a scale, eight after eight, in channels from `from`
  // on: of each 16 g and g + 8, of tokens 2 * t and 2 * t + 1.
  template <int kCount>
  __device__ void columns(float (&sum)[2][kCount][4], int scale, Part part, int from,
                          const Tokens& tokens) {
    const int slot = part - kK, g = lane / 4, t = lane % 4;
    filter(scale, part, slot, tokens, scale == 0 ? D + 4 : kPitch);
    if (scale == 0) {
#pragma unroll
      for (int eight = 0; eight < 2; ++eight) {
#pragma unroll
        for (int tile = 0; tile < kCount; ++tile) {
          const float* at = own_scratch() + (8 * eight + 2 * t) * (D + 4) + from + 16 * tile + g;
          sum[eight][tile][0] = at[0], sum[eight][tile][1] = at[D + 4];
          sum[eight][tile][2] = at[8], sum[eight][tile][3] = at[D + 12];
        }
      }
      return;
    }
#pragma unroll
    for (int tile = 0; tile < kCount; ++tile) {
      float offsets[2] = {};
      if (group_bias != nullptr) {
        const T* offset = group_bias + channel(scale, part) + from + 16 * tile + g;
        offsets[0] = to_float(offset[0]), offsets[1] = to_float(offset[8]);
      }
      for (int i = 0; i < 4; ++i) sum[0][tile][i] = sum[1][tile][i] = offsets[i / 2];
    }
    const float* of_tokens = own_scratch() + g * kPitch + 2 * t;
    const float* weights = groups + (slot * D + from + g) * kPitch + 2 * t;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const Pair first = pair(of_tokens + step * 8);
      const Pair second = pair(of_tokens + step * 8 + 8 * kPitch);
#pragma unroll
      for (int tile = 0; tile < kCount; ++tile) {
        const Pair upper = pair(weights + 16 * tile * kPitch + step * 8);
        const Pair lower = pair(weights + (16 * tile + 8) * kPitch + step * 8);
        const uint32_t a[4] = {upper.bits[0], lower.bits[0], upper.bits[1], lower.bits[1]};
        multiply_rounded(sum[0][tile], a, first.bits);
        multiply_rounded(sum[1][tile], a, second.bits);
      }
    }
    if (part == kV) {
#pragma unroll
      for (int tile = 0; tile < kCount; ++tile) {
        for (int i = 0; i < 8; ++i) {
          float& value = sum[i / 4][tile][i % 4];
          value = rounded(value);
        }
      }
    }
  }

  // An operand of a product, rounded once where it is made: then products take it as it is.
  static __device__ float rounded(float value) {
    return float32 == Float32::tf32 ? __uint_as_float(round_to_tf32(value)) : value;
  }
  // The same, of what is exact in 16 bits.
  static __device__ float4 rounded_if_float(float4 value) {
    if constexpr (sizeof(T) == 2) return value;
    return {rounded(value.x), rounded(value.y), rounded(value.z), rounded(value.w)};
  }

  static __device__ void multiply_rounded(float (&sum)[4], const uint32_t (&a)[4],
                                          const uint32_t (&b)[2]) {
    if constexpr (float32 == Float32::tf32) {
      multiply_tf32(sum, a, b);
    } else {
      multiply<float, float32>(sum, a, b);
    }
  }

  struct Pair {
    uint32_t bits[2];
  };
  __device__ static Pair pair(const float* from) {
    const float2 value = *reinterpret_cast<const float2*>(from);
    return {{__float_as_uint(value.x), __float_as_uint(value.y)}};
  }

  // sum[16 x 8] += a[16 x D] b^T, with b's 8 rows of D in shared memory.
  __device__ void product(float (&sum)[4], const float (&a)[kSteps][4], const float* b) {
    const float* of_b = b + lane / 4 * kPitch + 2 * (lane % 4);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint32_t a_bits[4] = {__float_as_uint(a[step][0]), __float_as_uint(a[step][2]),
                                  __float_as_uint(a[step][1]), __float_as_uint(a[step][3])};
      multiply_rounded(sum, a_bits, pair(of_b + step * 8).bits);
    }
  }

  // states[scale] += sum over the tile's tokens of (v, 1) relu(k)^T.
  __device__ void sum_state(int scale) {
#pragma unroll 1
    for (int from = 0; from < D; from += kAtOnce) {
      if (from > 0) __syncthreads();  // The scratch is free.
      sum_state(scale, from);
    }
  }

  // The rows from `from` on.
  __device__ void sum_state(int scale, int from) {
    constexpr int kOwnSteps = kAtOnce / 8;
    const int g = lane / 4, t = lane % 4;
    float state[kTiles][kOwnSteps][4] = {};  // rows are channels of k, columns of v
    float ones[kTiles][2] = {};              // of k's channels g and g + 8
    for_each([&](const Tokens& tokens) {
      float k[2][kTiles][4], v[2][kAtOnce / 16][4];
      columns(k, scale, kK, 0, tokens);
#pragma unroll
      for (int eight = 0; eight < 2; ++eight) {
        bool there[2];
        for (int i = 0; i < 2; ++i) there[i] = is_there(tokens, 8 * eight + 2 * t + i);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          for (int i = 0; i < 4; ++i) {
            float& key = k[eight][tile][i];
            key = there[i % 2] ? relu(key) : 0.0f;
            ones[tile][i / 2] += key;
            if (scale > 0) key = rounded(key);
          }
        }
      }
      columns(v, scale, kV, from, tokens);
#pragma unroll
      for (int eight = 0; eight < 2; ++eight) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const float(&key)[4] = k[eight][tile];
          const uint32_t a[4] = {__float_as_uint(key[0]), __float_as_uint(key[2]),
                                 __float_as_uint(key[1]), __float_as_uint(key[3])};
#pragma unroll
          for (int step = 0; step < kOwnSteps; ++step) {
            const float* value = v[eight][step / 2] + step % 2 * 2;
            const uint32_t b[2] = {__float_as_uint(value[0]), __float_as_uint(value[1])};
            multiply_rounded(state[tile][step], a, b);
          }
        }
      }
    });
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      for (int i = 0; i < 2; ++i) {
        for (int apart = 1; apart < 4; apart *= 2) {
          ones[tile][i] += __shfl_xor_sync(~0u, ones[tile][i], apart);
        }
      }
    }
    // The second half of the warps add theirs to those of the first, and all threads add these up.
    __syncthreads();
    constexpr int kSlots = kWarps / 2;
    float* const slot = scratch + warp % kSlots * kOwnState;
    for (int half = 0; half < 2; ++half) {
      if (warp / kSlots == half) {
        const auto put = [&](int row, int column, float value) {
          float& to = slot[row * kOwnPitch + column];
          to = half == 0 ? value : to + value;
        };
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
          for (int step = 0; step < kOwnSteps; ++step) {
            for (int i = 0; i < 4; ++i) {
              put(8 * step + 2 * t + i % 2, 16 * tile + 8 * (i / 2) + g, state[tile][step][i]);
            }
          }
          for (int i = 0; i < 2; ++i) {
            if (t == 0) put(kAtOnce, 16 * tile + 8 * i + g, ones[tile][i]);
          }
        }
      }
      __syncthreads();
    }
    const int rows = kAtOnce + (from == 0);  // Ones are the same for all of v.
    for (int i = 32 * warp + lane; i < rows * D; i += kThreads) {
      const int row = i / D, column = i % D;
      float sum = 0;
#pragma unroll
      for (int n = 0; n < kSlots; ++n) sum += scratch[n * kOwnState + row * kOwnPitch + column];
      states[scale * kStateSize + (row < kAtOnce ? from + row : D) * kPitch + column] += sum;
    }
  }

  // Writes a scale's output of all tokens of the tile, multiplied by `factor`.
  __device__ void attend(int scale, float factor, float eps) {
    const float* state = states + scale * kStateSize;
    const int g = lane / 4, t = lane % 4;
    for_each([&](const Tokens& tokens) {
      float q[kSteps][4];
      queries(q, scale, tokens);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        for (int i = 0; i < 4; ++i) {
          q[step][i] = relu(q[step][i]);
          if (scale > 0) q[step][i] = rounded(q[step][i]);
        }
      }
      float denominator[4] = {};
      product(denominator, q, state + D * kPitch);
      float lift[2], by[2];
      for (int lower = 0; lower < 2; ++lower) {
        const float sum = __shfl_sync(~0u, denominator[2 * lower], lane & ~3) + eps;
        // Its reciprocal may be beyond the largest number where quotients are not.
        lift[lower] = sum < 1e-30f ? 0x1p64f : 1.0f;
        by[lower] = factor / (sum * lift[lower]);
      }
      __syncwarp();
      float* const own = own_scratch() + g * kPitch + 2 * t;
#pragma unroll
      for (int column = 0; column < kSteps; ++column) {
        float result[4] = {};
        product(result, q, state + column * 8 * kPitch);
        for (int lower = 0; lower < 2; ++lower) {
          *reinterpret_cast<float2*>(own + column * 8 + 8 * lower * kPitch) = {
              result[2 * lower] * lift[lower] * by[lower],
              result[2 * lower + 1] * lift[lower] * by[lower]};
        }
      }
      __syncwarp();
      for (int i = lane; i < 16 * kQuads; i += 32) {
        const int token = i / kQuads;
        if (!is_there(tokens, token)) continue;
        const int64_t line = int64_t(image) * height + top + tokens.y_of(token);
        const int64_t pixel = line * width + left + tokens.x_of(token);
        const float* from = own_scratch() + token * kPitch + i % kQuads * 4;
        store4(out + ((pixel * (1 + scales) + scale) * heads + head) * D + i % kQuads * 4,
               *reinterpret_cast<const float4*>(from));
      }
    });
  }

  // States of no tokens; rows below their last pad them to a fragment.
  __device__ void clear_states() {
    for (int i = 32 * warp + lane; i < (1 + scales) * kStateSize; i += kThreads) states[i] = 0;
  }

  // The states as operands.
  __device__ void round_states() {
    __syncthreads();
    for (int i = 32 * warp + lane; i < (1 + scales) * kStateSize; i += kThreads) {
      if (i % kPitch < D) states[i] = rounded(states[i]);
    }
  }

  // This tile's states, [image, head, tile, 1 + scales, D + 1, D] in global memory.
  __device__ void leave_states(float* parts) {
    __syncthreads();
    const int size = (1 + scales) * (D + 1) * D;
    const int64_t block = (int64_t(blockIdx.z) * heads + head) * gridDim.x + blockIdx.x;
    for (int i = 32 * warp + lane; i < size; i += kThreads) {
      const int row = i / D % (D + 1), scale = i / (D * (D + 1));
      parts[block * size + i] = states[scale * kStateSize + row * kPitch + i % D];
    }
  }

  // The sum of all tiles' states, in order, so that it is the same every time and in every block.
  __device__ void add_states(const float* parts) {
    const int size = (1 + scales) * (D + 1) * D;
    const float* from = parts + (int64_t(blockIdx.z) * heads + head) * gridDim.x * size;
    for (int i = 32 * warp + lane; i < (1 + scales) * (D + 8) * D; i += kThreads) {
      const int row = i / D % (D + 8), scale = i / (D * (D + 8));
      float sum = 0;
      for (int tile = 0; row <= D && tile < gridDim.x; ++tile) {
        sum += from[int64_t(tile) * size + (scale * (D + 1) + row) * D + i % D];
      }
      states[scale * kStateSize + row * kPitch + i % D] = sum;
    }
  }

  // Scale 0 needs no weights and comes last: those of the first come while the map does.
  __device__ void run(int phases, float* parts, float factor, float eps) {
    if (phases & kState) {
      clear_states();
      to_first_tile();
      for (int turn = 0; turn < turns; ++turn, to_next_tile()) {
        copy(kK, 0);
        copy(kV, 1);
        commit_copies();
        int scale = scales;
        do {
          identify();
          if (scale > 0) {
            load_weights(scale, kK, 0);
            load_weights(scale, kV, 1);
          }
          wait_for_copies<0>();
          __syncthreads();
          sum_state(scale);
        } while (scale-- > 0);
      }
    } else {
      add_states(parts);
    }
    if (!(phases & kOutput)) {
      leave_states(parts);
      return;
    }
    round_states();
    to_first_tile();
    for (int turn = 0; turn < turns; ++turn, to_next_tile()) {
      copy(kQ, 0);
      commit_copies();
      int scale = scales;
      do {
        if (scale > 0) load_weights(scale, kQ, 0);
        wait_for_copies<0>();
        __syncthreads();
        identify();
        attend(scale, factor, eps);
        __syncthreads();
      } while (scale-- > 0);
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
      int tile_height, int tile_width, int turns, int first_image, int phases, float eps) {        \
    extern __shared__ __align__(16) unsigned char shared[];                                        \
    Attention<T, D, float32> attention{qkv, depth_weight, depth_bias, group_weight, group_bias,    \
                                       out, height, width, heads, scales, kernel, tile_height,     \
                                       tile_width, turns, first_image,                             \
                                       1.0f / power_below(qkv_largest)};                           \
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
