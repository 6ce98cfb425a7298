// The widest vector of floats of the instruction set that this translation unit is compiled for, and its
// operations.
//
// Everything in the kernel headers lives in an unnamed namespace: the same template is compiled once for each
// instruction set, and the linker must never merge two of them.
#pragma once

#include <cstddef>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "common.h"

namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
constexpr int kTileVectors = 4;  // a register tile is kTileRows x kTileVectors accumulators
constexpr int kFewHeads = 8;     // of a kv head: more are the columns of register tiles
#elif defined(__AVX2__)
constexpr int kWidth = 8;
constexpr int kTileVectors = 2;
constexpr int kFewHeads = 4;  // five fill most of a vector
#elif defined(__aarch64__)
constexpr int kWidth = 4;
constexpr int kTileVectors = 4;
constexpr int kFewHeads = 8;
#else
constexpr int kWidth = 4;
constexpr int kTileVectors = 2;
constexpr int kFewHeads = 8;
#endif
constexpr int kTileRows = 6;

typedef float Float __attribute__((vector_size(4 * kWidth)));
typedef int32_t Int __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Bits;  // bit i is lane i of a comparison

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline Float splat(float x) { return x - Float{}; }

inline Float load(const float* p) {
  Float x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline void store(float* p, Float x) { std::memcpy(p, &x, sizeof x); }

inline Float select(Int mask, Float a, Float b) {  // each lane of the mask is all ones or all zeros
  return bit_cast<Float>((mask & bit_cast<Int>(a)) | (~mask & bit_cast<Int>(b)));
}

inline float to_float(bfloat16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }
#if defined(__F16C__)
inline float to_float(float16 x) { return _cvtsh_ss(x.bits); }
#elif defined(__aarch64__)
inline float to_float(float16 x) { return bit_cast<__fp16>(x.bits); }
#else
inline float to_float(float16 x) {
  // A shift puts exponent and mantissa in place; the multiplication corrects the bias, for subnormals too.
  const uint32_t magnitude = uint32_t{x.bits} & 0x7fff;
  const float scaled = bit_cast<float>(magnitude << 13) * 0x1p112f;
  const uint32_t special = magnitude >= 0x7c00 ? 0x7f800000 | magnitude << 13 : bit_cast<uint32_t>(scaled);
  return bit_cast<float>(special | (uint32_t{x.bits} & 0x8000) << 16);
}
#endif

// load and store convert from and to the element type; rounding is to nearest even.

#if defined(__AVX512F__)

inline Float load(const bfloat16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline Float load(const float16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store(bfloat16* p, Float x) {
  const __m512i u = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i safe = _mm512_mask_or_epi32(rounded, nan, u, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(safe, 16)));
}
inline void store(float16* p, Float x) {
  const __m256i half = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
}
inline Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
inline Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
inline Bits greater(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline Bits at_least(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }

// Writes the chosen lanes of x one after another, and base + lane for each; returns how many. It may write
// whole vectors, so the buffers need room for kWidth elements.
inline int append(Bits chosen, Float x, int base, float* values, int* positions) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __mmask16 mask = static_cast<__mmask16>(chosen);
  const __m512i position = _mm512_add_epi32(lane, _mm512_set1_epi32(base));
  _mm512_storeu_ps(values, _mm512_maskz_compress_ps(mask, x));
  _mm512_storeu_si512(positions, _mm512_maskz_compress_epi32(mask, position));
  return __builtin_popcount(chosen);
}

// Transposes a square of 32-bit words: row i of the result is column i of rows.
inline void transpose(Float* rows) {
  __m512i r[16], t[16];
  for (int i = 0; i < 16; i++) r[i] = _mm512_castps_si512(rows[i]);
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
  for (int i = 0; i < 16; i++) rows[i] = _mm512_castsi512_ps(r[i]);
}

#else

#if defined(__AVX2__)

inline Float load(const bfloat16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline Float load(const float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store(bfloat16* p, Float x) {
  const __m256i u = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i safe = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(safe, safe), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline void store(float16* p, Float x) {
  const __m128i half = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
}
inline Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
inline Float max(Float a, Float b) { return _mm256_max_ps(a, b); }
inline Bits greater(Float a, Float b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
inline Bits at_least(Float a, Float b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)); }

// Transposes a square of 32-bit words: row i of the result is column i of rows.
inline void transpose(Float* rows) {
  __m256 r[8], t[8];
  for (int i = 0; i < 4; i++) {  // rows i and i + 4 side by side, by halves
    r[i] = _mm256_permute2f128_ps(rows[i], rows[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(rows[i], rows[i + 4], 0x31);
  }
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      rows[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
      rows[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
    }
}

// The lanes that each of the 256 choices takes, a byte for each.
struct ChosenLanes {
  uint64_t of[256] = {};
  constexpr ChosenLanes() {
    for (uint64_t chosen = 0; chosen < 256; chosen++)
      for (uint64_t lane = 0, shift = 0; lane < 8; lane++)
        if (chosen >> lane & 1) of[chosen] |= lane << shift, shift += 8;
  }
};
inline int append(Bits chosen, Float x, int base, float* values, int* positions) {
  static constexpr ChosenLanes lanes;
  const __m256i lane = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(lanes.of[chosen])));
  _mm256_storeu_ps(values, _mm256_permutevar8x32_ps(x, lane));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(positions), _mm256_add_epi32(lane, _mm256_set1_epi32(base)));
  return __builtin_popcount(chosen);
}

#else

inline int append(Bits chosen, Float x, int base, float* values, int* positions) {
  int n = 0;
  for (; chosen; chosen &= chosen - 1, n++) {
    const int lane = __builtin_ctz(chosen);
    values[n] = x[lane];
    positions[n] = base + lane;
  }
  return n;
}

#if defined(__aarch64__)
inline Float load(const bfloat16* p) { return (Float)vshll_n_u16(vld1_u16(&p->bits), 16); }
inline Float load(const float16* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits))); }
inline void store(bfloat16* p, Float x) {
  const uint32x4_t u = vreinterpretq_u32_f32(x), odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(vaddq_u32(u, vdupq_n_u32(0x7fff)), odd);
  const uint32x4_t quiet = vorrq_u32(u, vdupq_n_u32(0x400000));
  vst1_u16(&p->bits, vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), rounded, quiet), 16));
}
inline void store(float16* p, Float x) { vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(x))); }
inline Float fma(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }
inline Bits bits_of(Int lanes) { return vaddvq_s32(lanes & Int{1, 2, 4, 8}); }
#else
inline void from_float(float x, bfloat16* p) {
  const uint32_t u = bit_cast<uint32_t>(x);
  p->bits = x == x ? (u + 0x7fff + (u >> 16 & 1)) >> 16 : (u >> 16 | 0x40);
}
inline void from_float(float x, float16* p) {
  const uint32_t u = bit_cast<uint32_t>(x), sign = u >> 16 & 0x8000;
  const float magnitude = bit_cast<float>(u & 0x7fffffff);
  uint32_t half;
  if (!(magnitude < 65520.0f)) {
    half = magnitude == magnitude ? 0x7c00 : 0x7e00;
  } else if (magnitude < 0x1p-14f) {
    half = bit_cast<uint32_t>(magnitude + 0.5f) - 0x3f000000;  // the addition rounds to a multiple of 2^-24
  } else {
    const uint32_t m = u & 0x7fffffff;
    half = (m + 0xfff + (m >> 13 & 1) - 0x38000000) >> 13;
  }
  p->bits = static_cast<uint16_t>(sign | half);
}
template <class T>
inline Float load_each(const T* p) {
  Float x = {};
  for (int i = 0; i < kWidth; i++) x[i] = to_float(p[i]);
  return x;
}
template <class T>
inline void store_each(T* p, Float x) {
  for (int i = 0; i < kWidth; i++) from_float(x[i], p + i);
}
inline Float load(const bfloat16* p) { return load_each(p); }
inline Float load(const float16* p) { return load_each(p); }
inline void store(bfloat16* p, Float x) { store_each(p, x); }
inline void store(float16* p, Float x) { store_each(p, x); }
inline Float fma(Float a, Float b, Float c) { return a * b + c; }
inline Bits bits_of(Int lanes) {
  Bits bits = 0;
  for (int i = 0; i < kWidth; i++) bits |= (lanes[i] & 1u) << i;
  return bits;
}
#endif
inline void transpose(Float* rows) {
  Float columns[kWidth];
  for (int i = 0; i < kWidth; i++)
    for (int j = 0; j < kWidth; j++) columns[i][j] = rows[j][i];
  std::memcpy(rows, columns, sizeof columns);
}
inline Float max(Float a, Float b) { return select(a > b, a, b); }
inline Bits greater(Float a, Float b) { return bits_of(a > b); }
inline Bits at_least(Float a, Float b) { return bits_of(a >= b); }

