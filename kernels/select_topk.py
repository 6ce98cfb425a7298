"""The topk highest logits of each row, exactly: a guess from a sample, then a radix select.

    out[t] = the positions s of the topk highest logits[t, s], ks[t] <= s < ke[t], ascending, then -1

A logit becomes a 32-bit key of the same order; -0.0 equals +0.0, and NaN and -inf are never selected.

A sample of the row suggests a floor, a key that somewhat more than topk keys reach. One read of the row lists
the logits above the floor, with their positions, and the first topk that equal it. Histograms of 8-bit digits
find the topk-th key of the list, and how many ties to keep, leftmost first. A bad guess costs time and no
more: where the list lacks keys or has no room, the same steps read the row instead, five times at most. Where
the topk-th key is the floor itself, a plateau, no digits are needed.

Digits are small because Triton before 3.8 makes thousands of instructions of a histogram of 4096 bins.

Many rows: one program per row. Few long rows: each is cut into segments, one program per segment, which
count what they will list, then list it behind the earlier segments; one program per row does the rest. No
program waits for another, and no sum depends on their order.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl

from .arguments import refuse_fp64

if TYPE_CHECKING:
    from ..ops.index import SelectTopkOp

BLOCK = 2048  # logits at a time, 8 per thread, and in a sample
NUM_WARPS = 8
LIST_SHARE = 8  # a list has room for 1 / LIST_SHARE of the row
# Segments: enough to be worth two more launches, as many as fill a GPU, few enough for one tile of sizes.
MIN_SEGMENT = 2 * BLOCK
MIN_SEGMENTS, MAX_SEGMENTS = 4, 64
PROGRAMS = 256

BITS = tl.constexpr(8)  # of a digit
BINS = tl.constexpr(1 << 8)
GROUP = tl.constexpr(4)  # neighbours in a sample: fewer would fetch more memory for the same sample
NEVER = tl.constexpr(0)  # the key of NaN and -inf, below every other
LOWEST = tl.constexpr(0x00800000)  # the key of the lowest finite number
MAX_SIZES = tl.constexpr(MAX_SEGMENTS)


def refuses(a: "SelectTopkOp") -> str | None:
    """Why these kernels cannot run ``a``, or None."""
    return refuse_fp64(a.logits)


def select_topk(a: "SelectTopkOp") -> None:
    """Fill out."""
    s_q, s_kv = a.logits.shape
    if s_q == 0 or s_kv == 0:
        a.out.fill_(-1)
        return
    room = s_kv // LIST_SHARE
    segments = _segments(s_q, s_kv) if a.topk < room else 1  # else there are no lists
    new = a.logits.new_empty
    row = a.logits, *a.logits.stride(), a.ks.contiguous(), a.ke.contiguous(), s_kv, a.topk
    listed = (
        new(s_q, room, dtype=torch.int64),
        room,
        new(s_q, 1 + 2 * segments, dtype=torch.int32),
        segments,
    )
    options = {"BLOCK": BLOCK, "num_warps": NUM_WARPS, "enable_fp_fusion": True}
    with torch.cuda.device_of(a.logits):
        if segments > 1:
            _count_segment_kernel[(s_q * segments,)](*row, *listed, **options)
            _list_segment_kernel[(s_q * segments,)](*row, *listed, **options)
        _select_topk_kernel[(s_q,)](*row, *listed, a.out, *a.out.stride(), **options)


def _segments(s_q: int, s_kv: int) -> int:
    """How many segments a row is cut into, a power of two. It depends on shapes alone."""
    segments = min(s_kv // MIN_SEGMENT, PROGRAMS // s_q, MAX_SEGMENTS)
    return 1 << segments.bit_length() - 1 if segments >= MIN_SEGMENTS else 1


class Row(NamedTuple):
    """What one program reads: positions [start, stop) of a row, or the row's list."""

    ptr: Any  # position 0
    stride: Any
    start: Any
    stop: Any
    width: Any
    list_ptr: Any  # [room]: a position in the upper half, the bits of its logit in the lower
    room: Any


