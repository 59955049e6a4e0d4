// The scratch memory of every thread. Compiled once, for all instruction sets.

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace evsam {
namespace {

class Block {
 public:
  Block() = default;
  ~Block() { std::free(memory_); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  char* at_least(std::size_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      memory_ = nullptr;
      size_ = 0;
      const std::size_t rounded = (bytes + page - 1) / page * page;
      memory_ = static_cast<char*>(std::aligned_alloc(page, rounded));
      if (memory_ == nullptr) throw std::bad_alloc();
      size_ = rounded;
#if defined(__linux__)
      // Kernels walk through megabytes of it; a failure costs speed alone.
      (void)madvise(memory_, size_, MADV_HUGEPAGE);
#endif
    }
    return memory_;
  }

 private:
  static constexpr std::size_t page = std::size_t{2} << 20;
  char* memory_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace

char* scratch(std::int64_t bytes) {
  thread_local Block block;
  return block.at_least(static_cast<std::size_t>(bytes));
}

}  // namespace evsam
