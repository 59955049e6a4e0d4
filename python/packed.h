// Weights packed by a kernel, as Python holds them.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "evsam/dtype.h"
#include "evsam/isa.h"

// What `pack` made of `Weights`, with the instruction set in use.
template <class Weights, std::int64_t (*pack)(const Weights&, void*)>
class Packed {
 public:
  // Throws std::bad_alloc.
  explicit Packed(const Weights& weights) : weights_(weights), isa_(evsam::isa()) {
    bytes_ = pack(weights, nullptr);
    void* memory = nullptr;
    const bool large = bytes_ >= huge_page;
    if (posix_memalign(&memory, large ? huge_page : cache_line, static_cast<std::size_t>(bytes_)))
      throw std::bad_alloc();
    memory_.reset(memory);
#if defined(__linux__)
    // Kernels stream through it; a failure costs speed alone. The last page is not filled.
    if (large) (void)madvise(memory, static_cast<std::size_t>(bytes_ & -huge_page), MADV_HUGEPAGE);
#endif
    pack(weights, memory_.get());
  }

  // Shapes and types; the addresses in it may no longer be valid.
  const Weights& weights() const { return weights_; }
  evsam::DType dtype() const { return weights_.dtype; }
  const void* data() const { return memory_.get(); }
  std::int64_t bytes() const { return bytes_; }
  const std::string& isa() const { return isa_; }

  void check_isa() const {
    if (isa_ != evsam::isa())
      throw std::invalid_argument("weights packed for " + isa_ + " cannot be used with " +
                                  evsam::isa() + "; pack them again");
  }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };

  static constexpr std::int64_t cache_line = 64;
  static constexpr std::int64_t huge_page = std::int64_t{2} << 20;

  Weights weights_;
  std::string isa_;
  std::int64_t bytes_ = 0;
  std::unique_ptr<void, Free> memory_;
};
