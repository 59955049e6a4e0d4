// First half of MBConv: a 1x1 convolution, and a depthwise one of its result, which stays in shared
// memory. The 1x1 convolution after them is a product as any other.
//
// A block computes a tile of output pixels for kBlockChannels hidden channels. The input pixels
// under the tile, with the stencil's border as far as it lies in the map, are the rows of a product
// with the channels' weights; its result, activated, goes to shared memory with zeros around the
// map, where warps slide the stencil along it, two channels to a lane.

#include <type_traits>

#include "activation.cuh"
#include "primitives.cuh"

namespace evsam {
namespace {

constexpr int kBlockChannels = 64;
constexpr int kStages = 3;
// Chunks of a row of a stage: two steps of the product.
constexpr int kStageChunks = 4;

// What the compiler knows of a stencil; 0 where the launch says.
struct Stencil {
  int kernel;
  int stride;
  // Output rows and columns that a warp computes at once.
  int rows;
  int columns;
};

struct Arguments {
  const void* x;              // [B, H, W, C]
  const void* expand_weight;  // [F, C]
  const void* expand_bias;    // [F], or null
  const void* depth_weight;   // [F, kernel, kernel]
  const void* depth_bias;     // [F], or null
  void* y;                    // [B, OH, OW, F]
  // Bounds of all values after either convolution, where float16 may not hold them; or null.
  const float* expanded_largest;
  const float* filtered_largest;
  int height, width, channels, mid_channels, out_height, out_width;
  int tile_height, tile_width;  // multiples of the stencil's rows and columns
  int kernel, stride, activation;
};

// Two neighbouring channels.
template <typename T>
struct Pair;
template <>
struct Pair<float> {
  using Storage = float2;
  static __device__ float2 load(float2 value) { return value; }
  static __device__ float2 store(float a, float b) { return {a, b}; }
};
template <>
struct Pair<half> {
  using Storage = half2;
  static __device__ float2 load(half2 value) { return __half22float2(value); }
  static __device__ half2 store(float a, float b) { return __floats2half2_rn(a, b); }
};
template <>
struct Pair<bfloat16> {
  using Storage = __nv_bfloat162;
  static __device__ float2 load(__nv_bfloat162 value) { return __bfloat1622float2(value); }
  static __device__ __nv_bfloat162 store(float a, float b) { return __floats2bfloat162_rn(a, b); }
};

// Elements from one pixel of the expanded tile to the next: with eight to spare, the eight pixels
// that a fragment of a product has below each other are in different banks.
constexpr int kPixel = kBlockChannels + 8;

template <typename T, Float32 float32, int kWarps, int kTiles, Activation kActivation,
          Stencil kStencil>
__device__ __forceinline__ void expand_depthwise(const Arguments& given) {
  using Two = typename Pair<T>::Storage;
  constexpr int kThreads = 32 * kWarps;
  constexpr int kRows = 16 * kTiles * kWarps;  // of the product
  constexpr int kStageRows = kRows + kBlockChannels;
  constexpr int kStageBytes = 16 * kStageChunks * kStageRows;
  constexpr int kStageTerms = kStageChunks * kChunk<T>;
  const int kernel = kStencil.kernel ? kStencil.kernel : given.kernel;
  const int stride = kStencil.stride ? kStencil.stride : given.stride;
  const int channels = given.channels, mid_channels = given.mid_channels;
  const int height = given.height, width = given.width;

  // The block's tile: channels fastest, as they share the input.
  const unsigned groups = (mid_channels + kBlockChannels - 1u) / kBlockChannels;
  const unsigned across = (given.out_width + given.tile_width - 1u) / given.tile_width;
  const unsigned down = (given.out_height + given.tile_height - 1u) / given.tile_height;
  const unsigned tile = blockIdx.x / groups, tile_line = tile / across;
  const int first_channel = (blockIdx.x - tile * groups) * kBlockChannels;
  const int out_left = (tile - tile_line * across) * given.tile_width;
  const long long image = tile_line / down;
  const int out_top = (tile_line - tile_line / down * down) * given.tile_height;

  // The input under it, and the part of that in the map.
  const int under_width = (given.tile_width - 1) * stride + kernel;
  const int under_height = (given.tile_height - 1) * stride + kernel;
  const int left = out_left * stride - kernel / 2, top = out_top * stride - kernel / 2;
  const int map_left = max(left, 0), map_top = max(top, 0);
  const int map_width = min(left + under_width, width) - map_left;
  const int map_height = min(top + under_height, height) - map_top;

  extern __shared__ __align__(128) unsigned char memory[];
  // The expanded tile takes the stages' place when the product is done.
  Two* const expanded = reinterpret_cast<Two*>(memory);
  const int expanded_bytes = under_width * under_height * kPixel * static_cast<int>(sizeof(T));
  // Where the pixel of each row of the product lies in the expanded tile, in pairs; -1 for none.
  int* const expanded_places =
      reinterpret_cast<int*>(memory + max(expanded_bytes, kStages * kStageBytes));
  // What the block needs of the biases and of the depthwise weights, as they lie in memory.
  T* const expand_bias = reinterpret_cast<T*>(expanded_places + kRows);
  T* const depth_bias = expand_bias + kBlockChannels;
  T* const taps = depth_bias + kBlockChannels;

  const auto load_vector = [&](T* to, const void* from, int per_channel) {
    const T* const at = static_cast<const T*>(from) + first_channel * per_channel;
    const int count = (mid_channels - first_channel) * per_channel;
    for (int i = threadIdx.x * kChunk<T>; i < kBlockChannels * per_channel;
         i += kThreads * kChunk<T>) {
      const bool there = from != nullptr && i < count;
      copy_async(to + i, there ? at + i : given.x, there);
    }
  };
  load_vector(expand_bias, given.expand_bias, 1);
  load_vector(depth_bias, given.depth_bias, 1);
  load_vector(taps, given.depth_weight, kernel * kernel);

  const T* const x = static_cast<const T*>(given.x) + image * height * width * channels;
  const T* const weight = static_cast<const T*>(given.expand_weight) +
                          static_cast<long long>(first_channel) * channels;
  // Rows that a thread copies are so far apart that their chunks are swizzled alike.
  constexpr int kApart = kThreads / kStageChunks;
  static_assert(kApart % 16 == 0 && kRows % kApart == 0 && kBlockChannels % kApart == 0);
  constexpr int kCopies = kRows / kApart;
  const int own_row = threadIdx.x / kStageChunks, own_chunk = threadIdx.x % kStageChunks;
  // Line and column of a row: a product with 20 bits of the width's reciprocal is exact for less
  // than 1024 rows. Rows that are none copy the last one's pixel.
  const int last_row = map_width * map_height - 1;
  const int reciprocal = ((1u << 20) + map_width - 1) / static_cast<unsigned>(map_width);
  int places[kCopies];  // in the map, in elements
#pragma unroll
  for (int i = 0; i < kCopies; ++i) {
    const int row = i * kApart + own_row, pixel = min(row, last_row);
    const int line = pixel * reciprocal >> 20, column = pixel - line * map_width;
    places[i] = ((map_top + line) * width + map_left + column) * channels;
    const int place = (map_top - top + line) * under_width + map_left - left + column;
    if (own_chunk == 0) expanded_places[row] = row == pixel ? place * (kPixel / 2) : -1;
  }
  unsigned char* const own_place = memory + 16 * swizzled<kStageChunks>(own_row, own_chunk);
  // Of the stage that is loaded next: one addition from here is cheaper than an index's two.
  int term = own_chunk * kChunk<T>;
  const T* x_at = x + term;
  const T* weight_at = weight + term + own_row * channels;
  // A thread's copies of a stage, each by itself.
  constexpr int kPieces = kCopies + kBlockChannels / kApart;
  const auto load = [&](int step, int piece) {
    unsigned char* const to =
        own_place + step % kStages * kStageBytes + 16 * kStageChunks * kApart * piece;
    const bool inside = term < channels;
    if (piece < kCopies) {
      copy_async(to, x_at + places[piece], inside);
    } else {
      const int first = (piece - kCopies) * kApart;
      const bool there = inside && first + own_row < mid_channels - first_channel;
      copy_async(to, weight_at + first * channels, there);
    }
  };
  const auto commit_stage = [&] {
    commit_copies();
    term += kStageTerms, x_at += kStageTerms, weight_at += kStageTerms;
  };

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float sums[kTiles][kBlockChannels / 8][4] = {};
  // Loaded long before they are needed.
  const float expanded_largest = given.expanded_largest ? *given.expanded_largest : 0.0f;
  const float filtered_largest = given.filtered_largest ? *given.filtered_largest : 0.0f;
  const int steps = (channels + kStageTerms - 1) / kStageTerms;
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      if (step < steps) load(step, piece);
    }
    commit_stage();
  }
  // With `more`, copies go into the stage that all have left behind: between products, as these
  // leave time to issue them.
  const auto add_products = [&](int step, auto more) {
    const int next = step + kStages - 1;
    wait_for_copies<kStages - 2>();
    __syncthreads();
    const unsigned char* const stage = memory + step % kStages * kStageBytes;
    const unsigned char* const a_rows = stage + 16 * kStageChunks * 16 * kTiles * warp;
    const unsigned char* const b_rows = stage + 16 * kStageChunks * kRows;
    if constexpr (float32 == Float32::exact) {
      // TF32 would lose what is near the smallest numbers, even as sums of several.
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        if constexpr (decltype(more)::value) load(next, piece);
      }
#pragma unroll 1
      for (int chunk = 0; chunk < kStageChunks; ++chunk) {
        const auto chunk_of = [&](const unsigned char* rows, int row) {
          return *reinterpret_cast<const float4*>(rows + 16 * swizzled<kStageChunks>(row, chunk));
        };
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          const float4 a[2] = {chunk_of(a_rows, 16 * i + lane / 4),
                               chunk_of(a_rows, 16 * i + lane / 4 + 8)};
#pragma unroll
          for (int j = 0; j < kBlockChannels / 4; ++j) {
            const float4 b = chunk_of(b_rows, j / 2 * 8 + lane % 4 * 2 + j % 2);
#pragma unroll
            for (int lower = 0; lower < 2; ++lower) {
              float& sum = sums[i][j / 2][2 * lower + j % 2];
              sum = fmaf(a[lower].x, b.x, sum);
              sum = fmaf(a[lower].y, b.y, sum);
              sum = fmaf(a[lower].z, b.z, sum);
              sum = fmaf(a[lower].w, b.w, sum);
            }
          }
        }
      }
    } else {
#pragma unroll
      for (int part = 0; part < kStageChunks / 2; ++part) {
        const int a_at = 16 * swizzled<kStageChunks>(lane % 16, 2 * part + lane / 16);
        const int b_at =
            16 * swizzled<kStageChunks>(lane % 8 + lane / 16 * 8, 2 * part + lane / 8 % 2);
        uint32_t b[kBlockChannels / 8][2];
#pragma unroll
        for (int j = 0; j < kBlockChannels / 8; j += 2) {
          uint32_t both[4];
          load_matrices(both, b_rows + b_at + 16 * kStageChunks * 8 * j);
          b[j][0] = both[0], b[j][1] = both[1], b[j + 1][0] = both[2], b[j + 1][1] = both[3];
        }
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          if constexpr (decltype(more)::value) {
            constexpr int kTurns = kStageChunks / 2 * kTiles, kAtOnce = (kPieces - 1) / kTurns + 1;
            const int first = (part * kTiles + i) * kAtOnce;
#pragma unroll
            for (int piece = first; piece < min(first + kAtOnce, kPieces); ++piece) {
              load(next, piece);
            }
          }
          uint32_t a[4];
          load_matrices(a, a_rows + a_at + 16 * kStageChunks * 16 * i);
#pragma unroll
          for (int j = 0; j < kBlockChannels / 8; ++j) multiply<T>(sums[i][j], a, b[j]);
        }
      }
    }
    commit_stage();
  };
  const int before_last = max(steps - (kStages - 1), 0);
  for (int step = 0; step < before_last; ++step) add_products(step, std::true_type());
  for (int step = before_last; step < steps; ++step) add_products(step, std::false_type());
  wait_for_copies<0>();
  __syncthreads();

  // Zeros around the map.
  for (int pixel = threadIdx.x; pixel < under_width * under_height; pixel += kThreads) {
    const int y = top + pixel / under_width, column = left + pixel % under_width;
    if (y < 0 || y >= height || column < 0 || column >= width) {
      float4* const line = reinterpret_cast<float4*>(expanded + pixel * (kPixel / 2));
      for (int i = 0; i < kBlockChannels / kChunk<T>; ++i) line[i] = {};
    }
  }
  const float shrink = power_below(expanded_largest);
  const Activate<T, kActivation> expand(given.activation, shrink, 1.0f);
  float2 bias[kBlockChannels / 8];
