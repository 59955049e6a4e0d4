// The mask decoder's upscaling, a tile of positions from the keys to the pixels of all masks.
//
// Layout: see positions.h. Tile: one of the four pixels that the first convolution makes of a position,
// [mid_channels][64], and one of the four that the second makes of that, [out_channels][64], both in L1:
// the upscaled map never exists. Main memory: the prompts' bases and the masks once; a tile of the shared map
// once for two prompts, whose rows stay in L2, packed before, as rows a kilobyte apart would share a few sets
// of a cache. Threads take runs of tiles. Where products are of bfloat16, what they multiply is rounded to that and
// everything else float32.

#include "evsam/upscale_masks.h"

#include "parallel.h"
#include "positions.h"
#include "scratch.h"

namespace evsam::EVSAM_ISA {
namespace {

// Prompts that a tile of the shared map is read for.
constexpr std::int64_t together = 2;

// Of elements of products: how many rows of an operand one holds, and the type that is as exact as they.
template <class T>
struct Operand {
  static constexpr std::int64_t in_row = 1;
  using Storage = float;
};
#if defined(__AVX512BF16__)
template <>
struct Operand<Pair> {
  static constexpr std::int64_t in_row = 2;
  using Storage = BFloat16;
};
#endif

// Rows of elements, and their width as `pair_rows` writes them.
template <class T>
std::int64_t rows_of(std::int64_t inner) {
  return quotient_up(inner, Operand<T>::in_row);
}
inline std::int64_t width_of(std::int64_t columns) { return quotient_up(columns, lanes) * lanes; }

// The left operands of the products as `multiply_packed` takes them, for all threads.
template <class T>
struct Packed {
  T* rows;    // [batch][4], each of rank and mid_channels
  T* weight;  // [4], each of mid_channels and out_channels

  Packed(Pieces& pieces, const UpscaleMasksArgs& args)
      : rows(pieces.take<T>(args.batch * rows_of<T>(args.rank) * 4 * args.mid_channels)),
        weight(pieces.take<T>(rows_of<T>(args.mid_channels) * 4 * args.out_channels)) {}
};

template <class T>
struct Room {
  float* first;   // [mid_channels][64]
  float* second;  // [out_channels][64]
  float* pixels;  // [masks of a prompt][2 lines][4 columns][64]
  // Elements of what the products take, where these are not float32: the tile's basis, the first convolution's
  // result, and a left operand before it is packed.
  T* basis = nullptr;
  T* between;
  T* left = nullptr;

