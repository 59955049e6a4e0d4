// The memory that a kernel may use: buffers at their real addresses, and windows of the generic
// address space for shared and local memory.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace evsam::simt {

// No pointer of a process on x86-64 or aarch64 is as large.
inline constexpr std::uint64_t SHARED_WINDOW = std::uint64_t(1) << 56;
inline constexpr std::uint64_t LOCAL_WINDOW = std::uint64_t(2) << 56;
inline constexpr std::uint64_t PARAM_WINDOW = std::uint64_t(3) << 56;
inline constexpr std::uint64_t WINDOW_SIZE = std::uint64_t(1) << 32;

struct Buffer {
  std::string name;
  std::uint64_t address = 0;
  std::uint64_t size = 0;
  bool writable = true;
  bool initialised = true;  // before the launch

  bool holds(std::uint64_t at, std::uint64_t bytes) const {
    return at >= address && bytes <= size && at - address <= size - bytes;
  }
};

// Buffers in the order of their addresses. Throws std::invalid_argument where two overlap.
class Buffers {
 public:
  explicit Buffers(std::vector<Buffer> buffers);

  int count() const { return int(sorted_.size()); }
  const Buffer& operator[](int i) const { return sorted_[i]; }
  // The buffer that holds all of [address, address + bytes), or -1.
  int find(std::uint64_t address, std::uint64_t bytes) const;
  // The buffer that is next to an address, or -1 where there is none at all.
  int nearest(std::uint64_t address) const;

 private:
  std::vector<Buffer> sorted_;
};

}  // namespace evsam::simt
