// Writers: norm, RoPE and the Hadamard matrix of new rows in fp32, and their bytes in a cache.
//
// Given the same fp32 values, the bytes are those of the packers in sparse_attn/formats, for every value:
// NaN, infinities, ties and subnormal numbers included.
#pragma once

#include <cmath>

#include "packed.h"

namespace {

// The width values of a row in fp32, and zeros up to a whole vector.
struct RowBuffer {
  alignas(64) float x[kMaxRow];
};

template <class T>
inline void load_row(const T* from, int64_t n, float* x) {
  for (int64_t i = 0; i < n; i += kWidth) store(x + i, load_tail(from + i, n - i));
}

// x[i] = x[i] * scale * weight[i] + bias[i], without the bias where it is null.
inline void scale_row(const Rows& rows, float scale, float* x) {
  const int64_t n = rows.normalised;
  with_element(rows.weight_dtype, [&](auto element) {
    const auto* weight = static_cast<const decltype(element)*>(rows.norm_weight);
    for (int64_t i = 0; i < n; i += kWidth) store(x + i, load(x + i) * scale * load_tail(weight + i, n - i));
  });
  if (!rows.norm_bias) return;
  with_element(rows.bias_dtype, [&](auto element) {
    const auto* bias = static_cast<const decltype(element)*>(rows.norm_bias);
    for (int64_t i = 0; i < n; i += kWidth) store(x + i, load(x + i) + load_tail(bias + i, n - i));
  });
}

inline void normalise(const Rows& rows, float* x) {
  const int64_t n = rows.normalised;
  if (rows.norm_bias) {
    Float total = {};
    for (int64_t i = 0; i < n; i += kWidth) total += load(x + i);
    const float mean = sum(total) / n;
    for (int64_t i = 0; i < n; i++) x[i] -= mean;
  }
  Float squares = {};
  for (int64_t i = 0; i < n; i += kWidth) squares += load(x + i) * load(x + i);
  scale_row(rows, 1 / std::sqrt(sum(squares) / n + rows.eps), x);
}

inline void rotate(const Rows& rows, int64_t t, float* x) {
  const float* cos = rows.cos + t * rows.cos_token;
  const float* sin = rows.sin + t * rows.sin_token;
  const int64_t step = rows.interleaved ? 2 : 1, apart = rows.interleaved ? 1 : rows.pairs;
  for (int64_t i = 0; i < rows.pairs; i++) {
    float *first = x + i * step, *second = first + apart;
    const float a = *first, b = *second;
    *first = a * cos[i] - b * sin[i];
    *second = a * sin[i] + b * cos[i];
  }
}

// Lane i of the result is lane i ^ Step of x.
template <int Step>
inline Float swap_lanes(Float x) {
#if defined(__clang__)
  Float swapped;
  for (int i = 0; i < kWidth; i++) swapped[i] = x[i ^ Step];
  return swapped;
#else
  Int lane;
  for (int i = 0; i < kWidth; i++) lane[i] = i ^ Step;
  return __builtin_shuffle(x, lane);
#endif
}

// The sums and differences of each lane and its partner, Step lanes apart.
template <int Step>
inline Float butterfly(Float x) {
  if constexpr (Step >= kWidth) {
    return x;
  } else {
    Int sign;
    for (int i = 0; i < kWidth; i++) sign[i] = i & Step ? INT32_MIN : 0;
    return butterfly<2 * Step>(swap_lanes<Step>(x) + bit_cast<Float>(bit_cast<Int>(x) ^ sign));
  }
}

// x[0 .. n) times the Sylvester-Hadamard matrix of 1 and -1, then times factor. The order of the sums is that
// of rope.py.
inline void hadamard(int64_t n, float factor, float* x) {
  for (int64_t i = 0; i < n; i += kWidth) store(x + i, butterfly<1>(load(x + i)));
  for (int64_t step = kWidth; step < n; step *= 2)
    for (int64_t block = 0; block < n; block += 2 * step)
      for (int64_t i = block; i < block + step; i += kWidth) {
        const Float a = load(x + i), b = load(x + i + step);
        store(x + i, a + b);
        store(x + i + step, a - b);
      }
  for (int64_t i = 0; i < n; i += kWidth) store(x + i, load(x + i) * factor);
}

// A row in fp32, ready to be stored.
inline void prepare(const Rows& rows, int64_t t, int64_t head, float* x) {
  with_element(rows.dtype, [&](auto element) {
    const auto* from = static_cast<const decltype(element)*>(rows.x);
    load_row(from + t * rows.x_token + head * rows.x_head, rows.width, x);
  });
  if (rows.norm_weight) normalise(rows, x);
  if (rows.cos) rotate(rows, t, x + rows.rope_start);
  if (rows.hadamard != 0) hadamard(rows.width, rows.hadamard, x);
}

inline Int choose(Int mask, Int a, Int b) { return (mask & a) | (~mask & b); }

// The nearest e4m3 codes, ties to even, saturating; NaN stays NaN.
inline Int to_e4m3(Float x) {
  const Int bits = bit_cast<Int>(x), absolute = bits & 0x7fffffff;
  const Int largest = Int{} + 0x43e00000;  // 448
  const Int magnitude = choose(absolute < largest, absolute, largest);
  const Int normal = ((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - (120 << 3);
  // Below 2^-6, adding 2^14 rounds to a multiple of 2^-9, which lands in the low bits.
  const Int subnormal = bit_cast<Int>(bit_cast<Float>(magnitude) + 0x1p14f) - 0x46800000;
  const Int code = choose(magnitude < 0x3c800000, subnormal, normal);
  return choose(absolute > 0x7f800000, Int{} + 0x7f, code) | (bits >> 24 & 0x80);
}

// The nearest e2m1 codes, ties to even, saturating; NaN becomes 0.
inline Int to_e2m1(Float x) {
  const Int bits = bit_cast<Int>(x);
  const Float magnitude = bit_cast<Float>(bits & 0x7fffffff);
  const Int above = (magnitude > 0.25f) + (magnitude >= 0.75f) + (magnitude > 1.25f) + (magnitude >= 1.75f) +
                    (magnitude > 2.5f) + (magnitude >= 3.5f) + (magnitude > 5.0f);  // -1 for each
  return (bits >> 28 & 8) - above;
}

inline void store_codes(uint8_t* p, Int codes) {
  const Bytes bytes = __builtin_convertvector(codes, Bytes);
  std::memcpy(p, &bytes, sizeof bytes);
}

// The value of a code without its sign.
inline float from_e4m3(uint8_t code) {
  if (code == 0x7f) return __builtin_nanf("");
  return code < 8 ? code * 0x1p-9f : bit_cast<float>((code << 20) + (120 << 23));
}

// The exponent of the least power of two that is not below x, which is positive.
inline uint8_t to_ue8m0(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), exponent = (bits >> 23) + ((bits & 0x7fffff) != 0);
  return exponent < 255 ? exponent : 255;
}

// The largest magnitude of n values; a NaN if there is one.
inline float largest_magnitude(const float* x, int64_t n) {
  Int most = {};  // as integers magnitudes have the same order, and NaN is above infinity
  for (int64_t i = 0; i < n; i += kWidth) {
    const Int magnitude = bit_cast<Int>(load(x + i)) & 0x7fffffff;
    most = choose(magnitude > most, magnitude, most);
  }
  int32_t largest = 0;
  for (int i = 0; i < kWidth; i++) largest = most[i] > largest ? most[i] : largest;
  return bit_cast<float>(largest);
}

// max(amax / the largest code, min_scale) of a group; NaN if a value is NaN or infinite.
inline float group_scale(const Quantisation& how, const float* x) {
  const float quotient = largest_magnitude(x, how.group) / (how.values == kE4m3Values ? 448.0f : 6.0f);
  if (!(quotient < __builtin_inff())) return __builtin_nanf("");
  const float scale = quotient < how.min_scale ? how.min_scale : quotient;
  return how.power_of_two ? from_ue8m0(to_ue8m0(scale)) : scale;
}

// Stores the scale of group i, and returns what values are divided by: the scale that is stored.
inline float store_scale(ScaleKind kind, float scale, uint8_t* scales, int64_t i) {
  if (kind == kFp32Scales) {
    std::memcpy(scales + 4 * i, &scale, sizeof scale);
    return scale;
  }
  if (kind == kUe8m0Scales) {
    scales[i] = to_ue8m0(scale);
    return scale;
  }
  scales[i] = static_cast<uint8_t>(to_e4m3(splat(scale))[0]);
  return from_e4m3(scales[i]);
}

inline void quantise_row(const Quantisation& how, const float* x, uint8_t* values, uint8_t* scales) {
  for (int64_t begin = 0; begin < how.quantised; begin += how.group) {
    const float scale = store_scale(how.scales, group_scale(how, x + begin), scales, begin / how.group);
    if (how.values == kE4m3Values) {
      for (int64_t i = begin; i < begin + how.group; i += kWidth)
        store_codes(values + i, to_e4m3(load(x + i) / scale));
      continue;
    }
    alignas(64) uint8_t codes[kMaxRow];
    for (int64_t i = 0; i < how.group; i += kWidth)
      store_codes(codes + i, to_e2m1(load(x + begin + i) / scale));
    for (int64_t i = 0; i < how.group / 2; i++)
      values[begin / 2 + i] = static_cast<uint8_t>(codes[2 * i] | codes[2 * i + 1] << 4);
  }
}

template <class T>
inline void store_row(const float* x, int64_t n, T* to) {
  for (int64_t i = 0; i < n; i += kWidth) store_tail(to + i, load(x + i), n - i);
}

void write_rows(const WriteArgs& args, int64_t begin, int64_t end) {
  RowBuffer row;
  for (int64_t t = begin; t < end; t++) {
    const int64_t slot = args.slot_bytes == 8 ? static_cast<const int64_t*>(args.slots)[t]
                                              : static_cast<const int32_t*>(args.slots)[t];
    if (slot < 0 || slot >= args.pages * args.page_size) continue;
    prepare(args.rows, t, 0, row.x);
    const int64_t i = slot % args.page_size;
    uint8_t* page = static_cast<uint8_t*>(args.cache) + slot / args.page_size * args.page_step;
    uint8_t* values = page + i * args.values_step;
    if (args.how.values == kPlainValues) {
      with_element(args.cache_dtype, [&](auto element) {
        store_row(row.x, args.rows.width, reinterpret_cast<decltype(element)*>(values));
      });
      continue;
    }
    quantise_row(args.how, row.x, values, page + args.scales_start + i * args.scales_step);
    uint8_t* rope = page + args.rope_start + i * args.rope_step;
    store_row(row.x + args.how.quantised, args.rows.width - args.how.quantised,
              reinterpret_cast<bfloat16*>(rope));
  }
}

void quantise_rows(const QuantiseArgs& args, int64_t begin, int64_t end) {
  RowBuffer row;
  for (int64_t i = begin; i < end; i++) {
    const int64_t t = i / args.rows.heads, head = i % args.rows.heads;
    prepare(args.rows, t, head, row.x);
    float scale;
    quantise_row(args.how, row.x, args.out + t * args.out_token + head * args.out_head,
                 reinterpret_cast<uint8_t*>(&scale));
    args.out_weights[t * args.out_weights_token + head] = args.weights[t * args.weights_token + head] * scale;
  }
}

}  // namespace
