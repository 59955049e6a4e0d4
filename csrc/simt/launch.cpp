// Spreads the blocks of a grid over threads, and puts together in order what they did.
#include "launch.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <thread>

#include "block.h"

namespace evsam::simt {
namespace {

constexpr std::uint64_t MOST_THREADS = 1024;
constexpr std::uint64_t MOST_SHARED = 227 * 1024;
constexpr std::uint64_t MOST_BLOCKS = std::uint64_t(1) << 31;

std::string text(Index3 size) {
  return "(" + std::to_string(size.x) + ", " + std::to_string(size.y) + ", " +
         std::to_string(size.z) + ")";
}

void refuse_bad_launch(const Kernel& kernel, const LaunchOptions& options) {
  const auto refuse = [](const std::string& why) { throw std::invalid_argument(why); };
  const Index3 block = options.block;
  const Index3 grid = options.grid;
  const auto volume = [](Index3 size) { return std::uint64_t(size.x) * size.y * size.z; };
  if (block.x > MOST_THREADS || block.y > MOST_THREADS || block.z > 64 || volume(block) == 0 ||
      volume(block) > MOST_THREADS) {
    refuse("block must have 1 to 1024 threads, at most 64 along z, got " + text(block));
  }
  if (grid.y > 65535 || grid.z > 65535 || grid.x >= MOST_BLOCKS || volume(grid) == 0 ||
      volume(grid) >= MOST_BLOCKS) {
    refuse("grid must have 1 to 2**31 - 1 blocks, at most 65535 along y and z, got " + text(grid));
  }
  const auto& required = kernel.required_block;
  if (required[0] && block != Index3{required[0], required[1], required[2]}) {
    refuse("block must be " + text({required[0], required[1], required[2]}) +
           ", which the kernel " + kernel.name + " requires, got " + text(block));
  }
  const auto& maximum = kernel.maximum_block;
  if (maximum[0] && volume(block) > std::uint64_t(maximum[0]) * maximum[1] * maximum[2]) {
    refuse("block has more threads than the kernel " + kernel.name + " allows, " +
           text({maximum[0], maximum[1], maximum[2]}) + ", got " + text(block));
  }
  if (options.parameters.size() != kernel.parameter_bytes) {
    refuse("the kernel " + kernel.name + " takes " + std::to_string(kernel.parameter_bytes) +
           " bytes of parameters, got " + std::to_string(options.parameters.size()));
  }
  if (std::uint64_t(kernel.dynamic_shared_offset()) + options.dynamic_shared > MOST_SHARED) {
    refuse("the block would take " +
           std::to_string(kernel.dynamic_shared_offset() + std::uint64_t(options.dynamic_shared)) +
           " bytes of shared memory; a GPU has 232448 at most");
  }
  if (options.threads < 1) {
    refuse("threads must be at least 1, got " + std::to_string(options.threads));
  }
  if (options.step_limit < 1 || options.step_limit >= Access::LAST_CLOCK) {
    refuse("step_limit must be 1 to " + std::to_string(Access::LAST_CLOCK - 1) + ", got " +
           std::to_string(options.step_limit));
  }
  const auto& sample = options.sample;
  if (!std::is_sorted(sample.begin(), sample.end(), std::less_equal<>()) ||
      (!sample.empty() && sample.back() >= volume(grid))) {
    refuse("blocks must be ascending indices into the grid, which has " +
           std::to_string(volume(grid)) + " blocks");
  }
}

// What finished blocks did to global memory. Blocks are added in their order.
class Finished {
 public:
  explicit Finished(Launch& launch) : launch_(launch), pages_(launch.buffers.count()) {
    for (int i = 0; i < launch.buffers.count(); ++i) {
      const Buffer& buffer = launch.buffers[i];
      pages_[i].resize((buffer.size + PAGE - 1) / PAGE);
      traffic_.push_back({buffer.name});
    }
  }

  void add(Block& block) {
    std::optional<KnownBlocks> known;
    if (block.knowledge()) known.emplace(*block.knowledge());
    find_unwritten(block);
    for (int buffer = 0; buffer < launch_.buffers.count(); ++buffer) {
      BlockShadow& shadow = *block.global_shadow[buffer];
      for (const std::uint32_t number : shadow.touched()) {
        FinishedPage& page = pages_[buffer][number];
        shadow.page(number * PAGE).visit_all([&](Cell& cell, std::uint64_t at, int bytes) {
          if (!cell.touched()) return;
          add(block, known, buffer, page, cell, number * PAGE + at, bytes);
        });
      }
    }
  }

