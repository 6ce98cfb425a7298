#include "isa.h"

extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512bf16 = bf16_dot_kernels<kernels_avx512>("avx512bf16");
