// What the programs that test kernels share: buffers of exactly the size a kernel may touch between
// sentinels that a sanitizer watches, plain double computations, and the comparison with these.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "evsam/activation.h"
#include "evsam/dtype.h"
#include "evsam/isa.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#include <sanitizer/asan_interface.h>
#endif
#endif
#if !defined(ASAN_POISON_MEMORY_REGION)
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

namespace support {

using evsam::Activation;
using evsam::DType;
using Values = std::vector<double>;

inline std::int64_t size_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

inline const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::float16: return "float16";
    case DType::bfloat16: return "bfloat16";
    case DType::float32: return "float32";
    default: return "float64";
  }
}

// Writes a value that is exact in `dtype`, or NaN.
inline void write(char* to, DType dtype, double value) {
  const float single = static_cast<float>(value);
  std::uint32_t bits;
  std::memcpy(&bits, &single, 4);
  if (dtype == DType::float64) {
    std::memcpy(to, &value, 8);
  } else if (dtype == DType::float32) {
    std::memcpy(to, &single, 4);
  } else {
    std::uint16_t half = static_cast<std::uint16_t>(bits >> 16);
    if (dtype == DType::float16) {
      const std::uint32_t magnitude = bits & 0x7fffffffu;
      const std::uint32_t rebiased = magnitude == 0     ? 0
                                     : std::isnan(value) ? 0x7e00u
                                                         : (magnitude - (112u << 23)) >> 13;
      half = static_cast<std::uint16_t>(rebiased | (bits >> 16 & 0x8000u));
    }
    std::memcpy(to, &half, 2);
  }
}

inline double read(const char* from, DType dtype) {
  if (dtype == DType::float64) {
    double wide;
    std::memcpy(&wide, from, 8);
    return wide;
  }
  if (dtype == DType::float32) {
    float single;
    std::memcpy(&single, from, 4);
    return single;
  }
  std::uint16_t half;
  std::memcpy(&half, from, 2);
  const int mantissa_bits = dtype == DType::float16 ? 10 : 7;
  const int bias = dtype == DType::float16 ? 15 : 127;
  const int exponent = (half & 0x7fff) >> mantissa_bits;
  const double mantissa = half & ((1 << mantissa_bits) - 1);
  if (exponent == (1 << (15 - mantissa_bits)) - 1) return mantissa != 0 ? NAN : INFINITY;
  const double leading = exponent == 0 ? 0 : 1 << mantissa_bits;
  const int power = (exponent == 0 ? 1 : exponent) - bias - mantissa_bits;
  return (half & 0x8000 ? -1 : 1) * std::ldexp(leading + mantissa, power);
}

// Memory between sentinels, which must be there unchanged when it is given back.
class Guarded {
 public:
  explicit Guarded(std::int64_t bytes, std::int64_t alignment = 1)
      : block_(bytes + 2 * guard), bytes_(bytes) {
    // Aligned as asked for and to nothing more.
    const auto address = reinterpret_cast<std::uintptr_t>(block_.data());
    offset_ = guard / 2;
    while ((address + offset_) % alignment != 0) ++offset_;
    if (alignment < 64 && (address + offset_) % 64 == 0) offset_ += alignment;
    std::memset(block_.data(), sentinel, block_.size());
    poison();
  }
  ~Guarded() {
    unpoison();
    for (std::size_t i = 0; i < block_.size(); ++i) {
      const std::int64_t place = static_cast<std::int64_t>(i) - offset_;
      if ((place < 0 || place >= bytes_) && block_[i] != sentinel) {
        std::printf("byte %ld of a buffer of %ld was overwritten\n", long(place), long(bytes_));
        std::fflush(stdout);
        std::abort();
      }
    }
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  char* data() { return block_.data() + offset_; }
  const char* data() const { return block_.data() + offset_; }
  std::int64_t bytes() const { return bytes_; }

 private:
  static constexpr std::int64_t guard = 256;
  static constexpr char sentinel = 0x5a;

  void poison() {
    ASAN_POISON_MEMORY_REGION(block_.data(), offset_);
    ASAN_POISON_MEMORY_REGION(data() + bytes_, block_.size() - offset_ - bytes_);
  }
  void unpoison() { ASAN_UNPOISON_MEMORY_REGION(block_.data(), block_.size()); }

  std::vector<char> block_;
  std::int64_t bytes_, offset_;
};

// A tensor in guarded memory.
class Tensor {
 public:
  Tensor(DType dtype, const Values& values) : Tensor(dtype, values, size_of(dtype)) {}
  Tensor(DType dtype, const Values& values, std::int64_t alignment)
      : dtype_(dtype), memory_(values.size() * size_of(dtype), alignment) {
    for (std::size_t i = 0; i < values.size(); ++i)
      write(memory_.data() + i * size_of(dtype), dtype, values[i]);
    before_.assign(memory_.data(), memory_.data() + memory_.bytes());
  }
  // Of NaN, to be written by a kernel.
  Tensor(DType dtype, std::int64_t count) : Tensor(dtype, Values(count, NAN)) {}
  Tensor(DType dtype, std::int64_t count, std::int64_t alignment)
      : Tensor(dtype, Values(count, NAN), alignment) {}

