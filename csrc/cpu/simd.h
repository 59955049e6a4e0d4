// Vectors of floats as kernels see them: one name for what AVX-512, AVX2 and the compiler's own
// vectors (SSE2, NEON) offer. Included by kernels: everything is private to the including file.
//
// Vec has the operators of its elements. What is below adds memory, also of the storage types, and the
// few functions that have no operator.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "storage.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC's headers start some intrinsics from a register they leave undefined on purpose (PR 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#define EVSAM_INLINE inline __attribute__((always_inline))
// Loops around these are unrolled: inlined at every place, long ones would be most of a kernel's code.
#define EVSAM_OUT_OF_LINE inline __attribute__((noinline))

namespace evsam::EVSAM_ISA {
namespace {

#if defined(__AVX512F__)
using Vec = __m512;
#elif defined(__AVX2__)
using Vec = __m256;
#else
typedef float Vec __attribute__((vector_size(16)));
#endif

constexpr int lanes = sizeof(Vec) / sizeof(float);

// The bits of a Vec.
typedef std::uint32_t Bits __attribute__((vector_size(sizeof(Vec))));

EVSAM_INLINE Vec load(const float* from) {
  Vec v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

EVSAM_INLINE void store(float* to, Vec v) { __builtin_memcpy(to, &v, sizeof v); }

// store() for what other threads are to read, `to` being aligned to a Vec. Past the caches where a Vec is a
// cache line: a core that writes a line which another holds waits until that has let go of it, which takes
// ten times as long as to write it when the two have no L3 in common. All has arrived after sent().
EVSAM_INLINE void send(float* to, Vec v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, v);
#else
  store(to, v);
#endif
}

EVSAM_INLINE void sent() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

EVSAM_INLINE Vec broadcast(float value) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(value);
#elif defined(__AVX2__)
  return _mm256_set1_ps(value);
#else
  return Vec{value, value, value, value};
#endif
}

EVSAM_INLINE Vec zero() { return broadcast(0); }

// a * b + c
EVSAM_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// c - a * b
EVSAM_INLINE Vec fnma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fnmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fnmadd_ps(a, b, c);
#else
  return c - a * b;
#endif
}

