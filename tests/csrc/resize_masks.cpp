// Runs resize_masks on buffers of exactly the size it may touch, for a sanitizer to watch, and checks the
// result, bit by bit, against a plain computation with the roundings promised.

#include "resized.h"

namespace {

using namespace resized_maps;
using namespace support;

void check(std::int64_t count, std::int64_t in_height, std::int64_t in_width, std::int64_t height,
           std::int64_t width, const std::vector<std::int64_t>& wanted) {
  const Values values = sequence(count * in_height * in_width, 0);
  Axis rows(in_height, 2 * in_height, 2 * in_height - 3, height);
  Axis columns(in_width, in_width + 7, in_width, width);
  Exactly<float> logits(std::vector<float>(values.begin(), values.end()));
  GuardedAxis guarded_rows(rows), guarded_columns(columns);
  const auto wanted_count = static_cast<std::int64_t>(wanted.size());
  Exactly<std::int64_t> guarded_wanted(wanted);
  Exactly<float> pixels(std::vector<float>(count * wanted_count * width, 7));
  evsam::resize_masks({{logits.data(), count, in_height, in_width, guarded_rows.argument(),
                        guarded_columns.argument()},
                       guarded_wanted.data(),
                       wanted_count,
                       pixels.data()});
  const float* pixel = pixels.data();
  for (std::int64_t index = 0; index < count; ++index) {
    const auto logit = [&](std::int64_t i, std::int64_t j) {
      return logits.data()[(index * in_height + i) * in_width + j];
    };
    const auto in_frame = [&](std::int64_t i, std::int64_t j) {
      return resized(rows.to_frame, i, columns.to_frame, j, logit);
    };
    for (const std::int64_t y : wanted)
      for (std::int64_t x = 0; x < width; ++x)
        if (*pixel++ != resized(rows.to_image, y, columns.to_image, x, in_frame)) {
          std::printf("%s\n", join({count, in_height, in_width, height, width, index, y, x}).c_str());
          failed = true;
        }
  }
}

}  // namespace

int main() {
  return run([](DType) {
    check(3, 8, 9, 20, 33, {0, 1, 7, 19});
    check(2, 3, 3, 1, 1, {0});
    check(1, 16, 16, 7, 5, {6, 2, 2});
    check(1, 5, 40, 3, 65, {});
    check(0, 4, 4, 6, 6, {5});
  });
}
