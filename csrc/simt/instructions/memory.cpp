// ld, st and what goes with them.
#include "request.h"

namespace evsam::simt {

// Copies `option` bytes of local memory, from `target` to `memory.offset`: what a call passes.
void copy_local(Warp& warp, const Instruction& instruction, Mask mask) {
  const std::size_t size = warp.block->kernel().local_bytes;
  for_lanes(mask, [&](int lane) {
    std::byte* frame = warp.local + lane * size;
    std::memmove(frame + instruction.memory.offset, frame + instruction.target, instruction.option);
    if (warp.local_written == nullptr) return;
    std::uint8_t* written = warp.local_written + lane * size;
    std::memmove(written + instruction.memory.offset, written + instruction.target,
                 instruction.option);
  });
}

namespace {

void widen(std::uint64_t& bits, const MemoryAccess& memory) {
  if (!memory.extend_sign) return;
  const int unused = 64 - 8 * memory.element;
  bits = std::uint64_t(std::int64_t(bits << unused) >> unused);
}

template <int bytes>
void load_same(Warp& warp, const Instruction& instruction, Mask mask, std::byte* const* data) {
  for (int i = 0; i < instruction.memory.elements; ++i) {
    std::byte* to = warp.lanes<std::byte>(instruction.operands[i]);
    for_lanes(mask,
              [&](int lane) { std::memcpy(to + lane * bytes, data[lane] + i * bytes, bytes); });
  }
}

void load(Warp& warp, const Instruction& instruction, Mask mask) {
  const MemoryAccess& memory = instruction.memory;
  Request request;
  request.instruction = &instruction;
  request.mask = mask;
  request.intent = Request::Intent::read;
  request.bytes = memory.bytes();
  request.ordering = memory.ordering;
  read_addresses(warp, instruction, instruction.operands[memory.elements], mask, request.address);
  const Mask allowed = warp.block->access(warp, request);
  if (memory.element == memory.registers) {
    switch (memory.element) {
      case 2:
        load_same<2>(warp, instruction, allowed, request.data);
        break;
      case 4:
        load_same<4>(warp, instruction, allowed, request.data);
        break;
      default:
        load_same<8>(warp, instruction, allowed, request.data);
    }
  } else {
    for (int i = 0; i < memory.elements; ++i) {
      std::byte* to = warp.lanes<std::byte>(instruction.operands[i]);
      for_lanes(allowed, [&](int lane) {
        std::uint64_t bits = 0;
        std::memcpy(&bits, request.data[lane] + i * memory.element, memory.element);
        widen(bits, memory);
        std::memcpy(to + lane * memory.registers, &bits, memory.registers);
      });
    }
  }
  // What could not be read is zero.
  for (int i = 0; i < memory.elements && allowed != mask; ++i) {
    std::byte* to = warp.lanes<std::byte>(instruction.operands[i]);
    for_lanes(mask & ~allowed,
              [&](int lane) { std::memset(to + lane * memory.registers, 0, memory.registers); });
  }
}

void load_parameter(Warp& warp, const Instruction& instruction, Mask mask) {
  const MemoryAccess& memory = instruction.memory;
  const std::uint64_t at = warp.lanes<std::uint64_t>(instruction.operands[memory.elements])[0];
  for (int i = 0; i < memory.elements; ++i) {
    std::byte* to = warp.lanes<std::byte>(instruction.operands[i]);
    std::uint64_t bits = 0;
    std::memcpy(&bits, warp.block->parameters() + at + i * memory.element, memory.element);
    widen(bits, memory);
    for_lanes(mask, [&](int lane) {
      std::memcpy(to + lane * memory.registers, &bits, memory.registers);
    });
  }
}

void store(Warp& warp, const Instruction& instruction, Mask mask) {
  const MemoryAccess& memory = instruction.memory;
  constexpr int MOST_BYTES = 32;
  std::byte values[LANES][MOST_BYTES];
  Request request;
  request.instruction = &instruction;
  request.mask = mask;
  request.intent = Request::Intent::write;
  request.bytes = memory.bytes();
  request.ordering = memory.ordering;
  read_addresses(warp, instruction, instruction.operands[0], mask, request.address);
  for (int i = 0; i < memory.elements; ++i) {
    const std::byte* from = warp.lanes<std::byte>(instruction.operands[i + 1]);
    for_lanes(mask, [&](int lane) {
      std::memcpy(values[lane] + i * memory.element, from + lane * memory.registers,
                  memory.element);
    });
  }
  for (int lane = 0; lane < LANES; ++lane) request.written[lane] = values[lane];
  warp.block->access(warp, request);
}

// Registers may be wider than what they hold in memory; those of a vector are of one size.
void take_registers(Decoding& d, const Operand& value, Type type, bool write) {
  MemoryAccess& memory = d.instruction().memory;
  const auto& list = value.children;
  const bool vector = value.kind == Operand::Kind::vector;
  if (vector ? int(list.size()) != memory.elements : memory.elements != 1) {
    d.fail("an operand needs " + std::to_string(memory.elements) + " registers");
  }
  int bytes = 0;
  for (int i = 0; i < memory.elements; ++i) {
    bytes = std::max(bytes, d.register_bytes(vector ? list[i] : value));
  }
  if (bytes == 0) bytes = std::max(bytes_of(type), 2);
  if (bytes < bytes_of(type)) d.fail("a register is narrower than its type");
  memory.registers = std::uint8_t(bytes);
  for (int i = 0; i < memory.elements; ++i) {
    const Operand& one = vector ? list[i] : value;
    const bool is_register = one.kind == Operand::Kind::reg;
    if (is_register && d.register_bytes(one) != bytes) d.fail("registers of different sizes");
    if (is_register) {
      d.read_register(one, bytes);
    } else if (write) {
      d.write(one, type);
    } else {
      d.read(one, bytes == 2                     ? Type::b16
                  : bytes == 4 && is_float(type) ? Type::f32
                  : bytes == 4                   ? Type::b32
                  : is_float(type)               ? Type::f64
                                                 : Type::b64);
    }
  }
}

Type take_access(Decoding& d, bool store, Space& space) {
  Instruction& instruction = d.instruction();
  MemoryAccess& memory = instruction.memory;
  memory.ordering = take_ordering(d, {});
  space = take_space(d).value_or(Space::generic);
  drop_cache_hints(d);
  memory.elements = std::uint8_t(take_vector(d));
  const Type type = d.type();
  if (bytes_of(type) == 0 || memory.elements * bytes_of(type) > 32) d.unsupported();
  memory.element = std::uint8_t(bytes_of(type));
  memory.extend_sign = is_signed(type);
  d.set_kind(access_kind(space, store));
  const bool visible = space == Space::global || space == Space::generic;
  if (memory.ordering.strong && visible) d.communicates();
  return type;
}

void decode_ld(Decoding& d) {
  Space space;
  const Type type = take_access(d, false, space);
  take_registers(d, d.operand(0), type, true);
  d.address(1, space);
  Instruction& instruction = d.instruction();
  instruction.execute = load;
  const Operand& base = d.operand(1).children[0];
  if (instruction.memory.space == Space::param && base.kind == Operand::Kind::symbol) {
    if (*d.symbol_address(base, space) + instruction.memory.bytes() > d.parameter_bytes()) {
      d.fail("the address is outside of the parameters");
    }
    instruction.execute = load_parameter;
  }
}

void decode_st(Decoding& d) {
  Space space;
  const Type type = take_access(d, true, space);
  if (space == Space::constant) d.unsupported();
  d.address(0, space);
  if (d.instruction().memory.space == Space::param) d.unsupported();
  take_registers(d, d.operand(1), type, false);
  d.instruction().execute = store;
}

void nothing(Warp&, const Instruction&, Mask) {}

// Hints about caches.
void decode_hint(Decoding& d) {
  take_space(d);
  for (const char* level : {"L1", "L2", "L2::evict_last", "L2::evict_normal", "tensormap"}) {
    if (d.take(level) && std::string_view(level) == "tensormap") d.unsupported();
  }
  d.take("discard");
  d.take("L2::128B");
  d.instruction().execute = nothing;
}

void decode_createpolicy(Decoding& d) {
  // A policy only says how long lines stay in the cache.
  d.take("fractional");
  d.drop_prefixed("L2::");
  d.write(0, d.type());
  d.instruction().execute = nothing;
}

// isspacep
void in_window(Warp& warp, const Instruction& instruction, Mask mask) {
  const std::uint64_t* address = warp.lanes<std::uint64_t>(instruction.operands[1]);
  Mask& to = warp.predicate(instruction.operands[0]);
  Mask found = 0;
  for_lanes(mask,
            [&](int lane) { found |= Mask((address[lane] >> 56) == instruction.option) << lane; });
  to = (to & ~mask) | found;
}

void decode_isspacep(Decoding& d) {
  const auto window = d.require<std::uint64_t>("a space", {{"global", 0},
                                                           {"shared", SHARED_WINDOW},
                                                           {"shared::cta", SHARED_WINDOW},
                                                           {"local", LOCAL_WINDOW},
                                                           {"param", PARAM_WINDOW}});
  d.write(0, Type::pred);
  d.read(1, Type::u64);
  d.instruction().option = std::uint32_t(window >> 56);
  d.instruction().execute = in_window;
}

// membar, fence
void fence(Warp& warp, const Instruction& instruction, Mask) {
  warp.block->fence(warp, instruction.option != 0);
}

void decode_fence(Decoding& d) {
  for (const char* meaning : {"sc", "acq_rel", "acquire", "release"}) d.take(meaning);
  const bool block_only = d.take("cta");
  const bool wider = d.take("gl") || d.take("sys") || d.take("gpu") || d.take("cluster");
  if (!block_only && !wider) d.unsupported();  // fence.proxy and the like
  d.instruction().option = wider;
  d.instruction().execute = fence;
}

}  // namespace

std::span<const Opcode> memory_opcodes() {
  static constexpr Opcode OPCODES[] = {
      {"ld", "generic load", decode_ld},        {"ldu", "global load", decode_ld},
      {"st", "generic store", decode_st},       {"prefetch", "control", decode_hint},
      {"prefetchu", "control", decode_hint},    {"applypriority", "control", decode_hint},
      {"discard", "control", decode_hint},      {"createpolicy", "control", decode_createpolicy},
      {"isspacep", "compare", decode_isspacep}, {"membar", "fence", decode_fence},
      {"fence", "fence", decode_fence},
  };
  return OPCODES;
}

}  // namespace evsam::simt