  Room(Pieces& pieces, const UpscaleMasksArgs& args, std::int64_t masks)
      : first(pieces.take<float>(args.mid_channels * positions)),
        second(pieces.take<float>(args.out_channels * positions)),
        pixels(pieces.take<float>(masks * 8 * positions)) {
    if constexpr (same<T, float>) {
      between = first;
    } else {
      basis = pieces.take<T>(rows_of<T>(args.rank) * positions);
      between = pieces.take<T>(rows_of<T>(args.mid_channels) * positions);
      left = pieces.take<T>(most(rows_of<T>(args.rank) * width_of(args.mid_channels),
                                 rows_of<T>(args.mid_channels) * width_of(args.out_channels)));
    }
  }
};

// Packs a left operand [inner][rows], `stride` apart.
template <class T>
void pack(std::int64_t rows, std::int64_t inner, const float* a, std::int64_t stride, const Room<T>& room, T* to) {
  if constexpr (same<T, float>) {
    pack_rows(rows, inner, a, stride, to);
  } else {
    pair_rows(inner, rows, a, stride, room.left, width_of(rows));
    pack_rows(rows, rows_of<T>(inner), room.left, width_of(rows), to);
  }
}

// x / sqrt(mean of x^2 + eps) weight + bias over the channels of `room.first`, and GELU, to `room.between`. `squares`
// is the sum of x^2. Out of line, so that constants stay in registers.
template <class T>
__attribute__((noinline)) void normalise(const UpscaleMasksArgs& args, const float* squares, const Room<T>& room) {
  const ExactGelu<typename Operand<T>::Storage> gelu;
  const std::int64_t channels = args.mid_channels;
  over_positions([&](std::int64_t n) {
    const Vec variance = load(squares + n) / static_cast<float>(channels);
    const Vec by = 1 / square_root(variance + static_cast<float>(args.eps));
    const auto activated = [&](std::int64_t c) {
      const Vec weight = by * args.norm_weight[c];
      return gelu(fma(load(room.first + c * positions + n), weight, broadcast(args.norm_bias[c])));
    };
    if constexpr (same<T, float>) {
      for (std::int64_t c = 0; c < channels; ++c) store(room.between + c * positions + n, activated(c));
    } else {
      for (std::int64_t c = 0; c < channels; c += 2)
        put_pairs(room.between + c / 2 * positions + n, activated(c), c + 1 < channels ? activated(c + 1) : zero());
    }
  });
}

// Pixels of as many masks, 8 * 64 apart: the product of GELU of x [channels][64] with vectors [channels][masks],
// `stride` apart.
template <int masks, class Storage>
__attribute__((noinline)) void paint(std::int64_t channels, const float* x, const float* vectors,
                                     std::int64_t stride, float* pixels) {
  constexpr int at_once = 2;
  const ExactGelu<Storage> gelu;
  for (std::int64_t n = 0; n < positions; n += at_once * lanes) {
    Vec sums[masks][at_once];
    for (auto& of_mask : sums)
      for (Vec& sum : of_mask) sum = zero();
    for (std::int64_t c = 0; c < channels; ++c)
#pragma GCC unroll 2
      for (int v = 0; v < at_once; ++v) {
        const Vec value = gelu(load(x + c * positions + n + v * lanes));
#pragma GCC unroll 4
        for (int m = 0; m < masks; ++m)
          sums[m][v] = fma(broadcast(vectors[c * stride + m]), value, sums[m][v]);
      }
    for (int m = 0; m < masks; ++m)
      for (int v = 0; v < at_once; ++v) store(pixels + m * 8 * positions + n + v * lanes, sums[m][v]);
  }
}

// Of any number of masks; for more than SAM has, GELU is computed again.
template <class Storage, int masks = 4>
void paint_of(std::int64_t count, std::int64_t channels, const float* x, const float* vectors, std::int64_t stride,
              float* pixels) {
  if (count >= masks) {
    paint<masks, Storage>(channels, x, vectors, stride, pixels);
    count -= masks, vectors += masks, pixels += masks * 8 * positions;
    if (count >= masks) return paint_of<Storage, masks>(count, channels, x, vectors, stride, pixels);
  }
  if constexpr (masks > 1) paint_of<Storage, masks - 1>(count, channels, x, vectors, stride, pixels);
}

// What the first convolution's sums begin with, scales base + offsets, and what their squares are added to.
struct FromBase {
  const float* base;     // [rows][64]
  const float* scales;   // [64]
  const float* offsets;  // [rows]
  float* c;              // [rows][64]
  float* squares;        // [64]

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
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) {
      Vec total = load(squares + at + v * lanes);
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i) total = fma(sums[i][v], sums[i][v], total);
      store(squares + at + v * lanes, total);
    }
  }
};

// Elements of two vectors in turn.
EVSAM_INLINE void in_turn(Vec a, Vec b, Vec (&to)[2]) {
  Bits first;
  for (std::uint32_t lane = 0; lane < lanes; ++lane) first[lane] = lane / 2 + lane % 2 * lanes;
  to[0] = shuffled(a, b, first);
  to[1] = shuffled(a, b, first + lanes / 2);
}

// Writes four columns [4][64] of pixels side by side, to lines that begin at places[n] for each position.
void write_line(const float* columns, std::int64_t used, const std::int64_t* places, float* line) {
  for (std::int64_t n = 0; n < used;) {
    if (n + lanes > used || places[n + lanes - 1] - places[n] != 4 * (lanes - 1)) {
      float pixels[4];
      for (int x = 0; x < 4; ++x) pixels[x] = columns[x * positions + n];
      __builtin_memcpy(line + places[n], pixels, sizeof pixels);
      ++n;
      continue;
    }
    float* to = line + places[n];
    const bool aligned = reinterpret_cast<std::uintptr_t>(to) % sizeof(Vec) == 0;
    Vec even[2], odd[2];
    in_turn(load(columns + n), load(columns + 2 * positions + n), even);
    in_turn(load(columns + positions + n), load(columns + 3 * positions + n), odd);
    for (int half = 0; half < 2; ++half) {
      Vec pixels[2];
      in_turn(even[half], odd[half], pixels);
      for (const Vec some : pixels) {
        if (aligned)
          send(to, some);
        else
          store(to, some);
        to += lanes;
      }
    }
    n += lanes;
  }
}

