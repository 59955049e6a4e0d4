// Runs attend_tokens on buffers of exactly the size it may touch, for a sanitizer to watch, and checks the
// result against a plain double computation.

#include "evsam/attend_tokens.h"

#include "support.h"

namespace {

using namespace support;

// Scores are `factor` times what they would be.
void check(std::int64_t batch, std::int64_t tokens, std::int64_t heads, std::int64_t head_dim, double factor,
           int num_threads) {
  const DType dtype = DType::float32;
  const std::int64_t columns = heads * head_dim, size = batch * tokens * columns;
  Values q = sequence(size, 1);
  for (double& value : q) value *= factor;
  const Values k = sequence(size, 2), v = sequence(size, 3);
  Values expected(size);
  for (std::int64_t b = 0; b < batch; ++b)
    for (std::int64_t h = 0; h < heads; ++h) {
      const auto at = [&](std::int64_t token, std::int64_t d) {
        return (b * tokens + token) * columns + h * head_dim + d;
      };
      for (std::int64_t i = 0; i < tokens; ++i) {
        Values w(tokens);
        double highest = -INFINITY, total = 0;
        for (std::int64_t j = 0; j < tokens; ++j) {
          for (std::int64_t d = 0; d < head_dim; ++d)
            w[j] += q[at(i, d)] * k[at(j, d)] / std::sqrt(static_cast<double>(head_dim));
          highest = std::fmax(highest, w[j]);
        }
        for (double& weight : w) total += weight = std::exp(weight - highest);
        for (std::int64_t j = 0; j < tokens; ++j)
          for (std::int64_t d = 0; d < head_dim; ++d) expected[at(i, d)] += w[j] / total * v[at(j, d)];
      }
    }

  const Tensor queries(dtype, q), keys(dtype, k), values(dtype, v);
  Tensor y(dtype, size);
  const auto of = [](const Tensor& tensor) { return static_cast<const float*>(tensor.data()); };
  evsam::attend_tokens({of(queries), of(keys), of(values), static_cast<float*>(y.data()), batch, tokens, heads,
                        head_dim, num_threads});
  compare(join({batch, tokens, heads, head_dim}), dtype, expected, y);
}

}  // namespace

int main() {
  return run([](DType dtype) {
    if (dtype != DType::float32) return;
    check(3, 7, 8, 32, 1, 2);
    check(2, 17, 3, 5, 1, 1);    // more tokens than a register has lanes, heads that do not fill one
    check(1, 1, 2, 16, 1, 3);
    check(1, 5, 2, 20, 64, 1);   // scores far apart
    check(0, 7, 8, 32, 1, 2);
  });
}