#endif
#endif

inline void transpose(const void* from, ptrdiff_t from_words, void* to, ptrdiff_t to_words) {
  Float rows[kWidth];
  for (int i = 0; i < kWidth; i++) rows[i] = load(static_cast<const float*>(from) + i * from_words);
  transpose(rows);
  for (int i = 0; i < kWidth; i++) store(static_cast<float*>(to) + i * to_words, rows[i]);
}

// max(a, b) is b if either is NaN, so max(constant, x) keeps a NaN of x. So does ARM's instruction, which
// gives NaN if either is.
#if defined(__aarch64__)
inline Float relu(Float x) { return vmaxq_f32(Float{}, x); }
#else
inline Float relu(Float x) { return max(Float{}, x); }
#endif

template <class T>
inline Float load_tail(const T* p, int64_t n) {  // lanes from n on are zero
  if (n >= kWidth) return load(p);
  T copy[kWidth] = {};
  for (int64_t i = 0; i < n; i++) copy[i] = p[i];
  return load(copy);
}
template <class T>
inline void store_tail(T* p, Float x, int64_t n) {
  if (n >= kWidth) return store(p, x);
  T copy[kWidth];
  store(copy, x);
  for (int64_t i = 0; i < n; i++) p[i] = copy[i];
}

// Queries and outputs have a dtype that only the call knows: one kernel serves all of them.
template <class T>
constexpr DType kDTypeOf = sizeof(T) == 4                ? kFloat32
                           : std::is_same_v<T, bfloat16> ? kBFloat16
                                                         : kFloat16;

