// One parallel loop. The OpenMP runtime is the one that torch has loaded; without OpenMP the loop is serial.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
constexpr bool kHasOpenMP = true;
#else
constexpr bool kHasOpenMP = false;
#endif

// f(0), .., f(n - 1) in any order. Iterations write to disjoint memory and share nothing else, so neither the
// number of threads nor the schedule can change a result.
template <class F>
inline void parallel_for(int64_t n, int threads, const F& f) {
  if (threads <= 1 || n <= 1 || !kHasOpenMP) {
    for (int64_t i = 0; i < n; i++) f(i);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < n; i++) f(i);
}
