"""The topk highest logits of each row, exactly: a radix select.

    out[t] = the positions s of the topk highest logits[t, s], ks[t] <= s < ke[t], ascending, then -1

A logit becomes a 32-bit key of the same order; -0.0 equals +0.0, and NaN and -inf are never selected.
Histograms of three digits (12, 12 and 8 bits) find the topk-th key, and how many ties to keep, leftmost
first.

A row is read twice. The second read lists the keys that the first digit selects or leaves undecided, with
their positions; the later steps read the list. It has room for an eighth of the row. Where that is too little
(plateaus of equal logits), the list is not used and the row is read two more times.

Many rows: one program per row. Few long rows: each is cut into segments, one program per segment, and each
step is a launch. Only sums of integers combine the segments, so their order changes nothing.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl

from .arguments import refuse_fp64

if TYPE_CHECKING:
    from ..ops.index import SelectTopkOp

BLOCK = 2048  # logits at a time, 8 per thread: at most 128 registers, so two programs per SM
NUM_WARPS = 8
LIST_SHARE = 8  # a list has room for 1 / LIST_SHARE of what its program reads
# Segments: long enough to be worth four launches, as many as fill a GPU, few enough for one tile of counts.
MIN_SEGMENT = 4 * BLOCK
MIN_SEGMENTS, MAX_SEGMENTS = 4, 64
PROGRAMS = 256

BINS_1, BINS_2, BINS_3 = tl.constexpr(1 << 12), tl.constexpr(1 << 12), tl.constexpr(1 << 8)
NEVER = tl.constexpr(0)  # the key of NaN and -inf, below every other


def refuses(a: "SelectTopkOp") -> str | None:
    """Why these kernels cannot run ``a``, or None."""
    return refuse_fp64(a.logits)


def select_topk(a: "SelectTopkOp") -> None:
    """Fill out."""
    s_q, s_kv = a.logits.shape
    if s_q == 0 or s_kv == 0:
        a.out.fill_(-1)
        return
    segments = _segments(s_q, s_kv)
    room = triton.cdiv(s_kv, segments) // LIST_SHARE
    new = a.logits.new_empty
    arguments = (
        a.logits,
        *a.logits.stride(),
        a.ks.contiguous(),
        a.ke.contiguous(),
        new(s_q, segments, 2, room, dtype=torch.int32),
        room,
        a.out,
        *a.out.stride(),
        s_kv,
        a.topk,
    )
    options = {"BLOCK": BLOCK, "num_warps": NUM_WARPS, "enable_fp_fusion": True}
    with torch.cuda.device_of(a.logits):
        if segments == 1:
            _select_topk_kernel[(s_q,)](*arguments, **options)
            return
        counts = a.logits.new_zeros(s_q, BINS_1.value + BINS_2.value, dtype=torch.int32)
        third = new(s_q, segments, BINS_3.value, dtype=torch.int32)
        sizes = new(s_q, segments, 2, dtype=torch.int32)
        state = new(s_q, 5, dtype=torch.int32)
        for step in range(4):
            _select_topk_step_kernel[(s_q * segments,)](
                *arguments, counts, third, sizes, state, SEGMENTS=segments, STEP=step, **options
            )


def _segments(s_q: int, s_kv: int) -> int:
    """How many segments a row is cut into, a power of two. It depends on shapes alone."""
    segments = min(s_kv // MIN_SEGMENT, PROGRAMS // s_q, MAX_SEGMENTS)
    return 1 << segments.bit_length() - 1 if segments >= MIN_SEGMENTS else 1


class Row(NamedTuple):
    """What one program reads, positions [start, stop) of a row, and its list."""

    ptr: Any  # position 0
    stride: Any
    start: Any
    stop: Any
    width: Any
    list_ptr: Any
    room: Any


@triton.jit(do_not_specialize=["room", "stride_out_t", "topk"])
def _select_topk_kernel(
    logits_ptr,  # [s_q, width]
    stride_logits_t,
    stride_logits_n,
    ks_ptr,  # [s_q]
    ke_ptr,  # [s_q]
    list_ptr,  # [s_q, 1, 2, room]: keys, and their positions
    room,
    out_ptr,  # [s_q, topk]
    stride_out_t,
    stride_out_n,
    width,
    topk,
    BLOCK: tl.constexpr,
):
    """One program: one row."""
    t = tl.program_id(0).to(tl.int64)
    start = tl.maximum(tl.load(ks_ptr + t), 0)
    stop = tl.minimum(tl.load(ke_ptr + t), width)
    row_ptr = logits_ptr + t * stride_logits_t
    row = Row(row_ptr, stride_logits_n, start, stop, width, list_ptr + t * 2 * room, room)
    out_row = out_ptr + t * stride_out_t

    counts = _count_first_digits(row, BLOCK)
    chosen = tl.minimum(tl.sum(counts, 0), topk)
    first, wanted = _find_digit(counts, chosen, BINS_1)
    counts, entries = _list_and_count_second_digits(row, first, BLOCK)
    tl.debug_barrier()  # other threads read the list than wrote it
    second, wanted = _find_digit(counts, wanted, BINS_2)
    prefix = first * BINS_2 + second
    counts, _above = _count_third_digits(row, entries, prefix, BLOCK)
    third, wanted = _find_digit(counts, wanted, BINS_3)
    none = tl.full([], 0, tl.int32)
    _write(row, entries, prefix, third, wanted, none, none, out_row, stride_out_n, BLOCK)
    _pad(chosen, topk, out_row, stride_out_n, BLOCK)


@triton.jit(do_not_specialize=["room", "stride_out_t", "topk"])
def _select_topk_step_kernel(
    logits_ptr,  # [s_q, width]
    stride_logits_t,
    stride_logits_n,
    ks_ptr,  # [s_q]
    ke_ptr,  # [s_q]
    list_ptr,  # [s_q, SEGMENTS, 2, room]
    room,
    out_ptr,  # [s_q, topk]
    stride_out_t,
    stride_out_n,
    width,
    topk,
    counts_ptr,  # [s_q, BINS_1 + BINS_2]: first and second digits of all segments, zero before step 0
    third_ptr,  # [s_q, SEGMENTS, BINS_3]: third digits of each segment
    sizes_ptr,  # [s_q, SEGMENTS, 2]: entries of the list, keys above the prefix
    state_ptr,  # [s_q, 5]: chosen; first, wanted after step 1; prefix, wanted after step 2
    SEGMENTS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one step of _select_topk_kernel, for one segment of one row."""
    t = (tl.program_id(0) // SEGMENTS).to(tl.int64)
    segment = tl.program_id(0) % SEGMENTS
    start = tl.maximum(tl.load(ks_ptr + t), 0)
    stop = tl.minimum(tl.load(ke_ptr + t), width)
    # Segments divide the visible range, not the row, in whole blocks.
    origin = start // BLOCK * BLOCK
    length = tl.cdiv(tl.cdiv(stop - origin, SEGMENTS), BLOCK) * BLOCK
    start = tl.maximum(start, origin + segment * length)
    stop = tl.minimum(stop, origin + (segment + 1) * length)
    row_ptr = logits_ptr + t * stride_logits_t
    list_ptr += (t * SEGMENTS + segment) * 2 * room
    row = Row(row_ptr, stride_logits_n, start, stop, width, list_ptr, room)
    counts_ptr += t * (BINS_1 + BINS_2)
    third_ptr += t * SEGMENTS * BINS_3
    sizes_ptr += t * SEGMENTS * 2
    state_ptr += t * 5

    if STEP == 0:
        _add(counts_ptr, _count_first_digits(row, BLOCK), BINS_1)
    if STEP == 1:
        counts = tl.load(counts_ptr + tl.arange(0, BINS_1))  # [BINS_1]
        chosen = tl.minimum(tl.sum(counts, 0), topk)
        first, wanted = _find_digit(counts, chosen, BINS_1)
        counts, entries = _list_and_count_second_digits(row, first, BLOCK)
        _add(counts_ptr + BINS_1, counts, BINS_2)
        tl.store(sizes_ptr + segment * 2, entries)
        if segment == 0:
            tl.store(state_ptr, chosen)
            tl.store(state_ptr + 1, first)
            tl.store(state_ptr + 2, wanted)
    if STEP == 2:
        counts = tl.load(counts_ptr + BINS_1 + tl.arange(0, BINS_2))  # [BINS_2]
        second, wanted = _find_digit(counts, tl.load(state_ptr + 2), BINS_2)
        prefix = tl.load(state_ptr + 1) * BINS_2 + second
        counts, above = _count_third_digits(row, tl.load(sizes_ptr + segment * 2), prefix, BLOCK)
        tl.store(third_ptr + segment * BINS_3 + tl.arange(0, BINS_3), counts)
        tl.store(sizes_ptr + segment * 2 + 1, above)
        if segment == 0:
            tl.store(state_ptr + 3, prefix)
            tl.store(state_ptr + 4, wanted)
    if STEP == 3:
        prefix = tl.load(state_ptr + 3)
        offs_s = tl.arange(0, SEGMENTS)  # [SEGMENTS]
        offs_b = tl.arange(0, BINS_3)  # [BINS_3]
        counts = tl.load(third_ptr + offs_s[:, None] * BINS_3 + offs_b[None, :])  # [SEGMENTS, BINS_3]
        third, wanted = _find_digit(tl.sum(counts, 0), tl.load(state_ptr + 4), BINS_3)
        above = tl.load(sizes_ptr + offs_s * 2 + 1)  # [SEGMENTS]
        above += tl.sum(tl.where(offs_b[None, :] > third, counts, 0), 1)
        equal = tl.sum(tl.where(offs_b[None, :] == third, counts, 0), 1)  # [SEGMENTS]
        above_before = tl.sum(tl.where(offs_s < segment, above, 0), 0)
        equal_before = tl.sum(tl.where(offs_s < segment, equal, 0), 0)
        entries = tl.load(sizes_ptr + segment * 2)
        out_row = out_ptr + t * stride_out_t
        _write(row, entries, prefix, third, wanted, above_before, equal_before, out_row, stride_out_n, BLOCK)
        if segment == 0:
            _pad(tl.load(state_ptr), topk, out_row, stride_out_n, BLOCK)


@triton.jit
def _read(row, n, BLOCK: tl.constexpr):
    """Keys and positions of one block from n, a multiple of BLOCK; NEVER outside the range."""
    offs_n = n + tl.arange(0, BLOCK)  # [BLOCK]
    # A bound at a multiple of 4, where the width is one, keeps loads 16 bytes wide.
    bound = tl.minimum(tl.cdiv(row.stop, 4) * 4, row.width)
    x = tl.load(row.ptr + offs_n.to(tl.int64) * row.stride, mask=offs_n < bound, other=float("-inf"))
    bits = tl.where(x == 0.0, 0.0, x).to(tl.uint32, bitcast=True)  # -0.0 becomes +0.0
    keys = tl.where(bits >> 31 != 0, ~bits, bits | 0x80000000)
    eligible = (x > float("-inf")) & (offs_n >= row.start) & (offs_n < row.stop)  # NaN compares false
    return tl.where(eligible, keys, NEVER), offs_n


@triton.jit
def _range(row, BLOCK: tl.constexpr):
    """The blocks of the row, as (begin, end) of a loop."""
    return row.start // BLOCK * BLOCK, row.stop


@triton.jit
def _read_again(row, entries, n, BLOCK: tl.constexpr):
    """Keys and positions of one block from n: of the list if it holds all entries, else of the row."""
    if entries <= row.room:
        offs = n + tl.arange(0, BLOCK)  # [BLOCK]
        listed = offs < entries
        keys = tl.load(row.list_ptr + offs, mask=listed, other=NEVER).to(tl.uint32, bitcast=True)
        positions = tl.load(row.list_ptr + row.room + offs, mask=listed, other=0)
    else:
        keys, positions = _read(row, n, BLOCK)
    return keys, positions


@triton.jit
def _range_again(row, entries, BLOCK: tl.constexpr):
    begin, end = _range(row, BLOCK)
    listed = entries <= row.room
    return tl.where(listed, 0, begin), tl.where(listed, entries, end)


@triton.jit
def _count_first_digits(row, BLOCK: tl.constexpr):
    counts = tl.zeros([BINS_1], tl.int32)
    begin, end = _range(row, BLOCK)
    for n in range(begin, end, BLOCK):
        keys, _positions = _read(row, n, BLOCK)
        counts += tl.histogram((keys >> 20).to(tl.int32), BINS_1, mask=keys != NEVER)
    return counts


@triton.jit
def _list_and_count_second_digits(row, first, BLOCK: tl.constexpr):
    """List the keys whose first digit is ``first`` or above; count the second digits after ``first``.

    Returns:
        counts [BINS_2], and the number of these keys, which the list may be too short for.
    """
    counts = tl.zeros([BINS_2], tl.int32)
    entries = 0
    begin, end = _range(row, BLOCK)
    for n in range(begin, end, BLOCK):
        keys, positions = _read(row, n, BLOCK)
        digits = (keys >> 20).to(tl.int32)
        counts += tl.histogram(((keys >> 8) & 0xFFF).to(tl.int32), BINS_2, mask=digits == first)
        kept = (digits >= first) & (keys != NEVER)
        slots = entries + tl.cumsum(kept.to(tl.int32), 0) - 1
        fits = kept & (slots < row.room)
        tl.store(row.list_ptr + slots, keys.to(tl.int32, bitcast=True), mask=fits)
        tl.store(row.list_ptr + row.room + slots, positions, mask=fits)
        entries += tl.sum(kept.to(tl.int32), 0)
    return counts, entries


@triton.jit
def _count_third_digits(row, entries, prefix, BLOCK: tl.constexpr):
    """Count the third digits after ``prefix``, and the keys above it."""
    counts = tl.zeros([BINS_3], tl.int32)
    above = 0
    begin, end = _range_again(row, entries, BLOCK)
    for n in range(begin, end, BLOCK):
        keys, _positions = _read_again(row, entries, n, BLOCK)
        prefixes = (keys >> 8).to(tl.int32)
        counts += tl.histogram((keys & 0xFF).to(tl.int32), BINS_3, mask=prefixes == prefix)
        above += tl.sum((prefixes > prefix).to(tl.int32), 0)
    return counts, above


@triton.jit
def _write(
    row, entries, prefix, third, ties, above, equal, out_ptr, stride_out_n, BLOCK: tl.constexpr
):  # fmt: skip
    """Write the positions of keys above the topk-th, and of the first ``ties`` equal to it.

    ``above`` and ``equal`` count the keys of either kind in earlier segments.
    """
    kth = (prefix.to(tl.uint32) << 8) | third.to(tl.uint32)
    begin, end = _range_again(row, entries, BLOCK)
    for n in range(begin, end, BLOCK):
        keys, positions = _read_again(row, entries, n, BLOCK)
        is_above, is_equal = keys > kth, keys == kth
        both = tl.cumsum((is_above.to(tl.int32) << 16) | is_equal.to(tl.int32), 0)  # one scan for two counts
        equals = equal + (both & 0xFFFF)
        slots = above + (both >> 16) + tl.minimum(equals, ties) - 1
        chosen = is_above | (is_equal & (equals <= ties))
        tl.store(out_ptr + slots.to(tl.int64) * stride_out_n, positions, mask=chosen)
        above += tl.sum(is_above.to(tl.int32), 0)
        equal += tl.sum(is_equal.to(tl.int32), 0)


@triton.jit
def _pad(chosen, topk, out_ptr, stride_out_n, BLOCK: tl.constexpr):
    for n in range(chosen, topk, BLOCK):
        offs_n = n + tl.arange(0, BLOCK)
        tl.store(out_ptr + offs_n.to(tl.int64) * stride_out_n, -1, mask=offs_n < topk)


@triton.jit
def _find_digit(counts, wanted, BINS: tl.constexpr):
    """The digit of the ``wanted``-th highest key, and how many keys with that digit are still wanted."""
    bins = tl.arange(0, BINS)
    at_least = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts  # [BINS]
    digit = tl.max(tl.where(at_least >= wanted, bins, 0), 0)
    return digit, wanted - tl.sum(tl.where(bins > digit, counts, 0), 0)


@triton.jit
def _add(counts_ptr, counts, BINS: tl.constexpr):
    tl.atomic_add(counts_ptr + tl.arange(0, BINS), counts, mask=counts > 0, sem="relaxed")
