"""Attention of the layers without a selection, in bounded memory: torch's own, for some queries at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import Visible, query_chunks


def dense(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, window: int | None
) -> Tensor:
    """Attention to all visible rows.

    Args:
        query: ``[B, heads, S, d]``.
        key, value: ``[B, kv_heads, T, d]`` and ``[B, kv_heads, T, d_v]``.
        mask: for :meth:`~.inputs.Visible.of`.
        window: the tokens that a layer with a window reads.

    Returns:
        ``[B, S, heads, d_v]``.
    """
    batch, heads, s_q, _ = query.shape
    rows = key.shape[2]
    visible = Visible.of(mask, s_q, rows, window)
    outs = []
    for t in query_chunks(s_q, batch * heads * rows * query.element_size()):
        seen = visible.part(t).table(rows)[:, None] >= 0
        outs.append(
            F.scaled_dot_product_attention(
                query[:, :, t], key, value, attn_mask=seen, scale=scaling, enable_gqa=heads != key.shape[1]
            )
        )
    return torch.cat(outs, 2).transpose(1, 2)
