// Who touched memory last: finds data races, reads of what nobody wrote and reads of copies in
// flight.
//
// A warp has a clock, which ticks when it synchronises, and knows the clocks of the other warps of
// its block up to the last barrier it shared with them. An access of another warp is ordered before
// what the warp does now if its clock is known; two lanes of one warp are ordered by a tick of its
// clock.
#pragma once

#include <algorithm>
#include <array>
#include <bitset>
#include <cstdint>
#include <deque>
#include <memory>
#include <functional>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

namespace evsam::simt {

struct Access {
  static constexpr unsigned SEVERAL_LANES = 32;
  static constexpr std::uint32_t LAST_CLOCK = (1u << 26) - 1;

  std::uint64_t instruction : 22 = 0;
  std::uint64_t clock : 26 = 0;  // 0: nobody
  std::uint64_t warp : 5 = 0;
  std::uint64_t lane : 6 = 0;
  std::uint64_t strong : 1 = 0;   // volatile, relaxed or atomic
  std::uint64_t pending : 1 = 0;  // an asynchronous copy that nobody waited for

  bool happened() const { return clock != 0; }
  bool same_time(const Access& other) const { return warp == other.warp && clock == other.clock; }
};

// The clocks of the warps of a block that a thread of it knows.
using Clocks = std::array<std::uint32_t, 32>;

// What is remembered of a word, or of a byte where accesses are smaller than words. Of reads that
// are not ordered among themselves, those of two warps.
struct Cell {
  Access write;
  Access strong;  // writes
  Access reads[2];

  bool touched() const { return write.happened() || strong.happened() || reads[0].happened(); }
};

// T for every four bytes of memory or, once something smaller was touched, for every byte.
template <class T>
class ShadowPage {
 public:
  static constexpr std::uint64_t BYTES = 1024;
  static constexpr std::uint64_t WORDS = BYTES / 4;

  void clear() {
    words_.fill({});
    split_.reset();
  }

  // Calls f(T&, offset, bytes) for what covers [offset, offset + bytes) of the page.
  template <class F>
  void visit(std::uint64_t offset, std::uint64_t bytes, F f) {
    const std::uint64_t end = offset + bytes;
    for (std::uint64_t at = offset; at < end;) {
      const std::uint64_t word = at / 4;
      const std::uint64_t word_end = std::min(end, word * 4 + 4);
      if (word_end - at == 4 && !split_[word]) {
        f(words_[word], at, 4);
      } else {
        split(word);
        for (std::uint64_t byte = at; byte < word_end; ++byte) f((*bytes_)[byte], byte, 1);
      }
      at = word_end;
    }
  }

  // Calls f(T&, offset, bytes) for everything.
  template <class F>
  void visit_all(F f) {
    for (std::uint64_t word = 0; word < WORDS; ++word) {
      if (!split_[word]) {
        f(words_[word], word * 4, 4);
      } else {
        for (std::uint64_t byte = word * 4; byte < word * 4 + 4; ++byte) {
          f((*bytes_)[byte], byte, 1);
        }
      }
    }
  }

 private:
  void split(std::uint64_t word) {
    if (split_[word]) return;
    if (!bytes_) bytes_ = std::make_unique<std::array<T, BYTES>>();
    for (int i = 0; i < 4; ++i) (*bytes_)[word * 4 + i] = words_[word];
    split_.set(word);
  }

  std::array<T, WORDS> words_{};
  std::bitset<WORDS> split_;
  std::unique_ptr<std::array<T, BYTES>> bytes_;
};

// The cells of one range of memory while one block runs. Pages are kept for the next block.
class BlockShadow {
 public:
  using Page = ShadowPage<Cell>;

  void start(std::uint64_t bytes) {
    for (const std::uint32_t page : touched_) table_[page] = 0;
    touched_.clear();
    used_ = 0;
    table_.resize((bytes + Page::BYTES - 1) / Page::BYTES);
  }

  Page& page(std::uint64_t offset) {
    std::uint32_t& entry = table_[offset / Page::BYTES];
    if (entry == 0) {
      if (used_ == pages_.size()) {
        pages_.push_back(std::make_unique<Page>());
      } else {
        pages_[used_]->clear();
      }
      entry = std::uint32_t(++used_);
      touched_.push_back(std::uint32_t(offset / Page::BYTES));
    }
    return *pages_[entry - 1];
  }