  void* data() { return memory_.data(); }
  const void* data() const { return memory_.data(); }
  double operator[](std::int64_t i) const { return read(memory_.data() + i * size_of(dtype_), dtype_); }
  std::int64_t count() const { return memory_.bytes() / size_of(dtype_); }
  bool unchanged() const {
    return before_.empty() || std::memcmp(before_.data(), memory_.data(), before_.size()) == 0;
  }

 private:
  DType dtype_;
  Guarded memory_;
  std::vector<char> before_;
};

// The address of an optional tensor.
inline const void* address(const Tensor* tensor) { return tensor == nullptr ? nullptr : tensor->data(); }

// Small multiples of 1/8, exact in every type.
inline Values sequence(std::int64_t count, int seed) {
  Values values(count);
  for (std::int64_t i = 0; i < count; ++i)
    values[i] = static_cast<double>((i * 37 + i / 5 * 11 + i * i % 7 + seed * 13) % 23 - 11) / 8;
  return values;
}

// Weights that keep the magnitude of what they multiply, roughly: exact powers of two times the above.
inline Values weights(std::int64_t count, std::int64_t summed, int seed) {
  Values values = sequence(count, seed);
  const double scale = std::exp2(std::round(-0.5 * std::log2(static_cast<double>(summed))));
  for (double& value : values) value *= scale;
  return values;
}

inline double activated(double x, Activation activation) {
  switch (activation) {
    case Activation::none: return x;
    case Activation::relu: return x > 0 ? x : 0;
    case Activation::relu6: return std::fmin(std::fmax(x, 0), 6);
    case Activation::hswish: return x * std::fmin(std::fmax(x + 3, 0), 6) / 6;
    case Activation::silu: return x / (1 + std::exp(-x));
    case Activation::gelu:
      return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
  }
  return NAN;
}

// An NHWC map.
struct Map {
  Values values;
  std::int64_t batch, height, width, channels;
};

// Convolution with weights [out, channels / groups, kernel, kernel], bias unless it is empty, activation.
inline Map convolved(const Map& x, const Values& weight, const Values& bias, std::int64_t out,
                     std::int64_t kernel, std::int64_t stride, std::int64_t dilation,
                     std::int64_t groups, Activation activation) {
  const std::int64_t padding = kernel / 2 * dilation, part = x.channels / groups;
  Map y{{}, x.batch, (x.height - 1) / stride + 1, (x.width - 1) / stride + 1, out};
  for (std::int64_t b = 0; b < y.batch; ++b)
    for (std::int64_t i = 0; i < y.height; ++i)
      for (std::int64_t j = 0; j < y.width; ++j)
        for (std::int64_t o = 0; o < out; ++o) {
          double sum = bias.empty() ? 0 : bias[o];
          const std::int64_t first = o / (out / groups) * part;
          for (std::int64_t ky = 0; ky < kernel; ++ky)
            for (std::int64_t kx = 0; kx < kernel; ++kx) {
              const std::int64_t r = i * stride - padding + ky * dilation;
              const std::int64_t s = j * stride - padding + kx * dilation;
              if (r < 0 || r >= x.height || s < 0 || s >= x.width) continue;
              const std::int64_t pixel = (b * x.height + r) * x.width + s;
              for (std::int64_t c = 0; c < part; ++c)
                sum += x.values[pixel * x.channels + first + c] *
                       weight[((o * part + c) * kernel + ky) * kernel + kx];
            }
          y.values.push_back(activated(sum, activation));
        }
  return y;
}

// Linear attention of a map of [heads][3][head_dim] channels.
inline Map attended(const Map& qkv, std::int64_t head_dim, double eps) {
  const std::int64_t tokens = qkv.height * qkv.width, heads = qkv.channels / (3 * head_dim);
  Map y{Values(qkv.values.size() / 3), qkv.batch, qkv.height, qkv.width, heads * head_dim};
  for (std::int64_t b = 0; b < qkv.batch; ++b)
    for (std::int64_t h = 0; h < heads; ++h) {
      const auto at = [&](std::int64_t n, std::int64_t part, std::int64_t d) {
        return qkv.values[((b * tokens + n) * heads + h) * 3 * head_dim + part * head_dim + d];
      };
      Values state(head_dim * head_dim), keys(head_dim);
      for (std::int64_t n = 0; n < tokens; ++n)
        for (std::int64_t d = 0; d < head_dim; ++d) {
          const double key = std::fmax(at(n, 1, d), 0);
          keys[d] += key;
          for (std::int64_t e = 0; e < head_dim; ++e) state[d * head_dim + e] += key * at(n, 2, e);
        }
      for (std::int64_t n = 0; n < tokens; ++n) {
        double total = eps;
        for (std::int64_t d = 0; d < head_dim; ++d) total += std::fmax(at(n, 0, d), 0) * keys[d];
        for (std::int64_t e = 0; e < head_dim; ++e) {
          double sum = 0;
          for (std::int64_t d = 0; d < head_dim; ++d)
            sum += std::fmax(at(n, 0, d), 0) * state[d * head_dim + e];
          y.values[((b * tokens + n) * heads + h) * head_dim + e] = sum / total;
        }
      }
    }
  return y;
}

inline void add(Map& to, const Values& values) {
  for (std::size_t i = 0; i < values.size(); ++i) to.values[i] += values[i];
}

inline bool failed = false;

// Holds `y` against what is expected, relative to the largest of it; so few bits are left of the sums.
inline void compare(const std::string& what, DType dtype, const Values& expected, const Tensor& y) {
  const double tolerance = dtype == DType::float64    ? 1e-13
                           : dtype == DType::float32  ? 1e-5
                           : dtype == DType::bfloat16 ? 2e-2
                                                      : 2e-3;
  double largest = 1e-3;
  for (const double value : expected) largest = std::fmax(largest, std::abs(value));
  for (std::size_t i = 0; i < expected.size(); ++i)
    if (!(std::abs(y[i] - expected[i]) <= tolerance * largest)) {
      std::printf("%s %s, element %zu: %g instead of %g\n", name_of(dtype), what.c_str(), i, y[i],
                  expected[i]);
      failed = true;
      return;
    }
}

// Compares what call(y, residual) writes, and where there is a residual also what it writes over that.
template <class Call>
void compare_written(const std::string& what, DType dtype, const Values& expected, const Values& residual,
                     bool has_residual, const Call& call) {
  const Tensor given(dtype, residual);
  Tensor y(dtype, static_cast<std::int64_t>(expected.size()));
  call(y.data(), has_residual ? given.data() : nullptr);
  compare(what, dtype, expected, y);
  failed |= !given.unchanged();
  if (!has_residual) return;
  Tensor over(dtype, residual);
  call(over.data(), over.data());
  compare(what + " over the residual", dtype, expected, over);
}

// Weights packed into guarded memory.
class PackedWeights {
 public:
  template <class Weights>
  PackedWeights(std::int64_t (*pack)(const Weights&, void*), const Weights& weights)
      : memory_(pack(weights, nullptr), 64) {
    if (pack(weights, memory_.data()) != memory_.bytes()) {
      std::printf("packed weights take %ld bytes or not\n", long(memory_.bytes()));
      failed = true;
    }
  }

  const void* data() const { return memory_.data(); }

 private:
  Guarded memory_;
};

inline std::string join(std::initializer_list<std::int64_t> numbers) {
  std::string text;
  for (const std::int64_t number : numbers) text += " " + std::to_string(number);
  return text;
}

// Calls test(dtype) with every instruction set and type that is stored in float32 or less.
template <class Test>
int run(const Test& test) {
  for (const std::string& isa : evsam::available_isas()) {
    evsam::use_isa(isa);
    std::printf("%s\n", isa.c_str());
    for (DType dtype : {DType::float16, DType::bfloat16, DType::float32}) test(dtype);
  }
  return failed ? 1 : 0;
}

}  // namespace support
