// MBConv (arXiv 1801.04381) without the expanded map ever in main memory.
//
// Layout: NHWC. Tile: a whole image and a few hidden channels for each thread: they are expanded into a
// padded map that stays in L2, filtered from there, and written as the left operand of the projection.
// So nothing is computed twice, as it would be along the edges of spatial tiles. When enough hidden
// channels are there to fill L3, all threads project them, adding to sums of the output.
// Main memory: x, residual and y once, weights once an image; the filtered channels and the sums go to
// L3 and back.

#include "evsam/mbconv.h"

#include "activation.h"
#include "depthwise.h"
#include "map.h"
#include "parallel.h"
#include "scratch.h"

namespace evsam::EVSAM_ISA {
namespace {

template <class Storage>
struct Weights {
  using E = Element<Storage>;

  Matrix<E> expand;
  DepthwiseWeights depth;
  Matrix<E> point;

  Weights(Pieces& pieces, const MBConvShape& shape)
      : expand(pieces, shape.in_channels, shape.mid_channels),
        depth(pieces, shape.mid_channels, shape.kernel),
        point(pieces, shape.mid_channels, shape.out_channels) {}
};

template <class Storage>
std::int64_t pack(const MBConvWeights& from, void* packed) {
  Pieces pieces(packed);
  const Weights<Storage> weights(pieces, from.shape);
  if (packed != nullptr) {
    pack_pointwise<Storage>(from.expand_weight, from.expand_bias, weights.expand);
    weights.depth.template pack<Storage>(from.depth_weight, from.depth_bias);
    pack_pointwise<Storage>(from.point_weight, from.point_bias, weights.point);
  }
  return pieces.bytes();
}

// How an image is worked through.
template <class E>
struct Plan {
  std::int64_t height, width;          // of the input
  std::int64_t out_height, out_width;  // of the output
  std::int64_t padding;
  std::int64_t chunk;  // hidden channels that a thread expands and filters at once
  std::int64_t group;  // hidden channels between two projections, a multiple of chunk and block

  Plan(const MBConvArgs& args, int num_threads)
      : height(args.height),
        width(args.width),
        out_height(size_after(args.height, args.shape.stride)),
        out_width(size_after(args.width, args.shape.stride)),
        padding(args.shape.kernel / 2) {
    constexpr std::int64_t l2 = 448 << 10, l3 = 8 << 20;
    const std::int64_t hidden = round_up(args.shape.mid_channels);
    chunk = padded_pixels() * 2 * block * size <= l2 ? 2 * block : block;
    const std::int64_t fitting = l3 / (pixels() * size) / chunk * chunk;
    group = least(most(fitting, num_threads * chunk), quotient_up(hidden, chunk) * chunk);
  }

  static constexpr std::int64_t size = sizeof(E);
  std::int64_t padded_width() const { return width + 2 * padding; }
  std::int64_t padded_pixels() const { return (height + 2 * padding) * padded_width(); }
  std::int64_t pixels() const { return out_height * out_width; }
};

// What all threads share, and what each has for itself.
template <class E>
struct SharedRoom {
  Operand<E> input;      // the image
  std::int64_t* places;  // of its pixels in a padded map
  Operand<E> filtered;   // one group of hidden channels
  float* sums;           // [pixels][out_channels], where there are several groups

  SharedRoom(Pieces& pieces, const Plan<E>& plan, const MBConvShape& shape)
      : input{pieces.take<E>(plan.height * plan.width * round_up(shape.in_channels)),
              plan.height * plan.width},
        places(pieces.take<std::int64_t>(plan.height * plan.width)),
        filtered{pieces.take<E>(plan.pixels() * plan.group), plan.pixels()},
        sums(plan.group < shape.mid_channels
                 ? pieces.take<float>(plan.pixels() * round_up(shape.out_channels))
                 : nullptr) {}
};

template <class E>
struct OwnRoom {
  E* expanded;  // [height + 2 padding][width + 2 padding][chunk]
  float* sums;  // of a few rows and one panel

