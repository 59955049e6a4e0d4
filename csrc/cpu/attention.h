// ReLU linear attention of one head (arXiv 2205.14756, equation 3).
// Included by kernels: everything is private to the including file.
#pragma once

#include <cstdint>

#include "activation.h"
#include "map.h"
#include "scratch.h"

namespace evsam::EVSAM_ISA {
namespace {

// Channels of a head, filled up with zeros to whole pairs of vectors.
inline std::int64_t head_width(std::int64_t head_dim) {
  return quotient_up(head_dim, 2 * lanes) * 2 * lanes;
}

// A head in float32: q, k and v of every token, and what is summed over tokens.
struct Head {
  float* q;      // [tokens][width]
  float* k;      // [tokens][width]
  float* v;      // [tokens][width]
  float* state;  // [width][width], sums of relu(k) v
  float* keys;   // [width], sums of relu(k)
  std::int64_t tokens, width;

  Head(Pieces& pieces, std::int64_t tokens, std::int64_t head_dim)
      : tokens(tokens), width(head_width(head_dim)) {
    q = pieces.take<float>(tokens * width);
    k = pieces.take<float>(tokens * width);
    v = pieces.take<float>(tokens * width);
    state = pieces.take<float>(width * width);
    keys = pieces.take<float>(width);
  }
};

// Sums up the state: four keys' rows and two vectors of values stay in registers over all tokens.
inline void sum_state(const Head& head) {
  for (std::int64_t d = 0; d < head.width; d += lanes) {
    Vec sum = zero();
    for (std::int64_t n = 0; n < head.tokens; ++n) sum += relu(load(head.k + n * head.width + d));
    store(head.keys + d, sum);
  }
  for (std::int64_t e = 0; e < head.width; e += 2 * lanes)
    for (std::int64_t d = 0; d < head.width; d += 4) {
      Vec sums[4][2];
      for (int i = 0; i < 4; ++i) sums[i][0] = sums[i][1] = zero();
      for (std::int64_t n = 0; n < head.tokens; ++n) {
        const Vec v0 = load(head.v + n * head.width + e);
        const Vec v1 = load(head.v + n * head.width + e + lanes);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const Vec key = relu(broadcast(head.k[n * head.width + d + i]));
          sums[i][0] = fma(key, v0, sums[i][0]);
          sums[i][1] = fma(key, v1, sums[i][1]);
        }
      }
      for (int i = 0; i < 4; ++i) {
        store(head.state + (d + i) * head.width + e, sums[i][0]);
        store(head.state + (d + i) * head.width + e + lanes, sums[i][1]);
      }
    }
}

// relu(q) state / (relu(q) keys + eps) of every token, into the sink.
template <class Sink>
void attend(const Head& head, float eps, const Sink& sink) {
  sum_state(head);
  constexpr std::int64_t at_once = 4;
  for (std::int64_t first = 0; first < head.tokens; first += at_once) {
    const std::int64_t count = least(at_once, head.tokens - first);
    float scale[at_once];
    for (std::int64_t i = 0; i < count; ++i) {
      Vec dot = zero();
      for (std::int64_t d = 0; d < head.width; d += lanes)
        dot = fma(relu(load(head.q + (first + i) * head.width + d)), load(head.keys + d), dot);
      scale[i] = 1 / (sum(dot) + eps);
    }
    for (std::int64_t e = 0; e < head.width; e += 2 * lanes) {
      Vec sums[at_once][2];
      for (int i = 0; i < at_once; ++i) sums[i][0] = sums[i][1] = zero();
      for (std::int64_t d = 0; d < head.width; ++d) {
        const Vec s0 = load(head.state + d * head.width + e);
        const Vec s1 = load(head.state + d * head.width + e + lanes);
#pragma GCC unroll 4
        for (int i = 0; i < at_once; ++i) {
          // Tokens that are not there repeat the last one.
          const std::int64_t n = first + least(i, count - 1);
          const Vec query = relu(broadcast(head.q[n * head.width + d]));
          sums[i][0] = fma(query, s0, sums[i][0]);
          sums[i][1] = fma(query, s1, sums[i][1]);
        }
      }
      for (std::int64_t i = 0; i < count; ++i)
        for (int half = 0; half < 2; ++half)
          sink(first + i, e + half * lanes, sums[i][half] * scale[i]);
    }
  }
}

}  // namespace
}  // namespace evsam::EVSAM_ISA