// The larger and the smaller; b where either is NaN.
EVSAM_INLINE Vec larger(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

EVSAM_INLINE Vec smaller(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

// 1 / v for v in [1, 2^127], to about the last bit.
EVSAM_INLINE Vec reciprocal(Vec v) {
#if defined(__AVX512F__)
  const Vec near = _mm512_rcp14_ps(v);
  return near * fnma(v, near, broadcast(2));  // one step of Newton's method doubles the bits
#else
  return 1 / v;
#endif
}

// 1 / v for v in [1, 2^127], to at least 11 bits.
EVSAM_INLINE Vec coarse_reciprocal(Vec v) {
#if defined(__AVX512F__)
  return _mm512_rcp14_ps(v);
#elif defined(__AVX2__)
  return _mm256_rcp_ps(v);
#else
  return 1 / v;
#endif
}

EVSAM_INLINE Vec square_root(Vec v) {
#if defined(__AVX512F__)
  return _mm512_sqrt_ps(v);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(v);
#else
  for (int lane = 0; lane < lanes; ++lane) v[lane] = __builtin_sqrtf(v[lane]);
  return v;
#endif
}

// v, or whichever of -limit and limit is nearer; one of these where v is NaN.
EVSAM_INLINE Vec within(Vec v, float limit) {
#if defined(__AVX512DQ__)
  constexpr int smaller_magnitude = 2;  // of both, with the sign of the first
  return _mm512_range_ps(v, broadcast(limit), smaller_magnitude);
#else
  return larger(smaller(v, broadcast(limit)), broadcast(-limit));
#endif
}

#if defined(__AVX512DQ__)
// |v| or `limit`, whichever is smaller; `limit` where v is NaN.
EVSAM_INLINE Vec magnitude_within(Vec v, float limit) {
  constexpr int smaller_magnitude = 2, positive = 8;
  return _mm512_range_ps(v, broadcast(limit), smaller_magnitude | positive);
}

// 0 for negative numbers, but v for minus infinity as for everything else.
EVSAM_INLINE Vec positive_or_infinite(Vec v) {
  // Hexadecimal digits, the last first, tell what to make of a quiet NaN, a signalling one, 0, 1, minus
  // infinity, infinity, negative and positive numbers: 1 is to keep it, 2 to make it quiet, 8 is 0.
  const __m512i table = _mm512_set1_epi32(0x18111121);
  return _mm512_fixupimm_ps(zero(), v, table, 0);
}

// Those elements of a table whose numbers are the low bits of n.
EVSAM_INLINE Vec pick(Vec table, Bits n) { return _mm512_permutexvar_ps((__m512i)n, table); }
#endif

// How many powers of two from 1 to 2, without the latter, a register holds.
#if defined(__AVX2__)
constexpr int power_steps = lanes;
#else
constexpr int power_steps = 1;
#endif

// 2^(n / power_steps), where n are the low bits and n / power_steps is from -126 to 126.
//
// The bits of n are shifted to where a float's exponent is, and what they spill into its fraction has been
// taken off the powers below.
EVSAM_INLINE Vec power_of_steps(Bits n) {
#if defined(__AVX512F__)
  const __m512i powers = _mm512_setr_epi32(
      0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f,
      0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d);
  const __m512i power = _mm512_permutexvar_epi32((__m512i)n, powers);
  return (Vec)((n << 19) + (Bits)power);
#elif defined(__AVX2__)
  const __m256i powers = _mm256_setr_epi32(
      0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7);
  const __m256i power = _mm256_permutevar8x32_epi32(powers, (__m256i)n);
  return (Vec)((n << 20) + (Bits)power);
#else
  return (Vec)((n << 23) + 0x3f800000);
#endif
}

// Sums and maxima are those of halves, which need not wait for one another.
EVSAM_INLINE float sum(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(v);
#elif defined(__AVX2__)
  __m128 half = _mm256_castps256_ps128(v) + _mm256_extractf128_ps(v, 1);
  half += _mm_movehl_ps(half, half);
  return half[0] + half[1];
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

EVSAM_INLINE float largest(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(v);
#elif defined(__AVX2__)
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return half[0] > half[1] ? half[0] : half[1];
#else
  float found = v[0];
  for (int lane = 1; lane < lanes; ++lane) found = v[lane] > found ? v[lane] : found;
  return found;
#endif
}

// Elements of two vectors, counted from the first of `a` on to the last of `b`.
EVSAM_INLINE Vec shuffled(Vec a, Vec b, Bits from) {
#if defined(__clang__)
  Vec result;
  for (int lane = 0; lane < lanes; ++lane)
    result[lane] = from[lane] < lanes ? a[from[lane]] : b[from[lane] - lanes];
  return result;
#else
  return __builtin_shuffle(a, b, from);
#endif
}

// Of as many vectors as one has lanes, element i of vector j becomes element j of vector i. With step s, blocks of
// s x s change places within those of 2 s x 2 s.
template <int step = 1>
EVSAM_INLINE void transpose(Vec (&x)[lanes]) {
  Bits first, second;  // what the upper and the lower vector of a pair are made of
  for (std::uint32_t lane = 0; lane < lanes; ++lane) {
    first[lane] = lane & step ? lanes + lane - step : lane;
    second[lane] = lane & step ? lanes + lane : lane + step;
  }
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) {
    if (i & step) continue;
    const Vec upper = x[i], lower = x[i + step];
    x[i] = shuffled(upper, lower, first);
    x[i + step] = shuffled(upper, lower, second);
  }
  if constexpr (2 * step < lanes) transpose<2 * step>(x);
}

// Storage types.

#if !defined(__AVX512F__)
// Elements of 16 bits, as many as a Vec has lanes.
typedef std::uint16_t Halves __attribute__((vector_size(2 * lanes)));
#endif

EVSAM_INLINE Vec load(const BFloat16* from) {
#if defined(__AVX512F__)
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
#else
  Halves halves;
  __builtin_memcpy(&halves, from, sizeof halves);
  return (Vec)(__builtin_convertvector(halves, Bits) << 16);
#endif
}

#if defined(__AVX512F__)
EVSAM_INLINE Vec load(const Float16* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
#elif defined(__AVX2__)
EVSAM_INLINE Vec load(const Float16* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
#else
EVSAM_OUT_OF_LINE Vec load(const Float16* from) {
  float wide[lanes];
  for (int lane = 0; lane < lanes; ++lane) convert(from[lane], wide[lane]);
  return load(wide);
}
#endif

EVSAM_INLINE void store(BFloat16* to, Vec v) {
#if defined(__AVX512BF16__)
  // The instruction turns subnormal numbers to zero.
  constexpr int subnormal = 0x20;
  if (__builtin_expect(_mm512_fpclass_ps_mask(v, subnormal) == 0, 1)) {
    const __m256i narrow = (__m256i)_mm512_cvtneps_pbh(v);
    return _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow);
  }
#endif
#if defined(__AVX512F__)
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i biased = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __m512i rounded = _mm512_mask_mov_epi32(biased, nan, quiet);
  const __m256i narrow = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow);
#else
  const Bits bits = (Bits)v;
  const Bits biased = bits + (0x7fff + ((bits >> 16) & 1));
  const Bits rounded = v == v ? biased : bits | 0x400000;
  const Halves halves = __builtin_convertvector(rounded >> 16, Halves);
  __builtin_memcpy(to, &halves, sizeof halves);
#endif
}

#if defined(__AVX512BF16__)
// send() of two vectors that make a cache line.
EVSAM_INLINE void send(BFloat16* to, Vec v, Vec next) {
  constexpr int subnormal = 0x20;
  const __mmask16 both = _mm512_fpclass_ps_mask(v, subnormal) | _mm512_fpclass_ps_mask(next, subnormal);
  if (__builtin_expect(both == 0, 1))
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)_mm512_cvtne2ps_pbh(next, v));
  store(to, v);
  store(to + lanes, next);
}
#endif

