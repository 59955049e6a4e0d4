// Decodes a kernel and the functions it calls into one list of instructions.
//
// Functions are not recursive, so that each has its registers, its local memory and its return
// address in a place of its own.
#include "decode.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <set>
#include <unordered_map>

#include "ptx/error.h"

namespace evsam::simt {
namespace {

constexpr std::uint64_t MOST_INSTRUCTIONS = 1 << 22;  // an Access keeps 22 bits of the index
constexpr std::uint64_t MOST_SHARED = 256 * 1024;
constexpr std::uint64_t MOST_LOCAL = 512 * 1024;

std::uint64_t align_up(std::uint64_t value, std::uint64_t align) {
  return (value + align - 1) / align * align;
}

const Function* find_function(const Module& module, std::string_view name) {
  for (const Function& function : module.functions) {
    if (function.name == name) return &function;
  }
  return nullptr;
}

const Variable* find_variable(const std::vector<Variable>& variables, std::string_view name) {
  for (const Variable& variable : variables) {
    if (variable.name == name) return &variable;
  }
  return nullptr;
}

template <class F>
void for_symbols(const Operand& operand, F f) {
  if (operand.kind == Operand::Kind::symbol) f(operand);
  for (const Operand& child : operand.children) for_symbols(child, f);
}

// The functions that `entry` reaches, itself first; callees behind their callers.
std::vector<const Function*> reachable(const Module& module, const Function& entry) {
  std::vector<const Function*> found{&entry};
  for (std::size_t i = 0; i < found.size(); ++i) {
    for (const Statement& statement : found[i]->statements) {
      if (statement.opcode != "call") continue;
      for (const Operand& operand : statement.operands) {
        const Function* callee =
            operand.kind == Operand::Kind::symbol ? find_function(module, operand.name) : nullptr;
        if (callee && std::find(found.begin(), found.end(), callee) == found.end()) {
          found.push_back(callee);
        }
      }
    }
  }
  return found;
}

constexpr std::pair<std::string_view, Special> SPECIALS[] = {
    {"%tid.x", Special::tid_x},
    {"%tid.y", Special::tid_y},
    {"%tid.z", Special::tid_z},
    {"%ntid.x", Special::ntid_x},
    {"%ntid.y", Special::ntid_y},
    {"%ntid.z", Special::ntid_z},
    {"%ctaid.x", Special::ctaid_x},
    {"%ctaid.y", Special::ctaid_y},
    {"%ctaid.z", Special::ctaid_z},
    {"%nctaid.x", Special::nctaid_x},
    {"%nctaid.y", Special::nctaid_y},
    {"%nctaid.z", Special::nctaid_z},
    {"%laneid", Special::laneid},
    {"%warpid", Special::warpid},
    {"%nwarpid", Special::nwarpid},
    {"%lanemask_eq", Special::lanemask_eq},
    {"%lanemask_lt", Special::lanemask_lt},
    {"%lanemask_le", Special::lanemask_le},
    {"%lanemask_gt", Special::lanemask_gt},
    {"%lanemask_ge", Special::lanemask_ge},
    {"%smid", Special::smid},
    {"%nsmid", Special::nsmid},
    {"%gridid", Special::gridid},
    {"%dynamic_smem_size", Special::dynamic_smem_size},
    {"%total_smem_size", Special::total_smem_size},
};

// Some opcodes are those of integers and of floats; the types among the modifiers tell which.
const Opcode* find_opcode(const Statement& statement) {
  for (const std::string& modifier : statement.modifiers) {
    const auto type = type_named(modifier);
    if (!type || !is_float(*type)) continue;
    for (const Opcode& opcode : float_opcodes()) {
      if (opcode.name == statement.opcode) return &opcode;
    }
  }
  static const auto table = [] {
    std::unordered_map<std::string_view, const Opcode*> opcodes;
    for (const auto room :
         {integer_opcodes(), convert_opcodes(), move_opcodes(), memory_opcodes(), atomic_opcodes(),
          async_copy_opcodes(), warp_opcodes(), matrix_opcodes(), control_opcodes()}) {
      for (const Opcode& opcode : room) opcodes.emplace(opcode.name, &opcode);
    }
    return opcodes;
  }();
  const auto found = table.find(statement.opcode);
  return found == table.end() ? nullptr : found->second;
}

// The addresses of a kernel's variables.
struct Layout {
  std::map<const Variable*, std::uint64_t> shared;
  std::map<const Variable*, std::uint64_t> local;  // also the parameters of calls
};

void add_shared(Kernel& kernel, Layout& layout, const Variable& variable) {
  if (variable.space != Space::shared || layout.shared.contains(&variable)) return;
  if (variable.size == 0) {
    kernel.shared_align = std::max<std::uint32_t>(kernel.shared_align, variable.align);
    return;
  }
  const std::uint64_t at = align_up(kernel.static_shared, variable.align);
  if (at + variable.size > MOST_SHARED) {
    throw PtxError(variable.line, "shared memory has 256 KiB at most", variable.name);
  }
  layout.shared[&variable] = at;
  kernel.static_shared = std::uint32_t(at + variable.size);
}

void add_local(Kernel& kernel, Layout& layout, const Variable& variable) {
  const std::uint64_t at = align_up(kernel.local_bytes, std::max<std::uint64_t>(variable.align, 8));
  if (at + variable.size > MOST_LOCAL) {
    throw PtxError(variable.line, "local memory has 512 KiB a thread at most", variable.name);
  }
  layout.local[&variable] = at;
  kernel.local_bytes = std::uint32_t(at + variable.size);
}

Layout layout_of(const Module& module, const Function& entry, Kernel& kernel) {
  Layout layout;
  kernel.static_shared = kernel.local_bytes = 0;
  for (const Function* function : reachable(module, entry)) {
    for (const Variable& variable : function->variables) {
      if (variable.space == Space::shared) {
        add_shared(kernel, layout, variable);
      } else {
        add_local(kernel, layout, variable);
      }
    }
    if (!function->entry) {
      for (const Variable& variable : function->parameters) add_local(kernel, layout, variable);
      for (const Variable& variable : function->returns) add_local(kernel, layout, variable);
    }
    for (const Statement& statement : function->statements) {
      for (const Operand& operand : statement.operands) {
        for_symbols(operand, [&](const Operand& symbol) {
          if (symbol.index >= 0) return;
          const Variable* variable = find_variable(module.variables, symbol.name);
          if (variable) add_shared(kernel, layout, *variable);
        });
      }
    }
  }
  return layout;
}

// Throws where a function calls itself, directly or not.
class RecursionCheck {
 public:
  explicit RecursionCheck(const Module& module) : module_(module) {}

