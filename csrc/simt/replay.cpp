// Replays what the warps of one multiprocessor issue against a scoreboard.
#include "replay.h"

#include <algorithm>
#include <queue>
#include <stdexcept>
#include <utility>

namespace evsam::simt {
namespace {

struct ReplayWarp {
  int slot;  // of the resident block
  int scheduler;
  std::size_t next = 0;  // in the trace
  double time = 0;       // before which it does not issue
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
        issued_(options.multiprocessor.schedulers),
        pipes_(options.multiprocessor.schedulers),
        arrived_(options.resident),
        done_(options.resident) {
    const int slots = std::min(options.resident, options.blocks);
    for (int slot = 0; slot < slots; ++slot) {
      for (int warp = 0; warp < options.warps; ++warp) {
        const int number = slot * options.warps + warp;
        warps_.push_back({.slot = slot, .scheduler = number % options.multiprocessor.schedulers});
        queue_.emplace(0.0, number);
      }
    }
    waiting_blocks_ = options.blocks - slots;
  }

  std::vector<double> run(const std::function<bool()>& interrupted) {
    std::uint64_t steps = 0;
    while (!queue_.empty()) {
      if (++steps % (1 << 20) == 0 && interrupted()) break;
      const auto [due, number] = queue_.top();
      queue_.pop();
      ReplayWarp& warp = warps_[number];
      const ReplayInstruction& instruction = instructions_[trace_[warp.next]];
      const double start = earliest(warp, instruction);
      if (start > due && !queue_.empty() && queue_.top().first < start) {
        queue_.emplace(start, number);
        continue;
      }
      issue(warp, number, instruction, start);
    }
    std::sort(ends_.begin(), ends_.end());
    return ends_;
  }

 private:
  double& pipe(const ReplayWarp& warp, Pipe which) {
    return which == Pipe::memory ? memory_ : pipes_[warp.scheduler][int(which)];
  }

  double earliest(ReplayWarp& warp, const ReplayInstruction& instruction) {
    double start = std::max(warp.time, issued_[warp.scheduler]);
    for (const std::uint16_t register_number : instruction.reads) {
      start = std::max(start, warp.ready[register_number]);
    }
    // Requests to memory queue up behind their pipe; arithmetic waits in front of its own.
    const double queue = instruction.pipe == Pipe::memory ? QUEUE : 0;
    if (instruction.pipe != Pipe::none) {
      start = std::max(start, pipe(warp, instruction.pipe) - queue);
    }
    if (instruction.effect == Effect::wait) {
      for (std::size_t i = 0; i + instruction.groups_left < warp.groups.size(); ++i) {
        start = std::max(start, warp.groups[i]);
      }
    }
    return start;
  }

  void issue(ReplayWarp& warp, int number, const ReplayInstruction& instruction, double start) {
    const Multiprocessor& machine = options_.multiprocessor;
    issued_[warp.scheduler] = start + 1;
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
      go_on(warp, number);
    }
  }

  void meet(ReplayWarp& warp, int number) {
    std::vector<int>& arrived = arrived_[warp.slot];
    arrived.push_back(number);
    if (int(arrived.size()) < options_.warps) return;
    double last = 0;
    for (const int other : arrived) last = std::max(last, warps_[other].time);
    for (const int other : std::exchange(arrived, {})) {
      warps_[other].time = last + options_.multiprocessor.barrier_latency;
      go_on(warps_[other], other);
    }
  }

  void go_on(ReplayWarp& warp, int number) {
    if (warp.next < trace_.size()) {
      queue_.emplace(warp.time, number);
      return;
    }
    if (++done_[warp.slot] < options_.warps) return;
    done_[warp.slot] = 0;
    const int first = warp.slot * options_.warps;
    double end = 0;
    for (int i = first; i < first + options_.warps; ++i) end = std::max(end, warps_[i].time);
    ends_.push_back(end);
    if (waiting_blocks_ == 0) return;
    --waiting_blocks_;
    for (int i = first; i < first + options_.warps; ++i) {
      warps_[i] = {.slot = warp.slot, .scheduler = warps_[i].scheduler};
      warps_[i].time = end + options_.multiprocessor.block_latency;
      queue_.emplace(warps_[i].time, i);
    }
  }

  static constexpr double QUEUE = 16;  // cycles of work that the memory pipe holds

  using Due = std::pair<double, int>;

  std::span<const ReplayInstruction> instructions_;
  std::span<const std::uint32_t> trace_;
  const ReplayOptions& options_;
  std::vector<ReplayWarp> warps_;
  std::priority_queue<Due, std::vector<Due>, std::greater<>> queue_;
  std::vector<double> issued_;  // of each scheduler: when it may issue again
  std::vector<std::array<double, PIPES>> pipes_;
  double memory_ = 0;
  double l2_ = 0;
  std::vector<std::vector<int>> arrived_;  // at the barrier, of each resident block
  std::vector<int> done_;                  // warps, of each resident block
  std::vector<double> ends_;
  int waiting_blocks_ = 0;
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
  if (!(options.multiprocessor.l2_bytes_per_cycle > 0)) refuse("l2_bytes_per_cycle must be above 0");
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
