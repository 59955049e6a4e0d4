// The product of matrices that all kernels are made of: rows of a map times packed weights.
// Included by kernels: everything is private to the including file.
//
// The left matrix lies in blocks of 32 columns, [columns / 32][rows][32], so that within a block the
// rows of a tile are a constant distance apart and its addresses need no arithmetic. The right one lies
// in panels of as many columns as two vectors hold, [columns / panel][rows][panel]. Both are filled up
// with zeros to multiples of 32.
//
// A tile of some rows and one panel is summed up in registers; every element of a panel that is loaded is
// used for all of its rows. With AVX512_BF16 elements are bfloat16 and summed up in pairs to float32
// (panels interleave two rows); everywhere else they are float32.
//
// Panels come from L3, whose latency is longer than what processors look ahead: while the first tiles pass
// over a panel, the next one is fetched.
#pragma once

#include <cmath>
#include <cstdint>

#include "simd.h"
#include "storage.h"

namespace evsam::EVSAM_ISA {
namespace {

constexpr std::int64_t block = 32;
constexpr std::int64_t panel = 2 * lanes;

// Rows of the largest tile.
#if defined(__AVX512F__)
constexpr int max_rows = 14;  // 28 registers hold sums
#else
constexpr int max_rows = 6;  // 12 registers hold sums
#endif

// What a tile is like: rows of the largest one, and sums that every element of the result is split into.
struct Tall {
  static constexpr int rows = max_rows, sums = 1;
};
struct Split {
  static constexpr int rows = max_rows / 2, sums = 2;
};

inline std::int64_t blocks_of(std::int64_t count) { return (count + block - 1) / block; }
inline std::int64_t round_up(std::int64_t count) { return blocks_of(count) * block; }
constexpr std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
constexpr std::int64_t most(std::int64_t a, std::int64_t b) { return a > b ? a : b; }
inline std::int64_t quotient_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

template <bool first, class A, class B>
struct Chosen {
  using type = A;
};
template <class A, class B>
struct Chosen<false, A, B> {
  using type = B;
};
template <bool first, class A, class B>
using Choice = typename Chosen<first, A, B>::type;

template <class A, class B>
constexpr bool same = false;
template <class A>
constexpr bool same<A, A> = true;

#if defined(__AVX512BF16__)
constexpr bool multiplies_bfloat16 = true;
#else
constexpr bool multiplies_bfloat16 = false;
#endif

// What the elements of a product are when tensors are stored as Storage.
template <class Storage>
using Element = Choice<multiplies_bfloat16 && same<Storage, BFloat16>, BFloat16, float>;

// bfloat16 products lose all that is below the smallest normal number, operands and sums, so that maps
// and weights near it would lose everything. Both sides are kept larger by a power of two: operands by
// this one, weights so that the largest is of about this size.
template <class E>
constexpr float headroom = same<E, BFloat16> ? 4096 : 1;

// Writes lanes of a product's left operand.
EVSAM_INLINE void put(float* to, Vec v) { store(to, v); }
#if defined(__AVX512BF16__)
EVSAM_INLINE void put(BFloat16* to, Vec v) {
  const __m256i narrow = (__m256i)_mm512_cvtneps_pbh(v * headroom<BFloat16>);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow);
}
#endif

// put() for what all threads are to read, as send() of floats.
template <class E>
EVSAM_INLINE void send_element(E* to, Vec v) {
  if constexpr (same<E, float>)
    send(to, v);
  else
    put(to, v);
}

// Sums of float32 that are stored seldom or have little room for errors are split.
template <class E>
using AccurateTile = Choice<same<E, float>, Split, Tall>;

// How much larger a matrix is packed.
template <class E, class At>
double weight_headroom(std::int64_t rows, std::int64_t columns, const At& at) {
  if constexpr (same<E, float>) return 1;
  double largest = 0;
  for (std::int64_t n = 0; n < columns; ++n)
    for (std::int64_t k = 0; k < rows; ++k) largest = std::fmax(largest, std::fabs(at(k, n)));
  int exponent = 0;
  if (largest > 0 && __builtin_isfinite(largest)) std::frexp(largest, &exponent);
  // The inverse must be a float32 as well.
  return headroom<E> * std::ldexp(1.0, static_cast<int>(least(-exponent, 90)));
}

// The element nearest to a value.
template <class E>
E element(double value) {
  E result;
  if constexpr (same<E, float>)
    result = static_cast<float>(value);
  else
    convert(static_cast<float>(value), result);
  return result;
}

// Rows of the right matrix that one instruction takes.
template <class E>
constexpr std::int64_t in_step = sizeof(E) == 2 ? 2 : 1;

// Where the element in row k and column n of a matrix with so many rows is packed.
template <class E>
std::int64_t packed_index(std::int64_t rows, std::int64_t k, std::int64_t n) {
  const std::int64_t in_panel = k / in_step<E> * panel + n % panel;
  return n / panel * panel * round_up(rows) + in_panel * in_step<E> + k % in_step<E>;
}

// Writes the packed form of the matrix whose element in row k and column n is at(k, n), a double.
template <class E, class At>
void pack(std::int64_t rows, std::int64_t columns, E* to, const At& at) {
  for (std::int64_t k = 0; k < round_up(rows); ++k)
    for (std::int64_t n = 0; n < round_up(columns); ++n)
      to[packed_index<E>(rows, k, n)] = element<E>(k < rows && n < columns ? at(k, n) : 0);
}

inline std::int64_t packed_size(std::int64_t rows, std::int64_t columns) {
  return round_up(rows) * round_up(columns);
}

// The rows of a result one after another. A tile has no registers for the addresses of all of them; unless a
// compiler is kept from it, it works them out before the sums, at 1 to 2 % of a product.
struct Rows {
  float* at;
  std::int64_t stride;

