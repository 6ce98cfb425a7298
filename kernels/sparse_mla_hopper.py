"""Sparse MLA for sm_90, warp-specialised: the formula of sparse_mla.py for d_qk = 576, d_v = 512, bf16.

Twice as fast as the other kernel on an H200. It needs Triton 3.9. Without a GPU the tests run this source in
an emulator of mbarriers, asynchronous copies and wgmma (tests/gluon_emulator.py), and compile it for sm_90.

One program: one query, 64 heads, three partitions of four warps. Keys come in pairs of tiles of 64, and the
512 columns of the value in two halves. One partition gathers; consumer i, of two, scores tile i and holds
half i of the accumulator:

    score    = q @ tile[i].T
    max, p   = online softmax, with the maximum of both tiles
    acc      = acc * alpha + p[i] @ tile[i][:, half i] + p[1 - i] @ tile[1 - i][:, half i]

No product is computed twice: per pair, each consumer runs 36 wgmma of 64 x 64 x 16 for its scores and 4 + 4
of 64 x 256 x 16 for both p. The consumers exchange p and the maximum, so the tensor cores may wait for a
softmax once per pair; what that costs is not measured. Every barrier completes once per pair, so one phase
bit, flipped after each pair, serves all of them.

Caches may be packed, 656 bytes per token (latent_rows.py). Shared memory has no room for these bytes: the
partition that gathers loads them into registers, half a tile ahead, and stores bf16, with the same bits as
the other kernel computes. In time it hides that work only in part: the places of a pair become free when the
pair is done, and consumers wait while they are filled again.

When queries are few, several programs share the pairs of each, in contiguous parts; what they find is merged
in order (merge_attention.py).
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from . import configs
from .arguments import cdiv, in_launches
from .merge_attention import merge_parts

if TYPE_CHECKING:
    from ..ops.attention import SparseMLAOp

LOG2_E = gl.constexpr(1.4426950408889634)
LN_2 = gl.constexpr(0.6931471805599453)
LOWEST = gl.constexpr(-3.4028234663852886e38)  # the lowest finite fp32

BLOCK_H = gl.constexpr(64)
BLOCK_N = gl.constexpr(64)
D_V = gl.constexpr(512)
D_HALF = gl.constexpr(256)
D_ROPE = gl.constexpr(64)  # columns of the key after those of the value
TOKEN_BYTES = gl.constexpr(656)  # of a packed row: 512 e4m3, 4 fp32 scales, 64 bf16 of the RoPE part
UNIT = gl.constexpr(16)  # rows begin at multiples of 16 elements or bytes; so counted, offsets fit 32 bits

SWIZZLED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
SCORE = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
VALUE = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
PROBABILITY = gl.constexpr(gl.DotOperandLayout(0, VALUE, 2))
ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # 16 bytes per thread

# Of packed rows, 16 bytes per thread too. Four lanes share a row, so that each keeps few indices and
# addresses; eight store 16 bytes each, of two rows, to all banks of the swizzled tile.
WORDS = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0]))
BYTES = gl.constexpr(gl.BlockedLayout([1, 16], [8, 4], [4, 1], [1, 0]))
ROWS_8 = gl.constexpr(gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0]))
LINES = gl.constexpr(gl.BlockedLayout([1, 1], [8, 4], [4, 1], [1, 0]))
KEYS = gl.constexpr(gl.SliceLayout(1, WORDS))
PREFETCH = gl.constexpr("{ .reg .pred p; setp.ne.b32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }")
HALVES = gl.constexpr("mov.b32 {$0, $1}, $2;")  # of a word, the low one first


def suits(a: "SparseMLAOp") -> bool:
    """Whether this kernel can compute ``a``; what it cannot, sparse_mla.py does.

    It takes bf16 with d_qk = 576 and d_v = 512, a positive scale, and caches that are all rows of bf16 or all
    "v32". Rows are contiguous and begin at multiples of 16 elements.
    """
    width = D_V.value + D_ROPE.value
    caches = [(a.kv, a.kv_format)]
    if a.extra_kv is not None:
        caches.append((a.extra_kv, a.extra_kv_format))
    kinds = {("rows" if kv.dim() == 2 else "pages") if name is None else name for kv, name in caches}
    return (
        configs.architecture(a.q.device) == 90
        and (a.q.shape[2], a.d_v) == (width, D_V.value)
        and a.softmax_scale > 0
        and a.q.dtype == a.out.dtype == torch.bfloat16
        and kinds in ({"rows"}, {"v32"})
        and all(map(_fits, (a.q, a.out, *(kv for kv, _ in caches))))
    )


def _fits(x: torch.Tensor) -> bool:
    """Whether rows are aligned, and offsets in units of 16 elements fit 32 bits."""
    *strides, last = x.stride()
    if last != 1 or x.storage_offset() % UNIT.value:
        return False
    furthest = 0
    for size, stride in zip(x.shape, strides, strict=False):
        if size > 1:  # the stride of a single element says nothing
            if stride % UNIT.value:
                return False
            furthest += (size - 1) * stride
    return furthest < 2**36


def sparse_mla_hopper(a: "SparseMLAOp") -> None:
    """As sparse_mla, of what ``suits``."""
    if a.lse.numel() == 0:
        return
    (s_q, h_q, _), block_h, block_n = a.q.shape, BLOCK_H.value, 2 * BLOCK_N.value
    topks = [i.shape[1] for i in (a.indices, a.extra_indices) if i is not None]
    pairs = sum(cdiv(topk, block_n) for topk in topks)
    programs, slots = cdiv(h_q, block_h), configs.multiprocessors(a.q.device)
    if a.batch_invariant:
        launches = configs.invariant_launches(s_q, h_q, pairs, block_n)
    else:
        launches = configs.attention_launches(s_q, programs, pairs, block_n, block_h, slots)
    for part, splits in in_launches(a, launches):
        _launch(part, splits)


def _launch(a: "SparseMLAOp", splits: int) -> None:
    s_q, h_q, _ = a.q.shape
    out, lse, max_logits = a.out, a.lse, a.max_logits
    sink = None if a.attn_sink is None else a.attn_sink.contiguous()
    if splits > 1:
        out = a.out.new_empty(splits, *out.shape, dtype=torch.float32)
        lse, max_logits = lse.new_empty(2, splits, *lse.shape)
    with torch.cuda.device_of(a.q):
        _sparse_mla_hopper_kernel[(s_q * cdiv(h_q, BLOCK_H.value), splits)](
            a.q,
            a.q.stride(0) if s_q > 1 else 0,  # of a single query it may be anything
            a.q.stride(1),
            *_segment(a.kv, a.indices, a.topk_length),
            *_segment(a.extra_kv, a.extra_indices, a.extra_topk_length),
            sink if splits == 1 else None,  # else it enters where the parts are merged
            out,
            *out.stride()[-3:-1],
            lse,
            *lse.stride()[-2:],
            max_logits,
            *max_logits.stride()[-2:],
            s_q if splits > 1 else None,
            h_q,
            a.softmax_scale * LOG2_E.value,
            _page_size(a.kv),
            _page_size(a.extra_kv),
            h_q % BLOCK_H.value != 0,
            num_warps=4,
            enable_fp_fusion=True,
        )
        if splits > 1:
            merge_parts(out, lse, a.out, a.lse, sink, max_logits, a.max_logits)


def _segment(kv, indices, topk_length) -> tuple:
    if kv is None:
        return (None, 0, None, 0, None, 0, 0, 0, None)
    paged = kv.dim() == 3 and kv.shape[1] > 1  # else the stride of a slot says nothing
    return (
        kv,
        kv.stride(0) // UNIT.value,
        kv.stride(1) // UNIT.value if paged else None,
        kv.shape[:-1].numel(),
        indices,
        *indices.stride(),
        indices.shape[1],
        None if topk_length is None else topk_length.contiguous(),
    )


def _page_size(kv) -> int | None:
    """None of rows in bf16."""
    if kv is None or kv.dtype != torch.uint8:
        return None
    return kv.shape[1] if kv.dim() == 3 else 1


class Segment(NamedTuple):
    """What one program attends to in one cache."""

    kv_ptr: Any  # [s_kv, 576], or packed pages [pages, page_size, 656]
    units_kv_0: Any  # of the first and of the second dimension; None where it is never needed
    units_kv_1: Any
    page_size: Any  # a constant, as every index is divided by it; None: rows are not packed
    s_kv: Any
    indices_ptr: Any  # of the query
    stride_indices_n: Any
    first: Any  # of the program's indices
    stop: Any  # behind the last of them


class Output(NamedTuple):
    """Where the results go. Each consumer finds the program's rows anew, which takes fewer registers."""

    s_q: Any  # None: one program has all keys, and rows are final
    h_q: Any
    stop_head: Any  # None: every head of every block exists. A bool would become a value at run time
    attn_sink_ptr: Any  # [h_q] or None
    out_ptr: Any  # [s_q, h_q, 512]; of several splits fp32 [splits, s_q, h_q, 512], and so the next two
    stride_out_t: Any
    stride_out_h: Any
    lse_ptr: Any  # [s_q, h_q]
    stride_lse_t: Any
    stride_lse_h: Any
    max_ptr: Any  # [s_q, h_q]
    stride_max_t: Any
    stride_max_h: Any


