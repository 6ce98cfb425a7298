// Attention of many heads that share one kv head: the heads are the columns of register tiles.
//
// Selected rows are read in place, a block of tokens at a time: scores S [tokens, heads], an online softmax
// down its columns, and the product with the values. An engine does the two products.
#pragma once

#include <algorithm>
#include <cmath>

#include "rows.h"
#include "tile.h"
#include "workspace.h"

namespace {

constexpr float kLog2e = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;

// The score of tokens that fill up a block: times the scale it is -inf.
inline float no_score(const AttentionArgs& args) { return args.softmax_scale < 0.0f ? INFINITY : -INFINITY; }

// Writes lse and max_logits of a head and returns the factor that turns its accumulated values into its
// output. In units of log2, top is the softmax's reference and highest the highest score; total is the sum of
// 2^(score - top), and zero if all scores are -inf.
inline float finish_head(const AttentionArgs& args, int64_t t, int64_t head, bool empty, float top,
                         float highest, float total) {
  float& lse = args.lse[t * args.lse_query + head];
  lse = empty ? -INFINITY : top * kLn2 + std::log(total);
  if (args.max_logits)
    args.max_logits[t * args.max_logits_query + head] = empty || total == 0.0f ? -INFINITY : highest * kLn2;
  if (empty) return 0.0f;
  return (args.attn_sink ? 1.0f / (1.0f + std::exp(args.attn_sink[head] - lse)) : 1.0f) / total;
}

inline const void* query_head(const AttentionArgs& args, int64_t t, int64_t head) {
  return static_cast<const char*>(args.q) +
         (t * args.q_query + head * args.q_head) * element_bytes(args.dtype);
}

inline void write_head(const AttentionArgs& args, int64_t t, int64_t head, const float* acc, float factor) {
  with_element(args.dtype, [&](auto element) {
    auto* out = static_cast<decltype(element)*>(args.out) + t * args.out_query + head * args.out_head;
    for (int64_t c = 0; c < args.d_v; c += kWidth)
      store_tail(out + c, factor == 0.0f ? Float{} : load(acc + c) * factor, args.d_v - c);
  });
}

// What an engine works on: heads [head, head + heads) of query t.
struct HeadGroup {
  const AttentionArgs& args;
  int64_t t, head, heads;

  int64_t columns() const { return round_up(heads, kWidth); }
  // Words from one token's scores or probabilities to the next token's.
  int64_t stride() const { return odd_lines(columns()); }
};

// Queries as columns, [depth words][heads], the form that every engine reads.
template <class Math>
class Queries {
 public:
  template <class Memory>
  Queries(const HeadGroup& group, int64_t depth_unit, Memory& memory)
      : words((group.args.d_qk + Math::kPerWord - 1) / Math::kPerWord),
        depth(round_up(words, depth_unit)),
        panels(memory.template take<typename Math::Word>(group.columns() * depth)) {}

  void prepare(const HeadGroup& group, typename Math::Word* scratch) {
    const AttentionArgs& args = group.args;
    pack_columns<Math>(args.dtype, query_head(args, group.t, group.head), args.q_head, group.heads, args.d_qk,
                       depth, panels, scratch);
  }

  int64_t words, depth;  // of a head, and padded with zeros
  typename Math::Word* panels;
};

// Value rows as words, the right operand of P V: words() is what the product reads.
template <class Math, class T>
class Values;

// In fp32, one row per token.
class FloatRows {
 public:
  explicit FloatRows(int64_t d_v) : d_v_(d_v) {}
  int64_t columns() const { return round_up(d_v_, kWidth); }
  int64_t steps() const { return steps_; }
  template <int N>
  ColumnsAt<Fp32> panel(int64_t vector) const {
    return {rows_, vector * kWidth};
  }
  void use_rows(const float* const* rows, int64_t n) { rows_ = rows, steps_ = n; }
  const FloatRows& words() const { return *this; }

 protected:
  int64_t d_v_;

 private:
  int64_t steps_ = 0;
  const float* const* rows_ = nullptr;
};

// Rows are read in place if they hold floats in whole vectors, else converted.
template <class T>
class Values<Fp32, T> : public FloatRows {
 public:
  template <class Memory>
  Values(const AttentionArgs& args, int64_t tokens, Memory& memory)
      : FloatRows(args.d_v),
        in_place_(are_words<Fp32, T>(d_v_) && d_v_ % kWidth == 0),
        stride_(odd_lines(columns())),
        words_(memory.template take<float>(in_place_ ? 0 : tokens * stride_)),
        pointers_(memory.template take<const float*>(tokens)) {}

  void load_rows(const T* const* rows, int64_t n, int64_t) {
    if constexpr (std::is_same_v<T, float>)
      if (in_place_) return use_rows(rows, n);
    for (int64_t i = 0; i < n; i++) {
      to_words<Fp32>(rows[i], d_v_, words_ + i * stride_, columns());
      pointers_[i] = words_ + i * stride_;
    }
    use_rows(pointers_, n);
  }

