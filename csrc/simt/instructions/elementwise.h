// Handlers made of functions on one lane's values.
#pragma once

#include <cstdint>
#include <tuple>
#include <utility>

#include "../block.h"
#include "../decode.h"

namespace evsam::simt {

template <class F>
struct Signature;

template <class R, class... A>
struct Signature<R (*)(A...)> {
  using Result = R;
  static constexpr std::size_t arity = sizeof...(A);

  // `per_lane` values of every operand a lane: 2 for the packed types.
  template <auto f, int per_lane>
  static void run(Warp& warp, const Instruction& instruction, Mask mask) {
    run<f, per_lane>(warp, instruction, mask, std::index_sequence_for<A...>());
  }

 private:
  template <auto f, int per_lane, std::size_t... I>
  static void run(Warp& warp, const Instruction& instruction, Mask mask,
                  std::index_sequence<I...>) {
    R* result = warp.lanes<R>(instruction.operands[0]);
    const std::tuple<const A*...> sources{warp.lanes<A>(instruction.operands[I + 1])...};
    for_lanes(mask, [&](int lane) {
      for (int i = 0; i < per_lane; ++i) {
        const int at = lane * per_lane + i;
        result[at] = f(std::get<I>(sources)[at]...);
      }
    });
  }
};

// result = f(sources...), operands in that order.
template <auto f>
void elementwise(Warp& warp, const Instruction& instruction, Mask mask) {
  Signature<decltype(f)>::template run<f, 1>(warp, instruction, mask);
}

// The same for two values of 16 bits in a register of 32.
template <auto f>
void elementwise_packed(Warp& warp, const Instruction& instruction, Mask mask) {
  Signature<decltype(f)>::template run<f, 2>(warp, instruction, mask);
}

// Decodes `result, source, source...`, all of one type.
inline void same_types(Decoding& decoding, Type type, int sources) {
  decoding.write(0, type);
  for (int i = 1; i <= sources; ++i) decoding.read(i, type);
  if (decoding.count() != sources + 1) decoding.fail("wrong number of operands");
}

// The unsigned type of as many bytes.
template <int bytes>
using Unsigned = std::conditional_t<
    bytes == 1, std::uint8_t,
    std::conditional_t<bytes == 2, std::uint16_t,
                       std::conditional_t<bytes == 4, std::uint32_t, std::uint64_t>>>;

// f(type identity) for the C++ integer type of a PTX type.
template <class T>
struct Tag {
  using type = T;
};

template <class F>
Handler for_integer(Decoding& decoding, Type type, F f) {
  switch (type) {
    case Type::u16:
      return f(Tag<std::uint16_t>());
    case Type::u32:
      return f(Tag<std::uint32_t>());
    case Type::u64:
      return f(Tag<std::uint64_t>());
    case Type::s16:
      return f(Tag<std::int16_t>());
    case Type::s32:
      return f(Tag<std::int32_t>());
    case Type::s64:
      return f(Tag<std::int64_t>());
    default:
      decoding.fail("the instruction does not have the type ." + std::string(name_of(type)));
  }
}

template <class F>
Handler for_bits(Decoding& decoding, Type type, F f) {
  switch (bytes_of(type)) {
    case 2:
      return f(Tag<std::uint16_t>());
    case 4:
      return f(Tag<std::uint32_t>());
    case 8:
      return f(Tag<std::uint64_t>());
    default:
      decoding.fail("the instruction does not have the type ." + std::string(name_of(type)));
  }
}

}  // namespace evsam::simt
