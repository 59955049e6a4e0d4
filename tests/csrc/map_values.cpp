// Runs map_values on buffers of exactly the size it may touch, for a sanitizer to watch, and checks the
// result against a plain double computation.

#include "evsam/map_values.h"

#include <memory>

#include "support.h"

namespace {

using namespace support;

void check(std::int64_t batch, std::int64_t others, std::int64_t heads, std::int64_t head_dim,
           std::int64_t block_count, std::int64_t groups, std::int64_t columns, int num_threads) {
  const DType dtype = DType::float32;
  const std::int64_t inner = heads * head_dim, all = groups * columns;
  const std::int64_t added = heads * others + 1, rank = block_count * added;
  Values want(batch * rank * all);
  std::vector<std::unique_ptr<Tensor>> tensors;
  std::vector<evsam::MappedValues> blocks;
  const auto of = [](const Tensor& tensor) { return static_cast<const float*>(tensor.data()); };
  for (std::int64_t i = 0; i < block_count; ++i) {
    const int seed = static_cast<int>(3 * i);
    const Values difference = weights(batch * inner * others, head_dim, seed + 1);
    const Values last = weights(batch * (inner + 1), inner + 1, seed + 2);
    const Values table = sequence((inner + 1) * all, seed + 3);
    for (std::int64_t b = 0; b < batch; ++b)
      for (std::int64_t row = 0; row < added; ++row)
        for (std::int64_t m = 0; m < all; ++m) {
          double sum = 0;
          if (row == heads * others) {
            for (std::int64_t k = 0; k <= inner; ++k)
              sum += last[b * (inner + 1) + k] * table[k * all + m];
          } else {
            const std::int64_t first = row / others * head_dim;
            for (std::int64_t k = first; k < first + head_dim; ++k)
              sum += difference[(b * inner + k) * others + row % others] * table[k * all + m];
          }
          want[((b * groups + m / columns) * rank + i * added + row) * columns + m % columns] = sum;
        }
    for (const Values* values : {&difference, &last, &table})
      tensors.push_back(std::make_unique<Tensor>(dtype, *values));
    blocks.push_back({of(*tensors[3 * i]), of(*tensors[3 * i + 1]), of(*tensors[3 * i + 2])});
  }
  Tensor y(dtype, static_cast<std::int64_t>(want.size()));
  evsam::map_values({blocks.data(), static_cast<float*>(y.data()), batch, others, heads, head_dim,
                     block_count, groups, columns, num_threads});
  compare(join({batch, others, heads, head_dim, block_count, groups, columns}), dtype, want, y);
}

}  // namespace

int main() {
  return run([](DType dtype) {
    if (dtype != DType::float32) return;
    check(3, 6, 2, 16, 2, 1, 72, 2);
    check(1, 3, 3, 4, 1, 3, 16, 3);
    check(2, 13, 1, 5, 2, 2, 9, 1);
    check(0, 4, 2, 16, 1, 1, 32, 2);
  });
}
