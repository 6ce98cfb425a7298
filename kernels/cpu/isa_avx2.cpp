#include "isa.h"

extern const Kernels kernels_avx2 = fp32_kernels("avx2");
