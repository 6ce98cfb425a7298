#include "api.h"

#include <algorithm>
#include <cstring>

#include "parallel.h"
#include "workspace.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__)
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#endif

// A set that the compiler could not build is missing from the library: its address is null.
#if defined(__x86_64__)
extern const Kernels kernels_amx __attribute__((weak));
extern const Kernels kernels_avx512bf16 __attribute__((weak));
extern const Kernels kernels_avx512 __attribute__((weak));
extern const Kernels kernels_avx2 __attribute__((weak));
#elif defined(__aarch64__)
extern const Kernels kernels_neon_bf16 __attribute__((weak));
#endif
extern const Kernels kernels_portable;

namespace {

struct Isa {
  const Kernels* kernels;
  bool (*supported)();
};

#if defined(__x86_64__)
bool has_avx2() {  // every CPU with AVX2 has F16C
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
// Leaf 7 of cpuid, for features that not every compiler's __builtin_cpu_supports knows.
struct Features {
  unsigned a = 0, b = 0, c = 0, d = 0;
  explicit Features(unsigned subleaf) { __get_cpuid_count(7, subleaf, &a, &b, &c, &d); }
};
bool has_avx512bf16() { return has_avx512() && (Features(1).a >> 5 & 1); }
bool has_amx() {
#if defined(__linux__)
  const unsigned bits = Features(0).d;
  if (!has_avx512bf16() || !(bits >> 22 & 1) || !(bits >> 24 & 1)) return false;  // amx-bf16, amx-tile
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h: asks for the tile state
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#elif defined(__aarch64__)
bool has_neon_bf16() {
#if defined(__linux__)
  return getauxval(AT_HWCAP2) >> 14 & 1;  // HWCAP2_BF16, which older headers lack
#elif defined(__APPLE__)
  int32_t has = 0;
  size_t bytes = sizeof has;
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &bytes, nullptr, 0) == 0 && has;
#else
  return false;
#endif
}
#endif

const Isa kIsas[] = {
#if defined(__x86_64__)
    {&kernels_amx, has_amx},
    {&kernels_avx512bf16, has_avx512bf16},
    {&kernels_avx512, has_avx512},
    {&kernels_avx2, has_avx2},
#elif defined(__aarch64__)
    {&kernels_neon_bf16, has_neon_bf16},
#endif
    {&kernels_portable, [] { return true; }},
};
constexpr int32_t kCount = sizeof kIsas / sizeof *kIsas;

// What pick returns for this set, or for the next lower set where it is not null.
template <class Pick>
auto find(int32_t isa, const Pick& pick) {
  for (const Isa* set = kIsas + isa; set < kIsas + kCount - 1; set++)
    if (set->kernels && pick(*set->kernels)) return pick(*set->kernels);
  return pick(kernels_portable);
}

auto find_score(int32_t isa, const IndexArgs& args) {
  const bool plain = args.key_format == kPlainKeys;
  return find(isa, [&](const Kernels& k) { return (plain ? k.score : k.score_packed)[args.dtype]; });
}

// Consecutive queries, which are scored together: few heads share the reading of keys that way.
int64_t queries_at_a_time(const IndexArgs& args, int64_t most) {
  return std::clamp<int64_t>(most, 1, std::max<int64_t>(1, kScoreRows / std::max<int64_t>(1, args.heads)));
}

// Into how many slices to cut the positions: several if there are too few groups of queries for all threads.
int64_t slices_for(int64_t groups, int threads) { return groups >= 4 * threads ? 1 : threads; }

Range slice(Range range, int64_t part, int64_t parts) {
  const int64_t n = range.end - range.begin;
  return {range.begin + n * part / parts, range.begin + n * (part + 1) / parts};
}

// f(begin, end) for each chunk of n rows. A chunk takes longer than to wake a thread.
template <class F>
void for_chunks(int64_t n, int threads, const F& f) {
  constexpr int64_t kRows = 32;
  parallel_for((n + kRows - 1) / kRows, threads,
               [&](int64_t i) { f(i * kRows, std::min(n, (i + 1) * kRows)); });
}

// Whether to copy the rows of each kv head to memory of their own before queries read them. That pays if they
// are read often and those of all heads do not fit into a cache: the rows of one do, and lie in fewer pages.
bool copies_heads(const AttentionArgs& args) {
  constexpr int64_t kReads = 8, kCache = 16 << 20, kMost = 256 << 20;
  const Segment& rows = args.segments[0];
  const int64_t head = rows.s_kv * (args.d_qk + args.d_v) * element_bytes(args.dtype);
  return args.n_segments == 1 && rows.page_size <= 1 && rows.v != rows.k && args.h_kv > 1 && head <= kMost &&
         head * args.h_kv > kCache && args.s_q * rows.topk >= kReads * rows.s_kv;
}

// Arguments of which every kv head is a copy, in `memory`, of that one.
AttentionArgs copy_head(const AttentionArgs& args, int64_t kv_head, int threads, char* memory) {
  const int64_t bytes = element_bytes(args.dtype), k_bytes = args.d_qk * bytes, v_bytes = args.d_v * bytes;
  const Segment& from = args.segments[0];
  char* values = memory + from.s_kv * k_bytes;
  const char* k = static_cast<const char*>(from.k) + kv_head * from.k_head * bytes;
  const char* v = static_cast<const char*>(from.v) + kv_head * from.v_head * bytes;
  for_chunks(from.s_kv, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      std::memcpy(memory + i * k_bytes, k + i * from.k_row * bytes, k_bytes);
      std::memcpy(values + i * v_bytes, v + i * from.v_row * bytes, v_bytes);
    }
  });
  AttentionArgs copy = args;
  Segment& rows = copy.segments[0];
  rows.k = memory, rows.v = values, rows.k_row = args.d_qk, rows.v_row = args.d_v;
  rows.k_head = rows.v_head = 0;
  return copy;
}

}  // namespace

