// The exact top-k of a row of logits: ties to the lower position, -0 equal to +0, NaN and -inf never chosen.
//
// A sample of the row gives a threshold that a little more than k values reach: the candidates. A radix
// search over them finds the k-th value. If too many values equal the threshold, only those above it are
// candidates; if these are fewer than k, the threshold is the k-th value. If the sample gives a bad threshold
// (clustered values), the whole row is searched, which is slower and gives the same result.
#pragma once

#include "simd.h"
#include "workspace.h"

namespace {

// An unsigned integer for each float, in the same order; NaN is the lowest.
inline Int keys_of(Float x) {
  const Int u = bit_cast<Int>(x + Float{});  // -0 becomes +0
  return (u ^ (u >> 31 | INT32_MIN)) & (x == x);
}
inline float value_of(uint32_t key) { return bit_cast<float>(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

struct Threshold {
  float value;   // the k-th largest
  int64_t ties;  // how many equal to it are among the k largest
};

// The k-th largest of n values, 1 <= k <= n; it may be -inf or NaN. Each round divides the interval of keys
// that contains it into bins, counts the keys in each bin, and continues in the bin of the k-th.
inline Threshold kth_largest(const float* x, int64_t n, int64_t k) {
  constexpr int kBits = 8;
  constexpr uint32_t kBins = 1u << kBits;
  constexpr int64_t kChunk = 256;
  uint32_t keys[kChunk], count[2][kBins];
  const auto for_each_chunk = [&](auto&& f) {
    for (int64_t i = 0; i < n; i += kChunk) {
      const int64_t m = n - i < kChunk ? n - i : kChunk;
      for (int64_t j = 0; j < m; j += kWidth) {
        const Int vector = keys_of(load_tail(x + i + j, m - j));
        std::memcpy(keys + j, &vector, sizeof vector);
      }
      f(m);
    }
  };

  uint32_t low = ~0u, high = 0;
  for_each_chunk([&](int64_t m) {
    for (int64_t j = 0; j < m; j++) low = keys[j] < low ? keys[j] : low;
    for (int64_t j = 0; j < m; j++) high = keys[j] > high ? keys[j] : high;
  });
  uint32_t last = high - low;  // the interval is [low, low + last]
  int shift = 0;
  while (last >> shift >= kBins) shift++;
  for (;;) {
    std::memset(count, 0, sizeof count);
    for_each_chunk([&](int64_t m) {
      for (int64_t j = 0; j < m; j++) {
        const uint32_t offset = keys[j] - low;                // huge for a key below low
        if (offset <= last) count[j & 1][offset >> shift]++;  // two counters: equal keys come in runs
      }
    });
    uint32_t bin = last >> shift;
    for (;; bin--) {
      const int64_t here = int64_t{count[0][bin]} + count[1][bin];
      if (here >= k) break;
      k -= here;
    }
    low += bin << shift;
    if (shift == 0) return {value_of(low), k};
    last = (1u << shift) - 1;
    shift = shift > kBits ? shift - kBits : 0;
  }
}

// Writes the positions of the values above the threshold and of the first `ties` equal to it, and returns how
// many. The position of x[i] is positions[i], or first + i if positions is null.
inline int64_t emit(const float* x, const int32_t* positions, int64_t first, int64_t n, Threshold threshold,
                    int32_t* out) {
  const Float t = splat(threshold.value);
  float values[2 * kWidth];
  int32_t chosen[2 * kWidth];
  int64_t written = 0;
  for (int64_t i = 0; i < n; i += kWidth) {
    const Bits exists = n - i < kWidth ? (1u << (n - i)) - 1 : ~0u;
    const Float v = load_tail(x + i, n - i);
    Bits take = greater(v, t) & exists;
    for (Bits equal = at_least(v, t) & exists & ~take; equal && threshold.ties > 0; equal &= equal - 1) {
      take |= equal & -equal;
      threshold.ties--;
    }
    if (!take) continue;
    const int count = append(take, v, static_cast<int>(i), values, chosen);
    for (int j = 0; j < count; j++)
      out[written + j] = positions ? positions[chosen[j]] : static_cast<int32_t>(first + chosen[j]);
    written += count;
  }
  return written;
}

struct Candidates {
  float* values;
  int32_t* positions;
  template <class Memory>
  Candidates(int64_t room, Memory& memory)
      : values(memory.template take<float>(room)), positions(memory.template take<int32_t>(room)) {}
};

// Writes the values of x that are at least t (`Above`: greater than t) and their indices. Returns how many,
// or -1 if they may need more than `room`.
template <bool Above>
inline int64_t filter(const float* x, int64_t n, float t, int64_t room, float* values, int32_t* positions) {
  const Float threshold = splat(t);
  int64_t kept = 0;
  for (int64_t i = 0; i < n; i += kWidth) {
    const Bits exists = n - i < kWidth ? (1u << (n - i)) - 1 : ~0u;
    const Float v = load_tail(x + i, n - i);
    const Bits take = (Above ? greater(v, threshold) : at_least(v, threshold)) & exists;
    if (kept + kWidth > room) return -1;
    kept += append(take, v, static_cast<int>(i), values + kept, positions + kept);
  }
  return kept;
}

// A value that a little more than k of n values exceed, estimated from short runs spread over the row. The
// margin is a tenth and 4 standard deviations.
inline float sampled_threshold(const float* x, int64_t n, int64_t k) {
  constexpr int64_t kRuns = 64, kRun = 16;
  float sample[kRuns * kRun];
  for (int64_t i = 0; i < kRuns; i++)
    std::memcpy(sample + i * kRun, x + i * (n - kRun) / (kRuns - 1), sizeof(float) * kRun);
  const double expected = static_cast<double>(k) / n * (kRuns * kRun);
  const int64_t rank = static_cast<int64_t>(1.1 * expected + 4 * __builtin_sqrt(expected)) + 4;
  return rank < kRuns * kRun ? kth_largest(sample, kRuns * kRun, rank).value : -__builtin_inff();
}

// Fills out[0 .. topk) with the selected positions, ascending, then with -1. x[i] is at position begin + i.
inline void select_row(const float* x, int64_t begin, int64_t n, int64_t topk, int32_t* out) {
  constexpr float kMinusInfinity = -__builtin_inff();
  int64_t written = -1;
  const float t = n >= 4 * topk && n >= 4096 ? sampled_threshold(x, n, topk) : kMinusInfinity;
  if (t > kMinusInfinity) {
    const int64_t room = 2 * topk + n / 16 + 2 * kWidth;
    with_workspace<Candidates>(room, [&](const Candidates& c) {
      int64_t kept = filter<false>(x, n, t, room, c.values, c.positions);
      if (kept < 0) {
        kept = filter<true>(x, n, t, room, c.values, c.positions);
        if (kept >= 0 && kept < topk) written = emit(x, nullptr, begin, n, {t, topk - kept}, out);
      }
      if (kept < topk) return;
      for (int64_t i = 0; i < kept; i++) c.positions[i] += static_cast<int32_t>(begin);
      written = emit(c.values, c.positions, 0, kept, kth_largest(c.values, kept, topk), out);
    });
  }
  if (written < 0) {
    Threshold threshold = {kMinusInfinity, 0};  // all but NaN and -inf
    if (n > topk) threshold = kth_largest(x, n, topk);
    if (!(threshold.value > kMinusInfinity)) threshold = {kMinusInfinity, 0};
    written = emit(x, nullptr, begin, n, threshold, out);
  }
  for (; written < topk; written++) out[written] = -1;
}

}  // namespace
