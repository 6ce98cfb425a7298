// The rows that a query selects, as pointers; kernels take a block of them at a time.
#pragma once

#include "packed.h"

namespace {

// Calls f(segment, row) for every selected row of all segments, in order. Skips indices outside [0, s_kv).
template <class F>
inline void for_each_selected(const AttentionArgs& args, int64_t t, int64_t kv_head, F&& f) {
  for (int i = 0; i < args.n_segments; i++) {
    const Segment& s = args.segments[i];
    const int32_t* indices = s.indices + t * s.indices_query + kv_head * s.indices_head;
    const int64_t length = s.topk_length && s.topk_length[t] < s.topk ? s.topk_length[t] : s.topk;
    for (int64_t j = 0; j < length; j++)
      if (indices[j] >= 0 && indices[j] < s.s_kv) f(s, static_cast<int64_t>(indices[j]));
  }
}

inline int64_t max_rows(const AttentionArgs& args) {
  int64_t n = 0;
  for (int i = 0; i < args.n_segments; i++) n += args.segments[i].topk;
  return n;
}

// Whether a row's value is the beginning of its key, as in MLA.
inline bool values_are_keys(const AttentionArgs& args) { return args.segments[0].v == args.segments[0].k; }

// Rows that are not quantised, read in place.
template <class T>
class PlainRows {
 public:
  using Element = T;
  static constexpr bool kInPlace = true;
  static constexpr int kBytes = sizeof(T);  // of an element

  template <class Memory>
  PlainRows(const AttentionArgs& args, int64_t, Memory& memory)
      : args_(args),
        k_(memory.template take<const T*>(max_rows(args))),
        v_(memory.template take<const T*>(max_rows(args))) {}

  int64_t select(int64_t t, int64_t kv_head) {
    int64_t n = 0;
    for_each_selected(args_, t, kv_head, [&](const Segment& s, int64_t row) {
      k_[n] = static_cast<const T*>(s.k) + kv_head * s.k_head + row_offset(s, row, s.k_row);
      v_[n++] = static_cast<const T*>(s.v) + kv_head * s.v_head + row_offset(s, row, s.v_row);
    });
    return n;
  }

  void take(int64_t first, int64_t) { first_ = first; }  // sets the block of keys() and values()
  const T* const* keys() const { return k_ + first_; }
  const T* const* values() const { return v_ + first_; }

  // Prefetch the key of row i, or n elements of its value from a column on; kv_head 0 is that of select().
  void prefetch_key(int64_t i, int64_t kv_head = 0) const {
    prefetch<2>(k_[i] + kv_head * args_.segments[0].k_head, args_.d_qk * sizeof(T));
  }
  void prefetch_value(int64_t i, int64_t kv_head, int64_t column, int64_t n) const {
    if (!values_are_keys(args_))
      prefetch<2>(v_[i] + kv_head * args_.segments[0].v_head + column, n * sizeof(T));
  }

  // The address from which the caller is to prefetch row i. The call itself prefetches the rest of the row.
  const auto* fetch(int64_t i) const {
    prefetch_value(i, 0, 0, args_.d_v);
    return k_[i];
  }

 private:
  const AttentionArgs& args_;
  const T **k_, **v_;
  int64_t first_ = 0;
};

// Rows of latent caches, at least one of them quantised; decoded to T a block at a time.
template <class T>
class PackedRows {
 public:
  using Element = T;
  static constexpr bool kInPlace = false;
  static constexpr int kBytes = 1;  // of an element, approximately

  template <class Memory>
  PackedRows(const AttentionArgs& args, int64_t block, Memory& memory)
      : args_(args),
        rows_(memory.template take<PackedRow>(max_rows(args))),
        decoded_(memory.template take<T>(block * args.d_qk)),
        pointers_(memory.template take<const T*>(block)) {}

  int64_t select(int64_t t, int64_t) {
    int64_t n = 0;
    for_each_selected(args_, t, 0,
                      [&](const Segment& s, int64_t row) { rows_[n++] = packed_row(s, args_.dtype, row); });
    return n;
  }

  void take(int64_t first, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
      T* row = decoded_ + i * args_.d_qk;
      decode_row(rows_[first + i], args_.dtype, args_.d_qk, row);
      pointers_[i] = row;
    }
  }
  const T* const* keys() const { return pointers_; }
  const T* const* values() const { return pointers_; }

  void prefetch_key(int64_t i, int64_t = 0) const {
    prefetch<2>(fetch(i), args_.d_qk);  // a byte per value: most of a row, in every format
  }
  void prefetch_value(int64_t, int64_t, int64_t, int64_t) const {}  // a part of the key

  const auto* fetch(int64_t i) const {
    if (rows_[i].scales) prefetch_line<2>(rows_[i].scales);
    return rows_[i].bytes;
  }

 private:
  const AttentionArgs& args_;
  PackedRow* rows_;
  T* decoded_;
  const T** pointers_;
};

// Whether bf16 holds every value that query t selects exactly.
inline bool selected_exact_in_bf16(const AttentionArgs& args, int64_t t) {
  bool exact = true;
  for_each_selected(args, t, 0, [&](const Segment& s, int64_t row) {
    exact = exact && exact_in_bf16(packed_row(s, args.dtype, row));
  });
  return exact;
}

}  // namespace
