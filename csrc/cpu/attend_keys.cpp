// Attention of a prompt's tokens to the image in the mask decoder, the keys of which are never formed.
//
// Layout: see positions.h. Tile: the scores of one head, [tokens][64], in L1; the softmax over positions is
// that of Milakov and Gimelshein (arXiv 1805.02867), the sums being scaled down when the maximum rises.
// Main memory: a prompt's basis once; a tile of the shared maps once for a few prompts, which take turns head by
// head. A thread takes these, or a few heads of a prompt where there are few prompts.

#include "evsam/attend_keys.h"

#include "parallel.h"
#include "positions.h"
#include "scratch.h"

namespace evsam::EVSAM_ISA {
namespace {

// How the vectors of a basis are summed up: as columns of whole registers, but for the last few where these would
// leave most of a register empty.
struct Columns {
  std::int64_t whole;  // the last register filled up with zeros
  std::int64_t rest;

  explicit Columns(std::int64_t rank)
      : whole((rank + lanes / 2) / lanes * lanes), rest(most(rank - whole, 0)) {}
};

// What a prompt's tokens have summed up so far. Rows are those of all heads, one after the other; lanes are summed up
// at the end.
struct Sums {
  float* largest;     // [heads][tokens]
  float* total;       // [heads][tokens][lanes]
  float* shared;      // [heads][tokens][head_dim]
  float* of_basis;    // [heads][tokens][Columns::whole]
  float* of_rest;     // [heads][tokens][Columns::rest][lanes]
  float* transposed;  // [64][Columns::whole], the tile's basis

  Sums() = default;
  Sums(Pieces& pieces, const AttendKeysArgs& args, const Columns& columns)
      : largest(pieces.take<float>(args.heads * args.tokens)),
        total(pieces.take<float>(args.heads * args.tokens * lanes)),
        shared(pieces.take<float>(args.heads * args.tokens * args.head_dim)),
        of_basis(pieces.take<float>(args.heads * args.tokens * columns.whole)),
        of_rest(pieces.take<float>(args.heads * args.tokens * columns.rest * lanes)),
        transposed(pieces.take<float>(positions * columns.whole)) {}
};

struct Room {
  Columns columns;
  Sums of_prompt[prompts_at_once];
  float* scores;  // [tokens][64]

