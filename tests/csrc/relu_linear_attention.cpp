// Runs relu_linear_attention on buffers of exactly the size it may touch, for a sanitizer to watch, and
// checks the result against a plain double computation.

#include "evsam/relu_linear_attention.h"

#include "support.h"

namespace {

using namespace support;

void check(DType dtype, std::int64_t batch, std::int64_t tokens, std::int64_t heads,
           std::int64_t head_dim, int num_threads) {
  const double eps = 1.0 / 64;
  const Map qkv{sequence(batch * tokens * heads * 3 * head_dim, 1), batch, 1, tokens,
                heads * 3 * head_dim};
  const Map expected = attended(qkv, head_dim, eps);
  const Tensor in(dtype, qkv.values);
  Tensor y(dtype, static_cast<std::int64_t>(expected.values.size()));
  evsam::relu_linear_attention(
      {in.data(), y.data(), batch, tokens, heads, head_dim, eps, dtype, num_threads});
  compare(join({batch, tokens, heads, head_dim}), dtype, expected.values, y);
  failed |= !in.unchanged();
}

}  // namespace

int main() {
  return run([](DType dtype) {
    int turn = 0;
    for (std::int64_t head_dim : {1, 8, 13, 16, 32, 64})
      for (std::int64_t tokens : {1, 2, 13, 33, 80})
        check(dtype, 1 + turn % 2, tokens, 1 + turn % 3, head_dim, 1 + turn % 3), ++turn;
    check(dtype, 0, 9, 2, 8, 1);
    check(dtype, 1, 300, 4, 32, 3);
  });
}
