// What the image attends to and the LayerNorm's scale, a tile of positions at a time.
//
// Layout: see positions.h. Tile: [new_rank][64] weights and products in L1 and L2. The squared norm of
// z = s A + b R is s^2 |A|^2 + 2 s b (R A^T) + b (R R^T) b^T: the first term and A times all that R is made
// of are shared by all prompts. Where these cancel, so that less than a hundredth is left of their sum, z
// itself is computed. Main memory: basis in and out once; a tile of the shared maps once for a few prompts, which
// take turns head by head. Threads take runs of tiles.

#include "evsam/update_keys.h"

#include "parallel.h"
#include "positions.h"
#include "scratch.h"

namespace evsam::EVSAM_ISA {
namespace {

constexpr float cancelled = 1e-2f;

struct Sizes {
  std::int64_t inner, added, rank, new_rank;

  explicit Sizes(const UpdateKeysArgs& args)
      : inner(args.heads * args.head_dim),
        added(args.heads * args.others + 1),
        rank((args.blocks - 1) * added),
        new_rank(args.blocks * added) {}
};

// What a thread has of a tile of a prompt.
struct Vectors {
  float* basis;  // [new_rank][64]
  float* cross;  // [64], b (R A^T)

  Vectors() = default;
  Vectors(Pieces& pieces, const Sizes& sizes)
      : basis(pieces.take<float>(sizes.new_rank * positions)), cross(pieces.take<float>(positions)) {}
};

struct Room {
  Vectors of_prompt[prompts_at_once];
  float* channels;  // [rows of a panel][64], of z

