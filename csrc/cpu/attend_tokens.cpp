// Attention of a few tokens to one another, of which there are so few that a product of matrices would be mostly
// call and start.
//
// Tile: a token's scores in a head. Main memory: everything once; a prompt's tokens stay in L1. Threads take prompts.

#include "evsam/attend_tokens.h"

#include "activation.h"
#include "matrix.h"
#include "parallel.h"
#include "scratch.h"
#include "simd.h"

namespace evsam::EVSAM_ISA {
namespace {

// A token of a head; its row begins at `query` and `y`, those of the others at `keys` and `values`, `stride` apart.
void attend(std::int64_t tokens, std::int64_t head_dim, std::int64_t stride, const float* query, const float* keys,
            const float* values, float* weights, float* y) {
  const float scale = 1.44269504f / __builtin_sqrtf(static_cast<float>(head_dim));  // of a power of two
  float highest = -__builtin_inff();
  for (std::int64_t j = 0; j < tokens; ++j) {
    Vec total = zero();
    for (std::int64_t d = 0; d < head_dim; d += lanes)
      total = fma(load(query + d, head_dim - d), load(keys + j * stride + d, head_dim - d), total);
    weights[j] = sum(total) * scale;
    highest = weights[j] > highest ? weights[j] : highest;
  }
  float total = 0;
  for (std::int64_t j = 0; j < tokens; j += lanes) {
    const Vec powers = two_to_the<float>(load(weights + j, tokens - j) - highest);
    store(weights + j, powers, tokens - j);
    for (std::int64_t k = j; k < least(tokens, j + lanes); ++k) total += weights[k];
  }
  const float by = 1 / total;
  for (std::int64_t d = 0; d < head_dim; d += lanes) {
    Vec of_values = zero();
    for (std::int64_t j = 0; j < tokens; ++j)
      of_values = fma(broadcast(weights[j]), load(values + j * stride + d, head_dim - d), of_values);
    store(y + d, of_values * by, head_dim - d);
  }
}

}  // namespace

void attend_tokens(const AttendTokensArgs& args) {
  const std::int64_t stride = args.heads * args.head_dim;
  Pieces counted;
  counted.take<float>(args.tokens);
  const Scratch memory = scratch(counted.bytes(), args.num_threads);
  const std::int64_t operations = args.batch * args.tokens * args.tokens * stride;
  parallel(args.num_threads, operations, [&](int member) {
    Pieces pieces(own_piece(memory, member));
    float* weights = pieces.take<float>(args.tokens);
    for_each(args.batch, [&](std::int64_t prompt) {
      const std::int64_t first = prompt * args.tokens * stride;
      for (std::int64_t head = 0; head < args.heads; ++head)
        for (std::int64_t token = 0; token < args.tokens; ++token) {
          const std::int64_t of_head = first + head * args.head_dim, at = of_head + token * stride;
          attend(args.tokens, args.head_dim, stride, args.queries + at, args.keys + of_head, args.values + of_head,
                 weights, args.y + at);
        }
    });
  });
}

}  // namespace evsam::EVSAM_ISA