 private:
  bool in_place_;
  int64_t stride_;
  float* words_;
  const float** pointers_;
};

#if defined(SPARSE_ATTN_BF16_DOT)
// For the bf16 dot, pairs of tokens: panels[token / 2][columns], with zeros for tokens that pad the block.
template <class T>
class Values<Bf16Dot, T> {
 public:
  template <class Memory>
  Values(const AttentionArgs& args, int64_t tokens, Memory& memory)
      : d_v_(args.d_v),
        panels_(memory.template take<uint32_t>(columns() * tokens / 2)),
        zeros_(memory.template take<T>(d_v_)) {}

  int64_t columns() const { return round_up(d_v_, 2 * kWidth); }
  int64_t steps() const { return steps_; }
  template <int N>
  Panel<Bf16Dot, N> panel(int64_t vector) const {
    return {panels_ + vector * kWidth * steps_};
  }

  const Values& words() const { return *this; }

  void prepare() { std::memset(static_cast<void*>(zeros_), 0, d_v_ * sizeof(T)); }

  void load_rows(const T* const* rows, int64_t n, int64_t padded) {
    steps_ = padded / 2;
    for (int64_t step = 0; step < steps_; step++) {
      const int64_t i = 2 * step;
      const T *row = i < n ? rows[i] : zeros_, *next = i + 1 < n ? rows[i + 1] : zeros_;
      for (int64_t c = 0; c < d_v_; c += 2 * kWidth)
        interleave(row + c, next + c, d_v_ - c, at(step, c / kWidth), at(step, c / kWidth + 1));
    }
  }

 private:
  uint32_t* at(int64_t step, int64_t vector) {
    const int64_t first = vector / kTileVectors * kTileVectors, vectors = columns() / kWidth;
    const int64_t width = vectors - first < kTileVectors ? vectors - first : kTileVectors;
    return panels_ + (first * steps_ + step * width + vector - first) * kWidth;
  }

  static void interleave(const T* a, const T* b, int64_t n, uint32_t* low, uint32_t* high) {
    if (n >= 2 * kWidth) return Bf16Dot::interleave(a, b, low, high);
    T tails[2][2 * kWidth] = {};
    for (int64_t i = 0; i < n; i++) tails[0][i] = a[i], tails[1][i] = b[i];
    Bf16Dot::interleave(tails[0], tails[1], low, high);
  }

  int64_t d_v_, steps_ = 0;
  uint32_t* panels_;
  T* zeros_;
};
#endif

// Probabilities of a block, [tokens / kPerWord][stride] words. The softmax writes them.
//
// Rounding probabilities to bf16 adds as large an error as rounding the output. A second word that holds the
// remainder removes this error and doubles the product's cost; an engine uses it for fewer than kFineBelow
// rows.
template <class Math>
class Probabilities;

template <>
class Probabilities<Fp32> {
 public:
  template <class Memory>
  Probabilities(int64_t, int64_t stride, Memory&) : stride_(stride) {}
  void prepare(float* scores, bool) { words_ = scores; }  // the probabilities replace them
  void put(int64_t token, int64_t column, Float a, Float b) {
    store(words_ + token * stride_ + column, a);
    store(words_ + (token + 1) * stride_ + column, b);
  }
  int parts() const { return 1; }
  const float* part(int) const { return words_; }

 private:
  int64_t stride_;
  float* words_;
};

#if defined(SPARSE_ATTN_BF16_DOT)
template <>
class Probabilities<Bf16Dot> {
 public:
  template <class Memory>
  Probabilities(int64_t tokens, int64_t stride, Memory& memory) : stride_(stride) {
    for (auto& part : parts_) part = memory.template take<uint32_t>(tokens / 2 * stride);
  }
  void prepare(float*, bool fine) { fine_ = fine; }
  void put(int64_t token, int64_t column, Float a, Float b) {
    const int64_t at = token / 2 * stride_ + column;
    const Int coarse = Bf16Dot::pair(a, b);
    std::memcpy(parts_[0] + at, &coarse, sizeof coarse);
    if (!fine_) return;
    const Int remainder = Bf16Dot::pair(a - Bf16Dot::first(coarse), b - Bf16Dot::second(coarse));
    std::memcpy(parts_[1] + at, &remainder, sizeof remainder);
  }
  int parts() const { return fine_ ? 2 : 1; }
  const uint32_t* part(int i) const { return parts_[i]; }

