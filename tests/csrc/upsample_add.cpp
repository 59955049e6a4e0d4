// Runs upsample_add on buffers of exactly the size it may touch, for a sanitizer to watch, and checks the
// result against a plain double computation.

#include "evsam/upsample_add.h"

#include <memory>
#include <utility>

#include "support.h"

namespace {

using namespace support;
using Size = std::pair<std::int64_t, std::int64_t>;

double cubic(double t) {
  const double a = -0.75;
  t = std::abs(t);
  if (t <= 1) return ((a + 2) * t - (a + 3)) * t * t + 1;
  return t < 2 ? ((a * t - 5 * a) * t + 8 * a) * t - 4 * a : 0;
}

void check(DType dtype, std::int64_t batch, const std::vector<Size>& sizes, Size size,
           std::int64_t channels, int num_threads) {
  const std::int64_t height = size.first, width = size.second;
  Values expected(batch * height * width * channels);
  std::vector<std::unique_ptr<Tensor>> kept;
  std::vector<evsam::UpsampleAddMap> maps;
  for (const Size& own : sizes) {
    const Values x = sequence(batch * own.first * own.second * channels, int(maps.size()));
    kept.push_back(std::make_unique<Tensor>(dtype, x));
    maps.push_back({kept.back()->data(), own.first, own.second});
    for (std::int64_t i = 0; i < static_cast<std::int64_t>(expected.size()); ++i) {
      const std::int64_t c = i % channels, column = i / channels % width;
      const std::int64_t row = i / channels / width % height, b = i / channels / width / height;
      const double y = (row + 0.5) * own.first / height - 0.5;
      const double z = (column + 0.5) * own.second / width - 0.5;
      for (int r = -1; r <= 2; ++r)
        for (int s = -1; s <= 2; ++s) {
          const double at_y = std::floor(y) + r, at_z = std::floor(z) + s;
          const auto inside = [](double at, std::int64_t end) {
            return static_cast<std::int64_t>(std::fmin(std::fmax(at, 0), static_cast<double>(end - 1)));
          };
          const std::int64_t pixel = (b * own.first + inside(at_y, own.first)) * own.second +
                                     inside(at_z, own.second);
          expected[i] += cubic(y - at_y) * cubic(z - at_z) * x[pixel * channels + c];
        }
    }
  }
  Tensor result(dtype, static_cast<std::int64_t>(expected.size()));
  evsam::upsample_add({maps.data(), static_cast<std::int64_t>(maps.size()), result.data(), batch,
                       height, width, channels, dtype, num_threads});
  compare(join({batch, height, width, channels, static_cast<std::int64_t>(sizes.size())}), dtype,
          expected, result);
  for (const auto& tensor : kept) failed |= !tensor->unchanged();
}

}  // namespace

int main() {
  return run([](DType dtype) {
    for (std::int64_t channels : {1, 3, 16, 40})
      for (int num_threads : {1, 3}) {
        check(dtype, 2, {{4, 4}, {8, 8}, {16, 16}}, {16, 16}, channels, num_threads);
        check(dtype, 1, {{3, 5}, {7, 4}}, {17, 11}, channels, num_threads);
        check(dtype, 1, {{13, 17}, {7, 9}}, {5, 4}, channels, num_threads);
        check(dtype, 1, {{1, 1}}, {1, 6}, channels, num_threads);
        check(dtype, 0, {{2, 2}}, {4, 4}, channels, num_threads);
      }
  });
}
