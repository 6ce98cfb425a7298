// Types that every instruction set shares: the arguments of the operations and the table of their kernels.
#pragma once

#include <algorithm>
#include <cstdint>

// How the rows of a cache are stored; see sparse_attn/formats.
enum RowFormat : int64_t {
  kPlain = 0,
  kV32Rows = 1,
  kV4Rows = 2,
  kV41Rows = 3,
  kV41ByPageRows = 4,
  kNopeRows = 5,
  kV41Fp4Rows = 6,
  kV41Fp4ByPageRows = 7
};
// How index keys and index queries are stored.
enum KeyFormat : int32_t { kPlainKeys = 0, kFp8Keys = 1, kMxfp4Keys = 2 };

enum DType : int32_t { kBFloat16 = 0, kFloat16 = 1, kFloat32 = 2, kDTypes = 3 };

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// Strides count elements, or bytes in quantised tensors. The last dimension of every tensor is contiguous.

// index_logits: q [s_q, heads, d], k [s_kv, d] or pages [pages, page_size, d], weights [s_q, heads].
struct IndexArgs {
  const void* q;
  const void* k;
  const float* weights;
  const int32_t* ks;  // query t sees positions ks[t] <= s < ke[t]
  const int32_t* ke;
  const uint8_t* q_scale;      // [s_q, heads, d / 32] for kMxfp4Keys, else null
  const uint8_t* k_scale;      // [pages, page_size] floats for kFp8Keys, [.., d / 32] for kMxfp4Keys, or null
  const int32_t* block_table;  // [tables, max_pages], or null: then k is one page of s_kv rows
  const int32_t* cu_seqlens_q;  // [tables + 1], or null: see table_row
  int64_t q_query, q_head, k_page, k_row, weights_query, block_table_row;
  int64_t q_scale_query, q_scale_head, k_scale_page, k_scale_row;  // in bytes
  int64_t s_q, heads, d, pages, page_size, tables, width;
  int32_t dtype;                       // of q; bfloat16 if q is quantised, because it is decoded to that
  KeyFormat key_format, query_format;  // queries are quantised only where keys are
};

// One set of rows that queries select from: k [s_kv, h_kv, d_qk], v [s_kv, h_kv, d_v],
// indices [s_q, h_kv, topk]. Where page_size is above 1, or rows are quantised, v is k, row i lies in page
// i / page_size, and pages are k_page elements apart (bytes if quantised).
struct Segment {
  const void* k;
  const void* v;
  const int32_t* indices;
  const int32_t* topk_length;  // [s_q] or null
  int64_t k_row, k_head, v_row, v_head, indices_query, indices_head;
  int64_t s_kv, topk, page_size, k_page;
  RowFormat format;
};

// q [s_q, h_q, d_qk] -> out [s_q, h_q, d_v], lse and, if not null, max_logits [s_q, h_q]; one softmax over
// both segments.
struct AttentionArgs {
  Segment segments[2];
  const void* q;
  const float* attn_sink;  // [h_q] or null
  void* out;
  float* lse;
  float* max_logits;
  int64_t q_query, q_head, out_query, out_head, lse_query, max_logits_query;
  int64_t s_q, h_q, h_kv, d_qk, d_v;
  int32_t n_segments, dtype;
  float softmax_scale;  // not zero
};

inline int64_t element_bytes(int32_t dtype) { return dtype == kFloat32 ? 4 : 2; }

// Positions [begin, end).
struct Range {
  int64_t begin, end;
};

inline Range within(Range range, Range bounds) {
  return {std::clamp(range.begin, bounds.begin, bounds.end), std::clamp(range.end, bounds.begin, bounds.end)};
}

// The positions that query t sees.
inline Range visible(const IndexArgs& args, int64_t t) {
  const int64_t begin = std::clamp<int64_t>(args.ks[t], 0, args.width);
  return {begin, std::max(begin, std::clamp<int64_t>(args.ke[t], 0, args.width))};
}

// From the first position that one of n queries sees to the last.
inline Range visible_to_some(const IndexArgs& args, int64_t t, int64_t n) {
  Range all = {args.width, 0};
  for (int64_t i = t; i < t + n; i++) {
    const Range seen = visible(args, i);
    if (seen.begin < seen.end) all = {std::min(all.begin, seen.begin), std::max(all.end, seen.end)};
  }
  return all.begin < all.end ? all : Range{0, 0};
}

// Scores of consecutive queries at positions within a range: that of query t + i at position s belongs at
// out[i * out_query + s - range.begin].
struct ScoreBlock {
  int64_t t, queries;
  Range range;
  float* out;
  int64_t out_query;
};

struct SelectArgs {
  const float* logits;  // [s_q, s_kv]
  const int32_t* ks;
  const int32_t* ke;
  int32_t* out;  // [s_q, topk]
  int64_t logits_query, out_query, s_q, s_kv, topk;
};

// physical_slots: indices [s_q, topk] -> out [s_q, topk].
struct SlotArgs {
  const int32_t* indices;
  const int32_t* block_table;   // [tables, max_pages]
  const int32_t* cu_seqlens_q;  // [tables + 1], or null: see table_row
  int32_t* out;
  int64_t indices_query, block_table_row, out_query;
  int64_t s_q, topk, tables, max_pages, page_size, page_stride;  // page_stride in slots
};

