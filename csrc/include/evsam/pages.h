// Memory for what is large and lives long.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>
#include <utility>

// A sanitizer watches the heap alone.
#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
#define EVSAM_MAPS_PAGES 1
#include <sys/mman.h>
#else
#define EVSAM_MAPS_PAGES 0
#endif

namespace evsam {

// A piece of memory aligned to `page`, where the system has pages so large. Straight from the system, to which it
// goes back: between other pieces in a heap it would leave gaps that nothing fits.
class Pages {
 public:
  static constexpr std::size_t page = std::size_t{2} << 20;

  Pages() = default;
  // Uninitialised; none for 0. Throws std::bad_alloc.
  explicit Pages(std::size_t bytes) : size_((bytes + page - 1) / page * page) {
    if (size_ == 0) return;
#if EVSAM_MAPS_PAGES
    void* const mapped =
        mmap(nullptr, size_ + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    char* const begin = static_cast<char*>(mapped);
    const std::size_t before = (page - reinterpret_cast<std::size_t>(begin) % page) % page;
    if (before > 0) (void)munmap(begin, before);
    data_ = begin + before;
    (void)munmap(data_ + size_, page - before);
    // A failure costs speed alone. The last page is not filled.
    if (bytes >= page) (void)madvise(data_, bytes / page * page, MADV_HUGEPAGE);
#else
    data_ = static_cast<char*>(std::aligned_alloc(page, size_));
    if (data_ == nullptr) throw std::bad_alloc();
#endif
  }
  ~Pages() {
#if EVSAM_MAPS_PAGES
    if (data_ != nullptr) (void)munmap(data_, size_);
#else
    std::free(data_);
#endif
  }
  Pages(Pages&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  Pages& operator=(Pages&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }

  // Has at least so many bytes, anew if there were fewer; uninitialised. Throws std::bad_alloc.
  char* reserve(std::size_t bytes) {
    if (bytes > size_) {
      *this = Pages();  // First, so that there are never two.
      *this = Pages(bytes);
    }
    return data_;
  }

  char* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  char* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace evsam
