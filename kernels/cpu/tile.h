// Register tiles of matrix products over 32-bit words.
//
// A word is one lane's input of a multiply-add: a float, or a pair of bf16 values for the bf16 dot
// instruction. Both kinds are broadcast from the left operand and loaded from the right one in the same way,
// so one kernel serves both.
#pragma once

#include "simd.h"

namespace {

struct Fp32 {
  using Word = float;
  using Vector = Float;
  static constexpr int kPerWord = 1;
  static Vector load(const Word* p) { return ::load(p); }
  static Vector broadcast(const Word* p) { return splat(*p); }
  static Float dot(Float c, Vector a, Vector b) { return fma(a, b, c); }
};

#if defined(__AVX512BF16__)
#define SPARSE_ATTN_BF16_DOT
struct Bf16Instructions {
  using Vector = __m512bh;
  static Vector load(const uint32_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static Vector broadcast(const uint32_t* p) { return (__m512bh)_mm512_set1_epi32(bit_cast<int32_t>(*p)); }
  static Float dot(Float c, Vector a, Vector b) { return _mm512_dpbf16_ps(c, a, b); }

  static Int pair(Float a, Float b) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(b, a);  // a's lanes, then b's
    return (Int)_mm512_permutexvar_epi16(interleaved_lanes(), both);
  }

  // In the order that unpack instructions give.
  static void interleave(const void* a, const void* b, uint32_t* low, uint32_t* high) {
    const __m512i x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
    _mm512_storeu_si512(low, _mm512_unpacklo_epi16(x, y));
    _mm512_storeu_si512(high, _mm512_unpackhi_epi16(x, y));
  }
  static void restore(float* columns) {
    const __m512i first = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    const __m512 low = _mm512_loadu_ps(columns), high = _mm512_loadu_ps(columns + 16);
    _mm512_storeu_ps(columns, _mm512_permutex2var_ps(low, first, high));
    _mm512_storeu_ps(columns + 16, _mm512_permutex2var_ps(low, second, high));
  }

 private:
  static __m512i interleaved_lanes() {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_or_si512(lane, _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(16)), 16));
  }
};
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define SPARSE_ATTN_BF16_DOT
struct Bf16Instructions {
  using Vector = bfloat16x8_t;
  static Vector load(const uint32_t* p) { return vreinterpretq_bf16_u32(vld1q_u32(p)); }
  // One word: the dot instruction takes it from its lane, so a plain load does.
  static bfloat16x4_t broadcast(const uint32_t* p) {
    return vreinterpret_bf16_f32(vset_lane_f32(bit_cast<float>(*p), vdup_n_f32(0), 0));
  }
  static Float dot(Float c, bfloat16x4_t a, Vector b) { return vbfdotq_lane_f32(c, b, a, 0); }

  static Int pair(Float a, Float b) {
    const uint16x8_t both = vreinterpretq_u16_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(a), b));
    return (Int)vzip1q_u16(both, vextq_u16(both, both, 4));
  }

  static void interleave(const void* a, const void* b, uint32_t* low, uint32_t* high) {
    const uint16x8_t x = vld1q_u16(static_cast<const uint16_t*>(a));
    const uint16x8_t y = vld1q_u16(static_cast<const uint16_t*>(b));
    vst1q_u32(low, vreinterpretq_u32_u16(vzip1q_u16(x, y)));
    vst1q_u32(high, vreinterpretq_u32_u16(vzip2q_u16(x, y)));
  }
  static void restore(float*) {}  // they are in order
};
#endif

#if defined(SPARSE_ATTN_BF16_DOT)
// Of the instructions, pair(a, b) gives in each lane the pair (a, b), rounded to bf16. interleave() pairs the
// next 2 * kWidth columns of two rows as words, in an order of its own; restore() puts as many columns of the
// product back in order.
struct Bf16Dot : Bf16Instructions {
  using Word = uint32_t;
  static constexpr int kPerWord = 2;
  static Float first(Int pair) { return bit_cast<Float>(pair << 16); }
  static Float second(Int pair) { return bit_cast<Float>(pair & bit_cast<int32_t>(0xffff0000u)); }
};
#endif

// The left operand of a product gives element k of row m. Here each row has a pointer of its own.
template <class Math>
struct RowsAt {
  const typename Math::Word* const* rows;

  template <int M>
  struct Tile {
    const typename Math::Word* row[M];
    const typename Math::Word* operator()(int m, int64_t k) const { return row[m] + k; }
  };
  template <int M>
  Tile<M> tile(int m0) const {
    Tile<M> tile;
    for (int m = 0; m < M; m++) tile.row[m] = rows[m0 + m];
    return tile;
  }
};
// Here rows lie side by side, and the elements of a row lie `step` words apart.
template <class Math>
struct Transposed {
  const typename Math::Word* first;
  ptrdiff_t step;

  const typename Math::Word* operator()(int m, int64_t k) const { return first + k * step + m; }
  template <int M>
  Transposed tile(int m0) const {
    return {first + m0, step};
  }
};

