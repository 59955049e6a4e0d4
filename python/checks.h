// Checks of what Python passes.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

inline void check(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

inline void check_at_least(const char* name, std::int64_t value, std::int64_t least) {
  check(value >= least, std::string(name) + " must be at least " + std::to_string(least) +
                            ", got " + std::to_string(value));
}
