"""Indexers for models that were trained without one, attached to their grouped-query attention."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from ...ops.index import select_topk
from .inputs import Visible, query_chunks
from .selections import Indexer
from .tokens import TokenIndexer, head_weights, lightning

FORMAT = "sparse_attn.indexer/2"  # in a saved file
SCALE = ".scale"  # there, behind the name of a matrix: of its rows


class AttentionScores(Indexer, nn.Module):
    """The training-free indexer: the tokens that get the most attention, summed over the query heads.

    It has no weights and knows what a perfect indexer would, so it shows what a number of tokens costs in
    quality. It computes all of dense attention's scores, so it saves little time.
    """

    def __init__(self, topk: int) -> None:
        super().__init__()
        self.index_topk = topk

    @torch.no_grad()
    def forward(self, query: Tensor, key: Tensor, mask: Tensor, scaling: float) -> Tensor:
        """Rows that each new token reads, ``[B, S, topk]`` int32, -1 padded.

        Args:
            query: ``[B, heads, S, d]``.
            key: ``[B, kv_heads, T, d]``.
            mask: for :meth:`~.inputs.Visible.of`.
        """
        (batch, heads, s_q, _), rows = query.shape, key.shape[2]
        visible = Visible.of(mask, s_q, rows)

        def select(t: slice) -> Tensor:
            if rows <= self.index_topk:
                return visible.part(t).table(rows)
            stop = rows - s_q + t.stop  # rows behind are the future of all of them
            hidden = visible.part(t).table(rows)[..., :stop] < 0
            attention = attention_paid(query[:, :, t], key[:, :, :stop], hidden, scaling)
            attention.masked_fill_(hidden, -torch.inf)
            return select_topk(attention.flatten(0, 1), self.index_topk).unflatten(0, hidden.shape[:2])

        return self.selected(select, query_chunks(s_q, 4 * batch * heads * rows), query.transpose(1, 2))


def attention_paid(query: Tensor, key: Tensor, hidden: Tensor, scaling: float) -> Tensor:
    """Dense attention to every row, summed over the heads, ``[B, s_q, rows]`` in fp32 (fp64 for fp64).

    Args:
        query: ``[B, heads, s_q, d]``.
        key: ``[B, kv_heads, rows, d]``.
        hidden: ``[B, s_q, rows]``, True for rows that a query does not read.
    """
    s_q = query.shape[2]
    grouped = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # [B, kv_heads, group * s_q, d]
    scores = (grouped @ key.mT).to(torch.promote_types(query.dtype, torch.float32))
    scores = scores.mul_(scaling).unflatten(2, (-1, s_q)).masked_fill_(hidden[:, None, None], -torch.inf)
    return scores.softmax(-1).sum((1, 2))


class HiddenStates(TokenIndexer, nn.Module):
    """A lightning indexer that reads the hidden states of its attention layer, as :func:`distill` trains it.

    A query's own token and its sequence's first one are always selected, and counted in ``topk``: most heads
    attend to both whatever the text. The index score ranks the others.

    Args:
        hidden_size: of the model.
        n_heads: index heads.
        head_dim: of an index head.
        rope_dim: leading dimensions of it that are rotated, with frequencies spread over the model's own.
        topk: tokens that each query reads.
    """

    layer_idx: int

    def __init__(self, hidden_size: int, n_heads: int, head_dim: int, rope_dim: int, topk: int = 0) -> None:
        super().__init__()
        self.n_heads, self.head_dim, self.qk_rope_head_dim = n_heads, head_dim, rope_dim
        self.index_topk, self.softmax_scale = topk, head_dim**-0.5
        self.wq_b = nn.Linear(hidden_size, n_heads * head_dim, bias=False)
        self.wk = nn.Linear(hidden_size, head_dim, bias=False)
        self.k_norm = nn.LayerNorm(head_dim, eps=1e-6)
        self.weights_proj = nn.Linear(hidden_size, n_heads, bias=False)

    def scores(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], t: Tensor) -> Tensor:
        """Index scores ``[n, T]`` of all tokens for the queries at ``t`` ``[n]``, of one sequence.

        Args:
            hidden_states: ``[T, hidden_size]``.
            position_embeddings: cos and sin, ``[T, d]``.
        """
        cos, sin = (x[None] for x in position_embeddings)
        states = hidden_states[None]
        q = self._rotate(self._query(states[:, t], None), (cos[:, t], sin[:, t]))[0]  # [n, heads, d]
        k = self._rotated_key(states, (cos, sin))[0]  # [T, d]
        dots = (q.flatten(0, 1) @ k.mT).view(*q.shape[:2], -1).relu()
        return (head_weights(self, hidden_states[t])[:, None] @ dots)[:, 0]

    def scores_of(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], indices: Tensor
    ) -> Tensor:
        """Index scores ``[B, S, k]`` of the tokens ``indices`` ``[B, S, k]``, those of the same sequences."""
        q = self._rotate(self._query(hidden_states, None), position_embeddings)
        k = self._rotated_key(hidden_states, position_embeddings)
        sequence = torch.arange(len(k), device=k.device)[:, None, None]
        rows = k[sequence, indices.clamp_min(0).long()]  # [B, S, k, d]
        dots = torch.einsum("bshd,bskd->bshk", q, rows).relu()
        return torch.einsum("bsh,bshk->bsk", head_weights(self, hidden_states), dots)

    def _select(self, q: Tensor, k: Tensor, weights: Tensor, visible: Visible) -> Tensor:
        own = visible.stop - 1
        first = visible.first
        if visible.rows is not None:  # the first row that exists
            exists = visible.rows >= 0
            first = torch.maximum(first, exists.int().argmax(1, keepdim=True).int())
            own = visible.rows.gather(1, own.long())
        between = Visible(first + 1, torch.maximum(visible.stop - 1, first + 1), visible.rows)
        scored = lightning(q, k, weights, self.index_topk - 2, between)
        return torch.cat([torch.where(first < own, first, -1)[..., None], scored, own[..., None]], -1)

    def rotation(self, x: Tensor, _: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int):
        """``x`` rotated in halves."""
        half = self.qk_rope_head_dim // 2
        step = cos.shape[-1] // 2 // half
        if step == 0:
            raise ValueError(
                f"rope_dim: expected at most the model's {cos.shape[-1]}, got {self.qk_rope_head_dim}"
            )
        cos, sin = (y[..., : half * step : step].unsqueeze(unsqueeze_dim) for y in (cos, sin))
        a, b = x.chunk(2, -1)
        rotated = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
        return rotated, rotated


class Indexers(nn.Module):
    """A :class:`HiddenStates` indexer for each layer of a model, and how much each loses at how few tokens.

    ``indexers[layer_idx]`` is one. :func:`attach` copies them into a model.

    Args:
        hidden_size: of the model.
        sizes: by the number of the layer, ``{"n_heads": int, "head_dim": int, "rope_dim": int}``.
        lost: by the number of the layer, what is lost at each of ``counts`` tokens, in any unit that adds up
            over layers; empty if unknown.
        counts: ascending.
    """

    def __init__(
        self,
        hidden_size: int,
        sizes: dict[int, dict[str, int]],
        lost: dict[int, list[float]] | None = None,
        counts: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.hidden_size, self.sizes = hidden_size, sizes
        self.lost, self.counts = lost or {}, list(counts)
        made = {str(number): HiddenStates(hidden_size, **size) for number, size in sizes.items()}
        self.layers = nn.ModuleDict(made)

    def __getitem__(self, layer_idx: int) -> HiddenStates:
        return self.layers[str(layer_idx)]  # pyright: ignore[reportReturnType]

    def allocate(self, topk: int) -> list[int]:
        """Tokens for each layer, ``topk`` on average, so that the layers together lose least; between half of
        ``topk`` and twice that, since other texts lose elsewhere. All the same if what they lose is unknown.
        """
        if not self.lost:
            return [topk] * len(self.sizes)
        counts = torch.tensor([float(k) for k in self.counts]).log()
        lost = torch.tensor([self.lost[number] for number in self.sizes]).clamp_min(1e-9).log()

        def at(layer: int, k: int) -> float:
            x = torch.tensor(float(k)).log().clamp(counts[0], counts[-1])
            right = int(torch.searchsorted(counts, x).clamp(1, len(counts) - 1))
            share = (x - counts[right - 1]) / (counts[right] - counts[right - 1])
            return float(torch.lerp(lost[layer, right - 1], lost[layer, right], share).exp())

        step = max(1, topk // 16)
        ks = [max(3, topk // 2)] * len(self.sizes)
        saved = [at(i, k) - at(i, k + step) for i, k in enumerate(ks)]
        for _ in range((topk * len(ks) - sum(ks)) // step):
            best = max(range(len(ks)), key=saved.__getitem__)
            ks[best] += step
            saved[best] = at(best, ks[best]) - at(best, ks[best] + step) if ks[best] < 2 * topk else -1.0
        return ks


def save_indexer(indexers: Indexers, path: str | Path) -> None:
    """Write indexers to a safetensors file, matrices in int8 with a scale for each row, with their config in
    its metadata.
    """
    if not isinstance(indexers, Indexers):
        raise TypeError(f"indexers: expected Indexers, got {type(indexers).__name__}")
    config = {name: getattr(indexers, name) for name in ("hidden_size", "sizes", "lost", "counts")}
    weights: dict[str, Tensor] = {}
    for name, x in indexers.layers.state_dict().items():
        weights[name] = x = x.detach().float().contiguous()
        if x.dim() == 2:
            weights[name + SCALE] = scale = x.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
            weights[name] = (x / scale).round().to(torch.int8)
    save_file(weights, path, {"format": FORMAT, "config": json.dumps(config)})


def load_indexer(path: str | Path) -> Indexers:
    """Read what :func:`save_indexer` wrote; in fp32."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"path: expected a file of save_indexer ({FORMAT}), got {metadata.get('format')!r}"
            )
        config = json.loads(metadata["config"])
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    scales = {name: weights.pop(name) for name in [*weights] if name.endswith(SCALE)}
    for name, scale in scales.items():
        name = name.removesuffix(SCALE)
        weights[name] = weights[name] * scale
    sizes, lost = ({int(n): value for n, value in config[name].items()} for name in ("sizes", "lost"))
    indexers = Indexers(config["hidden_size"], sizes, lost, config["counts"])
    indexers.layers.load_state_dict(weights)
    return indexers.eval()


