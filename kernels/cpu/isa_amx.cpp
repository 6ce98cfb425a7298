#include "amx.h"
#include "isa.h"

// bf16 tensors on tiles; a few heads would leave them empty, so those stay with AVX512.
extern const Kernels kernels_amx = {
    "amx",   {score_row<AmxScorer>},
    nullptr, {attend_heads<AmxEngine>},
    {},      [](int32_t kind, int64_t rounds) { return kind == kPeakBf16 ? run_tile_peak(rounds) : 0; },
};
