// Linear layers of rows with ReLU between them, a residual and LayerNorm: of the mask decoder's tokens.
//
// Layout: rows are laid out as the left operand of a product, and so is what every layer but the last gives.
// Tile: some rows, which a thread takes through all layers while they are in L2; or, where there are few, all rows
// and some columns, layer by layer. Main memory: x, residual and y once; weights, from L3, once for every tile.
// The LayerNorm is that of Ba, Kiros and Hinton (arXiv 1607.06450).

#include "evsam/feed_forward.h"

#include "direct.h"
#include "evsam/conv_act.h"
#include "map.h"
#include "parallel.h"
#include "scratch.h"

namespace evsam::EVSAM_ISA {
namespace {

// Of a tile.
constexpr std::int64_t rows_at_once = 4 * max_rows, columns_at_once = 64;

// What lies between layers: one reads the first and writes the second, which then change places.
struct Between {
  Operand<float> of[2];

  Between(Pieces& pieces, const FeedForwardArgs& args, std::int64_t rows) {
    std::int64_t columns = 0;
    for (std::int64_t i = 0; i < args.layer_count; ++i) columns = most(columns, round_up(args.layers[i].in_columns));
    for (Operand<float>& operand : of) operand = {pieces.take<float>(rows * columns), rows};
  }
};

// LayerNorm of a row, in place.
void normalise(const FeedForwardArgs& args, std::int64_t columns, float* row) {
  const auto width = static_cast<float>(columns);
  Vec total = zero();
  for (std::int64_t c = 0; c < columns; c += lanes) total += load(row + c, columns - c);
  const float mean = sum(total) / width;
  Vec squares = zero();
  float rest = 0;
  std::int64_t c = 0;
  for (; c + lanes <= columns; c += lanes) {
    const Vec centred = load(row + c) - mean;
    squares = fma(centred, centred, squares);
  }
  for (; c < columns; ++c) rest += (row[c] - mean) * (row[c] - mean);
  const float by = 1 / __builtin_sqrtf((sum(squares) + rest) / width + static_cast<float>(args.eps));
  for (c = 0; c < columns; c += lanes) {
    const std::int64_t count = columns - c;
    const Vec scaled = (load(row + c, count) - mean) * by;
    store(row + c, fma(scaled, load(args.norm_weight + c, count), load(args.norm_bias + c, count)), count);
  }
}

// Columns [begin, end) of activation(x weights + bias), into the sink.
template <class Sink>
void apply(const LinearLayer& layer, const Operand<float>& x, std::int64_t rows, std::int64_t begin, std::int64_t end,
           Activation activation, const Sums& sums, const Sink& sink) {
  const ConvShape shape{layer.in_columns, layer.out_columns, 1, 1, 1, 1};
  const Matrix<float> weights = DirectWeights<float>(pieces_of(layer.packed), shape).group(0);
  multiply_into<float>(x, rows, weights, begin, least(end, round_up(layer.out_columns)), sums, activation, sink);
}

// Rows [first, first + rows). What can be done at once are the calls that each(count, body) makes, one for every i
// in [0, count).
template <class Each>
void pass(const FeedForwardArgs& args, std::int64_t first, std::int64_t rows, std::int64_t columns_at_once,
          const Between& between, const Sums& sums, const Each& each) {
  const std::int64_t in_columns = args.layers[0].in_columns, last = args.layer_count - 1;
  const std::int64_t out_columns = args.layers[last].out_columns;
  const auto parts = [&](std::int64_t i) { return quotient_up(args.layers[i].out_columns, columns_at_once); };
  each(rows, [&](std::int64_t row) {
    copy_row(args.x + (first + row) * in_columns, in_columns, between.of[0], row);
  });
  for (std::int64_t i = 0; i < last; ++i)
    each(parts(i), [&](std::int64_t part) {
      apply(args.layers[i], between.of[i % 2], rows, part * columns_at_once, (part + 1) * columns_at_once,
            Activation::relu, sums, between.of[(i + 1) % 2]);
    });
  float* y = args.y + first * out_columns;
  const float* residual = args.residual == nullptr ? nullptr : args.residual + first * out_columns;
  const Output<float, true> output{y, residual, out_columns};
  each(parts(last), [&](std::int64_t part) {
    apply(args.layers[last], between.of[last % 2], rows, part * columns_at_once, (part + 1) * columns_at_once,
          Activation::none, sums, [=](std::int64_t row) { return output.line(row); });
  });
  if (args.norm_weight != nullptr)
    each(rows, [&](std::int64_t row) { normalise(args, out_columns, y + row * out_columns); });
}

}  // namespace

void feed_forward(const FeedForwardArgs& args) {
  if (args.rows == 0) return;
  const bool by_columns = args.rows < args.num_threads * max_rows;
  const std::int64_t at_once = by_columns ? args.rows : rows_at_once;
  Pieces shared, own;
  const Between one(by_columns ? shared : own, args, at_once);
  const Sums counted(own, at_once);
  const Scratch memory = scratch(own.bytes(), args.num_threads, shared.bytes());
  const Runs runs(args.rows, at_once, args.num_threads);
  std::int64_t operations = 0;
  for (std::int64_t i = 0; i < args.layer_count; ++i)
    operations += args.rows * args.layers[i].in_columns * args.layers[i].out_columns;
  parallel(args.num_threads, operations, [&](int member) {
    Pieces shared_pieces(memory.shared), own_pieces(own_piece(memory, member));
    const Between between(by_columns ? shared_pieces : own_pieces, args, at_once);
    const Sums sums(own_pieces, at_once);
    if (by_columns)
      return pass(args, 0, args.rows, columns_at_once, between, sums,
                  [](std::int64_t count, const auto& body) { for_each(count, body); });
    for_each(runs.size(), [&](std::int64_t run) {
      const std::int64_t first = runs.begin(run);
      pass(args, first, runs.end(run) - first, Sums::columns, between, sums,
           [](std::int64_t count, const auto& body) {
             for (std::int64_t i = 0; i < count; ++i) body(i);
           });
    });
  });
}

}  // namespace evsam::EVSAM_ISA