// The right operand gives a row of columns for each k. Here rows of N vectors follow each other.
template <class Math, int N>
struct Panel {
  const typename Math::Word* first;
  const typename Math::Word* operator()(int64_t k) const { return first + k * (N * kWidth); }
};
// Here each row lies `offset` words after a pointer of its own.
template <class Math>
struct ColumnsAt {
  const typename Math::Word* const* rows;
  ptrdiff_t offset;
  const typename Math::Word* operator()(int64_t k) const { return rows[k] + offset; }
};

// What to prefetch while rows are multiplied: row m of it begins at address(m), and a cache line of it goes
// with `line` words of the row. The address is found by a call, so that products are not compiled for every
// caller.
class Fetch {
 public:
  // `bytes` for each word.
  template <class Address>
  Fetch(int64_t bytes, const Address& address)
      : line(64 / bytes), context_(&address), call_([](const void* context, int m) {
          return static_cast<const void*>((*static_cast<const Address*>(context))(m));
        }) {}
  const char* address(int m) const { return static_cast<const char*>(call_(context_, m)); }

  int64_t line;

 private:
  const void* context_;
  const void* (*call_)(const void*, int);
};
struct NoFetch {};

// c[m][n] += sum_k a(m, k) * b(k)[n] for begin <= k < end, M rows and N vectors of columns.
template <class Math, int M, int N, class Left, class Right>
ALWAYS_INLINE inline void accumulate(Float (&c)[M][N], const Left& a, const Right& b, int64_t begin,
                                     int64_t end) {
  for (int64_t k = begin; k < end; k++) {
    const typename Math::Word* row = b(k);
    typename Math::Vector columns[N];
    unrolled<N>([&](auto n) ALWAYS_INLINE { columns[n] = Math::load(row + n * kWidth); });
    unrolled<M>([&](auto m) ALWAYS_INLINE {
      const auto left = Math::broadcast(a(m, k));
      unrolled<N>([&](auto n) ALWAYS_INLINE { c[m][n] = Math::dot(c[m][n], left, columns[n]); });
    });
  }
}

// The same for any number of rows, all of k. start(m, c) sets the accumulators for the tile of rows m, m + 1,
// .., and finish(m, c) takes the result. Prefetches are spread over the product, one cache line per row at a
// time, so that the product does not wait for them. `Later` is NoFetch or a pointer to a Fetch, which may be
// null.
template <class Math, int N, class Left, class Right, class Start, class Finish, class Later = NoFetch>
inline void for_each_tile(const Left& a, const Right& b, int64_t depth, int rows, const Start& start,
                          const Finish& finish, Later later = {}) {
  for (int m0 = 0; m0 < rows; m0 += kTileRows) {
    with_constant<kTileRows>(rows - m0 < kTileRows ? rows - m0 : kTileRows, [&](auto tile_rows) {
      const auto left = a.template tile<tile_rows>(m0);
      const Right right = b;
      Float c[tile_rows][N];
      start(m0, c);
      if constexpr (std::is_same_v<Later, NoFetch>) {
        accumulate<Math>(c, left, right, 0, depth);
      } else {
        const int64_t line = later ? later->line : depth;
        const char* address[tile_rows];
        for (int m = 0; later && m < tile_rows; m++) address[m] = later->address(m0 + m);
        for (int64_t k = 0; k < depth; k += line) {
          asm volatile("" ::"r"(address) : "memory");  // keeps them in memory: the rows need the registers
          for (int m = 0; later && m < tile_rows; m++) {
            prefetch_line<2>(address[m]);
            address[m] += 64;
          }
          accumulate<Math>(c, left, right, k, depth - k < line ? depth : k + line);
        }
      }
      finish(m0, c);
    });
  }
}

// Calls f(m, n, c[m][n]) for every vector of a tile.
template <int M, int N, class F>
ALWAYS_INLINE inline void for_each_vector(Float (&c)[M][N], const F& f) {
  unrolled<M>([&](auto m) ALWAYS_INLINE { unrolled<N>([&](auto n) ALWAYS_INLINE { f(m, n, c[m][n]); }); });
}

struct FromZero {
  template <int M, int N>
  ALWAYS_INLINE void operator()(int, Float (&c)[M][N]) const {
    for_each_vector(c, [](int, int, Float& x) ALWAYS_INLINE { x = Float{}; });
  }
};

struct FromMatrix {
  const float* c;
  ptrdiff_t row;
  template <int M, int N>
  ALWAYS_INLINE void operator()(int m0, Float (&tile)[M][N]) const {
    for_each_vector(tile,
                    [&](int m, int n, Float& x) ALWAYS_INLINE { x = load(c + (m0 + m) * row + n * kWidth); });
  }
};

// What the sums so far count: nothing (a product's first block), their values, or those times a row's factor.
struct Sums {
  enum Kind { kNone, kPlain, kScaled } kind;
  const float* c;
  ptrdiff_t row;
  const float* scale;  // of each row
  template <int M, int N>
  ALWAYS_INLINE void operator()(int m0, Float (&tile)[M][N]) const {
    if (kind == kNone) return FromZero{}(m0, tile);
    FromMatrix{c, row}(m0, tile);
    if (kind == kScaled)
      for_each_vector(tile, [&](int m, int, Float& x) ALWAYS_INLINE { x *= splat(scale[m0 + m]); });
  }
};

