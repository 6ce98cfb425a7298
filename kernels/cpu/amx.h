// AMX: products of 16 x 32 by 32 x 16 bf16 tiles, from the packed forms that the bf16 dot kernels use.
//
// A left tile is 16 rows of 32 values (keys, or probabilities by head), a right tile 16 rows of 16 words
// (queries as columns, or pairs of value rows). Four accumulators, two left and two right tiles fill the
// eight registers.
#pragma once

#include "attention.h"
#include "indexer.h"

namespace {

constexpr int kTileSide = 16;
constexpr int64_t kTileWords = kTileSide * kTileSide;

// GCC's tile intrinsics do not declare that they read memory; this keeps earlier writes before them.
inline void settle(const void* written) { asm volatile("" ::"r"(written) : "memory"); }

// Sets up this thread's tile registers for the length of a C++ scope, then restores the setting before it:
// torch uses them too.
class TileRegisters {
 public:
  TileRegisters() {
    alignas(64) Setting ours = {};
    ours.palette = 1;
    for (int i = 0; i < 8; i++) ours.row_bytes[i] = 64, ours.rows[i] = kTileSide;
    _tile_storeconfig(&before_);
    settle(&before_);
    settle(&ours);
    _tile_loadconfig(&ours);
  }
  ~TileRegisters() {
    settle(&before_);
    if (before_.palette)
      _tile_loadconfig(&before_);
    else
      _tile_release();
  }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

 private:
  struct Setting {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  alignas(64) Setting before_;
};

// Accumulators 0..3: two tiles of rows by Columns (1 or 2) tiles of columns.
template <int Columns>
inline void zero_tiles() {
  _tile_zero(0);
  _tile_zero(2);
  if constexpr (Columns == 2) {
    _tile_zero(1);
    _tile_zero(3);
  }
}
template <int Rows, int Columns>
inline void load_tiles(const float* c, int64_t row) {
  _tile_loadd(0, c, row * 4);
  if constexpr (Columns == 2) _tile_loadd(1, c + kTileSide, row * 4);
  if constexpr (Rows == 2) {
    _tile_loadd(2, c + kTileSide * row, row * 4);
    if constexpr (Columns == 2) _tile_loadd(3, c + kTileSide * row + kTileSide, row * 4);
  }
}
template <int Rows, int Columns>
inline void store_tiles(float* c, int64_t row) {
  _tile_stored(0, c, row * 4);
  if constexpr (Columns == 2) _tile_stored(1, c + kTileSide, row * 4);
  if constexpr (Rows == 2) {
    _tile_stored(2, c + kTileSide * row, row * 4);
    if constexpr (Columns == 2) _tile_stored(3, c + kTileSide * row + kTileSide, row * 4);
  }
}

// One step of 32 products: left tiles at `left` and `second`, right tiles at `right` and 16 words further.
template <int Rows, int Columns>
inline void multiply_tiles(const void* left, const void* second, int64_t left_row, const void* right,
                           int64_t right_row) {
  _tile_loadd(4, left, left_row);
  if constexpr (Rows == 2) _tile_loadd(5, second, left_row);
  _tile_loadd(6, right, right_row);
  if constexpr (Columns == 2) _tile_loadd(7, static_cast<const uint32_t*>(right) + kTileSide, right_row);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (Columns == 2) _tile_dpbf16ps(1, 4, 7);
  if constexpr (Rows == 2) {
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (Columns == 2) _tile_dpbf16ps(3, 5, 7);
  }
}

// 32 rows (keys) by the heads of a packed query: scores[row][head].
inline void score_tiles(const void* keys, int64_t key_bytes, const uint32_t* queries, int64_t depth,
                        int64_t heads, float* scores, int64_t row) {
  const int64_t vectors = heads / kTileSide;
  settle(keys);
  for (int64_t v = 0; v < vectors; v += 2) {
    const int64_t first = v / kTileVectors * kTileVectors;  // of the panel
    const int64_t width = (vectors - first < kTileVectors ? vectors - first : kTileVectors) * kTileSide;
    const uint32_t* panel = queries + first * kTileSide * depth + (v - first) * kTileSide;
    with_constant<2>(vectors - v < 2 ? 1 : 2, [&](auto columns) {
      zero_tiles<columns>();
      for (int64_t k = 0; k < depth; k += kTileSide) {
        const char* left = static_cast<const char*>(keys) + k * 4;
        multiply_tiles<2, columns>(left, left + kTileSide * key_bytes, key_bytes, panel + k * width,
                                   width * 4);
      }
      store_tiles<2, columns>(scores + v * kTileSide, row);
    });
  }
}

// The scorer of one query. While the tiles multiply 32 keys, vector instructions weight and sum the scores of
// the 32 keys before.
class AmxScorer {
 public:
  using Key = bfloat16;
  static constexpr int kKeys = 32;
  static constexpr int kDecoded = kKeys;

