"""Sparse MLA: every head of a query attends to the selected rows of one latent cache.

    score[h, n] = softmax_scale * q[t, h] . kv[indices[t, n]]
    max[t, h]   = max_n score[h, n]
    lse[t, h]   = log(sum_n exp(score[h, n]))
    out[t, h]   = sum_n exp(score[h, n]) * kv[indices[t, n], :d_v] / (exp(lse[t, h]) + exp(attn_sink[h]))

n runs over the valid entries of ``indices[t, :topk_length[t]]`` (0 <= index < s_kv), then over those of
an optional second segment. The latent row is the key, and its first d_v columns are the value: each tile
is gathered once and serves as both. The other columns of the key are its RoPE part. When queries are few,
several programs share the tiles of each, and their partial results are merged in order.
"""

import functools
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from ..ops.check import dtype_name
from . import configs
from .arguments import cdiv, contiguous, in_launches, next_power_of_2, refuse_fp64
from .configs import SPARSE_MLA, SPARSE_MLA_FP8, SPARSE_MLA_FP32, SPARSE_MLA_PACKED, SPARSE_MLA_WIDE
from .latent_rows import Segment, load_ropes, load_values
from .merge_attention import merge_parts
from .online_softmax import LOG2_E, add_tile, empty_softmax, result, row_length

if TYPE_CHECKING:
    from ..ops.attention import SparseMLAOp

if configs.TRITON >= (3, 9):  # it is written in what that brought
    from .sparse_mla_hopper import sparse_mla_hopper, suits

USUAL_COLUMNS, MOST_COLUMNS = 576, 1024  # of a key, see _blocks; the former in fp32


def refuses(a: "SparseMLAOp") -> str | None:
    """Why these kernels cannot run ``a``, or None."""
    for name, kv in (("kv", a.kv), ("extra_kv", a.extra_kv)):
        if kv is None or kv.dtype != torch.uint8:
            continue
        if (kv.shape[1] - 1) * kv.stride(1) >= 2**31:  # offsets within a page are 32 bits
            got = f"{kv.shape[1]} tokens per page"
            return f"{name}: expected pages of less than 2 GiB, got {got} (triton backend)"
        if a.q.dtype == torch.float16:  # a value times its scale need not fit
            return f"q: expected bfloat16 or float32, as {name} is quantised, got float16 (triton backend)"
    columns = _blocks(a.q.shape[2], a.d_v)
    most = USUAL_COLUMNS if a.q.dtype == torch.float32 else MOST_COLUMNS
    if sum(columns) > most:
        dtype = dtype_name(a.q.dtype)
        padded = " + ".join(str(n) for n in columns if n)
        return (
            f"q, d_v: expected keys that fill at most {most} columns in {dtype}, got {padded} "
            f"for d_qk={a.q.shape[2]}, d_v={a.d_v} (triton backend)"
        )
    return refuse_fp64(a.q, a.kv, a.attn_sink, a.extra_kv)


def sparse_mla(a: "SparseMLAOp") -> None:
    """Fill out, lse and max_logits.

    kv and extra_kv are [s_kv, d_qk] or [pages, page_size, d_qk], or quantised [pages, page_size, bytes].
    """
    if a.lse.numel() == 0:
        return
    if warp_specialised(a):
        sparse_mla_hopper(a)
    else:
        _sparse_mla(a)


def warp_specialised(a: "SparseMLAOp") -> bool:
    """Whether the kernel for sm_90 takes ``a``: it is up to twice as fast."""
    if configs.TRITON < (3, 9) or configs.WARP_SPECIALISED == "none":
        return False
    measured = a.q.shape[1] % 64 == 0 and a.kv.dtype == torch.bfloat16
    return (measured or configs.WARP_SPECIALISED == "all") and suits(a)


