"""Sparse attention with a backward, and the loss of an indexer beside it."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...reference import sparse_gqa
from .inputs import query_chunks

TINY = torch.finfo(torch.float32).tiny


def attend_with_gradients(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """As :func:`~.grouped.attend_grouped`, with a backward.

    Args:
        indices: ``[B, S, k]`` int32, negative for none.

    Returns:
        ``[B, S, heads, d_v]``, and without gradients the mean over heads of the attention to each selected
        token, ``[B, S, k]`` fp32.
    """
    batch, heads, s_q, d = query.shape
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    outs, paid = [], []
    for t in query_chunks(s_q, 2 * heads * indices.shape[2] * d * query.element_size()):
        for b in range(batch):
            out, lse = checkpoint(
                sparse_gqa, q[b, t], k[b], v[b], indices[b, t], scaling, use_reentrant=False
            )
            outs.append(out)
            paid.append(_paid(q[b, t].detach(), k[b].detach(), indices[b, t], lse.detach(), scaling))
    chunks = range(0, len(outs), batch)
    return tuple(  # type: ignore[return-value]
        torch.stack([torch.cat([parts[i + b] for i in chunks]) for b in range(batch)])
        for parts in (outs, paid)
    )


def _paid(q: Tensor, k: Tensor, indices: Tensor, lse: Tensor, scaling: float) -> Tensor:
    rows = k[indices.clamp_min(0).long()]  # [s_q, topk, kv_heads, d]
    grouped = q.unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("sgjd,skgd->sgjk", grouped, rows).flatten(1, 2).float() * scaling
    return (scores - lse[..., None]).exp().mean(1).masked_fill(indices < 0, 0.0)


def divergence(paid: Tensor, index_scores: Tensor, ranked: Tensor) -> Tensor:
    """How far index scores are from the attention paid to the same tokens, 0 at best.

        ``sum_s p_s (log(p_s / P) - log softmax(I)_s)``,  ``P = sum_s p_s``

    Args:
        paid: ``p``, ``[..., tokens]`` fp32.
        index_scores: ``I``, the same shape.
        ranked: which tokens the sums take.

    Returns:
        ``[...]``.
    """
    log = index_scores.masked_fill(~ranked, -torch.inf).log_softmax(-1).masked_fill(~ranked, 0.0)
    paid = paid * ranked
    share = paid / paid.sum(-1, keepdim=True).clamp_min(TINY)
    return (paid * (share.clamp_min(TINY).log() - log)).sum(-1)
