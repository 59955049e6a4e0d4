// What a block does to memory: bounds, alignment, counters, and the checks of shadow.h.
#include <algorithm>
#include <cstring>

#include "block.h"
#include "launch.h"

namespace evsam::simt {
namespace {

using Intent = Request::Intent;

constexpr int SHARED = -1;  // where a buffer is asked for

const char* phrase(Intent intent) {
  switch (intent) {
    case Intent::read:
      return "a read";
    case Intent::write:
      return "a write";
    default:
      return "an atomic operation";
  }
}

std::string bytes_text(std::uint64_t bytes) {
  return std::to_string(bytes) + (bytes == 1 ? " byte" : " bytes");
}

}  // namespace

std::string Block::buffer_name(int buffer) const {
  return buffer == SHARED ? "shared" : launch_.buffers[buffer].name;
}

Mask Block::access(Warp& warp, Request& request) {
  warp.touched = true;
  ++counters[request.instruction->index].requests;
  switch (request.instruction->memory.space) {
    case Space::shared:
      return access_shared(warp, request, request.mask);
    case Space::global:
    case Space::constant:
      return access_global(warp, request, request.mask);
    case Space::local:
      return access_local(warp, request, request.mask);
    case Space::param:
      return access_parameters(warp, request, request.mask);
    case Space::generic:
      break;
  }
  Mask window[4] = {};
  for (Mask rest = request.mask; rest; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    const std::uint64_t which = request.address[lane] >> 56;
    const bool inside =
        which >= 1 && which <= 3 && (request.address[lane] & 0xffffffffffffff) < WINDOW_SIZE;
    if (inside) request.address[lane] &= WINDOW_SIZE - 1;
    window[inside ? which : 0] |= Mask(1) << lane;
  }
  Mask allowed = 0;
  if (window[0]) allowed |= access_global(warp, request, window[0]);
  if (window[1]) allowed |= access_shared(warp, request, window[1]);
  if (window[2]) allowed |= access_local(warp, request, window[2]);
  if (window[3]) allowed |= access_parameters(warp, request, window[3]);
  return allowed;
}

void Block::misaligned(Warp& warp, const Request& request, int lane, const char* buffer,
                       std::int64_t offset) {
  faults.add("misaligned", request.instruction->index, buffer, [&] {
    Fault fault;
    fault.message = std::string(phrase(request.intent)) + " of " + bytes_text(request.bytes) +
                    " at byte " + std::to_string(offset) + " of " + buffer +
                    ", which is not a multiple of " + std::to_string(request.bytes);
    fault.block = index_;
    fault.thread = warp.thread(lane);
    fault.offset = offset;
    return fault;
  });
}

// Bounds and alignment of a space that starts at 0; true where the lane may go on.
bool Block::inside(Warp& warp, const Request& request, int lane, const char* space,
                   std::uint64_t size) {
  const std::uint64_t offset = request.address[lane];
  const std::uint64_t bytes = request.bytes;
  if (offset > size || bytes > size - offset) {
    faults.add("out of bounds", request.instruction->index, space, [&] {
      Fault fault;
      fault.message = std::string(phrase(request.intent)) + " of " + bytes_text(bytes) +
                      " at byte " + std::to_string(std::int64_t(offset)) + " of " + space +
                      " memory, which has " + bytes_text(size);
      fault.block = index_;
      fault.thread = warp.thread(lane);
      fault.offset = std::int64_t(offset);
      return fault;
    });
    return false;
  }
  if (offset % bytes) {
    misaligned(warp, request, lane, space, std::int64_t(offset));
    return false;
  }
  return true;
}

Mask Block::access_shared(Warp& warp, Request& request, Mask mask) {
  Mask allowed = 0;
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    if (!inside(warp, request, lane, "shared", shared_bytes_)) continue;
    allowed |= Mask(1) << lane;
    request.data[lane] = shared_.data() + request.address[lane];
  }
  if (checked_ && allowed) {
    count_wavefronts(counters[request.instruction->index], request.address, allowed, request.bytes);
    if (request.ordering.strong) synchronise(warp, request, allowed, shared_releases_);
  }
  for (Mask rest = allowed; rest; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    if (checked_) {
      check(warp, request, lane, shared_shadow_, SHARED, request.address[lane]);
    }
    store(request, lane);
  }
  return allowed;
}

// Writes lane by lane, so that the value of the last lane stays where several write.
void Block::store(const Request& request, int lane) {
  if (request.intent == Intent::write && !request.pending) {
    std::memcpy(request.data[lane], request.written[lane], std::size_t(request.bytes));
  }
}

