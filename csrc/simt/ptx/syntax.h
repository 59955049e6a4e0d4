// The syntax tree of a module of PTX. Names of registers and labels are resolved, types are not
// checked.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "type.h"

namespace evsam::simt {

enum class Space : std::uint8_t { generic, global, constant, shared, local, param };

struct Operand {
  enum class Kind : std::uint8_t {
    reg,      // `index` in Function::registers
    integer,  // `bits`
    single,   // `bits` of a float
    real,     // `bits` of a double
    symbol,   // `name` of a variable, a function or a special register, plus `offset`
    label,    // `index` in Function::statements
    table,    // `index` in Function::branch_tables
    address,  // [children[0] + offset]; more children where the instruction takes them
    vector,   // {children} or (children) or children[0]|children[1]
    sink,     // _
  };
  Kind kind = Kind::sink;
  bool negated = false;  // !p
  int index = -1;
  std::uint64_t bits = 0;
  std::int64_t offset = 0;
  std::string name;
  std::vector<Operand> children;
};

struct Location {
  int file = 0;
  int line = 0;
  int column = 0;
  auto operator<=>(const Location&) const = default;
};

struct Statement {
  int line = 0;       // of the PTX
  Location location;  // of the source; line 0 where nothing is known
  std::string text;   // as written, on one line
  int guard = -1;     // index of a predicate register
  bool guard_negated = false;
  std::string opcode;
  std::vector<std::string> modifiers;
  std::vector<Operand> operands;
};

struct Register {
  std::string name;
  Type type;
};

struct Variable {
  std::string name;
  Space space = Space::generic;
  Type type = Type::none;
  int line = 0;
  std::uint64_t align = 1;
  std::uint64_t size = 0;  // bytes; 0 for an array without a size, such as dynamic shared memory
  bool external = false;
  bool pointer = false;  // a parameter that says .ptr
  // The initial value: bytes, and what has to be added to them: the address of a symbol.
  std::vector<std::uint8_t> bytes;
  struct Relocation {
    std::uint64_t at;
    std::string symbol;
    std::int64_t offset;
  };
  std::vector<Relocation> relocations;
};

struct Function {
  std::string name;
  int line = 0;
  bool entry = false;
  bool defined = false;
  std::vector<Variable> returns;
  std::vector<Variable> parameters;
  std::vector<Register> registers;
  std::vector<Variable> variables;  // .shared, .local and .param of the body
  std::vector<Statement> statements;
  std::vector<std::vector<int>> branch_tables;  // .branchtargets: indices of statements
  std::uint32_t required_block[3] = {0, 0, 0};  // .reqntid
  std::uint32_t maximum_block[3] = {0, 0, 0};   // .maxntid
};

struct Module {
  std::string target;
  std::vector<std::pair<int, std::string>> files;
  std::vector<Variable> variables;
  std::vector<Function> functions;
};

}  // namespace evsam::simt