// Calls f with an element of that dtype, for its type.
template <class F>
inline void with_element(int32_t dtype, F&& f) {
  if (dtype == kBFloat16) return f(bfloat16{});
  if (dtype == kFloat16) return f(float16{});
  f(float{});
}

// 2^x for x <= 0 or a little above; 2^-126 for x below -126. Relative error 3e-8.
inline Float exp2(Float x) {
  const Float magic = splat(0x1.8p23f);  // adding it rounds x to an integer in the low bits
  x = max(splat(-126.0f), x);
  const Float shifted = x + magic;
  const Float f = x - (shifted - magic);
  Float p = splat(0.00015353361959569156f);
  p = fma(p, f, splat(0.0013398873852565885f));
  p = fma(p, f, splat(0.00961843691766262f));
  p = fma(p, f, splat(0.055503323674201965f));
  p = fma(p, f, splat(0.24022647738456726f));
  p = fma(p, f, splat(0.6931471824645996f));
  p = fma(p, f, splat(1.0f));
  return p * bit_cast<Float>((bit_cast<Int>(shifted) + 127) << 23);
}

inline float sum(Float x) {
  float lanes[kWidth];
  store(lanes, x);
  for (int half = kWidth / 2; half; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}

// The sum of each of kWidth consecutive vectors. Each vector is summed in the same order, wherever it is.
inline Float sum_each(const float* vectors) {
#if defined(__AVX512F__)
  __m512 a[8], b[4];
  for (int i = 0; i < 8; i++) {
    const __m512 x = load(vectors + 32 * i), y = load(vectors + 32 * i + 16);
    a[i] = _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
  }
  for (int i = 0; i < 4; i++) {
    const __m512d x = _mm512_castps_pd(a[2 * i]), y = _mm512_castps_pd(a[2 * i + 1]);
    b[i] =
        _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
  const auto halves = [](__m512 x, __m512 y) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
  };
  return halves(halves(b[0], b[1]), halves(b[2], b[3]));
#elif defined(__AVX2__)
  __m256 a[4], b[2];
  for (int i = 0; i < 4; i++) {
    const __m256 x = load(vectors + 8 * i), y = load(vectors + 8 * (i + 4));
    a[i] = _mm256_add_ps(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31));
  }
  for (int i = 0; i < 2; i++) {
    const __m256 x = a[2 * i], y = a[2 * i + 1];
    b[i] = _mm256_add_ps(_mm256_unpacklo_ps(x, y), _mm256_unpackhi_ps(x, y));
  }
  return _mm256_add_ps(_mm256_shuffle_ps(b[0], b[1], 0x44), _mm256_shuffle_ps(b[0], b[1], 0xee));
#else
  Float rows[kWidth];
  for (int i = 0; i < kWidth; i++) rows[i] = load(vectors + i * kWidth);
  transpose(rows);
  for (int i = 1; i < kWidth; i++) rows[0] += rows[i];
  return rows[0];
#endif
}

// The sum of kWidth vectors, lane by lane, in the order in which sum_each adds the lanes of one.
inline Float sum_lanes(const Float* x) {
#if defined(__AVX512F__)
  const auto four = [&](int i) { return (x[i] + x[i + 2]) + (x[i + 1] + x[i + 3]); };
  return (four(0) + four(4)) + (four(8) + four(12));
#elif defined(__AVX2__)
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
#else
  Float total = x[0];
  for (int i = 1; i < kWidth; i++) total += x[i];
  return total;
#endif
}

// Prefetches into the L1 cache (Locality 3) or the L2 cache (2).
template <int Locality = 3>
inline void prefetch_line(const void* p) {
  __builtin_prefetch(p, 0, Locality);
  asm volatile("");  // without it GCC deletes calls to functions that only prefetch
}
template <int Locality = 3>
inline void prefetch(const void* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) prefetch_line<Locality>(static_cast<const char*>(row) + i);
}

#if defined(__OPTIMIZE__)
#define ALWAYS_INLINE __attribute__((always_inline))

// Calls f(0), .., f(N - 1) with compile-time constants, so that arrays indexed with them stay in registers. A
// loop would be unrolled too late for that.
template <class F, int... I>
ALWAYS_INLINE inline void unrolled(const F& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
ALWAYS_INLINE inline void unrolled(const F& f) {
  unrolled(f, std::make_integer_sequence<int, N>{});
}
#else  // for builds with sanitizers, which would take minutes to compile the above
#define ALWAYS_INLINE
template <int N, class F>
inline void unrolled(const F& f) {
  for (int i = 0; i < N; i++) f(i);
}
#endif

// Calls f with value as a compile-time constant, for 1 <= value <= Max.
template <int Max, class F>
inline void with_constant(int value, F&& f) {
  if constexpr (Max > 0) {
    if (value == Max)
      f(std::integral_constant<int, Max>{});
    else
      with_constant<Max - 1>(value, f);
  }
}

}  // namespace
