// Runs one block of threads: its warps, their divergence, its barriers and its memory.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "counters.h"
#include "fault.h"
#include "memory.h"
#include "program.h"
#include "shadow.h"

namespace evsam::simt {

struct Launch;
class Block;

// What one warp instruction asks of memory.
struct Request {
  enum class Intent : std::uint8_t { read, write, update };  // update: atomic

  const Instruction* instruction;
  Mask mask;
  Intent intent;
  int bytes;
  Ordering ordering;
  std::uint64_t address[LANES];
  std::byte* data[LANES];           // where the bytes are, for the lanes that may go on
  const std::byte* written[LANES];  // what a write will put there; only to tell silent writes apart
  bool pending = false;             // the write of an asynchronous copy, which comes later
};

// A cp.async that not all of its lanes have waited for.
struct AsyncCopy {
  const Instruction* instruction;
  Mask mask;  // lanes
  int bytes;
  std::uint32_t group[LANES];
  std::uint64_t target[LANES];  // into shared memory
  std::uint64_t source[LANES];
  std::uint32_t source_bytes[LANES];  // the rest is filled with zeros
};

struct Warp {
  Block* block = nullptr;
  int index = 0;
  std::byte* registers = nullptr;
  const std::byte* constants = nullptr;
  std::byte* local = nullptr;  // lane after lane
  std::uint8_t* local_written = nullptr;

  // ---- control
  Mask existing = 0;  // lanes that are threads of the block
  Mask alive = 0;
  Mask converging = 0;  // wait at an instruction for other lanes of the warp
  Mask at_barrier = 0;
  Mask active = 0;  // lanes that run
  std::uint32_t pc = 0;
  std::array<std::uint32_t, LANES> lane_pc{};
  bool prefer_last = false;  // of diverged lanes, those that are behind
  std::uint64_t steps = 0;
  // At a barrier of the block:
  bool arrived = false;
  std::uint32_t barrier = 0;
  std::uint32_t barrier_threads = 0;  // 0: all
  std::uint32_t arrived_pc = 0;
  Mask barrier_vote = 0;

  Mask carry = 0;  // of add.cc and the like

  // ---- cp.async
  std::deque<AsyncCopy> copies;
  std::array<std::uint32_t, LANES> committed{};

  // ---- time, where accesses are checked
  std::uint32_t clock = 1;
  Clocks known{};         // of its own clock, the one before
  Clocks known_strong{};  // of the strong accesses that it acquired from, beyond `known`
  bool touched = false;   // memory, since the clock ticked
  std::vector<const Link*> observed;       // by strong reads, for the next fence to acquire
  const Release* fenced = nullptr;         // what its strong writes release
  const Release* fenced_device = nullptr;  // to other blocks as well

  template <class T>
  T* lanes(Place place) const {
    return place.in<T>(registers, constants);
  }
  Mask& predicate(Place place) const { return *place.in<Mask>(registers, constants); }

  // Orders what the lanes did before what they do next.
  void tick();
  bool knows(Access access, int lane) const {
    return access.clock <= known[access.warp] ||
           (access.strong && access.clock <= known_strong[access.warp]) ||
           (int(access.warp) == index && int(access.lane) == lane);
  }
  std::uint32_t thread(int lane) const { return std::uint32_t(index * LANES + lane); }
};

// The state of a barrier that a warp has arrived at without waiting.
struct Barrier {
  std::uint32_t arrivals = 0;  // threads that do not wait
  Clocks clocks{};
};

class Block {
 public:
  explicit Block(Launch& launch);

  // Runs block number `index`, and leaves its faults and its traces of global memory.
  void run(std::uint32_t index);

  // ---- for instructions

  const Kernel& kernel() const { return kernel_; }
  const std::byte* parameters() const;
  std::uint64_t now() const { return steps_; }

