#include "isa.h"

extern const Kernels kernels_portable = fp32_kernels("portable");