#pragma unroll
  for (int j = 0; j < kBlockChannels / 8; ++j) {
    const float2 value =
        Pair<T>::load(reinterpret_cast<const Two*>(expand_bias)[4 * j + lane % 4]);
    bias[j] = {expand.prepared(value.x), expand.prepared(value.y)};
  }
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      const int place = expanded_places[16 * (warp * kTiles + i) + lane / 4 + 8 * lower];
      Two* const to = expanded + place + lane % 4;
#pragma unroll
      for (int j = 0; j < kBlockChannels / 8; ++j) {
        const float* const sum = sums[i][j] + 2 * lower;
        const Two pair = Pair<T>::store(expand(sum[0], bias[j].x), expand(sum[1], bias[j].y));
        if (place >= 0) to[4 * j] = pair;
      }
    }
  }
  __syncthreads();

  const int channel = first_channel + 2 * lane;
  if (channel >= mid_channels) return;
  const Activate<T, kActivation> filter(given.activation, power_below(filtered_largest),
                                        reciprocal_of_power(shrink));
  const float2 offset = Pair<T>::load(reinterpret_cast<const Two*>(depth_bias)[lane]);
  const float first_offset = filter.prepared(offset.x), second_offset = filter.prepared(offset.y);
  const auto result = [&](float2 sum) {
    return Pair<T>::store(filter(sum.x, first_offset), filter(sum.y, second_offset));
  };
  const T* const first_taps = taps + 2 * lane * kernel * kernel;
  const T* const second_taps = first_taps + kernel * kernel;
  Two* const y = static_cast<Two*>(given.y) + channel / 2;
  const int y_step = mid_channels / 2;  // from pixel to pixel
  const int parts_across = given.tile_width / kStencil.columns;
  const int parts = given.tile_height / kStencil.rows * parts_across;
  for (int part = warp; part < parts; part += kWarps) {
    const int tile_y = part / parts_across * kStencil.rows;
    const int tile_x = part % parts_across * kStencil.columns;
    const int out_y = out_top + tile_y, out_x = out_left + tile_x;
    Two* const to =
        y + ((image * given.out_height + out_y) * given.out_width + out_x) * y_step;
    const Two* const corner =
        expanded + (tile_y * under_width + tile_x) * stride * (kPixel / 2) + lane;
    if constexpr (kStencil.kernel != 0) {
      constexpr int kKernel = kStencil.kernel, kStride = kStencil.stride;
      constexpr int kLines = (kStencil.rows - 1) * kStride + kKernel;
      float2 factors[kKernel * kKernel];
#pragma unroll
      for (int tap = 0; tap < kKernel * kKernel; ++tap) {
        factors[tap] = {to_float(first_taps[tap]), to_float(second_taps[tap])};
      }
      // Columns of the tile that lie under the stencil, column x at x % kKernel.
      float2 window[kLines][kKernel];
      const auto load_column = [&](int column) {
#pragma unroll
        for (int line = 0; line < kLines; ++line) {
          window[line][column % kKernel] =
              Pair<T>::load(corner[(line * under_width + column) * (kPixel / 2)]);
        }
      };
#pragma unroll
      for (int column = 0; column < kKernel - kStride; ++column) load_column(column);
#pragma unroll
      for (int i = 0; i < kStencil.columns; ++i) {
#pragma unroll
        for (int j = 0; j < kStride; ++j) load_column(i * kStride + kKernel - kStride + j);
#pragma unroll
        for (int line = 0; line < kStencil.rows; ++line) {
          float2 sum = {};
#pragma unroll
          for (int tap = 0; tap < kKernel * kKernel; ++tap) {
            const float2 value =
                window[line * kStride + tap / kKernel][(i * kStride + tap % kKernel) % kKernel];
            sum.x = fmaf(value.x, factors[tap].x, sum.x);
            sum.y = fmaf(value.y, factors[tap].y, sum.y);
          }
          const Two pair = result(sum);
          if (out_y + line < given.out_height && out_x + i < given.out_width) {
            to[(line * given.out_width + i) * y_step] = pair;
          }
        }
      }
    } else {
      float2 sum = {};
      for (int tap = 0; tap < kernel * kernel; ++tap) {
        const float2 value =
            Pair<T>::load(corner[(tap / kernel * under_width + tap % kernel) * (kPixel / 2)]);
        sum.x = fmaf(value.x, to_float(first_taps[tap]), sum.x);
        sum.y = fmaf(value.y, to_float(second_taps[tap]), sum.y);
      }
      const Two pair = result(sum);
      if (out_y < given.out_height && out_x < given.out_width) *to = pair;
    }
  }
}