  template <class Memory>
  AmxScorer(const IndexArgs& args, Memory& memory)
      : args_(args),
        weights_(args, memory),
        columns_(weights_.vectors() * kTileSide),
        depth_(round_up((args.d + 1) / 2, kTileSide)),
        queries_(memory.template take<uint32_t>(columns_ * depth_)),
        keys_(memory.template take<uint32_t>(kKeys * depth_)),
        sums_(memory.template take<float>(kKeys * kWidth)) {
    for (auto& scores : scores_) scores = memory.template take<float>(kKeys * columns_);
  }

  void prepare(int32_t dtype, const void* heads, int64_t stride, const float* weights) {
    weights_.prepare(weights);
    pack_columns<Bf16Dot>(dtype, heads, stride, args_.heads, args_.d, depth_, queries_, keys_);
  }

  void run(const bfloat16* k, int64_t stride, int64_t n, const bfloat16*, float* out) const {
    const TileRegisters registers;
    for (int64_t s = 0; s < n + kKeys; s += kKeys) {
      if (s < n) multiply(k + s * stride, stride, n - s, scores_[s / kKeys & 1]);
      if (s > 0) weigh(scores_[(s / kKeys - 1) & 1], n - s + kKeys, out + s - kKeys);
    }
  }

 private:
  void multiply(const bfloat16* k, int64_t stride, int64_t n, float* scores) const {
    // No prefetch instructions: they delay the tile loads. The hardware's prefetcher alone is faster.
    if (n >= kKeys && args_.d == 2 * depth_)
      return score_tiles(k, stride * sizeof *k, queries_, depth_, columns_, scores, columns_);
    for (int64_t i = 0; i < kKeys; i++)
      to_words<Bf16Dot>(k + i * stride, i < n ? args_.d : 0, keys_ + i * depth_, depth_);
    score_tiles(keys_, depth_ * 4, queries_, depth_, columns_, scores, columns_);
  }

  void weigh(const float* scores, int64_t n, float* out) const {
    for_each_panel(weights_.vectors(), [&](int64_t v, auto width) {
      weights_.with_vectors<width>(v, [&](const auto& add) {
        for (int i = 0; i < kKeys; i++) {
          const float* row = scores + i * columns_ + v * kWidth;
          float* sum = sums_ + i * kWidth;
          store(sum, add(v ? load(sum) : Float{}, [&](int n) { return load(row + n * kWidth); }));
        }
      });
    });
    for (int i = 0; i < kKeys && i < n; i += kWidth) store_tail(out + i, sum_each(sums_ + i * kWidth), n - i);
  }

  const IndexArgs& args_;
  HeadWeights weights_;
  int64_t columns_, depth_;
  uint32_t *queries_, *keys_;
  float* sums_;
  float* scores_[2];  // [keys, columns]
};

// The two products of attention on tiles. Probabilities always have their second word: it costs little here.
class AmxEngine {
 public:
  using Math = Bf16Dot;
  using Element = bfloat16;
  static constexpr int kBlock = 128;
  static constexpr int kGranule = 32;
  static constexpr int64_t kFineBelow = INT64_MAX;
  static constexpr float kSlack = 8.0f;

  template <class Memory>
  AmxEngine(const HeadGroup& group, Memory& memory)
      : group_(group),
        queries_(group, kTileSide, memory),
        keys_(memory.template take<uint32_t>(kBlock * queries_.depth)),
        values_(group.args, kBlock, memory) {
    for (auto& part : probabilities_) part = memory.template take<uint32_t>(kBlock / 2 * group.columns());
  }

