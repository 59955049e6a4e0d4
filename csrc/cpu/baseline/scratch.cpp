// The scratch memory of every thread. Compiled once, for all instruction sets.

#include <cstdint>

#include "evsam/pages.h"

namespace evsam {

char* scratch(std::int64_t bytes) {
  thread_local Pages pages;
  const auto wanted = static_cast<std::size_t>(bytes);
  if (wanted > pages.size()) {
    pages = Pages();  // First, so that there are never two.
    pages = Pages(wanted);
  }
  return pages.data();
}

}  // namespace evsam
