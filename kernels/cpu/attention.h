// Attention of many heads that share one kv head: the heads are the columns of register tiles.
//
// Selected rows are read where they lie, a block of tokens at a time: scores S [tokens, heads], an online
// softmax down its columns, and the product with the values. An engine does the two products.
#pragma once

#include <cmath>

#include "tile.h"
#include "workspace.h"

namespace {

// The rows that query t selects for one kv head, of both segments: indices outside [0, s_kv) are dropped.
inline int64_t max_rows(const AttentionArgs& args) {
  int64_t n = 0;
  for (int i = 0; i < args.n_segments; i++) n += args.segments[i].topk;
  return n;
}
template <class T>
inline int64_t selected_rows(const AttentionArgs& args, int64_t t, int64_t kv_head, const T** k,
                             const T** v) {
  int64_t n = 0;
  for (int i = 0; i < args.n_segments; i++) {
    const Segment& s = args.segments[i];
    const int32_t* indices = s.indices + t * s.indices_query + kv_head * s.indices_head;
    const T* keys = static_cast<const T*>(s.k) + kv_head * s.k_head;
    const T* values = static_cast<const T*>(s.v) + kv_head * s.v_head;
    const int64_t length = s.topk_length && s.topk_length[t] < s.topk ? s.topk_length[t] : s.topk;
    for (int64_t j = 0; j < length; j++) {
      const int64_t row = indices[j];
      if (row < 0 || row >= s.s_kv) continue;
      k[n] = keys + row * s.k_row;
      v[n++] = values + row * s.v_row;
    }
  }
  return n;
}

constexpr float kLog2e = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;

// Writes lse and returns the factor that turns the accumulated values into the output of a head: top is the
// softmax's reference in units of log2, total the sum of 2^(score - top).
inline float finish_head(const AttentionArgs& args, int64_t t, int64_t head, bool empty, float top,
                         float total) {
  float& lse = args.lse[t * args.lse_query + head];
  lse = empty ? -INFINITY : top * kLn2 + std::log(total);
  if (empty) return 0.0f;
  return (args.attn_sink ? 1.0f / (1.0f + std::exp(args.attn_sink[head] - lse)) : 1.0f) / total;
}

template <class T>
inline void write_head(const AttentionArgs& args, int64_t t, int64_t head, const float* acc, float factor) {
  T* out = static_cast<T*>(args.out) + t * args.out_query + head * args.out_head;
  for (int64_t c = 0; c < args.d_v; c += kWidth)
    store_tail(out + c, factor == 0.0f ? Float{} : load(acc + c) * factor, args.d_v - c);
}

// What an engine works on: heads [head, head + heads) of query t.
struct HeadGroup {
  const AttentionArgs& args;
  int64_t t, head, heads;

  int64_t columns() const { return round_up(heads, kWidth); }
};

// Queries as columns, [depth words][heads], the form in which every engine wants them.
template <class Math, class T>
class Queries {
 public:
  template <class Memory>
  Queries(const HeadGroup& group, int64_t depth_unit, Memory& memory)
      : words((group.args.d_qk + Math::kPerWord - 1) / Math::kPerWord),
        depth(round_up(words, depth_unit)),
        panels(memory.template take<typename Math::Word>(group.columns() * depth)) {}

  void prepare(const HeadGroup& group, typename Math::Word* scratch) {
    const AttentionArgs& args = group.args;
    const T* q = static_cast<const T*>(args.q) + group.t * args.q_query + group.head * args.q_head;
    pack_columns<Math>(q, args.q_head, group.heads, args.d_qk, depth, panels, scratch);
  }

  int64_t words, depth;  // of a head, and padded with zeros
  typename Math::Word* panels;
};

// Value rows as panels of words, panel[token / kPerWord][columns]; zeros for the tokens that pad the block.
template <class Math, class T>
class Values {
 public:
  template <class Memory>
  Values(int64_t d_v, int64_t tokens, Memory& memory)
      : d_v_(d_v),
        panels_(memory.template take<typename Math::Word>(columns() * tokens / Math::kPerWord)),
        zeros_(memory.template take<T>(d_v)) {}

