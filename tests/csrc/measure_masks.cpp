// Runs measure_masks on buffers of exactly the size it may touch, for a sanitizer to watch, and checks the
// result against a plain double computation, and where it resolves values, with the roundings promised.

#include "evsam/measure_masks.h"

#include <algorithm>

#include "resized.h"

namespace {

using namespace resized_maps;
using namespace support;

void check(std::int64_t count, std::int64_t in_height, std::int64_t in_width, std::int64_t height,
           std::int64_t width, bool resolve, bool with_masks, int num_threads) {
  const double inner = 0.4, threshold = 0.1, outer = -0.3;
  const Values values = sequence(count * in_height * in_width, 0);
  Axis rows(in_height, in_height + 5, in_height, height);
  Axis columns(in_width, 2 * in_width, 2 * in_width - 1, width);
  Exactly<float> logits(std::vector<float>(values.begin(), values.end()));
  GuardedAxis guarded_rows(rows), guarded_columns(columns);
  Exactly<std::uint8_t> masks(std::vector<std::uint8_t>(with_masks ? count * height * width : 0, 7));
  Exactly<std::int64_t> counts(std::vector<std::int64_t>(2 * count, -1));
  Exactly<std::int64_t> boxes(std::vector<std::int64_t>(4 * count, -1));
  Exactly<std::uint8_t> doubtful(std::vector<std::uint8_t>(count, 7));
  const evsam::ResizedMaps maps{logits.data(),           count,
                                in_height,               in_width,
                                guarded_rows.argument(), guarded_columns.argument()};
  evsam::measure_masks({maps, static_cast<float>(inner), static_cast<float>(threshold),
                        static_cast<float>(outer), resolve ? 1e-2f : 1e-6f, resolve,
                        with_masks ? masks.data() : nullptr, counts.data(), boxes.data(),
                        doubtful.data(), num_threads});

  for (std::int64_t index = 0; index < count; ++index) {
    const auto logit = [&](std::int64_t i, std::int64_t j) {
      return logits.data()[(index * in_height + i) * in_width + j];
    };
    const auto in_frame = [&](std::int64_t i, std::int64_t j) {
      return resized(rows.to_frame, i, columns.to_frame, j, logit);
    };
    std::int64_t above_inner = 0, above_outer = 0, box[4] = {width, height, -1, -1};
    bool wrong = doubtful.data()[index] > (resolve ? 0 : 1), close = false;
    for (std::int64_t y = 0; y < height; ++y)
      for (std::int64_t x = 0; x < width; ++x) {
        const float rounded = resized(rows.to_image, y, columns.to_image, x, in_frame);
        double value = 0;
        for (int i = 0; i < 3; ++i)
          for (int j = 0; j < 3; ++j)
            value += double(rows.both.weights[i * height + y]) *
                     double(columns.both.weights[j * width + x]) *
                     double(logit(rows.both.first[y] + i, columns.both.first[x] + j));
        bool here = false;
        for (double level : {inner, threshold, outer}) here |= std::abs(value - level) < 1e-6;
        close |= here;
        if (here && resolve) value = rounded;
        // The thresholds are floats, which matters where the value is one.
        above_inner += value > static_cast<float>(inner);
        above_outer += value > static_cast<float>(outer);
        const bool in_mask = value > static_cast<float>(threshold);
        if (with_masks) wrong |= masks.data()[(index * height + y) * width + x] != in_mask;
        if (!in_mask) continue;
        box[0] = std::min(box[0], x), box[1] = std::min(box[1], y);
        box[2] = std::max(box[2], x), box[3] = std::max(box[3], y);
      }
    if (box[2] < 0) box[0] = box[1] = box[2] = box[3] = 0;
    for (int side = 0; side < 4; ++side) wrong |= boxes.data()[4 * index + side] != box[side];
    wrong |= counts.data()[2 * index] != above_inner || counts.data()[2 * index + 1] != above_outer;
    // Where a value lies at a threshold, it has to say so, unless it has resolved that.
    if (doubtful.data()[index] == 1 ? resolve : wrong || (close && !resolve)) {
      std::printf("%s\n", join({count, in_height, in_width, height, width, index}).c_str());
      failed = true;
    }
  }
}

}  // namespace

int main() {
  return run([](DType) {
    for (bool resolve : {false, true})
      for (bool with_masks : {false, true})
        for (int num_threads : {1, 3}) {
          check(5, 8, 9, 20, 33, resolve, with_masks, num_threads);
          check(2, 3, 3, 1, 1, resolve, with_masks, num_threads);
          check(3, 16, 16, 7, 5, resolve, with_masks, num_threads);
          check(1, 5, 40, 3, 65, resolve, with_masks, num_threads);
          check(0, 4, 4, 6, 6, resolve, with_masks, num_threads);
        }
  });
}
