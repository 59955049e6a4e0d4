// atom and red. The lanes of a warp take their turns in order.
#include <algorithm>
#include <bit>

#include "../numbers.h"
#include "request.h"

namespace evsam::simt {
namespace {

template <class T>
using Combine = T (*)(T old, T operand, T second);

template <class T>
T add(T old, T b, T) {
  return T(old + b);
}
template <class T>
T minimum(T old, T b, T) {
  return std::min(old, b);
}
template <class T>
T maximum(T old, T b, T) {
  return std::max(old, b);
}
template <class T>
T bit_and(T old, T b, T) {
  return old & b;
}
template <class T>
T bit_or(T old, T b, T) {
  return old | b;
}
template <class T>
T bit_xor(T old, T b, T) {
  return old ^ b;
}
template <class T>
T exchange(T, T b, T) {
  return b;
}
template <class T>
T compare_and_swap(T old, T b, T c) {
  return old == b ? c : old;
}
template <class T>
T increment(T old, T b, T) {
  return old >= b ? T(0) : T(old + 1);
}
template <class T>
T decrement(T old, T b, T) {
  return old == 0 || old > b ? b : T(old - 1);
}

float add_f32(float old, float b, float) {
  const float sum = old + b;
  return sum != sum ? std::bit_cast<float>(NAN_BITS) : sum;
}

std::uint16_t add_f16(std::uint16_t old, std::uint16_t b, std::uint16_t) {
  return float_to_half(half_to_float(old) + half_to_float(b));
}
std::uint16_t add_bf16(std::uint16_t old, std::uint16_t b, std::uint16_t) {
  return float_to_bfloat(bfloat_to_float(old) + bfloat_to_float(b));
}
template <bool maximal, float (*decode)(std::uint16_t)>
std::uint16_t extremum_half(std::uint16_t old, std::uint16_t b, std::uint16_t) {
  const float x = decode(old), y = decode(b);
  if (x != x) return b;
  if (y != y) return old;
  return (x < y) == maximal ? b : old;
}
template <std::uint16_t (*f)(std::uint16_t, std::uint16_t, std::uint16_t)>
std::uint32_t twice(std::uint32_t old, std::uint32_t b, std::uint32_t) {
  return std::uint32_t(f(std::uint16_t(old >> 16), std::uint16_t(b >> 16), 0)) << 16 |
         f(std::uint16_t(old), std::uint16_t(b), 0);
}

// Operands: results (atom alone), address, values, second values (cas).
template <class T, Combine<T> f, bool returns>
void update(Warp& warp, const Instruction& instruction, Mask mask) {
  const int n = instruction.memory.elements;
  const Place* operands = instruction.operands + (returns ? n : 0);
  Request request;
  request.instruction = &instruction;
  request.mask = mask;
  request.intent = Request::Intent::update;
  request.bytes = instruction.memory.bytes();
  request.ordering = instruction.memory.ordering;
  read_addresses(warp, instruction, operands[0], mask, request.address);
  Mask allowed = warp.block->access(warp, request);
  const bool two = instruction.option;
  for (; allowed; allowed &= allowed - 1) {
    const int lane = std::countr_zero(allowed);
    for (int i = 0; i < n; ++i) {
      T old;
      std::byte* at = request.data[lane] + i * sizeof(T);
      std::memcpy(&old, at, sizeof old);
      const T first = warp.lanes<T>(operands[1 + i])[lane];
      const T second = two ? warp.lanes<T>(operands[2])[lane] : first;
      const T value = f(old, first, second);
      std::memcpy(at, &value, sizeof value);
      if (returns) warp.lanes<T>(instruction.operands[i])[lane] = old;
    }
  }
}

template <class T, Combine<T> f>
Handler either(bool returns) {
  return returns ? update<T, f, true> : update<T, f, false>;
}

enum class Operation { add, minimum, maximum, bit_and, bit_or, bit_xor, exchange, cas, inc, dec };

template <class T>
Handler integer_handler(Decoding& d, Operation operation, bool returns) {
  switch (operation) {
    case Operation::add:
      return either<T, add<T>>(returns);
    case Operation::minimum:
      return either<T, minimum<T>>(returns);
    case Operation::maximum:
      return either<T, maximum<T>>(returns);
    case Operation::bit_and:
      return either<T, bit_and<T>>(returns);
    case Operation::bit_or:
      return either<T, bit_or<T>>(returns);
    case Operation::bit_xor:
      return either<T, bit_xor<T>>(returns);
    case Operation::exchange:
      return either<T, exchange<T>>(returns);
    case Operation::cas:
      return either<T, compare_and_swap<T>>(returns);
    case Operation::inc:
      if constexpr (std::is_same_v<T, std::uint32_t>) return either<T, increment<T>>(returns);
      break;
    case Operation::dec:
      if constexpr (std::is_same_v<T, std::uint32_t>) return either<T, decrement<T>>(returns);
      break;
  }
  d.unsupported();
}

Handler float_handler(Decoding& d, Type type, Operation operation, bool returns) {
  using H = std::uint16_t;
  using W = std::uint32_t;
  if (operation == Operation::add) {
    switch (type) {
      case Type::f32:
        return either<float, add_f32>(returns);
      case Type::f64:
        return either<double, add<double>>(returns);
      case Type::f16:
        return either<H, add_f16>(returns);
      case Type::bf16:
        return either<H, add_bf16>(returns);
      case Type::f16x2:
        return either<W, twice<add_f16>>(returns);
      case Type::bf16x2:
        return either<W, twice<add_bf16>>(returns);
      default:
        d.unsupported();
    }
  }
  const bool maximal = operation == Operation::maximum;
  if (!maximal && operation != Operation::minimum) d.unsupported();
  switch (type) {
    case Type::f16:
      return maximal ? either<H, extremum_half<true, half_to_float>>(returns)
                     : either<H, extremum_half<false, half_to_float>>(returns);
    case Type::bf16:
      return maximal ? either<H, extremum_half<true, bfloat_to_float>>(returns)
                     : either<H, extremum_half<false, bfloat_to_float>>(returns);
    case Type::f16x2:
      return maximal ? either<W, twice<extremum_half<true, half_to_float>>>(returns)
                     : either<W, twice<extremum_half<false, half_to_float>>>(returns);
    case Type::bf16x2:
      return maximal ? either<W, twice<extremum_half<true, bfloat_to_float>>>(returns)
                     : either<W, twice<extremum_half<false, bfloat_to_float>>>(returns);
    default:
      d.unsupported();
  }
}

void decode_update(Decoding& d, bool returns) {
  Instruction& instruction = d.instruction();
  MemoryAccess& memory = instruction.memory;
  memory.ordering = take_ordering(d, {true, false, false});
  memory.ordering.strong = true;
  const Space space = take_space(d).value_or(Space::generic);
  if (space != Space::shared) d.communicates();
  const auto operation = d.require<Operation>("an operation", {{"add", Operation::add},
                                                               {"min", Operation::minimum},
                                                               {"max", Operation::maximum},
                                                               {"and", Operation::bit_and},
                                                               {"or", Operation::bit_or},
                                                               {"xor", Operation::bit_xor},
                                                               {"exch", Operation::exchange},
                                                               {"cas", Operation::cas},
                                                               {"inc", Operation::inc},
                                                               {"dec", Operation::dec}});
  d.take("noftz");
  drop_cache_hints(d);
  memory.elements = std::uint8_t(take_vector(d));
  const Type type = d.type();
  memory.element = std::uint8_t(bytes_of(type));
  if (memory.elements > 1 && !is_float(type)) d.unsupported();
  int at = 0;
  if (returns) d.write_vector(at++, type, memory.elements);
  d.address(at++, space);
  d.read_vector(at++, type, memory.elements);
  if (operation == Operation::cas) {
    instruction.option = 1;
    d.read(at++, type);
  }
  if (is_float(type)) {
    instruction.execute = float_handler(d, type, operation, returns);
    return;
  }
  const bool ordered = operation == Operation::minimum || operation == Operation::maximum;
  if (ordered && is_signed(type)) {
    instruction.execute = memory.element == 4
                              ? integer_handler<std::int32_t>(d, operation, returns)
                              : integer_handler<std::int64_t>(d, operation, returns);
    return;
  }
  instruction.execute = for_bits(d, type, [&](auto tag) -> Handler {
    using T = typename decltype(tag)::type;
    if constexpr (sizeof(T) == 2) {
      if (operation != Operation::cas && operation != Operation::exchange) d.unsupported();
    }
    return integer_handler<T>(d, operation, returns);
  });
}

void decode_atom(Decoding& d) {
  // A result that nobody wants still stands as `_`.
  decode_update(d, true);
}
void decode_red(Decoding& d) {
  if (d.take("async")) d.unsupported();
  decode_update(d, false);
}

}  // namespace

std::span<const Opcode> atomic_opcodes() {
  static constexpr Opcode OPCODES[] = {
      {"atom", "atomic", decode_atom},
      {"red", "atomic", decode_red},
  };
  return OPCODES;
}

}  // namespace evsam::simt
