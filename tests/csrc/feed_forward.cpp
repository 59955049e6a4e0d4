// Runs feed_forward on buffers of exactly the size it may touch, for a sanitizer to watch, and checks the
// result against a plain double computation.

#include "evsam/feed_forward.h"

#include <memory>

#include "evsam/conv_act.h"
#include "support.h"

namespace {

using namespace support;

// `widths` are those of x and of what each layer gives.
void check(std::int64_t rows, const std::vector<std::int64_t>& widths, bool has_bias, bool has_residual, bool has_norm,
           int num_threads) {
  const DType dtype = DType::float32;
  const std::int64_t in = widths.front(), out = widths.back();
  const std::size_t count = widths.size() - 1;
  const Values input = sequence(rows * in, 1), added = sequence(rows * out, 2);
  const Values scale = sequence(out, 3), shift = sequence(out, 4);
  constexpr double eps = 0.25;

  Values expected = input;
  std::vector<std::unique_ptr<PackedWeights>> packed;
  std::vector<evsam::LinearLayer> layers;
  for (std::size_t layer = 0; layer < count; ++layer) {
    const std::int64_t from = widths[layer], to = widths[layer + 1];
    const Values weight = weights(to * from, from, 5 + static_cast<int>(layer));
    const Values bias = has_bias ? sequence(to, 9) : Values();
    const bool is_last = layer + 1 == count;
    expected = convolved({expected, 1, 1, rows, from}, weight, bias, to, 1, 1, 1, 1,
                         is_last ? Activation::none : Activation::relu)
                   .values;
    const Tensor weight_of(dtype, weight), bias_of(dtype, bias);
    packed.push_back(std::make_unique<PackedWeights>(
        evsam::conv_act_pack,
        evsam::ConvActWeights{weight_of.data(), has_bias ? bias_of.data() : nullptr, {from, to, 1, 1, 1, 1}, dtype}));
    layers.push_back({packed.back()->data(), from, to});
  }
  for (std::int64_t row = 0; row < rows; ++row) {
    double* y = expected.data() + row * out;
    double mean = 0, variance = 0;
    for (std::int64_t c = 0; c < out; ++c) {
      if (has_residual) y[c] += added[row * out + c];
      mean += y[c] / static_cast<double>(out);
    }
    for (std::int64_t c = 0; c < out; ++c) variance += (y[c] - mean) * (y[c] - mean) / static_cast<double>(out);
    if (has_norm)
      for (std::int64_t c = 0; c < out; ++c) y[c] = (y[c] - mean) / std::sqrt(variance + eps) * scale[c] + shift[c];
  }

  const Tensor x(dtype, input), residual(dtype, added), weight(dtype, scale), bias(dtype, shift);
  Tensor y(dtype, rows * out);
  const auto of = [](const Tensor& tensor) { return static_cast<const float*>(tensor.data()); };
  evsam::feed_forward({layers.data(), of(x), has_residual ? of(residual) : nullptr, has_norm ? of(weight) : nullptr,
                       has_norm ? of(bias) : nullptr, static_cast<float*>(y.data()),
                       static_cast<std::int64_t>(layers.size()), rows, eps, num_threads});
  compare(join({rows, in, out}), dtype, expected, y);
  failed |= !x.unchanged() || !residual.unchanged();
}

}  // namespace

int main() {
  return run([](DType dtype) {
    if (dtype != DType::float32) return;
    check(7, {32, 96, 32}, true, true, true, 2);      // few rows: threads take columns
    check(130, {32, 96, 32}, true, true, true, 2);    // threads take rows
    check(61, {19, 37, 70, 5}, false, false, true, 1);  // nothing divides anything, three layers
    check(3, {40, 21}, true, false, false, 3);
    check(1, {256, 300, 256}, true, true, false, 1);
    check(0, {32, 32}, true, true, true, 2);
  });
}
