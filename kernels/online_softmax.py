"""Online softmax, in base 2, over tiles of gathered rows: what the attention kernels share."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # the lowest finite fp32


class Softmax(NamedTuple):
    """What a program holds of its BLOCK_H heads, after some tiles."""

    acc: Any  # [BLOCK_H, BLOCK_V] fp32: sum of exp2(score - row_max) * value
    row_max: Any  # [BLOCK_H] fp32: the highest score, times log2(e)
    row_sum: Any  # [BLOCK_H] fp32: sum of exp2(score - row_max)
    seen: Any  # [BLOCK_N]: has this lane met a valid index? Not told by row_sum: scores of -inf also give 0


@triton.jit
def row_length(topk, topk_length_ptr, t):
    """How many of the ``topk`` indices of query t count."""
    length = topk
    if topk_length_ptr is not None:
        length = tl.minimum(tl.maximum(tl.load(topk_length_ptr + t), 0), topk)
    return length


@triton.jit
def empty_softmax(BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    acc = tl.zeros([BLOCK_H, BLOCK_V], tl.float32)
    # Finite, so that a tile without a valid key never computes inf - inf.
    row_max = tl.full([BLOCK_H], LOWEST, tl.float32)
    return Softmax(acc, row_max, tl.zeros([BLOCK_H], tl.float32), tl.zeros([BLOCK_N], tl.int1))


@triton.jit
def add_tile(
    softmax,
    q,  # [BLOCK_H, BLOCK_D]
    q_rope,  # [BLOCK_H, BLOCK_ROPE], or None: RoPE columns that lie apart from the others
    key,  # [BLOCK_N, BLOCK_D]
    key_rope,  # [BLOCK_N, BLOCK_ROPE] or None
    value,  # [BLOCK_N, BLOCK_V]
    valid,  # [BLOCK_N]: rows that are not valid hold zeros
    scale_log2,  # softmax_scale * log2(e)
    SKIP_EMPTY: tl.constexpr,
    KEYS_ON_M: tl.constexpr,
):
    """The state after one more tile.

    SKIP_EMPTY skips the scores of a tile without a valid row; KEYS_ON_M computes the scores transposed. Both
    exist for what the compiler makes of them, see configs.py.
    """
    seen = softmax.seen | valid
    if SKIP_EMPTY:
        live = tl.max(valid.to(tl.int32), 0) > 0
    else:
        live: tl.constexpr = True
    if live:
        score = _product(q, key, KEYS_ON_M) * scale_log2  # [BLOCK_H, BLOCK_N]
        if key_rope is not None:
            # Scaled apart: chained into one product, sm_90 loses what SKIP_EMPTY gains.
            score += _product(q_rope, key_rope, KEYS_ON_M) * scale_log2
        score = tl.where(valid[None, :], score, float("-inf"))
        row_max = tl.maximum(softmax.row_max, tl.max(score, 1))  # [BLOCK_H]
        p = tl.exp2(score - row_max[:, None])  # [BLOCK_H, BLOCK_N]
        tile_sum = tl.sum(p, 1)  # [BLOCK_H]
        p = p.to(value.dtype)
    else:
        # All zero, as no row is valid; a literal zero would take 8 KiB more shared memory.
        p = tl.broadcast_to(valid[None, :], [q.shape[0], key.shape[0]]).to(value.dtype)
        row_max = softmax.row_max
        tile_sum = tl.zeros_like(softmax.row_sum)
    alpha = tl.exp2(softmax.row_max - row_max)  # [BLOCK_H]
    row_sum = softmax.row_sum * alpha + tile_sum
    acc = tl.dot(p, value, softmax.acc * alpha[:, None], input_precision="ieee")
    return Softmax(acc, row_max, row_sum, seen)


@triton.jit
def _product(q, key, KEYS_ON_M: tl.constexpr):
    if KEYS_ON_M:
        return tl.trans(tl.dot(key, tl.trans(q), input_precision="ieee"))
    else:
        return tl.dot(q, tl.trans(key), input_precision="ieee")


@triton.jit
def result(softmax, sink):
    """out [BLOCK_H, BLOCK_V]; lse and the highest score [BLOCK_H], natural and without the sink.

    The sink is [BLOCK_H] or None.
    """
    denominator = softmax.row_sum
    if sink is not None:
        denominator += tl.exp2(sink * LOG2_E - softmax.row_max)
    empty = tl.max(softmax.seen.to(tl.int32), 0) == 0
    out = tl.where(empty, 0.0, softmax.acc / denominator[:, None])
    lse = (softmax.row_max + tl.log2(softmax.row_sum)) * LN_2  # log2(0) = -inf is the empty row
    return out, lse, tl.where(softmax.row_sum == 0.0, float("-inf"), softmax.row_max * LN_2)
