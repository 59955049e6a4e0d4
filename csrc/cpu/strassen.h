// Products of float32 matrices in seven multiplications for every eight (Strassen 1969, Gaussian elimination
// is not optimal). Included by kernels: everything is private to the including file.
//
// Two neighbouring rows of the left matrix, two blocks of the inner dimension and two panels of the right
// matrix make 2 x 2 parts of either and of the result. Seven sums of parts ("forms") of the left are
// multiplied by seven of the right one, and each product is added to one or two parts of the result. Sums
// of matrices cost as much as few rows of a product; so it takes large ones to gain.
//
// A row's rounding errors are as large as those of the larger of its pair, so this is for rows that have
// much the same error anyway. Parts being neighbours, results do not depend on how a product is shared out.
#pragma once

#include <cstdint>

#include "matrix.h"
#include "scratch.h"
#include "transposed.h"

namespace evsam::EVSAM_ISA {
namespace {

constexpr int forms = 7;
// Elements between two forms: a cache line, so that those of one element are not in the same place of L1.
constexpr std::int64_t apart = cache_line<float>;

// Whether products of such sizes and elements are made of whole parts, and enough of them.
template <class E>
bool has_forms(std::int64_t rows, std::int64_t columns, std::int64_t blocks) {
  return same<E, float> && rows % 2 == 0 && blocks % 2 == 0 && blocks >= 4 && columns % (2 * panel) == 0;
}

// Of the left matrix: [7][blocks / 2][rows / 2][32].
struct LeftForms {
  float* elements;
  std::int64_t pairs, blocks;  // of rows and of blocks

  LeftForms(float* elements, std::int64_t rows, std::int64_t blocks)
      : elements(elements), pairs(rows / 2), blocks(blocks / 2) {}
  LeftForms(Pieces& pieces, std::int64_t rows, std::int64_t blocks)
      : LeftForms(pieces.take<float>(forms * (rows * blocks * block / 4 + apart)), rows, blocks) {}

  std::int64_t stride() const { return pairs * block; }
  std::int64_t size() const { return blocks * stride() + apart; }
  const float* at(int form, std::int64_t pair) const {
    return elements + form * size() + pair * block;
  }

  // Those of pairs of rows [first, end) of a matrix whose rows are row_stride elements apart, and its blocks
  // block_stride.
  template <class Storage>
  void write(const Storage* a, std::int64_t row_stride, std::int64_t block_stride, std::int64_t first,
             std::int64_t end) const {
    for (std::int64_t k = 0; k < blocks; ++k)
      for (std::int64_t pair = first; pair < end; ++pair) {
        const Storage* from = a + 2 * k * block_stride + 2 * pair * row_stride;
        float* to = elements + k * stride() + pair * block;
#pragma GCC unroll 8
        for (int i = 0; i < block; i += lanes, from += lanes, to += lanes) {
          const Vec a11 = load(from), a12 = load(from + block_stride);
          const Vec a21 = load(from + row_stride), a22 = load(from + row_stride + block_stride);
          put(to, a11, a12, a21, a22);
        }
      }
  }

  // The forms of some columns of 2 x 2 parts, `to` being where the first form's are.
  EVSAM_INLINE void put(float* to, Vec a11, Vec a12, Vec a21, Vec a22) const {
    store(to, a11 + a22);
    store(to + size(), a21 + a22);
    store(to + 2 * size(), a11);
    store(to + 3 * size(), a22);
    store(to + 4 * size(), a11 + a12);
    store(to + 5 * size(), a21 - a11);
    store(to + 6 * size(), a12 - a22);
  }
};

// Of two panels of the right matrix: [7][blocks / 2][32][panel].
struct RightForms {
  float* elements;
  std::int64_t blocks;  // pairs of them
  std::int64_t size;    // from one form to the next

  RightForms(float* elements, std::int64_t blocks)
      : elements(elements), blocks(blocks / 2), size(this->blocks * block * panel + apart) {}
  RightForms(Pieces& pieces, std::int64_t blocks)
      : RightForms(pieces.take<float>(elements_of(blocks)), blocks) {}

  static std::int64_t elements_of(std::int64_t blocks) { return forms * RightForms(nullptr, blocks).size; }
  const float* at(int form) const { return elements + form * size; }

  // Those of so many blocks from one on.
  RightForms from(std::int64_t first, std::int64_t count) const {
    RightForms part = *this;
    part.elements += first / 2 * block * panel;
    part.blocks = count / 2;
    return part;
  }

