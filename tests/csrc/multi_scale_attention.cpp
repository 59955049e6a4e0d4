// Runs multi_scale_attention on buffers of exactly the size it may touch, for a sanitizer to watch, and
// checks the result against a plain double computation.

#include "evsam/multi_scale_attention.h"

#include <memory>

#include "support.h"

namespace {

using namespace support;

void check(DType dtype, std::int64_t batch, std::int64_t height, std::int64_t width,
           std::int64_t in_channels, std::int64_t heads, std::int64_t head_dim,
           std::int64_t out_channels, const std::vector<std::int64_t>& kernels, int turn, bool stay = false) {
  const bool biases = turn % 3 != 0, scale_biases = turn % 2 != 0, has_residual = turn % 2 == 0;
  const double eps = 1.0 / 64;
  const std::int64_t wide = heads * 3 * head_dim;
  const std::int64_t scales = static_cast<std::int64_t>(kernels.size());
  evsam::MultiScaleAttentionWeights from{};
  from.shape.in_channels = in_channels;
  from.shape.heads = heads;
  from.shape.head_dim = head_dim;
  from.shape.out_channels = out_channels;
  from.shape.scales = scales;
  from.dtype = dtype;
  from.stay = stay;
  std::vector<std::unique_ptr<Tensor>> kept;
  const auto keep = [&](const Values& values) {
    kept.push_back(std::make_unique<Tensor>(dtype, values));
    return kept.back()->data();
  };

  const Map x{sequence(batch * height * width * in_channels, 1), batch, height, width, in_channels};
  const Values qkv_weight = weights(wide * in_channels, in_channels, 2);
  const Values qkv_bias = biases ? sequence(wide, 3) : Values();
  from.qkv_weight = keep(qkv_weight);
  if (biases) from.qkv_bias = keep(qkv_bias);
  const Map qkv = convolved(x, qkv_weight, qkv_bias, wide, 1, 1, 1, 1, Activation::none);
  std::vector<Map> outputs{attended(qkv, head_dim, eps)};
  for (std::int64_t s = 0; s < scales; ++s) {
    const std::int64_t taps = kernels[s] * kernels[s];
    const int seed = static_cast<int>(10 + 4 * s);
    const Values depth = weights(wide * taps, taps, seed);
    const Values group = weights(wide * head_dim, head_dim, seed + 1);
    const Values depth_bias = scale_biases ? sequence(wide, seed + 2) : Values();
    const Values group_bias = scale_biases ? sequence(wide, seed + 3) : Values();
    from.shape.kernels[s] = kernels[s];
    from.depth_weights[s] = keep(depth);
    from.group_weights[s] = keep(group);
    if (scale_biases) from.depth_biases[s] = keep(depth_bias);
    if (scale_biases) from.group_biases[s] = keep(group_bias);
    const Map filtered =
        convolved(qkv, depth, depth_bias, wide, kernels[s], 1, 1, wide, Activation::none);
    outputs.push_back(attended(
        convolved(filtered, group, group_bias, wide, 1, 1, 1, 3 * heads, Activation::none), head_dim,
        eps));
  }
  Map all{{}, batch, height, width, (1 + scales) * heads * head_dim};
  for (std::int64_t pixel = 0; pixel < batch * height * width; ++pixel)
    for (const Map& map : outputs)
      for (std::int64_t c = 0; c < map.channels; ++c)
        all.values.push_back(map.values[pixel * map.channels + c]);
  const Values proj_weight = weights(out_channels * all.channels, all.channels, 5);
  const Values proj_bias = biases ? sequence(out_channels, 6) : Values();
  from.proj_weight = keep(proj_weight);
  if (biases) from.proj_bias = keep(proj_bias);
  Map expected = convolved(all, proj_weight, proj_bias, out_channels, 1, 1, 1, 1, Activation::none);
  const Values residual = sequence(expected.values.size(), 7);
  if (has_residual) add(expected, residual);

  const Tensor x_in(dtype, x.values);
  const PackedWeights packed(evsam::multi_scale_attention_pack, from);
  const auto call = [&](void* y, const void* residual) {
    evsam::multi_scale_attention({x_in.data(), y, residual, packed.data(), stay ? from.qkv_weight : nullptr,
                                  batch, height, width, from.shape, eps, dtype, 1 + turn % 3});
  };
  const std::string what =
      join({batch, height, width, in_channels, heads, head_dim, out_channels, scales});
  compare_written(what, dtype, expected.values, residual, has_residual, call);
  failed |= !x_in.unchanged();
}

}  // namespace

int main() {
  return run([](DType dtype) {
    int turn = 0;
    for (std::int64_t head_dim : {1, 8, 13, 16, 32, 64})
      for (const std::vector<std::int64_t>& kernels :
           std::vector<std::vector<std::int64_t>>{{}, {3}, {5}, {3, 7}})
        check(dtype, 1 + turn % 2, 5, 7, 13, 1 + turn % 2, head_dim, 21, kernels, turn), ++turn;
    check(dtype, 0, 4, 4, 8, 1, 8, 8, {5}, turn++);
    check(dtype, 1, 1, 1, 32, 1, 32, 32, {5}, turn++);
    check(dtype, 1, 9, 8, 64, 2, 32, 64, {5}, turn++);
    // The weights of the first product are read as they are: by threads that take heads, of which one's columns are
    // more than are multiplied at once or not, and by threads that take columns of all.
    for (bool stay : {false, true})
      for (int threads = 0; threads < 3; ++threads) {
        check(dtype, 2, 5, 7, 128, 2, 32, 32, {3}, turn++, stay);
        check(dtype, 1, 3, 5, 128, 3, 64, 32, {5}, turn++, stay);
        check(dtype, 1, 3, 5, 192, 4, 96, 32, {3}, turn++, stay);
        check(dtype, 1, 5, 7, 128, 8, 8, 32, {3}, turn++, stay);
        // So large that those in bfloat16 are, too.
        check(dtype, 1, 2, 3, 704, 16, 32, 32, {}, turn++, stay);
      }
  });
}
