// Modules of PTX that can be launched.
#include "program.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "decode.h"
#include "ptx/error.h"
#include "ptx/parser.h"

namespace evsam::simt {

Program::Program(std::string_view ptx) : module_(parse(ptx)) {
  place_variables();
  for (const Function& function : module_.functions) {
    if (!function.entry || !function.defined) continue;
    lay_out(module_, function, *kernels_.emplace_back(std::make_unique<Kernel>()));
  }
}

void Program::place_variables() {
  for (const Variable& variable : module_.variables) {
    if (variable.space == Space::shared || variable.external) continue;
    const std::size_t room = variable.size + variable.align;
    GlobalVariable& placed = variables_.emplace_back();
    placed.name = variable.name;
    placed.writable = variable.space == Space::global;
    placed.size = variable.size;
    placed.storage = std::make_unique<std::byte[]>(room);
    const auto address = reinterpret_cast<std::uintptr_t>(placed.storage.get());
    placed.data = placed.storage.get() + (-address & (variable.align - 1));
    if (!variable.bytes.empty()) {
      std::memcpy(placed.data, variable.bytes.data(), variable.bytes.size());
    }
  }
  for (const Variable& variable : module_.variables) {
    for (const Variable::Relocation& relocation : variable.relocations) {
      const auto find = [&](const std::string& name) {
        return std::find_if(variables_.begin(), variables_.end(),
                            [&](const GlobalVariable& other) { return other.name == name; });
      };
      const auto self = find(variable.name);
      const auto pointee = find(relocation.symbol);
      if (self == variables_.end() || pointee == variables_.end()) {
        throw PtxError(variable.line, "unsupported address in an initial value", relocation.symbol);
      }
      const std::uint64_t address =
          reinterpret_cast<std::uint64_t>(pointee->data) + relocation.offset;
      std::memcpy(self->data + relocation.at, &address, sizeof address);
    }
  }
}

std::string Program::file_name(int file) const {
  for (const auto& [index, name] : module_.files) {
    if (index == file) return name;
  }
  return {};
}

const Kernel& Program::kernel(std::string_view name) {
  const std::lock_guard lock(decoding_);
  std::string known;
  for (const auto& kernel : kernels_) {
    if (kernel->name == name) {
      if (!kernel->decoded) decode(module_, variables_, *kernel);
      return *kernel;
    }
    known += (known.empty() ? "" : ", ") + kernel->name;
  }
  throw std::invalid_argument("there is no kernel " + std::string(name) + "; the module has " +
                              (known.empty() ? "none" : known));
}

}  // namespace evsam::simt