  // Those of the first columns of a matrix. Its parts come first, in place of forms that are like them or made of
  // them at last.
  template <class Storage>
  void write(const Transposed<Storage>& b) const {
    for (std::int64_t half = 0; half < panel; half += lanes)
      for (std::int64_t k = 0; k < blocks * block; k += lanes) {
        const Transposed<Storage> upper = b.from(k / block * 2 * block + k % block, half);
        const Transposed<Storage> lower = upper.from(block, 0);
        float* to = elements + k * panel + half;
        upper.write(to + size);
        upper.from(0, panel).write(to + 2 * size);
        lower.write(to + 3 * size);
        lower.from(0, panel).write(to + 4 * size);
#pragma GCC unroll 4
        for (int i = 0; i < lanes; ++i, to += panel) {
          const Vec b11 = load(to + size), b12 = load(to + 2 * size);
          const Vec b21 = load(to + 3 * size), b22 = load(to + 4 * size);
          store(to, b11 + b22);
          store(to + 2 * size, b12 - b22);
          store(to + 3 * size, b21 - b11);
          store(to + 5 * size, b11 + b12);
          store(to + 6 * size, b21 + b22);
        }
      }
  }
};

// Adds a product to one or two parts of the result, or stores it there.
struct FinishParts {
  static constexpr std::int64_t blocks = 2 * Finish::blocks;
  static constexpr int stores = 2;

  struct Part {
    float* c;  // null for none
    bool accumulate, subtract;
  };
  Part one, other;
  std::int64_t stride;

  template <int first, int end, int rows>
  EVSAM_INLINE void operator()(const Vec (&sums)[rows][2]) const {
    add<first, end>(sums, one);
    if (other.c != nullptr) add<first, end>(sums, other);
  }
  EVSAM_INLINE void next() { one.accumulate = other.accumulate = true; }

 private:
  template <int first, int end, int rows>
  EVSAM_INLINE void add(const Vec (&sums)[rows][2], const Part& part) const {
    Rows row{part.c + first * stride, stride};
#pragma GCC unroll 16
    for (int i = first; i < end; ++i, row.next())
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        float* to = row.at + half * lanes;
        // To multiply by a sign would cost as much as a product.
        store(to, !part.accumulate ? sums[i][half]
                  : part.subtract  ? load(to) - sums[i][half]
                                   : load(to) + sums[i][half]);
      }
  }
};

// c[2 * pairs][2 * panel] is the product of pairs of rows from `first` on with two panels, added to what c
// holds where `accumulate` is set.
template <class Ahead>
void multiply(const LeftForms& left, std::int64_t first, std::int64_t pairs, const RightForms& right,
              float* c, std::int64_t c_stride, bool accumulate, const Ahead& ahead) {
  // Parts that the products of forms are added to, 11, 12, 21 and 22 being counted from 0; -1 for none.
  constexpr int part[forms] = {0, 2, 1, 0, 1, 3, 0}, other_part[forms] = {3, 3, 3, 2, 0, -1, -1};
  constexpr bool other_less[forms] = {false, true, false, false, true, false, false};
  const std::int64_t at[4] = {0, panel, c_stride, c_stride + panel};
  const std::int64_t lines = right.blocks * block;  // fetched by a tile
  const std::int64_t tiles = quotient_up(pairs, max_rows);
  // The last tiles fetch: what was there earlier would have to give way to the forms again.
  std::int64_t turn = least(ahead.count(lines) - forms * tiles, 0);
  for (int form = 0; form < forms; ++form)
    for (std::int64_t t = 0; t < tiles; ++t, ++turn) {
      const std::int64_t begin = pairs * t / tiles, end = pairs * (t + 1) / tiles;
      float* to = c + 2 * begin * c_stride;
      // The first three products reach parts that nothing has reached before.
      FinishParts finish{{to + at[part[form]], accumulate || form > 2, false}, {}, 2 * c_stride};
      if (other_part[form] >= 0)
        finish.other = {to + at[other_part[form]], accumulate || form > 0, other_less[form]};
      // Tiles that have nothing to fetch fetch what they read.
      tile_of<Tall>(end - begin, left.at(form, first + begin), left.stride(), left.blocks, right.at(form),
                    turn < 0 ? Fetch(right.at(form)) : ahead(turn, lines), finish);
    }
}

// What tiles fetch of packed forms: those of the next form, or what begins at `next`.
struct AheadOfForms {
  const RightForms& right;
  std::int64_t tiles;  // of a form
  const float* next;

  std::int64_t count(std::int64_t) const { return forms * tiles; }
  Fetch operator()(std::int64_t turn, std::int64_t lines) const {
    const int form = static_cast<int>(turn / tiles) + 1;
    const std::int64_t step = least(quotient_up(panel, tiles), cache_line<float>);
    return Fetch((form < forms ? right.at(form) : next) + turn % tiles * step * lines, step);
  }
};

// The right matrix of a product in forms, all of it: for two panels after two panels their forms.
struct PackedForms {
  float* elements;
  std::int64_t columns, blocks;

