// Replays what the warps of one multiprocessor issue against a scoreboard.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

namespace evsam::simt {

// What an instruction occupies beside an issue slot. All but the last are one to a scheduler.
enum class Pipe : std::uint8_t { none, tensor, fma, alu, special, uniform, memory };
inline constexpr int PIPES = 6;  // without `memory`, which the schedulers share

// What an instruction does beside writing registers.
enum class Effect : std::uint8_t {
  none,
  branch,   // nothing issues until it is resolved
  barrier,  // waits for all warps of the block
  load,     // brings bytes from L2 to registers
  store,    // sends bytes to L2
  copy,     // brings bytes from L2 to shared memory, unnoticed until its group is waited for
  commit,   // closes a group of copies
  wait,     // for all groups but the newest few
};
inline constexpr int EFFECTS = 8;

struct ReplayInstruction {
  Pipe pipe = Pipe::none;
  Effect effect = Effect::none;
  double occupied = 0;  // cycles of the pipe
  double latency = 0;   // from the end of its turn, cycles until its results can be read
  double bytes = 0;     // to or from L2
  std::uint32_t groups_left = 0;
  std::vector<std::uint16_t> reads;  // registers
  std::vector<std::uint16_t> writes;
};

struct Multiprocessor {
  int schedulers = 4;
  double l2_bytes_per_cycle = 0;  // its share
  double branch_latency = 0;
  double barrier_latency = 0;
  double block_latency = 0;  // from the end of a block to the first instruction of the next
};

struct ReplayOptions {
  Multiprocessor multiprocessor;
  int warps = 1;     // of a block
  int resident = 1;  // blocks at once
  int blocks = 1;    // in all
};

inline constexpr int REPLAY_REGISTERS = 1024;

// Runs `blocks` blocks, all warps of which issue the instructions of `trace` (indices) in order.
// Returns when each ends, in cycles and ascending. A warp issues when its operands and the pipe are
// ready; a scheduler that has several such warps stays with the one it issued from last, else it takes
// the youngest (arXiv 2503.20481, section 5.1). Throws std::invalid_argument for indices
// that are out of range.
std::vector<double> replay(std::span<const ReplayInstruction> instructions,
                           std::span<const std::uint32_t> trace, const ReplayOptions& options,
                           const std::function<bool()>& interrupted);

}  // namespace evsam::simt