#if defined(__AVX512F__)
EVSAM_INLINE void store(Float16* to, Vec v) {
  const __m256i narrow = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow);
}
#elif defined(__AVX2__)
EVSAM_INLINE void store(Float16* to, Vec v) {
  const __m128i narrow = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), narrow);
}
#else
EVSAM_OUT_OF_LINE void store(Float16* to, Vec v) {
  float wide[lanes];
  store(wide, v);
  for (int lane = 0; lane < lanes; ++lane) convert(wide[lane], to[lane]);
}
#endif

// Fewer elements than a vector has lanes, which only the ends of rows have.
template <class Storage>
__attribute__((noinline, cold)) Vec load_some(const Storage* from, std::int64_t count) {
  Storage room[lanes] = {};
  for (std::int64_t i = 0; i < count; ++i) room[i] = from[i];
  return load(room);
}

template <class Storage>
__attribute__((noinline, cold)) void store_some(Storage* to, Vec v, std::int64_t count) {
  Storage room[lanes];
  store(room, v);
  for (std::int64_t i = 0; i < count; ++i) to[i] = room[i];
}

// The first `count` elements, or a whole vector where `count` is larger; zeros in the other lanes.
template <class Storage>
EVSAM_INLINE Vec load(const Storage* from, std::int64_t count) {
  if (count >= lanes) return load(from);
#if defined(__AVX512F__)
  const auto mask = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (sizeof(Storage) == 4) return _mm512_maskz_loadu_ps(mask, from);
#endif
  return load_some(from, count);
}

template <class Storage>
EVSAM_INLINE void store(Storage* to, Vec v, std::int64_t count) {
  if (count >= lanes) return store(to, v);
#if defined(__AVX512F__)
  const auto mask = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (sizeof(Storage) == 4) return _mm512_mask_storeu_ps(to, mask, v);
#endif
  store_some(to, v, count);
}

}  // namespace
}  // namespace evsam::EVSAM_ISA