 private:
  int64_t stride_;
  uint32_t* parts_[2];
  bool fine_ = false;
};
#endif

// acc[head][column] = what the sums so far count + P V; `alpha` is the factor of each head's sums.
template <class Math, class ValueWords>
[[gnu::noinline]] void multiply_values(const Transposed<Math>& p, const ValueWords& values, int64_t heads,
                                       Sums::Kind kind, const float* alpha, float* acc) {
  const int64_t row = values.columns();
  for_each_panel(row / kWidth, [&](int64_t v, auto width) {
    float* c = acc + v * kWidth;
    for_each_tile<Math, width>(p, values.template panel<width>(v), values.steps(), heads,
                               Sums{kind, c, row, alpha}, ToMatrix{c, row});
  });
}

// The two products on register tiles. Keys are read in place if they are words already, else converted.
template <class MathType, class Row>
class TileEngine {
 public:
  using Math = MathType;
  using Element = Row;
  using Word = typename Math::Word;
  static constexpr int kBlock = 96;        // tokens at a time
  static constexpr int kGranule = 2;       // tokens are padded to a multiple of it
  static constexpr int kFineBelow = 2048;  // rows; see Probabilities
  static constexpr float kSlack = 0.0f;    // see OnlineSoftmax; the largest probability is exactly 1

  template <class Memory>
  TileEngine(const HeadGroup& group, Memory& memory)
      : group_(group),
        queries_(group, kWidth, memory),
        key_stride_(odd_lines(queries_.depth)),
        keys_(memory.template take<Word>((kBlock > kWidth ? kBlock : kWidth) * key_stride_)),
        values_(group.args, kBlock, memory) {}

  static bool reads_in_place(const AttentionArgs& args) { return are_words<Math, Row>(args.d_qk); }

  void prepare() {
    queries_.prepare(group_, keys_);
    if constexpr (Math::kPerWord == 2) values_.prepare();
  }

  void load_rows(const Row* const* k, const Row* const* v, int64_t n, int64_t padded) {
    const bool in_place = reads_in_place(group_.args);
    for (int64_t i = 0; i < n; i++) {
      if (!in_place) to_words<Math>(k[i], group_.args.d_qk, keys_ + i * key_stride_, queries_.depth);
      rows_[i] = in_place ? reinterpret_cast<const Word*>(k[i]) : keys_ + i * key_stride_;
    }
    v_ = v, n_ = n, padded_ = padded;
  }

  void scores(float* scores, const Fetch& later) const {
    multiply_rows<Math>(rows_, n_, queries_.panels, queries_.words, queries_.depth, group_.columns(), scores,
                        group_.stride(), &later);
  }

  // acc = acc * alpha + P V, or acc = P V if alpha is null.
  void accumulate(const Probabilities<Math>& p, const float* alpha, float* acc) {
    if constexpr (Math::kPerWord == 1)
      values_are_keys(group_.args) && !reads_in_place(group_.args) ? values_.use_rows(rows_, n_)
                                                                   : values_.load_rows(v_, n_, padded_);
    else
      values_.load_rows(v_, n_, padded_);
    for (int part = 0; part < p.parts(); part++) {
      const auto kind = part ? Sums::kPlain : alpha ? Sums::kScaled : Sums::kNone;
      multiply_values<Math>({p.part(part), group_.stride()}, values_.words(), group_.heads, kind, alpha, acc);
    }
  }

  int64_t acc_columns() const { return values_.columns(); }

 private:
  const HeadGroup& group_;
  Queries<Math> queries_;
  int64_t key_stride_;
  Word* keys_;
  Values<Math, Row> values_;
  const Word* rows_[kBlock];
  const Row* const* v_ = nullptr;
  int64_t n_ = 0, padded_ = 0;
};

// One softmax over the rows that the group's query selects. Its reference is the highest score so far. It
// moves only when a score exceeds it by more than the engine's kSlack (in units of log2), because each move
// costs a pass over the sums.
template <class Engine, class Rows>
class OnlineSoftmax {
 public:
  template <class Memory>
  OnlineSoftmax(const HeadGroup& group, Memory& memory)
      : group_(group),
        columns_(group.columns()),
        stride_(group.stride()),
        rows_(group.args, Engine::kBlock, memory),
        scores_(memory.template take<float>(Engine::kBlock * stride_)),
        top_(memory.template take<float>(columns_)),
        highest_(memory.template take<float>(columns_)),
        total_(memory.template take<float>(columns_)),
        alpha_(memory.template take<float>(columns_)),
        probabilities_(Engine::kBlock, stride_, memory),
        engine_(group, memory),
        acc_(memory.template take<float>(columns_ * engine_.acc_columns())) {}