  int64_t columns() const { return round_up(d_v_, Math::kColumnGroup); }
  int64_t steps() const { return steps_; }
  const typename Math::Word* panel(int64_t vector) const { return panels_ + vector * kWidth * steps_; }

  void prepare() { std::memset(static_cast<void*>(zeros_), 0, d_v_ * sizeof(T)); }

  void load_rows(const T* const* rows, int64_t n, int64_t padded) {
    constexpr int64_t kAhead = 8;
    steps_ = padded / Math::kPerWord;
    for (int64_t step = 0; step < steps_; step++) {
      const int64_t i = step * Math::kPerWord;
      for (int64_t j = i + kAhead; j < i + kAhead + Math::kPerWord && j < n; j++)
        prefetch(rows[j], d_v_ * sizeof(T));
      const T* row = i < n ? rows[i] : zeros_;
      for (int64_t c = 0; c < d_v_; c += Math::kColumnGroup) {
        if constexpr (Math::kPerWord == 1) {
          store(at(step, c / kWidth), load_tail(row + c, d_v_ - c));
        } else {
          const T* next = i + 1 < n ? rows[i + 1] : zeros_;
          interleave(row + c, next + c, d_v_ - c, at(step, c / kWidth), at(step, c / kWidth + 1));
        }
      }
    }
  }

 private:
  typename Math::Word* at(int64_t step, int64_t vector) {
    const int64_t first = vector / kTileVectors * kTileVectors, vectors = columns() / kWidth;
    const int64_t width = vectors - first < kTileVectors ? vectors - first : kTileVectors;
    return panels_ + (first * steps_ + step * width + vector - first) * kWidth;
  }

  static void interleave(const T* a, const T* b, int64_t n, typename Math::Word* low,
                         typename Math::Word* high) {
    if (n >= Math::kColumnGroup) return Math::interleave(a, b, low, high);
    T tails[2][Math::kColumnGroup] = {};
    for (int64_t i = 0; i < n; i++) tails[0][i] = a[i], tails[1][i] = b[i];
    Math::interleave(tails[0], tails[1], low, high);
  }

  int64_t d_v_, steps_ = 0;
  typename Math::Word* panels_;
  T* zeros_;
};

// Probabilities of a block, where the softmax leaves them: [tokens / kPerWord][heads] words.
//
// Rounding a probability to bf16 errs as much as rounding the output does. A second word that holds the rest
// removes that error and doubles the product's cost; an engine says for how many rows it affords it.
template <class Math>
class Probabilities;

template <>
class Probabilities<Fp32> {
 public:
  template <class Memory>
  Probabilities(int64_t, int64_t columns, Memory&) : columns_(columns) {}
  void prepare(float* scores, bool) { words_ = scores; }  // in their place
  void put(int64_t token, int64_t column, Float a, Float b) {
    store(words_ + token * columns_ + column, a);
    store(words_ + (token + 1) * columns_ + column, b);
  }
  int parts() const { return 1; }
  const float* part(int) const { return words_; }

 private:
  int64_t columns_;
  float* words_;
};

#if defined(__AVX512BF16__)
template <>
class Probabilities<Bf16Dot> {
 public:
  template <class Memory>
  Probabilities(int64_t tokens, int64_t columns, Memory& memory) : columns_(columns) {
    for (auto& part : parts_) part = memory.template take<uint32_t>(tokens / 2 * columns);
  }
  void prepare(float*, bool fine) { fine_ = fine; }
  void put(int64_t token, int64_t column, Float a, Float b) {
    const int64_t at = token / 2 * columns_ + column;
    const __m512i coarse = Bf16Dot::pair(a, b);
    _mm512_storeu_si512(parts_[0] + at, coarse);
    if (fine_)
      _mm512_storeu_si512(parts_[1] + at,
                          Bf16Dot::pair(a - Bf16Dot::first(coarse), b - Bf16Dot::second(coarse)));
  }
  int parts() const { return fine_ ? 2 : 1; }
  const uint32_t* part(int i) const { return parts_[i]; }

