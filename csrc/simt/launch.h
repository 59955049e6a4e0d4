// Runs the blocks of a grid.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "counters.h"
#include "fault.h"
#include "memory.h"
#include "program.h"
#include "shadow.h"

namespace evsam::simt {

struct LaunchOptions {
  Index3 grid;
  Index3 block;
  std::uint32_t dynamic_shared = 0;
  std::vector<std::byte> parameters;
  std::vector<Buffer> buffers;
  bool check = true;
  int threads = 1;
  std::uint64_t step_limit = 0;  // warp instructions of a block
  std::vector<std::uint32_t> sample;  // linear indices of the blocks to run, in order; empty for all
};

struct Traffic {
  std::string buffer;
  std::uint64_t read = 0;  // bytes that were read at least once
  std::uint64_t written = 0;
};

struct LaunchResult {
  std::vector<Fault> faults;
  std::vector<Counters> counters;
  std::vector<Traffic> traffic;
};

// What the blocks of a launch share.
struct Launch {
  const Kernel& kernel;
  const LaunchOptions& options;
  Buffers buffers;
  Releases releases;  // used by one block at a time
  std::atomic<bool> stop = false;

  std::uint64_t blocks() const {
    return std::uint64_t(options.grid.x) * options.grid.y * options.grid.z;
  }
  std::uint64_t blocks_to_run() const {
    return options.sample.empty() ? blocks() : options.sample.size();
  }
};

// Runs the kernel, or only some of its blocks. They are spread over threads; those of a kernel with atomics or fences in
// global memory run one after the other, in order. The result does not depend on the number of
// threads unless blocks race. `interrupted` is called now and then by the calling thread; where it
// returns true the launch ends early. Throws std::invalid_argument for a launch that a GPU would
// refuse.
LaunchResult launch(Program& program, const std::string& kernel, const LaunchOptions& options,
                    const std::function<bool()>& interrupted);

}  // namespace evsam::simt