Mask Block::access_global(Warp& warp, Request& request, Mask mask) {
  Mask allowed = 0;
  int found[LANES];
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    const std::uint64_t address = request.address[lane];
    const std::uint64_t bytes = request.bytes;
    if (launch_.buffers.count() == 0 || !launch_.buffers[last_buffer_].holds(address, bytes)) {
      const int buffer = launch_.buffers.find(address, bytes);
      if (buffer < 0) {
        outside(warp, request, lane);
        continue;
      }
      last_buffer_ = buffer;
    }
    const Buffer& buffer = launch_.buffers[last_buffer_];
    if (address % bytes) {
      misaligned(warp, request, lane, buffer.name.c_str(), std::int64_t(address - buffer.address));
      continue;
    }
    if (!buffer.writable && request.intent != Intent::read) {
      faults.add("write to read-only memory", request.instruction->index, buffer.name, [&] {
        Fault fault;
        fault.message = std::string(phrase(request.intent)) + " of " + bytes_text(bytes) + " of " +
                        buffer.name + ", which is read-only";
        fault.block = index_;
        fault.thread = warp.thread(lane);
        fault.offset = std::int64_t(address - buffer.address);
        return fault;
      });
      continue;
    }
    allowed |= Mask(1) << lane;
    found[lane] = last_buffer_;
    request.data[lane] = reinterpret_cast<std::byte*>(address);
  }
  if (checked_ && allowed) {
    count_sectors(counters[request.instruction->index], request.address, allowed, request.bytes);
    if (request.ordering.strong) synchronise(warp, request, allowed, launch_.releases);
  }
  for (Mask rest = allowed; rest; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    if (checked_) {
      const int buffer = found[lane];
      check(warp, request, lane, *global_shadow[buffer], buffer,
            request.address[lane] - launch_.buffers[buffer].address);
    }
    store(request, lane);
  }
  return allowed;
}

void Block::outside(Warp& warp, const Request& request, int lane) {
  const std::uint64_t address = request.address[lane];
  const int nearest = launch_.buffers.nearest(address);
  const std::string name = nearest < 0 ? "" : launch_.buffers[nearest].name;
  faults.add("out of bounds", request.instruction->index, name, [&] {
    Fault fault;
    fault.message = std::string(phrase(request.intent)) + " of " + bytes_text(request.bytes) + " ";
    if (nearest < 0) {
      fault.message += "of global memory, but the launch has no buffers";
    } else {
      const Buffer& buffer = launch_.buffers[nearest];
      fault.offset = std::int64_t(address - buffer.address);
      fault.message += "at byte " + std::to_string(fault.offset) + " of " + buffer.name +
                       ", which has " + bytes_text(buffer.size);
    }
    fault.block = index_;
    fault.thread = warp.thread(lane);
    return fault;
  });
}

Mask Block::access_local(Warp& warp, Request& request, Mask mask) {
  const std::uint64_t size = kernel_.local_bytes;
  Mask allowed = 0;
  std::uint64_t interleaved[LANES];
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    if (!inside(warp, request, lane, "local", size)) continue;
    const std::uint64_t offset = request.address[lane];
    allowed |= Mask(1) << lane;
    request.data[lane] = warp.local + lane * size + offset;
    // Words of the same number lie side by side for the lanes of a warp.
    interleaved[lane] = offset / 4 * 4 * LANES + std::uint64_t(lane) * 4 + offset % 4;
    if (!checked_) {
      store(request, lane);
      continue;
    }
    std::uint8_t* written = warp.local_written + lane * size + offset;
    if (request.intent != Intent::write &&
        !std::all_of(written, written + request.bytes, [](std::uint8_t w) { return w; })) {
      unwritten(warp, *request.instruction, warp.thread(lane), "local", std::int64_t(offset));
    }
    if (request.intent != Intent::read) std::fill_n(written, request.bytes, 1);
    store(request, lane);
  }
  if (checked_ && allowed) {
    count_sectors(counters[request.instruction->index], interleaved, allowed,
                  std::min(request.bytes, 4));
    // A wide access takes as many words.
    Counters& counted = counters[request.instruction->index];
    for (int word = 4; word < request.bytes; word += 4) {
      count_sectors(counted, interleaved, allowed, 4);
    }
  }
  return allowed;
}