  const std::vector<std::uint32_t>& touched() const { return touched_; }

 private:
  std::vector<std::uint32_t> table_;  // 1 + index of a page, or 0
  std::vector<std::uint32_t> touched_;
  std::vector<std::unique_ptr<Page>> pages_;
  std::size_t used_ = 0;
};

struct Link;

// What the threads of a block were let know by releases of other blocks. It only grows.
struct Knowledge {
  std::vector<const Link*> links;
  std::unordered_set<const Link*> seen;

  void add(const Link* link) {
    if (link && seen.insert(link).second) links.push_back(link);
  }
};

// What a warp let others know: its clocks, and what its block had been let know until then.
struct Release {
  std::uint32_t block = 0;
  Clocks clocks{};
  const Knowledge* knowledge = nullptr;
  std::size_t known = 0;  // links of `knowledge`
};

// What was released at an address: by the last strong write, and by those that it read. The write
// comes after what it releases, and is known with it.
struct Link {
  const Release* release;
  Access write;
  const Link* earlier;
};

// Releases by address, for blocks that run one after the other.
class Releases {
 public:
  const Release* add(const Release& release) { return &releases_.emplace_back(release); }
  Knowledge* add_block() { return &blocks_.emplace_back(); }

  void clear() {
    by_address_.clear();
    links_.clear();
    releases_.clear();
    blocks_.clear();
  }

  // What an acquire of the word at `address` learns.
  const Link* at(std::uint64_t address) const {
    const auto found = by_address_.find(address);
    return found == by_address_.end() ? nullptr : found->second;
  }

  // A strong write; one that reads as well continues what was released there before.
  void publish(std::uint64_t address, const Release* release, Access write, bool reads) {
    const Link*& head = by_address_[address];
    if (!reads) head = nullptr;
    if (release == nullptr) return;
    const bool covered = head && head->release->block == release->block &&
                         std::equal(head->release->clocks.begin(), head->release->clocks.end(),
                                    release->clocks.begin(), std::less_equal<>());
    head = &links_.emplace_back(Link{release, write, covered ? head->earlier : head});
  }

 private:
  std::deque<Knowledge> blocks_;
  std::deque<Release> releases_;
  std::deque<Link> links_;
  std::unordered_map<std::uint64_t, const Link*> by_address_;
};

// The clocks of earlier blocks that a block knows in the end.
class KnownBlocks {
 public:
  explicit KnownBlocks(const Knowledge& knowledge) { add(knowledge, knowledge.links.size()); }

  // Whether what `access` of `block` did is known.
  bool knows(std::uint32_t block, Access access) {
    collect();
    const auto found = blocks_.find(block);
    if (found == blocks_.end()) return false;
    const auto& [all, strong] = found->second;
    return access.clock <= all[access.warp] ||
           (access.strong && access.clock <= strong[access.warp]);
  }

 private:
  void add(const Knowledge& knowledge, std::size_t links) {
    std::size_t& done = done_[&knowledge];
    for (; done < links; ++done) open_.push_back(knowledge.links[done]);
  }

  void collect() {
    while (!open_.empty()) {
      const Link* link = open_.back();
      open_.pop_back();
      for (; link && seen_.insert(link).second; link = link->earlier) {
        const Release& release = *link->release;
        auto& [all, strong] = blocks_[release.block];
        for (std::size_t i = 0; i < all.size(); ++i) {
          all[i] = std::max(all[i], release.clocks[i]);
        }
        std::uint32_t& write = strong[link->write.warp];
        write = std::max(write, std::uint32_t(link->write.clock));
        if (release.knowledge) add(*release.knowledge, release.known);
      }
    }
  }

  // Of all accesses, and of strong ones.
  std::unordered_map<std::uint32_t, std::pair<Clocks, Clocks>> blocks_;
  std::unordered_map<const Knowledge*, std::size_t> done_;
  std::unordered_set<const Link*> seen_;
  std::vector<const Link*> open_;
};

// The last accesses of a kind that blocks which have finished made to a page of a buffer.
struct Mark {
  Access access;
  std::uint32_t block = 0;
};

struct FinishedPage {
  std::unique_ptr<ShadowPage<Mark>> writes;
  std::unique_ptr<ShadowPage<Mark>> strongs;
  std::unique_ptr<ShadowPage<Mark>> reads;
};

}  // namespace evsam::simt
