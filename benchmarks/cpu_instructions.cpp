// Prepares the data of one operation and calls it on one thread: driver SET OPERATION CALLS SIZE.., see main.
// Without arguments it prints the instruction sets that can run. cpu_instructions.py counts its instructions.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "api.h"

namespace {

float next_value() {  // in [-1, 1)
  static uint32_t state = 1;
  state = state * 1664525 + 1013904223;
  return static_cast<int32_t>(state) * 0x1p-31f;
}

std::vector<float> floats(int64_t n) {
  std::vector<float> values(n);
  for (float& value : values) value = next_value();
  return values;
}

std::vector<bfloat16> bf16(int64_t n) {
  std::vector<bfloat16> values(n);
  for (bfloat16& value : values) {
    const float x = next_value();
    std::memcpy(&value, reinterpret_cast<const char*>(&x) + 2, sizeof value);  // the upper half of its bits
  }
  return values;
}

void attend(int isa, int calls, int64_t heads, int64_t kv_heads, int64_t d_qk, int64_t d_v, int64_t topk) {
  const int64_t s_kv = 2 * topk;      // every second row is selected
  const bool latent = kv_heads == 1;  // MLA: a value is the beginning of its key
  const auto q = bf16(heads * d_qk), k = bf16(s_kv * kv_heads * d_qk);
  const auto v = bf16(latent ? 0 : s_kv * kv_heads * d_v);
  std::vector<int32_t> indices(topk);
  for (int64_t i = 0; i < topk; i++) indices[i] = static_cast<int32_t>(2 * i);
  std::vector<bfloat16> out(heads * d_v);
  std::vector<float> lse(heads);

  AttentionArgs args = {};
  Segment& rows = args.segments[0];
  rows.k = k.data(), rows.k_row = kv_heads * d_qk, rows.k_head = d_qk;
  rows.v = latent ? k.data() : v.data(), rows.v_row = latent ? d_qk : kv_heads * d_v, rows.v_head = d_v;
  rows.indices = indices.data(), rows.indices_query = topk, rows.s_kv = s_kv, rows.topk = topk;
  args.q = q.data(), args.q_query = heads * d_qk, args.q_head = d_qk;
  args.out = out.data(), args.out_query = heads * d_v, args.out_head = d_v;
  args.lse = lse.data(), args.lse_query = heads, args.s_q = 1, args.h_q = heads, args.h_kv = kv_heads;
  args.d_qk = d_qk, args.d_v = d_v, args.n_segments = 1, args.dtype = kBFloat16, args.softmax_scale = 0.1f;
  while (calls--) sparse_attn_attend(isa, 1, &args);
}

void index_logits(int isa, int calls, int64_t heads, int64_t d, int64_t keys) {
  const auto q = bf16(heads * d), k = bf16(keys * d);
  const auto weights = floats(heads);
  const int32_t ks = 0, ke = static_cast<int32_t>(keys);
  std::vector<float> logits(keys);

  IndexArgs args = {};
  args.q = q.data(), args.q_query = heads * d, args.q_head = d, args.k = k.data(), args.k_row = d;
  args.weights = weights.data(), args.weights_query = heads, args.ks = &ks, args.ke = &ke;
  args.s_q = 1, args.heads = heads, args.d = d, args.pages = args.tables = 1;
  args.page_size = args.width = keys;
  args.dtype = kBFloat16;
  while (calls--) sparse_attn_index_logits(isa, 1, &args, logits.data(), keys);
}

void select_topk(int isa, int calls, int64_t n, int64_t topk) {
  const auto logits = floats(n);
  const int32_t ks = 0, ke = static_cast<int32_t>(n);
  std::vector<int32_t> out(topk);
  const SelectArgs args = {logits.data(), &ks, &ke, out.data(), n, topk, 1, n, topk};
  while (calls--) sparse_attn_select_topk(isa, 1, &args);
}

}  // namespace

int main(int argc, char** argv) {
  const auto size = [&](int i) { return i + 4 < argc ? std::atoll(argv[i + 4]) : 0; };
  for (int isa = 0; isa < sparse_attn_isas(); isa++) {
    if (!sparse_attn_isa_supported(isa)) continue;
    const char* name = sparse_attn_isa_name(isa);
    if (argc == 1) std::puts(name);
    if (argc < 5 || std::strcmp(argv[1], name)) continue;
    const int calls = std::atoi(argv[3]);
    if (!std::strcmp(argv[2], "attend")) attend(isa, calls, size(0), size(1), size(2), size(3), size(4));
    if (!std::strcmp(argv[2], "index_logits")) index_logits(isa, calls, size(0), size(1), size(2));
    if (!std::strcmp(argv[2], "select_topk")) select_topk(isa, calls, size(0), size(1));
  }
}