Mask Block::access_parameters(Warp& warp, Request& request, Mask mask) {
  Mask allowed = 0;
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    if (!inside(warp, request, lane, "param", kernel_.parameter_bytes)) continue;
    if (request.intent != Intent::read) {
      fault("write to read-only memory", warp, *request.instruction, lane,
            "a write to the parameters of the kernel");
      continue;
    }
    allowed |= Mask(1) << lane;
    request.data[lane] =
        const_cast<std::byte*>(launch_.options.parameters.data()) + request.address[lane];
  }
  return allowed;
}

void Block::unwritten(const Warp&, const Instruction& instruction, std::uint32_t thread,
                      const std::string& buffer, std::int64_t offset) {
  faults.add("uninitialised read", instruction.index, buffer, [&] {
    Fault fault;
    fault.message = "a read of byte " + std::to_string(offset) + " of " + buffer +
                    " memory, which nothing has written";
    fault.block = index_;
    fault.thread = thread;
    fault.offset = offset;
    return fault;
  });
}

// ---- who touched it last

Access Block::access_now(const Warp& warp, const Request& request, int lane) const {
  Access access;
  access.instruction = request.instruction->index;
  access.clock = warp.clock;
  access.warp = std::uint64_t(warp.index);
  access.lane = std::uint64_t(lane);
  access.strong = request.ordering.strong;
  access.pending = request.pending;
  return access;
}

void Block::check(Warp& warp, const Request& request, int lane, BlockShadow& shadow, int buffer,
                  std::uint64_t offset) {
  const Access me = access_now(warp, request, lane);

  // The first of each kind that is found.
  struct Found {
    Access other;
    std::uint64_t at = 0;
    const char* what = nullptr;
  } conflict;
  std::uint64_t in_flight = offset;
  Access flying;
  std::uint64_t blank = 0;
  bool is_blank = false;
  const bool waits_for_others = buffer != SHARED && !launch_.buffers[buffer].initialised;

  const std::uint64_t base = offset / BlockShadow::Page::BYTES * BlockShadow::Page::BYTES;
  shadow.page(offset).visit(
      offset - base, std::uint64_t(request.bytes), [&](Cell& cell, std::uint64_t at, int bytes) {
        const auto against = [&](Access other, const char* what) {
          if (warp.knows(other, lane) || conflict.what) return;
          conflict = {other, base + at, what};
        };
        if (request.intent != Intent::write) {
          if (cell.write.pending) {
            if (!flying.happened()) {
              flying = cell.write;
              in_flight = base + at;
            }
          } else {
            against(cell.write, "a write");
          }
          if (!me.strong) against(cell.strong, "an atomic operation");
          if (!cell.write.happened() && !cell.strong.happened()) {
            if (waits_for_others) need(buffer, base + at, bytes, me);
            if (!is_blank) blank = base + at;
            is_blank = true;
          }
          Access* slot = &cell.reads[0];
          if (!slot->happened() || slot->warp == me.warp) {
            // The first slot already.
          } else if (cell.reads[1].happened() && cell.reads[1].warp == me.warp) {
            slot = &cell.reads[1];
          } else {
            cell.reads[1] = cell.reads[0];
          }
          const bool again = slot->same_time(me);
          const bool strong = me.strong && (!again || slot->strong);
          const bool several = again && slot->lane != me.lane;
          if (request.intent == Intent::read) {
            *slot = me;
            slot->strong = strong;
            if (several) slot->lane = Access::SEVERAL_LANES;
          }
        }
        if (request.intent == Intent::read) return;
        if (cell.write.pending && !(cell.write.warp == me.warp && cell.write.lane == me.lane)) {
          if (!conflict.what) conflict = {cell.write, base + at, "an asynchronous copy"};
        }
        const auto silent = [&] {
          return !me.pending && !me.strong && request.written[lane] &&
                 std::memcmp(request.data[lane] + (base + at - offset),
                             request.written[lane] + (base + at - offset), bytes) == 0;
        };
        if (request.intent == Intent::write && !warp.knows(cell.write, lane) && !silent()) {
          against(cell.write, "a write");
        }
        for (const Access& read : cell.reads) {
          if (!(me.strong && read.strong)) against(read, "a read");
        }
        if (me.strong) {
          cell.strong = me;
        } else {
          against(cell.strong, "an atomic operation");
          cell.write = me;
        }
      });

  if (flying.happened()) {
    faults.add("unfinished copy", me.instruction, buffer_name(buffer), [&] {
      Fault fault;
      fault.message = "a read of byte " + std::to_string(in_flight) + " of " + buffer_name(buffer) +
                      ", where a cp.async writes that nobody has waited for";
      fault.block = index_;
      fault.thread = warp.thread(lane);
      fault.offset = std::int64_t(in_flight);
      fault.other_block = index_;
      fault.other_thread = std::uint32_t(flying.warp * LANES + flying.lane);
      fault.other_instruction = std::uint32_t(flying.instruction);
      return fault;
    });
  } else if (conflict.what) {
    race(warp, request, lane, buffer, conflict.at, conflict.other, conflict.what);
  }
  if (is_blank && buffer == SHARED) {
    unwritten(warp, *request.instruction, warp.thread(lane), "shared", std::int64_t(blank));
  }
}

