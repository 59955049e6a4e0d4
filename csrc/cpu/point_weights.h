// Weights of 1x1 convolutions that are packed, or where they are large read as they are.
// Included by kernels: everything is private to the including file.
#pragma once

#include <cstdint>

#include "map.h"
#include "matrix.h"
#include "scratch.h"
#include "strassen.h"
#include "transposed.h"

namespace evsam::EVSAM_ISA {
namespace {

template <class Storage>
struct PointWeights {
  using E = Element<Storage>;

  Matrix<E> matrix;         // with panels, or
  const Storage* elements;  // [columns][rows], null for none
  Storage* copy;            // of them, unless they are `given`

  PointWeights(Pieces& pieces, std::int64_t rows, std::int64_t columns, const void* given)
      : matrix(pieces, rows, columns, !stay_transposed(rows, columns)),
        elements(nullptr),
        copy(nullptr) {
    if (!stay_transposed(rows, columns)) return;
    if (given == nullptr) copy = pieces.take<Storage>(rows * columns);
    elements = given == nullptr ? copy : static_cast<const Storage*>(given);
  }

  // Whether they are taken as they are: those of float32 products, which may be made in forms, and else where packed
  // panels would take much memory, though a product takes 1 to 2 % less time with these.
  static bool stay_transposed(std::int64_t rows, std::int64_t columns) {
    constexpr std::int64_t large = same<E, float> ? 0 : 1 << 20;
    return rows % block == 0 && columns % block == 0 && columns >= FormsRoom<E>::least_columns &&
           has_forms<float>(2, columns, blocks_of(rows)) && rows * columns >= large;
  }
  bool is_transposed() const { return elements != nullptr; }

  Transposed<Storage> from(std::int64_t row, std::int64_t column) const {
    return Transposed<Storage>{elements, matrix.rows, 1 / (*matrix.scale * headroom<E>)}.from(row, column);
  }

  void pack(const void* weight, const void* bias) const {
    if (!is_transposed()) return pack_pointwise<Storage>(weight, bias, matrix);
    pack_bias<Storage>(bias, matrix.columns, matrix.bias);
    const auto* from = static_cast<const Storage*>(weight);
    const double larger = weight_headroom<E>(matrix.rows, matrix.columns, [&](std::int64_t k, std::int64_t n) {
      return wide(from[n * matrix.rows + k]);
    });
    *matrix.scale = static_cast<float>(1 / (larger * headroom<E>));
    if (copy == nullptr) return;
    for (std::int64_t i = 0; i < matrix.rows * matrix.columns; ++i) copy[i] = from[i];
  }
};

// c[rows][columns] = a times some blocks of rows of the weights, from a row and a column on, or added to c, as
// multiply() of strassen.h.
template <class E, class Storage>
void multiply(const FormsRoom<E>& room, std::int64_t rows, std::int64_t columns, std::int64_t blocks,
              const Operand<E>& a, const PointWeights<Storage>& weights, std::int64_t row,
              std::int64_t column, float* c, std::int64_t c_stride, bool accumulate) {
  const Matrix<E>& matrix = weights.matrix;
  if (weights.is_transposed())
    multiply(room, rows, columns, blocks, a.elements, a.stride(), weights.from(row, column), c, c_stride,
             accumulate);
  else
    multiply(rows, columns, blocks, a.elements, a.stride(), matrix.panel_at(column) + row * panel,
             matrix.panel_size(), c, c_stride, accumulate);
}

// Columns [begin, end) of activation(a * weights + bias), into the sink, as multiply_into() of map.h.
template <class Storage, class E, class Sink>
void multiply_into(const FormsRoom<E>& room, const Operand<E>& a, std::int64_t rows,
                   const PointWeights<Storage>& weights, std::int64_t begin, std::int64_t end,
                   const Sums& sums, Activation activation, const Sink& sink) {
  product_into<Storage>(rows, weights.matrix, begin, end, sums, activation, sink,
                        [&](std::int64_t first, std::int64_t columns, std::int64_t stride) {
                          multiply(room, rows, columns, weights.matrix.blocks(), a, weights, 0, first,
                                   sums.elements, stride, false);
                        });
}

}  // namespace
}  // namespace evsam::EVSAM_ISA
