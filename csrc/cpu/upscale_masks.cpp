// The mask decoder's upscaling, a tile of positions from the keys to the pixels of all masks.
//
// Layout: see positions.h. Tile: one of the four pixels that the first convolution makes of a position,
// [mid_channels][64], and one of the four that the second makes of that, [out_channels][64], both in L1:
// the upscaled map never exists. Main memory: the prompt's basis and the masks once; its rows from L2, packed
// before, as rows a kilobyte apart would share a few sets of a cache; the shared map from L2 or L3. Threads
// take tiles.

#include "evsam/upscale_masks.h"

#include "parallel.h"
#include "positions.h"
#include "scratch.h"

namespace evsam::EVSAM_ISA {
namespace {

// The left operands of the products as `multiply_packed` takes them, for all threads.
struct Packed {
  float* rows;    // [batch][4], each of rank and mid_channels
  float* weight;  // [4], each of mid_channels and out_channels

  Packed(Pieces& pieces, const UpscaleMasksArgs& args)
      : rows(pieces.take<float>(args.batch * args.rank * 4 * args.mid_channels)),
        weight(pieces.take<float>(args.mid_channels * 4 * args.out_channels)) {}
};

struct Room {
  float* first;   // [mid_channels][64]
  float* second;  // [out_channels][64]
  float* pixels;  // [masks of a panel][64]

  Room(Pieces& pieces, const UpscaleMasksArgs& args)
      : first(pieces.take<float>(args.mid_channels * positions)),
        second(pieces.take<float>(args.out_channels * positions)),
        pixels(pieces.take<float>(panel_rows * positions)) {}
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
             std::int64_t tile, const Packed& packed, const Room& room) {
  const std::int64_t mid = args.mid_channels, out = args.out_channels, width = args.width;
  const std::int64_t place = prompt * tiles + tile, end_mask = args.first[prompt + 1];
  const std::int64_t used = least(positions, args.height * width - tile * positions);
  const float* scales = args.scales + place * positions;
  const float* basis = args.basis + place * args.rank * positions;
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
    multiply_packed(mid, args.rank, packed.rows + (prompt * 4 + outer) * args.rank * mid, basis,
                    room.first, nullptr);
    normalise(args, room.first);

    for (std::int64_t inner = 0; inner < 4; ++inner) {
      multiply_packed(out, mid, packed.weight + inner * mid * out, room.first, room.second, args.bias);
      for (std::int64_t i = 0; i < out * positions; i += lanes)
        store(room.second + i, exact_gelu(load(room.second + i)));

      const std::int64_t y = 2 * (outer / 2) + inner / 2, x = 2 * (outer % 2) + inner % 2;
      for (std::int64_t mask = args.first[prompt]; mask < end_mask; mask += panel_rows) {
        const std::int64_t count = least(panel_rows, end_mask - mask);
        panel_of(count, {out, args.vectors + mask, args.first[args.batch], room.second}, nothing,
                 Store{room.pixels, zeros});
        for (std::int64_t i = 0; i < count; ++i) {
          float* to = args.masks + (mask + i) * 16 * args.height * width + y * 4 * width + x;
          for (std::int64_t n = 0; n < used; ++n) to[places[n]] = room.pixels[i * positions + n];
        }
      }
    }
  }
}

}  // namespace

void upscale_masks(const UpscaleMasksArgs& args) {
  Pieces shared, own;
  const Packed counted(shared, args);
  const Room one(own, args);
  char* memory = scratch(shared.bytes() + args.num_threads * own.bytes());
  Pieces pieces(memory);
  const Packed packed(pieces, args);
  const std::int64_t tiles = quotient_up(args.height * args.width, positions);
  const std::int64_t tasks = args.batch * tiles;
  const std::int64_t operations = tasks * positions * 4 * args.mid_channels * args.rank;
  parallel(args.num_threads, operations, [&](int member) {
    Pieces own_pieces(memory + shared.bytes() + member * own.bytes());
    const Room room(own_pieces, args);
    const std::int64_t mid = args.mid_channels, out = args.out_channels;
    for_each((args.batch + 1) * 4, [&](std::int64_t task) {
      const std::int64_t prompt = task / 4, quarter = task % 4;
      if (prompt < args.batch)
        pack_rows(mid, args.rank, args.rows + (prompt * args.rank * 4 + quarter) * mid, 4 * mid,
                  packed.rows + task * args.rank * mid);
      else
        pack_rows(out, mid, args.weight + quarter * out, 4 * out, packed.weight + quarter * mid * out);
    });
    for_each(tasks, [&](std::int64_t task) {
      const std::int64_t prompt = task / tiles;
      if (args.first[prompt] < args.first[prompt + 1])
        upscale(args, tiles, prompt, task % tiles, packed, room);
    });
  });
}

}  // namespace evsam::EVSAM_ISA
