// Calls every kernel of every instruction set on buffers of exactly the size that it may use, under
// AddressSanitizer and UndefinedBehaviorSanitizer (see test_native.py), and compares the results with the
// portable set's. Prints the sets that it ran. Arguments narrow it: driver [SET [bf16|fp16|fp32]].

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <type_traits>
#include <vector>

#include "api.h"

namespace {

thread_local std::mt19937 random_bits(1);

int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_bits); }

template <class T>
std::vector<T> random_values(size_t n) {
  std::normal_distribution<float> normal;
  std::vector<T> values(n);
  for (T& value : values) {
    if constexpr (std::is_same_v<T, float>)
      value = normal(random_bits);
    else
      value = {static_cast<uint16_t>(random_bits() & 0xbfff)};  // magnitudes below 2
  }
  return values;
}

double value(float x) { return x; }
double value(bfloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}
double value(float16 x) {  // finite
  const int exponent = x.bits >> 10 & 31, m = x.bits & 1023;
  return (x.bits >> 15 ? -1 : 1) * (exponent ? std::ldexp(1024 + m, exponent - 25) : std::ldexp(m, -24));
}

template <class T>
double norm(const T* x, size_t n) {
  double squares = 0;
  for (size_t i = 0; i < n; i++) squares += value(x[i]) * value(x[i]);
  return std::sqrt(squares);
}

void check(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  std::exit(1);
}

void check_close(double found, double portable, double tolerance, const char* what) {
  if (found == portable || std::fabs(found - portable) <= tolerance) return;
  std::fprintf(stderr, "wrong: %s: %g, but portable %g +- %g\n", what, found, portable, tolerance);
  std::exit(1);
}

int portable() { return sparse_attn_isas() - 1; }

// Takes what both functions below know of their arguments, and adds ranges, pages and a selection.
template <class T>
void score_and_select(int isa, int threads, IndexArgs args, int s_kv, double key_norm) {
  const int s_q = static_cast<int>(args.s_q), heads = static_cast<int>(args.heads);
  const int pages = static_cast<int>(args.pages), width = static_cast<int>(args.pages * args.page_size);
  const int d = static_cast<int>(args.d), topk = pick(1, s_kv + 3);
  const auto q = random_values<T>(size_t(s_q) * heads * d);
  const auto weights = random_values<float>(size_t(s_q) * heads);
  const int tables = pick(1, 3);  // sequences; the last queries may belong to none
  std::vector<int32_t> ks(s_q), ke(s_q), table(size_t(tables) * pages), ends(tables + 1);
  std::vector<int32_t> indices(size_t(s_q) * topk), again(indices), slots(indices);
  for (int t = 0; t < s_q; t++) ks[t] = pick(-2, s_kv), ke[t] = pick(-2, s_kv + 5);
  for (int i = 0; i < tables * pages; i++)
    table[i] = i % 5 == 3 ? std::numeric_limits<int32_t>::max() : pages - 1 - i % pages;
  for (int i = 1; i <= tables; i++) ends[i] = pick(ends[i - 1], s_q);
  std::vector<float> logits(size_t(s_q) * width), expected(logits), scores(size_t(s_q) * topk, NAN);

  args.q = q.data(), args.weights = weights.data(), args.ks = ks.data(), args.ke = ke.data();
  args.block_table = pages > 1 ? table.data() : nullptr;
  args.q_query = heads * d, args.q_head = d, args.weights_query = heads;
  args.tables = args.block_table ? tables : 1, args.width = width, args.block_table_row = pages;
  args.cu_seqlens_q = args.block_table && pick(0, 1) ? ends.data() : nullptr;
  if (!args.cu_seqlens_q && s_q % tables) args.tables = 1;
  sparse_attn_index_logits(isa, threads, &args, logits.data(), width);
  SelectArgs select = {};
  select.logits = logits.data(), select.ks = ks.data(), select.ke = ke.data(), select.out = indices.data();
  select.logits_query = width, select.out_query = topk, select.s_q = s_q, select.s_kv = width,
  select.topk = topk;
  sparse_attn_select_topk(isa, threads, &select);
  sparse_attn_lightning_topk(isa, threads, &args, topk, pick(1, 100000), again.data(), topk, scores.data(),
                             topk);
  check(indices == again, "the fused selection differs");
  for (size_t i = 0; i < scores.size(); i++) {
    const float logit = indices[i] < 0 ? -INFINITY : logits[i / topk * width + indices[i]];
    check(scores[i] == logit, "the score of a selected position");
  }
  SlotArgs to_slots = {indices.data(), table.data(), args.cu_seqlens_q, slots.data(), topk, pages, topk};
  to_slots.s_q = s_q, to_slots.topk = topk, to_slots.tables = args.tables, to_slots.max_pages = pages;
  to_slots.page_size = args.page_size, to_slots.page_stride = args.page_size + pick(0, 9);
  sparse_attn_physical_slots(isa, threads, &to_slots);
  for (size_t i = 0; i < slots.size(); i++)
    check(slots[i] < pages * to_slots.page_stride && (slots[i] < 0 || indices[i] >= 0), "a slot");

  if (isa == portable()) return;
  sparse_attn_index_logits(portable(), 1, &args, expected.data(), width);
  for (int t = 0; t < s_q; t++) {
    double scale = 1e-30;  // bf16 dots take subnormal numbers for zero
    for (int i = t * heads; i < (t + 1) * heads; i++)
      scale += std::fabs(weights[i]) * norm(q.data() + size_t(i) * d, d) * key_norm;
    // Sums in fp32 in another order differ by little of the norms' product, whatever cancels.
    for (int i = t * width; i < (t + 1) * width; i++)
      check_close(logits[i], expected[i], 2e-6 * scale, "a logit");
  }
  select.logits = expected.data(), select.out = again.data();
  sparse_attn_select_topk(isa, threads, &select);
  select.out = indices.data();
  sparse_attn_select_topk(portable(), 1, &select);
  check(indices == again, "the selection from the same logits");
}