constexpr Stencil kAny = {0, 0, 1, 1};
constexpr Stencil kStride1 = {3, 1, 4, 8};
constexpr Stencil kStride2 = {3, 2, 4, 4};

}  // namespace
}  // namespace evsam

// `blocks` are to be at once on a multiprocessor.
#define EVSAM_KERNEL(name, blocks, warps, ...)                                                    \
  extern "C" __global__ void __launch_bounds__(32 * (warps), blocks) expand_depthwise_##name(     \
      const void* x, const void* expand_weight, const void* expand_bias,                          \
      const void* depth_weight, const void* depth_bias, void* y, const float* expanded_largest,   \
      const float* filtered_largest, int height, int width, int channels, int mid_channels,       \
      int out_height, int out_width, int tile_height, int tile_width, int kernel, int stride,     \
      int activation) {                                                                           \
    evsam::expand_depthwise<__VA_ARGS__>(                                                         \
        {x, expand_weight, expand_bias, depth_weight, depth_bias, y, expanded_largest,            \
         filtered_largest, height, width, channels, mid_channels, out_height, out_width,          \
         tile_height, tile_width, kernel, stride, activation});                                   \
  }

#define EVSAM_ANY(name, T, float32)                                                               \
  EVSAM_KERNEL(name##_any_256, 1, 4, T, float32, 4, 4, evsam::Activation::any, evsam::kAny)

// Kernels are named after what is stored, the stencil, and the most input pixels of a tile.
#define EVSAM_GELU(name, T, stencil)                                                              \
  EVSAM_KERNEL(name##_256, 2, 4, T, evsam::Float32::tf32, 4, 4, evsam::Activation::gelu, stencil) \
  EVSAM_KERNEL(name##_320, 2, 4, T, evsam::Float32::tf32, 4, 5, evsam::Activation::gelu, stencil)

EVSAM_GELU(float16_stride1, evsam::half, evsam::kStride1)
EVSAM_GELU(float16_stride2, evsam::half, evsam::kStride2)
EVSAM_GELU(bfloat16_stride1, evsam::bfloat16, evsam::kStride1)
EVSAM_GELU(bfloat16_stride2, evsam::bfloat16, evsam::kStride2)
EVSAM_ANY(float16, evsam::half, evsam::Float32::tf32)
EVSAM_ANY(bfloat16, evsam::bfloat16, evsam::Float32::tf32)
EVSAM_ANY(tf32, float, evsam::Float32::tf32)
EVSAM_ANY(float32, float, evsam::Float32::exact)