class IndexKeys:
    """A cache as an attached indexer sees it: its keys lie in layers behind those of the model.

    There they are cropped, reordered and repeated with the model's own.
    """

    def __init__(self, cache: Cache, model_layers: int) -> None:
        self.cache, self.model_layers = cache, model_layers

    def update_indexer(self, keys: Tensor, layer_idx: int) -> Tensor:
        """Append ``keys`` ``[B, S, d]``; all of them so far, ``[B, T, d]``."""
        layers: list[Any] = self.cache.layers
        number = self.model_layers + layer_idx
        while len(layers) <= number:
            layers.append(self._new(len(layers)))
        held, indexed = (layers[i].get_seq_length() for i in (layer_idx, number))
        if isinstance(held, int) and held != indexed:
            raise ValueError(
                f"cache: expected index keys of its {held} tokens in layer {layer_idx}, got {indexed}: "
                "attach() comes before a cache's first token"
            )
        keys = keys[:, None]
        return self.cache.update(keys, keys[..., :0], number)[0][:, 0]

    def _new(self, number: int) -> Any:
        if number < self.model_layers and self.cache.layer_class_to_replicate is not None:
            return self.cache.layer_class_to_replicate()
        static = next((layer for layer in self.cache.layers if type(layer) is StaticLayer), None)
        return DynamicLayer() if static is None else StaticLayer(static.max_cache_len)