IndexArgs index_args(DType dtype, int s_q, int s_kv, int heads, int d, int page_size) {
  IndexArgs args = {};
  args.s_q = s_q, args.heads = heads, args.d = d, args.dtype = dtype, args.k_row = d;
  args.pages = page_size ? (s_kv + page_size - 1) / page_size : 1,
  args.page_size = page_size ? page_size : s_kv;
  args.k_page = args.page_size * d;
  return args;
}

template <class T>
void index(int isa, int threads, DType dtype, int s_q, int s_kv, int heads, int d, int page_size) {
  IndexArgs args = index_args(dtype, s_q, s_kv, heads, d, page_size);
  const auto k = random_values<T>(size_t(args.pages * args.k_page));
  args.k = k.data();
  double largest = 0;
  for (size_t i = 0; i < k.size(); i += d) largest = std::max(largest, norm(k.data() + i, d));
  score_and_select<T>(isa, threads, args, s_kv, largest);
}

std::vector<uint8_t> random_codes(size_t n) {  // e4m3, but NaN
  std::vector<uint8_t> codes(n);
  for (uint8_t& code : codes) code = static_cast<uint8_t>(pick(0, 0x7e) | pick(0, 1) << 7);
  return codes;
}

template <class T>
void index_fp8(int isa, int threads, DType dtype, int s_kv, int heads, int d, int page_size) {
  IndexArgs args = index_args(dtype, 2, s_kv, heads, d, page_size);
  const auto codes = random_codes(size_t(args.pages * args.k_page));
  const auto scales = random_values<float>(size_t(args.pages * args.page_size));
  args.k = codes.data(), args.k_scale = reinterpret_cast<const uint8_t*>(scales.data());
  args.key_format = kFp8Keys, args.k_scale_row = sizeof(float), args.k_scale_page = args.page_size * 4;
  score_and_select<T>(isa, threads, args, s_kv, 448 * std::sqrt(d) * 4);
}

