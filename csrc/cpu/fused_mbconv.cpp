// FusedMBConv (arXiv 2104.00298) in one pass: the expanded tensor never leaves L2.
//
// Layout: NHWC. Tile: as many output pixels as fit L2 together with their expanded channels. The first
// convolution writes these as the left operand of the 1x1 convolution, or its forms, which follows at once;
// 3x3 with stride 1 and 2 goes through winograd.h, anything else through direct.h.
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

// Whether the 1x1 convolution is a product in forms: where a line of a tile makes pairs, and the product is so large
// that it gains. With shorter vectors none does.
template <class Scheme, class Storage>
bool in_forms(const FusedMBConvShape& shape) {
  return lanes == 16 && Scheme::outputs % 2 == 0 && shape.mid_channels % block == 0 && shape.out_channels >= 128 &&
         shape.out_channels <= Sums::columns &&
         has_forms<Element<Storage>>(Scheme::outputs, shape.out_channels, blocks_of(shape.mid_channels));
}

// The weights of both convolutions where the first is a transform.
template <class Scheme, class Storage>
struct TransformWeights {
  Matrix<Element<Storage>> point;
  PackedForms forms;  // in place of the matrix's panels, or none
  WinogradWeights<Scheme, Storage> spatial;

  TransformWeights(Pieces& pieces, const FusedMBConvShape& shape)
      : point(pieces, shape.mid_channels, shape.out_channels, !in_forms<Scheme, Storage>(shape)),
        forms(pieces, shape.mid_channels, in_forms<Scheme, Storage>(shape) ? shape.out_channels : 0),
        spatial(pieces, shape.in_channels, shape.mid_channels) {}
};

template <class Scheme, class Storage>
std::int64_t pack_winograd(const FusedMBConvWeights& from, void* packed) {
  Pieces pieces(packed);
  const TransformWeights<Scheme, Storage> to(pieces, from.shape);
  if (packed == nullptr) return pieces.bytes();
  if (in_forms<Scheme, Storage>(from.shape)) {
    pack_bias<Storage>(from.point_bias, from.shape.out_channels, to.point.bias);
    *to.point.scale = 1;
    to.forms.pack(static_cast<const Storage*>(from.point_weight));
  } else {
    pack_pointwise<Storage>(from.point_weight, from.point_bias, to.point);
  }
  to.spatial.pack(from.spatial_weight, from.spatial_bias);
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
  const TransformWeights<Scheme, Storage> weights(packed, shape);
  const Runs runs(tiles.count, at_once, args.num_threads);
  const std::int64_t operations = tiles.count * shape.in_channels * shape.mid_channels;
  parallel(args.num_threads, operations, [&](int member) {
    Pieces pieces(own_piece(memory, member));
    const Room room(pieces, at_once, shape.in_channels, mid_columns);
    const auto sink = [&](std::int64_t row) { return output.line(room.winograd.pixels[row]); };
    for_each(runs.size(), [&](std::int64_t run) {
      const std::int64_t first = runs.begin(run), count = runs.end(run) - first;
      const std::int64_t rows = convolve_tiles(in, weights.spatial, tiles, first, count, room.winograd,
                                               args.activation, room.expanded);
      multiply_into<Storage>(room.expanded, rows, weights.point, 0, round_up(shape.out_channels), room.sums,
                             Activation::none, sink);
    });
  });
}

// The same with the 1x1 convolution in forms, some expanded channels at a time.
template <class Scheme, class Storage>
void run_winograd_in_forms(const FusedMBConvArgs& args, const Map<Storage>& in,
                           const Output<Storage>& output) {
  constexpr std::int64_t outputs = Scheme::outputs * Scheme::outputs;
  constexpr std::int64_t channels_at_once = 2 * columns_at_once;  // whose forms stay in L2 beside the rest
  const FusedMBConvShape& shape = args.shape;
  const Tiles<Scheme> tiles(in);
  const std::int64_t at_once = tiles.at_once(max_rows, args.num_threads);

  struct Room {
    WinogradRoom<Scheme, Storage> winograd;
    float* left;
    Sums sums;
    Room(Pieces& pieces, std::int64_t tiles, std::int64_t in_channels)
        : winograd(pieces, tiles, in_channels),
          left(LeftForms(pieces, tiles * outputs, channels_at_once / block).elements),
          sums(pieces, tiles * outputs) {}
  };
  Pieces counted;
  const Room one(counted, at_once, shape.in_channels);
  const Scratch memory = scratch(counted.bytes(), args.num_threads);

  Pieces packed = pieces_of(args.packed);
  const TransformWeights<Scheme, Storage> weights(packed, shape);
  const Runs runs(tiles.count, at_once, args.num_threads);
  const std::int64_t operations = tiles.count * shape.in_channels * shape.mid_channels;
  parallel(args.num_threads, operations, [&](int member) {
    Pieces pieces(own_piece(memory, member));
    const Room room(pieces, at_once, shape.in_channels);
    const auto sink = [&](std::int64_t row) {
      const std::int64_t pixel = room.winograd.pixels[row];
      return pixel == outside ? typename Output<Storage>::Line{} : output.line(pixel);
    };
    for_each(runs.size(), [&](std::int64_t run) {
      const std::int64_t first = runs.begin(run), count = runs.end(run) - first;
      const std::int64_t rows = transform_tiles<Scheme, true>(in, tiles, first, count, room.winograd);
      const auto multiply_columns = [&](std::int64_t, std::int64_t, std::int64_t stride) {
        for (std::int64_t begin = 0; begin < shape.mid_channels; begin += channels_at_once) {
          const std::int64_t end = least(begin + channels_at_once, shape.mid_channels);
          const LeftForms left(room.left, rows, (end - begin) / block);
          convolve_columns(weights.spatial, count, begin, end, room.winograd, args.activation, left);
          multiply(left, weights.forms, begin / block, room.sums.elements, stride, begin > 0,
                   weights.spatial.panel_at(0, end < shape.mid_channels ? end : 0));
        }
      };
      product_into<Storage>(rows, weights.point, 0, shape.out_channels, room.sums, Activation::none, sink,
                            multiply_columns);
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
    using Scheme = decltype(scheme);
    if constexpr (lanes == 16 && Scheme::outputs % 2 == 0 && same<Element<Storage>, float>) {
      if (in_forms<Scheme, Storage>(shape)) return run_winograd_in_forms<Scheme>(args, in, output);
    }
    run_winograd<Scheme>(args, in, output);
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