int32_t sparse_attn_isas() { return kCount; }
int32_t sparse_attn_default_isa() {
  int32_t isa = 0;
  while (!sparse_attn_isa_supported(isa)) isa++;
#if defined(__x86_64__)
  // With bf16 dots, Intel's cores multiply at half the rate of fp32 multiply-adds (a dot takes two cycles),
  // AMD's at twice the rate.
  if (kIsas[isa].kernels == &kernels_avx512bf16 && __builtin_cpu_is("intel")) isa++;
#endif
  return isa;
}
int32_t sparse_attn_has_openmp() { return kHasOpenMP; }
int64_t sparse_attn_sizeof(const char* name) {
  constexpr struct {
    const char* name;
    int64_t bytes;
  } kStructures[] = {
      {"IndexArgs", sizeof(IndexArgs)},         {"Segment", sizeof(Segment)},
      {"AttentionArgs", sizeof(AttentionArgs)}, {"SelectArgs", sizeof(SelectArgs)},
      {"SlotArgs", sizeof(SlotArgs)},           {"Rows", sizeof(Rows)},
      {"Quantisation", sizeof(Quantisation)},   {"WriteArgs", sizeof(WriteArgs)},
      {"QuantiseArgs", sizeof(QuantiseArgs)},
  };
  for (const auto& structure : kStructures)
    if (!std::strcmp(structure.name, name)) return structure.bytes;
  return -1;
}
const char* sparse_attn_isa_name(int32_t isa) { return kIsas[isa].kernels ? kIsas[isa].kernels->name : ""; }
int32_t sparse_attn_isa_supported(int32_t isa) { return kIsas[isa].kernels && kIsas[isa].supported(); }

