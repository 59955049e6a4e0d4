// Runs attend_keys on buffers of exactly the size it may touch, for a sanitizer to watch, and checks the
// result against a plain double computation.

#include "evsam/attend_keys.h"

#include "support.h"

namespace {

using namespace support;

void check(std::int64_t batch, std::int64_t tokens, std::int64_t heads, std::int64_t head_dim,
           std::int64_t positions, std::int64_t rank, int num_threads) {
  const DType dtype = DType::float32;
  const std::int64_t tiles = (positions + 63) / 64, inner = heads * head_dim, all = tiles * 64;
  const Values q = weights(batch * inner * tokens, head_dim, 1), k = sequence(inner * all, 2);
  const Values v = sequence(all * inner, 3), offset = sequence(inner * all, 4);
  const Values x = sequence(batch * rank * all, 6);
  const Values row_q = weights(batch * heads * rank * tokens, rank + 1, 7);
  Values scale = sequence(batch * all, 5);
  for (double& value : scale) value = std::abs(value) + 0.25;

  const auto place = [](std::int64_t rows, std::int64_t row, std::int64_t n) {
    return (n / 64 * rows + row) * 64 + n % 64;
  };
  Values shared, of_basis;
  for (std::int64_t b = 0; b < batch; ++b)
    for (std::int64_t h = 0; h < heads; ++h)
      for (std::int64_t t = 0; t < tokens; ++t) {
        Values w(positions);
        double highest = -INFINITY, total = 0;
        for (std::int64_t n = 0; n < positions; ++n) {
          for (std::int64_t d = 0; d < head_dim; ++d) {
            const std::int64_t at = place(inner, h * head_dim + d, n);
            const double key = rank == 0 ? k[at] : scale[b * all + n] * k[at] + offset[at];
            w[n] += q[((b * heads + h) * head_dim + d) * tokens + t] * key;
          }
          for (std::int64_t r = 0; r < rank; ++r)
            w[n] += row_q[((b * heads + h) * rank + r) * tokens + t] *
                    x[b * rank * all + place(rank, r, n)];
          highest = std::fmax(highest, w[n]);
        }
        for (double& weight : w) total += weight = std::exp(weight - highest);
        for (std::int64_t d = 0; d < head_dim; ++d) {
          double sum = 0;
          for (std::int64_t n = 0; n < positions; ++n)
            sum += w[n] / total * (rank == 0 ? 1 : scale[b * all + n]) * v[n * inner + h * head_dim + d];
          shared.push_back(sum);
        }
        for (std::int64_t r = 0; r < rank; ++r) {
          double sum = 0;
          for (std::int64_t n = 0; n < positions; ++n)
            sum += w[n] / total * x[b * rank * all + place(rank, r, n)];
          of_basis.push_back(sum);
        }
      }

  const Tensor queries(dtype, q), keys(dtype, k), values(dtype, v), offsets(dtype, offset);
  const Tensor scales(dtype, scale), basis(dtype, x), row_queries(dtype, row_q);
  Tensor y(dtype, static_cast<std::int64_t>(shared.size()));
  Tensor z(dtype, static_cast<std::int64_t>(of_basis.size()));
  const auto of = [](const Tensor& tensor) { return static_cast<const float*>(tensor.data()); };
  const auto if_any = [&](const Tensor& tensor) { return rank == 0 ? nullptr : of(tensor); };
  evsam::attend_keys({of(queries), of(keys), of(values), if_any(offsets), if_any(scales),
                      if_any(basis), if_any(row_queries), static_cast<float*>(y.data()),
                      static_cast<float*>(z.data()), batch, tokens, heads, head_dim, positions, rank,
                      num_threads});
  const std::string what = join({batch, tokens, heads, head_dim, positions, rank});
  compare(what + " shared", dtype, shared, y);
  compare(what + " of basis", dtype, of_basis, z);
}

}  // namespace

int main() {
  return run([](DType dtype) {
    if (dtype != DType::float32) return;
    check(2, 7, 2, 16, 130, 0, 1);
    check(1, 4, 3, 16, 64, 9, 3);
    check(3, 13, 1, 32, 5, 19, 2);
    check(9, 3, 1, 16, 70, 5, 2);
    check(1, 1, 2, 16, 100, 70, 1);
    check(0, 5, 2, 16, 64, 9, 2);
  });
}
