// Attention of a few heads per kv head. Memory is the limit, so vectors run along the rows and each row is
// read from memory once.
//
// One call serves kv heads that share a selection and lie side by side in a row, so that the row's memory
// page is visited once for all of them.
#pragma once

#include "attention.h"

namespace {

template <class Rows>
class FewHeads {
  using T = typename Rows::Element;
  static constexpr int kBlock = 64;  // rows at a time
  static constexpr int kHeads =
      4;  // of a register tile, which has as many rows or columns as fit beside them
  static constexpr int kTile = kTileRows * kTileVectors;
  static constexpr int kRows = kTile;    // at most
  static constexpr float kSlack = 8.0f;  // see OnlineSoftmax

 public:
  template <class Memory>
  FewHeads(const HeadGroup& unit, Memory& memory)
      : args_(unit.args),
        unit_(unit),
        group_(args_.h_q / args_.h_kv),
        depth_(round_up(args_.d_qk, kWidth)),
        columns_(round_up(args_.d_v, kWidth)),
        rows_(args_, kBlock, memory),
        q_(memory.template take<float>(unit.heads * depth_)),
        acc_(memory.template take<float>(unit.heads * columns_)),
        top_(memory.template take<float>(unit.heads)),
        highest_(memory.template take<float>(unit.heads)),
        total_(memory.template take<float>(unit.heads)),
        sums_(memory.template take<float>((kBlock + kWidth) * kFewHeads * kWidth)),
        scores_(memory.template take<float>(kBlock * kFewHeads)) {
    for (lanes_ = 1; lanes_ < group_;) lanes_ *= 2;
  }

  void run() {
    const int64_t kv_head = unit_.head / group_, kv_heads = unit_.heads / group_;
    const int64_t n = rows_.select(unit_.t, kv_head);
    std::memset(sums_, 0, kBlock * lanes_ * kWidth * sizeof(float));  // those of lanes without a head stay so
    for (int64_t h = 0; h < unit_.heads; h++) {
      to_words<Fp32>(args_.dtype, query_head(args_, unit_.t, unit_.head + h), args_.d_qk, q_ + h * depth_,
                     depth_);
      top_[h] = highest_[h] = -3e38f;
      total_[h] = 0.0f;
    }
    std::memset(acc_, 0, unit_.heads * columns_ * sizeof(float));
    for (int64_t i = 0; i < n; i += kBlock) {
      const int rows = static_cast<int>(n - i < kBlock ? n - i : kBlock);
      rows_.take(i, rows);
      for (int64_t g = 0; g < kv_heads; g++) {
        if (g + 1 < kv_heads)
          next_ = {i, g + 1, rows};
        else
          next_ = {i + kBlock, 0, static_cast<int>(std::clamp<int64_t>(n - i - kBlock, 0, kBlock))};
        scores(g, rows);
        softmax(g, rows);
        accumulate(g, rows);
      }
    }
    for (int64_t h = 0; h < unit_.heads; h++) {
      const float factor =
          finish_head(args_, unit_.t, unit_.head + h, n == 0, top_[h], highest_[h], total_[h]);
      write_head(args_, unit_.t, unit_.head + h, acc_ + h * columns_, factor);
    }
  }

 private:
  // The rows, or vectors of columns, of a register tile beside so many heads: a power of two.
  static constexpr int tile_rows(int heads) {
    int rows = 1;
    while (2 * rows * heads <= kTileRows * kTileVectors) rows *= 2;
    return rows;
  }

  // Fills scores_[row][lane], with a lane for each head of the group.
  void scores(int64_t g, int rows) {
    for (int h = 0; h < group_; h += kHeads) {
      const float* q = q_ + (g * group_ + h) * depth_;
      with_constant<kHeads>(group_ - h < kHeads ? group_ - h : kHeads, [&](auto heads) {
        constexpr int kTogether = tile_rows(heads);
        int r = 0;
        for (; r + kTogether <= rows; r += kTogether) dots<kTogether, heads>(g, q, r, h);
        for (; r < rows; r++) dots<1, heads>(g, q, r, h);
      });
    }
    for (int i = 0; i < rows * lanes_; i += kWidth) store(scores_ + i, sum_each(sums_ + i * kWidth));
  }

  template <int R, int H>
  void dots(int64_t g, const float* q, int row, int head) {
    const T* k[R];
    for (int r = 0; r < R; r++) k[r] = rows_.keys()[row + r] + g * args_.segments[0].k_head;
    for (int r = row; head == 0 && r < row + R && r < next_.rows; r++)
      rows_.prefetch_key(next_.row + r, next_.kv_head);
    Float c[R][H];
    FromZero{}(0, c);
    const auto step = [&](int64_t d, auto&& load_keys) ALWAYS_INLINE {
      Float queries[H];
      unrolled<H>([&](auto h) ALWAYS_INLINE { queries[h] = load(q + h * depth_ + d); });
      unrolled<R>([&](auto r) ALWAYS_INLINE {
        const Float keys = load_keys(k[r] + d);
        unrolled<H>([&](auto h) ALWAYS_INLINE { c[r][h] = fma(keys, queries[h], c[r][h]); });
      });
    };
    const int64_t whole = args_.d_qk / kWidth * kWidth;
    for (int64_t d = 0; d < whole; d += kWidth) step(d, [](const T* p) ALWAYS_INLINE { return load(p); });
    if (whole < args_.d_qk) step(whole, [&](const T* p) { return load_tail(p, args_.d_qk - whole); });
    ToMatrix{sums_ + (row * lanes_ + head) * kWidth, lanes_ * kWidth}(0, c);
  }

