// Memory that a kernel needs while it runs.
#pragma once

#include <cstdint>

namespace evsam {

// `bytes` of memory aligned to 64, uninitialised, which the calling thread owns until its next call of
// this function. A thread keeps its largest piece for later calls, so that nothing is allocated once
// every kernel of a model has run; it is given back when the thread ends. Throws std::bad_alloc.
char* scratch(std::int64_t bytes);

namespace EVSAM_ISA {
namespace {

// Takes pieces from a block of memory one after another, each on cache lines of its own; without a
// block it only counts.
class Pieces {
 public:
  explicit Pieces(void* block = nullptr) : block_(static_cast<char*>(block)) {}

  template <class T>
  T* take(std::int64_t count) {
    T* piece = block_ == nullptr ? nullptr : reinterpret_cast<T*>(block_ + bytes_);
    bytes_ += (count * static_cast<std::int64_t>(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }

  std::int64_t bytes() const { return bytes_; }

 private:
  char* block_;
  std::int64_t bytes_ = 0;
};

// The pieces of packed weights, which are only read.
inline Pieces pieces_of(const void* packed) { return Pieces(const_cast<void*>(packed)); }

}  // namespace
}  // namespace EVSAM_ISA
}  // namespace evsam