  void visit(const Function& function) {
    if (done_.contains(&function)) return;
    if (!open_.insert(&function).second || open_.size() > 64) {
      throw PtxError(function.line, "recursive or deeply nested functions are not supported",
                     function.name);
    }
    for (const Statement& statement : function.statements) {
      if (statement.opcode != "call") continue;
      for (const Operand& operand : statement.operands) {
        const Function* callee =
            operand.kind == Operand::Kind::symbol ? find_function(module_, operand.name) : nullptr;
        if (callee) visit(*callee);
      }
    }
    open_.erase(&function);
    done_.insert(&function);
  }

 private:
  const Module& module_;
  std::set<const Function*> open_;
  std::set<const Function*> done_;
};

}  // namespace

// What the functions of a kernel share while they are decoded.
struct KernelDecoder {
  const Module& module;
  const std::vector<GlobalVariable>& variables;
  Kernel& kernel;
  Layout layout;
  std::map<std::pair<int, std::uint64_t>, Place> constants;
  std::map<Special, Place> specials;
  std::map<const Function*, std::uint32_t> starts;
  std::map<const Function*, Place> return_addresses;

  Place allocate(std::size_t bytes) {
    const Place place = Place::in_registers(kernel.register_bytes);
    // Vectors of lanes start at cache lines; predicates share one.
    kernel.register_bytes += bytes;
    if (kernel.register_bytes > std::size_t(1) << 30) {
      throw PtxError(0, "the kernel has too many registers", kernel.name);
    }
    return place;
  }

