// The multiply-add rate of registers alone: what the kernels are measured against.
#pragma once

#include "tile.h"

namespace {

// Operations of `rounds` rounds of independent multiply-adds, each of 2 * kPerWord * kWidth.
template <class Math>
int64_t run_peak(int64_t rounds) {
  constexpr int kChains = kWidth == 16 ? 24 : 12;
  alignas(64) typename Math::Word words[kWidth] = {};
  const typename Math::Vector x = Math::load(words);
  Float c[kChains] = {};
  for (int64_t i = 0; i < rounds; i++)
#pragma GCC unroll 24
    for (int j = 0; j < kChains; j++) {
      c[j] = Math::dot(c[j], x, x);
      keep(c[j]);
    }
  return rounds * kChains * 2 * Math::kPerWord * kWidth;
}

}  // namespace
