// LayerNorm over the channels of every pixel (Ba, Kiros and Hinton, arXiv 1607.06450, equation 4).
//
// Layout: NHWC, so that a pixel's channels are one contiguous row; threads take ranges of rows.
// Tile: four rows. Each step of a row waits for the sum of the one before; meanwhile the same step of
// the other rows goes on.
// On chip: the rows of a tile, in the type of the statistics, stay in L1 over all steps, so that the
// mean is known before anything is squared (no cancellation) at the price of one read.
// Main memory: rows * channels elements read and as many written, and nothing else.
// Statistics: float32, or float64 for float64; a float16 row cannot overflow them.

#include "evsam/layer_norm_2d.h"

#include <cstdint>

#include "matrix.h"
#include "parallel.h"
#include "scratch.h"
#include "simd.h"
#include "storage.h"

namespace evsam::EVSAM_ISA {
namespace {

constexpr std::int64_t tile_rows = 4;

// What simd.h has for float, for double.
typedef double Doubles __attribute__((vector_size(sizeof(Vec))));
constexpr std::int64_t doubles = sizeof(Doubles) / sizeof(double);

inline Doubles load(const double* from, std::int64_t count = doubles) {
  Doubles v = {};
  __builtin_memcpy(&v, from, least(count, doubles) * sizeof(double));
  return v;
}

inline void store(double* to, Doubles v, std::int64_t count) {
  __builtin_memcpy(to, &v, least(count, doubles) * sizeof(double));
}

inline double sum(Doubles v) {
  double total = 0;
  for (std::int64_t lane = 0; lane < doubles; ++lane) total += v[lane];
  return total;
}

inline float square_root(float value) { return __builtin_sqrtf(value); }
inline double square_root(double value) { return __builtin_sqrt(value); }

// The means of terms(v), several values, for v in `count` elements, summed in lanes enough to hide how long
// an addition takes.
template <int size, class T, class Terms>
EVSAM_INLINE void means_of(const T* from, std::int64_t count, const Terms& terms, T (&means)[size]) {
  using V = decltype(load(from));
  constexpr std::int64_t width = sizeof(V) / sizeof(T), at_once = 128 / sizeof(V);
  V sums[at_once][size] = {};
  T rest[size] = {};
  const auto add = [&](auto v, auto& to) {
    decltype(v) values[size];
    terms(v, values);
#pragma GCC unroll 2
    for (int k = 0; k < size; ++k) to[k] += values[k];
  };
  std::int64_t c = 0;
  for (; c + at_once * width <= count; c += at_once * width)
#pragma GCC unroll 8
    for (std::int64_t i = 0; i < at_once; ++i) add(load(from + c + i * width), sums[i]);
  for (; c + width <= count; c += width) add(load(from + c), sums[0]);
  for (; c < count; ++c) add(from[c], rest);
#pragma GCC unroll 2
  for (int k = 0; k < size; ++k) {
#pragma GCC unroll 8
    for (std::int64_t i = 1; i < at_once; ++i) sums[0][k] += sums[i][k];
    means[k] = (sum(sums[0][k]) + rest[k]) / static_cast<T>(count);
  }
}

template <class T>
struct Row {
  const T* elements;
  // Far from zero the mean is rounded by more than small differences from it: what rounding left of
  // it is kept as well (Chan, Golub and LeVeque 1983, section 1).
  T mean, rest_of_mean;
  T scale;

