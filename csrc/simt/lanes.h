// The 32 lanes of a warp, and loops over those that take part in an instruction.
#pragma once

#include <bit>
#include <cstdint>

namespace evsam::simt {

using Mask = std::uint32_t;  // bit l: lane l

inline constexpr int LANES = 32;
inline constexpr Mask ALL_LANES = ~Mask(0);

// Calls f(lane) for the lanes of `mask`; the compiler turns the loop over all of them into vectors.
template <class F>
inline void for_lanes(Mask mask, F f) {
  if (mask == ALL_LANES) {
#if defined(__clang__)
#pragma clang loop vectorize(assume_safety)
#else
#pragma GCC ivdep
#endif
    for (int lane = 0; lane < LANES; ++lane) f(lane);
  } else {
    for (; mask; mask &= mask - 1) f(std::countr_zero(mask));
  }
}

inline bool has_lane(Mask mask, int lane) { return mask >> lane & 1; }

// The lanes [0, count).
inline Mask first_lanes(int count) { return count >= LANES ? ALL_LANES : (Mask(1) << count) - 1; }

// Functions compiled a second time for processors that multiply and add in one instruction.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__SANITIZE_ADDRESS__)
#define EVSAM_SIMT_CLONES __attribute__((target_clones("default", "fma")))
#else
#define EVSAM_SIMT_CLONES
#endif

}  // namespace evsam::simt
