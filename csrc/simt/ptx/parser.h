// Parses a text of PTX.
#pragma once

#include <string_view>

#include "syntax.h"

namespace evsam::simt {

// The syntax tree of `text`. Throws PtxError, which names the line, for text that is not PTX.
Module parse(std::string_view text);

}  // namespace evsam::simt
