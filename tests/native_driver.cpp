// Calls every kernel of every instruction set on buffers of exactly the size that it may use, under
// AddressSanitizer and UndefinedBehaviorSanitizer (see test_native.py). Prints the sets that it ran.

#include <cmath>
#include <cstdio>
#include <cstdlib>
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

void check(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  std::exit(1);
}

template <class T>
void index(int isa, int threads, DType dtype, int s_q, int s_kv, int heads, int d, int page_size) {
  const int pages = page_size ? (s_kv + page_size - 1) / page_size : 1;
  const int width = page_size ? pages * page_size : s_kv, topk = pick(1, s_kv + 3);
  const auto q = random_values<T>(size_t(s_q) * heads * d), k = random_values<T>(size_t(width) * d);
  const auto weights = random_values<float>(size_t(s_q) * heads);
  std::vector<int32_t> ks(s_q), ke(s_q), table(pages), indices(size_t(s_q) * topk), again(indices);
  for (int t = 0; t < s_q; t++) ks[t] = pick(-2, s_kv), ke[t] = pick(-2, s_kv + 5);
  for (int i = 0; i < pages; i++) table[i] = i % 5 == 3 ? std::numeric_limits<int32_t>::max() : pages - 1 - i;
  std::vector<float> logits(size_t(s_q) * width);

  IndexArgs args = {};
  args.q = q.data(), args.k = k.data(), args.weights = weights.data(), args.ks = ks.data(),
  args.ke = ke.data();
  args.block_table = page_size ? table.data() : nullptr;
  args.q_query = heads * d, args.q_head = d, args.k_row = d, args.k_page = int64_t{width / pages} * d;
  args.weights_query = heads, args.s_q = s_q, args.heads = heads, args.d = d, args.pages = pages;
  args.page_size = width / pages, args.tables = 1, args.width = width, args.dtype = dtype;
  sparse_attn_index_logits(isa, threads, &args, logits.data(), width);
  SelectArgs select = {};
  select.logits = logits.data(), select.ks = ks.data(), select.ke = ke.data(), select.out = indices.data();
  select.logits_query = width, select.out_query = topk, select.s_q = s_q, select.s_kv = width,
  select.topk = topk;
  sparse_attn_select_topk(isa, threads, &select);
  sparse_attn_lightning_topk(isa, threads, &args, topk, pick(1, 100000), again.data(), topk);
  check(indices == again, "the fused selection differs");
}

template <class T>
void attend(int isa, int threads, DType dtype, int s_q, int s_kv, int h_q, int h_kv, int d_qk, int d_v,
            int topk) {
  const auto q = random_values<T>(size_t(s_q) * h_q * d_qk);
  const auto k = random_values<T>(size_t(s_kv) * h_kv * d_qk),
             v = random_values<T>(size_t(s_kv) * h_kv * d_v);
  const auto sink = random_values<float>(h_q);
  std::vector<int32_t> indices(size_t(s_q) * topk), length(s_q);
  for (int32_t& i : indices) i = pick(-1, s_kv);
  for (int32_t& n : length) n = pick(-1, topk + 1);
  std::vector<T> out(size_t(s_q) * h_q * d_v);
  std::vector<float> lse(size_t(s_q) * h_q, NAN), max_logits(lse);

  AttentionArgs args = {};
  for (Segment& s : args.segments) {
    s.k = k.data(), s.v = v.data(), s.indices = indices.data(), s.topk_length = length.data();
    s.k_row = h_kv * d_qk, s.k_head = d_qk, s.v_row = h_kv * d_v, s.v_head = d_v;
    s.indices_query = topk, s.s_kv = s_kv, s.topk = topk;
  }
  args.q = q.data(), args.attn_sink = sink.data(), args.out = out.data(), args.lse = lse.data();
  args.q_query = h_q * d_qk, args.q_head = d_qk, args.out_query = h_q * d_v, args.out_head = d_v;
  args.max_logits = pick(0, 1) ? max_logits.data() : nullptr;
  args.lse_query = args.max_logits_query = h_q, args.s_q = s_q, args.h_q = h_q, args.h_kv = h_kv;
  args.d_qk = d_qk, args.d_v = d_v;
  args.n_segments = pick(1, 2), args.dtype = dtype, args.softmax_scale = 0.1f;
  sparse_attn_attend(isa, threads, &args);
  for (float x : lse) check(!std::isnan(x), "an lse is NaN or was not written");
  for (float x : max_logits)
    check(std::isnan(x) == !args.max_logits, "max_logits are not written where asked for");
}

template <class T>
void run(int isa, DType dtype) {
  for (int heads : {1, 3, 16, 17, 64, 70, 130})
    for (int d : {1, 7, 32, 40})
      index<T>(isa, pick(1, 3), dtype, pick(1, 5), pick(1, 260), heads, d, pick(0, 1) * pick(1, 40));
  index<T>(isa, 1, dtype, 1, 9000, 2, 8, 0);
  for (int group : {1, 2, 5, 8, 9, 16, 33, 128, 150})
    for (int d : {1, 9, 32, 72})
      attend<T>(isa, pick(1, 3), dtype, pick(1, 4), pick(1, 400), group * 2, 2, d, pick(1, d), pick(0, 300));
  attend<T>(isa, 2, dtype, 1, 600, 20, 1, 576, 512, 600);
}

}  // namespace

int main() {
  check(sparse_attn_sizeof("Segment") == int64_t{sizeof(Segment)}, "the size of Segment");
  check(sparse_attn_sizeof("Kernels") == -1, "a size for another name");
  for (int isa = 0; isa < sparse_attn_isas(); isa++) {
    if (!sparse_attn_isa_supported(isa)) continue;
    std::printf("%s\n", sparse_attn_isa_name(isa));
    run<bfloat16>(isa, kBFloat16);
    run<float16>(isa, kFloat16);
    std::thread other(run<float>, isa, kFloat32);  // two callers at once
    run<float>(isa, kFloat32);
    other.join();
  }
}