  Place constant(std::uint64_t bits, int bytes) {
    const auto [entry, fresh] = constants.try_emplace({bytes, bits});
    if (fresh) {
      const std::size_t at = kernel.constants.size();
      entry->second = Place::in_constants(at);
      if (bytes == 0) {  // a predicate
        const Mask mask = bits ? ALL_LANES : 0;
        kernel.constants.resize(at + 64);
        std::memcpy(&kernel.constants[at], &mask, sizeof mask);
      } else {
        kernel.constants.resize(at + align_up(std::size_t(bytes) * LANES, 64));
        for (int lane = 0; lane < LANES; ++lane) {
          std::memcpy(&kernel.constants[at + lane * bytes], &bits, bytes);
        }
      }
    }
    return entry->second;
  }

  Place special(Special which) {
    const auto [entry, fresh] = specials.try_emplace(which);
    if (fresh) {
      entry->second = allocate(4 * LANES);
      kernel.specials.emplace_back(which, entry->second);
    }
    return entry->second;
  }

  Place return_address(const Function* function) {
    const auto [entry, fresh] = return_addresses.try_emplace(function);
    if (fresh) entry->second = allocate(4 * LANES);
    return entry->second;
  }
};

class FunctionDecoder {
 public:
  FunctionDecoder(KernelDecoder& kernel, const Function& function)
      : kernel_(kernel),
        function_(function),
        places_(function.registers.size()),
        placed_(function.registers.size()) {}

  KernelDecoder& kernel() { return kernel_; }
  const Function& function() const { return function_; }

  Place place_of(int reg) {
    if (!placed_[reg]) {
      const int bytes = bytes_of(function_.registers[reg].type);
      places_[reg] = kernel_.allocate(bytes ? std::max(bytes, 2) * LANES : 64);
      placed_[reg] = true;
    }
    return places_[reg];
  }

  void run() {
    for (std::size_t i = 0; i < function_.statements.size(); ++i) {
      positions_.push_back(std::uint32_t(kernel_.kernel.code.size()));
      decode_statement(function_.statements[i]);
    }
    positions_.push_back(std::uint32_t(kernel_.kernel.code.size()));
    // Control may run off the end of the text.
    Statement end;
    end.opcode = end.text = "ret";
    end.line = function_.line;
    decode_statement(end);
    const auto position = [&](int statement) { return positions_[statement]; };
    for (const std::uint32_t at : branches_) {
      Instruction& branch = kernel_.kernel.code[at];
      branch.target = position(int(branch.target));
    }
    for (const auto& table : function_.branch_tables) {
      auto& targets = kernel_.kernel.branch_tables.emplace_back();
      for (const int statement : table) targets.push_back(position(statement));
    }
  }

  std::uint32_t table_index(int table) const { return first_table_ + table; }
  void remember_branch(std::uint32_t at) { branches_.push_back(at); }
  Instruction& append(const Statement& statement, std::string_view kind) {
    Kernel& kernel = kernel_.kernel;
    if (kernel.code.size() >= MOST_INSTRUCTIONS) {
      throw PtxError(statement.line, "the kernel has too many instructions", statement.text);
    }
    kernel.sources.push_back(
        {statement.text, statement.line, statement.location.file, statement.location.line, kind});
    Instruction& instruction = kernel.code.emplace_back();
    instruction.index = std::uint32_t(kernel.code.size()) - 1;
    if (statement.guard >= 0) {
      instruction.guarded = true;
      instruction.guard_negated = statement.guard_negated;
      instruction.guard = place_of(statement.guard);
    }
    return instruction;
  }

