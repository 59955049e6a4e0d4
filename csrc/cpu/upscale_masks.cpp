// The mask decoder's upscaling, a tile of positions from the keys to the pixels of all masks.
//
// Layout: see positions.h. Tile: one of the four pixels that the first convolution makes of a position,
// [mid_channels][64], and one of the four that the second makes of that, [out_channels][64], both in L1:
// the upscaled map never exists. Main memory: the prompt's basis and the masks once; its rows from L2, the
// shared map from L2 or L3. Threads take tiles.

#include "evsam/upscale_masks.h"

#include "parallel.h"
#include "positions.h"
#include "scratch.h"

namespace evsam::EVSAM_ISA {
namespace {

struct Room {
  float* first;   // [mid_channels][64]
  float* second;  // [out_channels][64]

  Room(Pieces& pieces, const UpscaleMasksArgs& args)
      : first(pieces.take<float>(args.mid_channels * positions)),
        second(pieces.take<float>(args.out_channels * positions)) {}
};

// x / sqrt(mean of x^2 + eps) weight + bias over the channels of `x`, and GELU.
void normalise(const UpscaleMasksArgs& args, float* x) {
  over_positions([&](std::int64_t n) {
    Vec square = zero();
    for (std::int64_t c = 0; c < args.mid_channels; ++c) {
      const Vec value = load(x + c * positions + n);
      square = fma(value, value, square);
    }
    const Vec variance = square / static_cast<float>(args.mid_channels);
    const Vec by = 1 / square_root(variance + static_cast<float>(args.eps));
    for (std::int64_t c = 0; c < args.mid_channels; ++c) {
      float* at = x + c * positions + n;
      const Vec weight = by * args.norm_weight[c];
      store(at, exact_gelu(fma(load(at), weight, broadcast(args.norm_bias[c]))));
    }
  });
}

void upscale(const UpscaleMasksArgs& args, std::int64_t tiles, std::int64_t prompt,
             std::int64_t tile, const Room& room) {
  const std::int64_t mid = args.mid_channels, out = args.out_channels, width = args.width;
  const std::int64_t place = prompt * tiles + tile, first_mask = args.first[prompt];
  const std::int64_t used = least(positions, args.height * width - tile * positions);
  const float* scales = args.scales + place * positions;
  const float* basis = args.basis + place * args.rank * positions;
  const float* rows = args.rows + prompt * args.rank * 4 * mid;
  std::int64_t places[positions];  // of the first pixel of each position
  for (std::int64_t n = 0; n < used; ++n) {
    const std::int64_t position = tile * positions + n;
    places[n] = 16 * (position / width) * width + 4 * (position % width);
  }

  for (std::int64_t outer = 0; outer < 4; ++outer) {
    const float* base = args.base + (tile * 4 + outer) * mid * positions;
    for (std::int64_t c = 0; c < mid; ++c) {
      const Vec offset = broadcast(args.offsets[outer * mid + c]);
      over_positions([&](std::int64_t n) {
        const std::int64_t at = c * positions + n;
        store(room.first + at, fma(load(base + at), load(scales + n), offset));
      });
    }
    multiply_positions(mid, args.rank, rows + outer * mid, 4 * mid, basis, room.first, true);
    normalise(args, room.first);

    for (std::int64_t inner = 0; inner < 4; ++inner) {
      for (std::int64_t c = 0; c < out; ++c)
        over_positions([&](std::int64_t n) {
          store(room.second + c * positions + n, broadcast(args.bias[c]));
        });
      multiply_positions(out, mid, args.weight + inner * out, 4 * out, room.first, room.second, true);
      for (std::int64_t i = 0; i < out * positions; i += lanes)
        store(room.second + i, exact_gelu(load(room.second + i)));

      const std::int64_t y = 2 * (outer / 2) + inner / 2, x = 2 * (outer % 2) + inner % 2;
      for (std::int64_t mask = first_mask; mask < args.first[prompt + 1]; ++mask) {
        alignas(64) float pixels[positions];
        over_positions([&](std::int64_t n) {
          Vec sum = zero();
          for (std::int64_t c = 0; c < out; ++c)
            sum = fma(broadcast(args.vectors[mask * out + c]),
                      load(room.second + c * positions + n), sum);
          store(pixels + n, sum);
        });
        float* to = args.masks + mask * 16 * args.height * width + y * 4 * width + x;
        for (std::int64_t n = 0; n < used; ++n) to[places[n]] = pixels[n];
      }
    }
  }
}

}  // namespace

void upscale_masks(const UpscaleMasksArgs& args) {
  Pieces counted;
  const Room one(counted, args);
  char* memory = scratch(args.num_threads * counted.bytes());
  const std::int64_t tiles = quotient_up(args.height * args.width, positions);
  const std::int64_t tasks = args.batch * tiles;
  const std::int64_t operations = tasks * positions * 4 * args.mid_channels * args.rank;
  parallel(args.num_threads, operations, [&](int member) {
    Pieces pieces(memory + member * counted.bytes());
    const Room room(pieces, args);
    for_each(tasks, [&](std::int64_t task) {
      const std::int64_t prompt = task / tiles;
      if (args.first[prompt] < args.first[prompt + 1])
        upscale(args, tiles, prompt, task % tiles, room);
    });
  });
}

}  // namespace evsam::EVSAM_ISA
