// Lightning-indexer scores: logits[s] = sum_j weights[j] * relu(q[j] . k[s]).
//
// The heads of one query are the columns of a register tile, a few keys its rows. Relu and weights are
// applied to the accumulators, so only one vector per key leaves the registers.
#pragma once

#include "packed.h"
#include "tile.h"
#include "workspace.h"

namespace {

inline const void* index_query(const IndexArgs& args, int64_t t, int64_t head = 0) {
  return static_cast<const char*>(args.q) +
         (t * args.q_query + head * args.q_head) * element_bytes(args.dtype);
}

// The weights of one query, with zeros at the end of the last vector.
class HeadWeights {
 public:
  template <class Memory>
  HeadWeights(const IndexArgs& args, Memory& memory)
      : heads_(args.heads), weights_(memory.template take<float>(round_up(args.heads, kWidth))) {
    for (int i = 0; i < kWidth; i++) tail_[i] = i < heads_ - (vectors() - 1) * kWidth ? -1 : 0;
  }

  int64_t vectors() const { return round_up(heads_, kWidth) / kWidth; }

  void prepare(const float* weights) {
    std::memset(weights_, 0, vectors() * kWidth * sizeof(float));
    std::memcpy(weights_, weights, heads_ * sizeof(float));
  }

  // Calls f(add), where add(total, scores) = total + weights * relu(scores) over N vectors of heads from v
  // on.
  template <int N, class F>
  void with_vectors(int64_t v, F&& f) const {
    const float* weights = weights_ + v * kWidth;
    const Int last = v + N == vectors() ? tail_ : ~Int{};
    f([&](Float total, const auto& scores) ALWAYS_INLINE {
      unrolled<N - 1>([&](auto n)
                          ALWAYS_INLINE { total = fma(relu(scores(n)), load(weights + n * kWidth), total); });
      const Float masked = bit_cast<Float>(bit_cast<Int>(relu(scores(N - 1))) & last);
      return fma(masked, load(weights + (N - 1) * kWidth), total);
    });
  }

 private:
  int64_t heads_;
  float* weights_;
  Int tail_;  // masks the last vector's lanes that are no heads: there 0 * inf would be NaN
};

// Sums of n keys over the heads of a query, a vector per key. Meanwhile it prefetches as many keys as it
// scores. It is compiled once for all element types.
template <class Math>
[[gnu::noinline]] void score_keys(const typename Math::Word* const* rows, int n, const HeadWeights& weights,
                                  const typename Math::Word* queries, int64_t words, int64_t depth,
                                  float* sums, const Fetch& later) {
  for_each_panel(weights.vectors(), [&](int64_t v, auto width) {
    weights.template with_vectors<width>(v, [&](const auto& add) {
      const auto finish = [&](int first, auto& c) ALWAYS_INLINE {
        unrolled<sizeof c / sizeof c[0]>([&](auto m) ALWAYS_INLINE {
          float* sum = sums + (first + m) * kWidth;
          store(sum, add(v ? load(sum) : Float{}, [&](int i) ALWAYS_INLINE { return c[m][i]; }));
        });
      };
      const Panel<Math, width> panel = {queries + v * kWidth * depth};
      for_each_tile<Math, width>(RowsAt<Math>{rows}, panel, words, n, FromZero{}, finish,
                                 v ? nullptr : &later);
    });
  });
}

// The scorer of one query on register tiles.
template <class MathType, class KeyElement>
class TileScorer {
 public:
  using Math = MathType;
  using Word = typename Math::Word;
  using Key = KeyElement;
  static constexpr int kKeys = 48;     // at a time: a multiple of a tile's rows and of kWidth
  static constexpr int kAhead = 96;    // keys are prefetched so many before they are scored
  static constexpr int kDecoded = 12;  // quantised keys at a time: with the queries they fit into L1

  template <class Memory>
  TileScorer(const IndexArgs& args, Memory& memory)
      : args_(args),
        weights_(args, memory),
        words_((args.d + Math::kPerWord - 1) / Math::kPerWord),
        depth_(round_up(words_, kWidth)),
        queries_(memory.template take<Word>(weights_.vectors() * kWidth * depth_)),
        keys_(memory.template take<Word>(kKeys * depth_)),
        sums_(memory.template take<float>(kKeys * kWidth)) {}

  // Takes the query, whose heads lie `stride` elements apart.
  void prepare(int32_t dtype, const void* heads, int64_t stride, const float* weights) {
    weights_.prepare(weights);
    pack_columns<Math>(dtype, heads, stride, args_.heads, args_.d, depth_, queries_, keys_);
  }

  // Scores n keys that lie `stride` elements apart. The next call's keys lie at `next`, if that is not null.
  void run(const Key* k, int64_t stride, int64_t n, const Key* next, float* out) const {
    const int64_t ahead = n < kAhead ? n : kAhead;
    const Word* rows[kKeys];
    const Key* later[kKeys];
    for (int64_t s = 0; s < n; s += kKeys) {
      const int m = static_cast<int>(n - s < kKeys ? n - s : kKeys);
      for (int i = 0; i < m; i++) {
        const Key* row = k + (s + i) * stride;
        const int64_t past = s + i + ahead - n;
        later[i] = past < 0 ? row + ahead * stride : (next ? next : k) + past * stride;
        if (are_words<Math, Key>(args_.d)) {
          rows[i] = reinterpret_cast<const Word*>(row);
        } else {
          to_words<Math>(row, args_.d, keys_ + i * depth_, depth_);
          rows[i] = keys_ + i * depth_;
        }
      }
      const auto ahead_of = [&](int i) { return later[i]; };
      score_keys<Math>(rows, m, weights_, queries_, words_, depth_, sums_,
                       Fetch(Math::kPerWord * sizeof(Key), ahead_of));
      for (int i = 0; i < m; i += kWidth) store_tail(out + s + i, sum_each(sums_ + i * kWidth), m - i);
    }
  }