@gluon.aggregate
class Shared:
    """What the partitions share. Index 2 * i + j of latent, ready and free is tile i of the pair, half j."""

    q: gl.shared_memory_descriptor  # [64, 512]
    q_rope: gl.shared_memory_descriptor  # [64, 64]
    latent: gl.shared_memory_descriptor  # [4, 64, 256]
    rope: gl.shared_memory_descriptor  # [2, 64, 64]: RoPE part of a tile; once that is scored, the tile's p
    bound: gl.shared_memory_descriptor  # [2, 64]: of a tile's scores, +inf if the key is valid, else -inf
    mail: gl.shared_memory_descriptor  # [2, 64]: a number per head, from consumer i to the other
    seen: gl.shared_memory_descriptor  # [64]: 1 where a lane has met a valid index
    ready: gl.shared_memory_descriptor  # [4] barriers: gathered
    free: gl.shared_memory_descriptor  # [4] barriers: may be overwritten
    mail_ready: gl.shared_memory_descriptor  # [2] barriers
    p_ready: gl.shared_memory_descriptor  # [2] barriers
    seen_ready: gl.shared_memory_descriptor


@gluon.jit(
    do_not_specialize=[
        *("s_kv", "stride_indices_t", "topk", "extra_s_kv", "stride_extra_indices_t", "extra_topk"),
        *("units_kv_0", "units_kv_1", "units_extra_kv_0", "units_extra_kv_1"),
        *("stride_lse_t", "stride_lse_h", "stride_max_t", "stride_max_h"),
        *("s_q", "h_q"),
    ],
    do_not_specialize_on_alignment=[
        *("indices_ptr", "topk_length_ptr", "extra_indices_ptr", "extra_topk_length_ptr"),
        *("lse_ptr", "max_ptr"),
    ],
)
def _sparse_mla_hopper_kernel(
    q_ptr,  # [s_q, h_q, 576]
    stride_q_t,
    stride_q_h,
    kv_ptr,  # [s_kv, 576], or packed pages [pages, PAGE_SIZE, 656]
    units_kv_0,
    units_kv_1,  # None: a page is a row
    s_kv,
    indices_ptr,  # [s_q, topk]
    stride_indices_t,
    stride_indices_n,
    topk,
    topk_length_ptr,  # [s_q] or None
    extra_kv_ptr,  # as kv_ptr, or None
    units_extra_kv_0,
    units_extra_kv_1,
    extra_s_kv,
    extra_indices_ptr,  # [s_q, extra_topk]
    stride_extra_indices_t,
    stride_extra_indices_n,
    extra_topk,
    extra_topk_length_ptr,  # [s_q] or None
    attn_sink_ptr,  # [h_q] or None
    out_ptr,  # [s_q, h_q, 512]; of several splits fp32 [splits, s_q, h_q, 512], and so the next two
    stride_out_t,
    stride_out_h,
    lse_ptr,  # [s_q, h_q]
    stride_lse_t,
    stride_lse_h,
    max_ptr,  # [s_q, h_q]
    stride_max_t,
    stride_max_h,
    s_q,  # None: there is one split
    h_q,
    scale_log2,  # softmax_scale * log2(e), positive
    PAGE_SIZE: gl.constexpr,  # None: rows are bf16
    EXTRA_PAGE_SIZE: gl.constexpr,
    PADDED: gl.constexpr,  # h_q is no multiple of 64
):
    t, first_head = _query_and_head(h_q)
    length = _row_length(topk, topk_length_ptr, t)
    extra_length = _row_length(extra_topk, extra_topk_length_ptr, t)
    pairs = _pairs(length) + _pairs(extra_length)
    first, extra_first = 0, 0  # of the program's indices
    if s_q is not None:
        share = (pairs + gl.num_programs(1) - 1) // gl.num_programs(1)
        skipped = gl.program_id(1) * share  # pairs of other programs
        pairs = gl.minimum(share, pairs - skipped)  # below 1 if none are left
        extra_skipped = skipped - _pairs(length)  # below 0 if some of the first segment are left
        first, length = _part(length, skipped, share)
        extra_first, extra_length = _part(extra_length, extra_skipped, share)

    sm = Shared(
        q=gl.allocate_shared_memory(gl.bfloat16, [BLOCK_H, D_V], SWIZZLED),
        q_rope=gl.allocate_shared_memory(gl.bfloat16, [BLOCK_H, D_ROPE], SWIZZLED),
        latent=gl.allocate_shared_memory(gl.bfloat16, [4, BLOCK_N, D_HALF], SWIZZLED),
        rope=gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK_N, D_ROPE], SWIZZLED),
        bound=gl.allocate_shared_memory(gl.float32, [2, BLOCK_N], FLAT),
        mail=gl.allocate_shared_memory(gl.float32, [2, BLOCK_H], FLAT),
        seen=gl.allocate_shared_memory(gl.int32, [BLOCK_N], FLAT),
        ready=mbarrier.allocate_mbarrier(batch=4),
        free=mbarrier.allocate_mbarrier(batch=4),
        mail_ready=mbarrier.allocate_mbarrier(batch=2),
        p_ready=mbarrier.allocate_mbarrier(batch=2),
        seen_ready=mbarrier.allocate_mbarrier(),
    )
    for i in gl.static_range(2):
        # Copies of each of 128 threads arrive on their own; the bound of tile i arrives with half i.
        if PAGE_SIZE is None:
            mbarrier.init(sm.ready.index(2 * i + i), count=128 + 1)
            mbarrier.init(sm.ready.index(2 * i + 1 - i), count=128)
        else:  # values arrive when they are stored; copies are those of the RoPE part
            mbarrier.init(sm.ready.index(2 * i + i), count=1)
            mbarrier.init(sm.ready.index(2 * i + 1 - i), count=128 + 1)
        mbarrier.init(sm.free.index(2 * i), count=1)
        mbarrier.init(sm.free.index(2 * i + 1), count=1)
        mbarrier.init(sm.mail_ready.index(i), count=1)
        mbarrier.init(sm.p_ready.index(i), count=1)
    mbarrier.init(sm.seen_ready, count=1)

    heads = first_head + gl.arange(0, BLOCK_H, layout=gl.SliceLayout(1, ROWS))  # [64]
    offs_v = gl.arange(0, D_V, layout=gl.SliceLayout(0, ROWS))  # [512]
    offs_rope = D_V + gl.arange(0, D_ROPE, layout=gl.SliceLayout(0, ROWS))  # [64]
    q_rows = q_ptr + t * stride_q_t + heads[:, None] * stride_q_h  # [64, 1]
    real, stop_head = None, None
    if PADDED:
        stop_head = h_q
        real = (heads < h_q)[:, None]  # [64, 1]; the others are zeros
    async_copy.async_load(sm.q, q_rows + offs_v[None, :], mask=real)
    async_copy.async_load(sm.q_rope, q_rows + offs_rope[None, :], mask=real)
    async_copy.commit_group()
    async_copy.wait_group(0)

    indices_ptr += t * stride_indices_t
    if extra_kv_ptr is not None:
        extra_indices_ptr += t * stride_extra_indices_t
    segment = Segment(
        *(kv_ptr, units_kv_0, units_kv_1, PAGE_SIZE, s_kv),
        *(indices_ptr, stride_indices_n, first, length),
    )
    extra = Segment(
        *(extra_kv_ptr, units_extra_kv_0, units_extra_kv_1, EXTRA_PAGE_SIZE, extra_s_kv),
        *(extra_indices_ptr, stride_extra_indices_n, extra_first, extra_length),
    )
    output = Output(
        *(s_q, h_q, stop_head, attn_sink_ptr, out_ptr, stride_out_t, stride_out_h),
        *(lse_ptr, stride_lse_t, stride_lse_h, max_ptr, stride_max_t, stride_max_h),
    )
    # Registers per thread: the block starts with 3 x 168, and the first partition keeps what others leave.
    if PAGE_SIZE is None:  # 224
        gl.warp_specialize(
            [
                (_consume, (sm, pairs, scale_log2, output, 0)),
                (_consume, (sm, pairs, scale_log2, output, 1)),
                (_gather, (sm, segment, extra)),
            ],
            worker_num_warps=[4, 4],
            worker_num_regs=[232, 48],
        )
    else:  # 208
        gl.warp_specialize(
            [
                (_consume, (sm, pairs, scale_log2, output, 0)),
                (_consume, (sm, pairs, scale_log2, output, 1)),
                (_gather_packed, (sm, segment, extra)),
            ],
            worker_num_warps=[4, 4],
            worker_num_regs=[200, 96],
        )