  Room(Pieces& pieces, const Sizes& sizes)
      : channels(pieces.take<float>(panel_rows * positions)) {
    for (Vectors& vectors : of_prompt) vectors = Vectors(pieces, sizes);
  }
};

// Softmax over `rows` scores and one of 0, which is left out, at every position.
void softmax(float* scores, std::int64_t rows) {
  over_positions([&](std::int64_t n) {
    constexpr float log2_e = 1.44269504f;
    Vec highest = zero();
    for (std::int64_t i = 0; i < rows; ++i) highest = larger(load(scores + i * positions + n), highest);
    Vec total = two_to_the<float>(highest * -log2_e);
    for (std::int64_t i = 0; i < rows; ++i) {
      float* at = scores + i * positions + n;
      const Vec weight = two_to_the<float>((load(at) - highest) * log2_e);
      total += weight;
      store(at, weight);
    }
    const Vec by = 1 / total;
    for (std::int64_t i = 0; i < rows; ++i) {
      float* at = scores + i * positions + n;
      store(at, load(at) * by);
    }
  });
}

// Elements of what `write_pairs` writes.
std::int64_t pairs_of(std::int64_t rank) {
  std::int64_t count = 0;
  for (std::int64_t first = 0; first < rank; first += panel_rows)
    count += least(panel_rows, rank - first) * (rank - first);
  return count;
}

// Products of all pairs of `rows` [rank][channels], each pair once, in the order in which `update` takes
// them: a panel of rows i at a time, for every k from its first row on the product with k = i, twice that with
// k > i, and 0 before.
void write_pairs(std::int64_t rank, std::int64_t channels, const float* rows, float* to) {
  for (std::int64_t first = 0; first < rank; first += panel_rows) {
    const std::int64_t count = least(panel_rows, rank - first);
    for (std::int64_t k = first; k < rank; ++k, to += count) {
      Vec sums[panel_rows];
      for (Vec& of_row : sums) of_row = zero();
      for (std::int64_t c = 0; c < channels; c += lanes) {
        const Vec other = load(rows + k * channels + c, channels - c);
#pragma GCC unroll 8
        for (int i = 0; i < panel_rows; ++i) {
          const std::int64_t row = least(first + i, rank - 1);  // Those behind the last one are not used.
          sums[i] = fma(load(rows + row * channels + c, channels - c), other, sums[i]);
        }
      }
      for (std::int64_t i = 0; i < count; ++i)
        to[i] = k < first + i ? 0 : sum(sums[i]) * (k > first + i ? 2 : 1);
    }
  }
}

// Of a head, the weights of the tokens and what they add to the cross terms.
void attend_head(const UpdateKeysArgs& args, const Sizes& sizes, std::int64_t prompt, std::int64_t head,
                 std::int64_t tile, const Vectors& vectors) {
  const std::int64_t others = args.others, head_dim = args.head_dim, rank = sizes.rank;
  const std::int64_t of_head = prompt * args.heads + head, at = (tile * sizes.inner + head * head_dim) * positions;
  const Product of_queries{head_dim, args.tokens + of_head * head_dim * others, others, args.queries + at};
  float* scores = vectors.basis + (rank + head * others) * positions;
  if (rank == 0)
    multiply(others, of_queries, nothing, scores);
  else
    multiply(others,
             ScaledProduct{of_queries, args.scales + (prompt * args.tiles + tile) * positions, args.offsets + at},
             {rank, args.row_tokens + of_head * rank * others, others, vectors.basis}, scores);
  softmax(scores, others);
  for (std::int64_t block_index = 0; block_index < args.blocks; ++block_index) {
    const KeyUpdate& of = args.updates[block_index];
    add_dot(others,
            {head_dim, of.differences + of_head * head_dim * others, others,
             of.features + (tile * (sizes.inner + 1) + head * head_dim) * positions},
            vectors.basis + (block_index * sizes.added + head * others) * positions, vectors.cross);
  }
}

// The deviation, once all heads have their weights, and what is divided by it.
void normalise(const UpdateKeysArgs& args, const Sizes& sizes, std::int64_t prompt, std::int64_t tile,
               const float* pairs, const Vectors& of_prompt, const Room& room) {
  const std::int64_t place = prompt * args.tiles + tile, rank = sizes.rank, new_rank = sizes.new_rank;
  const float* scales = rank == 0 ? nullptr : args.scales + place * positions;
  const float* basis = of_prompt.basis;

  // The three terms of |z|^2.
  alignas(64) float gram[positions] = {};
  const std::int64_t features = sizes.inner + 1;
  for (std::int64_t block_index = 0; block_index < args.blocks; ++block_index) {
    const KeyUpdate& of = args.updates[block_index];
    add_dot(1, {features, of.last + prompt * features, 1, of.features + tile * features * positions},
            basis + ((block_index + 1) * sizes.added - 1) * positions, of_prompt.cross);
  }
  for (std::int64_t row = 0; row < new_rank; row += panel_rows) {
    const std::int64_t count = least(panel_rows, new_rank - row);
    const float* vectors = basis + row * positions;
    panel_of(count, Product{new_rank - row, pairs, count, vectors}, nothing, Dot{vectors, gram});
    pairs += (new_rank - row) * count;
  }

  alignas(64) float squares[positions];
  bool close = false;
  over_positions([&](std::int64_t n) {
    const Vec scale = scales == nullptr ? broadcast(1) : load(scales + n);
    const Vec own = scale * scale * load(args.square + tile * positions + n);
    const Vec twice = scale * load(of_prompt.cross + n) * 2, both = load(gram + n);
    const Vec total = own + twice + both;
    store(squares + n, total);
    const Vec parts = own + larger(twice, -twice) + both;
    close |= largest(parts * cancelled - total) > 0;
  });
  if (close) {
    for (std::int64_t n = 0; n < positions; ++n) squares[n] = 0;
    const float* rows = args.rows + prompt * new_rank * args.channels;
    for (std::int64_t first = 0; first < args.channels; first += panel_rows) {
      const std::int64_t count = least(panel_rows, args.channels - first);
      const float* base = args.base + (tile * args.channels + first) * positions;
      for (std::int64_t i = 0; i < count; ++i)
        over_positions([&](std::int64_t n) {
          const Vec scale = scales == nullptr ? broadcast(1) : load(scales + n);
          store(room.channels + i * positions + n, scale * load(base + i * positions + n));
        });
      panel_of(count, Product{new_rank, rows + first, args.channels, basis}, nothing,
               Store{room.channels});
      over_positions([&](std::int64_t n) {
        Vec total = zero();
        for (std::int64_t i = 0; i < count; ++i) {
          const Vec value = load(room.channels + i * positions + n);
          total = fma(value, value, total);
        }
        store(squares + n, load(squares + n) + total);
      });
    }
  }

  float* new_basis = args.new_basis + place * new_rank * positions;
  float* new_scales = args.new_scales + place * positions;
  over_positions([&](std::int64_t n) {
    const Vec variance = larger(load(squares + n), zero()) / static_cast<float>(args.channels);
    const Vec by = 1 / square_root(variance + static_cast<float>(args.eps));
    send(new_scales + n, scales == nullptr ? by : by * load(scales + n));
    for (std::int64_t k = 0; k < new_rank; ++k)
      send(new_basis + k * positions + n, load(basis + k * positions + n) * by);
  });
}

// A tile of a few prompts.
void update(const UpdateKeysArgs& args, const Sizes& sizes, std::int64_t first, std::int64_t count,
            std::int64_t tile, const float* pairs, const Room& room) {
  const std::int64_t rank = sizes.rank;
  // What the next tile reads is fetched meanwhile.
  const std::int64_t next = least(tile + 1, args.tiles - 1);
  for (std::int64_t i = 0; i < count; ++i) {
    const Vectors& vectors = room.of_prompt[i];
    // b = [basis, w, 1]
    const float* basis = args.basis + ((first + i) * args.tiles + tile) * rank * positions;
    if (rank > 0) __builtin_memcpy(vectors.basis, basis, rank * positions * sizeof(float));
    over_positions([&](std::int64_t n) {
      store(vectors.basis + (sizes.new_rank - 1) * positions + n, broadcast(1));
      store(vectors.cross + n, zero());
    });
  }
  for (std::int64_t head = 0; head < args.heads; ++head)
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t part = head * count + i, parts = args.heads * count;
      fetch_part(args.queries + next * sizes.inner * positions, sizes.inner, part, parts);
      if (rank > 0) {
        fetch_part(args.offsets + next * sizes.inner * positions, sizes.inner, part, parts);
        fetch_part(args.basis + ((first + i) * args.tiles + next) * rank * positions, rank, head, args.heads);
      }
      for (std::int64_t block_index = 0; block_index < args.blocks; ++block_index)
        fetch_part(args.updates[block_index].features + next * (sizes.inner + 1) * positions, sizes.inner + 1, part,
                   parts);
      attend_head(args, sizes, first + i, head, tile, room.of_prompt[i]);
    }
  for (std::int64_t i = 0; i < count; ++i)
    normalise(args, sizes, first + i, tile, pairs + (first + i) * pairs_of(sizes.new_rank), room.of_prompt[i], room);
}

}  // namespace