 private:
  const IndexArgs& args_;
  HeadWeights weights_;
  int64_t words_, depth_;  // of a key, and padded
  Word* queries_;          // panels of heads
  Word* keys_;
  float* sums_;
};

// Calls f(page, offset in it, n positions, next page or -1, their scores) for positions [begin, end) of query
// t, page by page. Positions in pages that do not exist get -inf, and so do all of a query of no sequence.
template <class F>
void for_each_page(const IndexArgs& args, int64_t t, Range range, float* out, F&& f) {
  const auto [begin, end] = range;
  const int64_t row = table_row(args, t);
  if (row == args.tables) {
    std::fill(out, out + (end - begin), -__builtin_inff());
    return;
  }
  if (!args.block_table) return f(0, begin, end - begin, -1, out);
  const int32_t* table = args.block_table + row * args.block_table_row;
  for (int64_t s = begin; s < end;) {
    const int64_t page = table[s / args.page_size], offset = s % args.page_size;
    const int64_t n = end - s < args.page_size - offset ? end - s : args.page_size - offset;
    const int64_t next = s + n < end ? table[(s + n) / args.page_size] : -1;
    if (page >= 0 && page < args.pages)
      f(page, offset, n, next < args.pages ? next : -1, out + s - begin);
    else
      for (int64_t i = 0; i < n; i++) out[s - begin + i] = -__builtin_inff();
    s += n;
  }
}

// Calls f(query, the positions of the block that it sees, their scores).
template <class F>
void for_each_query(const IndexArgs& args, const ScoreBlock& block, F&& f) {
  for (int64_t i = 0; i < block.queries; i++) {
    const Range mine = within(visible(args, block.t + i), block.range);
    float* out = block.out + i * block.out_query + mine.begin - block.range.begin;
    if (mine.begin < mine.end) f(block.t + i, mine, out);
  }
}

template <class Scorer>
void prepare_plain(const IndexArgs& args, int64_t t, Scorer& scorer) {
  scorer.prepare(args.dtype, index_query(args, t), args.q_head, args.weights + t * args.weights_query);
}

// One query at a time.
template <class Scorer>
void score_each(const IndexArgs& args, const ScoreBlock& block) {
  const auto* k = static_cast<const typename Scorer::Key*>(args.k);
  with_workspace<Scorer>(args, [&](Scorer& scorer) {
    for_each_query(args, block, [&](int64_t t, Range range, float* out) {
      prepare_plain(args, t, scorer);
      for_each_page(args, t, range, out,
                    [&](int64_t page, int64_t offset, int64_t n, int64_t next, float* scores) {
                      const auto* after = next < 0 ? nullptr : k + next * args.k_page;
                      scorer.run(k + page * args.k_page + offset * args.k_row, args.k_row, n, after, scores);
                    });
    });
  });
}

// Decodes a quantised query once, and quantised keys a few at a time. Each score is then multiplied with the
// factor of its key.
template <class Scorer>
class PackedScorer {
  using Key = typename Scorer::Key;

 public:
  template <class Memory>
  PackedScorer(const IndexArgs& args, Memory& memory)
      : args_(args),
        scorer_(args, memory),
        query_(memory.template take<Key>(args.query_format == kPlainKeys ? 0 : args.heads * args.d)),
        keys_(memory.template take<Key>(Scorer::kDecoded * args.d)) {}

  void prepare(int64_t t) {
    if (args_.query_format == kPlainKeys) return prepare_plain(args_, t, scorer_);
    for (int64_t head = 0; head < args_.heads; head++) {
      const uint8_t* codes = static_cast<const uint8_t*>(args_.q) + t * args_.q_query + head * args_.q_head;
      const uint8_t* scales = args_.q_scale + t * args_.q_scale_query + head * args_.q_scale_head;
      decode_query(args_.query_format, codes, scales, args_.d, query_ + head * args_.d);
    }
    scorer_.prepare(kDTypeOf<Key>, query_, args_.d, args_.weights + t * args_.weights_query);
  }

  void run(int64_t page, int64_t offset, int64_t n, float* out) const {
    const uint8_t* codes = static_cast<const uint8_t*>(args_.k) + page * args_.k_page;
    const uint8_t* scales = args_.k_scale + page * args_.k_scale_page;
    float factors[Scorer::kDecoded];
    for (int64_t s = 0; s < n; s += Scorer::kDecoded) {
      const int64_t m = n - s < Scorer::kDecoded ? n - s : Scorer::kDecoded;
      for (int64_t i = 0; i < m; i++) {
        const int64_t slot = offset + s + i;
        factors[i] = decode_key(args_.key_format, codes + slot * args_.k_row,
                                scales + slot * args_.k_scale_row, args_.d, keys_ + i * args_.d);
      }
      scorer_.run(keys_, args_.d, m, nullptr, out + s);
      for (int64_t i = 0; i < m; i++) out[s + i] *= factors[i];
    }
  }

 private:
  const IndexArgs& args_;
  Scorer scorer_;
  Key *query_, *keys_;  // [heads, d], [kDecoded, d]
};

template <class Scorer>
void score_packed(const IndexArgs& args, const ScoreBlock& block) {
  with_workspace<PackedScorer<Scorer>>(args, [&](PackedScorer<Scorer>& scorer) {
    for_each_query(args, block, [&](int64_t t, Range range, float* out) {
      scorer.prepare(t);
      for_each_page(args, t, range, out,
                    [&](int64_t page, int64_t offset, int64_t n, int64_t, float* scores) {
                      scorer.run(page, offset, n, scores);
                    });
    });
  });
}

}  // namespace