@gluon.jit
def _query_and_head(h_q):
    """Of this program. The blocks of heads of one query are neighbours, and share its rows in L2."""
    head_blocks = (h_q + BLOCK_H - 1) // BLOCK_H
    t = gl.program_id(0) // head_blocks
    return t.to(gl.int64), (gl.program_id(0) % head_blocks).to(gl.int64) * BLOCK_H


@gluon.jit
def _row_length(topk, topk_length_ptr, t):
    """How many of the ``topk`` indices of query t count; nothing does if it is negative."""
    length = topk
    if topk_length_ptr is not None:
        length = gl.minimum(gl.load(topk_length_ptr + t), topk)
    return length


@gluon.jit
def _pairs(length):
    return (gl.maximum(length, 0) + 2 * BLOCK_N - 1) // (2 * BLOCK_N)


@gluon.jit
def _part(length, skipped, share):
    """The first of a segment's indices, and one behind the last, that lie in ``share`` pairs."""
    stop = gl.minimum((skipped + share) * (2 * BLOCK_N), length)
    return gl.maximum(skipped, 0) * (2 * BLOCK_N), stop


@gluon.jit
def _gather(sm, segment, extra):
    """Copy the selected rows of both segments, pair by pair of tiles."""
    phase = 1  # of `free`: at first a wait for it passes
    seen = gl.full([BLOCK_N], 0, gl.int32, layout=gl.SliceLayout(1, ROWS))
    phase, seen = _gather_segment(sm, segment, phase, seen)
    if extra.kv_ptr is not None:
        phase, seen = _gather_segment(sm, extra, phase, seen)
    sm.seen.store(seen)
    mbarrier.arrive(sm.seen_ready, count=1)