// The row of the block table of query t; `tables` if the query belongs to no sequence. Sequence i has queries
// cu_seqlens_q[i] to cu_seqlens_q[i + 1] - 1; without it, each has s_q / tables.
template <class Args>
inline int64_t table_row(const Args& args, int64_t t) {
  if (!args.cu_seqlens_q) return t / (args.s_q / args.tables);
  const int32_t* ends = args.cu_seqlens_q + 1;
  return std::upper_bound(ends, ends + args.tables, t) - ends;
}

// Rows [tokens, heads, width], and what writers do to each in fp32: a norm of its first values, RoPE of
// 2 * pairs values from rope_start on, then the Hadamard matrix.
struct Rows {
  const void* x;
  const void* norm_weight;  // [normalised], or null: no norm
  const void* norm_bias;    // of LayerNorm; null: RMSNorm
  const float* cos;         // [tokens, pairs], or null: no RoPE
  const float* sin;
  int64_t x_token, x_head, cos_token, sin_token;
  int64_t tokens, heads, width, normalised, rope_start, pairs;
  int32_t dtype, weight_dtype, bias_dtype;
  int32_t interleaved;  // RoPE turns values 0 and 1, 2 and 3, ..; else 0 and pairs, 1 and pairs + 1, ..
  float eps;
  float hadamard;  // what the matrix of 1 and -1 is multiplied by, or 0: no matrix
};

// How writers store values.
enum ValueKind : int32_t { kPlainValues = 0, kE4m3Values = 1, kE2m1Values = 2 };
enum ScaleKind : int32_t { kFp32Scales = 0, kUe8m0Scales = 1, kE4m3Scales = 2 };

// One scale for each `group` of `quantised` values. Both are multiples of 16.
struct Quantisation {
  int64_t quantised, group;
  ValueKind values;
  ScaleKind scales;
  int32_t power_of_two;  // scales are rounded up to one
  float min_scale;
};

// write_kv and write_index_k: row t [1, width] goes to slots[t] of a cache. Slot i lies in page
// i / page_size, and its parts where sparse_attn/formats/layout.py says. Strides of the cache count bytes.
struct WriteArgs {
  Rows rows;
  Quantisation how;
  void* cache;
  const void* slots;  // [tokens] int32 or int64; those that do not exist are skipped
  int64_t slot_bytes, pages, page_size, page_step;
  int64_t values_step, scales_start, scales_step, rope_start, rope_step;
  int32_t cache_dtype;  // of plain values
};

// quantise_index_q: each row gets one scale, which its weight is multiplied by.
struct QuantiseArgs {
  Rows rows;
  Quantisation how;
  const float* weights;  // [tokens, heads]
  uint8_t* out;          // [tokens, heads, width]
  float* out_weights;
  int64_t weights_token, out_token, out_head, out_weights_token;
};

// The kernels of one instruction set. Where an entry is null, the next lower set's kernel runs.
struct Kernels {
  const char* name;
  // Writes a block's scores where the query sees the position, and anything in the rest of the block.
  void (*score[kDTypes])(const IndexArgs&, const ScoreBlock&);
  // The same for quantised keys.
  void (*score_packed[kDTypes])(const IndexArgs&, const ScoreBlock&);
  // Writes the positions of the topk largest of n logits to out[0 .. topk). x[i] is at position begin + i.
  void (*select)(const float* x, int64_t begin, int64_t n, int64_t topk, int32_t* out);
  // Attention of heads [head, head_end) of query t: at most kMaxHeads, all of one kv head.
  void (*attend[kDTypes])(const AttentionArgs&, int64_t t, int64_t head, int64_t head_end);
  // The same for at most few_heads heads per kv head; all heads of one call share their indices.
  void (*attend_few[kDTypes])(const AttentionArgs&, int64_t t, int64_t head, int64_t head_end);
  int64_t few_heads;
  // Both for quantised rows.
  void (*attend_packed[kDTypes])(const AttentionArgs&, int64_t t, int64_t head, int64_t head_end);
  void (*attend_few_packed[kDTypes])(const AttentionArgs&, int64_t t, int64_t head, int64_t head_end);
  // Runs multiply-adds in registers and returns the number of operations, or 0 if the set has no such loop.
  int64_t (*peak)(int32_t kind, int64_t rounds);
  // Writes rows [begin, end); of quantise, row i is head i % heads of token i / heads.
  void (*write)(const WriteArgs&, int64_t begin, int64_t end);
  void (*quantise)(const QuantiseArgs&, int64_t begin, int64_t end);
};
enum PeakKind : int32_t { kPeakFp32 = 0, kPeakBf16 = 1 };

constexpr int64_t kMaxHeads = 128;
constexpr int64_t kScoreRows = 192;  // heads of all queries of a ScoreBlock, approximately
constexpr int64_t kMaxRow = 1024;    // values of a row that writers take
constexpr int64_t kHeadUnit = 16;    // a range of heads is split at multiples of it

static inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
