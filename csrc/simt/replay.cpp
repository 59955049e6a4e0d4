// Replays what the warps of one multiprocessor issue against a scoreboard.
#include "replay.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <utility>

namespace evsam::simt {
namespace {

constexpr double NEVER = std::numeric_limits<double>::infinity();

struct ReplayWarp {
  int slot;  // of the resident block
  int scheduler;
  int age = 0;           // warps that began before it
  std::size_t next = 0;  // in the trace
  double time = 0;       // before which it does not issue
  double due = 0;        // when it has the operands of its next instruction, too; or NEVER
  double copied = 0;     // when the copies of the open group are there
  std::vector<double> groups;
  std::vector<double> ready = std::vector<double>(REPLAY_REGISTERS);
};

class Replay {
 public:
  Replay(std::span<const ReplayInstruction> instructions, std::span<const std::uint32_t> trace,
         const ReplayOptions& options)
      : instructions_(instructions),
        trace_(trace),
        options_(options),
        schedulers_(options.multiprocessor.schedulers),
        arrived_(options.resident),
        done_(options.resident) {
    const int slots = std::min(options.resident, options.blocks);
    for (int number = 0; number < slots * options.warps; ++number) {
      const int scheduler = number % options.multiprocessor.schedulers;
      warps_.push_back({.slot = number / options.warps, .scheduler = scheduler});
      schedulers_[scheduler].warps.push_back(number);
    }
    for (int slot = 0; slot < slots; ++slot) begin(slot, 0);
    waiting_blocks_ = options.blocks - slots;
  }

  std::vector<double> run(const std::function<bool()>& interrupted) {
    std::uint64_t steps = 0;
    for (;;) {
      if (++steps % (1 << 20) == 0 && interrupted()) break;
      Turn first;
      for (const Scheduler& scheduler : schedulers_) {
        const Turn turn = next_of(scheduler);
        if (turn.start < first.start) first = turn;
      }
      if (first.start == NEVER) break;
      issue(warps_[first.warp], first.warp, instructions_[trace_[warps_[first.warp].next]],
            first.start);
    }
    std::sort(ends_.begin(), ends_.end());
    return ends_;
  }

 private:
  struct Scheduler {
    std::vector<int> warps;
    std::array<double, PIPES> pipes = {};
    double issued = 0;  // when it may issue again
    int last = -1;      // warp that it issued from
  };

  struct Turn {
    double start = NEVER;
    int warp = -1;
  };

  double& pipe(const ReplayWarp& warp, Pipe which) {
    return which == Pipe::memory ? memory_ : schedulers_[warp.scheduler].pipes[int(which)];
  }

  // Of the warps that are ready first the one that issued last, else the youngest.
  Turn next_of(const Scheduler& scheduler) {
    Turn turn;
    for (const int number : scheduler.warps) {
      const ReplayWarp& warp = warps_[number];
      if (warp.due == NEVER) continue;
      double start = std::max(warp.due, scheduler.issued);
      // Requests to memory queue up behind their pipe; arithmetic waits in front of its own.
      const Pipe needed = instructions_[trace_[warp.next]].pipe;
      if (needed != Pipe::none) {
        start = std::max(start, pipe(warp, needed) - (needed == Pipe::memory ? QUEUE : 0));
      }
      const bool before = turn.warp < 0 || start < turn.start;
      const bool preferred = start == turn.start && turn.warp != scheduler.last &&
                             (number == scheduler.last || warp.age > warps_[turn.warp].age);
      if (before || preferred) turn = {start, number};
    }
    return turn;
  }

  // Finds out when a warp has the operands of its next instruction.
  void settle(ReplayWarp& warp) {
    warp.due = warp.time;
    if (warp.due == NEVER) return;
    const ReplayInstruction& instruction = instructions_[trace_[warp.next]];
    for (const std::uint16_t register_number : instruction.reads) {
      warp.due = std::max(warp.due, warp.ready[register_number]);
    }
    if (instruction.effect == Effect::wait) {
      for (std::size_t i = 0; i + instruction.groups_left < warp.groups.size(); ++i) {
        warp.due = std::max(warp.due, warp.groups[i]);
      }
    }
  }

  void begin(int slot, double time) {
    for (int i = slot * options_.warps; i < (slot + 1) * options_.warps; ++i) {
      warps_[i] = {.slot = slot, .scheduler = warps_[i].scheduler, .age = begun_++, .time = time};
      settle(warps_[i]);
    }
  }