@gluon.jit
def _gather_segment(sm, segment, phase, seen):
    for start in range(segment.first, segment.stop, 2 * BLOCK_N):
        rows_0, valid_0 = _rows(segment, start)
        rows_1, valid_1 = _rows(segment, start + BLOCK_N)
        seen |= (valid_0 | valid_1).to(gl.int32)
        # In the order in which the consumers release them.
        _copy(sm, rows_0, valid_0, phase, 0, 0)
        _copy(sm, rows_1, valid_1, phase, 1, 1)
        _copy(sm, rows_0, valid_0, phase, 0, 1)
        _copy(sm, rows_1, valid_1, phase, 1, 0)
        phase ^= 1
    return phase, seen


@gluon.jit
def _rows(segment, start):
    """Where 64 selected rows begin, and which of them are valid."""
    index = _indices(segment, start, gl.SliceLayout(1, ROWS))
    return segment.kv_ptr + (index * segment.units_kv_0).to(gl.int64) * UNIT, index < segment.s_kv


@gluon.jit
def _copy(sm, rows, valid, phase, TILE: gl.constexpr, HALF: gl.constexpr):
    """Start to copy half of a tile. Rows that are not selected are not read; their place gets zeros."""
    offs_half = HALF * D_HALF + gl.arange(0, D_HALF, layout=gl.SliceLayout(0, ROWS))  # [256]
    offs_rope = D_V + gl.arange(0, D_ROPE, layout=gl.SliceLayout(0, ROWS))  # [64]
    place: gl.constexpr = 2 * TILE + HALF
    mbarrier.wait(sm.free.index(place), phase)
    async_copy.async_load(sm.latent.index(place), rows[:, None] + offs_half[None, :], mask=valid[:, None])
    if TILE == HALF:
        sm.bound.index(TILE).store(gl.where(valid, float("inf"), float("-inf")))
        mbarrier.arrive(sm.ready.index(place), count=1)
    else:
        async_copy.async_load(sm.rope.index(TILE), rows[:, None] + offs_rope[None, :], mask=valid[:, None])
    async_copy.mbarrier_arrive(sm.ready.index(place), increment_count=False)


