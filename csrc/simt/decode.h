// Turns statements into instructions: the modifiers and operands of one statement, handed out to
// the part of the executor that has its opcode, and everything that is left over complained about.
#pragma once

#include <initializer_list>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "program.h"

namespace evsam::simt {

class FunctionDecoder;

class Decoding {
 public:
  Decoding(FunctionDecoder& function, const Statement& statement, Instruction& into);

  const Statement& statement() const { return statement_; }
  Instruction& instruction() { return into_; }
  [[noreturn]] void fail(const std::string& problem) const;

  // ---- modifiers: each may be asked for once; finish() complains about those nobody asked for

  bool take(std::string_view modifier);
  // The value that goes with the first of the modifiers that is there.
  template <class T>
  std::optional<T> choose(std::initializer_list<std::pair<std::string_view, T>> choices) {
    for (const auto& [name, value] : choices) {
      if (take(name)) return value;
    }
    return std::nullopt;
  }
  template <class T>
  T require(const char* what, std::initializer_list<std::pair<std::string_view, T>> choices) {
    if (const auto found = choose(choices)) return *found;
    fail(std::string("it needs ") + what);
  }
  // The next modifier that is the name of a type.
  Type type();
  std::optional<Type> optional_type();
  // Drops modifiers that start so, such as cache hints.
  void drop_prefixed(std::string_view prefix);
  [[noreturn]] void unsupported() const;
  void finish() const;

  // ---- operands, appended to those of the instruction

  int count() const { return int(statement_.operands.size()); }
  const Operand& operand(int i) const;
  bool is_vector(int i) const { return operand(i).kind == Operand::Kind::vector; }

  void read(int i, Type type) { read(operand(i), type); }
  void read(const Operand& operand, Type type);
  void write(int i, Type type) { write(operand(i), type); }
  void write(const Operand& operand, Type type);
  // Several registers {a, b, ...}, or one.
  void read_vector(int i, Type type, int length);
  void write_vector(int i, Type type, int length);
  // The base of [base + offset]; fills in `memory.offset` and `memory.wide_address`.
  void address(int i, Space space);
  // An integer known when decoding.
  std::uint64_t immediate(int i) const;
  // Bytes of a register; 0 for what is no register.
  int register_bytes(const Operand& operand) const;
  bool is_predicate(const Operand& operand) const;
  std::uint32_t parameter_bytes() const;
  // Reads or writes a register as wide as it is.
  void read_register(const Operand& operand, int bytes_if_constant);
  // The kernel works through memory that other blocks read while it runs.
  void communicates();
  // Bytes into the parameters of the kernel, or of the local memory, of a variable's symbol.
  std::optional<std::uint64_t> symbol_address(const Operand& operand, Space space) const;

  // What a report calls the instruction; otherwise the kind of its opcode.
  void set_kind(std::string_view kind) { kind_ = kind; }
  std::string_view kind() const { return kind_; }
  // Labels and functions, as positions in Kernel::code and Kernel::branch_tables.
  std::uint32_t label(int i) const;
  std::uint32_t branch_table(int i) const;
  bool in_kernel() const;  // and not in a function that it calls

 private:
  void append(Place place);

  FunctionDecoder& function_;
  const Statement& statement_;
  Instruction& into_;
  std::uint64_t taken_ = 0;  // bit i: modifier i
  std::string_view kind_;
};

// An opcode, and how its statements are decoded.
struct Opcode {
  std::string_view name;
  std::string_view kind;
  void (*decode)(Decoding&);
};

// The rooms of the instruction set, one file each in instructions/.
std::span<const Opcode> integer_opcodes();
std::span<const Opcode> float_opcodes();
std::span<const Opcode> convert_opcodes();
std::span<const Opcode> move_opcodes();
std::span<const Opcode> memory_opcodes();
std::span<const Opcode> atomic_opcodes();
std::span<const Opcode> async_copy_opcodes();
std::span<const Opcode> warp_opcodes();
std::span<const Opcode> matrix_opcodes();
std::span<const Opcode> control_opcodes();

// Which variables a kernel uses and how much memory they take; works for kernels with instructions
// that the executor does not have.
void lay_out(const Module& module, const Function& entry, Kernel& kernel);

// Fills in the code of a kernel. Throws PtxError.
void decode(const Module& module, const std::vector<GlobalVariable>& variables, Kernel& kernel);

}  // namespace evsam::simt