  const std::vector<Traffic>& traffic() const { return traffic_; }

 private:
  static constexpr std::uint64_t PAGE = BlockShadow::Page::BYTES;
  using Marks = std::unique_ptr<ShadowPage<Mark>>;

  void find_unwritten(Block& block) {
    for (const Block::Need& need : block.needs) {
      FinishedPage& page = pages_[need.buffer][need.offset / PAGE];
      bool blank = false;
      for (std::uint64_t at = need.offset; at < need.offset + need.bytes; ++at) {
        bool written = false;
        const auto look = [&](Mark& mark, auto, int) { written |= mark.access.happened(); };
        if (page.writes) page.writes->visit(at % PAGE, 1, look);
        if (page.strongs) page.strongs->visit(at % PAGE, 1, look);
        blank |= !written;
      }
      if (blank) report_unwritten(block, need);
    }
  }

  void report_unwritten(Block& block, const Block::Need& need) {
    const std::string& name = launch_.buffers[need.buffer].name;
    block.faults.add("uninitialised read", need.instruction, name, [&] {
      Fault fault;
      fault.message = "a read of byte " + std::to_string(need.offset) + " of " + name +
                      ", which nothing has written";
      fault.block = block.index();
      fault.thread = need.thread;
      fault.offset = std::int64_t(need.offset);
      return fault;
    });
  }

  void add(Block& block, std::optional<KnownBlocks>& known, int buffer, FinishedPage& page,
           const Cell& cell, std::uint64_t offset, int bytes) {
    const std::uint64_t at = offset % PAGE;
    const auto against = [&](Marks& marks, Access mine, const char* verb, const char* other,
                             bool both_strong) {
      if (!mine.happened() || !marks) return;
      marks->visit(at, std::uint64_t(bytes), [&](Mark& mark, auto, int) {
        if (!mark.access.happened() || (both_strong && mark.access.strong)) return;
        if (known && known->knows(mark.block, mark.access)) return;
        report_race(block, buffer, offset, mine, mark, verb, other);
      });
    };
    against(page.writes, cell.write, "a write", "a write", false);
    against(page.strongs, cell.write, "a write", "an atomic operation", false);
    against(page.reads, cell.write, "a write", "a read", false);
    against(page.writes, cell.strong, "an atomic operation", "a write", false);
    against(page.reads, cell.strong, "an atomic operation", "a read", true);
    for (const Access& read : cell.reads) {
      against(page.writes, read, "a read", "a write", false);
      if (!read.strong) against(page.strongs, read, "a read", "an atomic operation", false);
    }
    const auto remember = [&](Marks& marks, Access mine) {
      std::uint64_t fresh = 0;
      if (!mine.happened()) return fresh;
      if (!marks) marks = std::make_unique<ShadowPage<Mark>>();
      marks->visit(at, std::uint64_t(bytes), [&](Mark& mark, auto, int covered) {
        if (!mark.access.happened()) fresh += std::uint64_t(covered);
        mark = {mine, block.index()};
      });
      return fresh;
    };
    // What was written by both kinds of writes counts once.
    const auto written_by = [&](Marks& marks) {
      std::uint64_t covered_bytes = 0;
      if (!marks) return covered_bytes;
      marks->visit(at, std::uint64_t(bytes), [&](Mark& mark, auto, int covered) {
        if (mark.access.happened()) covered_bytes += std::uint64_t(covered);
      });
      return covered_bytes;
    };
    const std::uint64_t plain_before = cell.strong.happened() ? written_by(page.writes) : 0;
    traffic_[buffer].written += remember(page.writes, cell.write);
    const std::uint64_t by_strong = remember(page.strongs, cell.strong);
    traffic_[buffer].written +=
        by_strong -
        std::min(by_strong, cell.write.happened() ? std::uint64_t(bytes) : plain_before);
    // A read that is not strong says more than one that is.
    const bool first =
        cell.reads[0].happened() && (!cell.reads[1].happened() || !cell.reads[0].strong);
    traffic_[buffer].read += remember(page.reads, cell.reads[first ? 0 : 1]);
  }

