// Lightning-indexer scores of a few heads: keys are the columns of register tiles, and the heads of several
// queries their rows. The keys are transposed once for all of these queries.
//
// A score has the same bits as if its query were scored alone: over d it is summed in order, and over heads
// in the order of sum_each.
#pragma once

#include "indexer.h"

namespace {

constexpr int kFewIndexHeads = 8;

// Consecutive queries of one sequence.
struct QueryGroup {
  const IndexArgs& args;
  int64_t t, queries;
};

template <class Math, class Key>
class GroupScorer {
  using Word = typename Math::Word;
  static constexpr int64_t kKeys = 64;             // at a time
  static constexpr int64_t kRows = 4 * kTileRows;  // query heads at a time: all of their scores fit into L1

 public:
  template <class Memory>
  GroupScorer(const QueryGroup& group, Memory& memory)
      : args_(group.args),
        group_(group),
        words_((args_.d + Math::kPerWord - 1) / Math::kPerWord),
        depth_(round_up(words_, kWidth)),
        queries_(memory.template take<Word>(group.queries * args_.heads * depth_)),
        panels_(memory.template take<Word>(kKeys * depth_)),
        scores_(memory.template take<float>(kRows * kKeys)),
        zeros_(memory.template take<Key>(args_.d)),
        seeing_(memory.template take<int64_t>(group.queries)) {}

  void run(Range range, float* out, int64_t out_query) {
    std::memset(static_cast<void*>(zeros_), 0, args_.d * sizeof(Key));
    for (int64_t i = 0; i < group_.queries; i++)
      for (int64_t h = 0; h < args_.heads; h++)
        to_words<Math>(args_.dtype, index_query(args_, group_.t + i, h), args_.d, query(i, h), depth_);
    const Key *blocks[2][kKeys], **keys = blocks[0], **next = blocks[1];
    locate(range, keys);
    for (int64_t s = range.begin; s < range.end; s += kKeys, std::swap(keys, next)) {
      const int64_t n = std::min(kKeys, range.end - s);
      locate({s + kKeys, range.end}, next);
      const int64_t seeing = find_seeing({s, s + n});
      if (!seeing) continue;
      const bool missing = std::find(keys, keys + n, zeros_) != keys + n;
      pack(keys, n, next);
      const int64_t step = kRows / args_.heads;
      for (int64_t i = 0; i < seeing; i += step) {
        const int64_t queries = std::min(step, seeing - i);
        multiply(seeing_ + i, queries, n);
        for (int64_t j = 0; j < queries; j++) {
          float* scores = out + seeing_[i + j] * out_query + s - range.begin;
          weigh(seeing_[i + j], scores_ + j * args_.heads * kKeys, n, scores);
          if (missing)
            for (int64_t k = 0; k < n; k++)
              if (keys[k] == zeros_) scores[k] = -__builtin_inff();
        }
      }
    }
  }

 private:
  Word* query(int64_t i, int64_t head) const { return queries_ + (i * args_.heads + head) * depth_; }

  // The rows of the first keys of a range, or zeros_ for those that do not exist and beyond the range.
  void locate(Range range, const Key** keys) const {
    std::fill(keys, keys + kKeys, zeros_);
    const int64_t row = table_row(args_, group_.t), n = std::min(kKeys, range.end - range.begin);
    if (row == args_.tables) return;
    for (int64_t i = 0; i < n;) {
      const int64_t offset = (range.begin + i) % args_.page_size, page = page_of(row, range.begin + i);
      const int64_t end = std::min(n, i + args_.page_size - offset);
      if (page < 0 || page >= args_.pages) {
        i = end;
        continue;
      }
      const Key* key = static_cast<const Key*>(args_.k) + page * args_.k_page + offset * args_.k_row;
      for (; i < end; i++, key += args_.k_row) keys[i] = key;
    }
  }
  int64_t page_of(int64_t row, int64_t s) const {
    return args_.block_table ? args_.block_table[row * args_.block_table_row + s / args_.page_size] : 0;
  }

  // Lists the queries that see a part of the range in seeing_ and returns how many.
  int64_t find_seeing(Range range) {
    int64_t n = 0;
    for (int64_t i = 0; i < group_.queries; i++) {
      const Range seen = visible(args_, group_.t + i);
      seeing_[n] = i;
      n += std::max(seen.begin, range.begin) < std::min(seen.end, range.end);
    }
    return n;
  }

