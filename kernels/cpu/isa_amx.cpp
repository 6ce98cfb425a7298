#include "amx.h"
#include "isa.h"

extern const Kernels kernels_avx512;

// bf16 tensors use tiles. A few heads would leave most of a tile empty, so AVX512 serves them.
extern const Kernels kernels_amx = {
    "amx",
    {score_each<AmxScorer>},
    {score_packed<AmxScorer>},
    nullptr,
    {attend_plain<AmxEngine>},
    {},
    0,
    {attend_packed_in_bf16<AmxEngine, kernels_avx512>},
    {},
    [](int32_t kind, int64_t rounds) { return kind == kPeakBf16 ? run_tile_peak(rounds) : 0; },
};
