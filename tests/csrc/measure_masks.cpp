// Runs measure_masks and resize_masks on buffers of exactly the size they may touch, for a sanitizer to
// watch, and checks the results against plain computations: in double, and with the roundings promised.

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

// Positions and weights of one axis of a resizing.
struct Sums {
  std::vector<std::int32_t> first;
  std::vector<float> weights;
};

Sums bilinear(std::int64_t in_size, std::int64_t size) {
  Sums sums{{}, std::vector<float>(2 * size)};
  for (std::int64_t i = 0; i < size; ++i) {
    const double place = std::clamp((i + 0.5) * in_size / size - 0.5, 0.0, in_size - 1.0);
    const std::int64_t start = std::min(static_cast<std::int64_t>(place), in_size - 2);
    sums.first.push_back(static_cast<std::int32_t>(start));
    sums.weights[i] = static_cast<float>(1 - (place - start));
    sums.weights[size + i] = static_cast<float>(place - start);
  }
  return sums;
}

// One axis of a resizing to a frame, and of the picture in its corner to an image; both at once.
struct Axis {
  Sums to_frame, to_image, both;

  Axis(std::int64_t in_size, std::int64_t frame, std::int64_t picture, std::int64_t size)
      : to_frame(bilinear(in_size, frame)), to_image(bilinear(picture, size)) {
    both.weights.resize(3 * size);
    for (std::int64_t i = 0; i < size; ++i) {
      const std::int64_t left = to_image.first[i];
      const std::int64_t start = std::min<std::int64_t>(to_frame.first[left], in_size - 3);
      both.first.push_back(static_cast<std::int32_t>(start));
      for (int a = 0; a < 2; ++a)
        for (int b = 0; b < 2; ++b) {
          const std::int64_t tap = to_frame.first[left + a] + b - start;
          const float weight =
              to_image.weights[a * size + i] * to_frame.weights[b * frame + left + a];
          if (weight != 0) both.weights[tap * size + i] += weight;
        }
    }
  }
};

// The same in buffers.
struct GuardedSums {
  Exactly<std::int32_t> first;
  Exactly<float> weights;
  explicit GuardedSums(const Sums& sums) : first(sums.first), weights(sums.weights) {}
};

struct GuardedAxis {
  GuardedSums both, to_frame, to_image;
  std::int64_t frame, size;

  explicit GuardedAxis(const Axis& axis)
      : both(axis.both),
        to_frame(axis.to_frame),
        to_image(axis.to_image),
        frame(static_cast<std::int64_t>(axis.to_frame.first.size())),
        size(static_cast<std::int64_t>(axis.both.first.size())) {}

  evsam::ResizedAxis argument() {
    return {both.first.data(), both.weights.data(), size,
            {to_frame.first.data(), to_frame.weights.data(), frame},
            {to_image.first.data(), to_image.weights.data(), size}};
  }
};

// A pixel of one resizing, along the columns first.
template <class At>
float resized(const Sums& rows, std::int64_t y, const Sums& columns, std::int64_t x, const At& at) {
  const auto sum = [](const Sums& of, std::int64_t i, float a, float b) {
    return std::fma(a, of.weights[i], static_cast<float>(double(b) * of.weights[of.first.size() + i]));
  };
  const std::int64_t i = rows.first[y], j = columns.first[x];
  return sum(rows, y, sum(columns, x, at(i, j), at(i, j + 1)),
             sum(columns, x, at(i + 1, j), at(i + 1, j + 1)));
}

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
  std::vector<std::int64_t> every_row(height);
  for (std::int64_t y = 0; y < height; ++y) every_row[y] = y;
  Exactly<std::int64_t> wanted(every_row);
  Exactly<float> pixels(std::vector<float>(count * height * width, 7));
  evsam::resize_masks({maps, wanted.data(), height, pixels.data()});

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
        wrong |= pixels.data()[(index * height + y) * width + x] != rounded;
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