@triton.jit(do_not_specialize=["topk", "room", "segments", "stride_out_t"])
def _select_topk_kernel(
    logits_ptr,  # [s_q, width]
    stride_logits_t,
    stride_logits_n,
    ks_ptr,  # [s_q]
    ke_ptr,  # [s_q]
    width,
    topk,
    list_ptr,  # [s_q, room]
    room,
    sizes_ptr,  # [s_q, 1 + 2 * segments]: the floor, keys above it in each segment, and equal to it
    segments,
    out_ptr,  # [s_q, topk]
    stride_out_t,
    stride_out_n,
    BLOCK: tl.constexpr,
):
    """One program: one row, whose list is made already if there are segments."""
    t = tl.program_id(0).to(tl.int64)
    row = _row(t, logits_ptr, stride_logits_t, stride_logits_n, ks_ptr, ke_ptr, width, list_ptr, room)
    floor, none = tl.full([], 0, tl.uint32), tl.full([], 0, tl.int32)
    above, equal = none, none
    if segments > 1:
        floor, above, equal, _above_before, _equal_before = _sizes(sizes_ptr, t, segments, 0)
    elif topk < _limit(row, BLOCK):
        floor = _guess(row, topk, BLOCK)
        above, equal = _write(row, False, 0, floor, topk, none, none, row.list_ptr, 1, True, BLOCK)
        tl.debug_barrier()  # other threads read the list than wrote it
    entries = above + tl.minimum(equal, topk)
    listed = _is_good(row, floor, above, equal, topk)

    key, ties = floor, topk - above
    if (ties <= 0) | (ties > equal):
        key, ties = _find_key(row, listed, entries, topk, BLOCK)
    out_row = out_ptr + t * stride_out_t
    above, equal = _write(row, listed, entries, key, ties, none, none, out_row, stride_out_n, False, BLOCK)
    for n in range(above + tl.minimum(equal, ties), topk, BLOCK):
        offs_n = n + tl.arange(0, BLOCK)
        tl.store(out_row + offs_n.to(tl.int64) * stride_out_n, -1, mask=offs_n < topk)


