// Memory that a kernel needs while it runs.
#pragma once

#include <cstdint>

namespace evsam {

// What a team shares, and what each member has for itself, aligned to 64. A member's own piece begins at the same
// address in every kernel, as far as the sizes allow that: the member's core holds it already, and would have to ask
// another core for lines that a kernel before wrote there.
struct Scratch {
  char* shared;
  char* own;              // of all members
  std::int64_t own_size;  // of each
};

// `own` bytes for each of so many members and `shared` bytes for all, uninitialised, which the calling thread owns
// until its next call of this function. A thread keeps its largest pieces for later calls, so that nothing is
// allocated once every kernel of a model has run; they are given back when the thread ends. Throws std::bad_alloc.
Scratch scratch(std::int64_t own, int members, std::int64_t shared = 0);

namespace EVSAM_ISA {
namespace {

inline char* own_piece(const Scratch& scratch, int member) {
  return scratch.own + member * scratch.own_size;
}

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