 private:
  int64_t columns_;
  uint32_t* parts_[2];
  bool fine_ = false;
};
#endif

// The two products on register tiles. Keys are read where they lie if their elements are words, else
// converted.
template <class MathType, class T>
class TileEngine {
 public:
  using Math = MathType;
  using Element = T;
  using Word = typename Math::Word;
  static constexpr int kBlock = 96;        // tokens at a time
  static constexpr int kGranule = 2;       // to a multiple of which they are padded
  static constexpr int kFineBelow = 2048;  // rows; see Probabilities
  static constexpr float kSlack = 0.0f;  // see OnlineSoftmax; the largest probability is 1, which bf16 holds

  template <class Memory>
  TileEngine(const HeadGroup& group, Memory& memory)
      : group_(group),
        queries_(group, kWidth, memory),
        keys_(memory.template take<Word>((kBlock > kWidth ? kBlock : kWidth) * queries_.depth)),
        values_(group.args.d_v, kBlock, memory) {}

  void prepare() {
    queries_.prepare(group_, keys_);
    values_.prepare();
  }

  void load_rows(const T* const* k, const T* const* v, int64_t n, int64_t padded) {
    values_.load_rows(v, n, padded);
    for (int64_t i = 0; i < n; i++) {
      if (are_words<Math, T>(group_.args.d_qk)) {
        rows_[i] = reinterpret_cast<const Word*>(k[i]);
      } else {
        to_words<Math>(k[i], group_.args.d_qk, keys_ + i * queries_.depth, queries_.depth);
        rows_[i] = keys_ + i * queries_.depth;
      }
    }
  }

  void scores(int64_t n, float* scores) const {
    const int64_t columns = group_.columns();
    for_each_panel(columns / kWidth, [&](int64_t v, auto width) {
      for_each_tile<Math, width>(rows_, 1, queries_.panels + v * kWidth * queries_.depth, queries_.words, n,
                                 FromZero{}, ToMatrix{scores + v * kWidth, columns});
    });
  }

  // acc = acc * alpha + P V; from zero if alpha is null.
  void accumulate(const Probabilities<Math>& p, const float* alpha, float* acc) const {
    const int64_t columns = group_.columns(), heads = group_.heads;
    const Word* left[kMaxHeads];
    for (int part = 0; part < p.parts(); part++) {
      for (int64_t h = 0; h < heads; h++) left[h] = p.part(part) + h;
      for_each_panel(values_.columns() / kWidth, [&](int64_t v, auto width) {
        float* c = acc + v * kWidth;
        const auto product = [&](const auto& start) {
          for_each_tile<Math, width>(left, columns, values_.panel(v), values_.steps(), heads, start,
                                     ToMatrix{c, values_.columns()});
        };
        if (part > 0)
          product(FromMatrix{c, values_.columns()});
        else if (alpha)
          product(FromScaledMatrix{c, values_.columns(), alpha});
        else
          product(FromZero{});
      });
    }
  }

  int64_t acc_columns() const { return values_.columns(); }

 private:
  const HeadGroup& group_;
  Queries<Math, T> queries_;
  Word* keys_;
  Values<Math, T> values_;
  const Word* rows_[kBlock];
};

// One softmax over the rows that the group's query selects. Its reference, the highest score so far, moves
// when a score exceeds it by more than the engine's slack (in units of log2): moving it costs a pass over
// what was summed.
template <class Engine>
class OnlineSoftmax {
  using T = typename Engine::Element;

