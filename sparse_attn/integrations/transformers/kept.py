"""How much of the dense attention selected tokens get: what is lost by reading no others."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .grouped import GroupedAttention
from .indexers import attention_paid
from .inputs import Visible, query_chunks

EVERY = 8  # queries of which one is measured


@contextlib.contextmanager
def kept_attention(model: PreTrainedModel) -> Iterator[dict[int, list[float]]]:
    """Measure the selections of a model that :func:`attach` changed, while it reads.

    Every eighth token of the second half of what a call reads is measured, against all of dense attention.

    Yields:
        By layer, for each call the share of the attention that the selected tokens keep: the mean over heads,
        sequences and measured tokens, 1 if nothing is lost.

    Raises:
        TypeError: a model without indexers.
    """
    layers: list[Any] = [
        m for m in model.modules() if isinstance(m, GroupedAttention) and m.indexer is not None
    ]
    if not layers:
        raise TypeError(f"model: expected one that attach() changed, got {type(model).__name__}")
    kept: dict[int, list[float]] = {}
    for layer in layers:
        layer.measured_by = functools.partial(_measure, kept.setdefault(layer.layer_idx, []))
    try:
        yield kept
    finally:
        for layer in layers:
            layer.measured_by = None


@torch.no_grad()
def _measure(
    kept: list[float], query: Tensor, key: Tensor, mask: Tensor, indices: Tensor, scaling: float
) -> None:
    (batch, heads, s_q, _), rows = query.shape, key.shape[2]
    visible = Visible.of(mask, s_q, rows)
    every = torch.arange(s_q // 2, s_q, EVERY, device=query.device)
    shares = []
    for part in query_chunks(len(every), 4 * batch * heads * rows):
        t = every[part]
        first, stop = visible.first[:, t], visible.stop[:, t]
        hidden = Visible(first, stop, visible.rows).table(rows) < 0
        attention = attention_paid(query[:, :, t], key, hidden, scaling) / heads
        selected = indices[:, t]
        of_each = attention.gather(2, selected.clamp_min(0).long()).masked_fill(selected < 0, 0.0)
        shares.append(of_each.sum(-1)[~hidden.all(-1)])
    kept.append(torch.cat(shares).mean().item())
