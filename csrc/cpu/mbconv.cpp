// MBConv (arXiv 1801.04381) without the expanded map ever in main memory.
//
// Layout: NHWC. Tile: a whole image and a few hidden channels for each thread: they are expanded into a
// padded map that stays in L2, filtered from there, and written as the left operand of the projection.
// So nothing is computed twice, as it would be along the edges of spatial tiles. When enough hidden
// channels are there to fill L3, all threads project them, adding to sums of the output. In float32 both
// products are done as strassen.h says: what a pixel loses to rounding errors of its neighbour is no more
// than those that the convolution between the two mixes.
// Main memory: x, residual and y once, weights once an image; the filtered channels once and back (past L3
// where send() goes there); the sums go to L3 and back.

#include "evsam/mbconv.h"

#include "activation.h"
#include "depthwise.h"
#include "map.h"
#include "parallel.h"
#include "point_weights.h"
#include "scratch.h"
#include "strassen.h"

namespace evsam::EVSAM_ISA {
namespace {

template <class Storage>
struct Weights {
  PointWeights<Storage> expand;
  DepthwiseWeights depth;
  PointWeights<Storage> point;

  // The weights of the 1x1 convolutions are null where they do not stay.
  Weights(Pieces& pieces, const MBConvShape& shape, const void* expand_weight,
          const void* point_weight)
      : expand(pieces, shape.in_channels, shape.mid_channels, expand_weight),
        depth(pieces, shape.mid_channels, shape.kernel),
        point(pieces, shape.mid_channels, shape.out_channels, point_weight) {}
};

template <class Storage>
std::int64_t pack(const MBConvWeights& from, void* packed) {
  Pieces pieces(packed);
  const Weights<Storage> weights(pieces, from.shape, from.stay ? from.expand_weight : nullptr,
                                 from.stay ? from.point_weight : nullptr);
  if (packed != nullptr) {
    weights.expand.pack(from.expand_weight, from.expand_bias);
    weights.depth.template pack<Storage>(from.depth_weight, from.depth_bias,
                                         headroom<Element<Storage>>);
    weights.point.pack(from.point_weight, from.point_bias);
  }
  return pieces.bytes();
}

inline std::int64_t input_blocks(const MBConvShape& shape) { return blocks_of(shape.in_channels); }

// How an image is worked through.
template <class E>
struct Plan {
  static constexpr std::int64_t chunk = 2 * block;     // hidden channels of a task
  static constexpr std::int64_t rows = 16 * max_rows;  // of a product of the expansion
  // Hidden channels of a thread beside whose products it is nothing to read the image: less than to write
  // lines that other cores hold, where these are far.
  static constexpr std::int64_t worth_reading = 512;
  std::int64_t height, width;          // of the input
  std::int64_t out_height, out_width;  // of the output
  std::int64_t kernel, stride, padding;
  int num_threads;
  std::int64_t lines;  // of the output that are filtered at once
  std::int64_t group;  // hidden channels between two projections
  bool transposed;  // whether the weights of the expansion are
  bool in_forms;    // of the image and of the weights, whether the expansion is a product of such
  bool own_input;   // whether every thread reads the image for itself
  ProductTasks<E> projection;

  Plan(const MBConvArgs& args, bool transposed)
      : height(args.height),
        width(args.width),
        out_height(size_after(args.height, args.shape.stride)),
        out_width(size_after(args.width, args.shape.stride)),
        kernel(args.shape.kernel),
        stride(args.shape.stride),
        padding(args.shape.kernel / 2),
        num_threads(args.num_threads),
        transposed(transposed),
        in_forms(same<E, float> && transposed && gains_by_forms(height, width)),
        own_input(args.shape.mid_channels >= worth_reading * args.num_threads),
        projection(out_height * out_width, round_up(args.shape.out_channels), args.num_threads) {
    constexpr std::int64_t l2 = 192 << 10, l3 = 8 << 20, size = sizeof(E);
    const std::int64_t line = padded_width() * chunk * size;
    lines = least(most((l2 / line - kernel) / stride + 1, 1), out_height);
    const std::int64_t hidden = quotient_up(args.shape.mid_channels, chunk) * chunk;
    const std::int64_t fitting = l3 / (pixels() * size) / chunk * chunk;
    // By shape alone: the order of the sums follows from it.
    group = least(most(fitting, 16 * chunk), hidden);
  }