// Takes segments, dtype, s_q, heads and widths, and adds the query, a selection and the results.
template <class T>
void attend_rows(int isa, int threads, AttentionArgs args, int topk) {
  const int s_q = static_cast<int>(args.s_q), h_q = static_cast<int>(args.h_q);
  const int s_kv = static_cast<int>(args.segments[0].s_kv), d_v = static_cast<int>(args.d_v);
  const auto q = random_values<T>(size_t(s_q) * h_q * args.d_qk);
  const auto sink = random_values<float>(h_q);
  std::vector<int32_t> indices(size_t(s_q) * topk), length(s_q);
  for (int32_t& i : indices) i = pick(-1, s_kv);
  for (int32_t& n : length) n = pick(0, 3) ? topk : pick(-1, topk + 1);
  std::vector<T> out(size_t(s_q) * h_q * d_v), expected_out(out);
  std::vector<float> lse(size_t(s_q) * h_q, NAN), max_logits(lse), expected_lse(lse), expected_max(lse);

  for (Segment& s : args.segments)
    s.indices = indices.data(), s.topk_length = length.data(), s.indices_query = topk, s.topk = topk;
  args.q = q.data(), args.attn_sink = sink.data(), args.out = out.data(), args.lse = lse.data();
  args.q_query = h_q * args.d_qk, args.q_head = args.d_qk, args.out_query = h_q * d_v, args.out_head = d_v;
  args.max_logits = pick(0, 1) ? max_logits.data() : nullptr;
  args.lse_query = args.max_logits_query = h_q;
  args.n_segments = pick(1, 2), args.softmax_scale = 0.1f;
  sparse_attn_attend(isa, threads, &args);
  for (float x : lse) check(!std::isnan(x), "an lse is NaN or was not written");
  for (float x : max_logits)
    check(std::isnan(x) == !args.max_logits, "max_logits are not written where asked for");

  if (isa == portable()) return;
  args.out = expected_out.data(), args.lse = expected_lse.data();
  if (args.max_logits) args.max_logits = expected_max.data();
  sparse_attn_attend(portable(), 1, &args);
  for (size_t i = 0; i < lse.size(); i++) {
    check_close(lse[i], expected_lse[i], 2e-5 * (1 + std::fabs(expected_lse[i])), "an lse");
    if (args.max_logits)
      check_close(max_logits[i], expected_max[i], 2e-5 * (1 + std::fabs(expected_max[i])), "a max_logit");
  }
  // Two roundings to the output's type, and one of many probabilities to bf16, of a query's largest output:
  // the terms of a smaller one may cancel.
  const double step = std::is_same_v<T, float> ? 1e-5 : std::is_same_v<T, float16> ? 0x1p-10 : 0x1p-7;
  for (int t = 0; t < s_q; t++) {
    const size_t begin = size_t(t) * h_q * d_v, end = begin + size_t(h_q) * d_v;
    double largest = 0;
    for (size_t i = begin; i < end; i++) largest = std::max(largest, std::fabs(value(expected_out[i])));
    for (size_t i = begin; i < end; i++)
      check_close(value(out[i]), value(expected_out[i]), step * largest + 1e-5, "an output");
  }
}

AttentionArgs attention_args(DType dtype, int s_q, int h_q, int h_kv, int d_qk, int d_v) {
  AttentionArgs args = {};
  args.dtype = dtype, args.s_q = s_q, args.h_q = h_q, args.h_kv = h_kv, args.d_qk = d_qk, args.d_v = d_v;
  return args;
}

template <class T>
void attend(int isa, int threads, DType dtype, int s_q, int s_kv, int h_q, int h_kv, int d_qk, int d_v,
            int topk) {
  const auto k = random_values<T>(size_t(s_kv) * h_kv * d_qk);
  const auto v = random_values<T>(size_t(s_kv) * h_kv * d_v);
  AttentionArgs args = attention_args(dtype, s_q, h_q, h_kv, d_qk, d_v);
  for (Segment& s : args.segments) {
    s.k = k.data(), s.v = v.data(), s.s_kv = s_kv, s.page_size = 1;
    s.k_row = h_kv * d_qk, s.k_head = d_qk, s.v_row = h_kv * d_v, s.v_head = d_v;
  }
  attend_rows<T>(isa, threads, args, topk);
}

