// The mask decoder's upscaling, a tile of positions from the keys to the pixels of all masks.
//
// Layout: see positions.h. Tile: one of the four pixels that the first convolution makes of a position,
// [mid_channels][64], and one of the four that the second makes of that, [out_channels][64], both in L1:
// the upscaled map never exists. Main memory: the prompts' bases and the masks once; a tile of the shared map
// once for two prompts, whose rows stay in L2, packed before, as rows a kilobyte apart would share a few sets
// of a cache. Threads take tiles.

#include "evsam/upscale_masks.h"

#include "parallel.h"
#include "positions.h"
#include "scratch.h"

namespace evsam::EVSAM_ISA {
namespace {

// Prompts that a tile of the shared map is read for.
constexpr std::int64_t together = 2;

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
  float* pixels;  // [masks of a prompt][2 lines][4 columns][64]

  Room(Pieces& pieces, const UpscaleMasksArgs& args, std::int64_t masks)
      : first(pieces.take<float>(args.mid_channels * positions)),
        second(pieces.take<float>(args.out_channels * positions)),
        pixels(pieces.take<float>(masks * 8 * positions)) {}
};

// Out of line, so that constants stay in registers.
__attribute__((noinline)) void activate(float* x, std::int64_t count) {
  const ExactGelu gelu;
  for (std::int64_t i = 0; i < count; i += lanes) store(x + i, gelu(load(x + i)));
}

// x / sqrt(mean of x^2 + eps) weight + bias over the channels of `x`, and GELU.
__attribute__((noinline)) void normalise(const UpscaleMasksArgs& args, float* x) {
  const ExactGelu gelu;
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
      store(at, gelu(fma(load(at), weight, broadcast(args.norm_bias[c]))));
    }
  });
}

// What the first convolution's sums begin with: scales base + offsets.
struct FromBase {
  const float* base;     // [rows][64]
  const float* scales;   // [64]
  const float* offsets;  // [rows]
  float* c;              // [rows][64]

  template <int rows, int vectors>
  EVSAM_INLINE void begin(std::int64_t at, Vec (&sums)[rows][vectors]) const {
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) {
        const std::int64_t n = at + v * lanes;
        sums[i][v] = fma(load(base + i * positions + n), load(scales + n), broadcast(offsets[i]));
      }
  }

  template <int rows, int vectors>
  EVSAM_INLINE void end(std::int64_t at, const Vec (&sums)[rows][vectors]) const {
    Store{c}.end(at, sums);
  }
};

// Writes four columns [4][64] of pixels side by side, to lines that begin at places[n] for each position.
void write_line(const float* columns, std::int64_t used, const std::int64_t* places, float* line) {
  for (std::int64_t n = 0; n < used; ++n) {
    float pixels[4];
    for (int x = 0; x < 4; ++x) pixels[x] = columns[x * positions + n];
    __builtin_memcpy(line + places[n], pixels, sizeof pixels);
  }
}

void upscale(const UpscaleMasksArgs& args, std::int64_t tiles, std::int64_t prompt,
             std::int64_t tile, const Packed& packed, const Room& room) {
  const std::int64_t mid = args.mid_channels, out = args.out_channels, width = args.width;
  const std::int64_t place = prompt * tiles + tile;
  const std::int64_t masks = args.first[prompt + 1] - args.first[prompt];
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
    const float* offsets = args.offsets + outer * mid;
    multiply_packed(mid, args.rank, packed.rows + (prompt * 4 + outer) * args.rank * mid, basis,
                    [&](std::int64_t row) {
                      return FromBase{base + row * positions, scales, offsets + row,
                                      room.first + row * positions};
                    });
    normalise(args, room.first);

    for (std::int64_t inner = 0; inner < 4; ++inner) {
      multiply_packed(out, mid, packed.weight + inner * mid * out, room.first, [&](std::int64_t row) {
        return Store{room.second + row * positions, args.bias + row};
      });
      activate(room.second, out * positions);
      const std::int64_t line = inner / 2, column = 2 * (outer % 2) + inner % 2;
      over_panels(masks, [&](std::int64_t begin, std::int64_t count) {
        panel_of(count, {out, args.vectors + args.first[prompt] + begin, args.first[args.batch], room.second},
                 nothing,
                 Store{room.pixels + ((begin * 2 + line) * 4 + column) * positions, zeros, 8 * positions});
      });
    }
    if (outer % 2 == 0) continue;  // The other two columns are missing.
    for (std::int64_t mask = 0; mask < masks; ++mask)
      for (std::int64_t line = 0; line < 2; ++line)
        write_line(room.pixels + (mask * 2 + line) * 4 * positions, used, places,
                   args.masks + (args.first[prompt] + mask) * 16 * args.height * width +
                       (outer / 2 * 2 + line) * 4 * width);
  }
}

}  // namespace

void upscale_masks(const UpscaleMasksArgs& args) {
  std::int64_t masks = 0;
  for (std::int64_t prompt = 0; prompt < args.batch; ++prompt)
    masks = most(masks, args.first[prompt + 1] - args.first[prompt]);
  Pieces shared, own;
  const Packed counted(shared, args);
  const Room one(own, args, masks);
  const Scratch memory = scratch(own.bytes(), args.num_threads, shared.bytes());
  Pieces pieces(memory.shared);
  const Packed packed(pieces, args);
  const std::int64_t tiles = quotient_up(args.height * args.width, positions);
  const std::int64_t operations = args.batch * tiles * positions * 4 * args.mid_channels * args.rank;
  parallel(args.num_threads, operations, [&](int member) {
    Pieces own_pieces(own_piece(memory, member));
    const Room room(own_pieces, args, masks);
    const std::int64_t mid = args.mid_channels, out = args.out_channels;
    for_each((args.batch + 1) * 4, [&](std::int64_t task) {
      const std::int64_t prompt = task / 4, quarter = task % 4;
      if (prompt < args.batch)
        pack_rows(mid, args.rank, args.rows + (prompt * args.rank * 4 + quarter) * mid, 4 * mid,
                  packed.rows + task * args.rank * mid);
      else
        pack_rows(out, mid, args.weight + quarter * out, 4 * out, packed.weight + quarter * mid * out);
    });
    for_each(quotient_up(args.batch, together) * tiles, [&](std::int64_t task) {
      const std::int64_t first = task / tiles * together;
      for (std::int64_t prompt = first; prompt < least(first + together, args.batch); ++prompt)
        if (args.first[prompt] < args.first[prompt + 1])
          upscale(args, tiles, prompt, task % tiles, packed, room);
    });
  });
}

}  // namespace evsam::EVSAM_ISA
