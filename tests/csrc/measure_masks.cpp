// Runs measure_masks on buffers of exactly the size it may touch, for a sanitizer to watch, and checks the
// result against a plain double computation.

#include "evsam/measure_masks.h"

#include <algorithm>

#include "support.h"

namespace {

using namespace support;

// A buffer of exactly as many elements as it may touch.
template <class T>
struct Exactly {
  Guarded memory;
  explicit Exactly(const std::vector<T>& values)
      : memory(static_cast<std::int64_t>(values.size() * sizeof(T)), alignof(T)) {
    if (!values.empty()) std::memcpy(memory.data(), values.data(), values.size() * sizeof(T));
  }
  T* data() { return reinterpret_cast<T*>(memory.data()); }
};

// Bilinear weights of one axis.
struct Axis {
  std::vector<std::int32_t> first;
  std::vector<float> weights;

  Axis(std::int64_t in_size, std::int64_t size) : weights(3 * size) {
    for (std::int64_t i = 0; i < size; ++i) {
      const double place = std::fmax((i + 0.5) * in_size / size - 0.5, 0);
      const auto below = static_cast<std::int64_t>(place);
      const std::int64_t start = below + 3 <= in_size ? below : in_size - 3;
      first.push_back(static_cast<std::int32_t>(start));
      const std::int64_t above = below + 1 < in_size ? below + 1 : below;
      weights[(below - start) * size + i] += static_cast<float>(1 - (place - below));
      weights[(above - start) * size + i] += static_cast<float>(place - below);
    }
  }
};

void check(std::int64_t count, std::int64_t in_height, std::int64_t in_width, std::int64_t height,
           std::int64_t width, bool with_masks, int num_threads) {
  const double inner = 0.4, threshold = 0.1, outer = -0.3;
  const Values values = sequence(count * in_height * in_width, 0);
  Axis rows(in_height, height), columns(in_width, width);
  Exactly<float> logits(std::vector<float>(values.begin(), values.end()));
  Exactly<std::int32_t> row_first(rows.first), column_first(columns.first);
  Exactly<float> row_weights(rows.weights), column_weights(columns.weights);
  Exactly<std::uint8_t> masks(std::vector<std::uint8_t>(with_masks ? count * height * width : 0, 7));
  Exactly<std::int64_t> counts(std::vector<std::int64_t>(2 * count, -1));
  Exactly<std::int64_t> boxes(std::vector<std::int64_t>(4 * count, -1));
  Exactly<std::uint8_t> doubtful(std::vector<std::uint8_t>(count, 7));
  evsam::measure_masks({logits.data(), count, in_height, in_width,
                        {row_first.data(), row_weights.data(), height},
                        {column_first.data(), column_weights.data(), width},
                        static_cast<float>(inner), static_cast<float>(threshold),
                        static_cast<float>(outer), 1e-6f, with_masks ? masks.data() : nullptr,
                        counts.data(), boxes.data(), doubtful.data(), num_threads});
  for (std::int64_t index = 0; index < count; ++index) {
    std::int64_t above_inner = 0, above_outer = 0, box[4] = {width, height, -1, -1};
    bool wrong = doubtful.data()[index] > 1, close = false;
    for (std::int64_t y = 0; y < height; ++y)
      for (std::int64_t x = 0; x < width; ++x) {
        double value = 0;
        for (int i = 0; i < 3; ++i)
          for (int j = 0; j < 3; ++j)
            value += double(rows.weights[i * height + y]) * double(columns.weights[j * width + x]) *
                     values[(index * in_height + rows.first[y] + i) * in_width + columns.first[x] + j];
        above_inner += value > inner;
        above_outer += value > outer;
        for (double level : {inner, threshold, outer}) close |= std::abs(value - level) < 1e-6;
        if (with_masks)
          wrong |= masks.data()[(index * height + y) * width + x] != (value > threshold);
        if (value <= threshold) continue;
        box[0] = std::min(box[0], x), box[1] = std::min(box[1], y);
        box[2] = std::max(box[2], x), box[3] = std::max(box[3], y);
      }
    if (box[2] < 0) box[0] = box[1] = box[2] = box[3] = 0;
    for (int side = 0; side < 4; ++side) wrong |= boxes.data()[4 * index + side] != box[side];
    wrong |= counts.data()[2 * index] != above_inner || counts.data()[2 * index + 1] != above_outer;
    // Where a value lies at a threshold, it has to say so.
    if (doubtful.data()[index] == 1 ? false : wrong || close) {
      std::printf("%s\n", join({count, in_height, in_width, height, width, index}).c_str());
      failed = true;
    }
  }
}

}  // namespace

int main() {
  return run([](DType) {
    for (bool with_masks : {false, true})
      for (int num_threads : {1, 3}) {
        check(5, 8, 9, 20, 33, with_masks, num_threads);
        check(2, 3, 3, 1, 1, with_masks, num_threads);
        check(3, 16, 16, 7, 5, with_masks, num_threads);
        check(1, 5, 40, 3, 65, with_masks, num_threads);
        check(0, 4, 4, 6, 6, with_masks, num_threads);
      }
  });
}
