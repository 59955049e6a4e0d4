// Integer arithmetic, logic and bits.
#include <algorithm>
#include <bit>
#include <limits>

#include "elementwise.h"

namespace evsam::simt {
namespace {

template <class T>
using U = std::make_unsigned_t<T>;

// Wider by a factor of two.
template <class T>
struct WiderOf;
template <>
struct WiderOf<std::uint16_t> {
  using type = std::uint32_t;
};
template <>
struct WiderOf<std::int16_t> {
  using type = std::int32_t;
};
template <>
struct WiderOf<std::uint32_t> {
  using type = std::uint64_t;
};
template <>
struct WiderOf<std::int32_t> {
  using type = std::int64_t;
};
template <class T>
using Wider = typename WiderOf<T>::type;

// Unsigned arithmetic wraps; narrow types are not promoted to signed ones.
template <class T>
T add(T a, T b) {
  return T(U<T>(a) + U<T>(b));
}
template <class T>
T sub(T a, T b) {
  return T(U<T>(a) - U<T>(b));
}
template <class T>
T multiply_low(T a, T b) {
  return T(std::uint64_t(a) * std::uint64_t(b));
}

template <class T>
T clamp_to(std::int64_t value) {
  return T(std::clamp<std::int64_t>(value, std::numeric_limits<T>::min(),
                                    std::numeric_limits<T>::max()));
}
std::int32_t add_saturated(std::int32_t a, std::int32_t b) {
  return clamp_to<std::int32_t>(std::int64_t(a) + b);
}
std::int32_t sub_saturated(std::int32_t a, std::int32_t b) {
  return clamp_to<std::int32_t>(std::int64_t(a) - b);
}

template <class T>
T multiply_high(T a, T b) {
  if constexpr (sizeof(T) < 8) {
    return T((Wider<T>(a) * Wider<T>(b)) >> (8 * sizeof(T)));
  } else {
    const std::uint64_t mask = 0xffffffff;
    const std::uint64_t x = std::uint64_t(a), y = std::uint64_t(b);
    const std::uint64_t low = (x & mask) * (y & mask);
    const std::uint64_t first = (x >> 32) * (y & mask) + (low >> 32);
    const std::uint64_t second = (x & mask) * (y >> 32) + (first & mask);
    std::uint64_t high = (x >> 32) * (y >> 32) + (first >> 32) + (second >> 32);
    if constexpr (std::is_signed_v<T>) {
      if (a < 0) high -= y;
      if (b < 0) high -= x;
    }
    return T(high);
  }
}

template <class T>
Wider<T> multiply_wide(T a, T b) {
  return Wider<T>(a) * Wider<T>(b);
}
template <class T>
T mad_low(T a, T b, T c) {
  return add(multiply_low(a, b), c);
}
template <class T>
T mad_high(T a, T b, T c) {
  return add(multiply_high(a, b), c);
}
template <class T>
Wider<T> mad_wide(T a, T b, Wider<T> c) {
  return add(multiply_wide(a, b), c);
}
std::int32_t mad_high_saturated(std::int32_t a, std::int32_t b, std::int32_t c) {
  return add_saturated(multiply_high(a, b), c);
}

template <class T>
T sign_of_24(T a) {  // the low 24 bits
  return std::is_signed_v<T> ? T(std::int32_t(std::uint32_t(a) << 8) >> 8) : T(a & 0xffffff);
}
template <class T>
std::int64_t product_24(T a, T b) {
  return std::int64_t(sign_of_24(a)) * std::int64_t(sign_of_24(b));
}
template <class T>
T multiply_24_low(T a, T b) {
  return T(product_24(a, b));
}
template <class T>
T multiply_24_high(T a, T b) {
  return T(product_24(a, b) >> 16);
}
template <class T>
T mad_24_low(T a, T b, T c) {
  return add(multiply_24_low(a, b), c);
}
template <class T>
T mad_24_high(T a, T b, T c) {
  return add(multiply_24_high(a, b), c);
}

// Division by zero gives all ones, as GPUs do; PTX leaves it open.
template <class T>
T divide(T a, T b) {
  if (b == 0) return T(~T(0));
  if (std::is_signed_v<T> && b == T(-1)) return sub(T(0), a);
  return T(a / b);
}
template <class T>
T remainder(T a, T b) {
  if (b == 0) return a;
  if (std::is_signed_v<T> && b == T(-1)) return 0;
  return T(a % b);
}

template <class T>
T minimum(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T maximum(T a, T b) {
  return a < b ? b : a;
}
template <class T>
T minimum_relu(T a, T b) {
  return std::max<T>(minimum(a, b), 0);
}
template <class T>
T maximum_relu(T a, T b) {
  return std::max<T>(maximum(a, b), 0);
}
template <class T>
T negate(T a) {
  return sub(T(0), a);
}
template <class T>
T absolute(T a) {
  return a < 0 ? negate(a) : a;
}

template <class T>
T bit_and(T a, T b) {
  return a & b;
}
template <class T>
T bit_or(T a, T b) {
  return a | b;
}
template <class T>
T bit_xor(T a, T b) {
  return a ^ b;
}
template <class T>
T bit_not(T a) {
  return T(~a);
}
template <class T>
T logical_not(T a) {
  return a == 0;
}

template <class T>
T shift_left(T a, std::uint32_t n) {
  return n >= 8 * sizeof(T) ? T(0) : T(std::uint64_t(a) << n);
}
template <class T>
T shift_right(T a, std::uint32_t n) {
  const std::uint32_t most = 8 * sizeof(T) - 1;
  if (n > most && !std::is_signed_v<T>) return 0;
  return T(a >> std::min(n, most));
}

template <class T>
std::uint32_t count_ones(T a) {
  return std::uint32_t(std::popcount(a));
}
template <class T>
std::uint32_t leading_zeros(T a) {
  return std::uint32_t(std::countl_zero(a));
}
template <class T>
T reverse_bits(T a) {
  T result = 0;
  for (std::size_t i = 0; i < 8 * sizeof(T); ++i)
    result |= T(a >> i & 1) << (8 * sizeof(T) - 1 - i);
  return result;
}
// The position of the highest bit that differs from the sign.
template <class T>
std::uint32_t find_highest(T a) {
  const U<T> bits = U<T>(std::is_signed_v<T> && a < 0 ? ~a : a);
  return bits ? std::uint32_t(std::bit_width(bits)) - 1 : ~std::uint32_t(0);
}
template <class T>
std::uint32_t find_highest_shift(T a) {
  const std::uint32_t at = find_highest(a);
  return at == ~std::uint32_t(0) ? at : std::uint32_t(8 * sizeof(T)) - 1 - at;
}

template <class T>
T extract(T a, std::uint32_t position, std::uint32_t length) {
  constexpr std::uint32_t BITS = 8 * sizeof(T);
  position &= 0xff;
  length &= 0xff;
  const U<T> bits = U<T>(a);
  // Above the last bit of the field, and of the number, stands the sign.
  const std::uint32_t top = std::min(position + length - 1, BITS - 1);
  const bool sign = std::is_signed_v<T> && length > 0 && (bits >> top & 1);
  U<T> field = position < BITS ? U<T>(bits >> position) : U<T>(0);
  const std::uint32_t present = position < BITS ? std::min(length, BITS - position) : 0;
  if (present < BITS) {
    const U<T> low = U<T>((U<T>(1) << present) - 1);
    field = U<T>((field & low) | (sign ? U<T>(~low) : U<T>(0)));
  }
  return T(field);
}

template <class T>
T insert(T field, T into, std::uint32_t position, std::uint32_t length) {
  constexpr std::uint32_t BITS = 8 * sizeof(T);
  position &= 0xff;
  length &= 0xff;
  if (position >= BITS || length == 0) return into;
  const T ones = length >= BITS ? T(~T(0)) : T((T(1) << length) - 1);
  const T mask = T(ones << position);
  return T((into & ~mask) | (T(field << position) & mask));
}

std::uint32_t bit_field_mask(std::uint32_t position, std::uint32_t length) {
  return insert<std::uint32_t>(~0u, 0, position, length);
}

std::uint32_t permute(std::uint32_t a, std::uint32_t b, std::uint32_t selector) {
  const std::uint64_t bytes = std::uint64_t(b) << 32 | a;
  std::uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const std::uint32_t pick = selector >> (4 * i) & 0xf;
    std::uint32_t byte = std::uint32_t(bytes >> (8 * (pick & 7))) & 0xff;
    if (pick & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << (8 * i);
  }
  return result;
}

// The modes of prmt: which of the eight bytes goes where, for each value of the low bits of c.
template <int mode>
std::uint32_t permute_mode(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  constexpr std::uint32_t MODES[6][4] = {
      {0x3210, 0x4321, 0x5432, 0x6543},  // f4e
      {0x5670, 0x6701, 0x7012, 0x0123},  // b4e
      {0x0000, 0x1111, 0x2222, 0x3333},  // rc8
      {0x3210, 0x3211, 0x3222, 0x3333},  // ecl
      {0x0000, 0x1110, 0x2210, 0x3210},  // ecr
      {0x1010, 0x3232, 0x1010, 0x3232},  // rc16
  };
  return permute(a, b, MODES[mode][c & 3]);
}

template <bool wrap>
std::uint32_t funnel_left(std::uint32_t low, std::uint32_t high, std::uint32_t n) {
  n = wrap ? n & 31 : std::min(n, 32u);
  return std::uint32_t(((std::uint64_t(high) << 32 | low) << n) >> 32);
}
template <bool wrap>
std::uint32_t funnel_right(std::uint32_t low, std::uint32_t high, std::uint32_t n) {
  n = wrap ? n & 31 : std::min(n, 32u);
  return std::uint32_t((std::uint64_t(high) << 32 | low) >> n);
}

template <class T>
std::uint32_t sum_of_differences(T a, T b, std::uint32_t c) {
  return (a < b ? U<T>(b) - U<T>(a) : U<T>(a) - U<T>(b)) + c;
}

// Dot products of four bytes.
template <class A, class B>
std::uint32_t dot_4(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  for (int i = 0; i < 4; ++i) c += std::uint32_t(int(A(a >> (8 * i))) * int(B(b >> (8 * i))));
  return c;
}
// Two half-words and two of the bytes.
template <class A, class B, int half>
std::uint32_t dot_2(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  for (int i = 0; i < 2; ++i) {
    c += std::uint32_t(int(A(a >> (16 * i))) * int(B(b >> (16 * half + 8 * i))));
  }
  return c;
}

// ---- decoding

template <class F>
Handler for_wide(Decoding& d, Type type, F f) {
  switch (type) {
    case Type::b32:
    case Type::u32:
      return f(Tag<std::uint32_t>());
    case Type::s32:
      return f(Tag<std::int32_t>());
    case Type::b64:
    case Type::u64:
      return f(Tag<std::uint64_t>());
    case Type::s64:
      return f(Tag<std::int64_t>());
    default:
      d.unsupported();
  }
}

template <class F>
Handler for_wide_bits(Decoding& d, Type type, F f) {
  if (bytes_of(type) == 4) return f(Tag<std::uint32_t>());
  if (bytes_of(type) == 8) return f(Tag<std::uint64_t>());
  d.unsupported();
}

// add.cc, addc, sub.cc, subc, mad.cc: the carry of each lane is kept in the warp.
template <class T, bool subtract, bool use_carry, bool set_carry>
void with_carry(Warp& warp, const Instruction& instruction, Mask mask) {
  T* result = warp.lanes<T>(instruction.operands[0]);
  const T* a = warp.lanes<T>(instruction.operands[1]);
  const T* b = warp.lanes<T>(instruction.operands[2]);
  for (; mask; mask &= mask - 1) {
    const int lane = std::countr_zero(mask);
    const T carry = use_carry ? T(warp.carry >> lane & 1) : T(0);
    const T x = a[lane], y = b[lane];
    const T first = subtract ? T(x - y) : T(x + y);
    const T value = subtract ? T(first - carry) : T(first + carry);
    const bool out = subtract ? x < y || first < carry : first < x || value < first;
    result[lane] = value;
    if (set_carry) warp.carry = (warp.carry & ~(Mask(1) << lane)) | Mask(out) << lane;
  }
}

template <bool subtract, bool use_carry, bool set_carry>
void decode_carry(Decoding& d) {
  const Type type = d.type();
  same_types(d, type, 2);
  d.instruction().execute = for_wide_bits(d, type, [](auto tag) -> Handler {
    return with_carry<typename decltype(tag)::type, subtract, use_carry, set_carry>;
  });
}

template <class T, bool high, bool use_carry, bool set_carry>
void mad_with_carry(Warp& warp, const Instruction& instruction, Mask mask) {
  T* result = warp.lanes<T>(instruction.operands[0]);
  const T* a = warp.lanes<T>(instruction.operands[1]);
  const T* b = warp.lanes<T>(instruction.operands[2]);
  const T* c = warp.lanes<T>(instruction.operands[3]);
  for (; mask; mask &= mask - 1) {
    const int lane = std::countr_zero(mask);
    const U<T> carry = use_carry ? U<T>(warp.carry >> lane & 1) : U<T>(0);
    const U<T> product =
        U<T>(high ? multiply_high(a[lane], b[lane]) : multiply_low(a[lane], b[lane]));
    const U<T> first = U<T>(product + U<T>(c[lane]));
    const U<T> value = U<T>(first + carry);
    const bool out = first < product || value < first;
    result[lane] = T(value);
    if (set_carry) warp.carry = (warp.carry & ~(Mask(1) << lane)) | Mask(out) << lane;
  }
}

template <bool use_carry, bool set_carry>
void decode_mad_carry(Decoding& d, bool high) {
  const Type type = d.type();
  same_types(d, type, 3);
  d.instruction().execute = for_wide(d, type, [&](auto tag) -> Handler {
    using T = typename decltype(tag)::type;
    return high ? mad_with_carry<T, true, use_carry, set_carry>
                : mad_with_carry<T, false, use_carry, set_carry>;
  });
}

void decode_addc(Decoding& d) {
  d.take("cc") ? decode_carry<false, true, true>(d) : decode_carry<false, true, false>(d);
}
void decode_subc(Decoding& d) {
  d.take("cc") ? decode_carry<true, true, true>(d) : decode_carry<true, true, false>(d);
}
void decode_madc(Decoding& d) {
  const bool high = d.take("hi");
  d.take("lo");
  d.take("cc") ? decode_mad_carry<true, true>(d, high) : decode_mad_carry<true, false>(d, high);
}

template <class F>
void two_integers(Decoding& d, F f) {
  const Type type = d.type();
  same_types(d, type, 2);
  d.instruction().execute = for_integer(d, type, f);
}

#define EVSAM_INTEGER_PAIR(function) \
  two_integers(                      \
      d, [](auto tag) -> Handler { return elementwise<function<typename decltype(tag)::type>>; })

void decode_add(Decoding& d) {
  if (d.take("cc")) {
    decode_carry<false, false, true>(d);
    return;
  }
  if (d.take("sat")) {
    if (d.type() != Type::s32) d.unsupported();
    same_types(d, Type::s32, 2);
    d.instruction().execute = elementwise<add_saturated>;
    return;
  }
  if (d.take("u16x2") || d.take("s16x2")) {
    same_types(d, Type::b32, 2);
    d.instruction().execute = elementwise_packed<add<std::uint16_t>>;
    return;
  }
  EVSAM_INTEGER_PAIR(add);
}

void decode_sub(Decoding& d) {
  if (d.take("cc")) {
    decode_carry<true, false, true>(d);
    return;
  }
  if (d.take("sat")) {
    if (d.type() != Type::s32) d.unsupported();
    same_types(d, Type::s32, 2);
    d.instruction().execute = elementwise<sub_saturated>;
    return;
  }
  EVSAM_INTEGER_PAIR(sub);
}

Type wider(Decoding& d, Type type) {
  switch (type) {
    case Type::u16:
      return Type::u32;
    case Type::s16:
      return Type::s32;
    case Type::u32:
      return Type::u64;
    case Type::s32:
      return Type::s64;
    default:
      d.fail("there is no type twice as wide");
  }
}

template <class F>
Handler for_narrow_integer(Decoding& d, Type type, F f) {
  switch (type) {
    case Type::u16:
      return f(Tag<std::uint16_t>());
    case Type::u32:
      return f(Tag<std::uint32_t>());
    case Type::s16:
      return f(Tag<std::int16_t>());
    case Type::s32:
      return f(Tag<std::int32_t>());
    default:
      d.unsupported();
  }
}

void decode_mul(Decoding& d) {
  const bool wide = d.take("wide");
  const bool high = d.take("hi");
  d.take("lo");
  const Type type = d.type();
  if (wide) {
    d.write(0, wider(d, type));
    d.read(1, type);
    d.read(2, type);
    d.instruction().execute = for_narrow_integer(d, type, [](auto tag) -> Handler {
      return elementwise<multiply_wide<typename decltype(tag)::type>>;
    });
    return;
  }
  same_types(d, type, 2);
  d.instruction().execute = for_integer(d, type, [&](auto tag) -> Handler {
    using T = typename decltype(tag)::type;
    return high ? elementwise<multiply_high<T>> : elementwise<multiply_low<T>>;
  });
}

void decode_mad(Decoding& d) {
  const bool wide = d.take("wide");
  const bool high = d.take("hi");
  d.take("lo");
  if (d.take("cc")) {
    decode_mad_carry<false, true>(d, high);
    return;
  }
  const bool saturate = d.take("sat");
  const Type type = d.type();
  if (saturate) {
    if (!high || type != Type::s32) d.unsupported();
    same_types(d, type, 3);
    d.instruction().execute = elementwise<mad_high_saturated>;
    return;
  }
  if (wide) {
    d.write(0, wider(d, type));
    d.read(1, type);
    d.read(2, type);
    d.read(3, wider(d, type));
    d.instruction().execute = for_narrow_integer(d, type, [](auto tag) -> Handler {
      return elementwise<mad_wide<typename decltype(tag)::type>>;
    });
    return;
  }
  same_types(d, type, 3);
  d.instruction().execute = for_integer(d, type, [&](auto tag) -> Handler {
    using T = typename decltype(tag)::type;
    return high ? elementwise<mad_high<T>> : elementwise<mad_low<T>>;
  });
}

template <class F>
Handler for_32(Decoding& d, Type type, F f) {
  if (type == Type::u32) return f(Tag<std::uint32_t>());
  if (type == Type::s32) return f(Tag<std::int32_t>());
  d.unsupported();
}

void decode_mul24(Decoding& d) {
  const bool high = d.take("hi");
  d.take("lo");
  const Type type = d.type();
  same_types(d, type, 2);
  d.instruction().execute = for_32(d, type, [&](auto tag) -> Handler {
    using T = typename decltype(tag)::type;
    return high ? elementwise<multiply_24_high<T>> : elementwise<multiply_24_low<T>>;
  });
}

void decode_mad24(Decoding& d) {
  const bool high = d.take("hi");
  d.take("lo");
  const Type type = d.type();
  same_types(d, type, 3);
  d.instruction().execute = for_32(d, type, [&](auto tag) -> Handler {
    using T = typename decltype(tag)::type;
    return high ? elementwise<mad_24_high<T>> : elementwise<mad_24_low<T>>;
  });
}

void decode_div(Decoding& d) { EVSAM_INTEGER_PAIR(divide); }
void decode_rem(Decoding& d) { EVSAM_INTEGER_PAIR(remainder); }

template <bool maximal>
void decode_extremum(Decoding& d) {
  const bool relu = d.take("relu");
  Type type;
  const bool packed_signed = d.take("s16x2");
  const bool packed_unsigned = !packed_signed && d.take("u16x2");
  if (packed_signed || packed_unsigned) {
    same_types(d, Type::b32, 2);
    using S = std::int16_t;
    using V = std::uint16_t;
    if (packed_unsigned) {
      if (relu) d.unsupported();
      d.instruction().execute =
          maximal ? elementwise_packed<maximum<V>> : elementwise_packed<minimum<V>>;
    } else if (relu) {
      d.instruction().execute =
          maximal ? elementwise_packed<maximum_relu<S>> : elementwise_packed<minimum_relu<S>>;
    } else {
      d.instruction().execute =
          maximal ? elementwise_packed<maximum<S>> : elementwise_packed<minimum<S>>;
    }
    return;
  }
  type = d.type();
  same_types(d, type, 2);
  d.instruction().execute = for_integer(d, type, [&](auto tag) -> Handler {
    using T = typename decltype(tag)::type;
    if (relu) {
      if (type != Type::s32) d.unsupported();
      return maximal ? elementwise<maximum_relu<T>> : elementwise<minimum_relu<T>>;
    }
    return maximal ? elementwise<maximum<T>> : elementwise<minimum<T>>;
  });
}

void decode_neg(Decoding& d) {
  const Type type = d.type();
  same_types(d, type, 1);
  d.instruction().execute = for_integer(d, type, [](auto tag) -> Handler {
    return elementwise<negate<typename decltype(tag)::type>>;
  });
}

void decode_abs(Decoding& d) {
  const Type type = d.type();
  same_types(d, type, 1);
  d.instruction().execute = for_integer(d, type, [&](auto tag) -> Handler {
    using T = typename decltype(tag)::type;
    if constexpr (std::is_signed_v<T>) return elementwise<absolute<T>>;
    d.unsupported();
  });
}

// Predicates are masks: their logic works on all lanes at once.
template <Mask (*f)(Mask, Mask)>
void mask_logic(Warp& warp, const Instruction& instruction, Mask mask) {
  Mask& result = warp.predicate(instruction.operands[0]);
  const Mask value = f(warp.predicate(instruction.operands[1]),
                       warp.predicate(instruction.operands[instruction.operand_count - 1]));
  result = (result & ~mask) | (value & mask);
}
Mask second_inverted(Mask, Mask b) { return ~b; }

#define EVSAM_LOGIC(name, function)                                       \
  void name(Decoding& d) {                                                \
    const Type type = d.type();                                           \
    same_types(d, type, 2);                                               \
    if (type == Type::pred) {                                             \
      d.instruction().execute = mask_logic<function<Mask>>;               \
      return;                                                             \
    }                                                                     \
    d.instruction().execute = for_bits(d, type, [](auto tag) -> Handler { \
      return elementwise<function<typename decltype(tag)::type>>;         \
    });                                                                   \
  }
EVSAM_LOGIC(decode_and, bit_and)
EVSAM_LOGIC(decode_or, bit_or)
EVSAM_LOGIC(decode_xor, bit_xor)

void decode_not(Decoding& d) {
  const Type type = d.type();
  same_types(d, type, 1);
  if (type == Type::pred) {
    d.instruction().execute = mask_logic<second_inverted>;
    return;
  }
  d.instruction().execute = for_bits(d, type, [](auto tag) -> Handler {
    return elementwise<bit_not<typename decltype(tag)::type>>;
  });
}

void decode_cnot(Decoding& d) {
  const Type type = d.type();
  same_types(d, type, 1);
  d.instruction().execute = for_bits(d, type, [](auto tag) -> Handler {
    return elementwise<logical_not<typename decltype(tag)::type>>;
  });
}

void decode_shl(Decoding& d) {
  const Type type = d.type();
  d.write(0, type);
  d.read(1, type);
  d.read(2, Type::u32);
  d.instruction().execute = for_bits(d, type, [](auto tag) -> Handler {
    return elementwise<shift_left<typename decltype(tag)::type>>;
  });
}

void decode_shr(Decoding& d) {
  const Type type = d.type();
  d.write(0, type);
  d.read(1, type);
  d.read(2, Type::u32);
  const auto handler = [](auto tag) -> Handler {
    return elementwise<shift_right<typename decltype(tag)::type>>;
  };
  d.instruction().execute =
      is_signed(type) ? for_integer(d, type, handler) : for_bits(d, type, handler);
}

void decode_popc(Decoding& d) {
  const Type type = d.type();
  d.write(0, Type::u32);
  d.read(1, type);
  d.instruction().execute = for_wide_bits(d, type, [](auto tag) -> Handler {
    return elementwise<count_ones<typename decltype(tag)::type>>;
  });
}

void decode_clz(Decoding& d) {
  const Type type = d.type();
  d.write(0, Type::u32);
  d.read(1, type);
  d.instruction().execute = for_wide_bits(d, type, [](auto tag) -> Handler {
    return elementwise<leading_zeros<typename decltype(tag)::type>>;
  });
}

void decode_brev(Decoding& d) {
  const Type type = d.type();
  same_types(d, type, 1);
  d.instruction().execute = for_wide_bits(d, type, [](auto tag) -> Handler {
    return elementwise<reverse_bits<typename decltype(tag)::type>>;
  });
}

void decode_bfind(Decoding& d) {
  const bool shift = d.take("shiftamt");
  const Type type = d.type();
  d.write(0, Type::u32);
  d.read(1, type);
  d.instruction().execute = for_wide(d, type, [&](auto tag) -> Handler {
    using T = typename decltype(tag)::type;
    return shift ? elementwise<find_highest_shift<T>> : elementwise<find_highest<T>>;
  });
}

void decode_bfe(Decoding& d) {
  const Type type = d.type();
  d.write(0, type);
  d.read(1, type);
  d.read(2, Type::u32);
  d.read(3, Type::u32);
  d.instruction().execute = for_wide(d, type, [](auto tag) -> Handler {
    return elementwise<extract<typename decltype(tag)::type>>;
  });
}

void decode_bfi(Decoding& d) {
  const Type type = d.type();
  d.write(0, type);
  d.read(1, type);
  d.read(2, type);
  d.read(3, Type::u32);
  d.read(4, Type::u32);
  d.instruction().execute = for_wide_bits(d, type, [](auto tag) -> Handler {
    return elementwise<insert<typename decltype(tag)::type>>;
  });
}

void decode_bmsk(Decoding& d) {
  if (!d.take("clamp") || d.type() != Type::b32) d.unsupported();
  same_types(d, Type::b32, 2);
  d.instruction().execute = elementwise<bit_field_mask>;
}

// The table of lop3 has the result for the bits of a, b and c as 4a + 2b + c.
void look_up_3(Warp& warp, const Instruction& instruction, Mask mask) {
  std::uint32_t* result = warp.lanes<std::uint32_t>(instruction.operands[0]);
  const std::uint32_t* a = warp.lanes<std::uint32_t>(instruction.operands[1]);
  const std::uint32_t* b = warp.lanes<std::uint32_t>(instruction.operands[2]);
  const std::uint32_t* c = warp.lanes<std::uint32_t>(instruction.operands[3]);
  std::uint32_t term[8];  // all ones where the table has a one
  for (int i = 0; i < 8; ++i) term[i] = instruction.option >> i & 1 ? ~0u : 0u;
  for_lanes(mask, [&](int lane) {
    const std::uint32_t x = a[lane], y = b[lane], z = c[lane];
    const std::uint32_t low =
        (~y & ((~z & term[0]) | (z & term[1]))) | (y & ((~z & term[2]) | (z & term[3])));
    const std::uint32_t high =
        (~y & ((~z & term[4]) | (z & term[5]))) | (y & ((~z & term[6]) | (z & term[7])));
    result[lane] = (~x & low) | (x & high);
  });
}

void decode_lop3(Decoding& d) {
  if (d.type() != Type::b32) d.unsupported();
  d.write(0, Type::b32);
  for (int i = 1; i <= 3; ++i) d.read(i, Type::b32);
  const std::uint64_t table = d.immediate(4);
  if (table > 255) d.fail("the table of lop3 has 8 bits");
  d.instruction().option = std::uint32_t(table);
  d.instruction().execute = look_up_3;
}

void decode_shf(Decoding& d) {
  const bool left = d.take("l");
  if (!left && !d.take("r")) d.unsupported();
  const bool wrap = d.take("wrap");
  if (!wrap && !d.take("clamp")) d.unsupported();
  if (bytes_of(d.type()) != 4) d.unsupported();
  same_types(d, Type::b32, 3);
  d.instruction().execute =
      left ? (wrap ? elementwise<funnel_left<true>> : elementwise<funnel_left<false>>)
           : (wrap ? elementwise<funnel_right<true>> : elementwise<funnel_right<false>>);
}

void decode_prmt(Decoding& d) {
  if (d.type() != Type::b32) d.unsupported();
  same_types(d, Type::b32, 3);
  d.instruction().execute = d.choose<Handler>({{"f4e", elementwise<permute_mode<0>>},
                                               {"b4e", elementwise<permute_mode<1>>},
                                               {"rc8", elementwise<permute_mode<2>>},
                                               {"ecl", elementwise<permute_mode<3>>},
                                               {"ecr", elementwise<permute_mode<4>>},
                                               {"rc16", elementwise<permute_mode<5>>}})
                                .value_or(elementwise<permute>);
}

void decode_sad(Decoding& d) {
  const Type type = d.type();
  same_types(d, type, 3);
  d.instruction().execute = for_32(d, type, [](auto tag) -> Handler {
    return elementwise<sum_of_differences<typename decltype(tag)::type>>;
  });
}

void decode_dp4a(Decoding& d) {
  const Type a = d.type(), b = d.type();
  same_types(d, Type::b32, 3);
  using S = std::int8_t;
  using V = std::uint8_t;
  d.instruction().execute =
      is_signed(a) ? (is_signed(b) ? elementwise<dot_4<S, S>> : elementwise<dot_4<S, V>>)
                   : (is_signed(b) ? elementwise<dot_4<V, S>> : elementwise<dot_4<V, V>>);
}

template <int half>
Handler dot_2_handler(bool a, bool b) {
  using S = std::int16_t;
  using V = std::uint16_t;
  using S8 = std::int8_t;
  using V8 = std::uint8_t;
  return a ? (b ? elementwise<dot_2<S, S8, half>> : elementwise<dot_2<S, V8, half>>)
           : (b ? elementwise<dot_2<V, S8, half>> : elementwise<dot_2<V, V8, half>>);
}

void decode_dp2a(Decoding& d) {
  const bool high = d.take("hi");
  if (!high && !d.take("lo")) d.unsupported();
  const Type a = d.type(), b = d.type();
  same_types(d, Type::b32, 3);
  d.instruction().execute = high ? dot_2_handler<1>(is_signed(a), is_signed(b))
                                 : dot_2_handler<0>(is_signed(a), is_signed(b));
}

}  // namespace

std::span<const Opcode> integer_opcodes() {
  static constexpr Opcode OPCODES[] = {
      {"add", "integer", decode_add},
      {"sub", "integer", decode_sub},
      {"mul", "integer", decode_mul},
      {"mad", "integer", decode_mad},
      {"mul24", "integer", decode_mul24},
      {"mad24", "integer", decode_mad24},
      {"div", "integer", decode_div},
      {"rem", "integer", decode_rem},
      {"min", "integer", decode_extremum<false>},
      {"max", "integer", decode_extremum<true>},
      {"neg", "integer", decode_neg},
      {"abs", "integer", decode_abs},
      {"and", "integer", decode_and},
      {"or", "integer", decode_or},
      {"xor", "integer", decode_xor},
      {"not", "integer", decode_not},
      {"cnot", "integer", decode_cnot},
      {"shl", "integer", decode_shl},
      {"shr", "integer", decode_shr},
      {"popc", "integer", decode_popc},
      {"clz", "integer", decode_clz},
      {"brev", "integer", decode_brev},
      {"bfind", "integer", decode_bfind},
      {"bfe", "integer", decode_bfe},
      {"bfi", "integer", decode_bfi},
      {"bmsk", "integer", decode_bmsk},
      {"lop3", "integer", decode_lop3},
      {"shf", "integer", decode_shf},
      {"prmt", "integer", decode_prmt},
      {"sad", "integer", decode_sad},
      {"dp4a", "integer", decode_dp4a},
      {"dp2a", "integer", decode_dp2a},
      {"addc", "integer", decode_addc},
      {"subc", "integer", decode_subc},
      {"madc", "integer", decode_madc},
  };
  return OPCODES;
}

}  // namespace evsam::simt