template <class T>
void upscale(const UpscaleMasksArgs& args, std::int64_t tiles, std::int64_t prompt, std::int64_t tile,
             const Packed<T>& packed, const Room<T>& room) {
  const std::int64_t mid = args.mid_channels, out = args.out_channels, width = args.width;
  const std::int64_t rank = rows_of<T>(args.rank), place = prompt * tiles + tile;
  const std::int64_t masks = args.first[prompt + 1] - args.first[prompt];
  const std::int64_t used = least(positions, args.height * width - tile * positions);
  const float* scales = args.scales + place * positions;
  const float* base = args.base + tile * 4 * mid * positions;
  const float* vectors = args.basis + place * args.rank * positions;
  const std::int64_t next = tile + 1 < tiles ? positions : 0;  // positions from here
  std::int64_t places[positions];                              // of the first pixel of each position
  for (std::int64_t n = 0; n < used; ++n) {
    const std::int64_t position = tile * positions + n;
    places[n] = 16 * (position / width) * width + 4 * (position % width);
  }
  const T* basis;
  if constexpr (same<T, float>) {
    basis = vectors;
  } else {
    pair_rows(args.rank, positions, vectors, positions, room.basis, positions);
    basis = room.basis;
  }

  for (std::int64_t outer = 0; outer < 4; ++outer) {
    alignas(64) float squares[positions] = {};
    multiply_packed(mid, rank, packed.rows + (prompt * 4 + outer) * rank * mid, basis, [&](std::int64_t row) {
      const std::int64_t channel = outer * mid + row;
      return FromBase{base + channel * positions, scales, args.offsets + channel, room.first + row * positions,
                      squares};
    });
    normalise(args, squares, room);

    for (std::int64_t inner = 0; inner < 4; ++inner) {
      // What the next tile reads is fetched meanwhile.
      fetch_part(vectors + args.rank * next, args.rank, outer * 4 + inner, 16);
      fetch_part(base + 4 * mid * next, 4 * mid, outer * 4 + inner, 16);
      multiply_packed(out, rows_of<T>(mid), packed.weight + inner * rows_of<T>(mid) * out, room.between,
                      [&](std::int64_t row) { return Store{room.second + row * positions, args.bias + row}; });
      const std::int64_t line = inner / 2, column = 2 * (outer % 2) + inner % 2;
      paint_of<typename Operand<T>::Storage>(masks, out, room.second, args.vectors + args.first[prompt],
                                             args.first[args.batch],
                                             room.pixels + (line * 4 + column) * positions);
    }
    if (outer % 2 == 0) continue;  // The other two columns are missing.
    for (std::int64_t mask = 0; mask < masks; ++mask)
      for (std::int64_t line = 0; line < 2; ++line)
        write_line(room.pixels + (mask * 2 + line) * 4 * positions, used, places,
                   args.masks + (args.first[prompt] + mask) * 16 * args.height * width +
                       (outer / 2 * 2 + line) * 4 * width);
  }
}

template <class T>
void upscale_masks_by(const UpscaleMasksArgs& args) {
  std::int64_t masks = 0;
  for (std::int64_t prompt = 0; prompt < args.batch; ++prompt)
    masks = most(masks, args.first[prompt + 1] - args.first[prompt]);
  Pieces shared, own;
  const Packed<T> counted(shared, args);
  const Room<T> one(own, args, masks);
  const Scratch memory = scratch(own.bytes(), args.num_threads, shared.bytes());
  Pieces pieces(memory.shared);
  const Packed<T> packed(pieces, args);
  const std::int64_t tiles = quotient_up(args.height * args.width, positions);
  const std::int64_t groups = quotient_up(args.batch, together);
  const std::int64_t parts = parts_of(tiles, groups, args.num_threads);
  const std::int64_t operations = args.batch * tiles * positions * 4 * args.mid_channels * args.rank;
  parallel(args.num_threads, operations, [&](int member) {
    Pieces own_pieces(own_piece(memory, member));
    const Room<T> room(own_pieces, args, masks);
    const std::int64_t mid = args.mid_channels, out = args.out_channels;
    for_each((args.batch + 1) * 4, [&](std::int64_t task) {
      const std::int64_t prompt = task / 4, quarter = task % 4;
      if (prompt < args.batch)
        pack(mid, args.rank, args.rows + (prompt * args.rank * 4 + quarter) * mid, 4 * mid, room,
             packed.rows + task * rows_of<T>(args.rank) * mid);
      else
        pack(out, mid, args.weight + quarter * out, 4 * out, room, packed.weight + quarter * rows_of<T>(mid) * out);
    });
    for_each(groups * parts, [&](std::int64_t task) {
      const std::int64_t first = task / parts * together, part = task % parts;
      for (std::int64_t tile = tiles * part / parts; tile < tiles * (part + 1) / parts; ++tile)
        for (std::int64_t prompt = first; prompt < least(first + together, args.batch); ++prompt)
          if (args.first[prompt] < args.first[prompt + 1]) upscale(args, tiles, prompt, tile, packed, room);
    });
  });
}

}  // namespace

void upscale_masks(const UpscaleMasksArgs& args) {
#if defined(__AVX512BF16__)
  if (args.bfloat16) return upscale_masks_by<Pair>(args);
#endif
  upscale_masks_by<float>(args);
}

}  // namespace evsam::EVSAM_ISA