 private:
  void decode_statement(const Statement& statement) {
    if (statement.opcode == "call") {
      decode_call(statement);
      return;
    }
    const Opcode* opcode = find_opcode(statement);
    if (!opcode) {
      throw PtxError(statement.line, "unsupported instruction", statement.text);
    }
    Instruction& instruction = append(statement, opcode->kind);
    Decoding decoding(*this, statement, instruction);
    decoding.set_kind(opcode->kind);
    opcode->decode(decoding);
    decoding.finish();
    kernel_.kernel.sources.back().kind = decoding.kind();
    if (instruction.flow == Flow::branch) branches_.push_back(instruction.index);
  }

  void decode_call(const Statement& statement);

  KernelDecoder& kernel_;
  const Function& function_;
  std::vector<Place> places_;
  std::vector<bool> placed_;
  std::vector<std::uint32_t> positions_;  // of statements, in Kernel::code
  std::vector<std::uint32_t> branches_;
  std::uint32_t first_table_ = std::uint32_t(kernel_.kernel.branch_tables.size());
};

// In `run.cpp`: copies `option` bytes of local memory a lane, from `target` to `memory.offset`.
void copy_local(Warp& warp, const Instruction& instruction, Mask mask);

void FunctionDecoder::decode_call(const Statement& statement) {
  const auto fail = [&](const std::string& problem) {
    throw PtxError(statement.line, problem, statement.text);
  };
  // call (results), name, (arguments): the lists may be missing.
  std::vector<const Operand*> lists;
  const Function* callee = nullptr;
  std::size_t name_at = 0;
  for (std::size_t i = 0; i < statement.operands.size() && !callee; ++i) {
    const Operand& operand = statement.operands[i];
    if (operand.kind == Operand::Kind::symbol) {
      if (operand.name == "__assertfail") {
        append(statement, "control").flow = Flow::trap;
        return;
      }
      callee = find_function(kernel_.module, operand.name);
      if (!callee || !callee->defined) fail("the function " + operand.name + " is not defined");
      name_at = i;
    } else if (operand.kind != Operand::Kind::vector) {
      fail("indirect calls are not supported");
    }
  }
  if (!callee) fail("the call names no function");
  static const std::vector<Operand> none;
  const auto& results = name_at > 0 ? statement.operands[0].children : none;
  const auto& arguments =
      name_at + 1 < statement.operands.size() ? statement.operands[name_at + 1].children : none;
  if (results.size() != callee->returns.size() || arguments.size() != callee->parameters.size()) {
    fail("the call has other parameters than the function " + callee->name);
  }
  const auto address = [&](const Operand& operand) {
    if (operand.kind != Operand::Kind::symbol || operand.index < 0 ||
        function_.variables[operand.index].space != Space::param) {
      fail("only .param variables can be passed to functions");
    }
    return kernel_.layout.local.at(&function_.variables[operand.index]);
  };
  const auto copy = [&](std::uint64_t from, std::uint64_t to, const Variable& variable) {
    Instruction& instruction = append(statement, "move");
    instruction.execute = copy_local;
    instruction.target = std::uint32_t(from);
    instruction.memory.offset = std::int64_t(to);
    instruction.option = std::uint32_t(variable.size);
  };
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    copy(address(arguments[i]), kernel_.layout.local.at(&callee->parameters[i]),
         callee->parameters[i]);
  }
  Instruction& call = append(statement, "control");
  call.flow = Flow::call;
  call.operands[0] = kernel_.return_address(callee);
  call.option =
      std::uint32_t(std::find_if(kernel_.module.functions.begin(), kernel_.module.functions.end(),
                                 [&](const Function& f) { return &f == callee; }) -
                    kernel_.module.functions.begin());
  for (std::size_t i = 0; i < results.size(); ++i) {
    copy(kernel_.layout.local.at(&callee->returns[i]), address(results[i]), callee->returns[i]);
  }
}

// ---- Decoding

Decoding::Decoding(FunctionDecoder& function, const Statement& statement, Instruction& into)
    : function_(function), statement_(statement), into_(into) {
  if (statement.modifiers.size() > 64) fail("too many modifiers");
}