 public:
  template <class Memory>
  OnlineSoftmax(const HeadGroup& group, Memory& memory)
      : group_(group),
        columns_(group.columns()),
        k_(memory.template take<const T*>(max_rows(group.args))),
        v_(memory.template take<const T*>(max_rows(group.args))),
        scores_(memory.template take<float>(Engine::kBlock * columns_)),
        top_(memory.template take<float>(columns_)),
        total_(memory.template take<float>(columns_)),
        alpha_(memory.template take<float>(columns_)),
        probabilities_(Engine::kBlock, columns_, memory),
        engine_(group, memory),
        acc_(memory.template take<float>(columns_ * engine_.acc_columns())) {}

  void run() {
    const AttentionArgs& args = group_.args;
    const int64_t kv_head = group_.head / (args.h_q / args.h_kv);
    const int64_t n = selected_rows(args, group_.t, kv_head, k_, v_);
    if (n > 0) engine_.prepare();
    probabilities_.prepare(scores_, n < Engine::kFineBelow);
    for (int64_t h = 0; h < columns_; h++) top_[h] = -3e38f, total_[h] = 0.0f;
    for (int64_t i = 0; i < n; i += Engine::kBlock) {
      const int64_t tokens = n - i < Engine::kBlock ? n - i : Engine::kBlock;
      const int64_t padded = round_up(tokens, Engine::kGranule);
      engine_.load_rows(k_ + i, v_ + i, tokens, padded);
      engine_.scores(tokens, scores_);
      for (int64_t j = tokens * columns_; j < padded * columns_; j++) scores_[j] = -INFINITY;
      for (int64_t h = 0; h < columns_; h += kWidth) block_softmax(h, padded);
      engine_.accumulate(probabilities_, i ? alpha_ : nullptr, acc_);
    }
    for (int64_t h = 0; h < group_.heads; h++) {
      const float factor = finish_head(args, group_.t, group_.head + h, n == 0, top_[h], total_[h]);
      float* row = acc_ + h * engine_.acc_columns();
      if constexpr (Engine::Math::kPerWord == 2)
        for (int64_t c = 0; c < engine_.acc_columns() && n; c += 2 * kWidth) Engine::Math::restore(row + c);
      write_head<T>(args, group_.t, group_.head + h, row, factor);
    }
  }

 private:
  // The kWidth heads from h on: scores to probabilities, and what their sums so far are to be multiplied
  // with.
  void block_softmax(int64_t h, int64_t tokens) {
    const Float scale = splat(group_.args.softmax_scale * kLog2e);
    const float* s = scores_ + h;
    const Float before = load(top_ + h);
    Float highest[2] = {before, before};
    for (int64_t t = 0; t < tokens; t += 2)
      for (int j = 0; j < 2; j++) highest[j] = max(load(s + (t + j) * columns_) * scale, highest[j]);
    const Float highest_of_all = max(highest[0], highest[1]);
    const Float top = select(highest_of_all > before + Engine::kSlack, highest_of_all, before);
    Float sums[2] = {Float{}, Float{}};
    for (int64_t t = 0; t < tokens; t += 2) {
      const Float a = exp2(fma(load(s + t * columns_), scale, -top));
      const Float b = exp2(fma(load(s + (t + 1) * columns_), scale, -top));
      sums[0] += a;
      sums[1] += b;
      probabilities_.put(t, h, a, b);
    }
    const Float alpha = exp2(before - top);
    store(top_ + h, top);
    store(alpha_ + h, alpha);
    store(total_ + h, fma(load(total_ + h), alpha, sums[0] + sums[1]));
  }

  const HeadGroup& group_;
  int64_t columns_;
  const T **k_, **v_;
  float *scores_, *top_, *total_, *alpha_;  // scores [tokens, columns], the others [columns]
  Probabilities<typename Engine::Math> probabilities_;
  Engine engine_;
  float* acc_;  // [columns, acc_columns]
};

template <class Engine>
void attend_heads(const AttentionArgs& args, int64_t t, int64_t head, int64_t head_end) {
  const HeadGroup group{args, t, head, head_end - head};
  with_workspace<OnlineSoftmax<Engine>>(group, [](OnlineSoftmax<Engine>& softmax) { softmax.run(); });
}

}  // namespace
