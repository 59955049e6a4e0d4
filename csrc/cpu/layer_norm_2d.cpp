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

#include "parallel.h"
#include "scratch.h"
#include "storage.h"

namespace evsam::EVSAM_ISA {
namespace {

constexpr std::int64_t tile_rows = 4;

inline float square_root(float value) { return __builtin_sqrtf(value); }
inline double square_root(double value) { return __builtin_sqrt(value); }

// The mean of term(c) for c in [0, count), summed in lanes enough to hide how long an addition takes.
template <class T, class Term>
T mean_of(std::int64_t count, const Term& term) {
  constexpr std::int64_t lane_count = 128 / sizeof(T);
  T lanes[lane_count] = {};
  std::int64_t c = 0;
  for (; c + lane_count <= count; c += lane_count) {
#pragma omp simd
    for (std::int64_t lane = 0; lane < lane_count; ++lane) lanes[lane] += term(c + lane);
  }
  for (std::int64_t lane = 0; c < count; ++c, ++lane) lanes[lane] += term(c);
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t lane = 0; lane < lane_count; ++lane) sum += lanes[lane];
  return sum / static_cast<T>(count);
}

template <class T>
struct Row {
  const T* elements;
  // Far from zero the mean is rounded by more than small differences from it: what rounding left of
  // it is kept as well (Chan, Golub and LeVeque 1983, section 1).
  T mean, rest_of_mean;
  T scale;

  T centred(std::int64_t c) const { return elements[c] - mean - rest_of_mean; }
};

template <class T>
const T* filled(T* vector, std::int64_t length, T value) {
  for (std::int64_t i = 0; i < length; ++i) vector[i] = value;
  return vector;
}

template <class Storage>
void run(const LayerNorm2dArgs& args) {
  using T = Compute<Storage>;
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
  char* memory = scratch(shared_counted.bytes() + args.num_threads * counted.bytes());
  Pieces shared(memory);
  T *const ones = shared.take<T>(channels), *const zeros = shared.take<T>(channels);
  if (weight == nullptr) weight = filled<T>(ones, channels, 1);
  if (bias == nullptr) bias = filled<T>(zeros, channels, 0);

  const auto normalise = [&](const Room& room, std::int64_t first, std::int64_t rows) {
    Row<T> tile[tile_rows];
    for (std::int64_t r = 0; r < rows; ++r)
      tile[r].elements = load(x + (first + r) * channels, room.wide[r], channels);
    for (std::int64_t r = 0; r < rows; ++r) {
      const T* v = tile[r].elements;
      tile[r].mean = mean_of<T>(channels, [=](std::int64_t c) { return v[c]; });
    }
    for (std::int64_t r = 0; r < rows; ++r) {
      const T *v = tile[r].elements, mean = tile[r].mean;
      tile[r].rest_of_mean = mean_of<T>(channels, [=](std::int64_t c) { return v[c] - mean; });
    }
    for (std::int64_t r = 0; r < rows; ++r) {
      const Row<T> row = tile[r];
      const T variance = mean_of<T>(channels, [=](std::int64_t c) {
        return row.centred(c) * row.centred(c);
      });
      tile[r].scale = 1 / square_root(variance + eps);
    }
    for (std::int64_t r = 0; r < rows; ++r) {
      const Row<T> row = tile[r];
      Storage* out = y + (first + r) * channels;
      T* results = stage(out, room.wide[r]);
#pragma omp simd
      for (std::int64_t c = 0; c < channels; ++c)
        results[c] = row.centred(c) * row.scale * weight[c] + bias[c];
      store(results, out, channels);
    }
  };
  constexpr std::int64_t rows_at_once = 16 * tile_rows;
  const std::int64_t tasks = (args.rows + rows_at_once - 1) / rows_at_once;
  parallel(args.num_threads, args.rows * channels, [&](int member) {
    Pieces pieces(memory + shared_counted.bytes() + member * counted.bytes());
    const Room room(pieces, channels);
    for_each(tasks, [&](std::int64_t task) {
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