  // Checks and counts a request. Fills in `data` for the lanes of the mask that is returned, which
  // may go on; the others did something wrong, which has been noted.
  Mask access(Warp& warp, Request& request);
  // Starts, commits and finishes asynchronous copies.
  void start_copy(Warp& warp, AsyncCopy copy);
  void finish_copies(Warp& warp, Mask mask, std::uint32_t left);
  void finish_all_copies(Warp& warp, Mask mask);
  // membar, fence
  void fence(Warp& warp, bool beyond_block);
  void fault(std::string_view kind, const Warp& warp, const Instruction& instruction, int lane,
             const std::string& message);

  // ---- results

  FaultLog faults;
  std::vector<Counters> counters;
  std::vector<std::unique_ptr<BlockShadow>> global_shadow;  // one for each buffer
  // Reads of global memory that this block has not written itself.
  struct Need {
    int buffer;
    std::uint64_t offset;
    std::uint32_t bytes;
    std::uint32_t instruction;
    std::uint32_t thread;
  };
  std::vector<Need> needs;
  const std::vector<Warp>& warps() const { return warps_; }
  std::uint32_t index() const { return index_; }
  bool aborted() const { return aborted_; }
  // Of earlier blocks; null where the blocks of the kernel do not communicate.
  const Knowledge* knowledge() const { return knowledge_; }

 private:
  void start(std::uint32_t index);
  void fill_specials(Warp& warp);
  void run_warp(Warp& warp);
  bool select(Warp& warp);
  void reselect_later(Warp& warp);
  Mask wanted(const Warp& warp, const Instruction& instruction, Mask mask) const;
  void release_converging(Warp& warp);
  void converge(Warp& warp, const Instruction& instruction, Mask mask);
  void arrive(Warp& warp);
  void step_arrive(Warp& warp, const Instruction& instruction, Mask mask);
  bool complete_barriers();
  void complete(std::uint32_t id);
  void abort(std::string_view kind, const Warp& warp, std::uint32_t pc, const std::string& message);

  Mask access_shared(Warp& warp, Request& request, Mask mask);
  Mask access_global(Warp& warp, Request& request, Mask mask);
  Mask access_local(Warp& warp, Request& request, Mask mask);
  Mask access_parameters(Warp& warp, Request& request, Mask mask);
  Mask access_source(Warp& warp, Request& source, Mask mask, int alignment);
  bool inside(Warp& warp, const Request& request, int lane, const char* space, std::uint64_t size);
  void outside(Warp& warp, const Request& request, int lane);
  void misaligned(Warp& warp, const Request& request, int lane, const char* buffer,
                  std::int64_t offset);
  void store(const Request& request, int lane);
  void unwritten(const Warp& warp, const Instruction& instruction, std::uint32_t thread,
                 const std::string& buffer, std::int64_t offset);
  Access access_now(const Warp& warp, const Request& request, int lane) const;
  void check(Warp& warp, const Request& request, int lane, BlockShadow& shadow, int buffer,
             std::uint64_t offset);
  void need(int buffer, std::uint64_t offset, int bytes, Access reader);
  void race(Warp& warp, const Request& request, int lane, int buffer, std::uint64_t offset,
            Access other, const char* what);
  std::string buffer_name(int buffer) const;
  void synchronise(Warp& warp, const Request& request, Mask mask, Releases& releases);
  void acquire(Warp& warp, const Link* link, bool beyond_block);
  const Release* release(Warp& warp, Releases& releases);
  void finish_lane(Warp& warp, const AsyncCopy& copy, int lane);

  Launch& launch_;
  const Kernel& kernel_;
  bool checked_;
  std::uint32_t threads_;
  std::uint32_t shared_bytes_;
  std::uint32_t index_ = 0;
  Index3 position_;
  std::uint64_t steps_ = 0;
  bool aborted_ = false;
  std::vector<Warp> warps_;
  std::vector<std::byte> registers_;
  std::vector<std::byte> shared_;
  std::vector<std::byte> local_;
  std::vector<std::uint8_t> local_written_;
  std::array<Barrier, 16> barriers_;
  BlockShadow shared_shadow_;
  Releases shared_releases_;
  Knowledge* knowledge_ = nullptr;
  int last_buffer_ = 0;  // that an access found
};

}  // namespace evsam::simt