void sparse_attn_index_logits(int32_t isa, int32_t threads, const IndexArgs* args, float* out,
                              int64_t out_query) {
  const auto score = find_score(isa, *args);
  const int64_t group = queries_at_a_time(*args, args->s_q), groups = (args->s_q + group - 1) / group;
  const int64_t parts = slices_for(groups, threads);
  parallel_for(groups * parts, threads, [&](int64_t i) {
    const int64_t first = i / parts * group, n = std::min(group, args->s_q - first);
    const Range mine = slice({0, args->width}, i % parts, parts);
    const Range some = within(visible_to_some(*args, first, n), mine);
    float* rows = out + first * out_query;
    if (some.begin < some.end) score(*args, {first, n, some, rows + some.begin, out_query});
    for (int64_t t = first; t < first + n; t++) {
      const Range seen = within(visible(*args, t), mine);
      std::fill(out + t * out_query + mine.begin, out + t * out_query + seen.begin, -__builtin_inff());
      std::fill(out + t * out_query + seen.end, out + t * out_query + mine.end, -__builtin_inff());
    }
  });
}

void sparse_attn_select_topk(int32_t isa, int32_t threads, const SelectArgs* args) {
  const auto select = find(isa, [](const Kernels& k) { return k.select; });
  parallel_for(args->s_q, threads, [&](int64_t t) {
    const int64_t begin = std::clamp<int64_t>(args->ks[t], 0, args->s_kv);
    const int64_t end = std::clamp<int64_t>(args->ke[t], begin, std::max(begin, args->s_kv));
    select(args->logits + t * args->logits_query + begin, begin, end - begin, args->topk,
           args->out + t * args->out_query);
  });
}

void sparse_attn_lightning_topk(int32_t isa, int32_t threads, const IndexArgs* args, int64_t topk,
                                int64_t workspace_bytes, int32_t* out, int64_t out_query, float* scores,
                                int64_t scores_query) {
  const auto score = find_score(isa, *args);
  const auto select = find(isa, [](const Kernels& k) { return k.select; });
  const int64_t row_bytes = std::max<int64_t>(1, args->width * sizeof(float));
  const int64_t rows = std::max<int64_t>(1, workspace_bytes / row_bytes);     // in memory at a time
  const auto select_from = [&](const float* row, int64_t first, int64_t t) {  // row[0] is at position first
    const Range seen = visible(*args, t);
    int32_t* indices = out + t * out_query;
    select(row + seen.begin - first, seen.begin, seen.end - seen.begin, topk, indices);
    for (int64_t i = 0; scores && i < topk; i++)
      scores[t * scores_query + i] = indices[i] < 0 ? -__builtin_inff() : row[indices[i] - first];
  };
  if (args->s_q >= threads && rows >= threads) {  // a thread selects from rows that are still in its cache
    const int64_t share = threads > 1 ? args->s_q / (4 * threads) : args->s_q;
    const int64_t group = queries_at_a_time(*args, std::min(share, rows / threads));
    parallel_for((args->s_q + group - 1) / group, threads, [&](int64_t i) {
      const int64_t first = i * group, n = std::min(group, args->s_q - first);
      const Range some = visible_to_some(*args, first, n);
      Workspace workspace(Workspace::kRow, n * row_bytes);
      float* logits = workspace.take<float>(0);
      if (some.begin < some.end) score(*args, {first, n, some, logits, args->width});
      for (int64_t j = 0; j < n; j++) select_from(logits + j * args->width, some.begin, first + j);
    });
    return;
  }
  const int64_t batch = std::min(rows, args->s_q), group = queries_at_a_time(*args, batch);
  Workspace workspace(Workspace::kRow, batch * row_bytes);
  float* logits = workspace.take<float>(0);
  for (int64_t first = 0; first < args->s_q; first += batch) {
    const int64_t n = std::min(batch, args->s_q - first);
    parallel_for((n + group - 1) / group * threads, threads, [&](int64_t i) {
      const int64_t t = i / threads * group, queries = std::min(group, n - t);
      const Range mine = slice(visible_to_some(*args, first + t, queries), i % threads, threads);
      float* rows = logits + t * args->width + mine.begin;
      if (mine.begin < mine.end) score(*args, {first + t, queries, mine, rows, args->width});
    });
    parallel_for(n, threads, [&](int64_t i) { select_from(logits + i * args->width, 0, first + i); });
  }
}