@gluon.jit
def _gather_packed(sm, segment, extra):
    """As _gather, from packed rows: bytes pass through registers, where they become bf16."""
    phase = 1  # of `free`: at first a wait for it passes
    seen = gl.full([BLOCK_N], 0, gl.int32, layout=KEYS)
    phase, seen = _gather_packed_segment(sm, segment, phase, seen)
    if extra.kv_ptr is not None:
        phase, seen = _gather_packed_segment(sm, extra, phase, seen)
    sm.seen.store(seen)
    mbarrier.arrive(sm.seen_ready, count=1)


@gluon.jit
def _gather_packed_segment(sm, segment, phase, seen):
    """Half a tile is on its way, in registers, while the one before it waits for its place."""
    index_0, index_1 = (
        _indices(segment, segment.first, KEYS),
        _indices(segment, segment.first + BLOCK_N, KEYS),
    )
    rows_0, valid_0 = _packed_rows(segment, index_0)
    half = _load_half(segment, rows_0, valid_0, 0)
    _prefetch(segment, rows_0, valid_0)
    _prefetch(segment, *_packed_rows(segment, index_1))
    for start in range(segment.first, segment.stop, 2 * BLOCK_N):
        rows_1, valid_1 = _packed_rows(segment, index_1)
        seen |= (valid_0 | valid_1).to(gl.int32)
        index_0 = _indices(segment, start + 2 * BLOCK_N, KEYS)  # of the next pair
        index_1 = _indices(segment, start + 3 * BLOCK_N, KEYS)
        # In the order in which the consumers release them.
        _acquire(sm, segment, rows_0, valid_0, phase, 0, 0)
        half = _convert(sm, half, segment, rows_1, valid_1, 1, 0, 0)
        _acquire(sm, segment, rows_1, valid_1, phase, 1, 1)
        half = _convert(sm, half, segment, rows_0, valid_0, 1, 1, 1)
        _acquire(sm, segment, rows_0, valid_0, phase, 0, 1)
        half = _convert(sm, half, segment, rows_1, valid_1, 0, 0, 1)
        _acquire(sm, segment, rows_1, valid_1, phase, 1, 0)
        rows_0, valid_0 = _packed_rows(segment, index_0)
        half = _convert(sm, half, segment, rows_0, valid_0, 0, 1, 0)
        # While the consumers compute there is time; when they wait, L2 has what is still to be loaded.
        _prefetch(segment, rows_0, valid_0)
        _prefetch(segment, *_packed_rows(segment, index_1))
        phase ^= 1
    return phase, seen


