// Decoding of quantised caches and index tensors; sparse_attn/formats describes their bytes.
#pragma once

#include <algorithm>

#include "simd.h"

namespace {

typedef uint8_t Bytes __attribute__((vector_size(kWidth)));

#if defined(__AVX512BW__)
// 32 e4m3 codes as bf16, times 2^exponent, which must make each a normal number.
inline __m512i bf16_from_e4m3(__m256i codes, int exponent) {
  const __m512i code = _mm512_cvtepu8_epi16(codes),
                magnitude = _mm512_and_si512(code, _mm512_set1_epi16(0x7f));
  const __mmask32 subnormal = _mm512_cmplt_epi16_mask(magnitude, _mm512_set1_epi16(8));
  const __mmask32 nan = _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x7f));
  const auto biased = [&](int e) { return _mm512_set1_epi16(static_cast<short>((e + exponent) * 128)); };
  const __m512i eighths = _mm512_castsi128_si512(_mm_setr_epi16(  // the bits of m * 2^-9, less those of 2^-9
      0, 0, 128, 128 + 64, 256, 256 + 32, 256 + 64, 256 + 96));
  const __m512i subnormals = _mm512_mask_add_epi16(eighths, 0xfe, eighths, biased(118));
  __m512i bits = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), biased(120));
  bits = _mm512_mask_permutexvar_epi16(bits, subnormal, magnitude, subnormals);
  bits = _mm512_mask_mov_epi16(bits, nan, _mm512_set1_epi16(0x7fc0));
  return _mm512_or_si512(bits, _mm512_and_si512(_mm512_slli_epi16(code, 8), _mm512_set1_epi16(-0x8000)));
}
#else
// kWidth e4m3 codes, exactly. No step has an fp32 subnormal, because the CPU may be set to flush them.
inline Float from_e4m3(const uint8_t* p) {
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  const Int code = __builtin_convertvector(bytes, Int), magnitude = code & 0x7f;
  const Int subnormal = magnitude < 8;  // m * 2^-9 = (1 + m / 8) * 2^-6 - 2^-6
  const Int bits = (magnitude << 20) + (120 << 23) + (subnormal & (1 << 23));
  const Int excess = subnormal & bit_cast<int32_t>(0x1p-6f);
  const Int nan = (magnitude == 0x7f) & 0x7fc00000;
  const Float value = bit_cast<Float>(bits) - bit_cast<Float>(excess);
  return bit_cast<Float>(bit_cast<Int>(value) | nan | (code & 0x80) << 24);
}
#endif

// n codes, a multiple of 16, times a scale.
template <class T>
inline void decode_e4m3(const uint8_t* codes, int64_t n, float scale, T* out) {
#if defined(__AVX512BW__)
  for (int64_t i = 0; i < n; i += 32) {
    const __mmask32 there = n - i < 32 ? 0xffff : ~0u;
    const __m512i bits = bf16_from_e4m3(_mm256_maskz_loadu_epi8(there, codes + i), 0);
    const auto half = [&](__m256i b) {
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16)) * splat(scale);
    };
    store(out + i, half(_mm512_castsi512_si256(bits)));
    if (n - i >= 32) store(out + i + 16, half(_mm512_extracti64x4_epi64(bits, 1)));
  }
#else
  for (int64_t i = 0; i < n; i += kWidth) store(out + i, from_e4m3(codes + i) * scale);
#endif
}

#if defined(__AVX512BF16__)
// For bf16 the scale must be a power of two, or minus one, that makes every value a normal number.
inline void decode_e4m3(const uint8_t* codes, int64_t n, float scale, bfloat16* out) {
  const uint32_t bits = bit_cast<uint32_t>(scale);
  const int exponent = static_cast<int>(bits >> 23 & 0xff) - 127;
  const __m512i sign = _mm512_set1_epi16(static_cast<short>(bits >> 16 & 0x8000));
  for (int64_t i = 0; i < n; i += 32) {
    const __mmask32 there = n - i < 32 ? 0xffff : ~0u;
    const __m512i values = bf16_from_e4m3(_mm256_maskz_loadu_epi8(there, codes + i), exponent);
    _mm512_mask_storeu_epi16(out + i, there, _mm512_xor_si512(values, sign));
  }
}
#endif

