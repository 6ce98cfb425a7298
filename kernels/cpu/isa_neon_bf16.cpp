#include "isa.h"

extern const Kernels kernels_portable;

// bf16 tensors use the dot instruction; the portable set serves everything else.
extern const Kernels kernels_neon_bf16 = {
    "neon_bf16",
    {score_plain<TileScorer<Bf16Dot, bfloat16>>},
    {score_packed<TileScorer<Bf16Dot, bfloat16>>},
    nullptr,
    {attend_plain<TileEngine<Bf16Dot, bfloat16>>},
    {},
    {attend_packed_in_bf16<TileEngine<Bf16Dot, bfloat16>, kernels_portable>},
    {},
    [](int32_t kind, int64_t rounds) { return kind == kPeakBf16 ? run_peak<Bf16Dot>(rounds) : 0; },
};