  Room(Pieces& pieces, const AttendKeysArgs& args)
      : columns(args.rank),
        scores(pieces.take<float>(args.tokens * positions)) {
    for (Sums& sums : of_prompt) sums = Sums(pieces, args, columns);
  }
};

void multiply_row(float* row, std::int64_t count, float by) {
  for (std::int64_t i = 0; i < count; i += lanes) store(row + i, load(row + i) * by);
}

// sums[i][:] += sum over positions n of weights[i][n] values[n][:], for a few vectors of columns. That of
// a tile comes first: sums of sums round less than one after the other.
template <int rows, int vectors>
__attribute__((noinline)) void weigh_panel(const float* weights, const float* values,
                                           std::int64_t stride, float* sums,
                                           std::int64_t sums_stride) {
  Vec panel[rows][vectors];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) panel[i][v] = zero();
  for (std::int64_t n = 0; n < positions; ++n) {
    Vec columns[vectors];
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) columns[v] = load(values + n * stride + v * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const Vec weight = broadcast(weights[i * positions + n]);
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) panel[i][v] = fma(weight, columns[v], panel[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) {
      float* to = sums + i * sums_stride + v * lanes;
      store(to, load(to) + panel[i][v]);
    }
}

template <int rows, int vectors>
void weigh_columns(std::int64_t count, const float* weights, const float* values,
                   std::int64_t stride, float* sums, std::int64_t sums_stride) {
  if (count == vectors)
    return weigh_panel<rows, vectors>(weights, values, stride, sums, sums_stride);
  if constexpr (vectors > 1)
    weigh_columns<rows, vectors - 1>(count, weights, values, stride, sums, sums_stride);
}

// Splits the columns evenly.
template <int rows = panel_rows>
void weigh_rows(std::int64_t count, std::int64_t columns, const float* weights, const float* values,
                std::int64_t stride, float* sums, std::int64_t sums_stride) {
  if (count == rows) {
    constexpr int vectors = vectors_for(rows);
    const std::int64_t all = columns / lanes, parts = quotient_up(all, vectors);
    for (std::int64_t part = 0; part < parts; ++part) {
      const std::int64_t begin = all * part / parts, end = all * (part + 1) / parts;
      weigh_columns<rows, vectors>(end - begin, weights, values + begin * lanes, stride,
                                   sums + begin * lanes, sums_stride);
    }
    return;
  }
  if constexpr (rows > 1)
    weigh_rows<rows - 1>(count, columns, weights, values, stride, sums, sums_stride);
}

// sums[rows][columns] += weights[rows][64] values[64][columns], whole vectors of columns.
void weigh(std::int64_t rows, std::int64_t columns, const float* weights, const float* values,
           std::int64_t stride, float* sums, std::int64_t sums_stride) {
  const std::int64_t panels = quotient_up(rows, panel_rows);
  for (std::int64_t p = 0; p < panels; ++p) {
    const std::int64_t begin = rows * p / panels, end = rows * (p + 1) / panels;
    weigh_rows(end - begin, columns, weights + begin * positions, values, stride,
               sums + begin * sums_stride, sums_stride);
  }
}

// Takes the scores of a row in a tile, and leaves their weights in their place.
void weights_of(float* scores, std::int64_t row, std::int64_t head_dim, const Columns& columns, const Sums& sums) {
  constexpr float log2_e = 1.44269504f;
  Vec highest = load(scores);
  over_positions([&](std::int64_t n) { highest = larger(load(scores + n), highest); });
  const float here = largest(highest);
  float* total = sums.total + row * lanes;
  if (here > sums.largest[row]) {
    const float by = two_to_the<float>(broadcast((sums.largest[row] - here) * log2_e))[0];
    sums.largest[row] = here;
    multiply_row(total, lanes, by);
    multiply_row(sums.shared + row * head_dim, head_dim, by);
    multiply_row(sums.of_basis + row * columns.whole, columns.whole, by);
    multiply_row(sums.of_rest + row * columns.rest * lanes, columns.rest * lanes, by);
  }
  Vec of_tile = zero();
  over_positions([&](std::int64_t n) {
    const Vec weight = two_to_the<float>((load(scores + n) - sums.largest[row]) * log2_e);
    of_tile += weight;
    store(scores + n, weight);
  });
  store(total, load(total) + of_tile);
}

// Adds a tile of positions to the sums of a head of a prompt.
void attend_tile(const AttendKeysArgs& args, std::int64_t prompt, std::int64_t head, std::int64_t tile,
                 const Sums& sums, const Room& room) {
  const std::int64_t tokens = args.tokens, head_dim = args.head_dim, rank = args.rank;
  const std::int64_t inner = args.heads * head_dim;
  const Columns& columns = room.columns;
  const std::int64_t tiles = quotient_up(args.positions, positions);
  const std::int64_t used = least(positions, args.positions - tile * positions);
  const std::int64_t place = prompt * tiles + tile, of_head = prompt * args.heads + head, row = head * tokens;
  const float* basis = args.basis + place * rank * positions;
  const float* scales = rank == 0 ? nullptr : args.scales + place * positions;

  const std::int64_t at = (tile * inner + head * head_dim) * positions;
  const Product of_keys{head_dim, args.queries + of_head * head_dim * tokens, tokens, args.keys + at};
  if (rank == 0)
    multiply(tokens, of_keys, nothing, room.scores);
  else
    multiply(tokens, ScaledProduct{of_keys, scales, args.offsets + at},
             {rank, args.row_queries + of_head * rank * tokens, tokens, basis}, room.scores);
  for (std::int64_t token = 0; token < tokens; ++token) {
    float* scores = room.scores + token * positions;
    for (std::int64_t n = used; n < positions; ++n) scores[n] = -__builtin_inff();
    weights_of(scores, row + token, head_dim, columns, sums);
  }
  weigh(tokens, columns.whole, room.scores, sums.transposed, columns.whole, sums.of_basis + row * columns.whole,
        columns.whole);
  for (std::int64_t token = 0; token < tokens; ++token)
    for (std::int64_t k = 0; k < columns.rest; ++k) {
      Vec of_tile = zero();
      over_positions([&](std::int64_t n) {
        const Vec weight = load(room.scores + token * positions + n);
        of_tile = fma(weight, load(basis + (columns.whole + k) * positions + n), of_tile);
      });
      float* to = sums.of_rest + ((row + token) * columns.rest + k) * lanes;
      store(to, load(to) + of_tile);
    }
  if (rank > 0)
    for (std::int64_t token = 0; token < tokens; ++token)
      over_positions([&](std::int64_t n) {
        float* weight = room.scores + token * positions + n;
        store(weight, load(weight) * load(scales + n));
      });
  weigh(tokens, head_dim, room.scores, args.values + tile * positions * inner + head * head_dim, inner,
        sums.shared + row * head_dim, head_dim);
}

// Heads [begin, end) of a few prompts.
void attend(const AttendKeysArgs& args, std::int64_t first, std::int64_t count, std::int64_t begin,
            std::int64_t end, const Room& room) {
  const std::int64_t head_dim = args.head_dim, inner = args.heads * head_dim, rank = args.rank;
  const std::int64_t tiles = quotient_up(args.positions, positions);
  const std::int64_t first_row = begin * args.tokens, rows = (end - begin) * args.tokens;
  const Columns& columns = room.columns;
  for (std::int64_t i = 0; i < count; ++i) {
    const Sums& sums = room.of_prompt[i];
    const auto clear = [&](float* from, std::int64_t width) {
      __builtin_memset(from + first_row * width, 0, rows * width * sizeof(float));
    };
    for (std::int64_t row = 0; row < rows; ++row) sums.largest[first_row + row] = -__builtin_inff();
    clear(sums.total, lanes);
    clear(sums.shared, head_dim);
    clear(sums.of_basis, columns.whole);
    clear(sums.of_rest, columns.rest * lanes);
  }

  const auto basis_at = [&](std::int64_t i, std::int64_t tile) {
    return args.basis + ((first + i) * tiles + tile) * rank * positions;
  };
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    for (std::int64_t i = 0; i < count; ++i)
      transpose_positions(rank, basis_at(i, tile), columns.whole, room.of_prompt[i].transposed);
    // What the next tile reads is fetched meanwhile.
    const std::int64_t next = least(tile + 1, tiles - 1), parts = end - begin, turns = parts * count;
    const std::int64_t first_channel = (next * inner + begin * head_dim) * positions;
    for (std::int64_t part = 0, turn = 0; part < parts; ++part)
      for (std::int64_t i = 0; i < count; ++i, ++turn) {
        fetch_part(args.keys + first_channel, parts * head_dim, turn, turns);
        for (std::int64_t n = positions * i / count; n < positions * (i + 1) / count; ++n)
          __builtin_prefetch(args.values + (next * positions + n) * inner + (begin + part) * head_dim, 0, 2);
        if (rank > 0) {
          fetch_part(args.offsets + first_channel, parts * head_dim, turn, turns);
          fetch_part(basis_at(i, next), rank, part, parts);
        }
        attend_tile(args, first + i, begin + part, tile, room.of_prompt[i], room);
      }
  }

