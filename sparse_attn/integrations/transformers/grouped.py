"""Grouped-query attention over the selected rows, inside the forwards of transformers' own layers."""

from collections.abc import Callable

from torch import Tensor

from ...ops.attention import sparse_gqa
from .inputs import query_chunks

INDEX_BYTES = 8  # of an index while it is made: itself, and what it is compared with


def attend_grouped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Callable[[slice], Tensor],
    scaling: float,
    indices_per_token: int = 0,
) -> Tensor:
    """Attention to the rows that each query reads.

    Args:
        query: ``[B, heads, S, d]``.
        key, value: ``[B, kv_heads, T, d]`` and ``[B, kv_heads, T, d_v]``.
        indices: gives those of some of the queries: ``[B, s_q, k]`` or ``[B, s_q, kv_heads, k]`` int32,
            negative for none.
        indices_per_token: how many those are, of all sequences and heads; for memory, where they are many.

    Returns:
        ``[B, S, heads, d_v]``.
    """
    batch, heads, s_q, d = query.shape
    k, v = key.transpose(1, 2), value.transpose(1, 2)
    q = query.transpose(1, 2)
    out = query.new_empty(batch, s_q, heads, value.shape[3])
    bytes_per_token = batch * heads * d * query.element_size() + INDEX_BYTES * indices_per_token
    for t in query_chunks(s_q, bytes_per_token):
        selected = indices(t)
        # A call for each sequence: their keys lie in one tensor, but not as rows of one distance.
        for b in range(batch):
            sparse_gqa(q[b, t], k[b], v[b], selected[b], softmax_scale=scaling, out=out[b, t])
    return out
