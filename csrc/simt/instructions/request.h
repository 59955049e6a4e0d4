// What the instructions that access memory have in common.
#pragma once

#include <cstring>

#include "elementwise.h"

namespace evsam::simt {

// Where the lanes of `mask` point to.
inline void read_addresses(Warp& warp, const Instruction& instruction, Place base, Mask mask,
                           std::uint64_t* address) {
  const std::int64_t offset = instruction.memory.offset;
  if (instruction.memory.wide_address) {
    const std::uint64_t* lanes = warp.lanes<std::uint64_t>(base);
    for_lanes(mask, [&](int lane) { address[lane] = lanes[lane] + offset; });
  } else {
    const std::uint32_t* lanes = warp.lanes<std::uint32_t>(base);
    for_lanes(mask, [&](int lane) { address[lane] = std::uint32_t(lanes[lane] + offset); });
  }
}

inline std::optional<Space> take_space(Decoding& d) {
  return d.choose<Space>({{"global", Space::global},
                          {"shared", Space::shared},
                          {"shared::cta", Space::shared},
                          {"local", Space::local},
                          {"const", Space::constant},
                          {"param", Space::param},
                          {"param::entry", Space::param},
                          {"param::func", Space::param}});
}

// How long a line stays in a cache changes no result.
inline bool drop_cache_hints(Decoding& d) {
  for (const char* hint : {"ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc"}) d.take(hint);
  d.drop_prefixed("L1::");
  const bool policy = d.take("L2::cache_hint");  // has an operand of its own
  d.drop_prefixed("L2::");
  return policy;
}

// .weak, .volatile, .relaxed, .acquire, .release, .acq_rel and their scope.
inline Ordering take_ordering(Decoding& d, Ordering otherwise) {
  Ordering ordering = d.choose<Ordering>({{"weak", {}},
                                          {"volatile", {true, false, false}},
                                          {"relaxed", {true, false, false}},
                                          {"acquire", {true, true, false}},
                                          {"release", {true, false, true}},
                                          {"acq_rel", {true, true, true}}})
                          .value_or(otherwise);
  for (const char* scope : {"cta", "cluster", "gpu", "sys"}) d.take(scope);
  return ordering;
}

inline int take_vector(Decoding& d) {
  return d.choose<int>({{"v2", 2}, {"v4", 4}, {"v8", 8}}).value_or(1);
}

// The kind of an access as reports call it.
inline std::string_view access_kind(Space space, bool store) {
  switch (space) {
    case Space::global:
      return store ? "global store" : "global load";
    case Space::shared:
      return store ? "shared store" : "shared load";
    case Space::local:
      return store ? "local store" : "local load";
    case Space::constant:
      return "constant load";
    case Space::param:
      return "parameter load";
    default:
      return store ? "generic store" : "generic load";
  }
}

}  // namespace evsam::simt
