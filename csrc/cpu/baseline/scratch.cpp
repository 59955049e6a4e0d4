// The scratch memory of every thread. Compiled once, for all instruction sets.

#include "../scratch.h"

#include <cstddef>
#include <cstdint>

#include "evsam/pages.h"

namespace evsam {

Scratch scratch(std::int64_t own, int members, std::int64_t shared) {
  thread_local Pages of_all, of_each;
  thread_local std::int64_t own_size = 0;
  // As large as ever before, unless that took more memory.
  if (own > own_size || static_cast<std::size_t>(members * own_size) > of_each.size()) own_size = own;
  return {of_all.reserve(static_cast<std::size_t>(shared)),
          of_each.reserve(static_cast<std::size_t>(members * own_size)), own_size};
}

}  // namespace evsam
