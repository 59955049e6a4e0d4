// mov, with packing and unpacking of registers; comparisons and selections.
#include <array>
#include <cmath>
#include <cstring>

#include "../numbers.h"
#include "elementwise.h"

namespace evsam::simt {
namespace {

template <class T>
T copy(T a) {
  return a;
}

void copy_predicate(Warp& warp, const Instruction& instruction, Mask mask) {
  Mask& target = warp.predicate(instruction.operands[0]);
  const Mask read = warp.predicate(instruction.operands[1]);
  const Mask value = instruction.negated ? ~read : read;
  target = (target & ~mask) | (value & mask);
}

// option: bytes of each part
void pack(Warp& warp, const Instruction& instruction, Mask mask) {
  const int parts = instruction.operand_count - 1;
  const std::size_t part = instruction.option;
  std::byte* target = warp.lanes<std::byte>(instruction.operands[0]);
  for (int i = 0; i < parts; ++i) {
    const std::byte* source = warp.lanes<std::byte>(instruction.operands[i + 1]);
    for_lanes(mask, [&](int lane) {
      std::memcpy(target + (lane * parts + i) * part, source + lane * part, part);
    });
  }
}

void unpack(Warp& warp, const Instruction& instruction, Mask mask) {
  const int parts = instruction.operand_count - 1;
  const std::size_t part = instruction.option;
  // A part may be the register that is taken apart.
  std::byte source[8 * LANES];
  std::memcpy(source, warp.lanes<std::byte>(instruction.operands[parts]), parts * part * LANES);
  for (int i = 0; i < parts; ++i) {
    std::byte* target = warp.lanes<std::byte>(instruction.operands[i]);
    for_lanes(mask, [&](int lane) {
      std::memcpy(target + lane * part, source + (lane * parts + i) * part, part);
    });
  }
}

template <class T>
void read_clock(Warp& warp, const Instruction& instruction, Mask mask) {
  T* target = warp.lanes<T>(instruction.operands[0]);
  const T now = T(warp.block->now());
  for_lanes(mask, [&](int lane) { target[lane] = now; });
}

Type bits_of(Decoding& d, int bytes) {
  switch (bytes) {
    case 2:
      return Type::b16;
    case 4:
      return Type::b32;
    case 8:
      return Type::b64;
    default:
      d.fail("the parts do not make a register");
  }
}

void decode_mov(Decoding& d) {
  const Type type = d.type();
  Instruction& instruction = d.instruction();
  const int bytes = bytes_of(type);
  if (d.is_vector(0) || d.is_vector(1)) {
    const bool packing = d.is_vector(1);
    if (packing && d.is_vector(0)) d.unsupported();
    const int parts = int(d.operand(packing ? 1 : 0).children.size());
    if (parts == 0 || bytes % parts) d.fail("the parts do not make a register");
    instruction.option = std::uint32_t(bytes / parts);
    const Type part = bits_of(d, bytes / parts);
    if (packing) {
      d.write(0, type);
      d.read_vector(1, part, parts);
      instruction.execute = pack;
    } else {
      d.write_vector(0, part, parts);
      d.read(1, type);
      instruction.execute = unpack;
    }
    return;
  }
  d.write(0, type);
  const Operand& source = d.operand(1);
  if (source.kind == Operand::Kind::symbol &&
      (source.name == "%clock" || source.name == "%clock64" || source.name == "%globaltimer" ||
       source.name == "%clock_hi" || source.name == "%globaltimer_lo")) {
    if (source.name == "%clock_hi") d.unsupported();
    instruction.execute = bytes == 8 ? read_clock<std::uint64_t> : read_clock<std::uint32_t>;
    return;
  }
  d.read(1, type);
  if (type == Type::pred) {
    instruction.execute = copy_predicate;
    return;
  }
  instruction.execute = for_bits(
      d, type, [](auto tag) -> Handler { return elementwise<copy<typename decltype(tag)::type>>; });
}

// ---- setp, set

enum class Compare : std::uint8_t {
  eq,
  ne,
  lt,
  le,
  gt,
  ge,
  equ,
  neu,
  ltu,
  leu,
  gtu,
  geu,
  num,
  nan
};

template <Compare compare, class T>
inline bool holds(T a, T b) {
  using enum Compare;
  switch (compare) {
    case eq:
      return a == b;
    case ne:
      return a < b || a > b;
    case lt:
      return a < b;
    case le:
      return a <= b;
    case gt:
      return a > b;
    case ge:
      return a >= b;
    case equ:
      return !(a < b || a > b);
    case neu:
      return a != b;
    case ltu:
      return !(a >= b);
    case leu:
      return !(a > b);
    case gtu:
      return !(a <= b);
    case geu:
      return !(a < b);
    case num:
      return a == a && b == b;
    case nan:
      return a != a || b != b;
  }
}

// What is compared: a value of a lane made comparable.
template <class T>
struct Plain {
  using Register = T;
  static T value(T a) { return a; }
};
struct Flushed {
  using Register = float;
  static float value(float a) { return std::fabs(a) < 0x1p-126f ? 0.0f : a; }
};
struct HalfValue {
  using Register = std::uint16_t;
  static float value(std::uint16_t a) { return half_to_float(a); }
};
struct BfloatValue {
  using Register = std::uint16_t;
  static float value(std::uint16_t a) { return bfloat_to_float(a); }
};

// option of setp: how the comparison is joined with a third operand
enum Join : std::uint32_t { NO_JOIN, AND, OR, XOR };
constexpr std::uint32_t TWO_RESULTS = 4;

template <class V, Compare compare>
Mask compare_lanes(Warp& warp, Place left, Place right) {
  const auto* a = warp.lanes<typename V::Register>(left);
  const auto* b = warp.lanes<typename V::Register>(right);
  Mask found = 0;
  for (int lane = 0; lane < LANES; ++lane) {
    found |= Mask(holds<compare>(V::value(a[lane]), V::value(b[lane]))) << lane;
  }
  return found;
}

Mask join(Warp& warp, const Instruction& instruction, Mask found) {
  if (!(instruction.option & 3)) return found;
  Mask third = warp.predicate(instruction.operands[instruction.operand_count - 1]);
  if (instruction.negated) third = ~third;
  switch (instruction.option & 3) {
    case AND:
      return found & third;
    case OR:
      return found | third;
    default:
      return found ^ third;
  }
}

template <class V, Compare compare>
void set_predicate(Warp& warp, const Instruction& instruction, Mask mask) {
  const bool two = instruction.option & TWO_RESULTS;
  const Place* operands = instruction.operands;
  const Mask found = compare_lanes<V, compare>(warp, operands[two ? 2 : 1], operands[two ? 3 : 2]);
  const Mask first = join(warp, instruction, found);
  const Mask second = two ? join(warp, instruction, ~found) : 0;
  Mask& to = warp.predicate(operands[0]);
  to = (to & ~mask) | (first & mask);
  if (two) {
    Mask& other = warp.predicate(operands[1]);
    other = (other & ~mask) | (second & mask);
  }
}

// set: what is true becomes the bits of `target`, in the lowest of `memory.registers` bytes.
template <class V, Compare compare>
void set_register(Warp& warp, const Instruction& instruction, Mask mask) {
  const Mask found =
      join(warp, instruction,
           compare_lanes<V, compare>(warp, instruction.operands[1], instruction.operands[2]));
  std::byte* to = warp.lanes<std::byte>(instruction.operands[0]);
  const std::size_t bytes = instruction.memory.registers;
  for_lanes(mask, [&](int lane) {
    const std::uint32_t bits = found >> lane & 1 ? instruction.target : 0u;
    std::memcpy(to + lane * bytes, &bits, bytes);
  });
}

template <class V, bool predicate, std::size_t... I>
Handler comparison(Compare compare, std::index_sequence<I...>) {
  static constexpr Handler TABLE[] = {
      (predicate ? set_predicate<V, Compare(I)> : set_register<V, Compare(I)>)...};
  return TABLE[int(compare)];
}

template <class V, bool predicate>
Handler comparison(Compare compare) {
  return comparison<V, predicate>(compare, std::make_index_sequence<int(Compare::nan) + 1>());
}

template <bool predicate>
Handler comparison(Decoding& d, Type type, Compare compare, bool ftz) {
  if (is_float(type)) {
    switch (type) {
      case Type::f32:
        return ftz ? comparison<Flushed, predicate>(compare)
                   : comparison<Plain<float>, predicate>(compare);
      case Type::f64:
        return comparison<Plain<double>, predicate>(compare);
      case Type::f16:
        return comparison<HalfValue, predicate>(compare);
      case Type::bf16:
        return comparison<BfloatValue, predicate>(compare);
      default:
        d.unsupported();
    }
  }
  if (compare > Compare::ge) d.unsupported();
  const auto pick = [&](auto tag) -> Handler {
    return comparison<Plain<typename decltype(tag)::type>, predicate>(compare);
  };
  return is_signed(type) ? for_integer(d, type, pick) : for_bits(d, type, pick);
}

Compare take_compare(Decoding& d) {
  using enum Compare;
  return d.require<Compare>("a comparison", {{"eq", eq},
                                             {"ne", ne},
                                             {"lt", lt},
                                             {"le", le},
                                             {"gt", gt},
                                             {"ge", ge},
                                             {"lo", lt},
                                             {"ls", le},
                                             {"hi", gt},
                                             {"hs", ge},
                                             {"equ", equ},
                                             {"neu", neu},
                                             {"ltu", ltu},
                                             {"leu", leu},
                                             {"gtu", gtu},
                                             {"geu", geu},
                                             {"num", num},
                                             {"nan", nan}});
}

std::uint32_t take_join(Decoding& d) {
  return d.choose<std::uint32_t>({{"and", AND}, {"or", OR}, {"xor", XOR}}).value_or(NO_JOIN);
}

// Halves in pairs: one predicate for each.
template <class V, Compare compare>
std::array<Mask, 2> compare_packed(Warp& warp, const Instruction& instruction, int first) {
  const std::uint16_t* a = warp.lanes<std::uint16_t>(instruction.operands[first]);
  const std::uint16_t* b = warp.lanes<std::uint16_t>(instruction.operands[first + 1]);
  std::array<Mask, 2> found = {};
  for (int i = 0; i < 2 * LANES; ++i) {
    found[i % 2] |= Mask(holds<compare>(V::value(a[i]), V::value(b[i]))) << (i / 2);
  }
  for (Mask& half : found) half = join(warp, instruction, half);
  return found;
}

template <class V, Compare compare>
void set_predicates_packed(Warp& warp, const Instruction& instruction, Mask mask) {
  const auto found = compare_packed<V, compare>(warp, instruction, 2);
  for (int i = 0; i < 2; ++i) {
    Mask& to = warp.predicate(instruction.operands[i]);
    to = (to & ~mask) | (found[i] & mask);
  }
}

template <class V, Compare compare>
void set_register_packed(Warp& warp, const Instruction& instruction, Mask mask) {
  const auto found = compare_packed<V, compare>(warp, instruction, 1);
  std::uint32_t* to = warp.lanes<std::uint32_t>(instruction.operands[0]);
  const std::uint32_t yes = instruction.target;
  for_lanes(mask, [&](int lane) {
    to[lane] = (found[0] >> lane & 1 ? yes : 0u) | (found[1] >> lane & 1 ? yes << 16 : 0u);
  });
}

template <class V, bool predicate, std::size_t... I>
Handler packed_comparison(Compare compare, std::index_sequence<I...>) {
  static constexpr Handler TABLE[] = {
      (predicate ? set_predicates_packed<V, Compare(I)> : set_register_packed<V, Compare(I)>)...};
  return TABLE[int(compare)];
}

template <bool predicate>
Handler packed_comparison(Type type, Compare compare) {
  const std::make_index_sequence<int(Compare::nan) + 1> all;
  return type == Type::f16x2 ? packed_comparison<HalfValue, predicate>(compare, all)
                             : packed_comparison<BfloatValue, predicate>(compare, all);
}

bool is_packed(Type type) { return type == Type::f16x2 || type == Type::bf16x2; }

void decode_setp(Decoding& d) {
  const Compare compare = take_compare(d);
  Instruction& instruction = d.instruction();
  instruction.option = take_join(d);
  const bool ftz = d.take("ftz");
  const Type type = d.type();
  const bool packed = is_packed(type);
  if (ftz && type != Type::f32) d.unsupported();
  if (d.is_vector(0)) {
    instruction.option |= TWO_RESULTS;
    d.write_vector(0, Type::pred, 2);
  } else if (packed) {
    d.unsupported();
  } else {
    d.write(0, Type::pred);
  }
  d.read(1, type);
  d.read(2, type);
  if (instruction.option & 3) d.read(3, Type::pred);
  instruction.execute =
      packed ? packed_comparison<true>(type, compare) : comparison<true>(d, type, compare, ftz);
}

// The bits of true in a type; of one half for the packed ones.
std::uint32_t true_bits(Decoding& d, Type type) {
  switch (type) {
    case Type::f32:
      return 0x3f800000;
    case Type::f16:
    case Type::f16x2:
      return 0x3c00;
    case Type::bf16:
    case Type::bf16x2:
      return 0x3f80;
    case Type::u16:
    case Type::s16:
      return 0xffff;
    case Type::u32:
    case Type::s32:
      return ~std::uint32_t(0);
    default:
      d.unsupported();
  }
}

void decode_set(Decoding& d) {
  const Compare compare = take_compare(d);
  Instruction& instruction = d.instruction();
  instruction.option = take_join(d);
  const bool ftz = d.take("ftz");
  const Type to = d.type(), type = d.type();
  const bool packed = is_packed(type);
  if ((ftz && type != Type::f32) || (is_packed(to) && !packed)) d.unsupported();
  instruction.target = true_bits(d, to) & (packed ? 0xffffu : ~0u);
  instruction.memory.registers = std::uint8_t(bytes_of(to));
  if (packed && instruction.memory.registers != 4) d.unsupported();
  d.write(0, to);
  d.read(1, type);
  d.read(2, type);
  if (instruction.option & 3) d.read(3, Type::pred);
  instruction.execute =
      packed ? packed_comparison<false>(type, compare) : comparison<false>(d, type, compare, ftz);
}

// ---- selp, slct

template <class T>
void select(Warp& warp, const Instruction& instruction, Mask mask) {
  T* to = warp.lanes<T>(instruction.operands[0]);
  const T* yes = warp.lanes<T>(instruction.operands[1]);
  const T* no = warp.lanes<T>(instruction.operands[2]);
  Mask choice = warp.predicate(instruction.operands[3]);
  if (instruction.negated) choice = ~choice;
  for_lanes(mask, [&](int lane) { to[lane] = choice >> lane & 1 ? yes[lane] : no[lane]; });
}

void decode_selp(Decoding& d) {
  const Type type = d.type();
  d.write(0, type);
  d.read(1, type);
  d.read(2, type);
  d.read(3, Type::pred);
  d.instruction().execute =
      for_bits(d, type, [](auto tag) -> Handler { return select<typename decltype(tag)::type>; });
}

template <class T>
T select_by_sign(T a, T b, std::int32_t c) {
  return c >= 0 ? a : b;
}
template <class T>
T select_by_float(T a, T b, float c) {
  return c >= 0 ? a : b;
}

void decode_slct(Decoding& d) {
  const bool ftz = d.take("ftz");  // a subnormal number is as good as zero: -0 >= 0
  const Type type = d.type(), by = d.type();
  if (ftz || (by != Type::s32 && by != Type::f32)) d.unsupported();
  d.write(0, type);
  d.read(1, type);
  d.read(2, type);
  d.read(3, by);
  d.instruction().execute = for_bits(d, type, [&](auto tag) -> Handler {
    using T = typename decltype(tag)::type;
    return by == Type::s32 ? elementwise<select_by_sign<T>> : elementwise<select_by_float<T>>;
  });
}

}  // namespace

std::span<const Opcode> move_opcodes() {
  static constexpr Opcode OPCODES[] = {
      {"mov", "move", decode_mov},     {"setp", "compare", decode_setp},
      {"set", "compare", decode_set},  {"selp", "select", decode_selp},
      {"slct", "select", decode_slct},
  };
  return OPCODES;
}

}  // namespace evsam::simt
