"""Grouped-query attention over the selected rows, inside the forwards of transformers' own layers."""

from collections.abc import Callable

import torch
from torch import Tensor

from ...ops.attention import sparse_gqa
from .inputs import query_chunks


def attend_grouped(
    query: Tensor, key: Tensor, value: Tensor, indices: Callable[[slice], Tensor], scaling: float
) -> Tensor:
    """Attention to the rows that each query reads.

    Args:
        query: ``[B, heads, S, d]``.
        key, value: ``[B, kv_heads, T, d]`` and ``[B, kv_heads, T, d_v]``.
        indices: gives those of some of the queries: ``[B, s_q, k]`` or ``[B, s_q, kv_heads, k]`` int32,
            negative for none.

    Returns:
        ``[B, S, heads, d_v]``.
    """
    batch, heads, s_q, d = query.shape
    k, v = key.transpose(1, 2), value.transpose(1, 2)
    outs = []
    for t in query_chunks(s_q, batch * heads * d * query.element_size()):
        q, selected = query[:, :, t].transpose(1, 2), indices(t)
        # A call for each sequence: their keys lie in one tensor, but not as rows of one distance.
        outs.append(
            torch.stack(
                [sparse_gqa(q[b], k[b], v[b], selected[b], softmax_scale=scaling) for b in range(batch)]
            )
        )
    return torch.cat(outs, 1)
