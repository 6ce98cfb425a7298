#include "isa.h"

extern const Kernels kernels_portable;
extern const Kernels kernels_neon_bf16 = bf16_dot_kernels<kernels_portable>("neon_bf16");