// Rows that are key and value, in pages with other memory between them.
template <class T>
void attend_pages_apart(int isa, DType dtype, int h_q, int topk) {
  constexpr int kRows = 30, kPage = 7, kWidth = 40, kBetween = 9;
  constexpr int kStride = kPage * kWidth + kBetween;
  const auto rows = random_values<T>(size_t((kRows + kPage - 1) / kPage) * kStride);
  AttentionArgs args = attention_args(dtype, 2, h_q, 1, kWidth, 33);
  for (Segment& s : args.segments) {
    s.k = s.v = rows.data(), s.k_row = s.v_row = kWidth, s.s_kv = kRows;
    s.page_size = kPage, s.k_page = kStride;
  }
  attend_rows<T>(isa, 2, args, topk);
}

// Where the values of a token lie, its scales, and its RoPE part (-1: none), see sparse_attn/formats.
struct Layout {
  RowFormat format;
  int value_bytes, scale_bytes, rope, rest;
  bool by_page;
};
constexpr Layout kLayouts[] = {
    {kV32Rows, 512, 16, 528, 128, false},     {kV4Rows, 576, 8, 448, 0, true},
    {kV41Rows, 512, 16, -1, 0, false},        {kV41ByPageRows, 512, 16, -1, 0, true},
    {kNopeRows, 512, 16, -1, 0, false},       {kV41Fp4Rows, 256, 32, -1, 0, false},
    {kV41Fp4ByPageRows, 256, 32, -1, 0, true}};

// Quantised rows. If the scales are moderate powers of two, bf16 holds every value exactly.
template <class T>
void attend_packed(int isa, int threads, DType dtype, const Layout& layout, int h_q, int topk, bool exact) {
  constexpr int kRows = 30, kPage = 7;
  const int pages = (kRows + kPage - 1) / kPage;
  const int token = layout.value_bytes + layout.scale_bytes + layout.rest, page_bytes = kPage * token;
  auto bytes = random_codes(size_t(pages) * page_bytes);
  for (int row = 0; row < pages * kPage; row++) {
    uint8_t *page = &bytes[row / kPage * page_bytes], *values = page + row % kPage * token;
    uint8_t* scales = values + layout.value_bytes;
    if (layout.by_page) {
      values = page + row % kPage * layout.value_bytes;
      scales = page + kPage * layout.value_bytes + row % kPage * layout.scale_bytes;
    }
    if (layout.format == kV32Rows || layout.format == kNopeRows) {
      for (int i = 0; i < 4; i++) {
        const float scale = exact ? 1.0f / (64 << pick(0, 3)) : pick(1, 9) / 500.0f;
        std::memcpy(scales + 4 * i, &scale, sizeof scale);
      }
    } else if (layout.scale_bytes < 32) {  // ue8m0
      for (int i = 0; i < layout.scale_bytes; i++) scales[i] = exact ? pick(118, 124) : pick(15, 121);
    } else {  // e4m3
      for (int i = 0; i < 32; i++) scales[i] = pick(8, 40);
    }
    if (layout.rope >= 0) {
      const auto rope = random_values<bfloat16>(64);
      std::memcpy(values + layout.rope, rope.data(), 128);
    }
  }
  AttentionArgs args = attention_args(dtype, 2, h_q, 1, layout.format == kV32Rows ? 576 : 512, 512);
  for (Segment& s : args.segments) {
    s.k = s.v = bytes.data(), s.k_row = token, s.s_kv = kRows, s.format = layout.format;
    s.page_size = kPage, s.k_page = page_bytes;
  }
  attend_rows<T>(isa, threads, args, topk);
}

// Rows of any magnitude; NaN and infinities among them.
template <class T>
std::vector<T> hostile_values(size_t n) {
  std::vector<T> values(n);
  for (T& value : values) {
    const uint32_t bits = random_bits();
    std::memcpy(&value, &bits, sizeof value);
  }
  return values;
}

// Norm and rotation of rows [tokens, heads, width]. The norm's sums depend on the set, so that the results
// are compared only without it.
struct Inputs {
  std::vector<float> cos, sin, weight;
  Rows rows = {};

