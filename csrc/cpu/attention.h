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
  std::int64_t tokens, head_dim, width;

  Head(Pieces& pieces, std::int64_t tokens, std::int64_t head_dim)
      : tokens(tokens), head_dim(head_dim), width(head_width(head_dim)) {
    q = pieces.take<float>(tokens * width);
    k = pieces.take<float>(tokens * width);
    v = pieces.take<float>(tokens * width);
    state = pieces.take<float>(width * width);
    keys = pieces.take<float>(width);
  }
};

// Adds the next `count` tokens from `first` on to the state, of which four rows and two vectors are in
// registers at a time.
inline void add_to_state(const Head& head, std::int64_t first, std::int64_t count) {
  const float* k = head.k + first * head.width;
  const float* v = head.v + first * head.width;
  for (std::int64_t d = 0; d < head.width; d += lanes) {
    Vec sum = zero();
    for (std::int64_t n = 0; n < count; ++n) sum += relu(load(k + n * head.width + d));
    store(head.keys + d, load(head.keys + d) + sum);
  }
  for (std::int64_t e = 0; e < head.width; e += 2 * lanes)
    for (std::int64_t d = 0; d < head.width; d += 4) {
      Vec sums[4][2];
      for (int i = 0; i < 4; ++i) sums[i][0] = sums[i][1] = zero();
      for (std::int64_t n = 0; n < count; ++n) {
        const Vec v0 = load(v + n * head.width + e), v1 = load(v + n * head.width + e + lanes);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const Vec key = relu(broadcast(k[n * head.width + d + i]));
          sums[i][0] = fma(key, v0, sums[i][0]);
          sums[i][1] = fma(key, v1, sums[i][1]);
        }
      }
      for (int i = 0; i < 4; ++i)
        for (int half = 0; half < 2; ++half) {
          float* to = head.state + (d + i) * head.width + e + half * lanes;
          store(to, load(to) + sums[i][half]);
        }
    }
}

// The state of all tokens. A few are summed up at a time, which keeps the rounding error of long sums
// small.
inline void sum_state(const Head& head) {
  constexpr std::int64_t at_once = 32;
  for (std::int64_t i = 0; i < head.width * head.width; ++i) head.state[i] = 0;
  for (std::int64_t i = 0; i < head.width; ++i) head.keys[i] = 0;
  for (std::int64_t n = 0; n < head.tokens; n += at_once)
    add_to_state(head, n, least(at_once, head.tokens - n));
}

// Every token's weights for all tokens, relu(q) relu(k)^T over their sum + eps, times v, into the sink:
// less work than through the state where tokens are fewer than channels, and exact for a single one.
template <class Sink>
void attend_directly(const Head& head, float eps, const Sink& sink) {
  float* weights = head.state;  // [tokens]
  for (std::int64_t n = 0; n < head.tokens; ++n) {
    float total = 0;
    for (std::int64_t m = 0; m < head.tokens; ++m) {
      Vec dot = zero();
      for (std::int64_t d = 0; d < head.width; d += lanes)
        dot = fma(relu(load(head.q + n * head.width + d)), relu(load(head.k + m * head.width + d)),
                  dot);
      weights[m] = sum(dot);
      total += weights[m];
    }
    for (std::int64_t e = 0; e < head.width; e += lanes) {
      Vec value = zero();
      for (std::int64_t m = 0; m < head.tokens; ++m)
        value = fma(broadcast(weights[m] / (total + eps)), load(head.v + m * head.width + e), value);
      sink(n)(e, value);
    }
  }
}

// relu(q) state / (relu(q) keys + eps) of every token, into the sink.
template <class Sink>
void attend(const Head& head, float eps, const Sink& sink) {
  if (head.tokens <= head.head_dim) return attend_directly(head, eps, sink);
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
          sink(first + i)(e + half * lanes, sums[i][half] * scale[i]);
    }
  }
}

}  // namespace
}  // namespace evsam::EVSAM_ISA
