// Instructions in which the lanes of a warp work together: shuffles, votes, matches, reductions.
//
// Each waits for the lanes it names, and orders what they did before it.
#include <algorithm>
#include <bit>

#include "elementwise.h"

namespace evsam::simt {
namespace {

void converge(Decoding& d) { d.instruction().flow = Flow::converge; }

// ---- shfl

enum class Shuffle : std::uint32_t { up, down, butterfly, index };

// Operands: result, [predicate], value, lane, clamp, members. option: the mode, and 4 for a
// predicate
void shuffle(Warp& warp, const Instruction& instruction, Mask mask) {
  const bool tells = instruction.option & 4;
  const Shuffle mode = Shuffle(instruction.option & 3);
  const Place* operands = instruction.operands + 1 + tells;
  std::uint32_t values[LANES];
  std::copy_n(warp.lanes<std::uint32_t>(operands[0]), LANES, values);
  const std::uint32_t* b = warp.lanes<std::uint32_t>(operands[1]);
  const std::uint32_t* c = warp.lanes<std::uint32_t>(operands[2]);
  std::uint32_t results[LANES];
  Mask inside = 0;
  Mask wrong = 0;
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    const int segment = int(c[lane] >> 8 & 31);
    const int clamp = int(c[lane] & 31);
    const int step = int(b[lane] & 31);
    const int last = (lane & segment) | (clamp & ~segment);
    int source = lane;
    bool valid = true;
    switch (mode) {
      case Shuffle::up:
        source = lane - step;
        valid = source >= last;
        break;
      case Shuffle::down:
        source = lane + step;
        valid = source <= last;
        break;
      case Shuffle::butterfly:
        source = lane ^ step;
        valid = source <= last;
        break;
      case Shuffle::index:
        source = (lane & segment) | (step & ~segment);
        valid = source <= last;
        break;
    }
    if (!valid) source = lane;
    if (!has_lane(mask, source)) wrong |= Mask(1) << lane;
    results[lane] = values[source];
    inside |= Mask(valid) << lane;
  }
  if (wrong) {
    warp.block->fault("undefined shuffle", warp, instruction, std::countr_zero(wrong),
                      "shfl reads from a lane that does not take part");
  }
  std::uint32_t* to = warp.lanes<std::uint32_t>(instruction.operands[0]);
  for_lanes(mask, [&](int lane) { to[lane] = results[lane]; });
  if (tells) {
    Mask& predicate = warp.predicate(instruction.operands[1]);
    predicate = (predicate & ~mask) | inside;
  }
}

void decode_shfl(Decoding& d) {
  if (!d.take("sync")) d.unsupported();
  const auto mode = d.require<Shuffle>("a mode", {{"up", Shuffle::up},
                                                  {"down", Shuffle::down},
                                                  {"bfly", Shuffle::butterfly},
                                                  {"idx", Shuffle::index}});
  if (bytes_of(d.type()) != 4) d.unsupported();
  const bool tells = d.is_vector(0);
  d.instruction().option = std::uint32_t(mode) | (tells ? 4 : 0);
  if (tells) {
    if (d.operand(0).children.size() != 2) d.unsupported();
    d.write(d.operand(0).children[0], Type::b32);
    d.write(d.operand(0).children[1], Type::pred);
  } else {
    d.write(0, Type::b32);
  }
  for (int i = 1; i <= 4; ++i) d.read(i, Type::b32);
  converge(d);
  d.instruction().execute = shuffle;
}

// ---- vote: operands result, predicate, members

enum class Vote : std::uint32_t { ballot, all, any, uni };

void vote(Warp& warp, const Instruction& instruction, Mask mask) {
  Mask yes = warp.predicate(instruction.operands[1]);
  if (instruction.negated) yes = ~yes;
  yes &= mask;
  if (Vote(instruction.option) == Vote::ballot) {
    std::uint32_t* to = warp.lanes<std::uint32_t>(instruction.operands[0]);
    for_lanes(mask, [&](int lane) { to[lane] = yes; });
    return;
  }
  bool result = false;
  switch (Vote(instruction.option)) {
    case Vote::all:
      result = yes == mask;
      break;
    case Vote::any:
      result = yes != 0;
      break;
    default:
      result = yes == mask || yes == 0;
  }
  Mask& to = warp.predicate(instruction.operands[0]);
  to = (to & ~mask) | (result ? mask : 0);
}

void decode_vote(Decoding& d) {
  if (!d.take("sync")) d.unsupported();
  const auto mode = d.require<Vote>(
      "a mode",
      {{"ballot", Vote::ballot}, {"all", Vote::all}, {"any", Vote::any}, {"uni", Vote::uni}});
  const Type type = d.type();
  if (type != (mode == Vote::ballot ? Type::b32 : Type::pred)) d.unsupported();
  d.instruction().option = std::uint32_t(mode);
  d.write(0, type);
  d.read(1, Type::pred);
  d.read(2, Type::b32);
  converge(d);
  d.instruction().execute = vote;
}

void active_lanes(Warp& warp, const Instruction& instruction, Mask mask) {
  std::uint32_t* to = warp.lanes<std::uint32_t>(instruction.operands[0]);
  for_lanes(mask, [&](int lane) { to[lane] = mask; });
}

void decode_activemask(Decoding& d) {
  if (d.type() != Type::b32) d.unsupported();
  d.write(0, Type::b32);
  d.instruction().execute = active_lanes;
}

// ---- match: operands result, [predicate], value, members

template <class T>
void match_any(Warp& warp, const Instruction& instruction, Mask mask) {
  const T* values = warp.lanes<T>(instruction.operands[1]);
  Mask results[LANES];
  for_lanes(mask, [&](int lane) {
    Mask same = 0;
    for (int other = 0; other < LANES; ++other)
      same |= Mask(values[other] == values[lane]) << other;
    results[lane] = same & mask;
  });
  std::uint32_t* to = warp.lanes<std::uint32_t>(instruction.operands[0]);
  for_lanes(mask, [&](int lane) { to[lane] = results[lane]; });
}

template <class T>
void match_all(Warp& warp, const Instruction& instruction, Mask mask) {
  const bool tells = instruction.option;
  const T* values = warp.lanes<T>(instruction.operands[1 + tells]);
  const T first = values[std::countr_zero(mask)];
  bool same = true;
  for_lanes(mask, [&](int lane) { same &= values[lane] == first; });
  std::uint32_t* to = warp.lanes<std::uint32_t>(instruction.operands[0]);
  for_lanes(mask, [&](int lane) { to[lane] = same ? mask : 0; });
  if (tells) {
    Mask& predicate = warp.predicate(instruction.operands[1]);
    predicate = (predicate & ~mask) | (same ? mask : 0);
  }
}

void decode_match(Decoding& d) {
  const bool any = d.take("any");
  if (!any && !d.take("all")) d.unsupported();
  if (!d.take("sync")) d.unsupported();
  const Type type = d.type();
  const bool wide = bytes_of(type) == 8;
  if (d.is_vector(0)) {
    if (any || d.operand(0).children.size() != 2) d.unsupported();
    d.instruction().option = 1;
    d.write(d.operand(0).children[0], Type::b32);
    d.write(d.operand(0).children[1], Type::pred);
  } else {
    d.write(0, Type::b32);
  }
  d.read(1, type);
  d.read(2, Type::b32);
  converge(d);
  d.instruction().execute = any ? (wide ? match_any<std::uint64_t> : match_any<std::uint32_t>)
                                : (wide ? match_all<std::uint64_t> : match_all<std::uint32_t>);
}

// ---- redux: operands result, value, members

template <class T>
T sum(T a, T b) {
  return a + b;
}
template <class T>
T smaller(T a, T b) {
  return std::min(a, b);
}
template <class T>
T larger(T a, T b) {
  return std::max(a, b);
}
template <class T>
T both(T a, T b) {
  return a & b;
}
template <class T>
T either(T a, T b) {
  return a | b;
}
template <class T>
T one_of(T a, T b) {
  return a ^ b;
}

template <class T, T (*f)(T, T)>
void reduce(Warp& warp, const Instruction& instruction, Mask mask) {
  const T* values = warp.lanes<T>(instruction.operands[1]);
  T result = values[std::countr_zero(mask)];
  for (Mask rest = mask & (mask - 1); rest; rest &= rest - 1) {
    result = f(result, values[std::countr_zero(rest)]);
  }
  T* to = warp.lanes<T>(instruction.operands[0]);
  for_lanes(mask, [&](int lane) { to[lane] = result; });
}

void decode_redux(Decoding& d) {
  if (!d.take("sync")) d.unsupported();
  using U = std::uint32_t;
  using S = std::int32_t;
  const bool smallest = d.take("min");
  const bool largest = d.take("max");
  const auto other = d.choose<Handler>({{"add", reduce<U, sum<U>>},
                                        {"and", reduce<U, both<U>>},
                                        {"or", reduce<U, either<U>>},
                                        {"xor", reduce<U, one_of<U>>}});
  const Type type = d.type();
  if (type != Type::u32 && type != Type::s32 && type != Type::b32) d.unsupported();
  if (!other && !smallest && !largest) d.unsupported();
  const bool with_sign = type == Type::s32;
  d.instruction().execute = other      ? *other
                            : smallest ? (with_sign ? reduce<S, smaller<S>> : reduce<U, smaller<U>>)
                                       : (with_sign ? reduce<S, larger<S>> : reduce<U, larger<U>>);
  d.write(0, type);
  d.read(1, type);
  d.read(2, Type::b32);
  converge(d);
}

// elect: the first lane of those named is chosen.
void elect(Warp& warp, const Instruction& instruction, Mask mask) {
  const std::uint32_t leader = std::uint32_t(std::countr_zero(mask));
  std::uint32_t* to = warp.lanes<std::uint32_t>(instruction.operands[0]);
  for_lanes(mask, [&](int lane) { to[lane] = leader; });
  Mask& predicate = warp.predicate(instruction.operands[1]);
  predicate = (predicate & ~mask) | Mask(1) << leader;
}

void decode_elect(Decoding& d) {
  if (!d.take("sync") || !d.is_vector(0) || d.operand(0).children.size() != 2) d.unsupported();
  d.write(d.operand(0).children[0], Type::b32);
  d.write(d.operand(0).children[1], Type::pred);
  d.read(1, Type::b32);
  converge(d);
  d.instruction().execute = elect;
}

}  // namespace

std::span<const Opcode> warp_opcodes() {
  static constexpr Opcode OPCODES[] = {
      {"shfl", "shuffle", decode_shfl},          {"vote", "vote", decode_vote},
      {"activemask", "vote", decode_activemask}, {"match", "vote", decode_match},
      {"redux", "shuffle", decode_redux},        {"elect", "vote", decode_elect},
  };
  return OPCODES;
}

}  // namespace evsam::simt
