// Runs upscale_masks on buffers of exactly the size it may touch, for a sanitizer to watch, and checks the
// result against a plain double computation.

#include "evsam/upscale_masks.h"

#include "support.h"

namespace {

using namespace support;

double gelu(double x) { return x * std::erfc(-x / std::sqrt(2.0)) / 2; }

// `precision` is what the convolutions may round to.
void check(DType precision, const std::vector<std::int64_t>& counts, std::int64_t height, std::int64_t width,
           std::int64_t rank, std::int64_t mid, std::int64_t out, int num_threads) {
  const DType dtype = DType::float32;
  const auto batch = static_cast<std::int64_t>(counts.size());
  const std::int64_t tiles = (height * width + 63) / 64, all = tiles * 64;
  const double eps = 1.0 / 1024;
  std::vector<std::int64_t> first{0};
  for (const std::int64_t count : counts) first.push_back(first.back() + count);
  const Values a = sequence(4 * mid * all, 1), scale = sequence(batch * all, 2);
  const Values x = sequence(batch * rank * all, 3), row = weights(batch * rank * 4 * mid, rank, 4);
  const Values offset = sequence(4 * mid, 5), g = sequence(mid, 6), b = sequence(mid, 7);
  const Values w = weights(mid * 4 * out, mid, 8), bias = sequence(out, 9);
  const Values vector = sequence(first.back() * out, 10);

  Values expected(first.back() * 16 * height * width);
  for (std::int64_t prompt = 0; prompt < batch; ++prompt)
    for (std::int64_t n = 0; n < height * width; ++n)
      for (std::int64_t i = 0; i < 4; ++i) {
        const auto place = [&](std::int64_t rows, std::int64_t k) {
          return (n / 64 * rows + k) * 64 + n % 64;
        };
        Values y(mid);
        double square = 0;
        for (std::int64_t c = 0; c < mid; ++c) {
          y[c] = scale[prompt * all + n] * a[place(4 * mid, i * mid + c)] + offset[i * mid + c];
          for (std::int64_t k = 0; k < rank; ++k)
            y[c] += x[prompt * rank * all + place(rank, k)] *
                    row[(prompt * rank + k) * 4 * mid + i * mid + c];
          square += y[c] * y[c];
        }
        for (std::int64_t c = 0; c < mid; ++c)
          y[c] = gelu(y[c] / std::sqrt(square / mid + eps) * g[c] + b[c]);
        for (std::int64_t j = 0; j < 4; ++j) {
          const std::int64_t row_of = 4 * (n / width) + 2 * (i / 2) + j / 2;
          const std::int64_t column = 4 * (n % width) + 2 * (i % 2) + j % 2;
          for (std::int64_t o = 0; o < out; ++o) {
            double z = bias[o];
            for (std::int64_t c = 0; c < mid; ++c) z += y[c] * w[(c * 4 + j) * out + o];
            for (std::int64_t mask = first[prompt]; mask < first[prompt + 1]; ++mask)
              expected[(mask * 4 * height + row_of) * 4 * width + column] +=
                  gelu(z) * vector[o * first.back() + mask];
          }
        }
      }

  const Tensor base(dtype, a), scales(dtype, scale), basis(dtype, x), rows(dtype, row);
  const Tensor offsets(dtype, offset), norm_weight(dtype, g), norm_bias(dtype, b), weight(dtype, w);
  const Tensor biases(dtype, bias), vectors(dtype, vector);
  Tensor masks(dtype, static_cast<std::int64_t>(expected.size()));
  const auto of = [](const Tensor& tensor) { return static_cast<const float*>(tensor.data()); };
  evsam::upscale_masks({of(base), of(scales), of(basis), of(rows), of(offsets), of(norm_weight),
                        of(norm_bias), eps, of(weight), of(biases), first.data(), of(vectors),
                        static_cast<float*>(masks.data()), batch, height, width, rank, mid, out,
                        precision == DType::bfloat16, num_threads});
  compare(join({batch, height, width, rank, mid, out}), precision, expected, masks);
}

}  // namespace

int main() {
  return run([](DType dtype) {
    if (dtype == DType::float16) return;
    check(dtype, {3, 0, 1}, 8, 8, 10, 8, 4, 1);
    check(dtype, {1, 2}, 5, 9, 19, 16, 8, 3);
    check(dtype, {1}, 11, 13, 3, 9, 5, 2);
    check(dtype, {0, 0}, 8, 8, 10, 8, 4, 2);
    check(dtype, {9, 2}, 8, 9, 5, 65, 12, 2);
  });
}
