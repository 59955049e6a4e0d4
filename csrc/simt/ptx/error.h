// What is wrong with a text of PTX, and where.
#pragma once

#include <stdexcept>
#include <string>

namespace evsam::simt {

// Malformed text, or an instruction that the executor does not have.
class PtxError : public std::runtime_error {
 public:
  PtxError(int line, const std::string& problem, const std::string& text)
      : std::runtime_error("PTX line " + std::to_string(line) + ": " + problem +
                           (text.empty() ? "" : ": " + text)) {}
};

}  // namespace evsam::simt
