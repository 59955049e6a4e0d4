// The scratch memory of every thread. Compiled once, for all instruction sets.

#include <cstdint>

#include "evsam/pages.h"

namespace evsam {

char* scratch(std::int64_t bytes) {
  thread_local Pages pages;
  return pages.reserve(static_cast<std::size_t>(bytes));
}

}  // namespace evsam