  static bool reads_in_place(const AttentionArgs&) { return false; }

  void prepare() {
    queries_.prepare(group_, keys_);
    values_.prepare();
  }

  void load_rows(const bfloat16* const* k, const bfloat16* const* v, int64_t n, int64_t padded) {
    constexpr int64_t kAhead = 8;
    tokens_ = padded;
    for (int64_t i = 0; i < padded; i++) {
      if (i + kAhead < n) prefetch(k[i + kAhead], group_.args.d_qk * sizeof(bfloat16));
      to_words<Bf16Dot>(k[i < n ? i : 0], i < n ? group_.args.d_qk : 0, keys_ + i * queries_.depth,
                        queries_.depth);
    }
    values_.load_rows(v, n, padded);
  }

  void scores(float* scores, const Fetch&) const {
    const TileRegisters registers;
    for (int64_t t = 0; t < tokens_; t += 2 * kTileSide)
      score_tiles(keys_ + t * queries_.depth, queries_.depth * 4, queries_.panels, queries_.depth,
                  group_.columns(), scores + t * group_.stride(), group_.stride());
  }

  void accumulate(const Probabilities<Bf16Dot>& p, const float* alpha, float* acc) const {
    const int64_t heads = group_.columns(), steps = tokens_ / 32;
    for (int part = 0; part < p.parts(); part++)  // to [head tile][step][head][token pair]
      for (int64_t h = 0; h < heads; h += kTileSide)
        for (int64_t s = 0; s < steps; s++)
          transpose(p.part(part) + s * kTileSide * group_.stride() + h, group_.stride(), left(part, h, s),
                    kTileSide);
    if (alpha)
      for (int64_t h = 0; h < group_.heads; h++)
        if (alpha[h] != 1.0f)
          for (int64_t c = 0; c < acc_columns(); c += kWidth)
            store(acc + h * acc_columns() + c, load(acc + h * acc_columns() + c) * alpha[h]);
    const TileRegisters registers;
    for (int64_t h = 0; h < heads; h += 2 * kTileSide)
      for (int64_t c = 0; c < acc_columns(); c += 2 * kTileSide)
        with_constant<2>(heads - h > kTileSide ? 2 : 1, [&](auto rows) {
          accumulate_tiles<rows>(p.parts(), h, c, alpha != nullptr, acc + h * acc_columns() + c);
        });
  }

  int64_t acc_columns() const { return values_.columns(); }

 private:
  uint32_t* left(int part, int64_t head, int64_t step) const {
    return probabilities_[part] + (head / kTileSide * (tokens_ / 32) + step) * kTileWords;
  }

  template <int Rows>
  void accumulate_tiles(int parts, int64_t head, int64_t column, bool add, float* acc) const {
    const int64_t vector = column / kTileSide, vectors = acc_columns() / kTileSide;
    const int64_t first = vector / kTileVectors * kTileVectors;
    const int64_t width = (vectors - first < kTileVectors ? vectors - first : kTileVectors) * kTileSide;
    const uint32_t* panel = values_.panel<1>(first).first + (vector - first) * kTileSide;
    settle(panel);
    if (add)
      load_tiles<Rows, 2>(acc, acc_columns());
    else
      zero_tiles<2>();
    for (int part = 0; part < parts; part++)
      for (int64_t s = 0; s < tokens_ / 32; s++)
        multiply_tiles<Rows, 2>(left(part, head, s), left(part, head + kTileSide, s), kTileSide * 4,
                                panel + s * kTileSide * width, width * 4);
    store_tiles<Rows, 2>(acc, acc_columns());
  }

  const HeadGroup& group_;
  Queries<Bf16Dot> queries_;
  uint32_t* keys_;
  Values<Bf16Dot, bfloat16> values_;
  uint32_t* probabilities_[2];
  int64_t tokens_ = 0;
};

// Like run_peak, on tiles of zeros.
inline int64_t run_tile_peak(int64_t rounds) {
  const TileRegisters registers;
  zero_tiles<2>();
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (int64_t i = 0; i < rounds; i++) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  return rounds * 4 * 2 * kTileWords * 32;
}

}  // namespace