  PackedForms(Pieces& pieces, std::int64_t rows, std::int64_t columns)
      : elements(pieces.take<float>(columns / (2 * panel) * RightForms::elements_of(blocks_of(rows)))),
        columns(columns),
        blocks(blocks_of(rows)) {}

  RightForms at(std::int64_t column) const {
    return {elements + column / (2 * panel) * RightForms::elements_of(blocks), blocks};
  }

  // From a matrix stored as [columns][rows].
  template <class Storage>
  void pack(const Storage* from) const {
    const Transposed<Storage> all{from, blocks * block, 1};
    for (std::int64_t column = 0; column < columns; column += 2 * panel) at(column).write(all.from(0, column));
  }
};

// c = left times the rows of `right` from a block on, or added to c. What is multiplied with next begins at `next`.
inline void multiply(const LeftForms& left, const PackedForms& right, std::int64_t first, float* c,
                     std::int64_t c_stride, bool accumulate, const float* next) {
  for (std::int64_t column = 0; column < right.columns; column += 2 * panel) {
    const RightForms forms = right.at(column).from(first, 2 * left.blocks);
    const float* after = column + 2 * panel < right.columns
                             ? right.at(column + 2 * panel).from(first, 2 * left.blocks).elements
                             : next;
    multiply(left, 0, left.pairs, forms, c + column, c_stride, accumulate,
             AheadOfForms{forms, quotient_up(left.pairs, max_rows), after});
  }
}

// Room for two panels of a right matrix that has so many blocks, in forms or as they are.
template <class E>
E* take_right(Pieces& pieces, std::int64_t blocks) {
  if constexpr (same<E, float>)
    return RightForms(pieces, blocks).elements;
  else
    return pieces.take<E>(2 * blocks * block * panel);
}

// Room for a product of so many rows, and of so many blocks at once that the forms of the left matrix stay in L2.
template <class E>
struct FormsRoom {
  static constexpr std::int64_t blocks_at_once = 32 / sizeof(E);
  static constexpr std::int64_t least_columns = 128;  // that are worth the forms of the left matrix

  std::int64_t rows;  // 0 for none in forms
  float* left;
  E* right;

  FormsRoom(Pieces& pieces, std::int64_t rows)
      : rows(same<E, float> ? rows : 0),
        left(LeftForms(pieces, this->rows, blocks_at_once).elements),
        right(take_right<E>(pieces, blocks_at_once)) {}
};

// c[rows][columns] = a[rows][32 * blocks] b[32 * blocks][columns], or added to c, as multiply() of matrix.h; in
// forms where the sizes and the room allow that. `columns` make whole panels.
template <class E, class Storage>
void multiply(const FormsRoom<E>& room, std::int64_t rows, std::int64_t columns, std::int64_t blocks,
              const E* a, std::int64_t a_stride, const Transposed<Storage>& b, float* c,
              std::int64_t c_stride, bool accumulate) {
  const bool in_forms = rows <= room.rows && columns >= room.least_columns &&
                        has_forms<E>(rows, columns, blocks);
  for (std::int64_t first = 0; first < blocks; first += room.blocks_at_once, accumulate = true) {
    const std::int64_t end = least(first + room.blocks_at_once, blocks), count = end - first;
    const E* of_a = a + first * a_stride;
    const LeftForms left(room.left, rows, count);
    if constexpr (same<E, float>) {
      if (in_forms) left.write(of_a, block, a_stride, 0, left.pairs);
    }
    for (std::int64_t column = 0; column < columns; column += 2 * panel) {
      const std::int64_t width = least(2 * panel, columns - column);
      const Transposed<Storage> from = b.from(first * block, column);
      Ahead<E, Storage> ahead{from.from(0, width), least(2 * panel, columns - column - width), count};
      if (column + width == columns) {
        ahead = {b, least(2 * panel, columns), count};
        if (end < blocks)
          ahead = {b.from(end * block, 0), ahead.columns, count, a + end * a_stride, a_stride, rows};
      }
      if constexpr (same<E, float>) {
        if (in_forms) {
          const RightForms right(room.right, count);
          right.write(from);
          multiply(left, 0, left.pairs, right, c + column, c_stride, accumulate, ahead);
          continue;
        }
      }
      write_panels(from, width, count, room.right);
      multiply(rows, width, count, of_a, a_stride, room.right, c + column, c_stride, accumulate, ahead);
    }
  }
}

}  // namespace
}  // namespace evsam::EVSAM_ISA