  // What v, one of the elements or a vector of them, is above the mean.
  template <class V>
  EVSAM_INLINE V centred(V v) const {
    return v - mean - rest_of_mean;
  }
};

template <class T>
const T* filled(T* vector, std::int64_t length, T value) {
  for (std::int64_t i = 0; i < length; ++i) vector[i] = value;
  return vector;
}

// A row in the type of its statistics: in place, or in `room`.
inline const float* widened(const float* row, float*, std::int64_t) { return row; }
inline const double* widened(const double* row, double*, std::int64_t) { return row; }
template <class Half>
const float* widened(const Half* row, float* room, std::int64_t count) {
  for (std::int64_t c = 0; c < count; c += lanes) store(room + c, load(row + c, count - c), count - c);
  return room;
}

template <class Storage>
void run(const LayerNorm2dArgs& args) {
  using T = Choice<same<Storage, double>, double, float>;
  constexpr std::int64_t width = sizeof(Vec) / sizeof(T);
  const std::int64_t channels = args.channels;
  const auto* x = static_cast<const Storage*>(args.x);
  auto* y = static_cast<Storage*>(args.y);
  const auto* weight = static_cast<const T*>(args.weight);
  const auto* bias = static_cast<const T*>(args.bias);
  const T eps = static_cast<T>(args.eps);

  struct Room {
    T* wide[tile_rows];
    Room(Pieces& pieces, std::int64_t channels) {
      for (T*& row : wide) row = pieces.take<T>(channels);
    }
  };
  Pieces counted, shared_counted;
  const Room one(counted, channels);
  shared_counted.take<T>(channels);
  shared_counted.take<T>(channels);
  const Scratch memory = scratch(counted.bytes(), args.num_threads, shared_counted.bytes());
  Pieces shared(memory.shared);
  T *const ones = shared.take<T>(channels), *const zeros = shared.take<T>(channels);
  if (weight == nullptr) weight = filled<T>(ones, channels, 1);
  if (bias == nullptr) bias = filled<T>(zeros, channels, 0);

  const auto normalise = [&](const Room& room, std::int64_t first, std::int64_t rows) {
    Row<T> tile[tile_rows];
    for (std::int64_t r = 0; r < rows; ++r)
      tile[r].elements = widened(x + (first + r) * channels, room.wide[r], channels);
    for (std::int64_t r = 0; r < rows; ++r) {
      T mean[1];
      means_of(tile[r].elements, channels, [](auto v, auto& terms) { terms[0] = v; }, mean);
      tile[r].mean = mean[0];
    }
    for (std::int64_t r = 0; r < rows; ++r) {
      const T mean = tile[r].mean;
      T means[2];
      const auto terms_of = [=](auto v, auto& terms) {
        terms[0] = v - mean;
        terms[1] = terms[0] * terms[0];
      };
      means_of(tile[r].elements, channels, terms_of, means);
      // The mean of squares of what elements are above the mean with its rest; rounding may take it below
      // zero, and a NaN stays one.
      const T variance = means[1] - means[0] * means[0];
      tile[r].rest_of_mean = means[0];
      tile[r].scale = 1 / square_root((variance > 0 ? variance : 0 * variance) + eps);
    }
    // Copies: for all a compiler knows, what is written might change the originals.
    const T *const gain = weight, *const shift = bias;
    const std::int64_t count = channels;
    for (std::int64_t r = 0; r < rows; ++r) {
      const Row<T> row = tile[r];
      Storage* out = y + (first + r) * count;
      const auto finish = [=](std::int64_t c, std::int64_t rest) {
        const auto v = row.centred(load(row.elements + c, rest)) * row.scale;
        store(out + c, v * load(gain + c, rest) + load(shift + c, rest), rest);
      };
      std::int64_t c = 0;
      for (; c + width <= count; c += width) finish(c, width);
      if (c < count) finish(c, count - c);
    }
  };
  constexpr std::int64_t rows_at_once = 16 * tile_rows;
  const std::int64_t tasks = (args.rows + rows_at_once - 1) / rows_at_once;
  parallel(args.num_threads, args.rows * channels, [&](int member) {
    Pieces pieces(own_piece(memory, member));
    const Room room(pieces, channels);
    for_each_alike(tasks, [&](std::int64_t task) {
      const std::int64_t last = (task + 1) * rows_at_once;
      const std::int64_t end = last < args.rows ? last : args.rows;
      for (std::int64_t first = task * rows_at_once; first < end; first += tile_rows)
        normalise(room, first, end - first < tile_rows ? end - first : tile_rows);
    });
  });
}

}  // namespace

void layer_norm_2d(const LayerNorm2dArgs& args) {
  switch (args.dtype) {
    case DType::float16: return run<Float16>(args);
    case DType::bfloat16: return run<BFloat16>(args);
    case DType::float32: return run<float>(args);
    case DType::float64: return run<double>(args);
  }
}

}  // namespace evsam::EVSAM_ISA
