// Sectors and wavefronts of the requests of a warp.
#include "counters.h"

#include <algorithm>
#include <array>

namespace evsam::simt {
namespace {

constexpr std::uint64_t SECTOR = 32;
constexpr int BANKS = 32;

// Sorts what is usually in order already, and drops repetitions; returns how many are left.
int sort_unique(std::uint64_t* values, int count) {
  if (!std::is_sorted(values, values + count)) std::sort(values, values + count);
  return int(std::unique(values, values + count) - values);
}

}  // namespace

void count_sectors(Counters& counters, const std::uint64_t* address, Mask mask, int bytes) {
  std::uint64_t starts[LANES];
  std::uint64_t sectors[2 * LANES];
  int lanes = 0;
  int touched = 0;
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const std::uint64_t start = address[std::countr_zero(rest)];
    starts[lanes++] = start;
    const std::uint64_t first = start / SECTOR;
    const std::uint64_t last = (start + bytes - 1) / SECTOR;
    for (std::uint64_t sector = first; sector <= last && touched < 2 * LANES; ++sector) {
      if (touched == 0 || sectors[touched - 1] != sector) sectors[touched++] = sector;
    }
  }
  counters.bytes += std::uint64_t(bytes) * lanes;
  counters.sectors += sort_unique(sectors, touched);
  const std::uint64_t distinct = sort_unique(starts, lanes);
  counters.ideal_sectors += (distinct * bytes + SECTOR - 1) / SECTOR;
}

void count_wavefronts(Counters& counters, const std::uint64_t* address, Mask mask, int bytes) {
  counters.bytes += std::uint64_t(bytes) * std::popcount(mask);
  std::uint64_t words[8 * LANES];  // no access has more than 32 bytes
  int count = 0;
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const std::uint64_t start = address[std::countr_zero(rest)];
    for (std::uint64_t word = start / 4; word <= (start + bytes - 1) / 4; ++word) {
      if (count == 0 || words[count - 1] != word) words[count++] = word;
    }
  }
  count = sort_unique(words, count);
  std::array<std::uint16_t, BANKS> depth{};
  for (int i = 0; i < count; ++i) ++depth[words[i] % BANKS];
  counters.wavefronts += *std::max_element(depth.begin(), depth.end());
  counters.ideal_wavefronts += (count + BANKS - 1) / BANKS;
}

}  // namespace evsam::simt