  std::int64_t padded_width() const { return width + 2 * padding; }
  std::int64_t padded_lines() const { return (lines - 1) * stride + kernel; }
  std::int64_t in_pixels() const { return height * width; }
  std::int64_t pixels() const { return out_height * out_width; }
  // Whether pixels that share a form are neighbours that the depthwise convolution mixes, and so many that they are
  // worth the forms of the weights. What becomes of few differs more from what is to be expected, too.
  bool gains_by_forms(std::int64_t lines, std::int64_t line) const {
    return line % 2 == 0 && kernel > stride && lines * line >= 128;
  }
};

// An image as the left operand of the expansion.
template <class E>
struct Input {
  Operand<E> rows;       // or
  LeftForms forms;       // of them
  std::int64_t* places;  // of pixels in a padded image

  Input(Pieces& pieces, const Plan<E>& plan, const MBConvShape& shape)
      : rows{pieces.take<E>(plan.in_forms ? 0 : plan.in_pixels() * round_up(shape.in_channels)),
             plan.in_pixels()},
        forms(pieces, plan.in_forms ? plan.in_pixels() : 0, input_blocks(shape)),
        places(pieces.take<std::int64_t>(plan.in_pixels())) {}

  // Takes in line y of an image of so many channels.
  template <class Storage>
  void read(const Plan<E>& plan, const Storage* image, std::int64_t channels, std::int64_t y) const {
    for (std::int64_t x = 0; x < plan.width; ++x) {
      const std::int64_t row = y * plan.width + x;
      places[row] = (y + plan.padding) * plan.padded_width() + x + plan.padding;
      if (!plan.in_forms) copy_row(image + row * channels, channels, rows, row);
    }
    if (plan.in_forms)
      forms.write(image, channels, block, y * plan.width / 2, (y + 1) * plan.width / 2);
  }
};

// What all threads share, and what each has for itself.
template <class E>
struct SharedRoom {
  Operand<E> filtered;  // one group of hidden channels
  float* sums;          // [pixels][sums_stride], where there are several groups
  std::int64_t sums_stride;

  SharedRoom(Pieces& pieces, const Plan<E>& plan, const MBConvShape& shape)
      : filtered{pieces.take<E>(plan.pixels() * plan.group), plan.pixels()},
        sums(nullptr),
        sums_stride(Sums::stride(round_up(shape.out_channels))) {
    if (plan.group < shape.mid_channels) sums = pieces.take<float>(plan.pixels() * sums_stride);
  }
};

template <class E>
struct OwnRoom {
  static constexpr std::int64_t pairs = Plan<E>::chunk / (2 * panel);  // of panels

  E* expanded;      // [padded_lines][padded_width][chunk]
  E* right[pairs];  // of the expansion's weights, where these are transposed: forms or panels
  FormsRoom<E> projection;
  Sums sums;