inline float from_ue8m0(uint8_t code) {  // 2^(code - 127), 255 is NaN
  return code == 255 ? __builtin_nanf("") : bit_cast<float>(code ? uint32_t{code} << 23 : 0x400000u);
}

template <class T>
inline void decode_bf16(const uint8_t* p, int64_t n, T* out) {
  const bfloat16* values = reinterpret_cast<const bfloat16*>(p);
  for (int64_t i = 0; i < n; i += kWidth) store(out + i, load(values + i));
}

inline Float from_e2m1(Int code) {
  const Int magnitude = code & 7, small = magnitude < 2;  // 0 and 0.5
  const Int bits = (small & -magnitude & (126 << 23)) | (~small & ((magnitude << 22) + (126 << 23)));
  return bit_cast<Float>(bits | (code & 8) << 28);
}

// 2n e2m1 codes in n bytes, n a multiple of 16, the even ones in the low nibbles. scale(i) is the scale of
// value i; 16 values in a row share it.
template <class T, class Scale>
inline void decode_e2m1(const uint8_t* codes, int64_t n, const Scale& scale, T* out) {
  for (int64_t i = 0; i < n; i += 8) {
    uint8_t nibbles[16];
    for (int j = 0; j < 8; j++) nibbles[2 * j] = codes[i + j] & 15, nibbles[2 * j + 1] = codes[i + j] >> 4;
    const float factor = scale(2 * i);
    for (int j = 0; j < 16; j += kWidth) {
      Bytes bytes;
      std::memcpy(&bytes, nibbles + j, sizeof bytes);
      store(out + 2 * i + j, from_e2m1(__builtin_convertvector(bytes, Int)) * factor);
    }
  }
}

#if defined(__AVX512BF16__)
// For bf16, from a table of the 16 values times the scale: exact, because the products have few bits.
template <class Scale>
inline void decode_e2m1(const uint8_t* codes, int64_t n, const Scale& scale, bfloat16* out) {
  const Float values =
      from_e2m1(bit_cast<Int>(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)));
  const __m512i nibble = _mm512_set1_epi16(15);
  const __m512i table_of_lane = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
  for (int64_t i = 0; i < n; i += 16) {
    const __m512i tables =
        (__m512i)_mm512_cvtne2ps_pbh(values * splat(scale(2 * i + 16)), values * splat(scale(2 * i)));
    const __m512i pair = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i)));
    const __m512i apart = _mm512_or_si512(pair, _mm512_slli_epi32(pair, 12));  // a nibble low in each 16 bits
    const __m512i entry = _mm512_or_si512(_mm512_and_si512(apart, nibble), table_of_lane);
    _mm512_storeu_si512(out + 2 * i, _mm512_permutexvar_epi16(entry, tables));
  }
}
#endif

// From the first row of a segment to another one, in elements. row_stride is k_row or v_row.
inline int64_t row_offset(const Segment& s, int64_t row, int64_t row_stride) {
  if (s.page_size <= 1) return row * row_stride;
  return row / s.page_size * s.k_page + row % s.page_size * row_stride;
}

// A row of a latent cache, and its scales if it is quantised.
struct PackedRow {
  RowFormat format;
  const uint8_t *bytes, *scales;
};

inline PackedRow packed_row(const Segment& s, int32_t dtype, int64_t row) {
  const uint8_t* k = static_cast<const uint8_t*>(s.k);
  const auto by_token = [&](int64_t value_bytes) -> PackedRow {
    const uint8_t* bytes = k + row_offset(s, row, s.k_row);
    return {s.format, bytes, bytes + value_bytes};
  };
  const auto by_page = [&](int64_t value_bytes, int64_t scale_bytes) -> PackedRow {
    const int64_t slot = row % s.page_size;
    const uint8_t* page = k + row / s.page_size * s.k_page;
    return {s.format, page + slot * value_bytes, page + s.page_size * value_bytes + slot * scale_bytes};
  };
  switch (s.format) {
    case kPlain:
      return {kPlain, k + row_offset(s, row, s.k_row) * element_bytes(dtype), nullptr};
    case kV32Rows:
    case kNopeRows:
    case kV41Rows:
      return by_token(512);
    case kV41Fp4Rows:
      return by_token(256);
    case kV4Rows:
      return by_page(576, 8);
    case kV41ByPageRows:
      return by_page(512, 16);
    case kV41Fp4ByPageRows:
      return by_page(256, 32);
  }
  __builtin_unreachable();
}

