// cvt: from any number to any other, with every rounding; cvta.
//
// A value is read as a double or an integer of 64 bits, which hold every source exactly, and
// rounded once to what is asked for.
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "../numbers.h"
#include "elementwise.h"

namespace evsam::simt {
namespace {

// What the handlers need to know, packed into Instruction::option.
struct Plan {
  std::uint32_t to : 5;
  std::uint32_t from : 5;
  std::uint32_t to_bytes : 4;  // of the registers, which may be wider than the types
  std::uint32_t from_bytes : 4;
  std::uint32_t rounding : 3;
  std::uint32_t to_integral : 1;  // a float rounded to an integer
  std::uint32_t saturate : 1;
  std::uint32_t ftz : 1;
  std::uint32_t relu : 1;
};
static_assert(sizeof(Plan) == 4);

std::uint64_t load(const std::byte* lanes, int bytes, int lane) {
  std::uint64_t bits = 0;
  std::memcpy(&bits, lanes + lane * bytes, std::size_t(bytes));
  return bits;
}

void store(std::byte* lanes, int bytes, int lane, std::uint64_t bits) {
  std::memcpy(lanes + lane * bytes, &bits, std::size_t(bytes));
}

std::int64_t extend(std::uint64_t bits, Type type) {
  const int unused = 64 - 8 * bytes_of(type);
  return is_signed(type) ? std::int64_t(bits << unused) >> unused
                         : std::int64_t(bits << unused >> unused);
}

double read_float(std::uint64_t bits, Type type) {
  switch (type) {
    case Type::f16:
      return half_to_float(std::uint16_t(bits));
    case Type::bf16:
      return bfloat_to_float(std::uint16_t(bits));
    case Type::f64:
      return std::bit_cast<double>(bits);
    default:
      return std::bit_cast<float>(std::uint32_t(bits));
  }
}

double flush(double value, Type type) {
  const double smallest = type == Type::f32 ? 0x1p-126 : 0;
  return std::fabs(value) < smallest ? std::copysign(0.0, value) : value;
}

double round_to_integral(double value, Rounding rounding) {
  switch (rounding) {
    case Rounding::zero:
      return std::trunc(value);
    case Rounding::down:
      return std::floor(value);
    case Rounding::up:
      return std::ceil(value);
    default:
      return std::nearbyint(value);
  }
}

// Floats beyond the range of an integer become its nearest end, a NaN becomes 0.
std::uint64_t to_integer(double value, Type type, Rounding rounding) {
  if (value != value) return 0;
  const double whole = round_to_integral(value, rounding);
  const int bits = 8 * bytes_of(type);
  if (is_signed(type)) {
    const double limit = std::ldexp(1.0, bits - 1);
    if (whole >= limit) return (std::uint64_t(1) << (bits - 1)) - 1;
    if (whole < -limit) return std::uint64_t(-1) << (bits - 1);
    return std::uint64_t(std::int64_t(whole));
  }
  if (whole >= std::ldexp(1.0, bits)) return ~std::uint64_t(0) >> (64 - bits);
  return whole <= 0 ? 0 : std::uint64_t(whole);
}

std::uint64_t write_float(double value, Type type, const Plan& plan) {
  if (plan.relu && value < 0) value = 0;
  if (plan.saturate) value = value > 0 ? std::min(value, 1.0) : 0.0;
  const Rounding rounding = Rounding(plan.rounding);
  switch (type) {
    case Type::f16:
      return encode(value, F16, rounding);
    case Type::bf16:
      return encode(value, BF16, rounding);
    case Type::f64:
      return std::bit_cast<std::uint64_t>(value);
    default: {
      const std::uint64_t bits = encode(value, F32, rounding);
      return plan.ftz && !(bits & 0x7f800000) ? bits & 0x80000000 : bits;
    }
  }
}

// Integers of 64 bits do not fit doubles: rounded to odd, they do no harm to what is rounded next.
double to_double_odd(std::int64_t value, bool is_signed) {
  const bool negative = is_signed && value < 0;
  std::uint64_t magnitude = negative ? -std::uint64_t(value) : std::uint64_t(value);
  const int surplus = std::bit_width(magnitude) - 53;
  if (surplus > 0) {
    const bool sticky = magnitude & ((std::uint64_t(1) << surplus) - 1);
    magnitude = (magnitude >> surplus | sticky) << surplus;
  }
  return negative ? -double(magnitude) : double(magnitude);
}

double to_double(std::int64_t value, bool is_signed, Rounding rounding) {
  double nearest = is_signed ? double(value) : double(std::uint64_t(value));
  if (rounding == Rounding::nearest_even) return nearest;
  // The neighbour in the direction asked for, where the nearest is not exact.
  const bool too_large = is_signed
                             ? nearest >= 0x1p63 || std::int64_t(nearest) > value
                             : nearest >= 0x1p64 || std::uint64_t(nearest) > std::uint64_t(value);
  const bool exact = !too_large && (is_signed ? std::int64_t(nearest) == value
                                              : std::uint64_t(nearest) == std::uint64_t(value));
  if (exact) return nearest;
  const bool want_down = rounding == Rounding::down || (rounding == Rounding::zero && nearest > 0);
  if (too_large == want_down) {
    nearest = std::nextafter(nearest, want_down ? -INFINITY : INFINITY);
  }
  return nearest;
}

std::uint64_t saturate_integer(std::int64_t value, Type from, Type to) {
  const int bits = 8 * bytes_of(to);
  const bool huge = !is_signed(from) && value < 0;  // above the signed range
  if (is_signed(to)) {
    const std::int64_t largest = std::numeric_limits<std::int64_t>::max() >> (64 - bits);
    if (huge || value > largest) return std::uint64_t(largest);
    return std::uint64_t(std::max(value, -largest - 1));
  }
  const std::uint64_t largest = ~std::uint64_t(0) >> (64 - bits);
  if (is_signed(from) && value < 0) return 0;
  return std::min(std::uint64_t(value), largest);
}

void convert(Warp& warp, const Instruction& instruction, Mask mask) {
  const Plan plan = std::bit_cast<Plan>(instruction.option);
  const Type to = Type(plan.to), from = Type(plan.from);
  const Rounding rounding = Rounding(plan.rounding);
  std::byte* target = warp.lanes<std::byte>(instruction.operands[0]);
  const std::byte* source = warp.lanes<std::byte>(instruction.operands[1]);
  for (; mask; mask &= mask - 1) {
    const int lane = std::countr_zero(mask);
    const std::uint64_t bits = load(source, plan.from_bytes, lane);
    std::uint64_t value;
    if (is_float(from)) {
      double number = read_float(bits, from);
      if (plan.ftz) number = flush(number, from);
      if (is_float(to)) {
        if (plan.to_integral) number = round_to_integral(number, rounding);
        value = write_float(number, to, plan);
      } else {
        value = to_integer(number, to, rounding);
      }
    } else {
      const std::int64_t number = extend(bits, from);
      if (to == Type::f64) {
        value = std::bit_cast<std::uint64_t>(to_double(number, is_signed(from), rounding));
      } else if (is_float(to)) {
        value = write_float(to_double_odd(number, is_signed(from)), to, plan);
      } else {
        value = plan.saturate ? saturate_integer(number, from, to) : std::uint64_t(number);
      }
    }
    // A register wider than the type holds the value extended by its sign.
    if (is_integer(to)) value = std::uint64_t(extend(value, to));
    store(target, plan.to_bytes, lane, value);
  }
}

template <class T, class S>
T widen(S value) {
  return T(value);
}

// The conversions that kernels are full of.
Handler frequent(const Plan& plan) {
  const bool plain = !plan.saturate && !plan.ftz && !plan.relu && !plan.to_integral;
  if (!plain || plan.to_bytes != bytes_of(Type(plan.to)) ||
      plan.from_bytes != bytes_of(Type(plan.from))) {
    return nullptr;
  }
  const auto is = [&](Type to, Type from) {
    return Type(plan.to) == to && Type(plan.from) == from;
  };
  if (is(Type::s64, Type::s32)) return elementwise<widen<std::int64_t, std::int32_t>>;
  if (is(Type::u64, Type::u32)) return elementwise<widen<std::uint64_t, std::uint32_t>>;
  if (is(Type::u32, Type::u64)) return elementwise<widen<std::uint32_t, std::uint64_t>>;
  if (is(Type::u32, Type::u16)) return elementwise<widen<std::uint32_t, std::uint16_t>>;
  if (is(Type::u16, Type::u32)) return elementwise<widen<std::uint16_t, std::uint32_t>>;
  if (is(Type::f32, Type::f16)) return elementwise<half_to_float>;
  if (is(Type::f32, Type::bf16)) return elementwise<bfloat_to_float>;
  if (Rounding(plan.rounding) == Rounding::nearest_even && is(Type::bf16, Type::f32)) {
    return elementwise<float_to_bfloat>;
  }
  return nullptr;
}

// Two floats into one register of 32 bits: the first into the high half. Or into 16 bits, as f8.
const Format& packed_format(Type type) {
  switch (type) {
    case Type::f16x2:
      return F16;
    case Type::bf16x2:
      return BF16;
    case Type::e4m3x2:
      return E4M3;
    default:
      return E5M2;
  }
}

void pack(Warp& warp, const Instruction& instruction, Mask mask) {
  const Plan plan = std::bit_cast<Plan>(instruction.option);
  const Format& format = packed_format(Type(plan.to));
  std::byte* target = warp.lanes<std::byte>(instruction.operands[0]);
  const float* high = warp.lanes<float>(instruction.operands[1]);
  const float* low = warp.lanes<float>(instruction.operands[2]);
  const auto one = [&](float value) {
    if (plan.relu && value < 0) value = 0;
    return encode(value, format, Rounding(plan.rounding), plan.saturate);
  };
  for (; mask; mask &= mask - 1) {
    const int lane = std::countr_zero(mask);
    store(target, plan.to_bytes, lane, one(high[lane]) << format.bits() | one(low[lane]));
  }
}

void bytes_from_halves(Warp& warp, const Instruction& instruction, Mask mask) {
  const Plan plan = std::bit_cast<Plan>(instruction.option);
  const Format& format = packed_format(Type(plan.to));
  std::uint16_t* target = warp.lanes<std::uint16_t>(instruction.operands[0]);
  const std::uint32_t* source = warp.lanes<std::uint32_t>(instruction.operands[1]);
  const auto one = [&](std::uint32_t half) {
    const float value = half_to_float(std::uint16_t(half));
    return encode(plan.relu && value < 0 ? 0 : value, format, Rounding::nearest_even, true);
  };
  for_lanes(mask, [&](int lane) {
    target[lane] = std::uint16_t(one(source[lane] >> 16) << 8 | one(source[lane] & 0xffff));
  });
}

void halves_from_bytes(Warp& warp, const Instruction& instruction, Mask mask) {
  const Plan plan = std::bit_cast<Plan>(instruction.option);
  const Format& format = packed_format(Type(plan.from));
  std::uint32_t* target = warp.lanes<std::uint32_t>(instruction.operands[0]);
  const std::uint16_t* source = warp.lanes<std::uint16_t>(instruction.operands[1]);
  const auto one = [&](int byte) {
    const double value = decode_byte(std::uint8_t(byte), format);
    return std::uint32_t(encode(plan.relu && value < 0 ? 0 : value, F16, Rounding::nearest_even));
  };
  for_lanes(mask, [&](int lane) {
    target[lane] = one(source[lane] >> 8) << 16 | one(source[lane] & 0xff);
  });
}

// tf32 is an f32 whose low 13 bits are zero.
void to_tf32(Warp& warp, const Instruction& instruction, Mask mask) {
  const Plan plan = std::bit_cast<Plan>(instruction.option);
  std::uint32_t* target = warp.lanes<std::uint32_t>(instruction.operands[0]);
  const float* source = warp.lanes<float>(instruction.operands[1]);
  for_lanes(mask, [&](int lane) {
    const float value = plan.relu && source[lane] < 0 ? 0.0f : source[lane];
    target[lane] = value != value
                       ? NAN_BITS
                       : std::uint32_t(encode(value, TF32, Rounding(plan.rounding), plan.saturate))
                             << 13;
  });
}

bool is_byte_pair(Type type) { return type == Type::e4m3x2 || type == Type::e5m2x2; }

void decode_cvt(Decoding& d) {
  Plan plan{};
  using Choice = std::pair<Rounding, bool>;
  const auto rounding = d.choose<Choice>({{"rn", {Rounding::nearest_even, false}},
                                          {"rz", {Rounding::zero, false}},
                                          {"rm", {Rounding::down, false}},
                                          {"rp", {Rounding::up, false}},
                                          {"rna", {Rounding::nearest_away, false}},
                                          {"rni", {Rounding::nearest_even, true}},
                                          {"rzi", {Rounding::zero, true}},
                                          {"rmi", {Rounding::down, true}},
                                          {"rpi", {Rounding::up, true}}});
  plan.ftz = d.take("ftz");
  const bool finite = d.take("satfinite");
  plan.saturate = d.take("sat") || finite;
  plan.relu = d.take("relu");
  const Type to = d.type(), from = d.type();
  plan.to = std::uint32_t(to);
  plan.from = std::uint32_t(from);
  plan.rounding = std::uint32_t(rounding ? rounding->first : Rounding::nearest_even);
  plan.to_integral = rounding && rounding->second;
  Instruction& instruction = d.instruction();

  if (to == Type::tf32) {
    if (from != Type::f32 || !rounding || plan.to_integral) d.unsupported();
    d.write(0, Type::b32);
    d.read(1, Type::f32);
    instruction.execute = to_tf32;
  } else if (d.count() == 3) {
    if (from != Type::f32 || !rounding || plan.to_integral || plan.ftz ||
        !(to == Type::f16x2 || to == Type::bf16x2 || (is_byte_pair(to) && finite))) {
      d.unsupported();
    }
    plan.to_bytes = std::uint32_t(bytes_of(to));
    d.write(0, bytes_of(to) == 4 ? Type::b32 : Type::b16);
    d.read(1, Type::f32);
    d.read(2, Type::f32);
    instruction.execute = pack;
  } else if (is_byte_pair(to)) {
    if (from != Type::f16x2 || !finite) d.unsupported();
    d.write(0, Type::b16);
    d.read(1, Type::b32);
    instruction.execute = bytes_from_halves;
  } else if (is_byte_pair(from)) {
    if (to != Type::f16x2) d.unsupported();
    d.write(0, Type::b32);
    d.read(1, Type::b16);
    instruction.execute = halves_from_bytes;
  } else {
    const auto is_scalar = [](Type type) {
      return (is_integer(type) && type > Type::b64) || type == Type::f16 || type == Type::bf16 ||
             type == Type::f32 || type == Type::f64;
    };
    if (!is_scalar(to) || !is_scalar(from) || finite ||
        (rounding && rounding->first == Rounding::nearest_away)) {
      d.unsupported();
    }
    // A double is rounded to what it is only where it comes from an integer.
    if (!is_integer(from) && is_integer(to) && !plan.to_integral) d.unsupported();
    const Operand& target = d.operand(0);
    plan.to_bytes = std::uint32_t(d.register_bytes(target));
    plan.from_bytes =
        std::uint32_t(std::max({d.register_bytes(d.operand(1)),
                                d.register_bytes(d.operand(1)) ? 0 : std::max(bytes_of(from), 2)}));
    if (d.operand(1).kind == Operand::Kind::symbol) plan.from_bytes = 4;
    if (int(plan.to_bytes) < bytes_of(to) || int(plan.from_bytes) < bytes_of(from)) {
      d.fail("a register is narrower than its type");
    }
    if (target.kind != Operand::Kind::reg) d.unsupported();
    d.read_register(target, 0);
    d.read_register(d.operand(1), int(plan.from_bytes));
    instruction.execute = convert;
    if (const Handler handler = frequent(plan)) instruction.execute = handler;
  }
  instruction.option = std::bit_cast<std::uint32_t>(plan);
}

// ---- cvta: between an address of a space and a generic one

void to_generic(Warp& warp, const Instruction& instruction, Mask mask) {
  std::uint64_t* target = warp.lanes<std::uint64_t>(instruction.operands[0]);
  const std::uint64_t* source = warp.lanes<std::uint64_t>(instruction.operands[1]);
  const std::uint64_t window = std::uint64_t(instruction.option) << 56;
  for_lanes(mask, [&](int lane) { target[lane] = source[lane] + window; });
}
void from_generic(Warp& warp, const Instruction& instruction, Mask mask) {
  std::uint64_t* target = warp.lanes<std::uint64_t>(instruction.operands[0]);
  const std::uint64_t* source = warp.lanes<std::uint64_t>(instruction.operands[1]);
  const std::uint64_t window = std::uint64_t(instruction.option) << 56;
  for_lanes(mask, [&](int lane) { target[lane] = source[lane] - window; });
}

void decode_cvta(Decoding& d) {
  const bool to_space = d.take("to");
  const auto window = d.require<std::uint64_t>("a space", {{"global", 0},
                                                           {"const", 0},
                                                           {"shared", SHARED_WINDOW},
                                                           {"shared::cta", SHARED_WINDOW},
                                                           {"local", LOCAL_WINDOW},
                                                           {"param", PARAM_WINDOW}});
  if (bytes_of(d.type()) != 8) d.unsupported();
  same_types(d, Type::u64, 1);
  d.instruction().option = std::uint32_t(window >> 56);
  d.instruction().execute = to_space ? from_generic : to_generic;
}

}  // namespace

std::span<const Opcode> convert_opcodes() {
  static constexpr Opcode OPCODES[] = {
      {"cvt", "convert", decode_cvt},
      {"cvta", "integer", decode_cvta},
  };
  return OPCODES;
}

}  // namespace evsam::simt
