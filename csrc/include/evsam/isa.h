// Which instruction set the CPU kernels run with. Every kernel is compiled for several; the fastest
// one that this CPU has is used unless EVSAM_CPU_ISA or use_isa() names another.
#pragma once

#include <string>
#include <vector>

namespace evsam {

// Names of what was compiled in and runs on this CPU, the plainest first; "portable" is always there.
std::vector<std::string> available_isas();

// Name of the one in use. Throws std::invalid_argument where EVSAM_CPU_ISA names no available one.
std::string isa();

// Use the one with this name from now on. Throws std::invalid_argument where it is not available.
void use_isa(const std::string& name);

}  // namespace evsam
