// Finds buffers by address.
#include "memory.h"

#include <algorithm>
#include <stdexcept>

namespace evsam::simt {

Buffers::Buffers(std::vector<Buffer> buffers) : sorted_(std::move(buffers)) {
  std::sort(sorted_.begin(), sorted_.end(),
            [](const Buffer& a, const Buffer& b) { return a.address < b.address; });
  for (std::size_t i = 0; i + 1 < sorted_.size(); ++i) {
    const Buffer& before = sorted_[i];
    const Buffer& after = sorted_[i + 1];
    if (before.size > after.address - before.address) {
      throw std::invalid_argument("the buffers " + before.name + " and " + after.name + " overlap");
    }
  }
}

int Buffers::find(std::uint64_t address, std::uint64_t bytes) const {
  const auto after =
      std::upper_bound(sorted_.begin(), sorted_.end(), address,
                       [](std::uint64_t at, const Buffer& buffer) { return at < buffer.address; });
  if (after == sorted_.begin()) return -1;
  const int i = int(after - sorted_.begin()) - 1;
  return sorted_[i].holds(address, bytes) ? i : -1;
}

int Buffers::nearest(std::uint64_t address) const {
  int best = -1;
  std::uint64_t distance = ~std::uint64_t(0);
  for (int i = 0; i < count(); ++i) {
    const Buffer& buffer = sorted_[i];
    const std::uint64_t end = buffer.address + buffer.size;
    const std::uint64_t away = address < buffer.address ? buffer.address - address
                               : address >= end         ? address - end
                                                        : 0;
    if (away < distance) {
      distance = away;
      best = i;
    }
  }
  return best;
}

}  // namespace evsam::simt
