// The LiteMLA block (EfficientViT, arXiv 2205.14756, figure 2) on one image after another.
//
// Layout: NHWC. A head at a time for each thread: its q, k and v, float32; then for every scale these are
// aggregated (depthwise, then 1x1 within the head), attended and written as the left operand of the
// projection. Where that leaves threads idle, q, k and v of all heads come first, then one head of one scale
// for each thread. The projection follows when all heads are there.
// On chip: a head's q, k and v in L2, its state in L1; the attention's output goes to L3 and back.
// Main memory: x, residual and y once, weights once an image.

#include "evsam/multi_scale_attention.h"

#include "attention.h"
#include "depthwise.h"
#include "map.h"
#include "parallel.h"
#include "point_weights.h"
#include "scratch.h"

namespace evsam::EVSAM_ISA {
namespace {

std::int64_t qkv_width(const MultiScaleAttentionShape& shape) {
  return shape.heads * 3 * shape.head_dim;
}

// A scale's weights for one of q, k and v of one head.
template <class Storage>
struct GroupWeights {
  DepthwiseWeights depth;
  Matrix<float> point;

  GroupWeights(Pieces& pieces, std::int64_t head_dim, std::int64_t kernel)
      : depth(pieces, head_dim, kernel), point(pieces, head_dim, head_dim) {}
};

template <class Storage>
struct Weights {
  PointWeights<Storage> qkv;
  Matrix<Element<Storage>> proj;
  Pieces scales;  // the groups of every scale

  // qkv_weight is null where it does not stay.
  Weights(Pieces& pieces, const MultiScaleAttentionShape& shape, const void* qkv_weight)
      : qkv(pieces, shape.in_channels, qkv_width(shape), qkv_weight),
        proj(pieces, (1 + shape.scales) * shape.heads * shape.head_dim, shape.out_channels),
        scales(pieces) {
    for (std::int64_t s = 0; s < shape.scales; ++s)
      pieces.take<char>(group_bytes(shape, s) * 3 * shape.heads);
  }

  static std::int64_t group_bytes(const MultiScaleAttentionShape& shape, std::int64_t scale) {
    Pieces counted;
    const GroupWeights<Storage> one(counted, shape.head_dim, shape.kernels[scale]);
    return counted.bytes();
  }

  GroupWeights<Storage> group(const MultiScaleAttentionShape& shape, std::int64_t scale,
                              std::int64_t index) const {
    Pieces pieces = scales;
    for (std::int64_t s = 0; s < scale; ++s)
      pieces.take<char>(group_bytes(shape, s) * 3 * shape.heads);
    pieces.take<char>(group_bytes(shape, scale) * index);
    return GroupWeights<Storage>(pieces, shape.head_dim, shape.kernels[scale]);
  }
};

// The part of a vector or matrix from row `first` on; null stays null.
template <class Storage>
const void* part(const void* from, std::int64_t first, std::int64_t row) {
  return from == nullptr ? nullptr : static_cast<const Storage*>(from) + first * row;
}

template <class Storage>
std::int64_t pack(const MultiScaleAttentionWeights& from, void* packed) {
  const MultiScaleAttentionShape& shape = from.shape;
  Pieces pieces(packed);
  const Weights<Storage> weights(pieces, shape, from.stay ? from.qkv_weight : nullptr);
  if (packed == nullptr) return pieces.bytes();
  weights.qkv.pack(from.qkv_weight, from.qkv_bias);
  pack_pointwise<Storage>(from.proj_weight, from.proj_bias, weights.proj);
  const std::int64_t dim = shape.head_dim;
  for (std::int64_t s = 0; s < shape.scales; ++s)
    for (std::int64_t g = 0; g < 3 * shape.heads; ++g) {
      const GroupWeights<Storage> group = weights.group(shape, s, g);
      const std::int64_t first = g * dim, taps = shape.kernels[s] * shape.kernels[s];
      group.depth.template pack<Storage>(part<Storage>(from.depth_weights[s], first, taps),
                                         part<Storage>(from.depth_biases[s], first, 1));
      pack_pointwise<Storage>(part<Storage>(from.group_weights[s], first, dim),
                              part<Storage>(from.group_biases[s], first, 1), group.point);
    }
  return pieces.bytes();
}

// Whether a thread takes whole heads: where enough of them are there for all threads, and the columns of one
// are whole panels.
bool takes_heads(const MultiScaleAttentionArgs& args) {
  const std::int64_t heads = args.shape.heads;
  return (heads % args.num_threads == 0 || heads >= 8 * args.num_threads) &&
         3 * args.shape.head_dim % panel == 0;
}

// q, k and v, of one head or of all.
struct Qkv {
  float* elements;  // [pixels][width], and a vector more
  std::int64_t width;

