// Launches of kernels that are repeated with other maps.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "evsam/layer_norm_2d.h"
#include "evsam/pages.h"
#include "evsam/relu_linear_attention.h"

class Launches {
 public:
  using Maps = std::vector<std::int64_t>;  // addresses

  // What a launch that is added is given as the address of a map.
  static std::int64_t stand_in(std::int64_t number) { return (number + 1) * alignment; }

  // The map that a pointer stands for. Throws std::out_of_range.
  template <class Pointer>
  static Pointer found(Pointer stand_in, const Maps& maps) {
    if (stand_in == nullptr) return nullptr;
    const auto number = reinterpret_cast<std::uintptr_t>(stand_in) / alignment - 1;
    return reinterpret_cast<Pointer>(maps.at(number));
  }

  void add(std::function<void(const Maps&)> launch) { launches_.push_back(std::move(launch)); }

  // Memory for maps that launches hand on, which the calling thread owns until its next call of this function.
  // A thread keeps its largest piece. Throws std::bad_alloc.
  static std::int64_t memory(std::int64_t bytes) {
    thread_local evsam::Pages pages;
    return reinterpret_cast<std::int64_t>(pages.reserve(static_cast<std::size_t>(bytes)));
  }

  // All of them, in turn.
  void run(const Maps& maps) const {
    for (const auto& launch : launches_) launch(maps);
  }

 private:
  static constexpr std::int64_t alignment = 64;

  std::vector<std::function<void(const Maps&)>> launches_;
};

// Gives a kernel's arguments their maps, by what these are called.
template <class Args>
auto find_maps(Args& args, const Launches::Maps& maps) -> decltype((void)args.residual) {
  args.x = Launches::found(args.x, maps);
  args.y = Launches::found(args.y, maps);
  args.residual = Launches::found(args.residual, maps);
}
inline void find_maps(evsam::LayerNorm2dArgs& args, const Launches::Maps& maps) {
  args.x = Launches::found(args.x, maps);
  args.y = Launches::found(args.y, maps);
}
inline void find_maps(evsam::ReluLinearAttentionArgs& args, const Launches::Maps& maps) {
  args.qkv = Launches::found(args.qkv, maps);
  args.y = Launches::found(args.y, maps);
}

// Launches a kernel without the GIL, at once or, unless that is null, with those that are `later`.
template <class Args>
void launch(void (*kernel)(const Args&), const Args& args, Launches* later) {
  if (later == nullptr) {
    const pybind11::gil_scoped_release without_gil;
    return kernel(args);
  }
  later->add([kernel, args](const Launches::Maps& maps) {
    Args found = args;
    find_maps(found, maps);
    kernel(found);
  });
}