  // Turns scores_ into probabilities, and rescales the sums so far where the softmax's reference moves.
  void softmax(int64_t g, int rows) {
    const float scale = args_.softmax_scale * kLog2e;
    const int n = rows * lanes_;
    constexpr int kPattern = kWidth > kFewHeads ? kWidth : kFewHeads;  // lanes repeat after so many
    float found[kPattern], top[kPattern], sums[kPattern];
    for (int i = n; i < round_up(n, kPattern); i++) scores_[i] = no_score(args_);
    for (int j = 0; j < kPattern; j += kWidth) {
      Float best = splat(-3e38f);
      for (int i = j; i < n; i += kPattern) best = max(load(scores_ + i) * scale, best);
      store(found + j, best);
    }
    for (int lane = 0; lane < group_; lane++) {
      float& before = top_[g * group_ + lane];
      float& highest = highest_[g * group_ + lane];
      for (int i = lane; i < kPattern; i += lanes_) highest = found[i] > highest ? found[i] : highest;
      if (highest > before + kSlack) {
        const float alpha = exp2(splat(before - highest))[0];
        total_[g * group_ + lane] *= alpha;
        float* acc = acc_ + (g * group_ + lane) * columns_;
        for (int64_t c = 0; c < columns_; c += kWidth) store(acc + c, load(acc + c) * alpha);
        before = highest;
      }
      top[lane] = before;
    }
    for (int i = 0; i < kPattern; i++) top[i] = i % lanes_ < group_ ? top[i % lanes_] : 0.0f;
    std::memset(sums, 0, sizeof sums);
    for (int i = 0; i < n; i += kPattern)
      for (int j = 0; j < kPattern; j += kWidth) {
        const Float p = exp2(fma(load(scores_ + i + j), splat(scale), -load(top + j)));
        store(scores_ + i + j, p);
        store(sums + j, load(sums + j) + p);
      }
    for (int i = 0; i < kPattern; i++)
      if (i % lanes_ < group_) total_[g * group_ + i % lanes_] += sums[i];
  }

  void accumulate(int64_t g, int rows) {
    for (int h = 0; h < group_; h += kHeads)
      with_constant<kHeads>(group_ - h < kHeads ? group_ - h : kHeads, [&](auto heads) {
        constexpr int kVectors = std::min(4, tile_rows(heads));
        for (int64_t c = 0; c < args_.d_v; c += kVectors * kWidth) {
          const int64_t whole = (args_.d_v - c) / kWidth;
          float* acc = acc_ + (g * group_ + h) * columns_ + c;
          if (whole >= kVectors) {
            add_values<heads, kVectors>(g, rows, c, h, acc, [](const T* p) { return load(p); });
          } else {
            for (int64_t v = 0; v * kWidth < args_.d_v - c; v++) {
              const int64_t left = args_.d_v - c - v * kWidth;
              add_values<heads, 1>(g, rows, c + v * kWidth, h, acc + v * kWidth,
                                   [left](const T* p) { return load_tail(p, left); });
            }
          }
        }
      });
  }

  template <int H, int N, class Load>
  void add_values(int64_t g, int rows, int64_t column, int head, float* acc, Load&& load_values) {
    const int fetched = head == 0 ? next_.rows : 0;
    const T* const* value_rows = rows_.values();
    const int64_t offset = g * args_.segments[0].v_head + column;
    const float* probabilities = scores_ + head;
    Float c[H][N];
    FromMatrix{acc, columns_}(0, c);
    for (int r = 0; r < rows; r++) {
      if (r < fetched) rows_.prefetch_value(next_.row + r, next_.kv_head, column, N * kWidth);
      const T* row = value_rows[r] + offset;
      Float p[H];
      unrolled<H>([&](auto h) ALWAYS_INLINE { p[h] = splat(probabilities[h]); });
      unrolled<N>([&](auto n) ALWAYS_INLINE {
        const Float values = load_values(row + n * kWidth);
        unrolled<H>([&](auto h) ALWAYS_INLINE { c[h][n] = fma(p[h], values, c[h][n]); });
      });
      probabilities += lanes_;
    }
    ToMatrix{acc, columns_}(0, c);
  }

  const AttentionArgs& args_;
  const HeadGroup& unit_;
  int group_;      // heads per kv head
  int lanes_ = 1;  // the power of two that holds them
  int64_t depth_, columns_;
  struct {
    int64_t row, kv_head;
    int rows;
  } next_ = {};  // the next rows; the work on the first heads of a group prefetches them
  Rows rows_;
  float *q_, *acc_;                 // [heads, depth], [heads, columns]
  float *top_, *highest_, *total_;  // [heads]
  float *sums_, *scores_;           // of one block and kv head
};

template <class Rows>
void attend_few_heads(const AttentionArgs& args, int64_t t, int64_t head, int64_t head_end) {
  const HeadGroup unit{args, t, head, head_end - head};
  using Heads = FewHeads<Rows>;
  with_workspace<Heads>(unit, [](Heads& heads) { heads.run(); });
}

}  // namespace