void Decoding::fail(const std::string& problem) const {
  throw PtxError(statement_.line, problem, statement_.text);
}

void Decoding::unsupported() const { fail("unsupported instruction"); }

bool Decoding::take(std::string_view modifier) {
  for (std::size_t i = 0; i < statement_.modifiers.size(); ++i) {
    if (!(taken_ >> i & 1) && statement_.modifiers[i] == modifier) {
      taken_ |= std::uint64_t(1) << i;
      return true;
    }
  }
  return false;
}

std::optional<Type> Decoding::optional_type() {
  for (std::size_t i = 0; i < statement_.modifiers.size(); ++i) {
    if (taken_ >> i & 1) continue;
    if (const auto type = type_named(statement_.modifiers[i])) {
      taken_ |= std::uint64_t(1) << i;
      return type;
    }
  }
  return std::nullopt;
}

Type Decoding::type() {
  if (const auto type = optional_type()) return *type;
  fail("the instruction has no supported type");
}

void Decoding::drop_prefixed(std::string_view prefix) {
  for (std::size_t i = 0; i < statement_.modifiers.size(); ++i) {
    if (statement_.modifiers[i].starts_with(prefix)) taken_ |= std::uint64_t(1) << i;
  }
}

void Decoding::finish() const {
  for (std::size_t i = 0; i < statement_.modifiers.size(); ++i) {
    if (!(taken_ >> i & 1)) fail("unsupported modifier ." + statement_.modifiers[i]);
  }
}

const Operand& Decoding::operand(int i) const {
  if (i >= count()) fail("an operand is missing");
  return statement_.operands[i];
}

void Decoding::append(Place place) {
  if (into_.operand_count == Instruction::MOST_OPERANDS) fail("too many operands");
  into_.operands[into_.operand_count++] = place;
}

int Decoding::register_bytes(const Operand& operand) const {
  if (operand.kind == Operand::Kind::reg) {
    return std::max(bytes_of(function_.function().registers[operand.index].type), 2);
  }
  return 0;
}

std::optional<std::uint64_t> Decoding::symbol_address(const Operand& operand, Space space) const {
  if (operand.kind != Operand::Kind::symbol) return std::nullopt;
  KernelDecoder& kernel = function_.kernel();
  const Function& function = function_.function();
  const auto in = [&](const Variable* variable) -> std::optional<std::uint64_t> {
    if (const auto found = kernel.layout.local.find(variable); found != kernel.layout.local.end())
      return found->second + operand.offset;
    if (const auto found = kernel.layout.shared.find(variable); found != kernel.layout.shared.end())
      return found->second + operand.offset;
    if (variable->space == Space::shared)
      return kernel.kernel.dynamic_shared_offset() + operand.offset;
    return std::nullopt;
  };
  if (operand.index >= 0) return in(&function.variables[operand.index]);
  if (space == Space::param || space == Space::generic) {
    for (std::size_t i = 0; i < function.parameters.size(); ++i) {
      if (function.parameters[i].name != operand.name) continue;
      return function.entry ? kernel.kernel.parameter_offsets[i] + operand.offset
                            : *in(&function.parameters[i]);
    }
    if (const Variable* result = find_variable(function.returns, operand.name)) return in(result);
  }
  if (const Variable* variable = find_variable(kernel.module.variables, operand.name)) {
    if (variable->space == Space::shared) return in(variable);
    for (const GlobalVariable& global : kernel.variables) {
      if (global.name == operand.name) {
        return reinterpret_cast<std::uint64_t>(global.data) + operand.offset;
      }
    }
    fail("the variable " + operand.name + " is not defined in this module");
  }
  return std::nullopt;
}

