// Splits work over threads. Included by kernels: everything is private to the including file.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace evsam::EVSAM_ISA {
namespace {

// Work, in elements touched, below which starting threads costs more than it saves.
constexpr std::int64_t serial_elements = 1 << 15;

// Calls body(member, begin, end) once per member of a team of at most num_threads, so that the calls
// cover [0, count). The body must not throw.
//
// The team has num_threads members or one: libgomp ends the threads that a smaller team leaves idle
// and has to start them again for PyTorch's next operator.
template <class Body>
void parallel_for(std::int64_t count, std::int64_t elements_each, int num_threads, const Body& body) {
#if defined(_OPENMP)
  if (num_threads > 1 && count > 1 && count * elements_each > serial_elements) {
#pragma omp parallel num_threads(num_threads)
    {
      const std::int64_t team = omp_get_num_threads();
      const std::int64_t member = omp_get_thread_num();
      body(member, count * member / team, count * (member + 1) / team);
    }
    return;
  }
#else
  (void)elements_each;
  (void)num_threads;
#endif
  body(std::int64_t{0}, std::int64_t{0}, count);
}

}  // namespace
}  // namespace evsam::EVSAM_ISA