struct ToMatrix {
  float* c;
  ptrdiff_t row;
  template <int M, int N>
  ALWAYS_INLINE void operator()(int m0, Float (&tile)[M][N]) const {
    for_each_vector(tile,
                    [&](int m, int n, Float& x) ALWAYS_INLINE { store(c + (m0 + m) * row + n * kWidth, x); });
  }
};

// Words from one row to the next, an odd number of cache lines: one column of many rows then falls into many
// sets of the cache.
inline int64_t odd_lines(int64_t words) { return (round_up(words, 16) / 16 | 1) * 16; }

// Calls f(first vector, number of vectors as a compile-time constant) for each panel of columns.
template <class F>
inline void for_each_panel(int64_t vectors, F&& f) {
  for (int64_t v = 0; v < vectors; v += kTileVectors)
    with_constant<kTileVectors>(static_cast<int>(vectors - v < kTileVectors ? vectors - v : kTileVectors),
                                [&](auto width) { f(v, width); });
}

// c[row][column] of n rows of words; the columns lie in panels, each `depth` words deep. Like multiply_values
// it is compiled once for all element types.
template <class Math>
[[gnu::noinline]] void multiply_rows(const typename Math::Word* const* rows, int64_t n,
                                     const typename Math::Word* panels, int64_t words, int64_t depth,
                                     int64_t columns, float* c, int64_t stride, const Fetch* later) {
  for_each_panel(columns / kWidth, [&](int64_t v, auto width) {
    const Panel<Math, width> panel = {panels + v * kWidth * depth};
    for_each_tile<Math, width>(RowsAt<Math>{rows}, panel, words, static_cast<int>(n), FromZero{},
                               ToMatrix{c + v * kWidth, stride}, v ? nullptr : later);
  });
}

// A row of d elements as n_words words, zeros at the end.
template <class Math, class T>
inline void to_words(const T* row, int64_t d, typename Math::Word* words, int64_t n_words) {
  if constexpr (Math::kPerWord == 2 || std::is_same_v<T, float>) {
    std::memcpy(words, row, d * sizeof(T));
    std::memset(reinterpret_cast<T*>(words) + d, 0, n_words * 4 - d * sizeof(T));
  } else {
    int64_t i = 0;
    for (; i + kWidth <= d; i += kWidth) store(words + i, load(row + i));
    for (; i < d; i++) words[i] = to_float(row[i]);
    for (; i < n_words; i++) words[i] = 0;
  }
}

// The same for a row of a dtype that only the call knows.
template <class Math>
inline void to_words(int32_t dtype, const void* row, int64_t d, typename Math::Word* words, int64_t n_words) {
  if constexpr (Math::kPerWord == 2)
    to_words<Math>(static_cast<const bfloat16*>(row), d, words, n_words);
  else
    with_element(dtype, [&](auto element) {
      to_words<Math>(static_cast<const decltype(element)*>(row), d, words, n_words);
    });
}

// A vector of words of a row, in the type that transpose() takes.
template <class Math, class T>
inline Float load_words(const T* row) {
  if constexpr (Math::kPerWord == 2)
    return load(reinterpret_cast<const float*>(row));
  else
    return load(row);
}

// Whether rows of d elements are words already, so that tiles can read them in place.
template <class Math, class T>
inline bool are_words(int64_t d) {
  return sizeof(T) * Math::kPerWord == 4 && d % Math::kPerWord == 0;
}

// [rows, d] -> panels of at most kTileVectors vectors: panel[k][row], with zeros for the missing rows of the
// last vector. `depth` is the number of words per row, a multiple of kWidth; `scratch` has room for kWidth
// rows.
template <class Math>
[[gnu::noinline]] void pack_columns(int32_t dtype, const void* rows, int64_t stride, int64_t n_rows,
                                    int64_t d, int64_t depth, typename Math::Word* panels,
                                    typename Math::Word* scratch) {
  const int64_t vectors = round_up(n_rows, kWidth) / kWidth, row_bytes = stride * element_bytes(dtype);
  for (int64_t v = 0; v < vectors; v++) {
    const int64_t first = v / kTileVectors * kTileVectors;  // of this vector's panel
    const int64_t width = (vectors - first < kTileVectors ? vectors - first : kTileVectors) * kWidth;
    typename Math::Word* column = panels + first * kWidth * depth + (v - first) * kWidth;
    for (int64_t i = 0; i < kWidth; i++) {
      const int64_t row = v * kWidth + i;
      to_words<Math>(dtype, static_cast<const char*>(rows) + row * row_bytes, row < n_rows ? d : 0,
                     scratch + i * depth, depth);
    }
    for (int64_t k = 0; k < depth; k += kWidth) transpose(scratch + k, depth, column + k * width, width);
  }
}

}  // namespace