  void run() {
    const AttentionArgs& args = group_.args;
    const int64_t kv_head = group_.head / (args.h_q / args.h_kv);
    const int64_t n = rows_.select(group_.t, kv_head);
    for (int64_t i = 0; i < n && i < kTileRows; i++) rows_.prefetch_key(i);
    if (n > 0) engine_.prepare();
    probabilities_.prepare(scores_, n < Engine::kFineBelow);
    for (int64_t h = 0; h < columns_; h++) top_[h] = highest_[h] = -3e38f, total_[h] = 0.0f;
    // Prefetch the next tile's rows if the product is the first to read them, else the next block's.
    const int64_t ahead = Rows::kInPlace && Engine::reads_in_place(args) ? kTileRows : Engine::kBlock;
    for (int64_t i = 0; i < n; i += Engine::kBlock) {
      const int64_t tokens = n - i < Engine::kBlock ? n - i : Engine::kBlock;
      const int64_t padded = round_up(tokens, Engine::kGranule);
      rows_.take(i, tokens);
      engine_.load_rows(rows_.keys(), rows_.values(), tokens, padded);
      const auto next = [&](int64_t j) { return rows_.fetch(std::min(i + ahead + j, n - 1)); };
      engine_.scores(scores_, Fetch(Engine::Math::kPerWord * Rows::kBytes, next));
      for (int64_t j = tokens * stride_; j < padded * stride_; j++) scores_[j] = no_score(args);
      for (int64_t h = 0; h < columns_; h += kWidth) block_softmax(h, padded);
      engine_.accumulate(probabilities_, i ? alpha_ : nullptr, acc_);
    }
    for (int64_t h = 0; h < group_.heads; h++) {
      const float factor =
          finish_head(args, group_.t, group_.head + h, n == 0, top_[h], highest_[h], total_[h]);
      float* row = acc_ + h * engine_.acc_columns();
      if constexpr (Engine::Math::kPerWord == 2)
        for (int64_t c = 0; c < engine_.acc_columns() && n; c += 2 * kWidth) Engine::Math::restore(row + c);
      write_head(args, group_.t, group_.head + h, row, factor);
    }
  }

 private:
  // For kWidth heads from h on, turns scores into probabilities and sets alpha, the factor of the old sums.
  void block_softmax(int64_t h, int64_t tokens) {
    const Float scale = splat(group_.args.softmax_scale * kLog2e);
    const float* s = scores_ + h;
    const Float before = load(top_ + h);
    Float highest[2] = {load(highest_ + h), load(highest_ + h)};
    for (int64_t t = 0; t < tokens; t += 2)
      for (int j = 0; j < 2; j++) highest[j] = max(load(s + (t + j) * stride_) * scale, highest[j]);
    const Float highest_of_all = max(highest[0], highest[1]);
    const Float top = select(highest_of_all > before + Engine::kSlack, highest_of_all, before);
    Float sums[2] = {Float{}, Float{}};
    for (int64_t t = 0; t < tokens; t += 2) {
      const Float a = exp2(fma(load(s + t * stride_), scale, -top));
      const Float b = exp2(fma(load(s + (t + 1) * stride_), scale, -top));
      sums[0] += a;
      sums[1] += b;
      probabilities_.put(t, h, a, b);
    }
    const Float alpha = exp2(before - top);
    store(highest_ + h, highest_of_all);
    store(top_ + h, top);
    store(alpha_ + h, alpha);
    store(total_ + h, fma(load(total_ + h), alpha, sums[0] + sums[1]));
  }

  const HeadGroup& group_;
  int64_t columns_, stride_;
  Rows rows_;
  float *scores_, *top_, *highest_, *total_, *alpha_;  // scores [tokens, stride], the others [columns]
  Probabilities<typename Engine::Math> probabilities_;
  Engine engine_;
  float* acc_;  // [columns, acc_columns]
};

template <class Engine, class Rows>
void attend_heads(const AttentionArgs& args, int64_t t, int64_t head, int64_t head_end) {
  const HeadGroup group{args, t, head, head_end - head};
  using Softmax = OnlineSoftmax<Engine, Rows>;
  with_workspace<Softmax>(group, [](Softmax& softmax) { softmax.run(); });
}

template <class Engine>
void attend_plain(const AttentionArgs& args, int64_t t, int64_t head, int64_t head_end) {
  attend_heads<Engine, PlainRows<typename Engine::Element>>(args, t, head, head_end);
}
template <class Engine>
void attend_packed(const AttentionArgs& args, int64_t t, int64_t head, int64_t head_end) {
  attend_heads<Engine, PackedRows<typename Engine::Element>>(args, t, head, head_end);
}

// Computes in bf16 if it holds the selected rows exactly, else in fp32, by another set's kernel: a cache may
// have any fp32 scale.
template <class Bf16Engine, const Kernels& Fp32Set>
void attend_packed_in_bf16(const AttentionArgs& args, int64_t t, int64_t head, int64_t head_end) {
  const auto attend =
      selected_exact_in_bf16(args, t) ? attend_packed<Bf16Engine> : Fp32Set.attend_packed[kBFloat16];
  attend(args, t, head, head_end);
}

}  // namespace