  static constexpr std::int64_t rows = 5 * max_rows<E>;

  OwnRoom(Pieces& pieces, const Plan<E>& plan)
      : expanded(pieces.take<E>(plan.padded_pixels() * plan.chunk)),
        sums(pieces.take<float>((rows + 3) * panel)) {}
};

// Expands hidden channels [first, first + chunk) of the whole image.
template <class Storage, class E>
void expand(const Plan<E>& plan, const Matrix<E>& weights, std::int64_t first,
            const SharedRoom<E>& shared, Activation activation, const OwnRoom<E>& room) {
  const Operand<E>& input = shared.input;
  const std::int64_t end = least(first + plan.chunk, round_up(weights.columns));
  for (std::int64_t row = 0; row < input.rows; row += room.rows) {
    const Operand<E> part{input.elements + row * block, input.rows};
    const auto sink = [&](std::int64_t offset, std::int64_t column, Vec value) {
      put(room.expanded + shared.places[row + offset] * plan.chunk + column - first, value);
    };
    multiply_into<Storage>(part, least(room.rows, input.rows - row), weights, first, end, room.sums,
                           activation, sink);
  }
}

// Filters them into the columns of their group.
template <int kernel, class Storage, class E>
void filter(const Plan<E>& plan, const DepthwiseWeights& weights, std::int64_t stride,
            std::int64_t first, const OwnRoom<E>& room, Activation activation,
            const Operand<E>& filtered) {
  const std::int64_t end = least(first + plan.chunk, round_up(weights.channels));
  const std::int64_t group_first = first / plan.group * plan.group;
  const std::int64_t line_stride = plan.padded_width() * plan.chunk;
  for (std::int64_t c = first; c < end; c += lanes)
    for (std::int64_t y = 0; y < plan.out_height; ++y) {
      E* to = filtered.at(y * plan.out_width, c - group_first);
      filter_row<kernel>(room.expanded + y * stride * line_stride + c - first, line_stride,
                         plan.chunk, stride, plan.out_width, weights, c,
                         [&](std::int64_t x, Vec* values, int count) {
                           activate<Storage>(activation, values, count);
                           for (int i = 0; i < count; ++i) put(to + (x + i) * block, values[i]);
                         });
    }
}

// Adds hidden channels [first, end) to one panel of columns of output rows [row, row + count), and
// writes the output once all are there.
template <class Storage, class E>
void project(const Plan<E>& plan, const SharedRoom<E>& shared, const Matrix<E>& weights,
             std::int64_t first, std::int64_t end, std::int64_t row, std::int64_t count,
             std::int64_t column, float* own_sums, std::int64_t first_pixel,
             const Output<Storage>& output) {
  const bool all = end - first == round_up(weights.rows);
  const std::int64_t sums_stride = all ? panel : round_up(weights.columns);
  float* sums = all ? own_sums : shared.sums + row * sums_stride + column;
  multiply(count, (end - first) / block, shared.filtered.elements + row * block, plan.pixels() * block,
           weights.panel_at(column) + first * panel, sums, sums_stride, first > 0);
  if (end < round_up(weights.rows)) return;
  const Vec bias[2] = {load(weights.bias + column), load(weights.bias + column + lanes)};
  for (std::int64_t i = 0; i < count; ++i)
    for (int half = 0; half < 2; ++half) {
      const Vec sum = load(sums + i * sums_stride + half * lanes);
      output.write(first_pixel + row + i, column + half * lanes, sum + bias[half]);
    }
}

template <class Storage>
void run(const MBConvArgs& args) {
  using E = Element<Storage>;
  const MBConvShape& shape = args.shape;
  if (args.batch == 0) return;
  Pieces packed = pieces_of(args.packed);
  const Weights<Storage> weights(packed, shape);
  const Plan<E> plan(args, args.num_threads);
  const Output<Storage> output{static_cast<Storage*>(args.y),
                               static_cast<const Storage*>(args.residual), shape.out_channels};

  Pieces shared_pieces, own_pieces;
  const SharedRoom<E> counted_shared(shared_pieces, plan, shape);
  const OwnRoom<E> counted_own(own_pieces, plan);
  char* memory = scratch(shared_pieces.bytes() + args.num_threads * own_pieces.bytes());
  Pieces pieces(memory);
  const SharedRoom<E> shared(pieces, plan, shape);

  const std::int64_t hidden = round_up(shape.mid_channels);
  const std::int64_t in_pixels = plan.height * plan.width, out_pixels = plan.pixels();
  const std::int64_t row_tasks = quotient_up(out_pixels, OwnRoom<E>::rows);
  const std::int64_t columns_at_once = 2 * panel;
  const std::int64_t column_tasks = quotient_up(round_up(shape.out_channels), columns_at_once);
  const std::int64_t operations = args.batch * in_pixels * shape.in_channels * shape.mid_channels;

  parallel(args.num_threads, operations, [&](int member) {
    Pieces own(memory + shared_pieces.bytes() + member * own_pieces.bytes());
    const OwnRoom<E> room(own, plan);
    // The padding is written once; only what lies inside changes.
    for (std::int64_t i = 0; i < plan.padded_pixels() * plan.chunk; ++i) room.expanded[i] = E{};
    for (std::int64_t image = 0; image < args.batch; ++image) {
      const Storage* in = static_cast<const Storage*>(args.x) + image * in_pixels * shape.in_channels;
      for_each(plan.height, [&](std::int64_t line) {
        for (std::int64_t x = 0; x < plan.width; ++x) {
          const std::int64_t row = line * plan.width + x;
          shared.places[row] = (line + plan.padding) * plan.padded_width() + x + plan.padding;
          copy(in + row * shape.in_channels, shape.in_channels, shared.input, row, 0);
          copy<Storage>(nullptr, round_up(shape.in_channels) - shape.in_channels, shared.input, row,
                        shape.in_channels);
        }
      });
      for (std::int64_t group = 0; group < hidden; group += plan.group) {
        const std::int64_t group_end = least(group + plan.group, hidden);
        for_each(quotient_up(group_end - group, plan.chunk), [&](std::int64_t task) {
          const std::int64_t first = group + task * plan.chunk;
          expand<Storage>(plan, weights.expand, first, shared, args.activation, room);
          if (shape.kernel == 3)
            filter<3, Storage>(plan, weights.depth, shape.stride, first, room, args.activation,
                               shared.filtered);
          else
            filter<0, Storage>(plan, weights.depth, shape.stride, first, room, args.activation,
                               shared.filtered);
        });
        for_each(row_tasks * column_tasks, [&](std::int64_t task) {
          const std::int64_t row = task / column_tasks * room.rows;
          const std::int64_t count = least(room.rows, out_pixels - row);
          const std::int64_t begin = task % column_tasks * columns_at_once;
          const std::int64_t end = least(begin + columns_at_once, round_up(shape.out_channels));
          for (std::int64_t column = begin; column < end; column += panel)
            project(plan, shared, weights.point, group, group_end, row, count, column, room.sums,
                    image * out_pixels, output);
        });
      }
    }
  });
}

}  // namespace

std::int64_t mbconv_pack(const MBConvWeights& weights, void* packed) {
  switch (weights.dtype) {
    case DType::float16: return pack<Float16>(weights, packed);
    case DType::bfloat16: return pack<BFloat16>(weights, packed);
    default: return pack<float>(weights, packed);
  }
}

void mbconv(const MBConvArgs& args) {
  switch (args.dtype) {
    case DType::float16: return run<Float16>(args);
    case DType::bfloat16: return run<BFloat16>(args);
    default: return run<float>(args);
  }
}

}  // namespace evsam::EVSAM_ISA
