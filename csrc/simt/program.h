// Decoded kernels: every instruction with its handler, its operands as places in the register file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "lanes.h"
#include "ptx/syntax.h"

namespace evsam::simt {

struct Warp;
struct Instruction;
using Handler = void (*)(Warp&, const Instruction&, Mask);

// Where the 32 values of an operand are: bytes into the warp's registers, or into the constants of
// the kernel. A predicate is a Mask.
class Place {
 public:
  static Place in_registers(std::size_t offset) { return Place(std::int32_t(offset)); }
  static Place in_constants(std::size_t offset) { return Place(~std::int32_t(offset)); }
  Place() = default;

  template <class T>
  T* in(std::byte* registers, const std::byte* constants) const {
    return reinterpret_cast<T*>(at_ >= 0 ? registers + at_
                                         : const_cast<std::byte*>(constants) + ~at_);
  }

 private:
  explicit Place(std::int32_t at) : at_(at) {}
  std::int32_t at_ = 0;
};

// What the executor does after an instruction.
enum class Flow : std::uint8_t {
  next,
  branch,
  branch_table,
  call,
  leave,     // ret of the kernel, exit
  ret,       // of a function
  barrier,   // of a block
  converge,  // runs when the lanes it names have arrived
  trap,
};

// What a barrier does: the option of its instruction, whose operands are the barrier, the number of
// threads or 0, and for the last three the result and the predicate.
enum BarrierOption : std::uint32_t { SYNC, ARRIVE, COUNT, ALL, ANY };

// How an access to memory takes part in the synchronisation between threads.
struct Ordering {
  bool strong = false;  // volatile, relaxed, atomic: may meet another such access
  bool acquires = false;
  bool releases = false;
};

struct MemoryAccess {
  Space space = Space::generic;
  std::uint8_t element = 0;    // bytes
  std::uint8_t elements = 0;   // per lane
  std::uint8_t registers = 0;  // bytes of the registers that hold them
  bool extend_sign = false;
  bool wide_address = true;  // a register of eight bytes
  Ordering ordering;
  std::int64_t offset = 0;

  int bytes() const { return element * elements; }
};

struct Instruction {
  static constexpr int MOST_OPERANDS = 20;

  Handler execute = nullptr;
  Flow flow = Flow::next;
  bool guarded = false;
  bool guard_negated = false;
  bool negated = false;     // its predicate operand
  bool whole_warp = false;  // a converge of all lanes
  std::uint8_t operand_count = 0;
  Place guard;
  Place operands[MOST_OPERANDS];
  std::uint32_t index = 0;   // in Kernel::code
  std::uint32_t target = 0;  // of a branch or a call; the table of a branch_table
  std::uint32_t option = 0;  // what else the handler has to know
  MemoryAccess memory;
};

// What people see of an instruction.
struct Source {
  std::string text;
  int ptx_line;
  int file;
  int line;
  std::string_view kind;
};

// A register that is filled when a block starts.
enum class Special : std::uint8_t {
  tid_x,
  tid_y,
  tid_z,
  ntid_x,
  ntid_y,
  ntid_z,
  ctaid_x,
  ctaid_y,
  ctaid_z,
  nctaid_x,
  nctaid_y,
  nctaid_z,
  laneid,
  warpid,
  nwarpid,
  lanemask_eq,
  lanemask_lt,
  lanemask_le,
  lanemask_gt,
  lanemask_ge,
  smid,
  nsmid,
  gridid,
  dynamic_smem_size,
  total_smem_size,
};

struct Kernel {
  std::string name;
  std::vector<Variable> parameters;
  std::vector<std::uint32_t> parameter_offsets;
  std::uint32_t parameter_bytes = 0;
  std::uint32_t static_shared = 0;
  std::uint32_t shared_align = 16;  // of the dynamic part, which follows the static one
  std::uint32_t local_bytes = 0;    // a thread's
  std::uint32_t required_block[3] = {0, 0, 0};
  std::uint32_t maximum_block[3] = {0, 0, 0};

  // Decoded when they are first asked for.
  bool decoded = false;
  std::vector<Instruction> code;
  std::vector<Source> sources;
  std::vector<std::vector<std::uint32_t>> branch_tables;
  std::vector<std::byte> constants;
  std::size_t register_bytes = 0;
  std::vector<std::pair<Special, Place>> specials;
  // Blocks see each other's work while they run (atomics, fences), so their order matters.
  bool communicates = false;

  std::uint32_t dynamic_shared_offset() const {
    return (static_shared + shared_align - 1) / shared_align * shared_align;
  }
};

// A .global or .const variable and its memory.
struct GlobalVariable {
  std::string name;
  bool writable;
  std::size_t size;
  std::unique_ptr<std::byte[]> storage;
  std::byte* data;  // aligned
};

class Program {
 public:
  // Throws PtxError.
  explicit Program(std::string_view ptx);

  const std::string& target() const { return module_.target; }
  const std::vector<std::unique_ptr<Kernel>>& kernels() const { return kernels_; }
  const std::vector<GlobalVariable>& variables() const { return variables_; }
  std::string file_name(int file) const;

  // The kernel, decoded. Throws std::invalid_argument for an unknown name, PtxError for what the
  // executor does not have.
  const Kernel& kernel(std::string_view name);

 private:
  void place_variables();

  Module module_;
  std::vector<std::unique_ptr<Kernel>> kernels_;
  std::vector<GlobalVariable> variables_;
  std::mutex decoding_;
};

}  // namespace evsam::simt
