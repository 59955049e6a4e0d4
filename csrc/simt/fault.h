// What a checked kernel did wrong.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>

namespace evsam::simt {

struct Index3 {
  std::uint32_t x = 0, y = 0, z = 0;
  bool operator==(const Index3&) const = default;
};

inline constexpr std::uint32_t NOBODY = ~std::uint32_t(0);

struct Fault {
  std::string_view kind;
  std::string message;
  std::uint32_t instruction = 0;
  std::uint32_t block = 0;  // linear, as are those below
  std::uint32_t thread = 0;
  std::string buffer;       // "shared", "local" or a global buffer; empty where there is none
  std::int64_t offset = 0;  // bytes from its start
  std::uint32_t other_block = NOBODY;
  std::uint32_t other_thread = NOBODY;
  std::uint32_t other_instruction = NOBODY;
  std::uint64_t count = 1;
};

// One fault for each kind, instruction and buffer: the first, and how often it happened.
class FaultLog {
 public:
  using Key = std::pair<std::uint32_t, std::string>;

  template <class Make>
  void add(std::string_view kind, std::uint32_t instruction, std::string_view buffer, Make make) {
    std::string key(kind);
    key += '/';
    key += buffer;
    const auto found = faults_.find({instruction, key});
    if (found != faults_.end()) {
      ++found->second.count;
      return;
    }
    Fault fault = make();
    fault.kind = kind;
    fault.instruction = instruction;
    fault.buffer = buffer;
    faults_.emplace(Key{instruction, std::move(key)}, std::move(fault));
  }

  // Faults of a later block.
  void merge(FaultLog&& later) {
    for (auto& [key, fault] : later.faults_) {
      const auto [mine, fresh] = faults_.try_emplace(key, fault);
      if (!fresh) mine->second.count += fault.count;
    }
    later.faults_.clear();
  }

  const std::map<Key, Fault>& all() const { return faults_; }

 private:
  std::map<Key, Fault> faults_;
};

}  // namespace evsam::simt
