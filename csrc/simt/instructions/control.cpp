// Branches, the end of a kernel, barriers.
#include "elementwise.h"

namespace evsam::simt {
namespace {

void nothing(Warp&, const Instruction&, Mask) {}

void decode_bra(Decoding& d) {
  d.take("uni");
  d.instruction().flow = Flow::branch;
  d.instruction().target = d.label(0);
}

void decode_brx(Decoding& d) {
  if (!d.take("idx")) d.unsupported();
  d.take("uni");
  d.instruction().flow = Flow::branch_table;
  d.read(0, Type::u32);
  d.instruction().target = d.branch_table(1);
}

void decode_ret(Decoding& d) {
  d.take("uni");
  d.instruction().flow = d.in_kernel() ? Flow::leave : Flow::ret;
}

void decode_exit(Decoding& d) { d.instruction().flow = Flow::leave; }

void decode_trap(Decoding& d) { d.instruction().flow = Flow::trap; }

// Breakpoints, hints.
void decode_nothing(Decoding& d) {
  d.take("u32");
  d.instruction().execute = nothing;
}

void decode_barrier(Decoding& d) {
  if (d.take("warp")) {
    if (!d.take("sync")) d.unsupported();
    d.read(0, Type::b32);
    d.instruction().flow = Flow::converge;
    d.instruction().execute = nothing;
    return;
  }
  d.take("cta");
  d.take("aligned");
  Instruction& instruction = d.instruction();
  instruction.flow = Flow::barrier;
  const auto constant = [&](std::uint64_t bits) {
    Operand operand;
    operand.kind = Operand::Kind::integer;
    operand.bits = bits;
    d.read(operand, Type::u32);
  };
  if (d.take("red")) {
    instruction.option =
        d.require<std::uint32_t>("an operation", {{"popc", COUNT}, {"and", ALL}, {"or", ANY}});
    const Type type = d.type();
    if (type != (instruction.option == COUNT ? Type::u32 : Type::pred)) d.unsupported();
    d.read(1, Type::u32);
    if (d.count() == 4) {
      d.read(2, Type::u32);
    } else {
      constant(0);
    }
    d.write(0, type);
    d.read(d.count() - 1, Type::pred);
    return;
  }
  instruction.option =
      d.require<std::uint32_t>("an operation", {{"sync", SYNC}, {"arrive", ARRIVE}});
  d.read(0, Type::u32);
  if (d.count() > 1) {
    d.read(1, Type::u32);
  } else if (instruction.option == ARRIVE) {
    d.fail("bar.arrive needs a number of threads");
  } else {
    constant(0);
  }
}

}  // namespace

std::span<const Opcode> control_opcodes() {
  static constexpr Opcode OPCODES[] = {
      {"bra", "control", decode_bra},           {"brx", "control", decode_brx},
      {"ret", "control", decode_ret},           {"exit", "control", decode_exit},
      {"trap", "control", decode_trap},         {"brkpt", "control", decode_nothing},
      {"nanosleep", "control", decode_nothing}, {"pmevent", "control", decode_nothing},
      {"bar", "barrier", decode_barrier},       {"barrier", "barrier", decode_barrier},
  };
  return OPCODES;
}

}  // namespace evsam::simt
