// Splits work over threads. Included by kernels: everything is private to the including file.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "simd.h"

namespace evsam::EVSAM_ISA {
namespace {

// Calls body(member) once per member of a team of at most num_threads; member counts from 0. Work in
// it is shared out by for_each. The body must not throw. `operations` is how much there is to do in
// all, roughly: little is done by one.
//
// The team has num_threads members or one: libgomp ends the threads that a smaller team leaves idle
// and has to start them again for PyTorch's next operator.
template <class Body>
void parallel(int num_threads, std::int64_t operations, const Body& body) {
  // Starting threads takes as long as this many.
  constexpr std::int64_t serial_operations = 1 << 15;
#if defined(_OPENMP)
  if (num_threads > 1 && operations > serial_operations) {
#pragma omp parallel num_threads(num_threads)
    body(omp_get_thread_num());
    return;
  }
#else
  (void)num_threads;
  (void)operations;
#endif
  body(0);
}

// In a team: calls body(i) once for every i in [0, count), on whichever member is free, and waits for
// all of them and for what they have sent.
template <class Body>
void for_each(std::int64_t count, const Body& body) {
#if defined(_OPENMP)
#pragma omp for schedule(dynamic, 1) nowait
#endif
  for (std::int64_t i = 0; i < count; ++i) body(i);
  sent();
#if defined(_OPENMP)
#pragma omp barrier
#endif
}

// for_each where all is the same work and little more than to read and write memory: the same member takes the same
// part every time, whose lines its core may hold.
template <class Body>
void for_each_alike(std::int64_t count, const Body& body) {
#if defined(_OPENMP)
#pragma omp for schedule(static)
#endif
  for (std::int64_t i = 0; i < count; ++i) body(i);
}

// Splits [0, count) into runs of `at_once` for for_each. The last runs are shorter, one for every
// thread, so that all threads end together.
struct Runs {
  std::int64_t count, at_once, whole, last;

  Runs(std::int64_t count, std::int64_t at_once, int num_threads)
      : count(count), at_once(at_once), whole(count / at_once / num_threads * num_threads) {
    const std::int64_t rest = count - whole * at_once;
    last = rest < num_threads ? rest : num_threads;
  }

  std::int64_t size() const { return whole + last; }
  std::int64_t begin(std::int64_t run) const {
    if (run <= whole) return run * at_once;
    return whole * at_once + (count - whole * at_once) * (run - whole) / last;
  }
  std::int64_t end(std::int64_t run) const { return begin(run + 1); }
};

}  // namespace
}  // namespace evsam::EVSAM_ISA
