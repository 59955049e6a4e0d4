// cp.async: copies from global to shared memory that land when their thread waits for them.
#include "request.h"

namespace evsam::simt {
namespace {

// option: 1 if there is an operand that says how many bytes to read, 2 if a predicate says to read
// none
void copy(Warp& warp, const Instruction& instruction, Mask mask) {
  AsyncCopy copy;
  copy.instruction = &instruction;
  copy.mask = mask;
  copy.bytes = instruction.memory.element;
  const bool wide = instruction.operand_count > 0 && instruction.memory.wide_address;
  for_lanes(mask, [&](int lane) {
    copy.target[lane] = (wide ? warp.lanes<std::uint64_t>(instruction.operands[0])[lane]
                              : warp.lanes<std::uint32_t>(instruction.operands[0])[lane]) +
                        std::uint64_t(instruction.memory.offset);
    copy.source[lane] = warp.lanes<std::uint64_t>(instruction.operands[1])[lane] +
                        std::uint64_t(std::int64_t(std::int32_t(instruction.target)));
    copy.source_bytes[lane] = instruction.memory.element;
  });
  if (instruction.option == 1) {
    const std::uint32_t* given = warp.lanes<std::uint32_t>(instruction.operands[2]);
    Mask too_many = 0;
    for_lanes(mask, [&](int lane) {
      copy.source_bytes[lane] = given[lane];
      too_many |= Mask(given[lane] > instruction.memory.element) << lane;
    });
    if (too_many) {
      warp.block->fault("out of bounds", warp, instruction, std::countr_zero(too_many),
                        "cp.async is told to read more bytes than it copies");
      copy.mask &= ~too_many;
    }
  } else if (instruction.option == 2) {
    Mask ignore = warp.predicate(instruction.operands[2]);
    if (instruction.negated) ignore = ~ignore;
    for_lanes(mask & ignore, [&](int lane) { copy.source_bytes[lane] = 0; });
  }
  if (copy.mask) warp.block->start_copy(warp, std::move(copy));
}

void commit(Warp& warp, const Instruction&, Mask mask) {
  for_lanes(mask, [&](int lane) { ++warp.committed[lane]; });
}

void wait_group(Warp& warp, const Instruction& instruction, Mask mask) {
  warp.block->finish_copies(warp, mask, instruction.option);
}

void wait_all(Warp& warp, const Instruction&, Mask mask) {
  warp.block->finish_all_copies(warp, mask);
}

void decode_cp(Decoding& d) {
  if (!d.take("async")) d.unsupported();
  Instruction& instruction = d.instruction();
  if (d.take("commit_group")) {
    instruction.execute = commit;
    return;
  }
  if (d.take("wait_group")) {
    const std::uint64_t left = d.immediate(0);
    instruction.option = std::uint32_t(std::min<std::uint64_t>(left, 1 << 30));
    instruction.execute = wait_group;
    return;
  }
  if (d.take("wait_all")) {
    instruction.execute = wait_all;
    return;
  }
  if (d.take("bulk") || d.take("mbarrier")) d.unsupported();
  const bool all_levels = d.take("ca");
  if (!all_levels && !d.take("cg")) d.unsupported();
  if (!d.take("shared") && !d.take("shared::cta")) d.unsupported();
  if (!d.take("global")) d.unsupported();
  const bool policy = d.take("L2::cache_hint");
  d.drop_prefixed("L2::");
  const std::uint64_t bytes = d.immediate(2);
  if (bytes != 16 && (!all_levels || (bytes != 4 && bytes != 8)))
    d.fail("cp.async cannot copy as many bytes");

  d.address(1, Space::global);
  instruction.target = std::uint32_t(std::int32_t(instruction.memory.offset));
  if (std::int64_t(std::int32_t(instruction.memory.offset)) != instruction.memory.offset ||
      !instruction.memory.wide_address) {
    d.unsupported();
  }
  const Place source = instruction.operands[0];
  instruction.operand_count = 0;
  instruction.memory.offset = 0;
  d.address(0, Space::shared);
  instruction.operands[1] = source;
  instruction.operand_count = 2;
  instruction.memory.element = std::uint8_t(bytes);
  instruction.memory.elements = 1;
  if (d.count() - policy > 3) {
    const Operand& third = d.operand(3);
    const bool predicate = third.kind == Operand::Kind::reg && d.is_predicate(third);
    instruction.option = predicate ? 2 : 1;
    d.read(third, predicate ? Type::pred : Type::u32);
  }
  d.set_kind("async copy");
  instruction.execute = copy;
}

}  // namespace

std::span<const Opcode> async_copy_opcodes() {
  static constexpr Opcode OPCODES[] = {{"cp", "control", decode_cp}};
  return OPCODES;
}

}  // namespace evsam::simt