// Writes the d_qk values of a row, which is of the dtype if it is not quantised.
template <class T>
inline void decode_row(const PackedRow& row, int32_t dtype, int64_t d_qk, T* out) {
  const uint8_t *bytes = row.bytes, *packed_scales = row.scales;
  switch (row.format) {
    case kPlain:
      return with_element(dtype, [&](auto element) {
        const auto* values = reinterpret_cast<const decltype(element)*>(bytes);
        for (int64_t i = 0; i < d_qk; i += kWidth)
          store_tail(out + i, load_tail(values + i, d_qk - i), d_qk - i);
      });
    case kV32Rows:     // 512 e4m3, 4 fp32 scales, 64 bf16 (rope)
    case kNopeRows: {  // the same without rope
      float scales[4];
      std::memcpy(scales, packed_scales, sizeof scales);
      for (int i = 0; i < 4; i++) decode_e4m3(bytes + 128 * i, 128, scales[i], out + 128 * i);
      if (row.format == kV32Rows) decode_bf16(bytes + 528, 64, out + 512);
      return;
    }
    case kV4Rows:  // 448 e4m3, 64 bf16 (rope); 7 ue8m0 scales
      for (int i = 0; i < 7; i++) decode_e4m3(bytes + 64 * i, 64, from_ue8m0(packed_scales[i]), out + 64 * i);
      return decode_bf16(bytes + 448, 64, out + 448);
    case kV41Rows:
    case kV41ByPageRows:  // 512 e4m3, 16 ue8m0 scales
      for (int i = 0; i < 16; i++)
        decode_e4m3(bytes + 32 * i, 32, from_ue8m0(packed_scales[i]), out + 32 * i);
      return;
    case kV41Fp4Rows:
    case kV41Fp4ByPageRows: {  // 512 e2m1, 32 e4m3 scales
      float scales[32];
      decode_e4m3(packed_scales, 32, 1.0f, scales);
      return decode_e2m1(bytes, 256, [&](int64_t i) { return scales[i / 16]; }, out);
    }
  }
}

// Whether bf16 holds every value of the row exactly: the scales are powers of two, and not extreme.
inline bool exact_in_bf16(const PackedRow& row) {
  const auto moderate = [](uint32_t exponent) { return exponent > 27 && exponent < 227; };
  switch (row.format) {
    case kV32Rows:
    case kNopeRows: {
      uint32_t scales[4];
      std::memcpy(scales, row.scales, sizeof scales);
      return std::all_of(scales, scales + 4,
                         [&](uint32_t bits) { return !(bits & 0x807fffff) && moderate(bits >> 23); });
    }
    case kV4Rows:
      return std::all_of(row.scales, row.scales + 7, moderate);
    case kV41Rows:
    case kV41ByPageRows:
      return std::all_of(row.scales, row.scales + 16, moderate);
    default:  // bf16 rows, and products of a 2-bit and a 4-bit significand
      return true;
  }
}

// Decodes one index key of d values and returns the factor that its score must be multiplied with: of an fp8
// key the absolute value of its scale, because relu(c x) = c relu(x) for c >= 0.
template <class T>
inline float decode_key(KeyFormat format, const uint8_t* codes, const uint8_t* scales, int64_t d, T* out) {
  if (format == kFp8Keys) {
    float scale;
    std::memcpy(&scale, scales, sizeof scale);
    scale < 0.0f ? decode_e4m3(codes, d, -1.0f, out) : decode_e4m3(codes, d, 1.0f, out);
    return __builtin_fabsf(scale);
  }
  // kMxfp4Keys: one ue8m0 scale per 32 values
  decode_e2m1(codes, d / 2, [&](int64_t i) { return from_ue8m0(scales[i / 32]); }, out);
  return 1.0f;
}

// Decodes one head of a quantised index query; an e4m3 query has no scales here.
template <class T>
inline void decode_query(KeyFormat format, const uint8_t* codes, const uint8_t* scales, int64_t d, T* out) {
  if (format == kFp8Keys)
    decode_e4m3(codes, d, 1.0f, out);
  else
    decode_key(format, codes, scales, d, out);
}

}  // namespace