@gluon.jit
def _indices(segment, start, LAYOUT: gl.constexpr):
    """Of a tile; -1 behind the last."""
    offs_n = start + gl.arange(0, BLOCK_N, layout=LAYOUT)  # [64]
    return gl.load(
        segment.indices_ptr + offs_n.to(gl.int64) * segment.stride_indices_n,
        mask=offs_n < segment.stop,
        other=-1,
    ).to(gl.uint32)  # so that a negative index is too large


@gluon.jit
def _packed_rows(segment, index):
    """Where 64 selected rows begin, in units of 16 bytes, and which of them are valid."""
    if segment.units_kv_1 is None:
        units = index * segment.units_kv_0
    else:
        page_size = gl.cast(segment.page_size, gl.uint32)
        page, slot = index // page_size, index % page_size
        units = page * segment.units_kv_0 + slot * segment.units_kv_1
    return units, index < segment.s_kv


@gluon.jit
def _prefetch(segment, rows, valid):
    """Bring 64 rows into L2: at most 64 bytes lie between the addresses, so no line is left out."""
    _prefetch_columns(segment, rows, valid, 64 * gl.arange(0, 8, layout=gl.SliceLayout(0, LINES)))
    rest = 512 + 64 * gl.arange(0, 4, layout=gl.SliceLayout(0, LINES))
    _prefetch_columns(segment, rows, valid, gl.minimum(rest, TOKEN_BYTES - 16))


@gluon.jit
def _prefetch_columns(segment, rows, valid, offs):
    units = gl.convert_layout(rows, gl.SliceLayout(1, LINES), assert_trivial=True).to(gl.int64)
    ok = gl.convert_layout(valid, gl.SliceLayout(1, LINES), assert_trivial=True)
    address = (segment.kv_ptr + offs)[None, :] + (units * 16)[:, None]
    args = [address.to(gl.int64), ok.to(gl.int32)[:, None]]
    gl.inline_asm_elementwise(PREFETCH, "=r,l,r", args, gl.int32, False, 1)


@gluon.jit
def _load_half(segment, rows, valid, HALF: gl.constexpr):
    """Start to load half of a tile: two groups of 128 columns, in two parts each."""
    a, b = _load_part(segment, rows, valid, 4 * HALF), _load_part(segment, rows, valid, 4 * HALF + 1)
    scale_0 = _load_scale(segment, rows, valid, 2 * HALF)
    c, d = _load_part(segment, rows, valid, 4 * HALF + 2), _load_part(segment, rows, valid, 4 * HALF + 3)
    scale_1 = _load_scale(segment, rows, valid, 2 * HALF + 1)
    return a, b, c, d, scale_0, scale_1


@gluon.jit
def _load_part(segment, rows, valid, PART: gl.constexpr):
    """64 columns of the value, as words [64, 16] of four bytes."""
    offs_word = gl.arange(0, 16, layout=gl.SliceLayout(0, WORDS))  # [16]
    # The lane's part of the address first: it is the same for all rows.
    words = (segment.kv_ptr.to(gl.pointer_type(gl.int32)) + 16 * PART + offs_word)[None, :]
    return gl.load(words + (rows.to(gl.int64) * 4)[:, None], mask=valid[:, None], other=0)