void sparse_attn_physical_slots(int32_t, int32_t threads, const SlotArgs* args) {
  constexpr int64_t kSlots = int64_t{1} << 31;  // those that int32 can number; no larger page differs
  const uint32_t page_size = static_cast<uint32_t>(std::min(args->page_size, kSlots));
  const int64_t page_stride = std::min(args->page_stride, kSlots);
  parallel_for(args->s_q, threads, [&](int64_t t) {
    const int64_t row = table_row(*args, t), pages = row < args->tables ? args->max_pages : 0;
    const int32_t* table = args->block_table + (pages ? row * args->block_table_row : 0);
    const int32_t* indices = args->indices + t * args->indices_query;
    int32_t* out = args->out + t * args->out_query;
    for (int64_t i = 0; i < args->topk; i++) {
      const uint32_t index = static_cast<uint32_t>(indices[i]), entry = index / page_size;
      const int64_t page = indices[i] >= 0 && entry < pages ? table[entry] : -1;
      const int64_t slot = page * page_stride + index % page_size;
      out[i] = static_cast<int32_t>(page >= 0 && slot < kSlots ? slot : -1);
    }
  });
}

void sparse_attn_attend(int32_t isa, int32_t threads, const AttentionArgs* args) {
  const int64_t group = args->h_q / args->h_kv;
  const bool few = group <= find(isa, [](const Kernels& k) { return k.few_heads; });
  const bool plain = std::all_of(args->segments, args->segments + args->n_segments,
                                 [](const Segment& s) { return s.format == kPlain; });
  const auto attend = find(isa, [&](const Kernels& k) {
    const auto& many_or_few = plain ? few ? k.attend_few : k.attend
                              : few ? k.attend_few_packed
                                    : k.attend_packed;
    return many_or_few[args->dtype];
  });
  const bool copied = few && plain && copies_heads(*args);
  // The heads of one kv head; or all, if each kv head has few, they share their indices, and their rows lie
  // side by side. One call serves such a range, or a part of it. All queries come before the next range, so
  // that the rows of one kv head stay in the processor's cache.
  const Segment& first_rows = args->segments[0];
  const bool joined = few && !copied && first_rows.indices_head == 0 && first_rows.k_head <= first_rows.k_row;
  const int64_t range = joined ? args->h_q : group, unit = few ? group : kHeadUnit;
  int64_t block = few ? range : std::min(group, kMaxHeads);
  while (block > unit && args->s_q * (args->h_q / block) < threads) block = round_up((block + 1) / 2, unit);
  const int64_t blocks = (range + block - 1) / block, ranges = args->h_q / range;
  const auto attend_ranges = [&](const AttentionArgs& from, int64_t begin, int64_t end) {
    parallel_for((end - begin) * args->s_q * blocks, threads, [&](int64_t i) {
      const int64_t first = (begin + i / (args->s_q * blocks)) * range, t = i / blocks % args->s_q;
      const int64_t head = first + i % blocks * block;
      attend(from, t, head, std::min(head + block, first + range));
    });
  };
  if (!copied) return attend_ranges(*args, 0, ranges);
  Workspace workspace(Workspace::kRow,
                      first_rows.s_kv * (args->d_qk + args->d_v) * element_bytes(args->dtype));
  char* memory = workspace.take<char>(0);
  for (int64_t i = 0; i < ranges; i++) attend_ranges(copy_head(*args, i, threads, memory), i, i + 1);
}

void sparse_attn_write(int32_t isa, int32_t threads, const WriteArgs* args) {
  const auto write = find(isa, [](const Kernels& k) { return k.write; });
  for_chunks(args->rows.tokens, threads, [&](int64_t begin, int64_t end) { write(*args, begin, end); });
}

void sparse_attn_quantise(int32_t isa, int32_t threads, const QuantiseArgs* args) {
  const auto quantise = find(isa, [](const Kernels& k) { return k.quantise; });
  for_chunks(args->rows.tokens * args->rows.heads, threads,
             [&](int64_t begin, int64_t end) { quantise(*args, begin, end); });
}

int64_t sparse_attn_peak(int32_t isa, int32_t kind, int64_t rounds) {
  return kIsas[isa].kernels ? kIsas[isa].kernels->peak(kind, rounds) : 0;
}
