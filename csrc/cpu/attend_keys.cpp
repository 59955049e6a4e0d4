// Attention of a prompt's tokens to the image in the mask decoder, the keys of which are never formed.
//
// Layout: see positions.h. Tile: the scores of one head, [tokens][64], in L1; the softmax over positions is
// that of Milakov and Gimelshein (arXiv 1805.02867), the sums being scaled down when the maximum rises.
// Main memory: the prompt's basis once, from L2 where update_keys has just written it; the shared maps once
// a prompt, from L2 or L3. A thread takes a prompt, or a few of its heads where there are few prompts.

#include "evsam/attend_keys.h"

#include "parallel.h"
#include "positions.h"
#include "scratch.h"

namespace evsam::EVSAM_ISA {
namespace {

struct Room {
  float *largest, *total;  // [heads][tokens]
  float* shared;           // [heads][tokens][head_dim]
  float* of_basis;         // [heads][tokens][columns_of(rank)]
  float* keys;             // [head_dim][64]
  float* scores;           // [tokens][64]
  float* transposed;       // [64][columns_of(rank)]

  Room(Pieces& pieces, const AttendKeysArgs& args)
      : largest(pieces.take<float>(args.heads * args.tokens)),
        total(pieces.take<float>(args.heads * args.tokens)),
        shared(pieces.take<float>(args.heads * args.tokens * args.head_dim)),
        of_basis(pieces.take<float>(args.heads * args.tokens * columns_of(args.rank))),
        keys(pieces.take<float>(args.head_dim * positions)),
        scores(pieces.take<float>(args.tokens * positions)),
        transposed(pieces.take<float>(positions * columns_of(args.rank))) {}

  // So many are whole vectors.
  static std::int64_t columns_of(std::int64_t rank) { return quotient_up(rank, lanes) * lanes; }
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

// Heads [begin, end) of one prompt.
void attend(const AttendKeysArgs& args, std::int64_t prompt, std::int64_t begin, std::int64_t end,
            const Room& room) {
  const std::int64_t tokens = args.tokens, head_dim = args.head_dim, rank = args.rank;
  const std::int64_t inner = args.heads * head_dim, columns = Room::columns_of(rank);
  const std::int64_t tiles = quotient_up(args.positions, positions);
  constexpr float log2_e = 1.44269504f;

  const std::int64_t first_row = begin * tokens, end_row = end * tokens;
  for (std::int64_t row = first_row; row < end_row; ++row)
    room.largest[row] = -__builtin_inff(), room.total[row] = 0;
  const auto clear = [&](float* from, std::int64_t width) {
    __builtin_memset(from + first_row * width, 0, (end_row - first_row) * width * sizeof(float));
  };
  clear(room.shared, head_dim);
  clear(room.of_basis, columns);

  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    const std::int64_t used = least(positions, args.positions - tile * positions);
    const std::int64_t place = prompt * tiles + tile;
    const float* basis = args.basis + place * rank * positions;
    const float* scales = rank == 0 ? nullptr : args.scales + place * positions;
    transpose_positions(rank, basis, columns, room.transposed);

    for (std::int64_t head = begin; head < end; ++head) {
      const std::int64_t at = (tile * inner + head * head_dim) * positions;
      const std::int64_t of_head = prompt * args.heads + head;
      const float* keys = args.keys + at;
      if (rank > 0) {
        scale_and_add(head_dim, keys, scales, args.offsets + at, room.keys);
        keys = room.keys;
      }
      multiply_positions(tokens, head_dim, args.queries + of_head * head_dim * tokens, tokens, keys,
                         room.scores, false);
      multiply_positions(tokens, rank, args.row_queries + of_head * rank * tokens, tokens, basis,
                         room.scores, true);
      for (std::int64_t token = 0; token < tokens; ++token) {
        float* scores = room.scores + token * positions;
        for (std::int64_t n = used; n < positions; ++n) scores[n] = -__builtin_inff();
        const std::int64_t row = head * tokens + token;
        Vec highest = load(scores);
        over_positions([&](std::int64_t n) { highest = larger(load(scores + n), highest); });
        const float here = largest(highest);
        if (here > room.largest[row]) {
          const float by = two_to_the<float>(broadcast((room.largest[row] - here) * log2_e))[0];
          room.largest[row] = here;
          room.total[row] *= by;
          multiply_row(room.shared + row * head_dim, head_dim, by);
          multiply_row(room.of_basis + row * columns, columns, by);
        }
        Vec total = zero();
        over_positions([&](std::int64_t n) {
          const Vec weight = two_to_the<float>((load(scores + n) - room.largest[row]) * log2_e);
          total += weight;
          store(scores + n, weight);
        });
        room.total[row] += sum(total);
      }
      const std::int64_t row = head * tokens;
      weigh(tokens, columns, room.scores, room.transposed, columns, room.of_basis + row * columns,
            columns);
      if (rank > 0)
        for (std::int64_t token = 0; token < tokens; ++token)
          over_positions([&](std::int64_t n) {
            float* weight = room.scores + token * positions + n;
            store(weight, load(weight) * load(scales + n));
          });
      weigh(tokens, head_dim, room.scores, args.values + tile * positions * inner + head * head_dim,
            inner, room.shared + row * head_dim, head_dim);
    }
  }

  for (std::int64_t row = first_row; row < end_row; ++row) {
    const std::int64_t to = prompt * args.heads * tokens + row;
    const float by = 1 / room.total[row];
    for (std::int64_t i = 0; i < head_dim; ++i)
      args.shared[to * head_dim + i] = room.shared[row * head_dim + i] * by;
    for (std::int64_t i = 0; i < rank; ++i)
      args.of_basis[to * rank + i] = room.of_basis[row * columns + i] * by;
  }
}

}  // namespace

void attend_keys(const AttendKeysArgs& args) {
  Pieces counted;
  const Room one(counted, args);
  char* memory = scratch(args.num_threads * counted.bytes());
  const std::int64_t parts = args.batch < args.num_threads ? args.heads : 1;
  const std::int64_t operations = args.batch * args.heads * args.tokens * args.positions *
                                  2 * (args.head_dim + args.rank);
  parallel(args.num_threads, operations, [&](int member) {
    Pieces pieces(memory + member * counted.bytes());
    const Room room(pieces, args);
    for_each(args.batch * parts, [&](std::int64_t task) {
      const std::int64_t part = task % parts;
      attend(args, task / parts, args.heads * part / parts, args.heads * (part + 1) / parts, room);
    });
  });
}

}  // namespace evsam::EVSAM_ISA