  void report_race(Block& block, int buffer, std::uint64_t offset, Access mine, const Mark& mark,
                   const char* verb, const char* other) {
    const std::string& name = launch_.buffers[buffer].name;
    block.faults.add("race", std::uint32_t(mine.instruction), name, [&] {
      const auto lane = [](Access access) {
        return access.lane == Access::SEVERAL_LANES ? 0u : unsigned(access.lane);
      };
      Fault fault;
      fault.message = std::string(verb) + " of byte " + std::to_string(offset) + " of " + name +
                      ", and " + other + " by another block that nothing orders before it";
      fault.block = block.index();
      fault.thread = std::uint32_t(mine.warp * LANES) + lane(mine);
      fault.offset = std::int64_t(offset);
      fault.other_block = mark.block;
      fault.other_thread = std::uint32_t(mark.access.warp * LANES) + lane(mark.access);
      fault.other_instruction = std::uint32_t(mark.access.instruction);
      return fault;
    });
  }

  Launch& launch_;
  std::vector<std::vector<FinishedPage>> pages_;  // of each buffer
  std::vector<Traffic> traffic_;
};

// Threads that take blocks in order and hand in their results in order.
class Team {
 public:
  Team(Launch& launch, Finished* finished, LaunchResult& result)
      : launch_(launch), finished_(finished), result_(result) {
    result.counters.resize(launch.kernel.code.size());
  }

  void run(const std::function<bool()>& interrupted) {
    const std::uint64_t blocks = launch_.blocks_to_run();
    const int most = launch_.kernel.communicates ? 1 : launch_.options.threads;
    const int count = int(std::min<std::uint64_t>(most, blocks));
    working_ = count;
    std::vector<std::thread> threads;
    for (int i = 0; i < count; ++i) threads.emplace_back([this] { work(); });
    {
      std::unique_lock lock(mutex_);
      while (!idle_.wait_for(lock, std::chrono::milliseconds(50), [&] { return working_ == 0; })) {
        lock.unlock();
        const bool stop = interrupted();
        lock.lock();
        if (stop) {
          launch_.stop = true;
          turn_.notify_all();
        }
      }
    }
    for (std::thread& thread : threads) thread.join();
    if (failure_) std::rethrow_exception(failure_);
    for (const auto& [key, fault] : faults_.all()) result_.faults.push_back(fault);
  }

 private:
  void work() {
    std::vector<Counters> counters;
    try {
      Block block(launch_);
      for (std::uint64_t i; (i = next_++) < launch_.blocks_to_run() && !launch_.stop;) {
        const auto& sample = launch_.options.sample;
        block.run(sample.empty() ? std::uint32_t(i) : sample[i]);
        std::unique_lock lock(mutex_);
        turn_.wait(lock, [&] { return done_ == i || launch_.stop; });
        if (launch_.stop) break;
        if (finished_) finished_->add(block);
        faults_.merge(std::move(block.faults));
        ++done_;
        turn_.notify_all();
      }
      counters = std::move(block.counters);
    } catch (...) {
      const std::lock_guard lock(mutex_);
      if (!failure_) failure_ = std::current_exception();
      launch_.stop = true;
      turn_.notify_all();
    }
    const std::lock_guard lock(mutex_);
    for (std::size_t i = 0; i < counters.size(); ++i) result_.counters[i] += counters[i];
    --working_;
    idle_.notify_all();
  }

  Launch& launch_;
  Finished* finished_;
  LaunchResult& result_;
  std::atomic<std::uint64_t> next_ = 0;
  std::mutex mutex_;
  std::condition_variable turn_;  // of a block to hand in its result
  std::condition_variable idle_;
  std::uint64_t done_ = 0;
  int working_ = 0;
  FaultLog faults_;
  std::exception_ptr failure_;
};

}  // namespace

LaunchResult launch(Program& program, const std::string& name, const LaunchOptions& options,
                    const std::function<bool()>& interrupted) {
  const Kernel& kernel = program.kernel(name);
  refuse_bad_launch(kernel, options);
  std::vector<Buffer> buffers = options.buffers;
  for (const GlobalVariable& variable : program.variables()) {
    buffers.push_back({variable.name, reinterpret_cast<std::uint64_t>(variable.data), variable.size,
                       variable.writable, true});
  }
  Launch shared{kernel, options, Buffers(std::move(buffers)), {}, false};
  LaunchResult result;
  std::optional<Finished> finished;
  if (options.check) finished.emplace(shared);
  Team(shared, finished ? &*finished : nullptr, result).run(interrupted);
  if (finished) result.traffic = finished->traffic();
  return result;
}

}  // namespace evsam::simt