def _sparse_mla(a: "SparseMLAOp") -> None:
    s_q, h_q, d_qk = a.q.shape
    blocks, formats = _blocks(d_qk, a.d_v), {a.kv_format, a.extra_kv_format} - {None}
    if a.q.dtype == torch.float32:
        table = SPARSE_MLA_FP32
    elif formats:
        table = SPARSE_MLA_FP8 if formats == {"v32"} else SPARSE_MLA_PACKED
    else:
        table = SPARSE_MLA if sum(blocks) <= USUAL_COLUMNS else SPARSE_MLA_WIDE
    topks = [i.shape[1] for i in (a.indices, a.extra_indices) if i is not None]
    tiling = configs.attention_tiling(table, s_q, 1, h_q, topks, a.q.device, a.batch_invariant)
    for part, splits in in_launches(a, tiling.launches):
        _launch(part, splits, tiling, blocks)


def _launch(a: "SparseMLAOp", splits: int, tiling: configs.Tiling, blocks: tuple[int, int]) -> None:
    s_q, h_q, d_qk = a.q.shape
    block_h, config, _ = tiling
    block_v, block_rope = blocks
    out, lse, max_logits, sink = a.out, a.lse, a.max_logits, contiguous(a.attn_sink)
    if splits > 1:
        out = a.out.new_empty(splits, *out.shape, dtype=torch.float32)
        lse, max_logits = lse.new_empty(2, splits, *lse.shape)
    with torch.cuda.device_of(a.q):
        _sparse_mla_kernel[(s_q * cdiv(h_q, block_h), splits)](
            a.q,
            *a.q.stride(),
            *_segment(a.kv, a.indices, a.topk_length),
            *_segment(a.extra_kv, a.extra_indices, a.extra_topk_length),
            sink if splits == 1 else None,  # else it enters where the parts are merged
            out,
            *out.stride()[-3:],
            lse,
            *lse.stride()[-2:],
            max_logits,
            *max_logits.stride()[-2:],
            s_q,
            h_q,
            a.softmax_scale * LOG2_E.value,
            D_OUT=a.d_v,
            D_V=min(block_v, d_qk),
            D_ROPE=max(0, d_qk - block_v),
            FORMAT=a.kv_format,
            PAGE_SIZE=_page_size(a.kv),
            EXTRA_FORMAT=a.extra_kv_format,
            EXTRA_PAGE_SIZE=_page_size(a.extra_kv),
            NATIVE_FP8=configs.has_native_fp8(a.q.device),
            BLOCK_H=block_h,
            BLOCK_N=config.BLOCK_N,
            BLOCK_V=block_v,
            BLOCK_ROPE=max(16, block_rope),
            SKIP_EMPTY=config.SKIP_EMPTY,
            KEYS_ON_M=config.KEYS_ON_M,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
        if splits > 1:
            merge_parts(out, lse, a.out, a.lse, sink, max_logits, a.max_logits)


@functools.cache
def _blocks(d_qk: int, d_v: int) -> tuple[int, int]:
    """Columns of the tile that is key and value, and of the tile of the key's other columns.

    Both are powers of two, together as few as can be. The first may hold more than the value: its product is
    then wider than the result, but d_qk = 576 and d_v = 128 fill 512 + 64 columns and not 128 + 512.
    """

    def others(first: int) -> int:
        return max(16, next_power_of_2(d_qk - first)) if first < d_qk else 0

    first, most = max(16, next_power_of_2(d_v)), max(16, next_power_of_2(d_qk))
    sizes = [1 << n for n in range(first.bit_length() - 1, most.bit_length())]
    return min(((size, others(size)) for size in sizes), key=sum)


def _segment(kv, indices, topk_length) -> tuple:
    if kv is None:
        return (None, 0, 0, 0, 0, None, 0, 0, 0, None)
    return (
        kv,
        *(kv.stride() if kv.dim() == 3 else (0, *kv.stride())),
        kv.shape[:-1].numel(),
        indices,
        *indices.stride(),
        indices.shape[1],
        contiguous(topk_length),
    )


def _page_size(kv) -> int:
    return kv.shape[1] if kv is not None and kv.dim() == 3 else 1


@triton.jit(
    do_not_specialize=[
        *("s_kv", "stride_indices_t", "topk", "extra_s_kv", "stride_extra_indices_t", "extra_topk"),
        *("s_q", "h_q"),
    ],
    do_not_specialize_on_alignment=[
        *("indices_ptr", "topk_length_ptr", "extra_indices_ptr", "extra_topk_length_ptr"),
        *("lse_ptr", "max_ptr"),
    ],
)
def _sparse_mla_kernel(
    q_ptr,  # [s_q, h_q, d_qk]
    stride_q_t,
    stride_q_h,
    stride_q_d,
    kv_ptr,  # [s_kv, d_qk] or [pages, page_size, d_qk], or quantised as FORMAT says
    stride_kv_page,
    stride_kv_row,
    stride_kv_d,
    s_kv,
    indices_ptr,  # [s_q, topk]
    stride_indices_t,
    stride_indices_n,
    topk,
    topk_length_ptr,  # [s_q] or None
    extra_kv_ptr,  # as kv_ptr, or None
    stride_extra_kv_page,
    stride_extra_kv_row,
    stride_extra_kv_d,
    extra_s_kv,
    extra_indices_ptr,  # [s_q, extra_topk]
    stride_extra_indices_t,
    stride_extra_indices_n,
    extra_topk,
    extra_topk_length_ptr,  # [s_q] or None
    attn_sink_ptr,  # [h_q] or None
    out_ptr,  # [s_q, h_q, d_v]; of several splits contiguous [splits, s_q, h_q, d_v], as the next two
    stride_out_t,
    stride_out_h,
    stride_out_d,
    lse_ptr,  # [s_q, h_q]
    stride_lse_t,
    stride_lse_h,
    max_ptr,  # [s_q, h_q]
    stride_max_t,
    stride_max_h,
    s_q,
    h_q,
    scale_log2,  # softmax_scale * log2(e)
    D_OUT: tl.constexpr,  # columns of the value
    D_V: tl.constexpr,  # columns of the tile that is key and value, see _blocks
    D_ROPE: tl.constexpr,  # the other columns of the key
    FORMAT: tl.constexpr,  # see latent_rows.py, as PAGE_SIZE
    PAGE_SIZE: tl.constexpr,
    EXTRA_FORMAT: tl.constexpr,
    EXTRA_PAGE_SIZE: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    SKIP_EMPTY: tl.constexpr,
    KEYS_ON_M: tl.constexpr,
):
    """One program: one query, BLOCK_H heads, a share of the tiles. Neighbours share the query, and so L2."""
    head_blocks = tl.cdiv(h_q, BLOCK_H)
    t = (tl.program_id(0) // head_blocks).to(tl.int64)
    heads = ((tl.program_id(0) % head_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)  # [BLOCK_H]
    head_ok = heads < h_q
    offs_v = tl.arange(0, BLOCK_V).to(tl.int64)  # [BLOCK_V]
    offs_rope = D_V + tl.arange(0, BLOCK_ROPE).to(tl.int64)  # [BLOCK_ROPE]

    q_rows = q_ptr + t * stride_q_t + heads[:, None] * stride_q_h  # [BLOCK_H, 1]
    q = tl.load(
        q_rows + offs_v[None, :] * stride_q_d, mask=head_ok[:, None] & (offs_v < D_V)[None, :], other=0.0
    )  # [BLOCK_H, BLOCK_V]
    q_rope = tl.load(
        q_rows + offs_rope[None, :] * stride_q_d,
        mask=head_ok[:, None] & (offs_rope < D_V + D_ROPE)[None, :],
        other=0.0,
    )  # [BLOCK_H, BLOCK_ROPE]

    segment = Segment(
        *(kv_ptr, stride_kv_page, stride_kv_row, stride_kv_d, s_kv),
        *(indices_ptr + t * stride_indices_t, stride_indices_n),
        row_length(topk, topk_length_ptr, t),
    )
    tiles = tl.cdiv(segment.length, BLOCK_N)
    extra_tiles = 0
    if extra_kv_ptr is not None:
        extra = Segment(
            *(extra_kv_ptr, stride_extra_kv_page, stride_extra_kv_row, stride_extra_kv_d, extra_s_kv),
            *(extra_indices_ptr + t * stride_extra_indices_t, stride_extra_indices_n),
            row_length(extra_topk, extra_topk_length_ptr, t),
        )
        extra_tiles = tl.cdiv(extra.length, BLOCK_N)
    split = tl.program_id(1)
    share = tl.cdiv(tiles + extra_tiles, tl.num_programs(1))
    first = split * share
    softmax = _attend(
        *(empty_softmax(BLOCK_H, BLOCK_N, BLOCK_V), q, q_rope, segment, first, share, scale_log2),
        *(D_V, D_ROPE, FORMAT, PAGE_SIZE, NATIVE_FP8, BLOCK_N, SKIP_EMPTY, KEYS_ON_M),
    )
    if extra_kv_ptr is not None:
        softmax = _attend(
            *(softmax, q, q_rope, extra, first - tiles, share, scale_log2),
            *(D_V, D_ROPE, EXTRA_FORMAT, EXTRA_PAGE_SIZE, NATIVE_FP8, BLOCK_N, SKIP_EMPTY, KEYS_ON_M),
        )

    sink = None
    if attn_sink_ptr is not None:
        sink = tl.load(attn_sink_ptr + heads, mask=head_ok, other=0.0)  # [BLOCK_H]
    out, lse, highest = result(softmax, sink)  # [BLOCK_H, BLOCK_V], [BLOCK_H], [BLOCK_H]
    row = t + split.to(tl.int64) * s_q  # of out, lse and max_logits
    tl.store(
        out_ptr + row * stride_out_t + heads[:, None] * stride_out_h + offs_v[None, :] * stride_out_d,
        out.to(out_ptr.dtype.element_ty),
        mask=head_ok[:, None] & (offs_v < D_OUT)[None, :],
    )
    tl.store(lse_ptr + row * stride_lse_t + heads * stride_lse_h, lse, mask=head_ok)
    tl.store(max_ptr + row * stride_max_t + heads * stride_max_h, highest, mask=head_ok)


@triton.jit
def _attend(
    softmax,
    q,  # [BLOCK_H, BLOCK_V]
    q_rope,  # [BLOCK_H, BLOCK_ROPE]
    segment,
    first,  # tile of the segment; below 0 in an earlier one
    share,  # tiles from there on
    scale_log2,
    D_V: tl.constexpr,
    D_ROPE: tl.constexpr,
    FORMAT: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SKIP_EMPTY: tl.constexpr,
    KEYS_ON_M: tl.constexpr,
):
    """The softmax after a share of one segment's tiles."""
    BLOCK_V: tl.constexpr = q.shape[1]
    BLOCK_ROPE: tl.constexpr = q_rope.shape[1]
    stop = tl.minimum((first + share) * BLOCK_N, segment.length)
    offs_n = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    tile_indices = segment.indices_ptr + offs_n.to(tl.int64) * segment.stride_indices_n  # [BLOCK_N]
    for n in range(tl.maximum(first, 0) * BLOCK_N, stop, BLOCK_N):
        index = tl.load(
            tile_indices + tl.cast(n, tl.int64) * segment.stride_indices_n, mask=offs_n < stop - n, other=-1
        ).to(tl.uint32)  # [BLOCK_N]
        valid = index < segment.s_kv.to(tl.uint32)  # [BLOCK_N]; negative ones are huge
        value = load_values(
            segment, index, valid, q.dtype, FORMAT, PAGE_SIZE, NATIVE_FP8, D_V, BLOCK_V
        )  # [BLOCK_N, BLOCK_V]
        rope = None
        if D_ROPE > 0:
            rope = load_ropes(
                segment, index, valid, q.dtype, FORMAT, PAGE_SIZE, D_V, D_ROPE, BLOCK_ROPE
            )  # [BLOCK_N, BLOCK_ROPE]
        softmax = add_tile(softmax, q, q_rope, value, rope, value, valid, scale_log2, SKIP_EMPTY, KEYS_ON_M)
    return softmax
