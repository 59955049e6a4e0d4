// Linear layers of rows with ReLU between them, a residual and LayerNorm: of the mask decoder's tokens.
//
// Layout: rows are laid out as the left operand of a product, and so is what every layer but the last gives.
// Tile: some rows and columns of a product, so few that all threads have some of a layer of few columns, or of few
// rows. A layer waits for the one before. Main memory: x, residual and y once; weights, from L3, once for
// as many rows as a task has. The LayerNorm is that of Ba, Kiros and Hinton (arXiv 1607.06450).

#include "evsam/feed_forward.h"

#include "direct.h"
#include "evsam/conv_act.h"
#include "map.h"
#include "parallel.h"
#include "scratch.h"

namespace evsam::EVSAM_ISA {
namespace {

// Of a task.
constexpr std::int64_t rows_at_once = 8 * max_rows, columns_at_once = 64;
// That pass through all layers, which bounds the memory between these.
constexpr std::int64_t most_rows = 512;

// What lies between layers: one reads the first and writes the second, which then change places.
struct Between {
  Operand<float> of[2];

  Between(Pieces& pieces, const FeedForwardArgs& args) {
    std::int64_t columns = 0;
    for (std::int64_t i = 0; i < args.layer_count; ++i) columns = most(columns, round_up(args.layers[i].in_columns));
    const std::int64_t rows = least(args.rows, most_rows);
    for (Operand<float>& operand : of) operand = {pieces.take<float>(rows * columns), rows};
  }
};

// activation(x weights + bias), into the sink, by a team.
template <class Sink>
void apply(const LinearLayer& layer, const Operand<float>& x, std::int64_t rows, Activation activation,
           const Sums& sums, const Sink& sink) {
  const ConvShape shape{layer.in_columns, layer.out_columns, 1, 1, 1, 1};
  const Matrix<float> weights = DirectWeights<float>(pieces_of(layer.packed), shape).group(0);
  const std::int64_t columns = round_up(layer.out_columns), across = quotient_up(columns, columns_at_once);
  for_each(quotient_up(rows, rows_at_once) * across, [&](std::int64_t task) {
    const std::int64_t row = task / across * rows_at_once, column = task % across * columns_at_once;
    multiply_into<float>(x.from(row), least(rows_at_once, rows - row), weights, column,
                         least(column + columns_at_once, columns), sums, activation,
                         [=](std::int64_t i) { return sink(row + i); });
  });
}

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

}  // namespace

void feed_forward(const FeedForwardArgs& args) {
  Pieces shared, own;
  const Between counted(shared, args);
  const Sums one(own, rows_at_once);
  const Scratch memory = scratch(own.bytes(), args.num_threads, shared.bytes());
  Pieces pieces(memory.shared);
  const Between between(pieces, args);
  const LinearLayer &first_layer = args.layers[0], &last_layer = args.layers[args.layer_count - 1];
  std::int64_t operations = 0;
  for (std::int64_t i = 0; i < args.layer_count; ++i)
    operations += args.rows * args.layers[i].in_columns * args.layers[i].out_columns;
  parallel(args.num_threads, operations, [&](int member) {
    Pieces own_pieces(own_piece(memory, member));
    const Sums sums(own_pieces, rows_at_once);
    for (std::int64_t first = 0; first < args.rows; first += most_rows) {
      const std::int64_t rows = least(most_rows, args.rows - first);
      float* y = args.y + first * last_layer.out_columns;
      for_each(rows, [&](std::int64_t row) {
        copy_row(args.x + (first + row) * first_layer.in_columns, first_layer.in_columns, between.of[0], row);
      });
      for (std::int64_t i = 0; i + 1 < args.layer_count; ++i)
        apply(args.layers[i], between.of[i % 2], rows, Activation::relu, sums, between.of[(i + 1) % 2]);
      const Output<float, true> output{
          y, args.residual == nullptr ? nullptr : args.residual + first * last_layer.out_columns,
          last_layer.out_columns};
      apply(last_layer, between.of[(args.layer_count - 1) % 2], rows, Activation::none, sums,
            [=](std::int64_t row) { return output.line(row); });
      if (args.norm_weight != nullptr)
        for_each(rows, [&](std::int64_t row) {
          normalise(args, last_layer.out_columns, y + row * last_layer.out_columns);
        });
    }
  });
}

}  // namespace evsam::EVSAM_ISA