  void issue(ReplayWarp& warp, int number, const ReplayInstruction& instruction, double start) {
    const Multiprocessor& machine = options_.multiprocessor;
    schedulers_[warp.scheduler].issued = start + 1;
    schedulers_[warp.scheduler].last = number;
    warp.time = start + 1;
    double turn = start;
    if (instruction.pipe != Pipe::none) {
      double& busy = pipe(warp, instruction.pipe);
      turn = std::max(busy, start);
      busy = turn + instruction.occupied;
      // An arithmetic pipe takes new work behind the old; memory answers when all is served.
      if (instruction.pipe == Pipe::memory) turn = busy;
    }
    double result = turn + instruction.latency;
    if (instruction.bytes > 0) {
      l2_ = std::max(l2_, turn) + instruction.bytes / machine.l2_bytes_per_cycle;
      result = l2_ + instruction.latency;
    }
    for (const std::uint16_t register_number : instruction.writes) {
      warp.ready[register_number] = result;
    }
    switch (instruction.effect) {
      case Effect::copy: warp.copied = std::max(warp.copied, result); break;
      case Effect::commit: warp.groups.push_back(std::exchange(warp.copied, 0.0)); break;
      case Effect::wait:
        if (warp.groups.size() > instruction.groups_left) {
          warp.groups.erase(warp.groups.begin(), warp.groups.end() - instruction.groups_left);
        }
        break;
      case Effect::branch: warp.time = start + machine.branch_latency; break;
      default: break;
    }
    ++warp.next;
    if (instruction.effect == Effect::barrier) {
      meet(warp, number);
    } else {
      go_on(warp);
    }
  }

  void meet(ReplayWarp& warp, int number) {
    std::vector<int>& arrived = arrived_[warp.slot];
    arrived.push_back(number);
    if (int(arrived.size()) < options_.warps) {
      warp.due = NEVER;
      return;
    }
    double last = 0;
    for (const int other : arrived) last = std::max(last, warps_[other].time);
    for (const int other : std::exchange(arrived, {})) {
      warps_[other].time = last + options_.multiprocessor.barrier_latency;
      go_on(warps_[other]);
    }
  }

  void go_on(ReplayWarp& warp) {
    if (warp.next < trace_.size()) {
      settle(warp);
      return;
    }
    warp.due = NEVER;
    if (++done_[warp.slot] < options_.warps) return;
    done_[warp.slot] = 0;
    const int first = warp.slot * options_.warps;
    double end = 0;
    for (int i = first; i < first + options_.warps; ++i) end = std::max(end, warps_[i].time);
    ends_.push_back(end);
    if (waiting_blocks_ == 0) return;
    --waiting_blocks_;
    begin(warp.slot, end + options_.multiprocessor.block_latency);
  }

  static constexpr double QUEUE = 16;  // cycles of work that the memory pipe holds

  std::span<const ReplayInstruction> instructions_;
  std::span<const std::uint32_t> trace_;
  const ReplayOptions& options_;
  std::vector<ReplayWarp> warps_;
  std::vector<Scheduler> schedulers_;
  double memory_ = 0;
  double l2_ = 0;
  std::vector<std::vector<int>> arrived_;  // at the barrier, of each resident block
  std::vector<int> done_;                  // warps, of each resident block
  std::vector<double> ends_;
  int waiting_blocks_ = 0;
  int begun_ = 0;  // warps
};

}  // namespace

std::vector<double> replay(std::span<const ReplayInstruction> instructions,
                           std::span<const std::uint32_t> trace, const ReplayOptions& options,
                           const std::function<bool()>& interrupted) {
  const auto refuse = [](const char* why) { throw std::invalid_argument(why); };
  if (options.warps < 1 || options.warps > 32 || options.resident < 1 || options.blocks < 1 ||
      options.multiprocessor.schedulers < 1) {
    refuse("warps must be 1 to 32; resident, blocks and schedulers at least 1");
  }
  if (!(options.multiprocessor.l2_bytes_per_cycle > 0)) {
    refuse("l2_bytes_per_cycle must be above 0");
  }
  if (trace.empty()) refuse("trace must not be empty");
  for (const std::uint32_t index : trace) {
    if (index >= instructions.size()) refuse("trace has an index that is no instruction's");
  }
  for (const ReplayInstruction& instruction : instructions) {
    for (const auto* registers : {&instruction.reads, &instruction.writes}) {
      for (const std::uint16_t number : *registers) {
        if (number >= REPLAY_REGISTERS) refuse("a register's number is too large");
      }
    }
  }
  return Replay(instructions, trace, options).run(interrupted);
}

}  // namespace evsam::simt