// Earlier blocks may have written what this one has not; that is known when they are done.
void Block::need(int buffer, std::uint64_t offset, int bytes, Access reader) {
  const Need wanted{buffer, offset, std::uint32_t(bytes), std::uint32_t(reader.instruction),
                    std::uint32_t(reader.warp * LANES + reader.lane)};
  if (!needs.empty()) {
    Need& last = needs.back();
    if (last.instruction == wanted.instruction && last.thread == wanted.thread &&
        last.buffer == buffer && last.offset + last.bytes == offset) {
      last.bytes += wanted.bytes;
      return;
    }
  }
  needs.push_back(wanted);
}

void Block::race(Warp& warp, const Request& request, int lane, int buffer, std::uint64_t offset,
                 Access other, const char* what) {
  faults.add("race", request.instruction->index, buffer_name(buffer), [&] {
    const bool several = other.lane == Access::SEVERAL_LANES;
    Fault fault;
    fault.message = std::string(phrase(request.intent)) + " of byte " + std::to_string(offset) +
                    " of " + buffer_name(buffer) + ", and " + what +
                    " that no barrier separates from it";
    fault.block = index_;
    fault.thread = warp.thread(lane);
    fault.offset = std::int64_t(offset);
    fault.other_block = index_;
    fault.other_thread = std::uint32_t(other.warp * LANES + (several ? 0 : other.lane));
    fault.other_instruction = std::uint32_t(other.instruction);
    return fault;
  });
}

// ---- releases and acquires

void Block::acquire(Warp& warp, const Link* link, bool beyond_block) {
  for (; link && link->release->block == index_; link = link->earlier) {
    const Clocks& clocks = link->release->clocks;
    for (std::size_t i = 0; i < clocks.size(); ++i) {
      if (int(i) != warp.index) warp.known[i] = std::max(warp.known[i], clocks[i]);
    }
    std::uint32_t& strong = warp.known_strong[link->write.warp];
    strong = std::max(strong, std::uint32_t(link->write.clock));
  }
  if (beyond_block && knowledge_) knowledge_->add(link);
}

const Release* Block::release(Warp& warp, Releases& releases) {
  Release mine;
  mine.block = index_;
  mine.clocks = warp.known;
  mine.clocks[warp.index] = warp.clock;
  if (knowledge_) {
    mine.knowledge = knowledge_;
    mine.known = knowledge_->links.size();
  }
  warp.touched = true;
  warp.tick();
  return releases.add(mine);
}

void Block::synchronise(Warp& warp, const Request& request, Mask mask, Releases& releases) {
  const bool beyond_block = &releases == &launch_.releases;
  if (beyond_block && !kernel_.communicates) return;
  if (request.intent != Intent::write) {
    for (Mask rest = mask; rest; rest &= rest - 1) {
      const Link* link = releases.at(request.address[std::countr_zero(rest)]);
      if (link == nullptr) continue;
      if (request.ordering.acquires) {
        acquire(warp, link, beyond_block);
      } else if (std::find(warp.observed.begin(), warp.observed.end(), link) ==
                 warp.observed.end()) {
        warp.observed.push_back(link);
      }
    }
  }
  if (request.intent != Intent::read) {
    const Release* released = beyond_block ? warp.fenced_device : warp.fenced;
    if (request.ordering.releases) released = release(warp, releases);
    for (Mask rest = mask; rest; rest &= rest - 1) {
      const int lane = std::countr_zero(rest);
      releases.publish(request.address[lane], released, access_now(warp, request, lane),
                       request.intent == Intent::update);
    }
  }
}

void Block::fence(Warp& warp, bool beyond_block) {
  if (!checked_) return;
  for (const Link* link : warp.observed) acquire(warp, link, beyond_block);
  if (beyond_block) warp.observed.clear();
  // Blocks that do not communicate run side by side and keep their releases to themselves.
  const bool shared = beyond_block && kernel_.communicates;
  warp.fenced = release(warp, shared ? launch_.releases : shared_releases_);
  if (shared) warp.fenced_device = warp.fenced;
}

