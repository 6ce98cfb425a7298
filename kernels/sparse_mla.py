"""Sparse MLA: every head of a query attends to the selected rows of one latent cache.

    score[h, n] = softmax_scale * q[t, h] . kv[indices[t, n]]
    max[t, h]   = max_n score[h, n]
    lse[t, h]   = log(sum_n exp(score[h, n]))
    out[t, h]   = sum_n exp(score[h, n]) * kv[indices[t, n], :d_v] / (exp(lse[t, h]) + exp(attn_sink[h]))

n runs over the valid entries of ``indices[t, :topk_length[t]]`` (0 <= index < s_kv), then over those of
an optional second segment. The latent row is the key, and its first d_v columns are the value: each tile
is gathered once and serves as both. When queries are few, several programs share the tiles of each, and
their partial results are merged in order.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from .configs import for_device, has_native_fp8, refuse_fp64, split_count
from .latent_rows import load_tails, load_values
from .merge_attention import merge_parts
from .online_softmax import LOG2_E, add_tile, empty_softmax, result

if TYPE_CHECKING:
    from ..ops.attention import SparseMLAOp


PACKED_BYTES = (656, 584)  # per token, in the quantised caches that latent_rows.py reads


class Config(NamedTuple):
    BLOCK_N: int
    num_warps: int
    num_stages: int
    SKIP_EMPTY: bool = False
    KEYS_ON_M: bool = False
    blocks: int = 1  # that should share an SM


# architecture -> heads a program (BLOCK_H) -> the rest, for d_v = 512 and a tail of 64. A key and a head each
# take 1152 bytes of shared memory; the [BLOCK_H, 512] fp32 accumulator bounds BLOCK_H. None of these spills
# in its loop, and none repeats a product unless that is said.
# With 5 stages the next tile is in flight, in a buffer of its own, while one is computed. With 3, only its
# indices are: another block on the SM has to compute meanwhile.
# SKIP_EMPTY puts the scores under an `if`, which also changes the layout that the compiler gives them. Tiles
# of 64 heads need it: else sm_90 computes every score in both warpgroups (72 wgmma, not 36) and spills, and
# sm_100 takes 281 KiB of shared memory.
# KEYS_ON_M computes the scores transposed: mma.sync then reads the query behind the barrier that the keys
# wait for. Before it, all of the query is loaded at once, 8 registers a thread for each head, and spills.
CONFIGS = {
    # 163 KiB of shared memory
    80: {
        16: Config(32, 4, 3, blocks=2),
        32: Config(32, 4, 3, KEYS_ON_M=True, blocks=2),
        64: Config(32, 8, 5, KEYS_ON_M=True),
    },
    # 99 KiB, also sm_89
    86: {16: Config(32, 4, 5), 32: Config(16, 4, 5, KEYS_ON_M=True)},
    # 227 KiB. For 64 heads wgmma wants tiles of 64 keys, and three of them do not fit: they are waited for.
    90: {16: Config(64, 8, 5), 32: Config(64, 8, 5), 64: Config(64, 8, 2, SKIP_EMPTY=True)},
    # 227 KiB
    100: {16: Config(64, 4, 3, blocks=2), 32: Config(64, 8, 5), 64: Config(32, 8, 5, SKIP_EMPTY=True)},
    # 99 KiB
    120: {16: Config(32, 4, 5), 32: Config(16, 4, 5, KEYS_ON_M=True)},
}
# fp8 rows are gathered as bytes, and lie in shared memory once more as [BLOCK_N, 512] of q's dtype.
CONFIGS_FP8 = {
    80: {
        16: Config(32, 4, 3, blocks=2),
        32: Config(16, 4, 3, KEYS_ON_M=True, blocks=2),
        64: Config(32, 8, 5, KEYS_ON_M=True),
    },
    86: {16: Config(32, 4, 5), 32: Config(16, 4, 5, KEYS_ON_M=True)},
    90: {
        16: Config(64, 8, 5),
        32: Config(16, 4, 3, KEYS_ON_M=True, blocks=2),
        64: Config(32, 8, 5, KEYS_ON_M=True),
    },
    120: {
        # Larger tiles spill. Pairs of warps repeat the scores, which are two tiles of mma.sync.
        16: Config(16, 4, 3, KEYS_ON_M=True, blocks=2),
        32: Config(16, 4, 5, KEYS_ON_M=True),
    },
}
CONFIGS_FP32 = {80: {16: Config(16, 8, 1)}}  # rows of twice the size, IEEE products on the FMA units


def refuses(a: "SparseMLAOp") -> str | None:
    """Why these kernels cannot run ``a``, or None."""
    for name, kv in (("kv", a.kv), ("extra_kv", a.extra_kv)):
        if kv is None or kv.dtype != torch.uint8:
            continue
        if kv.shape[-1] not in PACKED_BYTES:
            sizes = " or ".join(map(str, PACKED_BYTES))
            return f"{name}: the triton backend reads {sizes} bytes per token, got {kv.shape[-1]}; unpack it"
        if a.q.dtype == torch.float16:  # a value times its scale need not fit
            return f"q: expected bfloat16 or float32, as {name} is quantised, got float16 (triton backend)"
    return refuse_fp64(a.q, a.kv, a.attn_sink, a.extra_kv)


def sparse_mla(a: "SparseMLAOp") -> None:
    """Fill out [s_q, h_q, d_v], lse and max_logits [s_q, h_q] from q [s_q, h_q, d_qk] and the rows of kv.

    kv and extra_kv are [s_kv, d_qk], packed [s_kv, 656] uint8, or packed [pages, page_size, 584] uint8.
    """
    q, kv, indices, d_v, softmax_scale, out, lse, max_logits = a[:8]
    topk_length, attn_sink, extra_kv, extra_indices, extra_topk_length = a[8:]
    s_q, h_q, d_qk = q.shape
    if lse.numel() == 0:
        return
    packed = torch.uint8 in (kv.dtype, None if extra_kv is None else extra_kv.dtype)
    table = CONFIGS_FP32 if q.dtype == torch.float32 else CONFIGS_FP8 if packed else CONFIGS
    table = for_device(table, q.device)
    block_h = min((size for size in table if size >= h_q), default=max(table))
    config = table[block_h]
    programs = s_q * triton.cdiv(h_q, block_h)
    topks = [i.shape[1] for i in (indices, extra_indices) if i is not None]
    tiles = sum(triton.cdiv(topk, config.BLOCK_N) for topk in topks)
    splits = split_count(programs, tiles, config.BLOCK_N, q.device, config.blocks)
    parts, part_lses, part_maxima = out[None], lse[None], max_logits[None]
    if splits > 1:
        parts = torch.empty(splits, *out.shape, dtype=torch.float32, device=out.device)
        part_lses, part_maxima = torch.empty(2, splits, *lse.shape, dtype=torch.float32, device=out.device)
    sink = attn_sink if splits == 1 else None  # else it enters where the parts are merged
    with torch.cuda.device_of(q):
        _sparse_mla_kernel[(programs, splits)](
            q,
            *q.stride(),
            *_segment(kv, indices, topk_length),
            *_segment(extra_kv, extra_indices, extra_topk_length),
            sink,
            0 if sink is None else sink.stride(0),
            parts,
            *parts.stride(),
            part_lses,
            *part_lses.stride(),
            part_maxima,
            *part_maxima.stride(),
            h_q,
            softmax_scale * LOG2_E.value,
            D_V=d_v,
            D_TAIL=d_qk - d_v,
            LAYOUT=_layout(kv),
            PAGE_SIZE=_page_size(kv),
            EXTRA_LAYOUT=_layout(extra_kv),
            EXTRA_PAGE_SIZE=_page_size(extra_kv),
            NATIVE_FP8=has_native_fp8(q.device),
            BLOCK_H=block_h,
            BLOCK_N=config.BLOCK_N,
            BLOCK_V=max(16, triton.next_power_of_2(d_v)),
            BLOCK_TAIL=max(16, triton.next_power_of_2(d_qk - d_v)),
            SKIP_EMPTY=config.SKIP_EMPTY,
            KEYS_ON_M=config.KEYS_ON_M,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
        if splits > 1:
            merge_parts(parts, part_lses, out, lse, attn_sink, part_maxima, max_logits)


def _segment(kv, indices, topk_length) -> tuple:
    if kv is None:
        return (None, 0, 0, 0, 0, None, 0, 0, 0, None, 0)
    return (
        kv,
        kv.stride(0),
        *kv.stride()[-2:],
        kv.shape[:-1].numel(),
        indices,
        *indices.stride(),
        indices.shape[1],
        topk_length,
        0 if topk_length is None else topk_length.stride(0),
    )


def _layout(kv) -> int:
    """Bytes of a packed token; 0 is a cache in q's dtype."""
    return kv.shape[-1] if kv is not None and kv.dtype == torch.uint8 else 0


