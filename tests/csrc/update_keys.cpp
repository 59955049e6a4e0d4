// Runs update_keys on buffers of exactly the size it may touch, for a sanitizer to watch, and checks the
// result against a plain double computation, also where the terms of a norm cancel.

#include "evsam/update_keys.h"

#include <memory>

#include "support.h"

namespace {

using namespace support;

const float* of(const Tensor& tensor) { return static_cast<const float*>(tensor.data()); }

// The kernel is given features and products of `rows` and `base` that fit them: an update's rows are its
// values times a table.
void check(std::int64_t batch, std::int64_t others, std::int64_t heads, std::int64_t tiles,
           std::int64_t channels, std::int64_t blocks, bool cancel, int num_threads) {
  const DType dtype = DType::float32;
  const std::int64_t head_dim = 16, inner = heads * head_dim, all = tiles * 64;
  const std::int64_t added = heads * others + 1, new_rank = blocks * added, rank = new_rank - added;
  const double eps = 1.0 / 1024;
  const auto place = [](std::int64_t rows, std::int64_t row, std::int64_t n) {
    return (n / 64 * rows + row) * 64 + n % 64;
  };
  const Values token = weights(batch * inner * others, head_dim, 1), q = sequence(inner * all, 2);
  const Values offset = sequence(inner * all, 3), x = sequence(batch * rank * all, 5);
  const Values row_token = weights(batch * heads * rank * others, rank + 1, 6);
  Values a = sequence(channels * all, 7), scale = sequence(batch * all, 4);
  for (double& value : scale) value = std::abs(value) + 0.25;

  std::vector<Values> table, difference, last, feature;
  for (std::int64_t i = 0; i < blocks; ++i) {
    const int seed = 10 * static_cast<int>(i);
    table.push_back(weights((inner + 1) * channels, inner, 8 + seed));
    difference.push_back(sequence(batch * inner * others, 9 + seed));
    last.push_back(sequence(batch * (inner + 1), 10 + seed));
  }
  if (cancel) {
    // A base of what the last row takes away again, and the rest small.
    for (Values* values : {&table[0], &difference[0]})
      for (double& value : *values) value /= 4096;
    for (std::int64_t c = 0; c < channels; ++c) {
      table[0][inner * channels + c] = -8;
      for (std::int64_t n = 0; n < all; ++n) a[place(channels, c, n)] = 8 + a[place(channels, c, n)] / 4;
    }
  }
  for (std::int64_t b = 0; b < batch; ++b)
    for (std::int64_t i = 0; i < blocks; ++i) last[i][b * (inner + 1) + inner] = 1;
  for (std::int64_t i = 0; i < blocks; ++i) {
    Values products((inner + 1) * all);
    for (std::int64_t f = 0; f <= inner; ++f)
      for (std::int64_t n = 0; n < all; ++n)
        for (std::int64_t c = 0; c < channels; ++c)
          products[place(inner + 1, f, n)] += table[i][f * channels + c] * a[place(channels, c, n)];
    feature.push_back(products);
  }
  Values square(all), row(batch * new_rank * channels);
  for (std::int64_t n = 0; n < all; ++n)
    for (std::int64_t c = 0; c < channels; ++c)
      square[n] += a[place(channels, c, n)] * a[place(channels, c, n)];
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t i = 0; i < blocks; ++i)
      for (std::int64_t c = 0; c < channels; ++c) {
        double* to = row.data() + (b * new_rank + i * added) * channels + c;
        for (std::int64_t k = 0; k < inner; ++k)
          for (std::int64_t t = 0; t < others; ++t)
            to[(k / head_dim * others + t) * channels] +=
                difference[i][(b * inner + k) * others + t] * table[i][k * channels + c];
        for (std::int64_t k = 0; k <= inner; ++k)
          to[heads * others * channels] += last[i][b * (inner + 1) + k] * table[i][k * channels + c];
      }
  }

  Values new_basis(batch * new_rank * all), new_scale(batch * all);
  for (std::int64_t b = 0; b < batch; ++b)
    for (std::int64_t n = 0; n < all; ++n) {
      Values vector(new_rank, 1);
      for (std::int64_t k = 0; k < rank; ++k) vector[k] = x[b * rank * all + place(rank, k, n)];
      for (std::int64_t h = 0; h < heads; ++h) {
        double* w = vector.data() + rank + h * others;
        double total = 1;
        for (std::int64_t t = 0; t < others; ++t) {
          double score = 0;
          for (std::int64_t d = h * head_dim; d < (h + 1) * head_dim; ++d) {
            const std::int64_t at = place(inner, d, n);
            const double query = rank == 0 ? q[at] : scale[b * all + n] * q[at] + offset[at];
            score += token[(b * inner + d) * others + t] * query;
          }
          for (std::int64_t k = 0; k < rank; ++k)
            score += row_token[((b * heads + h) * rank + k) * others + t] * vector[k];
          total += w[t] = std::exp(score);
        }
        for (std::int64_t t = 0; t < others; ++t) w[t] /= total;
      }
      const double own = rank == 0 ? 1 : scale[b * all + n];
      double norm = 0;
      for (std::int64_t c = 0; c < channels; ++c) {
        double z = own * a[place(channels, c, n)];
        for (std::int64_t k = 0; k < new_rank; ++k)
          z += vector[k] * row[(b * new_rank + k) * channels + c];
        norm += z * z;
      }
      const double by = 1 / std::sqrt(norm / channels + eps);
      for (std::int64_t k = 0; k < new_rank; ++k)
        new_basis[b * new_rank * all + place(new_rank, k, n)] = by * vector[k];
      new_scale[b * all + n] = by * own;
    }

  const Tensor tokens(dtype, token), queries(dtype, q), offsets(dtype, offset), scales(dtype, scale);
  const Tensor basis(dtype, x), row_tokens(dtype, row_token), squares(dtype, square), base(dtype, a);
  const Tensor rows(dtype, row);
  std::vector<std::unique_ptr<Tensor>> parts;
  std::vector<evsam::KeyUpdate> updates;
  for (std::int64_t i = 0; i < blocks; ++i) {
    for (const Values* values : {&difference[i], &last[i], &feature[i]})
      parts.push_back(std::make_unique<Tensor>(dtype, *values));
    updates.push_back({of(*parts[3 * i]), of(*parts[3 * i + 1]), of(*parts[3 * i + 2])});
  }
  Tensor y(dtype, static_cast<std::int64_t>(new_basis.size()), 64);
  Tensor z(dtype, static_cast<std::int64_t>(new_scale.size()), 64);
  const auto if_any = [&](const Tensor& tensor) { return rank == 0 ? nullptr : of(tensor); };
  evsam::update_keys({of(tokens), of(queries), if_any(offsets), if_any(scales), if_any(basis),
                      if_any(row_tokens), updates.data(), of(squares), of(base), of(rows), eps,
                      static_cast<float*>(y.data()), static_cast<float*>(z.data()), batch,
                      others, heads, head_dim, tiles, channels, blocks, num_threads});
  const std::string what = join({batch, others, heads, tiles, channels, blocks, cancel});
  compare(what + " basis", dtype, new_basis, y);
  compare(what + " scales", dtype, new_scale, z);
}

}  // namespace

int main() {
  return run([](DType dtype) {
    if (dtype != DType::float32) return;
    check(2, 6, 2, 2, 24, 1, false, 1);
    check(9, 2, 2, 2, 6, 2, false, 2);
    check(1, 4, 1, 1, 9, 2, false, 3);
    check(1, 3, 3, 2, 16, 2, false, 2);
    check(2, 2, 1, 1, 13, 1, true, 1);
    check(5, 3, 2, 19, 5, 2, false, 2);
    check(0, 4, 1, 1, 9, 2, false, 2);
  });
}