// ---- cp.async

void Block::start_copy(Warp& warp, AsyncCopy copy) {
  Request target;
  target.instruction = copy.instruction;
  target.mask = copy.mask;
  target.intent = Intent::write;
  target.bytes = copy.bytes;
  target.pending = true;
  std::copy_n(copy.target, LANES, target.address);
  std::fill_n(target.written, LANES, nullptr);
  Request source = target;
  source.intent = Intent::read;
  source.pending = false;
  std::copy_n(copy.source, LANES, source.address);

  warp.touched = true;
  ++counters[copy.instruction->index].requests;
  Mask reading = 0;
  for (Mask rest = copy.mask; rest; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    if (copy.source_bytes[lane] > 0) reading |= Mask(1) << lane;
  }
  Mask failed = 0;
  // Lanes that read less than a whole piece are rare: the end of a row.
  while (reading) {
    const std::uint32_t bytes = copy.source_bytes[std::countr_zero(reading)];
    Mask same = 0;
    for (Mask rest = reading; rest; rest &= rest - 1) {
      const int lane = std::countr_zero(rest);
      if (copy.source_bytes[lane] == bytes) same |= Mask(1) << lane;
    }
    reading &= ~same;
    source.bytes = int(bytes);
    failed |= same & ~access_source(warp, source, same, copy.bytes);
  }
  const std::uint64_t bytes_before = counters[copy.instruction->index].bytes;
  copy.mask &= ~failed;
  copy.mask = copy.mask ? access_shared(warp, target, copy.mask) : 0;
  counters[copy.instruction->index].bytes = bytes_before;  // counted once, as global memory
  for (Mask rest = copy.mask; rest; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    copy.group[lane] = warp.committed[lane];
  }
  if (copy.mask) warp.copies.push_back(copy);
}

// A source of any length is aligned as the whole piece is.
Mask Block::access_source(Warp& warp, Request& source, Mask mask, int alignment) {
  Mask aligned = 0;
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    if (source.address[lane] % std::uint64_t(alignment)) {
      Request whole = source;
      whole.bytes = alignment;
      access_global(warp, whole, Mask(1) << lane);  // notes what is wrong
    } else {
      aligned |= Mask(1) << lane;
    }
  }
  if (!aligned) return 0;
  if (std::has_single_bit(unsigned(source.bytes))) return access_global(warp, source, aligned);
  Mask allowed = aligned;
  Request byte = source;
  byte.bytes = 1;
  for (int i = 0; i < source.bytes; ++i) {
    allowed &= access_global(warp, byte, aligned);
    for (std::uint64_t& address : byte.address) ++address;
  }
  return allowed;
}

void Block::finish_lane(Warp& warp, const AsyncCopy& copy, int lane) {
  const std::uint64_t target = copy.target[lane];
  const std::uint32_t bytes = copy.source_bytes[lane];
  if (bytes) {
    std::memcpy(&shared_[target], reinterpret_cast<const void*>(copy.source[lane]), bytes);
  }
  std::memset(&shared_[target] + bytes, 0, std::uint32_t(copy.bytes) - bytes);
  if (!checked_) return;
  const std::uint64_t offset = target % BlockShadow::Page::BYTES;
  shared_shadow_.page(target).visit(offset, std::uint64_t(copy.bytes), [&](Cell& cell, auto, int) {
    Access& write = cell.write;
    if (write.pending && int(write.warp) == warp.index && int(write.lane) == lane) {
      write.pending = false;
      write.clock = warp.clock;
    }
  });
}

void Block::finish_copies(Warp& warp, Mask mask, std::uint32_t left) {
  warp.touched = true;
  for (AsyncCopy& copy : warp.copies) {
    for (Mask rest = copy.mask & mask; rest; rest &= rest - 1) {
      const int lane = std::countr_zero(rest);
      if (copy.group[lane] + left >= warp.committed[lane]) continue;
      finish_lane(warp, copy, lane);
      copy.mask &= ~(Mask(1) << lane);
    }
  }
  while (!warp.copies.empty() && !warp.copies.front().mask) warp.copies.pop_front();
}

void Block::finish_all_copies(Warp& warp, Mask mask) {
  if (warp.copies.empty()) return;
  for_lanes(mask, [&](int lane) { ++warp.committed[lane]; });
  finish_copies(warp, mask, 0);
}

}  // namespace evsam::simt