  // Transposes n keys into panels and prefetches the next keys.
  void pack(const Key* const* keys, int64_t n, const Key* const* next) {
    const int64_t vectors = round_up(n, kWidth) / kWidth;
    for (int64_t v = 0; v < vectors; v++) {
      const int64_t first = v / kTileVectors * kTileVectors;  // of this vector's panel
      const int64_t width = std::min<int64_t>(kTileVectors, vectors - first) * kWidth;
      Word* column = panels_ + first * kWidth * depth_ + (v - first) * kWidth;
      const Key* const* rows = keys + v * kWidth;
      int64_t k = 0;
      for (; (k + kWidth) * Math::kPerWord <= args_.d; k += kWidth)
        pack_square(column + k * width, width,
                    [&](int i) ALWAYS_INLINE { return load_words<Math>(rows[i] + k * Math::kPerWord); });
      if (k < depth_)
        pack_square(column + k * width, width, [&](int i) {
          Word words[kWidth];
          to_words<Math>(rows[i] + k * Math::kPerWord, args_.d - k * Math::kPerWord, words, kWidth);
          return bit_cast<Float>(words);
        });
      for (int i = 0; i < kWidth; i++) prefetch<2>(next[v * kWidth + i], args_.d * sizeof(Key));
    }
  }
  template <class Row>
  ALWAYS_INLINE static void pack_square(Word* to, int64_t width, const Row& row) {
    Float square[kWidth];
    unrolled<kWidth>([&](auto i) ALWAYS_INLINE { square[i] = row(i); });
    transpose(square);
    unrolled<kWidth>([&](auto i) ALWAYS_INLINE { std::memcpy(to + i * width, square + i, sizeof(Float)); });
  }

  // Fills scores_[query, head][key].
  void multiply(const int64_t* queries, int64_t n_queries, int64_t n) {
    const Word* rows[kRows];
    for (int64_t i = 0; i < n_queries; i++)
      for (int64_t h = 0; h < args_.heads; h++) rows[i * args_.heads + h] = query(queries[i], h);
    multiply_rows<Math>(rows, n_queries * args_.heads, panels_, words_, depth_, round_up(n, kWidth), scores_,
                        kKeys, nullptr);
  }

  // Writes n scores of the group's query i from those of its heads. They are added as score_each adds them,
  // where head h is in lane h % kWidth of a vector.
  void weigh(int64_t i, const float* scores, int64_t n, float* out) const {
    const float* weights = args_.weights + (group_.t + i) * args_.weights_query;
    with_constant<kFewIndexHeads>(static_cast<int>(args_.heads), [&](auto heads) {
      for (int64_t s = 0; s < n; s += kWidth) {
        Float lanes[kWidth];
        unrolled<kWidth>([&](auto lane) ALWAYS_INLINE {
          lanes[lane] = Float{};
          for (int h = lane; h < heads; h += kWidth)
            lanes[lane] = fma(relu(load(scores + h * kKeys + s)), splat(weights[h]), lanes[lane]);
        });
        store_tail(out + s, sum_lanes(lanes), n - s);
      }
    });
  }

  const IndexArgs& args_;
  const QueryGroup& group_;
  int64_t words_, depth_;  // of a key, and padded
  Word *queries_, *panels_;
  float* scores_;
  Key* zeros_;
  int64_t* seeing_;
};

// Consecutive queries of a sequence together if they have few heads, else one at a time. A query alone is not
// worth the transposition of its keys.
template <class Scorer>
void score_plain(const IndexArgs& args, const ScoreBlock& block) {
  if (args.heads < 1 || args.heads > kFewIndexHeads) return score_each<Scorer>(args, block);
  using Group = GroupScorer<typename Scorer::Math, typename Scorer::Key>;
  for (int64_t i = 0; i < block.queries;) {
    QueryGroup group{args, block.t + i, 1};
    const int64_t row = table_row(args, group.t);
    while (i + group.queries < block.queries && table_row(args, group.t + group.queries) == row)
      group.queries++;
    const Range seen = within(visible_to_some(args, group.t, group.queries), block.range);
    float* out = block.out + i * block.out_query + seen.begin - block.range.begin;
    if (group.queries == 1)
      score_each<Scorer>(args, {group.t, 1, seen, out, block.out_query});
    else if (seen.begin < seen.end)
      with_workspace<Group>(group, [&](Group& scorer) { scorer.run(seen, out, block.out_query); });
    i += group.queries;
  }
}

}  // namespace