def _page_size(kv) -> int:
    return kv.shape[1] if kv is not None and kv.dim() == 3 else 1


@triton.jit(
    do_not_specialize=[
        *("s_kv", "stride_indices_t", "topk", "extra_s_kv", "stride_extra_indices_t", "extra_topk", "h_q"),
        *("stride_lse_i", "stride_max_i"),
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
    kv_ptr,  # [s_kv, d_qk], or packed as LAYOUT says
    stride_kv_page,
    stride_kv_n,
    stride_kv_d,
    s_kv,
    indices_ptr,  # [s_q, topk]
    stride_indices_t,
    stride_indices_n,
    topk,
    topk_length_ptr,  # [s_q] or None
    stride_topk_length,
    extra_kv_ptr,  # [extra_s_kv, d_qk], packed, or None
    stride_extra_kv_page,
    stride_extra_kv_n,
    stride_extra_kv_d,
    extra_s_kv,
    extra_indices_ptr,  # [s_q, extra_topk]
    stride_extra_indices_t,
    stride_extra_indices_n,
    extra_topk,
    extra_topk_length_ptr,  # [s_q] or None
    stride_extra_topk_length,
    attn_sink_ptr,  # [h_q] or None
    stride_attn_sink,
    out_ptr,  # [splits, s_q, h_q, d_v]
    stride_out_i,
    stride_out_t,
    stride_out_h,
    stride_out_d,
    lse_ptr,  # [splits, s_q, h_q]
    stride_lse_i,
    stride_lse_t,
    stride_lse_h,
    max_ptr,  # [splits, s_q, h_q]
    stride_max_i,
    stride_max_t,
    stride_max_h,
    h_q,
    scale_log2,  # softmax_scale * log2(e)
    D_V: tl.constexpr,
    D_TAIL: tl.constexpr,  # key columns past the value: d_qk - d_v
    LAYOUT: tl.constexpr,  # of a row, see latent_rows
    PAGE_SIZE: tl.constexpr,
    EXTRA_LAYOUT: tl.constexpr,
    EXTRA_PAGE_SIZE: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    SKIP_EMPTY: tl.constexpr,
    KEYS_ON_M: tl.constexpr,
):
    """One program: one query, BLOCK_H heads, a share of the tiles. Neighbours share the query, and so L2."""
    head_blocks = tl.cdiv(h_q, BLOCK_H)
    t = (tl.program_id(0) // head_blocks).to(tl.int64)
    heads = ((tl.program_id(0) % head_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)  # [BLOCK_H]
    head_ok = heads < h_q
    offs_v = tl.arange(0, BLOCK_V).to(tl.int64)  # [BLOCK_V]
    offs_tail = D_V + tl.arange(0, BLOCK_TAIL).to(tl.int64)  # [BLOCK_TAIL]

    q_rows = q_ptr + t * stride_q_t + heads[:, None] * stride_q_h  # [BLOCK_H, 1]
    q = tl.load(
        q_rows + offs_v[None, :] * stride_q_d, mask=head_ok[:, None] & (offs_v < D_V)[None, :], other=0.0
    )  # [BLOCK_H, BLOCK_V]
    q_tail = tl.load(
        q_rows + offs_tail[None, :] * stride_q_d,
        mask=head_ok[:, None] & (offs_tail < D_V + D_TAIL)[None, :],
        other=0.0,
    )  # [BLOCK_H, BLOCK_TAIL]

    acc, row_max, row_sum, seen = empty_softmax(BLOCK_H, BLOCK_N, BLOCK_V)
    length = topk
    if topk_length_ptr is not None:
        length = tl.minimum(tl.maximum(tl.load(topk_length_ptr + t * stride_topk_length), 0), topk)
    tiles = tl.cdiv(length, BLOCK_N)
    extra_tiles = 0
    if extra_kv_ptr is not None:
        extra_length = extra_topk
        if extra_topk_length_ptr is not None:
            extra_length = tl.load(extra_topk_length_ptr + t * stride_extra_topk_length)
            extra_length = tl.minimum(tl.maximum(extra_length, 0), extra_topk)
        extra_tiles = tl.cdiv(extra_length, BLOCK_N)
    split = tl.program_id(1)
    share = tl.cdiv(tiles + extra_tiles, tl.num_programs(1))
    first = split * share
    acc, row_max, row_sum, seen = _attend(
        acc, row_max, row_sum, seen, q, q_tail,
        kv_ptr, stride_kv_page, stride_kv_n, stride_kv_d, s_kv,
        indices_ptr + t * stride_indices_t, stride_indices_n,
        first * BLOCK_N, tl.minimum((first + share) * BLOCK_N, length), scale_log2,
        D_V, D_TAIL, LAYOUT, PAGE_SIZE, NATIVE_FP8, BLOCK_N, BLOCK_V, BLOCK_TAIL, SKIP_EMPTY, KEYS_ON_M,
    )  # fmt: skip
    if extra_kv_ptr is not None:
        first -= tiles
        acc, row_max, row_sum, seen = _attend(
            acc, row_max, row_sum, seen, q, q_tail,
            extra_kv_ptr, stride_extra_kv_page, stride_extra_kv_n, stride_extra_kv_d, extra_s_kv,
            extra_indices_ptr + t * stride_extra_indices_t, stride_extra_indices_n,
            tl.maximum(first, 0) * BLOCK_N, tl.minimum((first + share) * BLOCK_N, extra_length), scale_log2,
            D_V, D_TAIL, EXTRA_LAYOUT, EXTRA_PAGE_SIZE, NATIVE_FP8,
            BLOCK_N, BLOCK_V, BLOCK_TAIL, SKIP_EMPTY, KEYS_ON_M,
        )  # fmt: skip

    sink = None
    if attn_sink_ptr is not None:
        sink = tl.load(attn_sink_ptr + heads * stride_attn_sink, mask=head_ok, other=0.0)  # [BLOCK_H]
    out, lse, highest = result(acc, row_max, row_sum, seen, sink)  # [BLOCK_H, BLOCK_V], [BLOCK_H], [BLOCK_H]
    out_ptr += split.to(tl.int64) * stride_out_i + t * stride_out_t
    lse_ptr += split.to(tl.int64) * stride_lse_i + t * stride_lse_t
    max_ptr += split.to(tl.int64) * stride_max_i + t * stride_max_t
    tl.store(
        out_ptr + heads[:, None] * stride_out_h + offs_v[None, :] * stride_out_d,
        out.to(out_ptr.dtype.element_ty),
        mask=head_ok[:, None] & (offs_v < D_V)[None, :],
    )
    tl.store(lse_ptr + heads * stride_lse_h, lse, mask=head_ok)
    tl.store(max_ptr + heads * stride_max_h, highest, mask=head_ok)


@triton.jit
def _attend(
    acc,  # [BLOCK_H, BLOCK_V]
    row_max,  # [BLOCK_H]
    row_sum,  # [BLOCK_H]
    seen,  # [BLOCK_N]: has this lane met a valid index
    q,  # [BLOCK_H, BLOCK_V]
    q_tail,  # [BLOCK_H, BLOCK_TAIL]
    kv_ptr,
    stride_kv_page,
    stride_kv_n,
    stride_kv_d,
    s_kv,
    indices_ptr,
    stride_indices_n,
    start,
    stop,
    scale_log2,
    D_V: tl.constexpr,
    D_TAIL: tl.constexpr,
    LAYOUT: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    SKIP_EMPTY: tl.constexpr,
    KEYS_ON_M: tl.constexpr,
):
    """Online softmax over one segment's indices from ``start`` to ``stop``."""
    offs_n = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    tile_indices = indices_ptr + offs_n.to(tl.int64) * stride_indices_n  # [BLOCK_N]
    for n in range(start, stop, BLOCK_N):
        index = tl.load(
            tile_indices + tl.cast(n, tl.int64) * stride_indices_n, mask=offs_n < stop - n, other=-1
        ).to(tl.uint32)  # [BLOCK_N]
        valid = index < s_kv.to(tl.uint32)  # [BLOCK_N]; negative ones are huge
        value = load_values(
            kv_ptr, stride_kv_page, stride_kv_n, stride_kv_d, index, valid,
            q.dtype, LAYOUT, PAGE_SIZE, NATIVE_FP8, D_V, BLOCK_N, BLOCK_V,
        )  # [BLOCK_N, BLOCK_V]  # fmt: skip
        tail = None
        if D_TAIL > 0:
            tail = load_tails(
                kv_ptr, stride_kv_page, stride_kv_n, stride_kv_d, index, valid,
                q.dtype, LAYOUT, PAGE_SIZE, D_V, D_TAIL, BLOCK_TAIL,
            )  # [BLOCK_N, BLOCK_TAIL]  # fmt: skip
        acc, row_max, row_sum, seen = add_tile(
            acc,
            row_max,
            row_sum,
            seen,
            q,
            q_tail,
            value,
            tail,
            value,
            valid,
            scale_log2,
            SKIP_EMPTY,
            KEYS_ON_M,
        )
    return acc, row_max, row_sum, seen