  EVSAM_INLINE Rows(float* first, std::int64_t stride) : at(first), stride(stride) { hide(); }
  EVSAM_INLINE void next() {
    at += stride;
    hide();
  }

 private:
  EVSAM_INLINE void hide() { asm("" : "+r"(at)); }
};

// What becomes of a tile's sums: they are stored in c, or added to what it holds.
//
// Sums of 64 products are added up in c, apart from one another, which makes the rounding error of long
// sums several times smaller; a Winograd transform has no room for that error. Where products are rounded
// before they are added, half as many.
struct Finish {
#if defined(__FMA__)
  static constexpr std::int64_t blocks = 2;
#else
  static constexpr std::int64_t blocks = 1;
#endif
  static constexpr int stores = 1;  // of a vector of sums

  float* c;
  std::int64_t stride;
  bool accumulate;

  // With rows [first, end) of a tile.
  template <int first, int end, int rows>
  EVSAM_INLINE void operator()(const Vec (&sums)[rows][2]) const {
    Rows row{c + first * stride, stride};
#pragma GCC unroll 16
    for (int i = first; i < end; ++i, row.next())
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        float* to = row.at + half * lanes;
        store(to, accumulate ? load(to) + sums[i][half] : sums[i][half]);
      }
  }

  // What follows are more blocks of the same sums.
  EVSAM_INLINE void next() { accumulate = true; }
};

// Elements of a cache line.
template <class E>
constexpr std::int64_t cache_line = 64 / sizeof(E);

// What a tile fetches while it computes: for every cache line of a panel's column that it multiplies with, the
// one at `from`, which moves on by a step. It goes to L2: L1 is full of the panel in use.
struct Fetch {
  const char* from;
  std::int64_t step;  // in bytes

  template <class T>
  EVSAM_INLINE Fetch(const T* from, std::int64_t step = cache_line<T>)
      : from(reinterpret_cast<const char*>(from)), step(step * static_cast<std::int64_t>(sizeof(T))) {}

  EVSAM_INLINE void operator()() {
    __builtin_prefetch(from, 0, 2);
    from += step;
  }
};

// Adds a block of a's rows [first, end) times one of b to the sums of a tile.
template <int first, int end, int split, int rows>
EVSAM_INLINE void add_block(Vec (&sums)[split][rows][2], const float* a, const float* b, Fetch& fetch) {
#pragma GCC unroll 4
  for (int k = 0; k < block; k += split)
#pragma GCC unroll 2
    for (int s = 0; s < split; ++s, b += panel) {
      fetch();
      const Vec b0 = load(b), b1 = load(b + lanes);
#pragma GCC unroll 16
      for (int i = first; i < end; ++i) {
        const Vec value = broadcast(a[i * block + k + s]);
        sums[s][i][0] = fma(value, b0, sums[s][i][0]);
        sums[s][i][1] = fma(value, b1, sums[s][i][1]);
      }
    }
}

#if defined(__AVX512BF16__)
template <int first, int end, int rows>
EVSAM_INLINE void add_block(Vec (&sums)[1][rows][2], const BFloat16* a, const BFloat16* b, Fetch& fetch) {
#pragma GCC unroll 4
  for (int k = 0; k < block; k += 2, b += 2 * panel) {
    fetch();
    const auto b0 = (__m512bh)_mm512_loadu_si512(b);
    const auto b1 = (__m512bh)_mm512_loadu_si512(b + 2 * lanes);
#pragma GCC unroll 16
    for (int i = first; i < end; ++i) {
      int pair;
      __builtin_memcpy(&pair, a + i * block + k, sizeof pair);
      const auto value = (__m512bh)_mm512_set1_epi32(pair);
      sums[0][i][0] = _mm512_dpbf16_ps(sums[0][i][0], value, b0);
      sums[0][i][1] = _mm512_dpbf16_ps(sums[0][i][1], value, b1);
    }
  }
}
#endif