void Decoding::read(const Operand& operand, Type type) {
  KernelDecoder& kernel = function_.kernel();
  const int bytes = bytes_of(type);
  switch (operand.kind) {
    case Operand::Kind::reg: {
      const Type declared = function_.function().registers[operand.index].type;
      if (bytes_of(declared) != bytes || (declared == Type::pred) != (type == Type::pred)) {
        fail("register " + function_.function().registers[operand.index].name +
             " does not hold a ." + std::string(name_of(type)));
      }
      if (operand.negated) into_.negated = true;
      append(function_.place_of(operand.index));
      return;
    }
    case Operand::Kind::integer:
      if (type == Type::pred) {
        append(kernel.constant((operand.bits != 0) != operand.negated, 0));
        return;
      }
      append(kernel.constant(operand.bits, bytes));
      return;
    case Operand::Kind::single: {
      const std::uint32_t bits = std::uint32_t(operand.bits);
      if (bytes == 8) {
        const double wide = std::bit_cast<float>(bits);
        append(kernel.constant(std::bit_cast<std::uint64_t>(wide), 8));
      } else if (bytes == 4) {
        append(kernel.constant(bits, 4));
      } else {
        fail("the constant is too wide");
      }
      return;
    }
    case Operand::Kind::real:
      if (bytes == 8) {
        append(kernel.constant(operand.bits, 8));
      } else if (bytes == 4) {
        const float narrow = float(std::bit_cast<double>(operand.bits));
        append(kernel.constant(std::bit_cast<std::uint32_t>(narrow), 4));
      } else {
        fail("the constant is too wide");
      }
      return;
    case Operand::Kind::symbol: {
      for (const auto& [name, special] : SPECIALS) {
        if (name == operand.name) {
          if (bytes != 4) fail("special registers have 32 bits");
          append(kernel.special(special));
          return;
        }
      }
      const auto address = symbol_address(operand, Space::generic);
      if (!address) fail("unknown name " + operand.name);
      if (bytes != 4 && bytes != 8) fail("an address has 32 or 64 bits");
      append(kernel.constant(*address, bytes));
      return;
    }
    default:
      fail("an operand is not of a kind that the instruction takes");
  }
}

void Decoding::write(const Operand& operand, Type type) {
  if (operand.kind == Operand::Kind::sink) {
    append(function_.kernel().allocate(8 * LANES));
    return;
  }
  if (operand.kind != Operand::Kind::reg) fail("the result is not a register");
  read(operand, type);
}

void Decoding::read_vector(int i, Type type, int length) {
  const Operand& list = operand(i);
  if (list.kind != Operand::Kind::vector) {
    if (length != 1) fail("an operand needs " + std::to_string(length) + " registers");
    read(list, type);
    return;
  }
  if (int(list.children.size()) != length) {
    fail("an operand needs " + std::to_string(length) + " registers");
  }
  for (const Operand& child : list.children) read(child, type);
}

void Decoding::write_vector(int i, Type type, int length) {
  const Operand& list = operand(i);
  if (list.kind != Operand::Kind::vector) {
    if (length != 1) fail("an operand needs " + std::to_string(length) + " registers");
    write(list, type);
    return;
  }
  if (int(list.children.size()) != length) {
    fail("an operand needs " + std::to_string(length) + " registers");
  }
  for (const Operand& child : list.children) write(child, type);
}

void Decoding::read_register(const Operand& operand, int bytes_if_constant) {
  const int bytes = register_bytes(operand);
  if (operand.kind == Operand::Kind::reg) {
    if (function_.function().registers[operand.index].type == Type::pred) {
      fail("a predicate is not a number");
    }
    append(function_.place_of(operand.index));
  } else if (bytes == 0) {
    read(operand, bytes_if_constant == 8   ? Type::b64
                  : bytes_if_constant == 4 ? Type::b32
                                           : Type::b16);
  }
}

