// Upscales mask logits and compares them with thresholds, a row at a time.
//
// Layout: one map after another. Tile: a mask for each thread, whose rows are computed from the top.
// On chip: the three input rows under an output row, stretched to its width, stay in L1; each is stretched
// once. Main memory: the logits once and, where asked for, the masks once. The upscaled logits, which are
// larger than everything else together, exist one value at a time. The few that are so close to a threshold
// that rounding decides are computed again, with the roundings of the two resizings.

#include "evsam/measure_masks.h"

#include "matrix.h"
#include "parallel.h"
#include "resized.h"
#include "scratch.h"

namespace evsam::EVSAM_ISA {
namespace {

constexpr int taps = 3;

struct Room {
  float* stretched;       // [taps][columns], input row r in place r % taps
  std::uint8_t* row;      // [columns], one of the mask
  std::uint8_t* in_mask;  // [columns], whether any row has the column in the mask

  Room(Pieces& pieces, std::int64_t columns)
      : stretched(pieces.take<float>(taps * columns)),
        row(pieces.take<std::uint8_t>(columns)),
        in_mask(pieces.take<std::uint8_t>(columns)) {}
};

void stretch(const float* row, const ResizedAxis& columns, float* to) {
  const float *w0 = columns.weights, *w1 = w0 + columns.size, *w2 = w1 + columns.size;
#pragma omp simd
  for (std::int64_t x = 0; x < columns.size; ++x) {
    const float* from = row + columns.first[x];
    to[x] = from[0] * w0[x] + from[1] * w1[x] + from[2] * w2[x];
  }
}

// The largest magnitude, or infinity where a value is not finite.
float largest_magnitude(const float* values, std::int64_t count) {
  float largest = 0;
  std::int64_t finite = 0;
#pragma omp simd reduction(max : largest) reduction(+ : finite)
  for (std::int64_t i = 0; i < count; ++i) {
    const float magnitude = __builtin_fabsf(values[i]);
    largest = magnitude > largest ? magnitude : largest;
    finite += magnitude <= __FLT_MAX__;
  }
  return finite == count ? largest : __builtin_inff();
}

// What a row holds.
struct Measured {
  std::int32_t inner = 0, outer = 0, in_mask = 0;
  std::int32_t close = 0;  // values within `near` of a threshold
};

// One row of the output: the sum of three stretched rows.
struct Row {
  const float* stretched[taps];
  float weights[taps];

  EVSAM_INLINE float operator[](std::int64_t x) const {
    return stretched[0][x] * weights[0] + stretched[1][x] * weights[1] + stretched[2][x] * weights[2];
  }
};

EVSAM_INLINE bool is_apart(const MeasureMasksArgs& args, float value, float near) {
  return (__builtin_fabsf(value - args.inner) > near) &
         (__builtin_fabsf(value - args.threshold) > near) &
         (__builtin_fabsf(value - args.outer) > near);
}

Measured measure_row(const MeasureMasksArgs& args, const Row& values, float near,
                     std::uint8_t* mask) {
  const Row row = values;
  const std::int64_t width = args.maps.columns.size;
  const float inner = args.inner, threshold = args.threshold, outer = args.outer;
  std::int32_t above_inner = 0, above_outer = 0, above = 0, apart = 0;
#pragma omp simd reduction(+ : above_inner, above_outer, above, apart)
  for (std::int64_t x = 0; x < width; ++x) {
    const float value = row[x];
    above_inner += value > inner;
    above_outer += value > outer;
    const bool is_above = value > threshold;
    above += is_above;
    mask[x] = is_above;
    apart += is_apart(args, value, near);
  }
  return {above_inner, above_outer, above, static_cast<std::int32_t>(width) - apart};
}

// The same, with the roundings of the two resizings where they decide. Of row y of a map.
Measured resolve_row(const MeasureMasksArgs& args, const float* logits, std::int64_t y,
                     const Row& row, float near, std::uint8_t* mask) {
  Measured found;
  for (std::int64_t x = 0; x < args.maps.columns.size; ++x) {
    float value = row[x];
    if (!is_apart(args, value, near)) value = resized_twice(args.maps, logits, y, x);
    found.inner += value > args.inner;
    found.outer += value > args.outer;
    mask[x] = value > args.threshold;
    found.in_mask += mask[x];
  }
  return found;
}

void measure(const MeasureMasksArgs& args, std::int64_t index, const Room& room) {
  const ResizedMaps& maps = args.maps;
  const std::int64_t width = maps.columns.size, in_size = maps.in_height * maps.in_width;
  const float* logits = maps.logits + index * in_size;
  const float magnitude = largest_magnitude(logits, in_size), near = args.tolerance * magnitude;
  __builtin_memset(room.in_mask, 0, static_cast<std::size_t>(width));

  std::int64_t inner = 0, outer = 0, top = -1, bottom = -1, stretched = 0;
  bool doubtful = magnitude > __FLT_MAX__;
  for (std::int64_t y = 0; y < maps.rows.size && !doubtful; ++y) {
    const std::int64_t first = maps.rows.first[y];
    stretched = most(stretched, first);
    for (; stretched < first + taps; ++stretched)
      stretch(logits + stretched * maps.in_width, maps.columns,
              room.stretched + stretched % taps * width);
    Row row;
    for (int tap = 0; tap < taps; ++tap) {
      row.stretched[tap] = room.stretched + (first + tap) % taps * width;
      row.weights[tap] = maps.rows.weights[tap * maps.rows.size + y];
    }
    std::uint8_t* mask =
        args.masks == nullptr ? room.row : args.masks + (index * maps.rows.size + y) * width;
    Measured found = measure_row(args, row, near, mask);
    if (found.close > 0) {
      doubtful = !args.resolve;
      if (args.resolve) found = resolve_row(args, logits, y, row, near, mask);
    }
    inner += found.inner;
    outer += found.outer;
    if (found.in_mask > 0) {
      bottom = y;
      if (top < 0) top = y;
#pragma omp simd
      for (std::int64_t x = 0; x < width; ++x) room.in_mask[x] |= mask[x];
    }
  }

  std::int64_t* box = args.boxes + 4 * index;
  for (int side = 0; side < 4; ++side) box[side] = 0;
  if (top >= 0) {
    std::int64_t left = 0, right = width - 1;
    while (!room.in_mask[left]) ++left;
    while (!room.in_mask[right]) --right;
    box[0] = left, box[1] = top, box[2] = right, box[3] = bottom;
  }
  args.counts[2 * index] = inner;
  args.counts[2 * index + 1] = outer;
  args.doubtful[index] = doubtful;
}

}  // namespace

void measure_masks(const MeasureMasksArgs& args) {
  Pieces counted;
  const ResizedMaps& maps = args.maps;
  const Room one(counted, maps.columns.size);
  const Scratch memory = scratch(counted.bytes(), args.num_threads);
  const std::int64_t operations = maps.count * maps.rows.size * maps.columns.size * taps;
  parallel(args.num_threads, operations, [&](int member) {
    Pieces pieces(own_piece(memory, member));
    const Room room(pieces, maps.columns.size);
    for_each(maps.count, [&](std::int64_t index) { measure(args, index, room); });
  });
}

}  // namespace evsam::EVSAM_ISA
