// FusedMBConv (arXiv 2104.00298) in one pass: the expanded tensor never leaves L2.
//
// Layout: NHWC. Tile: as many output pixels as fit L2 together with their expanded channels. The first
// convolution writes these as the left operand of the 1x1 convolution, which follows at once; 3x3 with
// stride 1 and 2 goes through winograd.h, anything else through direct.h.
// Main memory: x once (the rows between two tiles twice), residual and y once; weights once per tile,
// from L3.

#include "evsam/fused_mbconv.h"

#include "direct.h"
#include "map.h"
#include "parallel.h"
#include "scratch.h"
#include "winograd.h"

namespace evsam::EVSAM_ISA {
namespace {

ConvShape spatial_shape(const FusedMBConvShape& shape) {
  return {shape.in_channels, shape.mid_channels, shape.kernel, shape.stride, 1, 1};
}

template <class E, class Use>
auto with_scheme_of(const FusedMBConvShape& shape, const Use& use) {
  const ConvShape conv = spatial_shape(shape);
  return shape.large_maps ? with_larger_scheme<E>(conv, use) : with_scheme<E>(conv, use);
}

template <class Scheme, class Storage>
std::int64_t pack_winograd(const FusedMBConvWeights& from, void* packed) {
  const FusedMBConvShape& shape = from.shape;
  Pieces pieces(packed);
  const Matrix<Element<Storage>> point(pieces, shape.mid_channels, shape.out_channels);
  const WinogradWeights<Scheme, Storage> spatial(pieces, shape.in_channels, shape.mid_channels);
  if (packed != nullptr) {
    pack_pointwise<Storage>(from.point_weight, from.point_bias, point);
    spatial.pack(from.spatial_weight, from.spatial_bias);
  }
  return pieces.bytes();
}

template <class Storage>
std::int64_t pack_direct(const FusedMBConvWeights& from, void* packed) {
  const FusedMBConvShape& shape = from.shape;
  Pieces pieces(packed);
  const Matrix<Element<Storage>> point(pieces, shape.mid_channels, shape.out_channels);
  const DirectWeights<Storage> spatial(pieces, spatial_shape(shape));
  if (packed != nullptr) {
    pack_pointwise<Storage>(from.point_weight, from.point_bias, point);
    spatial.pack(from.spatial_weight, from.spatial_bias);
  }
  return spatial.bytes();
}

template <class Storage>
std::int64_t pack(const FusedMBConvWeights& from, void* packed) {
  if (!has_winograd(spatial_shape(from.shape))) return pack_direct<Storage>(from, packed);
  return with_scheme_of<Element<Storage>>(from.shape, [&](auto scheme) {
    return pack_winograd<decltype(scheme), Storage>(from, packed);
  });
}

template <class Scheme, class Storage>
void run_winograd(const FusedMBConvArgs& args, const Map<Storage>& in,
                  const Output<Storage>& output) {
  using E = Element<Storage>;
  const FusedMBConvShape& shape = args.shape;
  const Tiles<Scheme> tiles(in);
  constexpr std::int64_t outputs = Scheme::outputs * Scheme::outputs;
  const std::int64_t mid_columns = round_up(shape.mid_channels);
  const std::int64_t at_once = tiles.at_once(max_rows, args.num_threads);

  struct Room {
    WinogradRoom<Scheme, Storage> winograd;
    Operand<E> expanded;
    Sums sums;
    Room(Pieces& pieces, std::int64_t tiles, std::int64_t in_channels, std::int64_t mid_columns)
        : winograd(pieces, tiles, in_channels),
          expanded{pieces.take<E>(tiles * outputs * mid_columns), tiles * outputs},
          sums(pieces, tiles * outputs) {}
  };
  Pieces counted;
  const Room one(counted, at_once, shape.in_channels, mid_columns);
  const Scratch memory = scratch(counted.bytes(), args.num_threads);

  Pieces packed = pieces_of(args.packed);
  const Matrix<E> point(packed, shape.mid_channels, shape.out_channels);
  const WinogradWeights<Scheme, Storage> spatial(packed, shape.in_channels, shape.mid_channels);
  const Runs runs(tiles.count, at_once, args.num_threads);
  const std::int64_t operations = tiles.count * shape.in_channels * shape.mid_channels;
  parallel(args.num_threads, operations, [&](int member) {
    Pieces pieces(own_piece(memory, member));
    const Room room(pieces, at_once, shape.in_channels, mid_columns);
    const auto sink = [&](std::int64_t row) { return output.line(room.winograd.pixels[row]); };
    for_each(runs.size(), [&](std::int64_t run) {
      const std::int64_t first = runs.begin(run), count = runs.end(run) - first;
      const std::int64_t rows = convolve_tiles<Scheme>(in, spatial, tiles, first, count,
                                                       room.winograd, args.activation, room.expanded);
      multiply_into<Storage>(room.expanded, rows, point, 0, round_up(shape.out_channels), room.sums,
                             Activation::none, sink);
    });
  });
}

template <class Storage>
void run_direct(const FusedMBConvArgs& args, const Map<Storage>& in,
                const Output<Storage>& output) {
  using E = Element<Storage>;
  const FusedMBConvShape& shape = args.shape;
  const ConvShape conv = spatial_shape(shape);
  const std::int64_t pixels = in.batch * size_after(in.height, shape.stride) *
                              size_after(in.width, shape.stride);
  const std::int64_t columns = round_up(shape.kernel * shape.kernel * shape.in_channels);
  const std::int64_t mid_columns = round_up(shape.mid_channels);
  const std::int64_t at_once =
      pixels_at_once<E>(pixels, columns + mid_columns, args.num_threads);

  struct Room {
    Operand<E> gathered, expanded;
    Sums sums;
    Room(Pieces& pieces, std::int64_t rows, std::int64_t columns, std::int64_t mid_columns)
        : gathered{pieces.take<E>(rows * columns), rows},
          expanded{pieces.take<E>(rows * mid_columns), rows},
          sums(pieces, rows) {}
  };
  Pieces counted;
  const Room one(counted, at_once, columns, mid_columns);
  const Scratch memory = scratch(counted.bytes(), args.num_threads);

  Pieces packed = pieces_of(args.packed);
  const Matrix<E> point(packed, shape.mid_channels, shape.out_channels);
  const Matrix<E> spatial = DirectWeights<Storage>(packed, conv).group(0);
  const Runs runs(pixels, at_once, args.num_threads);
  const std::int64_t operations = pixels * columns * shape.mid_channels;
  parallel(args.num_threads, operations, [&](int member) {
    Pieces pieces(own_piece(memory, member));
    const Room room(pieces, at_once, columns, mid_columns);
    for_each(runs.size(), [&](std::int64_t run) {
      const std::int64_t first = runs.begin(run), count = runs.end(run) - first;
      const auto sink = [&](std::int64_t row) { return output.line(first + row); };
      gather(in, conv, 0, first, count, room.gathered);
      multiply_into<Storage>(room.gathered, count, spatial, 0, mid_columns, room.sums,
                             args.activation, room.expanded);
      multiply_into<Storage>(room.expanded, count, point, 0, round_up(shape.out_channels), room.sums,
                             Activation::none, sink);
    });
  });
}

template <class Storage>
void run(const FusedMBConvArgs& args) {
  const FusedMBConvShape& shape = args.shape;
  const Map<Storage> in{static_cast<const Storage*>(args.x), args.batch, args.height, args.width,
                        shape.in_channels};
  const Output<Storage> output{static_cast<Storage*>(args.y),
                               static_cast<const Storage*>(args.residual), shape.out_channels};
  if (in.batch == 0) return;
  if (!has_winograd(spatial_shape(shape))) return run_direct(args, in, output);
  with_scheme_of<Element<Storage>>(shape, [&](auto scheme) {
    run_winograd<decltype(scheme)>(args, in, output);
  });
}

}  // namespace

std::int64_t fused_mbconv_pack(const FusedMBConvWeights& weights, void* packed) {
  switch (weights.dtype) {
    case DType::float16: return pack<Float16>(weights, packed);
    case DType::bfloat16: return pack<BFloat16>(weights, packed);
    default: return pack<float>(weights, packed);
  }
}

void fused_mbconv(const FusedMBConvArgs& args) {
  switch (args.dtype) {
    case DType::float16: return run<Float16>(args);
    case DType::bfloat16: return run<BFloat16>(args);
    default: return run<float>(args);
  }
}

}  // namespace evsam::EVSAM_ISA