void Decoding::address(int i, Space space) {
  const Operand& whole = operand(i);
  if (whole.kind != Operand::Kind::address || whole.children.size() != 1) {
    fail("an address in brackets is needed");
  }
  const Operand& base = whole.children[0];
  into_.memory.space = space;
  if (base.kind == Operand::Kind::reg) {
    const int bytes = register_bytes(base);
    if (bytes != 4 && bytes != 8) fail("an address has 32 or 64 bits");
    into_.memory.wide_address = bytes == 8;
    into_.memory.offset = base.offset;
    append(function_.place_of(base.index));
    if (space == Space::param && !in_kernel()) into_.memory.space = Space::local;
    return;
  }
  std::uint64_t address = base.bits;
  if (base.kind == Operand::Kind::symbol) {
    const auto found = symbol_address(base, space);
    if (!found) fail("unknown name " + base.name);
    address = *found;
    const bool own = base.index >= 0;
    if (space == Space::param && (own || !in_kernel())) into_.memory.space = Space::local;
  } else if (base.kind != Operand::Kind::integer) {
    fail("an address is not of a kind that the instruction takes");
  }
  into_.memory.wide_address = true;
  append(function_.kernel().constant(address, 8));
}

std::uint64_t Decoding::immediate(int i) const {
  if (operand(i).kind != Operand::Kind::integer) fail("an operand has to be a constant");
  return operand(i).bits;
}

bool Decoding::is_predicate(const Operand& operand) const {
  return operand.kind == Operand::Kind::reg &&
         function_.function().registers[operand.index].type == Type::pred;
}

std::uint32_t Decoding::parameter_bytes() const {
  return function_.kernel().kernel.parameter_bytes;
}

void Decoding::communicates() { function_.kernel().kernel.communicates = true; }

std::uint32_t Decoding::label(int i) const {
  if (operand(i).kind != Operand::Kind::label) fail("there is no such label");
  return std::uint32_t(operand(i).index);
}

std::uint32_t Decoding::branch_table(int i) const {
  if (operand(i).kind != Operand::Kind::table) fail("there is no such table of labels");
  return function_.table_index(operand(i).index);
}

bool Decoding::in_kernel() const { return function_.function().entry; }

// ---- a kernel

void lay_out(const Module& module, const Function& entry, Kernel& kernel) {
  kernel.name = entry.name;
  kernel.parameters = entry.parameters;
  std::copy(std::begin(entry.required_block), std::end(entry.required_block),
            std::begin(kernel.required_block));
  std::copy(std::begin(entry.maximum_block), std::end(entry.maximum_block),
            std::begin(kernel.maximum_block));
  std::uint64_t at = 0;
  for (const Variable& parameter : entry.parameters) {
    at = align_up(at, parameter.align);
    kernel.parameter_offsets.push_back(std::uint32_t(at));
    at += parameter.size;
    if (at > 32764)
      throw PtxError(parameter.line, "parameters have 32764 bytes at most", parameter.name);
  }
  kernel.parameter_bytes = std::uint32_t(at);
  layout_of(module, entry, kernel);
}

void decode(const Module& module, const std::vector<GlobalVariable>& variables, Kernel& kernel) {
  const Function& entry = *find_function(module, kernel.name);
  RecursionCheck(module).visit(entry);
  kernel.code.clear();
  kernel.sources.clear();
  kernel.branch_tables.clear();
  kernel.constants.clear();
  kernel.specials.clear();
  kernel.register_bytes = 0;
  kernel.communicates = false;
  KernelDecoder decoder{module, variables, kernel, layout_of(module, entry, kernel),
                        {},     {},        {},     {}};
  for (const Function* function : reachable(module, entry)) {
    decoder.starts[function] = std::uint32_t(kernel.code.size());
    // The address that `ret` jumps to.
    if (!function->entry) decoder.return_address(function);
    const std::size_t begin = kernel.code.size();
    FunctionDecoder(decoder, *function).run();
    for (std::size_t i = begin; i < kernel.code.size(); ++i) {
      if (kernel.code[i].flow == Flow::ret) {
        kernel.code[i].operands[0] = decoder.return_address(function);
      }
    }
  }
  for (Instruction& instruction : kernel.code) {
    if (instruction.flow == Flow::call) {
      instruction.target = decoder.starts.at(&module.functions[instruction.option]);
    }
  }
  kernel.register_bytes = align_up(kernel.register_bytes, 64);
  kernel.decoded = true;
}

}  // namespace evsam::simt
