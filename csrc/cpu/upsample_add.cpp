// Sum of maps after bicubic resizing (Keys 1981, a = -0.75), the way PyTorch and OpenCV place pixels.
//
// Layout: NHWC, so that every step is a sum of whole pixels. Tile: one row of the output for each thread:
// of each map four rows are combined into one, and of that four pixels into each of the output.
// On chip: the combined row and the row of sums, float32. Main memory: the maps once (rows are used again
// from L2), y once.

#include "evsam/upsample_add.h"

#include "map.h"
#include "parallel.h"
#include "scratch.h"
#include "simd.h"

namespace evsam::EVSAM_ISA {
namespace {

// The four input positions an output position is made from, and their weights.
struct Taps {
  std::int64_t at[4];
  float weight[4];
};

// |t| <= 1 and 1 <= |t| <= 2, Keys' equation 4.
double near_weight(double t) { return (1.25 * t - 2.25) * t * t + 1; }
double far_weight(double t) { return ((-0.75 * t + 3.75) * t - 6) * t + 3; }

void fill(Taps* taps, std::int64_t from, std::int64_t to) {
  for (std::int64_t i = 0; i < to; ++i) {
    const double place = (i + 0.5) * from / to - 0.5;
    const double before = __builtin_floor(place), t = place - before;
    const double weights[4] = {far_weight(t + 1), near_weight(t), near_weight(1 - t),
                               far_weight(2 - t)};
    for (int k = 0; k < 4; ++k) {
      taps[i].at[k] = most(least(static_cast<std::int64_t>(before) - 1 + k, from - 1), 0);
      taps[i].weight[k] = static_cast<float>(weights[k]);
    }
  }
}

// to[i] = sum of the four rows, each times its weight, for `count` floats rounded up to vectors.
template <class Storage>
void combine(const Storage* const (&rows)[4], const float (&weight)[4], std::int64_t count, float* to) {
  for (std::int64_t i = 0; i < count; i += lanes) {
    Vec sum = load(rows[0] + i, count - i) * weight[0];
    for (int k = 1; k < 4; ++k) sum = fma(load(rows[k] + i, count - i), broadcast(weight[k]), sum);
    store(to + i, sum);
  }
}

template <class Storage>
void run(const UpsampleAddArgs& args) {
  const std::int64_t channels = args.channels;
  std::int64_t widest = 0;
  for (std::int64_t m = 0; m < args.count; ++m) widest = most(widest, args.maps[m].width);

  struct Room {
    float* combined;
    float* sums;
    Room(Pieces& pieces, std::int64_t width_in, std::int64_t width_out, std::int64_t channels)
        : combined(pieces.take<float>(width_in * channels + lanes)),
          sums(pieces.take<float>(width_out * channels + lanes)) {}
  };
  Pieces counted;
  const Room one(counted, widest, args.width, channels);
  Pieces taps_counted;
  taps_counted.take<Taps>(args.count * (args.height + args.width));
  char* memory = scratch(taps_counted.bytes() + args.num_threads * counted.bytes());
  auto* taps = reinterpret_cast<Taps*>(memory);
  for (std::int64_t m = 0; m < args.count; ++m) {
    Taps* own = taps + m * (args.height + args.width);
    fill(own, args.maps[m].height, args.height);
    fill(own + args.height, args.maps[m].width, args.width);
  }

  const std::int64_t lines = args.batch * args.height;
  const std::int64_t operations = lines * args.width * channels * 8 * args.count;
  parallel(args.num_threads, operations, [&](int member) {
    Pieces pieces(memory + taps_counted.bytes() + member * counted.bytes());
    const Room room(pieces, widest, args.width, channels);
    for_each(lines, [&](std::int64_t line) {
      const std::int64_t image = line / args.height, y = line % args.height;
      for (std::int64_t m = 0; m < args.count; ++m) {
        const UpsampleAddMap& map = args.maps[m];
        const Taps* vertical = taps + m * (args.height + args.width);
        const Taps* horizontal = vertical + args.height;
        const std::int64_t row = map.width * channels;
        const auto* x = static_cast<const Storage*>(map.x) + image * map.height * row;
        const Storage* rows[4];
        for (int k = 0; k < 4; ++k) rows[k] = x + vertical[y].at[k] * row;
        combine(rows, vertical[y].weight, row, room.combined);
        for (std::int64_t i = 0; i < args.width; ++i)
          for (std::int64_t c = 0; c < channels; c += lanes) {
            // Lanes past the last channel fall on the next pixel, which is written later.
            float* sums = room.sums + i * channels + c;
            Vec sum = m == 0 ? zero() : load(sums);
            for (int k = 0; k < 4; ++k)
              sum = fma(load(room.combined + horizontal[i].at[k] * channels + c),
                        broadcast(horizontal[i].weight[k]), sum);
            store(sums, sum, channels - c);
          }
      }
      const std::int64_t count = args.width * channels;
      auto* to = static_cast<Storage*>(args.y) + line * count;
      for (std::int64_t i = 0; i < count; i += lanes) store(to + i, load(room.sums + i), count - i);
    });
  });
}

}  // namespace

void upsample_add(const UpsampleAddArgs& args) {
  switch (args.dtype) {
    case DType::float16: return run<Float16>(args);
    case DType::bfloat16: return run<BFloat16>(args);
    default: return run<float>(args);
  }
}

}  // namespace evsam::EVSAM_ISA