  Inputs(DType dtype, int tokens, int heads, int width, int pairs, bool norm)
      : cos(random_values<float>(size_t(tokens) * pairs)),
        sin(random_values<float>(size_t(tokens) * pairs)),
        weight(random_values<float>(width)) {
    rows.x_token = heads * width, rows.x_head = width, rows.cos_token = rows.sin_token = pairs;
    rows.tokens = tokens, rows.heads = heads, rows.width = rows.normalised = width, rows.pairs = pairs;
    rows.rope_start = pick(0, 1) * (width - 2 * pairs), rows.interleaved = pick(0, 1);
    rows.dtype = dtype, rows.weight_dtype = rows.bias_dtype = kFloat32, rows.eps = 1e-6f;
    if (pairs) rows.cos = cos.data(), rows.sin = sin.data();
    if (norm) rows.norm_weight = weight.data();
    if (norm && pick(0, 1)) rows.norm_bias = weight.data();
  }
};

// Into a cache without a gap. The bytes are compared where no set may differ: the sums of a norm have another
// order, and a NaN may have another sign.
template <class T>
void write(int isa, DType dtype, Quantisation how, int width, int tokens) {
  const bool norm = pick(0, 1), hostile = pick(0, 1), plain = how.values == kPlainValues;
  Inputs inputs(dtype, tokens, 1, width, pick(0, 1) * pick(1, width / 2), norm);
  const auto x = (hostile ? hostile_values<T> : random_values<T>)(size_t(tokens) * width);
  inputs.rows.x = x.data();
  if (!(width & (width - 1)) && pick(0, 1)) inputs.rows.hadamard = 0.25f;
  WriteArgs args = {};
  args.rows = inputs.rows, args.how = how, args.pages = 3, args.page_size = 1 + tokens / 3;
  args.cache_dtype = pick(0, 2);
  const int64_t element = args.cache_dtype == kFloat32 ? 4 : 2;
  const int64_t values = plain ? width * element : how.quantised / (how.values == kE2m1Values ? 2 : 1);
  const int64_t groups = plain ? 0 : how.quantised / how.group;
  args.values_step = values, args.scales_start = args.page_size * values;
  args.scales_step = how.scales == kFp32Scales ? 4 * groups : groups;
  args.rope_start = round_up(args.scales_start + args.page_size * args.scales_step, 2);
  args.rope_step = plain ? 0 : 2 * (width - how.quantised);
  args.page_step = args.rope_start + args.page_size * args.rope_step;
  std::vector<uint8_t> cache(args.pages * args.page_step, 0xab), expected(cache);
  std::vector<int64_t> slots(tokens);
  for (int i = 0; i < tokens; i++) slots[i] = i % 7 == 3 ? pick(0, 1) * (int64_t{1} << 62) - 1 : i;
  const std::vector<int32_t> narrow(slots.begin(), slots.end());
  args.slots = slots.data(), args.slot_bytes = 8, args.cache = cache.data();
  sparse_attn_write(isa, 2, &args);
  if (pick(0, 1)) args.slots = narrow.data(), args.slot_bytes = 4;
  args.cache = expected.data();
  sparse_attn_write(portable(), 1, &args);
  check(norm || hostile || cache == expected, "the bytes of a cache");
}

template <class T>
void quantise(int isa, DType dtype, int width) {
  const int tokens = pick(1, 9), heads = pick(1, 20);
  Inputs inputs(dtype, tokens, heads, width, pick(0, 1) * width / 4, false);
  const auto x = hostile_values<T>(size_t(tokens) * heads * width);
  const auto weights = random_values<float>(size_t(tokens) * heads);
  std::vector<uint8_t> out(x.size()), expected_out(out);
  std::vector<float> scaled(weights), expected(weights);
  QuantiseArgs args = {inputs.rows, {width, width, kE4m3Values, kFp32Scales, pick(0, 1), 1e-6f}};
  args.rows.x = x.data(), args.rows.hadamard = pick(0, 1) * 0.25f;
  args.weights = weights.data(), args.out = out.data(), args.out_weights = scaled.data();
  args.weights_token = args.out_weights_token = heads, args.out_token = heads * width, args.out_head = width;
  sparse_attn_quantise(isa, 3, &args);
  args.out = expected_out.data(), args.out_weights = expected.data();
  sparse_attn_quantise(portable(), 1, &args);
  for (size_t i = 0; i < out.size(); i++)  // the sign of a NaN is anything
    check(out[i] == expected_out[i] || (out[i] & expected_out[i] & 0x7f) == 0x7f, "the bytes of a query");
  for (size_t i = 0; i < scaled.size(); i++)
    check(scaled[i] == expected[i] || std::isnan(scaled[i]), "a weight");
}

