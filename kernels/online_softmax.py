"""What the attention kernels share: an online softmax, in base 2, over tiles of gathered rows.

A program holds, for its BLOCK_H heads, the running maximum of the scores (``row_max``, times log2(e)), the
sum of their exponentials below it (``row_sum``) and that sum weighted by the values (``acc``). ``seen`` says
for each lane of a tile whether it has met a valid index: a sum of zero alone could be scores of -inf.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # the lowest finite fp32


@triton.jit
def empty_softmax(BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    acc = tl.zeros([BLOCK_H, BLOCK_V], tl.float32)
    # Finite, so that a tile without a valid key never computes inf - inf.
    row_max = tl.full([BLOCK_H], LOWEST, tl.float32)
    return acc, row_max, tl.zeros([BLOCK_H], tl.float32), tl.zeros([BLOCK_N], tl.int1)


@triton.jit
def add_tile(
    acc,  # [BLOCK_H, BLOCK_V] fp32
    row_max,  # [BLOCK_H] fp32
    row_sum,  # [BLOCK_H] fp32
    seen,  # [BLOCK_N]
    q,  # [BLOCK_H, BLOCK_D]
    q_tail,  # [BLOCK_H, BLOCK_TAIL]: more columns of the query, or None
    key,  # [BLOCK_N, BLOCK_D]
    key_tail,  # [BLOCK_N, BLOCK_TAIL] or None
    value,  # [BLOCK_N, BLOCK_V]
    valid,  # [BLOCK_N]: rows that are not valid hold zeros
    scale_log2,  # softmax_scale * log2(e)
    SKIP_EMPTY: tl.constexpr,
    KEYS_ON_M: tl.constexpr,
):
    """The state after one more tile.

    SKIP_EMPTY does not compute the scores of a tile without a valid row; KEYS_ON_M computes them transposed.
    Both are there for what the compiler makes of them, see the configurations.
    """
    seen |= valid
    if SKIP_EMPTY:
        live = tl.max(valid.to(tl.int32), 0) > 0
    else:
        live: tl.constexpr = True
    if live:
        score = _product(q, key, KEYS_ON_M) * scale_log2  # [BLOCK_H, BLOCK_N]
        if key_tail is not None:
            # Scaled apart: chained into one product, sm_90 loses what SKIP_EMPTY wins.
            score += _product(q_tail, key_tail, KEYS_ON_M) * scale_log2
        score = tl.where(valid[None, :], score, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(score, 1))  # [BLOCK_H]
        p = tl.exp2(score - new_max[:, None])  # [BLOCK_H, BLOCK_N]
        tile_sum = tl.sum(p, 1)  # [BLOCK_H]
        p = p.to(value.dtype)
    else:
        # All zero, as no row is valid; a literal zero would take 8 KiB more shared memory.
        p = tl.broadcast_to(valid[None, :], [q.shape[0], key.shape[0]]).to(value.dtype)
        new_max = row_max
        tile_sum = tl.zeros_like(row_sum)
    alpha = tl.exp2(row_max - new_max)  # [BLOCK_H]
    row_sum = row_sum * alpha + tile_sum
    acc = tl.dot(p, value, acc * alpha[:, None], input_precision="ieee")
    return acc, new_max, row_sum, seen


@triton.jit
def _product(q, key, KEYS_ON_M: tl.constexpr):
    if KEYS_ON_M:
        return tl.trans(tl.dot(key, tl.trans(q), input_precision="ieee"))
    else:
        return tl.dot(q, tl.trans(key), input_precision="ieee")


@triton.jit
def result(acc, row_max, row_sum, seen, sink):
    """out [BLOCK_H, BLOCK_V]; lse and the highest score, [BLOCK_H], natural and without the sink, which is
    [BLOCK_H] or None.
    """
    denominator = row_sum
    if sink is not None:
        denominator += tl.exp2(sink * LOG2_E - row_max)
    empty = tl.max(seen.to(tl.int32), 0) == 0
    out = tl.where(empty, 0.0, acc / denominator[:, None])
    lse = (row_max + tl.log2(row_sum)) * LN_2  # log2(0) = -inf is the empty row
    return out, lse, tl.where(row_sum == 0.0, float("-inf"), row_max * LN_2)
