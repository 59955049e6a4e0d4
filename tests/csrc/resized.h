// What the tests of measure_masks and of resize_masks share: bilinear resizings, and a plain form of them.
#pragma once

#include "evsam/measure_masks.h"

#include <algorithm>

#include "support.h"

namespace resized_maps {

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

}  // namespace resized_maps