void update_keys(const UpdateKeysArgs& args) {
  const Sizes sizes(args);
  const std::int64_t of_prompt = pairs_of(sizes.new_rank);
  Pieces counted;
  const Room one(counted, sizes);
  Pieces all;
  all.take<float>(args.batch * of_prompt);
  const Scratch memory = scratch(counted.bytes(), args.num_threads, all.bytes());
  float* pairs = Pieces(memory.shared).take<float>(args.batch * of_prompt);
  const std::int64_t groups = quotient_up(args.batch, prompts_at_once);
  const std::int64_t parts = parts_of(args.tiles, groups, args.num_threads);
  const std::int64_t operations = args.batch * args.tiles * positions * of_prompt;
  parallel(args.num_threads, operations, [&](int member) {
    Pieces pieces(own_piece(memory, member));
    const Room room(pieces, sizes);
    for_each(args.batch, [&](std::int64_t prompt) {
      write_pairs(sizes.new_rank, args.channels, args.rows + prompt * sizes.new_rank * args.channels,
                  pairs + prompt * of_prompt);
    });
    for_each(groups * parts, [&](std::int64_t task) {
      const std::int64_t first = task / parts * prompts_at_once, part = task % parts;
      for (std::int64_t tile = args.tiles * part / parts; tile < args.tiles * (part + 1) / parts; ++tile)
        update(args, sizes, first, least(prompts_at_once, args.batch - first), tile, pairs, room);
    });
  });
}

}  // namespace evsam::EVSAM_ISA
