// Sum of maps after bicubic resizing (Keys 1981, a = -0.75), the way PyTorch and OpenCV place pixels.
//
// Layout: NHWC, so that every step is a sum of whole pixels. Tile: one row of the output for each thread:
// of each map up to four rows are combined into one, and up to four pixels of each of these make a pixel
// of the output. A map of the output's size needs a single row and a single pixel.
// On chip: the combined rows, float32. Main memory: the maps once (rows are used again from L2), y once.

#include "evsam/upsample_add.h"

#include "map.h"
#include "parallel.h"
#include "scratch.h"
#include "simd.h"

namespace evsam::EVSAM_ISA {
namespace {

// The input positions that an output position is made from, those of weight zero left out.
struct Taps {
  std::int64_t count;
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
    taps[i].count = 0;
    for (int k = 0; k < 4; ++k) {
      if (weights[k] == 0) continue;
      const std::int64_t tap = taps[i].count++;
      taps[i].at[tap] = most(least(static_cast<std::int64_t>(before) - 1 + k, from - 1), 0);
      taps[i].weight[tap] = static_cast<float>(weights[k]);
    }
  }
}

// A row of `count` elements as float32: the sum of a map's rows, each times its weight. It is written to
// `room` unless the map holds it as it is.
template <class Storage>
const float* combined(const Storage* x, std::int64_t count, const Taps& rows, float* room) {
  if constexpr (same<Storage, float>)
    if (rows.count == 1 && rows.weight[0] == 1) return x + rows.at[0] * count;
  for (std::int64_t i = 0; i < count; i += lanes) {
    Vec sum = zero();
    for (std::int64_t k = 0; k < rows.count; ++k)
      sum = fma(load(x + rows.at[k] * count + i, count - i), broadcast(rows.weight[k]), sum);
    store(room + i, sum);
  }
  return room;
}

// One term of a pixel of the output.
struct Term {
  const float* pixel;
  float weight;
};

// to[c] = sum of terms, for vectors [0, vectors) of channels.
template <int vectors, class Storage>
EVSAM_INLINE void add_terms(const Term* terms, std::int64_t count, std::int64_t c,
                            std::int64_t channels, Storage* to) {
  Vec sums[vectors];
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) sums[v] = zero();
  for (std::int64_t t = 0; t < count; ++t) {
    const Vec weight = broadcast(terms[t].weight);
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const std::int64_t at = c + v * lanes;
      sums[v] = fma(load(terms[t].pixel + at, channels - at), weight, sums[v]);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    const std::int64_t at = c + v * lanes;
    store(to + at, sums[v], channels - at);
  }
}

template <class Storage>
void run(const UpsampleAddArgs& args) {
  const std::int64_t channels = args.channels;
  std::int64_t widest = 0;
  for (std::int64_t m = 0; m < args.count; ++m) widest = most(widest, args.maps[m].width);
  const std::int64_t row_room = widest * channels + lanes;

  struct Room {
    float* rows;
    const float** combined;
    Term* terms;
    Room(Pieces& pieces, std::int64_t maps, std::int64_t row_room)
        : rows(pieces.take<float>(maps * row_room)),
          combined(pieces.take<const float*>(maps)),
          terms(pieces.take<Term>(4 * maps)) {}
  };
  Pieces counted;
  const Room one(counted, args.count, row_room);
  Pieces taps_counted;
  taps_counted.take<Taps>(args.count * (args.height + args.width));
  const Scratch memory = scratch(counted.bytes(), args.num_threads, taps_counted.bytes());
  auto* taps = reinterpret_cast<Taps*>(memory.shared);
  for (std::int64_t m = 0; m < args.count; ++m) {
    Taps* own = taps + m * (args.height + args.width);
    fill(own, args.maps[m].height, args.height);
    fill(own + args.height, args.maps[m].width, args.width);
  }

  const std::int64_t lines = args.batch * args.height;
  const std::int64_t operations = lines * args.width * channels * 8 * args.count;
  parallel(args.num_threads, operations, [&](int member) {
    Pieces pieces(own_piece(memory, member));
    const Room room(pieces, args.count, row_room);
    for_each(lines, [&](std::int64_t line) {
      const std::int64_t image = line / args.height, y = line % args.height;
      for (std::int64_t m = 0; m < args.count; ++m) {
        const UpsampleAddMap& map = args.maps[m];
        const std::int64_t row = map.width * channels;
        const auto* x = static_cast<const Storage*>(map.x) + image * map.height * row;
        const Taps& vertical = taps[m * (args.height + args.width) + y];
        room.combined[m] = combined(x, row, vertical, room.rows + m * row_room);
      }
      auto* to = static_cast<Storage*>(args.y) + line * args.width * channels;
      for (std::int64_t i = 0; i < args.width; ++i, to += channels) {
        std::int64_t count = 0;
        for (std::int64_t m = 0; m < args.count; ++m) {
          const Taps& horizontal = taps[m * (args.height + args.width) + args.height + i];
          for (std::int64_t k = 0; k < horizontal.count; ++k)
            room.terms[count++] = {room.combined[m] + horizontal.at[k] * channels,
                                   horizontal.weight[k]};
        }
        std::int64_t c = 0;
        for (; c + 4 * lanes <= channels; c += 4 * lanes)
          add_terms<4>(room.terms, count, c, channels, to);
        for (; c < channels; c += lanes) add_terms<1>(room.terms, count, c, channels, to);
      }
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