@triton.jit(do_not_specialize=["topk", "room", "segments"])
def _count_segment_kernel(
    logits_ptr,
    stride_logits_t,
    stride_logits_n,
    ks_ptr,
    ke_ptr,
    width,
    topk,
    list_ptr,
    room,
    sizes_ptr,
    segments,
    BLOCK: tl.constexpr,
):
    """One program: the floor of one row, and how many keys of one segment are above it, and equal to it."""
    t = (tl.program_id(0) // segments).to(tl.int64)
    segment = tl.program_id(0) % segments
    row = _row(t, logits_ptr, stride_logits_t, stride_logits_n, ks_ptr, ke_ptr, width, list_ptr, room)
    sizes_ptr += t * (1 + 2 * segments)
    floor = tl.full([], 0, tl.uint32)
    above, equal = 0, 0
    if topk < _limit(row, BLOCK):
        floor = _guess(row, topk, BLOCK)  # the same in all segments
        row = _segment(row, segment, segments, BLOCK)
        logit = _logit(floor)
        begin, end = _range(row, False, 0, BLOCK)
        for n in range(begin, end, BLOCK):
            x, _positions = _read(row, False, 0, n, BLOCK)
            both = ((x > logit).to(tl.int32) << 16) | (x == logit).to(tl.int32)
            both = tl.sum(both, 0)
            above += both >> 16
            equal += both & 0xFFFF
    if segment == 0:
        tl.store(sizes_ptr, floor.to(tl.int32, bitcast=True))
    tl.store(sizes_ptr + 1 + segment, above)
    tl.store(sizes_ptr + 1 + segments + segment, equal)


@triton.jit(do_not_specialize=["topk", "room", "segments"])
def _list_segment_kernel(
    logits_ptr,
    stride_logits_t,
    stride_logits_n,
    ks_ptr,
    ke_ptr,
    width,
    topk,
    list_ptr,
    room,
    sizes_ptr,
    segments,
    BLOCK: tl.constexpr,
):
    """One program: what one segment adds to the list of its row, after the earlier segments."""
    t = (tl.program_id(0) // segments).to(tl.int64)
    segment = tl.program_id(0) % segments
    row = _row(t, logits_ptr, stride_logits_t, stride_logits_n, ks_ptr, ke_ptr, width, list_ptr, room)
    floor, above, equal, above_before, equal_before = _sizes(sizes_ptr, t, segments, segment)
    if _is_good(row, floor, above, equal, topk):
        row = _segment(row, segment, segments, BLOCK)
        _write(row, False, 0, floor, topk, above_before, equal_before, row.list_ptr, 1, True, BLOCK)


@triton.jit
def _row(t, logits_ptr, stride_logits_t, stride_logits_n, ks_ptr, ke_ptr, width, list_ptr, room):
    start = tl.minimum(tl.maximum(tl.load(ks_ptr + t), 0), width)
    stop = tl.maximum(tl.minimum(tl.load(ke_ptr + t), width), start)
    row_ptr = logits_ptr + t * stride_logits_t
    return Row(row_ptr, stride_logits_n, start, stop, width, list_ptr + t * room, room)


@triton.jit
def _segment(row, segment, segments, BLOCK: tl.constexpr):
    """Segments divide the visible range, not the row, in whole blocks."""
    origin = row.start // BLOCK * BLOCK
    length = tl.cdiv(tl.cdiv(row.stop - origin, segments), BLOCK) * BLOCK
    start = tl.maximum(row.start, origin + segment * length)
    stop = tl.minimum(row.stop, origin + (segment + 1) * length)
    return Row(row.ptr, row.stride, start, stop, row.width, row.list_ptr, row.room)


@triton.jit
def _sizes(sizes_ptr, t, segments, segment):
    """The floor; keys above and equal to it, in all segments, and in those before ``segment``."""
    sizes_ptr += t * (1 + 2 * segments)
    floor = tl.load(sizes_ptr).to(tl.uint32, bitcast=True)
    offs_s = tl.arange(0, MAX_SIZES)  # [MAX_SIZES]
    above = tl.load(sizes_ptr + 1 + offs_s, mask=offs_s < segments, other=0)
    equal = tl.load(sizes_ptr + 1 + segments + offs_s, mask=offs_s < segments, other=0)
    above_before = tl.sum(tl.where(offs_s < segment, above, 0), 0)
    equal_before = tl.sum(tl.where(offs_s < segment, equal, 0), 0)
    return floor, tl.sum(above, 0), tl.sum(equal, 0), above_before, equal_before


@triton.jit
def _limit(row, BLOCK: tl.constexpr):
    """The most entries of a list that is worth its making; 0 where the row is short itself."""
    visible = row.stop - row.start
    return tl.where(visible > 2 * BLOCK, tl.minimum(row.room, visible // 4), 0)


@triton.jit
def _is_good(row, floor, above, equal, topk):
    """Whether a list of the keys from ``floor`` on has room and holds all that may be selected."""
    return (above + tl.minimum(equal, topk) <= row.room) & ((above + equal >= topk) | (floor == LOWEST))


@triton.jit
def _read(row, listed, entries, n, BLOCK: tl.constexpr):
    """Logits and positions of one block from n, of the list or the row; -inf outside of it."""
    offs_n = n + tl.arange(0, BLOCK)  # [BLOCK]
    if listed:
        entry = tl.load(row.list_ptr + offs_n, mask=offs_n < entries, other=0xFF800000)
        x = (entry & 0xFFFFFFFF).to(tl.uint32).to(tl.float32, bitcast=True)
        positions = (entry >> 32).to(tl.int32)
    else:
        ptrs = row.ptr + offs_n.to(tl.int64) * row.stride
        if (n >= row.start) & (n + BLOCK <= row.stop):  # most blocks: no comparison per logit
            x = tl.load(ptrs)
        else:
            # A bound at a multiple of 4, where the width is one, keeps loads 16 bytes wide.
            bound = tl.minimum(tl.cdiv(row.stop, 4) * 4, row.width)
            x = tl.load(ptrs, mask=offs_n < bound, other=float("-inf"))
            x = tl.where((offs_n >= row.start) & (offs_n < row.stop), x, float("-inf"))
        positions = offs_n
    return x, positions


@triton.jit
def _range(row, listed, entries, BLOCK: tl.constexpr):
    """The blocks of the list or the row, as (begin, end) of a loop."""
    return tl.where(listed, 0, row.start // BLOCK * BLOCK), tl.where(listed, entries, row.stop)


@triton.jit
def _keys(x):
    bits = tl.where(x == 0.0, 0.0, x).to(tl.uint32, bitcast=True)  # -0.0 becomes +0.0
    keys = tl.where(bits >> 31 != 0, ~bits, bits | 0x80000000)
    return tl.where(x > float("-inf"), keys, NEVER)  # NaN compares false


@triton.jit
def _logit(key):
    """The logit of a key that is not NEVER."""
    return tl.where(key >> 31 != 0, key & 0x7FFFFFFF, ~key).to(tl.float32, bitcast=True)


@triton.jit
def _guess(row, topk, SAMPLE: tl.constexpr):
    """A key that at least topk keys probably reach, but no more than the limit of a list."""
    STRATA: tl.constexpr = SAMPLE // GROUP
    visible = row.stop - row.start
    # Groups lie evenly but for a jitter, lest they all meet one part of something periodic.
    offs = tl.arange(0, SAMPLE)  # [SAMPLE]
    group = offs // GROUP
    places = (group * STRATA + group * 1265 % STRATA).to(tl.int64)
    positions = row.start + (places * visible // (STRATA * STRATA)).to(tl.int32) + offs % GROUP
    x = tl.load(row.ptr + positions.to(tl.int64) * row.stride, mask=positions < row.stop, other=float("-inf"))
    keys = _keys(x)

    # Of the sample, the topk would be about ``few`` with a deviation of sqrt(few), twice that if neighbours
    # are alike.
    share = SAMPLE / visible.to(tl.float32)
    few = topk * share
    aim = tl.minimum(few + 6 * tl.sqrt(few) + 8, (topk + _limit(row, SAMPLE)) * share / 2).to(tl.int32)
    eligible = tl.sum((keys != NEVER).to(tl.int32), 0)
    prefix, wanted, surplus, shift = tl.full([], 0, tl.uint32), aim, aim + 1, 32
    while (shift > 0) & (surplus > aim // 16):
        shift -= BITS
        counts = _histogram(keys, prefix, shift)
        prefix, wanted, surplus = _find_digit(counts, prefix, wanted)
    return tl.where(eligible > aim, tl.maximum(prefix << shift, LOWEST), LOWEST).to(tl.uint32)


@triton.jit
def _find_key(row, listed, entries, topk, BLOCK: tl.constexpr):
    """A key, and how many that equal it, which make topk with those above it."""
    begin, end = _range(row, listed, entries, BLOCK)
    prefix, wanted, surplus, shift = tl.full([], 0, tl.uint32), topk, 1, 32
    while (shift > 0) & (surplus > 0):
        shift -= BITS
        counts = tl.zeros([BINS], tl.int32)
        for n in range(begin, end, BLOCK):
            x, _positions = _read(row, listed, entries, n, BLOCK)
            counts += _histogram(_keys(x), prefix, shift)
        prefix, wanted, surplus = _find_digit(counts, prefix, wanted)
    return prefix << shift, wanted


@triton.jit
def _histogram(keys, prefix, shift):
    """[BINS]: how many keys that begin with ``prefix`` go on with each digit."""
    begins = keys >> shift
    return tl.histogram((begins & 0xFF).to(tl.int32), BINS, mask=(begins >> BITS == prefix) & (keys != NEVER))


@triton.jit
def _find_digit(counts, prefix, wanted):
    """Append to ``prefix`` the digit of the ``wanted``-th highest key, or of the lowest if there are fewer.

    Returns:
        the prefix, how many keys that begin with it are still wanted, and how many more there are.
    """
    bins = tl.arange(0, BINS)
    total = tl.sum(counts, 0)
    at_least = total - tl.cumsum(counts, 0) + counts  # [BINS]
    wanted = tl.minimum(wanted, total)
    digit = tl.max(tl.where(at_least >= wanted, bins, 0), 0)
    wanted -= tl.sum(tl.where(bins > digit, counts, 0), 0)
    surplus = tl.sum(tl.where(bins == digit, counts, 0), 0) - wanted
    return (prefix << BITS) | digit.to(tl.uint32), wanted, surplus


@triton.jit
def _write(
    row, listed, entries, key, ties, above, equal, out_ptr, stride, LIST: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Write the positions of keys above ``key``, and of the first ``ties`` equal to it; or list them.

    ``above`` and ``equal`` count the keys of either kind in earlier segments.

    Returns:
        both, with what was found.
    """
    logit = _logit(key)
    begin, end = _range(row, listed, entries, BLOCK)
    for n in range(begin, end, BLOCK):
        x, positions = _read(row, listed, entries, n, BLOCK)
        is_above, is_equal = x > logit, x == logit
        both = tl.cumsum((is_above.to(tl.int32) << 16) | is_equal.to(tl.int32), 0)  # one scan for two counts
        equals = equal + (both & 0xFFFF)
        slots = above + (both >> 16) + tl.minimum(equals, ties) - 1
        chosen = is_above | (is_equal & (equals <= ties))
        if LIST:
            entry = (positions.to(tl.int64) << 32) | x.to(tl.uint32, bitcast=True).to(tl.int64)
            # As int32 they would be made pointers first, and these exchanged through shared memory.
            tl.store(out_ptr + slots.to(tl.int64), entry, mask=chosen & (slots < row.room))
        else:
            tl.store(out_ptr + slots.to(tl.int64) * stride, positions, mask=chosen)
        both = tl.max(both, 0)
        above += both >> 16
        equal += both & 0xFFFF
    return above, equal
