// What is counted for every instruction of a kernel.
#pragma once

#include <cstdint>

#include "lanes.h"

namespace evsam::simt {

struct Counters {
  std::uint64_t warp_executions = 0;
  std::uint64_t lane_executions = 0;
  std::uint64_t requests = 0;          // of memory; one a warp
  std::uint64_t bytes = 0;             // that the lanes asked for
  std::uint64_t sectors = 0;           // of 32 bytes, global and local memory
  std::uint64_t ideal_sectors = 0;     // that would hold the same bytes
  std::uint64_t wavefronts = 0;        // shared memory
  std::uint64_t ideal_wavefronts = 0;  // without bank conflicts

  void operator+=(const Counters& other) {
    warp_executions += other.warp_executions;
    lane_executions += other.lane_executions;
    requests += other.requests;
    bytes += other.bytes;
    sectors += other.sectors;
    ideal_sectors += other.ideal_sectors;
    wavefronts += other.wavefronts;
    ideal_wavefronts += other.ideal_wavefronts;
  }
};

// A request for `bytes` bytes at `address[lane]` for each lane of `mask`, which is not empty.
void count_sectors(Counters& counters, const std::uint64_t* address, Mask mask, int bytes);

// Shared memory has 32 banks of four bytes, and a wavefront is one access of each. A request takes
// as many as there are distinct words in the fullest bank: at least that many are needed however
// the lanes are grouped, and a request without conflicts needs no more.
void count_wavefronts(Counters& counters, const std::uint64_t* address, Mask mask, int bytes);

}  // namespace evsam::simt
