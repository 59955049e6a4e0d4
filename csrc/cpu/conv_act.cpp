// Convolution with everything that follows it in one pass over the output.
//
// Layout: NHWC, so that a pixel's channels are the row of a matrix product.
// Tile: a 3x3 convolution with stride 1 or 2 of enough channels goes through winograd.h, one of few
// channels through narrow.h, any other through direct.h; one with a channel per group is a sum over
// taps in registers.
// On chip: the transformed or gathered pixels of a tile, and the sums until bias, activation and residual
// are applied. Main memory: x once (the rows between two tiles twice), weights once per tile from L3,
// residual and y once.

#include "evsam/conv_act.h"

#include "activation.h"
#include "depthwise.h"
#include "direct.h"
#include "map.h"
#include "narrow.h"
#include "parallel.h"
#include "scratch.h"
#include "winograd.h"

namespace evsam::EVSAM_ISA {
namespace {

bool is_depthwise(const ConvShape& conv) {
  return conv.groups == conv.in_channels && conv.groups == conv.out_channels && conv.groups > 1;
}

template <class Storage>
std::int64_t pack(const ConvActWeights& from, void* packed) {
  const ConvShape& conv = from.conv;
  Pieces pieces(packed);
  if (is_depthwise(conv)) {
    const DepthwiseWeights weights(pieces, conv.in_channels, conv.kernel);
    if (packed != nullptr) weights.pack<Storage>(from.weight, from.bias);
  } else if (is_narrow(conv)) {
    const NarrowWeights<Storage> weights(pieces, conv);
    if (packed != nullptr) weights.pack(from.weight, from.bias);
  } else if (has_winograd(conv)) {
    with_scheme<Element<Storage>>(conv, [&](auto scheme) {
      const WinogradWeights<decltype(scheme), Storage> weights(pieces, conv.in_channels,
                                                               conv.out_channels);
      if (packed != nullptr) weights.pack(from.weight, from.bias);
    });
  } else {
    const DirectWeights<Storage> weights(pieces, conv);
    if (packed != nullptr) weights.pack(from.weight, from.bias);
    return weights.bytes();
  }
  return pieces.bytes();
}

template <class Scheme, class Storage>
void run_winograd(const ConvActArgs& args, const Map<Storage>& in, const Output<Storage>& output) {
  using Room = WinogradRoom<Scheme, Storage>;
  const ConvShape& conv = args.conv;
  const Tiles<Scheme> tiles(in);
  const std::int64_t at_once = tiles.at_once(max_rows, args.num_threads);
  Pieces counted;
  const Room one(counted, at_once, conv.in_channels);
  const Scratch memory = scratch(counted.bytes(), args.num_threads);

  Pieces packed = pieces_of(args.packed);
  const WinogradWeights<Scheme, Storage> weights(packed, conv.in_channels, conv.out_channels);
  const Runs runs(tiles.count, at_once, args.num_threads);
  const std::int64_t operations = tiles.count * conv.in_channels * conv.out_channels;
  parallel(args.num_threads, operations, [&](int member) {
    Pieces pieces(own_piece(memory, member));
    const Room room(pieces, at_once, conv.in_channels);
    const auto sink = [output, pixels = room.pixels](std::int64_t row) {
      return output.line(pixels[row]);
    };
    for_each(runs.size(), [&](std::int64_t run) {
      const std::int64_t first = runs.begin(run), count = runs.end(run) - first;
      convolve_tiles<Scheme>(in, weights, tiles, first, count, room, args.activation, sink);
    });
  });
}

template <class Storage>
void run_direct(const ConvActArgs& args, const Map<Storage>& in, const Output<Storage>& output) {
  using E = Element<Storage>;
  const ConvShape& conv = args.conv;
  const DirectWeights<Storage> weights(pieces_of(args.packed), conv);
  const std::int64_t pixels = in.batch * size_after(in.height, conv.stride) *
                              size_after(in.width, conv.stride);
  const std::int64_t group_columns = conv.out_channels / conv.groups;
  const std::int64_t operand_columns = weights.group(0).blocks() * block;
  const std::int64_t at_once = pixels_at_once<E>(pixels, operand_columns, args.num_threads);

  struct Room {
    Operand<E> gathered;
    Sums sums;
    Room(Pieces& pieces, std::int64_t rows, std::int64_t columns)
        : gathered{pieces.take<E>(rows * columns), rows},
          sums(pieces, rows) {}
  };
  Pieces counted;
  const Room one(counted, at_once, operand_columns);
  const Scratch memory = scratch(counted.bytes(), args.num_threads);

  const Runs runs(pixels, at_once, args.num_threads);
  const std::int64_t operations = pixels * operand_columns * conv.out_channels;
  parallel(args.num_threads, operations, [&](int member) {
    Pieces pieces(own_piece(memory, member));
    const Room room(pieces, at_once, operand_columns);
    for_each(runs.size() * conv.groups, [&](std::int64_t task) {
      const std::int64_t group = task % conv.groups, run = task / conv.groups;
      const std::int64_t first = runs.begin(run), count = runs.end(run) - first;
      gather(in, conv, group, first, count, room.gathered);
      const auto sink = [=](std::int64_t row) {
        return output.line(first + row, group * group_columns, group_columns);
      };
      const Matrix<E> matrix = weights.group(group);
      if (matrix.blocks() <= most_blocks_in_registers) {
        // The next task of this thread is likely so many later. Of a 1x1 convolution it reads as many pixels.
        const bool is_pointwise = conv.kernel == 1 && conv.stride == 1 && conv.groups == 1;
        const std::int64_t next = (first + args.num_threads * count) * in.channels;
        const std::int64_t size = count * in.channels, all = pixels * in.channels;
        const bool fetches = is_pointwise && next + size <= all;
        multiply_straight_into<Storage>(room.gathered, count, matrix, args.activation, in.x + next,
                                        fetches ? size / cache_line<Storage> : 0, sink);
      } else
        multiply_into<Storage>(room.gathered, count, matrix, 0, round_up(group_columns), room.sums,
                               args.activation, sink);
    });
  });
}

template <class Storage>
void run_narrow(const ConvActArgs& args, const Map<Storage>& in, const Output<Storage>& output) {
  const ConvShape& conv = args.conv;
  Pieces packed = pieces_of(args.packed);
  const NarrowWeights<Storage> weights(packed, conv);
  Pieces counted;
  const NarrowRoom one(counted, conv, in.width);
  const Scratch memory = scratch(counted.bytes(), args.num_threads);
  const std::int64_t height = size_after(in.height, conv.stride);
  const std::int64_t width = size_after(in.width, conv.stride);
  const std::int64_t lines = in.batch * height;
  const std::int64_t operations = lines * width * weights.matrix.rows * conv.out_channels;
  parallel(args.num_threads, operations, [&](int member) {
    Pieces pieces(own_piece(memory, member));
    const NarrowRoom room(pieces, conv, in.width);
    for_each(lines, [&](std::int64_t line) {
      convolve_line(in, line / height, line % height, weights, room, args.activation,
                    [&](std::int64_t x) { return output.line(line * width + x); });
    });
  });
}

template <class Storage>
void run_depthwise(const ConvActArgs& args, const Map<Storage>& in, const Output<Storage>& output) {
  const ConvShape& conv = args.conv;
  Pieces packed = pieces_of(args.packed);
  const DepthwiseWeights weights(packed, conv.in_channels, conv.kernel);
  const std::int64_t height = size_after(in.height, conv.stride);
  const std::int64_t width = size_after(in.width, conv.stride);
  const std::int64_t padding = conv.kernel / 2 * conv.dilation;
  const std::int64_t lines = in.batch * height;
  const std::int64_t operations = lines * width * in.channels * conv.kernel * conv.kernel;
  parallel(args.num_threads, operations, [&](int) {
    for_each(lines, [&](std::int64_t line) {
      const std::int64_t image = line / height, top = line % height * conv.stride - padding;
      for (std::int64_t x = 0; x < width; ++x)
        for (std::int64_t c = 0; c < in.channels; c += lanes) {
          Vec value = load(weights.bias + c);
          for (std::int64_t tap = 0; tap < conv.kernel * conv.kernel; ++tap) {
            const std::int64_t in_y = top + tap / conv.kernel * conv.dilation;
            const std::int64_t in_x = x * conv.stride - padding + tap % conv.kernel * conv.dilation;
            if (in_y < 0 || in_y >= in.height || in_x < 0 || in_x >= in.width) continue;
            const std::int64_t pixel = (image * in.height + in_y) * in.width + in_x;
            const Vec weight = load(weights.taps + tap * round_up(in.channels) + c);
            value = fma(load(in.x + pixel * in.channels + c, in.channels - c), weight, value);
          }
          value = AnyActivation<Storage>{args.activation}(value);
          output.line(line * width + x)(c, value);
        }
    });
  });
}

template <class Storage>
void run(const ConvActArgs& args) {
  const ConvShape& conv = args.conv;
  const Map<Storage> in{static_cast<const Storage*>(args.x), args.batch, args.height, args.width,
                        conv.in_channels};
  const Output<Storage> output{static_cast<Storage*>(args.y),
                               static_cast<const Storage*>(args.residual), conv.out_channels};
  if (in.batch == 0) return;
  if (is_depthwise(conv)) return run_depthwise(args, in, output);
  if (is_narrow(conv)) return run_narrow(args, in, output);
  if (!has_winograd(conv)) return run_direct(args, in, output);
  with_scheme<Element<Storage>>(conv, [&](auto scheme) {
    run_winograd<decltype(scheme)>(args, in, output);
  });
}

}  // namespace

std::int64_t conv_act_pack(const ConvActWeights& weights, void* packed) {
  switch (weights.dtype) {
    case DType::float16: return pack<Float16>(weights, packed);
    case DType::bfloat16: return pack<BFloat16>(weights, packed);
    default: return pack<float>(weights, packed);
  }
}

void conv_act(const ConvActArgs& args) {
  switch (args.dtype) {
    case DType::float16: return run<Float16>(args);
    case DType::bfloat16: return run<BFloat16>(args);
    default: return run<float>(args);
  }
}

}  // namespace evsam::EVSAM_ISA