  Qkv(Pieces& pieces, std::int64_t pixels, std::int64_t width)
      : elements(pieces.take<float>(width > 0 ? pixels * width + lanes : 0)), width(width) {}

  Output<float, true> output() const { return {elements, nullptr, width}; }
};

// The image.
template <class E>
struct Input : Operand<E> {
  Input(Pieces& pieces, const MultiScaleAttentionArgs& args)
      : Operand<E>{pieces.take<E>(args.height * args.width * round_up(args.shape.in_channels)),
                   args.height * args.width} {}

  // Whether every thread reads it for itself: little beside the columns of its products, and less than to write lines
  // that other cores hold, where these are far. Of bfloat16 there are half as many, and to read them is more work.
  static bool is_own(const MultiScaleAttentionArgs& args) {
    return same<E, float> && qkv_width(args.shape) >= 512 * args.num_threads;
  }
};

template <class E>
struct SharedRoom {
  Qkv qkv;  // unless threads take heads
  Operand<E> attended;

  SharedRoom(Pieces& pieces, const MultiScaleAttentionArgs& args)
      : qkv(pieces, args.height * args.width, takes_heads(args) ? 0 : qkv_width(args.shape)),
        attended{pieces.take<E>(args.height * args.width *
                                round_up((1 + args.shape.scales) * args.shape.heads *
                                         args.shape.head_dim)),
                 args.height * args.width} {}
};

template <class E>
struct OwnRoom {
  static constexpr std::int64_t aggregated_rows = 3 * max_rows;  // of a product

  Sums sums;
  FormsRoom<E> projection;  // to q, k and v
  Qkv qkv;                  // of a head, if threads take these
  Head head;
  float* padded;            // [height + 2 padding][width + 2 padding][head_dim rounded up]
  Operand<float> filtered;  // [pixels][head_dim]

  OwnRoom(Pieces& pieces, const MultiScaleAttentionArgs& args, std::int64_t rows)
      : sums(pieces, most(rows, aggregated_rows)),
        projection(pieces, 0),
        qkv(pieces, args.height * args.width, takes_heads(args) ? 3 * args.shape.head_dim : 0),
        head(pieces, args.height * args.width, args.shape.head_dim),
        padded(pieces.take<float>(largest_padded(args) * round_up(args.shape.head_dim))),
        filtered{pieces.take<float>(args.height * args.width * round_up(args.shape.head_dim)),
                 args.height * args.width} {}

