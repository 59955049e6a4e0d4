// Weights packed by a kernel, as Python holds them.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

#include "evsam/dtype.h"
#include "evsam/isa.h"
#include "evsam/pages.h"

// What `pack` made of `Weights`, with the instruction set in use.
template <class Weights, std::int64_t (*pack)(const Weights&, void*)>
class Packed {
 public:
  // Throws std::bad_alloc.
  explicit Packed(const Weights& weights) : weights_(weights), isa_(evsam::isa()) {
    bytes_ = pack(weights, nullptr);
    if (bytes_ < static_cast<std::int64_t>(evsam::Pages::page)) {
      lines_ = std::make_unique<Line[]>(static_cast<std::size_t>(bytes_) / sizeof(Line) + 1);
    } else {
      pages_ = evsam::Pages(static_cast<std::size_t>(bytes_));
    }
    pack(weights, data());
  }

  // Shapes and types; the addresses in it may no longer be valid.
  const Weights& weights() const { return weights_; }
  evsam::DType dtype() const { return weights_.dtype; }
  const void* data() const { return const_cast<Packed*>(this)->data(); }
  std::int64_t bytes() const { return bytes_; }
  const std::string& isa() const { return isa_; }

  void check_isa() const {
    if (isa_ != evsam::isa())
      throw std::invalid_argument("weights packed for " + isa_ + " cannot be used with " +
                                  evsam::isa() + "; pack them again");
  }

 private:
  struct alignas(64) Line {
    char bytes[64];
  };

  void* data() { return lines_ != nullptr ? static_cast<void*>(lines_.get()) : pages_.data(); }

  Weights weights_;
  std::string isa_;
  std::int64_t bytes_ = 0;
  std::unique_ptr<Line[]> lines_;  // of few bytes, or
  evsam::Pages pages_;
};