  for (std::int64_t i = 0; i < count; ++i) {
    const Sums& sums = room.of_prompt[i];
    for (std::int64_t row = first_row; row < first_row + rows; ++row) {
      const std::int64_t to = (first + i) * args.heads * args.tokens + row;
      const float by = 1 / sum(load(sums.total + row * lanes));
      for (std::int64_t d = 0; d < head_dim; ++d)
        args.shared[to * head_dim + d] = sums.shared[row * head_dim + d] * by;
      for (std::int64_t k = 0; k < rank; ++k)
        args.of_basis[to * rank + k] =
            by * (k < columns.whole
                      ? sums.of_basis[row * columns.whole + k]
                      : sum(load(sums.of_rest + (row * columns.rest + k - columns.whole) * lanes)));
    }
  }
}

}  // namespace

void attend_keys(const AttendKeysArgs& args) {
  Pieces counted;
  const Room one(counted, args);
  const Scratch memory = scratch(counted.bytes(), args.num_threads);
  const Runs groups(args.batch, prompts_at_once, args.num_threads);
  const std::int64_t parts = args.batch < args.num_threads ? args.heads : 1;
  const std::int64_t operations = args.batch * args.heads * args.tokens * args.positions *
                                  2 * (args.head_dim + args.rank);
  parallel(args.num_threads, operations, [&](int member) {
    Pieces pieces(own_piece(memory, member));
    const Room room(pieces, args);
    for_each(groups.size() * parts, [&](std::int64_t task) {
      const std::int64_t group = task / parts, part = task % parts;
      attend(args, groups.begin(group), groups.end(group) - groups.begin(group),
             args.heads * part / parts, args.heads * (part + 1) / parts, room);
    });
  });
}

}  // namespace evsam::EVSAM_ISA