  OwnRoom(Pieces& pieces, const Plan<E>& plan, const MBConvShape& shape)
      : expanded(pieces.take<E>(plan.padded_lines() * plan.padded_width() * plan.chunk)),
        projection(pieces,
                   plan.gains_by_forms(plan.out_height, plan.out_width) ? plan.projection.rows_at_once : 0),
        sums(pieces, most(plan.rows, plan.projection.rows_at_once)) {
    for (E*& pair : right) pair = take_right<E>(pieces, plan.transposed ? input_blocks(shape) : 0);
  }
};

// `count` pixels from `row` on times columns [first, end) of the expansion's weights, which the room holds. The
// columns that this thread is to multiply next are likely so many `after` these.
template <class Storage, class E>
void multiply_transposed(const Plan<E>& plan, const PointWeights<Storage>& weights, std::int64_t first,
                         std::int64_t end, std::int64_t after, std::int64_t row, std::int64_t count,
                         const Input<E>& input, const OwnRoom<E>& room) {
  const std::int64_t stride = Sums::stride(end - first), blocks = weights.matrix.blocks();
  for (std::int64_t column = first, i = 0; column < end; column += 2 * panel, ++i) {
    float* sums = room.sums.elements + column - first;
    const Ahead<E, Storage> ahead{weights.from(0, column + after), 2 * panel, blocks};
    if constexpr (same<E, float>) {
      if (plan.in_forms) {
        multiply(input.forms, row / 2, count / 2, RightForms(room.right[i], blocks), sums, stride, false,
                 ahead);
        continue;
      }
    }
    multiply(count, 2 * panel, blocks, input.rows.from(row).elements, input.rows.stride(), room.right[i], sums,
             stride, false, ahead);
  }
}

// Expands hidden channels [first, end) of lines [begin, stop) of the padded image. `expanded` holds lines
// from `base` on.
template <class Storage, class E>
void expand(const Plan<E>& plan, const PointWeights<Storage>& weights, std::int64_t first, std::int64_t end,
            std::int64_t base, std::int64_t begin, std::int64_t stop, const Input<E>& input,
            Activation activation, const OwnRoom<E>& room) {
  const std::int64_t line = plan.padded_width() * plan.chunk;
  const std::int64_t top = plan.padding, bottom = plan.padding + plan.height;
  for (std::int64_t y = begin; y < stop; ++y)
    if (y < top || y >= bottom)
      for (std::int64_t i = 0; i < line; ++i) room.expanded[(y - base) * line + i] = E{};
  const std::int64_t last = (least(stop, bottom) - top) * plan.width;
  for (std::int64_t row = (most(begin, top) - top) * plan.width; row < last; row += plan.rows) {
    const auto sink = [&](std::int64_t offset) {
      const std::int64_t place = input.places[row + offset] - base * plan.padded_width();
      E* to = room.expanded + place * plan.chunk - first;
      return [to](std::int64_t column, Vec value) { put(to + column, value); };
    };
    const std::int64_t count = least(plan.rows, last - row);
    if (plan.transposed) {
      const std::int64_t after = plan.num_threads * plan.chunk;
      multiply_transposed(plan, weights, first, end, end + after <= weights.matrix.columns ? after : 0, row,
                          count, input, room);
      with_activation<Storage>(activation, [&](const auto& activate) {
        pass_on(room.sums.elements, Sums::stride(end - first), count, first, end - first, weights.matrix,
                activate, sink);
      });
      continue;
    }
    multiply_into<Storage>(input.rows.from(row), count, weights.matrix, first, end, room.sums, activation,
                           sink);
  }
}

// Filters lines [y, stop) of the output into the columns of their group.
template <int kernel, class Storage, class E>
void filter(const Plan<E>& plan, const DepthwiseWeights& weights, std::int64_t first,
            std::int64_t end, std::int64_t y, std::int64_t stop, const OwnRoom<E>& room,
            Activation activation, const Operand<E>& filtered) {
  const std::int64_t group_first = first / plan.group * plan.group;
  const std::int64_t line = plan.padded_width() * plan.chunk;
  with_activation<Storage>(activation, [&](const auto& activate) {
    for (std::int64_t c = first; c < end; c += lanes) {
      const E* from = room.expanded + c - first;
      for (std::int64_t out = y; out < stop; ++out, from += plan.stride * line) {
        E* to = filtered.at(out * plan.out_width, c - group_first);
        filter_row<kernel>(
            from, line, plan.chunk, plan.stride, plan.out_width, weights, c,
            [&](std::int64_t x, Vec value) { send_element(to + x * block, activate(value)); });
      }
    }
  });
}

// Expands and filters hidden channels [first, end) of the whole image, some lines at a time. Lines that
// the next ones need too are kept.
template <class Storage, class E>
void expand_and_filter(const Plan<E>& plan, const Weights<Storage>& weights, std::int64_t first,
                       std::int64_t end, const Input<E>& input, const Operand<E>& filtered,
                       Activation activation, const OwnRoom<E>& room) {
  const std::int64_t line = plan.padded_width() * plan.chunk;
  if (plan.transposed)
    for (std::int64_t column = first, i = 0; column < end; column += 2 * panel, ++i) {
      const Transposed<Storage> from = weights.expand.from(0, column);
      const std::int64_t blocks = weights.expand.matrix.blocks();
      if constexpr (same<E, float>) {
        if (plan.in_forms) {
          RightForms(room.right[i], blocks).write(from);
          continue;
        }
      }
      write_panels(from, 2 * panel, blocks, room.right[i]);
    }
  std::int64_t base = 0, expanded = 0;
  for (std::int64_t y = 0; y < plan.out_height; y += plan.lines) {
    const std::int64_t stop = least(y + plan.lines, plan.out_height);
    const std::int64_t kept = most(expanded - y * plan.stride, 0) * line;
    const std::int64_t skipped = (y * plan.stride - base) * line;
    for (std::int64_t i = 0; i < kept; ++i) room.expanded[i] = room.expanded[skipped + i];
    base = y * plan.stride;
    const std::int64_t needed = (stop - 1) * plan.stride + plan.kernel;
    expand<Storage>(plan, weights.expand, first, end, base, most(expanded, base), needed, input,
                    activation, room);
    expanded = needed;
    if (plan.kernel == 3)
      filter<3, Storage>(plan, weights.depth, first, end, y, stop, room, activation, filtered);
    else
      filter<0, Storage>(plan, weights.depth, first, end, y, stop, room, activation, filtered);
  }
}

// Adds hidden channels [first, end) to a task's part of the output, and writes it once all are there.
template <class Storage, class E>
void project(const SharedRoom<E>& shared, const PointWeights<Storage>& weights, std::int64_t first,
             std::int64_t end, const typename ProductTasks<E>::Task& task, const OwnRoom<E>& own,
             std::int64_t first_pixel, const Output<Storage>& output) {
  const bool several = shared.sums != nullptr;
  const std::int64_t stride = several ? shared.sums_stride : Sums::stride(Sums::columns);
  float* sums = several ? shared.sums + task.row * stride + task.column : own.sums.elements;
  const std::int64_t rows = task.row_end - task.row, columns = task.column_end - task.column;
  multiply(own.projection, rows, columns, (end - first) / block, shared.filtered.from(task.row), weights, first,
           task.column, sums, stride, first > 0);
  const Matrix<E>& matrix = weights.matrix;
  if (end < round_up(matrix.rows)) return;
  const Vec scale = broadcast(*matrix.scale);
  for (std::int64_t i = 0; i < rows; ++i) {
    const auto line = output.line(first_pixel + task.row + i);
    const float* from = sums + i * stride - task.column;
    for (std::int64_t column = task.column; column < task.column_end; column += 2 * lanes)
      line(column, fma(load(from + column), scale, load(matrix.bias + column)),
           fma(load(from + column + lanes), scale, load(matrix.bias + column + lanes)));
  }
}

template <class Storage>
void run(const MBConvArgs& args) {
  using E = Element<Storage>;
  const MBConvShape& shape = args.shape;
  if (args.batch == 0) return;
  Pieces packed = pieces_of(args.packed);
  const Weights<Storage> weights(packed, shape, args.expand_weight, args.point_weight);
  const Plan<E> plan(args, weights.expand.is_transposed());
  const Output<Storage> output{static_cast<Storage*>(args.y),
                               static_cast<const Storage*>(args.residual), shape.out_channels};

  Pieces shared_pieces, own_pieces;
  const SharedRoom<E> counted_shared(shared_pieces, plan, shape);
  const OwnRoom<E> counted_own(own_pieces, plan, shape);
  const Input<E> counted_input(plan.own_input ? own_pieces : shared_pieces, plan, shape);
  const Scratch memory = scratch(own_pieces.bytes(), args.num_threads, shared_pieces.bytes());
  Pieces pieces(memory.shared);
  const SharedRoom<E> shared(pieces, plan, shape);

  const std::int64_t hidden = round_up(shape.mid_channels);
  const std::int64_t in_pixels = plan.in_pixels(), out_pixels = plan.pixels();
  const std::int64_t operations = args.batch * in_pixels * shape.in_channels * shape.mid_channels;

  parallel(args.num_threads, operations, [&](int member) {
    Pieces own(own_piece(memory, member));
    const OwnRoom<E> room(own, plan, shape);
    Pieces of_all = pieces;
    const Input<E> input(plan.own_input ? own : of_all, plan, shape);
    // What pads a line on both sides stays zero.
    for (std::int64_t i = 0; i < plan.padded_lines() * plan.padded_width() * plan.chunk; ++i)
      room.expanded[i] = E{};
    for (std::int64_t image = 0; image < args.batch; ++image) {
      const Storage* in = static_cast<const Storage*>(args.x) + image * in_pixels * shape.in_channels;
      const auto read = [&](std::int64_t y) { input.read(plan, in, shape.in_channels, y); };
      if (plan.own_input)
        for (std::int64_t y = 0; y < plan.height; ++y) read(y);
      else
        for_each(plan.height, read);
      for (std::int64_t group = 0; group < hidden; group += plan.group) {
        const std::int64_t group_end = least(group + plan.group, hidden);
        for_each(quotient_up(group_end - group, plan.chunk), [&](std::int64_t task) {
          const std::int64_t first = group + task * plan.chunk;
          expand_and_filter(plan, weights, first, least(first + plan.chunk, group_end), input,
                            shared.filtered, args.activation, room);
        });
        for_each(plan.projection.count, [&](std::int64_t task) {
          project(shared, weights.point, group, group_end, plan.projection(task), room,
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