// Vectors that a processor can be about to store. When there are more it waits until sums are there, and multiplies
// nothing meanwhile. This is what a Zen 4 showed; smaller vectors do not come near it.
constexpr int most_stores = lanes == 16 ? 16 : 64;

// The last block of a tile's sums, and what becomes of them: some rows after others, so that stores are few at
// a time.
template <int group = 0, int split, int rows, class E, class Finish>
EVSAM_INLINE void finish_block(Vec (&sums)[split][rows][2], const E* a, const E* b, Fetch& fetch,
                               const Finish& finish) {
  constexpr int groups = (2 * Finish::stores * rows + most_stores - 1) / most_stores;
  constexpr int first = rows * group / groups, end = rows * (group + 1) / groups;
  add_block<first, end>(sums, a, b, fetch);
  if constexpr (split == 2)
#pragma GCC unroll 16
    for (int i = first; i < end; ++i)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) sums[0][i][half] += sums[1][i][half];
  finish.template operator()<first, end>(sums[0]);
  if constexpr (end < rows) {
    Fetch nothing(b, 0);
    finish_block<group + 1>(sums, a, b, nothing, finish);
  }
}

// One tile: sums over k of a[i][k] b[k][:] for `finish`. As many blocks at a time as that says; bfloat16, whose
// products are exact, all of them.
//
// Out of line: inlined, compilers keep constants of what follows in registers and spill the sums.
template <class Shape, int rows, class E, class Finish>
__attribute__((noinline)) void tile(const E* a, std::int64_t a_stride, std::int64_t blocks, const E* b,
                                    Fetch fetch, Finish finish) {
  constexpr std::int64_t step = block * panel;
  while (blocks > 0) {
    Vec sums[Shape::sums][rows][2];
#pragma GCC unroll 2
    for (auto& split : sums)
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i) split[i][0] = split[i][1] = zero();
    const std::int64_t count = same<E, float> ? least(blocks, Finish::blocks) : blocks;
#pragma GCC unroll 1
    for (std::int64_t i = count; i > 1; --i, a += a_stride, b += step) add_block<0, rows>(sums, a, b, fetch);
    finish_block(sums, a, b, fetch, finish);
    a += a_stride, b += step, blocks -= count;
    finish.next();
  }
}

template <class Shape, int rows = Shape::rows, class E, class Finish>
void tile_of(std::int64_t count, const E* a, std::int64_t a_stride, std::int64_t blocks, const E* b,
             const Fetch& fetch, const Finish& finish) {
  if (count == rows) return tile<Shape, rows>(a, a_stride, blocks, b, fetch, finish);
  if constexpr (rows > 1) tile_of<Shape, rows - 1>(count, a, a_stride, blocks, b, fetch, finish);
}

// Blocks of a panel at once, so many that much of them stays in L1 while the tiles pass over them.
template <class E>
constexpr std::int64_t panel_blocks = (32 << 10) / (block * panel * sizeof(E));

// c[rows][columns] = a[rows][32 * blocks] b[32 * blocks][columns], a in blocks a_stride elements apart,
// b in panels b_stride elements apart, c in rows c_stride apart; added to what c holds where
// `accumulate` is set. The rows are split evenly into tiles. `next` is the first panel of the product that
// follows, if it is not one of these.
template <class Shape = Tall, class E>
void multiply(std::int64_t rows, std::int64_t columns, std::int64_t blocks, const E* a,
              std::int64_t a_stride, const E* b, std::int64_t b_stride, float* c,
              std::int64_t c_stride, bool accumulate = false, const E* next = nullptr) {
  const std::int64_t tiles = quotient_up(rows, Shape::rows);
  // All tiles together fetch a panel.
  const std::int64_t step = least(quotient_up(panel * in_step<E>, tiles), cache_line<E>);
  for (std::int64_t first = 0; first < blocks; first += panel_blocks<E>) {
    const std::int64_t count = least(panel_blocks<E>, blocks - first), last = columns - panel;
    const E* from = b + first * block * panel;
    for (std::int64_t column = 0; column <= last; column += panel, from += b_stride) {
      const E* after = column < last            ? from + b_stride
                       : first + count < blocks ? b + (first + count) * block * panel
                       : next != nullptr        ? next
                                                : b;
      for (std::int64_t t = 0; t < tiles; ++t) {
        const std::int64_t begin = rows * t / tiles, end = rows * (t + 1) / tiles;
        const Fetch fetch{after + t * step * (count * block / in_step<E>), step};
        tile_of<Shape>(end - begin, a + first * a_stride + begin * block, a_stride, count, from, fetch,
                       Finish{c + begin * c_stride + column, c_stride, accumulate || first > 0});
      }
    }
  }
}

}  // namespace
}  // namespace evsam::EVSAM_ISA