template <class T>
void write_everything(int isa, DType dtype) {
  const Quantisation formats[] = {
      {512, 128, kE4m3Values, kFp32Scales, 0, 1e-6f}, {448, 64, kE4m3Values, kUe8m0Scales, 1, 1e-6f},
      {512, 32, kE4m3Values, kUe8m0Scales, 1, 1e-6f}, {512, 16, kE2m1Values, kE4m3Scales, 0, 0x1p-9f},
      {16, 16, kE4m3Values, kFp32Scales, 1, 1e-6f},
  };
  for (const Quantisation& how : formats)
    for (int rope : {0, 64})
      for (int tokens : {1, 50}) write<T>(isa, dtype, how, static_cast<int>(how.quantised) + rope, tokens);
  for (int width : {2, 31, 64, 576, 1024})
    for (int tokens : {1, 40}) write<T>(isa, dtype, {}, width, tokens);
  for (int width : {16, 32, 128, 1024}) quantise<T>(isa, dtype, width);
}

template <class T>
void run_few(int isa, DType dtype) {
  for (int heads : {3, 64}) index<T>(isa, 2, dtype, 2, 150, heads, 40, 0);
  for (int group : {5, 16}) attend<T>(isa, 2, dtype, 2, 100, group * 2, 2, 32, 32, 70);
  write_everything<T>(isa, dtype);
}

template <class T>
void run(int isa, DType dtype) {
  for (int heads : {1, 3, 16, 17, 64, 70, 130})
    for (int d : {1, 7, 32, 40})
      index<T>(isa, pick(1, 3), dtype, pick(1, 3), pick(1, heads > 64 ? 110 : 200), heads, d,
               pick(0, 1) * pick(1, 40));
  index<T>(isa, 1, dtype, 1, 9000, 2, 8, 0);
  write_everything<T>(isa, dtype);
  for (int page_size : {0, 7}) index_fp8<T>(isa, 2, dtype, 60, page_size ? 3 : 20, 48, page_size);
  int number = 0;
  for (int group : {1, 2, 5, 8, 9, 16, 33, 128, 150}) {
    for (int d : {1, 9, 32, 72}) {
      const int rows[] = {0, pick(1, 63), pick(97, 110), pick(193, 230)};  // blocks have 64, 96 or 128
      const int h_kv = group > 16 ? 1 : 2, topk = rows[number++ % 4];
      attend<T>(isa, pick(1, 3), dtype, pick(1, 2), pick(1, 200), group * h_kv, h_kv, d, pick(1, d), topk);
    }
    number++;
  }
  attend<T>(isa, 1, dtype, 1, 300, 9, 1, 8, 8, 2100);  // so many that probabilities are rounded to bf16
  attend<T>(isa, 2, dtype, 1, 100, 10, 1, 576, 512, 100);
  for (int h_q : {5, 20}) {
    attend_pages_apart<T>(isa, dtype, h_q, 70);
    for (const Layout& layout : kLayouts)
      for (bool exact : {false, true}) attend_packed<T>(isa, 2, dtype, layout, h_q, exact ? 30 : 70, exact);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const auto wanted = [&](int argument, const char* name) {
    return argc <= argument || !std::strcmp(argv[argument], name);
  };
  check(sparse_attn_sizeof("Segment") == int64_t{sizeof(Segment)}, "the size of Segment");
  check(sparse_attn_sizeof("Kernels") == -1, "a size for another name");
  for (int isa = 0; isa < sparse_attn_isas(); isa++) {
    if (!sparse_attn_isa_supported(isa) || !wanted(1, sparse_attn_isa_name(isa))) continue;
    std::printf("%s\n", sparse_attn_isa_name(isa));
    if (wanted(2, "bf16")) run<bfloat16>(isa, kBFloat16);
    if (wanted(2, "fp16")) run<float16>(isa, kFloat16);
    if (!wanted(2, "fp32")) continue;
    std::thread other(run_few<float>, isa, kFloat32);  // two callers at once
    run<float>(isa, kFloat32);
    other.join();
  }
}
