// Runs the warps of a block: which lanes run, where they wait for each other, and when they go on.
//
// Of lanes that have gone different ways, those with the lowest position in the text run first;
// they meet the others where their positions are the same. Lanes that wait at an instruction of the
// warp (shfl.sync, mma.sync) or at a barrier give way to the others, and so do lanes that keep
// running while others of their warp are ready, so that one lane may wait for what another does.
#include "block.h"

#include <algorithm>
#include <cstring>

#include "launch.h"

namespace evsam::simt {
namespace {

constexpr std::uint32_t NOWHERE = ~std::uint32_t(0);
constexpr int QUANTUM = 8192;  // steps before another warp has its turn

}  // namespace

void Warp::tick() {
  if (!touched) return;
  known[index] = clock;
  ++clock;
  touched = false;
}

Block::Block(Launch& launch)
    : counters(launch.kernel.code.size()),
      launch_(launch),
      kernel_(launch.kernel),
      checked_(launch.options.check),
      threads_(launch.options.block.x * launch.options.block.y * launch.options.block.z),
      shared_bytes_(launch.options.dynamic_shared
                        ? kernel_.dynamic_shared_offset() + launch.options.dynamic_shared
                        : kernel_.static_shared),
      warps_((threads_ + LANES - 1) / LANES),
      registers_(warps_.size() * kernel_.register_bytes),
      shared_(shared_bytes_),
      local_(warps_.size() * LANES * kernel_.local_bytes),
      local_written_(checked_ ? local_.size() : 0) {
  if (checked_) {
    for (int i = 0; i < launch.buffers.count(); ++i) {
      global_shadow.push_back(std::make_unique<BlockShadow>());
    }
  }
}

const std::byte* Block::parameters() const { return launch_.options.parameters.data(); }

void Block::start(std::uint32_t index) {
  const Index3 grid = launch_.options.grid;
  index_ = index;
  position_ = {index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y};
  steps_ = 0;
  aborted_ = false;
  barriers_ = {};
  needs.clear();
  std::fill(registers_.begin(), registers_.end(), std::byte(0));
  // Values that stand out: NaN in every format.
  std::fill(shared_.begin(), shared_.end(), std::byte(0xff));
  std::fill(local_.begin(), local_.end(), std::byte(0xff));
  std::fill(local_written_.begin(), local_written_.end(), 0);
  if (checked_) {
    shared_shadow_.start(shared_bytes_);
    shared_releases_.clear();
    if (kernel_.communicates) knowledge_ = launch_.releases.add_block();
    for (int i = 0; i < launch_.buffers.count(); ++i) {
      global_shadow[i]->start(launch_.buffers[i].size);
    }
  }
  for (std::size_t i = 0; i < warps_.size(); ++i) {
    Warp& warp = warps_[i];
    warp = Warp();
    warp.block = this;
    warp.index = int(i);
    warp.registers = registers_.data() + i * kernel_.register_bytes;
    warp.constants = kernel_.constants.data();
    warp.local = local_.data() + i * LANES * kernel_.local_bytes;
    if (checked_) warp.local_written = local_written_.data() + i * LANES * kernel_.local_bytes;
    warp.existing = warp.alive = first_lanes(int(threads_ - i * LANES));
    fill_specials(warp);
  }
}

void Block::fill_specials(Warp& warp) {
  const Index3 size = launch_.options.block;
  const Index3 grid = launch_.options.grid;
  for (const auto& [special, place] : kernel_.specials) {
    std::uint32_t* values = warp.lanes<std::uint32_t>(place);
    for (std::uint32_t lane = 0; lane < LANES; ++lane) {
      const std::uint32_t thread = warp.thread(int(lane));
      const std::uint32_t bit = std::uint32_t(1) << lane;
      std::uint32_t value = 0;
      switch (special) {
        case Special::tid_x:
          value = thread % size.x;
          break;
        case Special::tid_y:
          value = thread / size.x % size.y;
          break;
        case Special::tid_z:
          value = thread / size.x / size.y;
          break;
        case Special::ntid_x:
          value = size.x;
          break;
        case Special::ntid_y:
          value = size.y;
          break;
        case Special::ntid_z:
          value = size.z;
          break;
        case Special::ctaid_x:
          value = position_.x;
          break;
        case Special::ctaid_y:
          value = position_.y;
          break;
        case Special::ctaid_z:
          value = position_.z;
          break;
        case Special::nctaid_x:
          value = grid.x;
          break;
        case Special::nctaid_y:
          value = grid.y;
          break;
        case Special::nctaid_z:
          value = grid.z;
          break;
        case Special::laneid:
          value = lane;
          break;
        case Special::warpid:
          value = std::uint32_t(warp.index);
          break;
        case Special::nwarpid:
          value = std::uint32_t(warps_.size());
          break;
        case Special::lanemask_eq:
          value = bit;
          break;
        case Special::lanemask_lt:
          value = bit - 1;
          break;
        case Special::lanemask_le:
          value = bit | (bit - 1);
          break;
        case Special::lanemask_gt:
          value = ~(bit | (bit - 1));
          break;
        case Special::lanemask_ge:
          value = ~(bit - 1);
          break;
        case Special::smid:
          value = 0;
          break;
        case Special::nsmid:
          value = 1;
          break;
        case Special::gridid:
          value = 0;
          break;
        case Special::dynamic_smem_size:
          value = launch_.options.dynamic_shared;
          break;
        case Special::total_smem_size:
          value = shared_bytes_;
          break;
      }
      values[lane] = value;
    }
  }
}

void Block::run(std::uint32_t index) {
  start(index);
  for (bool running = true; running && !aborted_ && !launch_.stop;) {
    running = false;
    bool progress = false;
    for (Warp& warp : warps_) {
      if (!warp.alive || warp.arrived) continue;
      running = true;
      run_warp(warp);
      progress = true;
      if (aborted_ || launch_.stop) return;
    }
    running |= complete_barriers();
    if (running && progress) continue;
    if (running) continue;
    const auto stuck = std::find_if(warps_.begin(), warps_.end(),
                                    [](const Warp& warp) { return warp.alive != 0; });
    if (stuck != warps_.end()) {
      abort("deadlock", *stuck, stuck->arrived_pc,
            "every thread that is left waits at a barrier that is not complete: barrier " +
                std::to_string(stuck->barrier));
    }
  }
}

void Block::abort(std::string_view kind, const Warp& warp, std::uint32_t pc,
                  const std::string& message) {
  const int lane = warp.alive ? std::countr_zero(warp.alive) : 0;
  fault(kind, warp, kernel_.code[std::min<std::size_t>(pc, kernel_.code.size() - 1)], lane,
        message);
  aborted_ = true;
}

void Block::fault(std::string_view kind, const Warp& warp, const Instruction& instruction, int lane,
                  const std::string& message) {
  faults.add(kind, instruction.index, "", [&] {
    Fault fault;
    fault.message = message;
    fault.block = index_;
    fault.thread = warp.thread(lane);
    return fault;
  });
}

// ---- lanes

// Chooses the lanes that run next; false where none can.
bool Block::select(Warp& warp) {
  for (;;) {
    const Mask ready = warp.alive & ~warp.converging & ~warp.at_barrier;
    if (ready) {
      std::uint32_t pc = warp.lane_pc[std::countr_zero(ready)];
      for (Mask rest = ready; rest; rest &= rest - 1) {
        const std::uint32_t other = warp.lane_pc[std::countr_zero(rest)];
        pc = warp.prefer_last ? std::max(pc, other) : std::min(pc, other);
      }
      warp.active = 0;
      for (Mask rest = ready; rest; rest &= rest - 1) {
        const int lane = std::countr_zero(rest);
        if (warp.lane_pc[lane] == pc) warp.active |= Mask(1) << lane;
      }
      warp.pc = pc;
      return true;
    }
    warp.active = 0;
    if (warp.converging) {
      release_converging(warp);
    } else {
      if (warp.alive) arrive(warp);
      return false;
    }
  }
}

// The lanes that a converging instruction waits for.
Mask Block::wanted(const Warp& warp, const Instruction& instruction, Mask mask) const {
  if (instruction.whole_warp) return warp.alive;
  const Place members = instruction.operands[instruction.operand_count - 1];
  return warp.lanes<Mask>(members)[std::countr_zero(mask)] & warp.alive;
}

// All lanes that are left wait: lets those go on for whom nobody is missing any more, or, after a
// complaint, the first.
void Block::release_converging(Warp& warp) {
  Mask chosen = 0;
  bool complete = false;
  for (Mask rest = warp.converging; rest && !complete;) {
    const std::uint32_t pc = warp.lane_pc[std::countr_zero(rest)];
    Mask group = 0;
    for (Mask lanes = rest; lanes; lanes &= lanes - 1) {
      const int lane = std::countr_zero(lanes);
      if (warp.lane_pc[lane] == pc) group |= Mask(1) << lane;
    }
    rest &= ~group;
    complete = !(wanted(warp, kernel_.code[pc], group) & ~group);
    if (complete || !chosen) chosen = group;
  }
  const int first = std::countr_zero(chosen);
  const std::uint32_t pc = warp.lane_pc[first];
  const Instruction& instruction = kernel_.code[pc];
  if (!complete) {
    const Mask missing = wanted(warp, instruction, chosen) & ~chosen;
    fault("divergent synchronisation", warp, instruction, first,
          "the instruction waits for lane " + std::to_string(std::countr_zero(missing)) +
              ", which waits elsewhere");
  }
  converge(warp, instruction, chosen);
  warp.converging &= ~chosen;
  for (Mask lanes = chosen; lanes; lanes &= lanes - 1) {
    warp.lane_pc[std::countr_zero(lanes)] = pc + 1;
  }
}

void Block::converge(Warp& warp, const Instruction& instruction, Mask mask) {
  warp.tick();
  instruction.execute(warp, instruction, mask);
  warp.tick();
}

void Block::run_warp(Warp& warp) {
  const Instruction* code = kernel_.code.data();
  const std::uint64_t limit = launch_.options.step_limit;
  std::uint64_t budget = std::min<std::uint64_t>(QUANTUM, limit - std::min(limit, steps_) + 1);
  const std::uint64_t given = budget;
  // Where other lanes of the warp wait to be met; NOWHERE if all that are ready run.
  std::uint32_t meeting = NOWHERE;
  bool diverged = false;
  const auto reselect = [&](std::uint32_t pc) {
    for (Mask rest = warp.active; rest; rest &= rest - 1) {
      warp.lane_pc[std::countr_zero(rest)] = pc;
    }
    if (!select(warp)) return false;
    const Mask others = warp.alive & ~warp.converging & ~warp.at_barrier & ~warp.active;
    meeting = NOWHERE;
    diverged = others != 0;
    for (Mask rest = others; rest; rest &= rest - 1) {
      const std::uint32_t pc = warp.lane_pc[std::countr_zero(rest)];
      if (pc > warp.pc) meeting = std::min(meeting, pc);
    }
    return true;
  };
  warp.active = 0;
  bool running = reselect(0);
  for (; running && budget > 0; --budget) {
    if (warp.pc == meeting) {
      reselect(warp.pc);
    }
    const Instruction& instruction = code[warp.pc];
    Mask mask = warp.active;
    if (instruction.guarded) {
      const Mask guard = warp.predicate(instruction.guard);
      mask &= instruction.guard_negated ? ~guard : guard;
    }
    Counters& counted = counters[warp.pc];
    ++counted.warp_executions;
    counted.lane_executions += std::uint64_t(std::popcount(mask));
    const std::uint32_t next = warp.pc + 1;
    switch (instruction.flow) {
      case Flow::next:
        if (mask) instruction.execute(warp, instruction, mask);
        warp.pc = next;
        break;
      case Flow::branch:
      case Flow::call:
        if (instruction.flow == Flow::call && mask) {
          std::uint32_t* back = warp.lanes<std::uint32_t>(instruction.operands[0]);
          for_lanes(mask, [&](int lane) { back[lane] = next; });
        }
        if (!mask) {
          warp.pc = next;
        } else if (mask == warp.active && !diverged) {
          warp.pc = instruction.target;
        } else {
          const Mask staying = warp.active & ~mask;
          for (Mask rest = mask; rest; rest &= rest - 1) {
            warp.lane_pc[std::countr_zero(rest)] = instruction.target;
          }
          warp.active = staying;
          running = reselect(next);
        }
        break;
      case Flow::branch_table: {
        const auto& table = kernel_.branch_tables[instruction.target];
        const std::uint32_t* choice = warp.lanes<std::uint32_t>(instruction.operands[0]);
        for (Mask rest = mask; rest; rest &= rest - 1) {
          const int lane = std::countr_zero(rest);
          if (choice[lane] >= table.size()) {
            abort("wild branch", warp, warp.pc, "the index is outside of its table");
            return;
          }
          warp.lane_pc[lane] = table[choice[lane]];
        }
        warp.active &= ~mask;
        running = reselect(next);
        break;
      }
      case Flow::ret: {
        const std::uint32_t* back = warp.lanes<std::uint32_t>(instruction.operands[0]);
        for (Mask rest = mask; rest; rest &= rest - 1) {
          const int lane = std::countr_zero(rest);
          warp.lane_pc[lane] = back[lane];
        }
        warp.active &= ~mask;
        running = reselect(next);
        break;
      }
      case Flow::leave:
        warp.alive &= ~mask;
        warp.active &= ~mask;
        running = reselect(next);
        break;
      case Flow::barrier:
        if (mask && instruction.option == ARRIVE) {
          step_arrive(warp, instruction, mask);
        } else if (mask) {
          for (Mask rest = mask; rest; rest &= rest - 1) {
            warp.lane_pc[std::countr_zero(rest)] = warp.pc;
          }
          warp.at_barrier |= mask;
          warp.active &= ~mask;
          running = reselect(next);
          break;
        }
        warp.pc = next;
        break;
      case Flow::converge: {
        if (!mask) {
          warp.pc = next;
          break;
        }
        Mask here = mask;
        for (Mask rest = warp.converging; rest; rest &= rest - 1) {
          const int lane = std::countr_zero(rest);
          if (warp.lane_pc[lane] == warp.pc) here |= Mask(1) << lane;
        }
        if (!(wanted(warp, instruction, mask) & ~here)) {
          converge(warp, instruction, here);
          warp.converging &= ~here;
          warp.active |= here;
          warp.pc = next;
        } else {
          for (Mask rest = mask; rest; rest &= rest - 1) {
            warp.lane_pc[std::countr_zero(rest)] = warp.pc;
          }
          warp.converging |= mask;
          warp.active &= ~mask;
          running = reselect(next);
        }
        break;
      }
      case Flow::trap:
        if (!mask) {
          warp.pc = next;
          break;
        }
        abort("trap", warp, warp.pc,
              "the kernel stopped itself: a trap, or an assertion that failed");
        return;
    }
  }
  steps_ += given - budget;
  if (running) {
    reselect_later(warp);
    if (steps_ > limit) {
      abort("step limit", warp, warp.pc,
            "the block has run " + std::to_string(limit) +
                " warp instructions: an infinite loop, or step_limit is too low");
    }
  }
}

// A turn is over: keeps where the lanes are, and lets those that were behind go first in the next.
void Block::reselect_later(Warp& warp) {
  for (Mask rest = warp.active; rest; rest &= rest - 1) {
    warp.lane_pc[std::countr_zero(rest)] = warp.pc;
  }
  const Mask ready = warp.alive & ~warp.converging & ~warp.at_barrier;
  warp.prefer_last = ready != warp.active && !warp.prefer_last;
}

// ---- barriers

// All lanes of the warp that are left wait at a barrier.
void Block::arrive(Warp& warp) {
  const int first = std::countr_zero(warp.alive);
  std::uint32_t pc = warp.lane_pc[first];
  for (Mask rest = warp.alive; rest; rest &= rest - 1) {
    pc = std::min(pc, warp.lane_pc[std::countr_zero(rest)]);
  }
  const Instruction& instruction = kernel_.code[pc];
  const Mask* vote =
      instruction.option >= COUNT ? &warp.predicate(instruction.operands[3]) : nullptr;
  const int here = [&] {
    for (Mask rest = warp.alive;; rest &= rest - 1) {
      if (warp.lane_pc[std::countr_zero(rest)] == pc) return std::countr_zero(rest);
    }
  }();
  for (Mask rest = warp.alive; rest; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    if (warp.lane_pc[lane] != pc) {
      fault("divergent barrier", warp, instruction, here,
            "lanes of one warp wait at different barriers: thread " +
                std::to_string(warp.thread(lane)) + " waits in PTX line " +
                std::to_string(kernel_.sources[warp.lane_pc[lane]].ptx_line));
      break;
    }
  }
  warp.arrived = true;
  warp.arrived_pc = pc;
  warp.barrier = warp.lanes<std::uint32_t>(instruction.operands[0])[here] & 15;
  warp.barrier_threads = warp.lanes<std::uint32_t>(instruction.operands[1])[here];
  warp.barrier_vote = vote ? (instruction.negated ? ~*vote : *vote) & warp.alive : 0;
}

void Block::step_arrive(Warp& warp, const Instruction& instruction, Mask mask) {
  const int lane = std::countr_zero(mask);
  Barrier& barrier = barriers_[warp.lanes<std::uint32_t>(instruction.operands[0])[lane] & 15];
  barrier.arrivals += LANES;
  for (std::size_t i = 0; i < barrier.clocks.size(); ++i) {
    barrier.clocks[i] = std::max(barrier.clocks[i], warp.known[i]);
  }
  barrier.clocks[warp.index] = warp.clock;
  warp.touched = true;
  warp.tick();
}

// Lets the warps go on whose barrier is complete; false where there are none.
bool Block::complete_barriers() {
  bool any = false;
  for (std::uint32_t id = 0; id < barriers_.size(); ++id) {
    std::uint32_t waiting = barriers_[id].arrivals;
    std::uint32_t expected = 0;
    bool all = true;
    const Warp* someone = nullptr;
    Mask missing = 0;
    for (const Warp& warp : warps_) {
      if (warp.arrived && warp.barrier == id) {
        someone = &warp;
        waiting += LANES;
        expected = std::max(expected, warp.barrier_threads);
        missing |= warp.existing & ~warp.alive;
      } else {
        all &= !warp.alive;
        missing |= warp.alive ? 0 : warp.existing;
      }
    }
    if (!someone || !(expected ? waiting >= expected : all)) continue;
    if (!expected && missing) {
      const Instruction& instruction = kernel_.code[someone->arrived_pc];
      fault("divergent barrier", *someone, instruction, std::countr_zero(someone->alive),
            "threads of the block have ended and never reach the barrier");
    }
    complete(id);
    any = true;
  }
  return any;
}

void Block::complete(std::uint32_t id) {
  Clocks clocks = barriers_[id].clocks;
  Clocks strong{};
  std::uint32_t votes = 0;
  std::uint32_t voters = 0;
  for (const Warp& warp : warps_) {
    if (!warp.arrived || warp.barrier != id) continue;
    for (std::size_t i = 0; i < clocks.size(); ++i) {
      clocks[i] = std::max(clocks[i], warp.known[i]);
      strong[i] = std::max(strong[i], warp.known_strong[i]);
    }
    clocks[warp.index] = warp.clock;
    votes += std::uint32_t(std::popcount(warp.barrier_vote));
    voters += std::uint32_t(std::popcount(warp.alive));
  }
  barriers_[id] = {};
  for (Warp& warp : warps_) {
    if (!warp.arrived || warp.barrier != id) continue;
    const Instruction& instruction = kernel_.code[warp.arrived_pc];
    const Place result = instruction.operands[2];
    if (instruction.option == COUNT) {
      std::uint32_t* values = warp.lanes<std::uint32_t>(result);
      for_lanes(warp.alive, [&](int lane) { values[lane] = votes; });
    } else if (instruction.option == ALL || instruction.option == ANY) {
      const bool yes = instruction.option == ALL ? votes == voters : votes > 0;
      warp.predicate(result) = yes ? ALL_LANES : 0;
    }
    warp.known = clocks;
    warp.known_strong = strong;
    warp.known[warp.index] = warp.clock;
    ++warp.clock;
    warp.touched = false;
    for (Mask rest = warp.alive; rest; rest &= rest - 1) {
      ++warp.lane_pc[std::countr_zero(rest)];
    }
    warp.at_barrier = 0;
    warp.arrived = false;
  }
}

}  // namespace evsam::simt
