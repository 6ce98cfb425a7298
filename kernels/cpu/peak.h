// Multiply-adds in registers alone: their rate is the limit that the kernels are measured against.
#pragma once

#include "tile.h"

namespace {

// Runs `rounds` rounds of independent multiply-adds, each of 2 * kPerWord * kWidth operations, and returns
// the number of operations.
template <class Math>
int64_t run_peak(int64_t rounds) {
  constexpr int kChains = kWidth == 16 ? 24 : 12;
  // Volatile, so that the compiler knows neither the factor nor that all chains start alike.
  volatile typename Math::Word factor = 0;
  volatile float start = 0;
  typename Math::Word words[kWidth];
  for (auto& word : words) word = factor;
  const auto x = Math::broadcast(words);
  const typename Math::Vector y = Math::load(words);
  Float c[kChains];
  for (Float& chain : c) chain = splat(start);
  for (int64_t i = 0; i < rounds; i++)
#pragma GCC unroll 24
    for (int j = 0; j < kChains; j++) c[j] = Math::dot(c[j], x, y);
  for (int j = 1; j < kChains; j++) c[0] += c[j];
  volatile float used = sum(c[0]);
  static_cast<void>(used);
  return rounds * kChains * 2 * Math::kPerWord * kWidth;
}

}  // namespace