@gluon.jit
def _load_scale(segment, rows, valid, GROUP: gl.constexpr):
    """[64], of 128 columns"""
    scales = segment.kv_ptr.to(gl.pointer_type(gl.float32)) + (D_V // 4 + GROUP)
    return gl.load(scales + rows.to(gl.int64) * 4, mask=valid, other=0.0)


@gluon.jit
def _acquire(sm, segment, rows, valid, phase, TILE: gl.constexpr, HALF: gl.constexpr):
    """Wait until half of a tile may be overwritten, and write what goes with it: bound or RoPE part."""
    place: gl.constexpr = 2 * TILE + HALF
    mbarrier.wait(sm.free.index(place), phase)
    if TILE == HALF:
        sm.bound.index(TILE).store(gl.where(valid, float("inf"), float("-inf")))
    else:
        offs_rope = (D_V + 16) // 2 + gl.arange(0, D_ROPE, layout=gl.SliceLayout(0, ROWS_8))  # [64]
        units = gl.convert_layout(rows, gl.SliceLayout(1, ROWS_8), assert_trivial=True).to(gl.int64)
        ok = gl.convert_layout(valid, gl.SliceLayout(1, ROWS_8), assert_trivial=True)
        ropes = (segment.kv_ptr.to(gl.pointer_type(gl.bfloat16)) + offs_rope)[None, :]
        async_copy.async_load(sm.rope.index(TILE), ropes + (units * 8)[:, None], mask=ok[:, None])
        async_copy.mbarrier_arrive(sm.ready.index(place), increment_count=False)


@gluon.jit
def _convert(sm, half, segment, rows, valid, NEXT: gl.constexpr, TILE: gl.constexpr, HALF: gl.constexpr):
    """Store half of a tile in bf16. As registers become free, load half NEXT of ``rows`` into them."""
    a, b, c, d, scale_0, scale_1 = half
    tile = sm.latent.index(2 * TILE + HALF)
    # The barriers are for the compiler, which would put the loads off to the end and then wait for them.
    _convert_part(tile, a, scale_0, 0)
    a = _load_part(segment, rows, valid, 4 * NEXT)
    gl.barrier()
    _convert_part(tile, b, scale_0, 1)
    b = _load_part(segment, rows, valid, 4 * NEXT + 1)
    scale_0 = _load_scale(segment, rows, valid, 2 * NEXT)
    gl.barrier()
    _convert_part(tile, c, scale_1, 2)
    _convert_part(tile, d, scale_1, 3)
    fence_async_shared()  # wgmma is to see what was stored
    mbarrier.arrive(sm.ready.index(2 * TILE + HALF), count=1)
    # After the fence, which may wait for loads that were issued before it.
    c = _load_part(segment, rows, valid, 4 * NEXT + 2)
    d = _load_part(segment, rows, valid, 4 * NEXT + 3)
    scale_1 = _load_scale(segment, rows, valid, 2 * NEXT + 1)
    return a, b, c, d, scale_0, scale_1


@gluon.jit
def _convert_part(tile, word, scale, PART: gl.constexpr):
    """64 columns: e4m3 is exact in fp32, and times its scale it is rounded once."""
    # Pairs of codes, which one instruction converts. Shifts in their place would become byte permutes.
    pairs = gl.join(*gl.inline_asm_elementwise(HALVES, "=h,=h,r", [word], (gl.uint16, gl.uint16), True, 1))
    code = gl.join(pairs.to(gl.uint8), (pairs >> 8).to(gl.uint8)).reshape([BLOCK_N, 64])
    code = gl.convert_layout(code, BYTES, assert_trivial=True).to(gl.float8e4nv, bitcast=True)
    scale = gl.convert_layout(scale, gl.SliceLayout(1, BYTES), assert_trivial=True)
    value = code.to(gl.float32) * scale[:, None]
    tile.slice(64 * PART, 64, 1).store(value.to(gl.bfloat16))


@gluon.jit
def _consume(sm, pairs, scale_log2, output, OWN: gl.constexpr):
    """Score tile OWN of each pair; attend to both, in half OWN of the value's columns."""
    OTHER: gl.constexpr = 1 - OWN
    acc = gl.zeros([BLOCK_H, D_HALF], gl.float32, layout=VALUE)
    # Finite, so that a tile without a valid key never computes inf - inf.
    row_max = gl.full([BLOCK_H], LOWEST, gl.float32, layout=gl.SliceLayout(1, SCORE))
    row_sum = gl.zeros([BLOCK_H], gl.float32, layout=gl.SliceLayout(1, SCORE))  # of tile OWN alone
    phase = 0
    for _ in range(pairs):
        score = _scores(sm, phase, OWN)  # [64, 64]
        tile_max = gl.max(score, 1) * scale_log2  # [64]
        new_max = gl.maximum(gl.maximum(row_max, tile_max), _exchange(sm, tile_max, phase, OWN))
        p = gl.exp2(score * scale_log2 - new_max[:, None])  # [64, 64]
        alpha = gl.exp2(row_max - new_max)  # [64]
        row_sum = row_sum * alpha + gl.sum(p, 1)
        row_max = new_max
        acc *= gl.convert_layout(alpha, gl.SliceLayout(1, VALUE))[:, None]
        p = p.to(gl.bfloat16)
        own_half = sm.latent.index(2 * OWN + OWN)
        acc = warpgroup_mma(gl.convert_layout(p, PROBABILITY), own_half, acc, is_async=True)
        sm.rope.index(OWN).store(p)
        fence_async_shared()
        mbarrier.arrive(sm.p_ready.index(OWN), count=1)

        # The other consumer has waited for both halves of its tile, and fenced for them.
        mbarrier.wait(sm.p_ready.index(OTHER), phase)
        acc = warpgroup_mma(sm.rope.index(OTHER), sm.latent.index(2 * OTHER + OWN), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(sm.free.index(2 * OWN + OWN), count=1)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(sm.free.index(2 * OTHER + OWN), count=1)
        phase ^= 1
    row_sum += _exchange(sm, row_sum, phase, OWN)
    _store(sm, acc, row_max, row_sum, output, OWN)


@gluon.jit
def _scores(sm, phase, OWN: gl.constexpr):
    """Unscaled scores of tile OWN, -inf where the key is invalid. Its own half is ready first."""
    OTHER: gl.constexpr = 1 - OWN
    own_half = sm.latent.index(2 * OWN + OWN).permute([1, 0])
    other_half = sm.latent.index(2 * OWN + OTHER).permute([1, 0])
    score = gl.zeros([BLOCK_H, BLOCK_N], gl.float32, layout=SCORE)
    mbarrier.wait(sm.ready.index(2 * OWN + OWN), phase)
    fence_async_shared()
    score = warpgroup_mma(sm.q.slice(OWN * D_HALF, D_HALF, 1), own_half, score, is_async=True)
    mbarrier.wait(sm.ready.index(2 * OWN + OTHER), phase)
    fence_async_shared()
    score = warpgroup_mma(sm.q.slice(OTHER * D_HALF, D_HALF, 1), other_half, score, is_async=True)
    score = warpgroup_mma(sm.q_rope, sm.rope.index(OWN).permute([1, 0]), score, is_async=True)
    score = warpgroup_mma_wait(0, deps=[score])
    return gl.minimum(score, sm.bound.index(OWN).load(gl.SliceLayout(0, SCORE))[None, :])


@gluon.jit
def _exchange(sm, value, phase, OWN: gl.constexpr):
    """Swap a number per head with the other consumer."""
    sm.mail.index(OWN).store(value)
    mbarrier.arrive(sm.mail_ready.index(OWN), count=1)
    mbarrier.wait(sm.mail_ready.index(1 - OWN), phase)
    return sm.mail.index(1 - OWN).load(gl.SliceLayout(1, SCORE))


@gluon.jit
def _store(sm, acc, row_max, row_sum, output, OWN: gl.constexpr):
    """Divide by the denominator; write half OWN of out, and consumer 0 lse and max_logits."""
    t, first_head = _query_and_head(output.h_q)
    if output.s_q is not None:
        t += gl.program_id(1).to(gl.int64) * output.s_q  # row of all splits
    heads = first_head + gl.arange(0, BLOCK_H, layout=gl.SliceLayout(1, SCORE))
    real = _real(output, heads)
    if OWN == 0:
        lse = (row_max + gl.log2(row_sum)) * LN_2  # [64]; log2(0) = -inf is the empty row
        gl.store(output.lse_ptr + t * output.stride_lse_t + heads * output.stride_lse_h, lse, mask=real)
        highest = gl.where(row_sum == 0.0, float("-inf"), row_max * LN_2)  # [64]
        gl.store(output.max_ptr + t * output.stride_max_t + heads * output.stride_max_h, highest, mask=real)
    if output.attn_sink_ptr is not None:
        sink = gl.load(output.attn_sink_ptr + heads, mask=real)  # [64]
        row_sum += gl.exp2(sink * LOG2_E - row_max)
    mbarrier.wait(sm.seen_ready, 0)
    empty = gl.max(sm.seen.load(gl.SliceLayout(0, VALUE)), 0) == 0
    inverse = gl.convert_layout(1.0 / row_sum, gl.SliceLayout(1, VALUE))  # [64]
    out = gl.where(empty, 0.0, acc * inverse[:, None])  # [64, 256]
    if output.s_q is None:
        tile = sm.latent.index(2 * OWN + OWN)  # no longer in use; whole rows make the stores wide
        tile.store(out.to(gl.bfloat16))
        heads = first_head + gl.arange(0, BLOCK_H, layout=gl.SliceLayout(1, ROWS))
        offs_v = OWN * D_HALF + gl.arange(0, D_HALF, layout=gl.SliceLayout(0, ROWS))
        rows = output.out_ptr + t * output.stride_out_t + heads[:, None] * output.stride_out_h
        gl.store(rows + offs_v[None, :], tile.load(ROWS), mask=_real(output, heads[:, None]))
    else:  # a part, in fp32: four threads fill a sector of 32 bytes
        heads = first_head + gl.arange(0, BLOCK_H, layout=gl.SliceLayout(1, VALUE))
        offs_v = OWN * D_HALF + gl.arange(0, D_HALF, layout=gl.SliceLayout(0, VALUE))
        rows = output.out_ptr + t * output.stride_out_t + heads[:, None] * output.stride_out_h
        gl.store(rows + offs_v[None, :], out, mask=_real(output, heads[:, None]))


@gluon.jit
def _real(output, heads):
    """Which heads exist, of [64] or [64, 1]; None: all."""
    real = None
    if output.stop_head is not None:
        real = heads < output.stop_head
    return real
