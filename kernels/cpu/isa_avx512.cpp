#include "isa.h"

extern const Kernels kernels_avx512 = fp32_kernels("avx512");
