// Upscales mask logits and compares them with thresholds, a row at a time.
//
// Layout: one map after another. Tile: a mask for each thread, whose rows are computed from the top.
// On chip: the three input rows under an output row, stretched to its width, stay in L1; each is stretched
// once. Main memory: the logits once and, where asked for, the masks once. The upscaled logits, which are
// larger than everything else together, exist one value at a time.

#include "evsam/measure_masks.h"

#include "matrix.h"
#include "parallel.h"
#include "scratch.h"

namespace evsam::EVSAM_ISA {
namespace {

constexpr int taps = 3;

struct Room {
  float* stretched;       // [taps][columns], input row r in place r % taps
  std::uint8_t* in_mask;  // [columns], whether any row has the column in the mask

  Room(Pieces& pieces, std::int64_t columns)
      : stretched(pieces.take<float>(taps * columns)),
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

float largest_magnitude(const float* values, std::int64_t count) {
  float largest = 0;
#pragma omp simd reduction(max : largest)
  for (std::int64_t i = 0; i < count; ++i) {
    const float magnitude = __builtin_fabsf(values[i]);
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

// What a row holds.
struct Measured {
  std::int32_t inner = 0, outer = 0, in_mask = 0;
  std::int32_t close = 0;  // values within `near` of a threshold, or not comparable
};

// One row of the output: the sum of three stretched rows. `mask` may be null.
template <bool with_mask>
Measured measure_row(const MeasureMasksArgs& args, const float* const (&rows)[taps],
                     const float (&weights)[taps], float near, std::uint8_t* in_mask,
                     std::uint8_t* mask) {
  const float *a = rows[0], *b = rows[1], *c = rows[2];
  const float wa = weights[0], wb = weights[1], wc = weights[2];
  const float inner = args.inner, threshold = args.threshold, outer = args.outer;
  std::int32_t above_inner = 0, above_outer = 0, above = 0, apart = 0;
#pragma omp simd reduction(+ : above_inner, above_outer, above, apart)
  for (std::int64_t x = 0; x < args.columns.size; ++x) {
    const float value = a[x] * wa + b[x] * wb + c[x] * wc;
    above_inner += value > inner;
    above_outer += value > outer;
    const bool is_above = value > threshold;
    above += is_above;
    in_mask[x] |= is_above;
    if constexpr (with_mask) mask[x] = is_above;
    apart += (__builtin_fabsf(value - inner) > near) & (__builtin_fabsf(value - threshold) > near) &
             (__builtin_fabsf(value - outer) > near);
  }
  Measured found;
  found.inner = above_inner;
  found.outer = above_outer;
  found.in_mask = above;
  found.close = static_cast<std::int32_t>(args.columns.size) - apart;
  return found;
}

// Whether a value of the row may be on the other side of a threshold than rounding has put it. `logits`
// are those of the mask, from the first of the three rows on.
bool doubtful_row(const MeasureMasksArgs& args, const float* logits,
                  const float* const (&rows)[taps], const float (&weights)[taps]) {
  const float thresholds[] = {args.inner, args.threshold, args.outer};
  for (std::int64_t x = 0; x < args.columns.size; ++x) {
    const float value = rows[0][x] * weights[0] + rows[1][x] * weights[1] + rows[2][x] * weights[2];
    float around = 0;
    for (int row = 0; row < taps; ++row) {
      const float* from = logits + row * args.in_width + args.columns.first[x];
      const float here = largest_magnitude(from, taps);
      around = here > around ? here : around;
    }
    const float near = args.tolerance * around;
    for (float threshold : thresholds)
      if (!(__builtin_fabsf(value - threshold) > near)) return true;
  }
  return false;
}

void measure(const MeasureMasksArgs& args, std::int64_t index, const Room& room) {
  const std::int64_t width = args.columns.size, in_size = args.in_height * args.in_width;
  const float* logits = args.logits + index * in_size;
  std::uint8_t* mask = args.masks == nullptr ? nullptr : args.masks + index * args.rows.size * width;
  const float near = args.tolerance * largest_magnitude(logits, in_size);
  __builtin_memset(room.in_mask, 0, static_cast<std::size_t>(width));

  std::int64_t inner = 0, outer = 0, top = -1, bottom = -1, stretched = 0;
  bool doubtful = false;
  for (std::int64_t y = 0; y < args.rows.size; ++y) {
    const std::int64_t first = args.rows.first[y];
    stretched = most(stretched, first);
    for (; stretched < first + taps; ++stretched)
      stretch(logits + stretched * args.in_width, args.columns,
              room.stretched + stretched % taps * width);
    const float* rows[taps];
    float weights[taps];
    for (int tap = 0; tap < taps; ++tap) {
      rows[tap] = room.stretched + (first + tap) % taps * width;
      weights[tap] = args.rows.weights[tap * args.rows.size + y];
    }
    const Measured found =
        mask == nullptr
            ? measure_row<false>(args, rows, weights, near, room.in_mask, nullptr)
            : measure_row<true>(args, rows, weights, near, room.in_mask, mask + y * width);
    inner += found.inner;
    outer += found.outer;
    if (found.in_mask > 0) {
      bottom = y;
      if (top < 0) top = y;
    }
    if (found.close > 0 && !doubtful)
      doubtful = doubtful_row(args, logits + first * args.in_width, rows, weights);
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
  const Room one(counted, args.columns.size);
  char* memory = scratch(args.num_threads * counted.bytes());
  const std::int64_t operations = args.count * args.rows.size * args.columns.size * taps;
  parallel(args.num_threads, operations, [&](int member) {
    Pieces pieces(memory + member * counted.bytes());
    const Room room(pieces, args.columns.size);
    for_each(args.count, [&](std::int64_t index) { measure(args, index, room); });
  });
}

}  // namespace evsam::EVSAM_ISA
