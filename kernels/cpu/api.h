// The C ABI, called through ctypes. `isa` is an index below sparse_attn_isas(), the widest set first; the set
// must be supported. Functions may run in several threads at once, and each uses at most `threads` threads.
#pragma once

#include "common.h"

#pragma GCC visibility push(default)
extern "C" {

int32_t sparse_attn_isas();
const char* sparse_attn_isa_name(int32_t isa);
int32_t sparse_attn_isa_supported(int32_t isa);
int32_t sparse_attn_default_isa();  // the fastest that is supported
int32_t sparse_attn_has_openmp();

// sizeof the structure of this name in common.h, so that callers can check their layout; -1 for another name.
int64_t sparse_attn_sizeof(const char* name);

void sparse_attn_index_logits(int32_t isa, int32_t threads, const IndexArgs* args, float* out,
                              int64_t out_query);
void sparse_attn_select_topk(int32_t isa, int32_t threads, const SelectArgs* args);
void sparse_attn_lightning_topk(int32_t isa, int32_t threads, const IndexArgs* args, int64_t topk,
                                int64_t workspace_bytes, int32_t* out, int64_t out_query, float* scores,
                                int64_t scores_query);  // scores may be null
void sparse_attn_physical_slots(int32_t isa, int32_t threads, const SlotArgs* args);
void sparse_attn_attend(int32_t isa, int32_t threads, const AttentionArgs* args);
void sparse_attn_write(int32_t isa, int32_t threads, const WriteArgs* args);
void sparse_attn_quantise(int32_t isa, int32_t threads, const QuantiseArgs* args);

// The operations of a loop in registers; see Kernels::peak.
int64_t sparse_attn_peak(int32_t isa, int32_t kind, int64_t rounds);
}
#pragma GCC visibility pop