  static std::int64_t largest_padded(const MultiScaleAttentionArgs& args) {
    std::int64_t pixels = 0;
    for (std::int64_t s = 0; s < args.shape.scales; ++s) {
      const std::int64_t border = args.shape.kernels[s] / 2 * 2;
      pixels = most(pixels, (args.height + border) * (args.width + border));
    }
    return pixels;
  }
};

// One of q, k and v of a head: the depthwise convolution and the 1x1 convolution of the channels at `qkv`, whose
// pixels are `qkv_width` apart.
template <class Storage, class E>
void aggregate(const MultiScaleAttentionArgs& args, const float* qkv, std::int64_t qkv_width,
               const GroupWeights<Storage>& weights, const OwnRoom<E>& room, float* to) {
  const std::int64_t dim = args.shape.head_dim, columns = round_up(dim);
  const std::int64_t padding = weights.depth.kernel / 2, width = args.width + 2 * padding;
  const std::int64_t height = args.height + 2 * padding;
  for (std::int64_t y = 0; y < height; ++y)
    for (std::int64_t x = 0; x < width; ++x) {
      const bool inside = y >= padding && y < height - padding && x >= padding && x < width - padding;
      const float* from = qkv + ((y - padding) * args.width + x - padding) * qkv_width;
      for (std::int64_t c = 0; c < columns; c += lanes)
        store(room.padded + (y * width + x) * columns + c,
              inside && c < dim ? load(from + c, dim - c) : zero());
    }
  for (std::int64_t c = 0; c < columns; c += lanes)
    for (std::int64_t y = 0; y < args.height; ++y) {
      const auto sink = [&](std::int64_t x, Vec value) {
        room.filtered(y * args.width + x)(c, value);
      };
      const float* from = room.padded + y * width * columns + c;
      if (weights.depth.kernel == 5)
        filter_row<5>(from, width * columns, columns, 1, args.width, weights.depth, c, sink);
      else if (weights.depth.kernel == 3)
        filter_row<3>(from, width * columns, columns, 1, args.width, weights.depth, c, sink);
      else
        filter_row<0>(from, width * columns, columns, 1, args.width, weights.depth, c, sink);
    }
  const std::int64_t head_width = room.head.width;
  for (std::int64_t row = 0; row < room.filtered.rows; row += room.aggregated_rows) {
    const std::int64_t count = least(room.aggregated_rows, room.filtered.rows - row);
    multiply_into<float>(room.filtered.from(row), count, weights.point, 0, least(head_width, columns), room.sums,
                         Activation::none,
                         [&](std::int64_t offset) {
                           float* line = to + (row + offset) * head_width;
                           return [line](std::int64_t column, Vec value) {
                             store(line + column, value);
                           };
                         });
  }
}

// q, k and v of a task's pixels and columns, the first of which is column `first` of the result. The product is not
// made in forms: attention does not depend on how large a pixel's q is, which may be far smaller than its neighbour's.
template <class Storage, class E>
void project_qkv(const Operand<E>& input, const PointWeights<Storage>& weights,
                 const typename ProductTasks<E>::Task& task, std::int64_t first, const OwnRoom<E>& room,
                 const Qkv& qkv) {
  const Output<float, true> output = qkv.output();
  multiply_into(room.projection, input.from(task.row), task.row_end - task.row, weights, task.column,
                task.column_end, room.sums, Activation::none, [&](std::int64_t i) {
                  const auto line = output.line(task.row + i);
                  return [line, first](std::int64_t column, Vec value) { line(column - first, value); };
                });
}

// One head of one scale, the first being qkv itself: aggregated, attended, and written to columns of `attended`.
// The head's q, k and v begin at column `begin` of qkv.
template <class Storage, class E>
void attend_head(const MultiScaleAttentionArgs& args, const Weights<Storage>& weights, const Qkv& qkv,
                 std::int64_t begin, std::int64_t scale, std::int64_t index, const OwnRoom<E>& room,
                 const Operand<E>& attended) {
  const MultiScaleAttentionShape& shape = args.shape;
  const std::int64_t dim = shape.head_dim, pixels = args.height * args.width;
  const std::int64_t columns = (1 + shape.scales) * shape.heads * dim;
  const Head& head = room.head;
  float* const parts[3] = {head.q, head.k, head.v};
  for (std::int64_t p = 0; p < 3; ++p) {
    const float* from = qkv.elements + begin + p * dim;
    if (scale > 0) {
      aggregate(args, from, qkv.width, weights.group(shape, scale - 1, index * 3 + p), room, parts[p]);
      continue;
    }
    for (std::int64_t n = 0; n < pixels; ++n)
      for (std::int64_t d = 0; d < head.width; d += lanes)
        store(parts[p] + n * head.width + d,
              d < dim ? load(from + n * qkv.width + d, dim - d) : zero());
  }
  const std::int64_t first = (scale * shape.heads + index) * dim;
  attend(head, static_cast<float>(args.eps), [&](std::int64_t token) {
    return [&, token](std::int64_t column, Vec value) {
      // Vectors of other heads' lengths do not lie within one block.
      if (dim % lanes == 0 && column < dim) return attended(token)(first + column, value);
      float values[lanes];
      store(values, value);
      for (std::int64_t i = 0; i < least(lanes, dim - column); ++i)
        copy(values + i, 1, attended, token, first + column + i);
    };
  });
  if (first + dim == columns)
    for (std::int64_t n = 0; n < pixels; ++n)
      copy<float>(nullptr, round_up(columns) - columns, attended, n, columns);
}

template <class Storage>
void run(const MultiScaleAttentionArgs& args) {
  using E = Element<Storage>;
  using Tasks = ProductTasks<E>;
  const MultiScaleAttentionShape& shape = args.shape;
  if (args.batch == 0) return;
  Pieces packed = pieces_of(args.packed);
  const Weights<Storage> weights(packed, shape, args.qkv_weight);
  const std::int64_t width = qkv_width(shape), of_head = 3 * shape.head_dim;
  const std::int64_t pixels = args.height * args.width;
  const Output<Storage> output{static_cast<Storage*>(args.y),
                               static_cast<const Storage*>(args.residual), shape.out_channels};

  const Tasks qkv_tasks(pixels, round_up(width), args.num_threads);
  const Tasks proj_tasks(pixels, round_up(shape.out_channels), args.num_threads);
  const std::int64_t rows = most(qkv_tasks.rows_at_once, proj_tasks.rows_at_once);

  Pieces shared_counted, own_counted;
  const SharedRoom<E> counted_shared(shared_counted, args);
  const OwnRoom<E> counted_own(own_counted, args, rows);
  const bool own_input = Input<E>::is_own(args);
  const Input<E> counted_input(own_input ? own_counted : shared_counted, args);
  const Scratch memory = scratch(own_counted.bytes(), args.num_threads, shared_counted.bytes());
  Pieces shared_pieces(memory.shared);
  const SharedRoom<E> shared(shared_pieces, args);

  const std::int64_t operations = args.batch * pixels * shape.in_channels * width;
  parallel(args.num_threads, operations, [&](int member) {
    Pieces pieces(own_piece(memory, member));
    const OwnRoom<E> room(pieces, args, rows);
    Pieces of_all = shared_pieces;
    const Input<E> input(own_input ? pieces : of_all, args);
    for (std::int64_t image = 0; image < args.batch; ++image) {
      const Storage* x =
          static_cast<const Storage*>(args.x) + image * pixels * shape.in_channels;
      const auto read = [&](std::int64_t y) {
        for (std::int64_t pixel = y * args.width; pixel < (y + 1) * args.width; ++pixel)
          copy_row(x + pixel * shape.in_channels, shape.in_channels, input, pixel);
      };
      if (own_input)
        for (std::int64_t y = 0; y < args.height; ++y) read(y);
      else
        for_each(args.height, read);
      if (takes_heads(args)) {
        for_each(shape.heads, [&](std::int64_t index) {
          const std::int64_t begin = index * of_head;
          for (std::int64_t row = 0; row < pixels; row += rows)
            project_qkv<Storage>(input, weights.qkv,
                                 {row, least(row + rows, pixels), begin, begin + of_head}, begin, room,
                                 room.qkv);
          for (std::int64_t scale = 0; scale <= shape.scales; ++scale)
            attend_head(args, weights, room.qkv, 0, scale, index, room, shared.attended);
        });
      } else {
        for_each(qkv_tasks.count, [&](std::int64_t index) {
          project_qkv<Storage>(input, weights.qkv, qkv_tasks(index), 0, room, shared.qkv);
        });
        // The scales that cost most come first, so that threads end together.
        for_each((1 + shape.scales) * shape.heads, [&](std::int64_t task) {
          const std::int64_t scale = shape.scales - task / shape.heads, index = task % shape.heads;
          attend_head(args, weights, shared.qkv, index * of_head, scale, index, room, shared.attended);
        });
      }
      for_each(proj_tasks.count, [&](std::int64_t index) {
        const auto task = proj_tasks(index);
        multiply_into<Storage>(shared.attended.from(task.row), task.row_end - task.row, weights.proj,
                               task.column, task.column_end, room.sums, Activation::none,
                               [&](std::int64_t i) {
                                 return output.line(image * pixels + task.row + i);
                               });
      });
    }
  });
}

}  // namespace

std::int64_t multi_scale_attention_pack(const MultiScaleAttentionWeights& weights, void* packed) {
  switch (weights.dtype) {
    case DType::float16: return pack<Float16>(weights, packed);
    case DType::bfloat16: return pack<BFloat16>(weights, packed);
    default: return pack<float>(weights, packed);
  }
}

void multi_scale_attention(const MultiScaleAttentionArgs& args) {
  switch (args.dtype) {
    case DType::float16: return run<Float16>(args);
    case DType::bfloat16: return run<BFloat16>(args);
    default: return run<float>(args);
  }
}

}  // namespace evsam::EVSAM_ISA
