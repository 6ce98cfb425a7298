// The kernels of the instruction set that the including translation unit is compiled for.
#pragma once

#include "few_heads.h"
#include "few_index_heads.h"
#include "peak.h"
#include "topk.h"
#include "writers.h"

namespace {

// Everything is computed in fp32, whatever the tensors hold.
constexpr Kernels fp32_kernels(const char* name) {
  constexpr auto score_any = score_packed<TileScorer<Fp32, float>>;
  constexpr auto attend_any = attend_packed<TileEngine<Fp32, float>>;
  constexpr auto attend_few_any = attend_few_heads<PackedRows<float>>;
  return {
      name,
      {score_plain<TileScorer<Fp32, bfloat16>>, score_plain<TileScorer<Fp32, float16>>,
       score_plain<TileScorer<Fp32, float>>},
      {score_any, score_any, score_any},
      select_row,
      {attend_plain<TileEngine<Fp32, bfloat16>>, attend_plain<TileEngine<Fp32, float16>>,
       attend_plain<TileEngine<Fp32, float>>},
      {attend_few_heads<PlainRows<bfloat16>>, attend_few_heads<PlainRows<float16>>,
       attend_few_heads<PlainRows<float>>},
      kFewHeads,
      {attend_any, attend_any, attend_any},
      {attend_few_any, attend_few_any, attend_few_any},
      [](int32_t kind, int64_t rounds) { return kind == kPeakFp32 ? run_peak<Fp32>(rounds) : 0; },
      write_rows,
      quantise_rows,
  };
}

#if defined(SPARSE_ATTN_BF16_DOT)
// bf16 tensors use the dot instruction; the fp32 set serves everything else.
template <const Kernels& Fp32Set>
constexpr Kernels bf16_dot_kernels(const char* name) {
  return {
      name,
      {score_plain<TileScorer<Bf16Dot, bfloat16>>},
      {score_packed<TileScorer<Bf16Dot, bfloat16>>},
      nullptr,
      {attend_plain<TileEngine<Bf16Dot, bfloat16>>},
      {},
      0,
      {attend_packed_in_bf16<TileEngine<Bf16Dot, bfloat16>, Fp32Set>},
      {},
      [](int32_t kind, int64_t rounds) { return kind == kPeakBf16 ? run_peak<Bf16Dot>(rounds) : 0; },
  };
}
#endif

}  // namespace
