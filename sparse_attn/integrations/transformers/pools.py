"""The indexers that score pools of keys: of GLM-5.3-Flash (glm5_next) and of Qwen4-Exp (qwen4_exp, QSA).

A pool is ``size`` tokens in a row, counted from the first token of their sequence, and its key is made of
theirs. A token selects ``budget`` of the pools whose last token it may read. It reads all rows of those, and
the tail: what it may read behind the last pool of that kind, fewer than ``size`` rows.

``P``: pools of a sequence. The keys of whole pools never change, so they are kept beside a cache that grows
in place, and a decoded token makes one key at most. Other caches give all keys anew at each call.

Padding that is not all on the left is treated as in transformers' own layers. glm5_next pools rows of the
cache: a pool with padding in it cannot be selected, and the tail is counted in tokens but read as rows, so
that behind such padding it may miss some. qwen4_exp pools the tokens that are visible, whatever lies between
them. A token that may read nothing (padding; in glm5_next also one that padding cut off, or, without
``index_kpool_always_select_tail``, one before the end of the first pool) gets 0, as with SDPA. Eager
attention gives it the mean of all rows, later and unused ones too; in qwen4_exp before release 5.23 it gives
NaN, which spreads to the whole sequence.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.utils.import_utils import is_tracing

from .attention import SparseAttention
from .grouped import attend_grouped
from .growth import append, notes_of
from .inputs import Visible, query_chunks
from .latent import LatentAttention
from .selections import Indexer
from .tokens import head_weights, lightning

NONE = 2**31 - 1  # behind every row


class Pools(NamedTuple):
    """The whole pools among the first ``rows`` rows of a cache, in their order."""

    rows: int
    keys: Tensor  # [B, P + 1, d]; the last of them is room for what is no pool
    start: Tensor  # [B, P + 1, 1] int32, the first row of each; NONE where there is no pool


class PoolIndexer(Indexer):
    """Mixed into an indexer class of transformers. Families differ in how they make keys and queries, and say
    what ``size``, ``budget`` and ``head_dim`` are."""

    def extended(
        self,
        known: Pools | None,
        rows: int,
        first: Tensor,
        pool: Callable[[Tensor], tuple[Tensor, Tensor]],
    ) -> Pools:
        """The pools of ``rows`` rows, some of which may be known.

        Args:
            first: ``[B]``, the row of each sequence's first token.
            pool: gives the keys ``[B, n, d]`` of the pools of rows ``[B, n, size]``, and which of them are
                whole, ``[B, n]`` bool.
        """
        before = 0 if known is None else known.rows
        batch, count = len(first), rows // self.size
        # A sequence's first pool that was not whole yet, and as many behind it as new rows may complete.
        new = torch.arange((rows - before) // self.size + 1, device=first.device)
        number = (before - first).clamp_min(0)[:, None] // self.size + new
        members = (first[:, None] + number * self.size)[..., None] + self._offsets(first.device)
        parts = query_chunks(len(new), 16 * batch * self.size * self.head_dim)
        found = [pool(members[:, part].clamp_max(rows - 1)) for part in parts]
        keys, whole = (torch.cat(part, 1) for part in zip(*found, strict=True))
        whole &= members[..., -1] < rows

        more = count + 1 - (0 if known is None else known.keys.shape[1])
        all_keys = keys.new_zeros(batch, more, keys.shape[2])
        start = torch.full((batch, more, 1), NONE, dtype=torch.int32, device=first.device)
        if known is not None:
            all_keys, start = append(known.keys, all_keys), append(known.start, start)
        filled = (start[..., 0] < NONE).sum(1, keepdim=True)
        at = torch.where(whole, filled + whole.cumsum(1) - 1, count)
        sequence = torch.arange(batch, device=first.device)[:, None]
        all_keys[sequence, at] = keys
        start[sequence, at, 0] = torch.where(whole, members[..., 0], NONE).int()
        return Pools(rows, all_keys, start)

    def rows_of_pools(self, pools: Pools, stop: Tensor, query: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
        """The rows of the pools that some tokens select, ``[B, s_q, n * size]`` int32, -1 for none.

        Args:
            stop: ``[B, s_q]`` int32, the row behind the last one that each token may read.
            query: gives q and weights for :func:`~.tokens.lightning`, if there is something to select.
        """
        start = pools.start[..., 0].contiguous()
        whole = torch.searchsorted(start, stop - self.size, right=True, out_int32=True)
        visible = Visible(torch.zeros_like(whole), whole, None)
        width = pools.keys.shape[1]
        if width - 1 <= self.budget:
            chosen = visible.table(width)
        else:
            q, weights = query()
            chosen = lightning(q, pools.keys, weights, self.budget, visible)
        rows = start.gather(1, chosen.clamp_min(0).flatten(1).long()).view_as(chosen)
        rows = rows[..., None] + self._offsets(rows.device).int()
        return torch.where(chosen[..., None] >= 0, rows, -1).flatten(2)

    def rows_of_tail(self, first: Tensor, count: Tensor) -> Tensor:
        """``[B, s_q, size - 1]`` int32, -1 for none.

        Args:
            first: ``[B]``, the row of each sequence's first token.
            count: ``[B, s_q]``, how many tokens each token may read.
        """
        left = (count % self.size)[..., None]
        offsets = self._offsets(first.device)[:-1]
        rows = (first[:, None] + count)[..., None] - left + offsets
        return torch.where(offsets < left, rows, -1).int()

    def chunks(self, new: Tensor, heads: int, pools: Pools):
        """Slices of the new tokens ``[B, S, ...]`` whose queries and selections are held together."""
        batch, s_q = new.shape[:2]
        selected = self.size * min(self.budget, pools.keys.shape[1])
        return query_chunks(s_q, batch * (heads * self.head_dim * new.element_size() + 16 * selected))

    def _offsets(self, device: torch.device) -> Tensor:
        return torch.arange(self.size, device=device)


class Glm5NextIndexer(PoolIndexer):
    """A pool's key is a mean of its tokens', with learned weights. The cache holds keys, the scores of their
    weights, and whether each row is a token; positions play no part."""

    size = property(lambda self: self.index_kpool)
    budget = property(lambda self: self.index_topk // self.index_kpool)

    @torch.no_grad()
    def forward(
        self,
        hidden_states: Tensor,
        q_resid: Tensor,
        attention_mask: Tensor,
        past_key_values: Any = None,  # the cache's name before transformers 5.24
        cache: Any = None,
    ) -> Tensor:
        """Rows of the cache that each new token attends to, ``[B, S, n]`` int32, -1 for none.

        Args:
            attention_mask: ``[B, S]`` bool, False where a new token is padding.
        """
        cache = past_key_values if cache is None else cache
        batch, s_q, _ = hidden_states.shape
        k = self.k_norm(self.wk(hidden_states))
        gate = F.linear(hidden_states, self.index_kpool_compress_gate)
        held, length = torch.cat([k, gate, attention_mask[..., None].to(k.dtype)], -1), s_q
        if cache is not None:
            held = cache.update_indexer(held, self.layer_idx)
            length = cache.layers[self.layer_idx].get_seq_length()
        sequence = torch.arange(batch, device=held.device)[:, None, None]

        def pool(members: Tensor) -> tuple[Tensor, Tensor]:
            keys, scores, exists = held[sequence, members].split([self.head_dim, self.head_dim, 1], -1)
            share = (scores.float() + self.index_kpool_compress_ape.float()).softmax(2).to(keys.dtype)
            return (share * keys).sum(2), exists[..., 0].all(-1)

        notes = notes_of(held)
        known = notes.get("pools")
        before = 0 if known is None else known.rows
        tokens = notes.get("tokens", 0) + held[:, before:, -1].bool().cumsum(1)  # up to each row
        first = notes.get("first", 0) + (tokens == 0).sum(1)
        pools = self.extended(known, held.shape[1], first, pool)
        notes.update(pools=pools, tokens=tokens[:, -1:], first=first)

        row = torch.arange(s_q, device=held.device).expand(batch, -1) + (length - s_q)
        count = tokens.gather(1, row - before) * attention_mask
        stop = ((row + 1) * attention_mask).int()

        def select(t: slice) -> Tensor:
            def query() -> tuple[Tensor, Tensor]:
                q = self.wq_b(q_resid[:, t]).unflatten(-1, (-1, self.head_dim))
                return q, head_weights(self, hidden_states[:, t])

            rows = self.rows_of_pools(pools, stop[:, t], query)
            if not self.index_kpool_always_select_tail or self.size == 1:
                return rows
            tail = self.rows_of_tail(first, count[:, t])
            # Behind padding in between, these may be padding, or a pool that was selected.
            exists = held[sequence, tail.clamp_min(0), -1].bool()
            twice = (rows[..., :: self.size] == tail[..., :1]).any(-1, keepdim=True)
            return torch.cat([rows, torch.where(exists & ~twice, tail, -1)], -1)

        return self.selected(select, self.chunks(hidden_states, self.n_heads, pools), hidden_states)


class Glm5NextAttention(LatentAttention):
    """Its forward makes a mask of the selection for the attention function; here that is the selection.
    ``input_ids`` and ``position_ids`` are given to it, but play no part."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor, input_ids=None, position_ids=None, **kwargs
    ):
        got = "none" if attention_mask is None else f"{list(attention_mask.shape)} {attention_mask.dtype}"
        expected = f"{list(hidden_states.shape[:2])} {torch.bool}"
        if got != expected:
            raise ValueError(
                f"attention_mask: expected {expected}, False where a new token is padding, got {got}; "
                "4-D masks are not supported"
            )
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if cache is None and position_ids is not None and not is_tracing(position_ids):
            _check_packed((position_ids.diff(dim=-1) != 1).any() & attention_mask.all())
        return super().forward(hidden_states, attention_mask, **kwargs)

    def build_attention_mask_from_topk(self, topk_indices: Tensor, query_states: Tensor, kv_length: int):
        return topk_indices

    def attend(self, query, latent, k_rope, mask, **options):
        return super().attend(query, latent, k_rope, None, indices=mask, **options)


class Mask:
    """What :class:`Qwen4ExpAttention` gives its forward for a mask: combined with the selection of the
    indexer, it leaves the selection."""

    dtype = torch.bool

    def __init__(self, visible: Tensor, fixed_rotation: bool) -> None:
        self.visible, self.fixed_rotation = visible, fixed_rotation

    def is_floating_point(self) -> bool:
        return False

    def __and__(self, selection: Tensor) -> Tensor:
        return selection


class Qwen4ExpIndexer(PoolIndexer):
    """A pool's key is the mean of its tokens', normalised and rotated to the position of the first of them.
    The cache holds the tokens' keys."""

    rotation: Any  # transformers' function
    size = property(lambda self: self.compress_ratio)
    budget = property(lambda self: self.block_topk)
    head_dim = property(lambda self: self.index_head_dim)

    @torch.no_grad()
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Mask,
        past_key_values: Any = None,  # the cache's name before transformers 5.24
        cache: Any = None,
    ) -> Tensor:
        """Rows of the cache that each new token attends to, ``[B, S, n]`` int32, -1 for none.

        Args:
            position_embeddings: of all tokens so far.
        """
        cache = past_key_values if cache is None else cache
        batch, s_q, _ = hidden_states.shape
        qk = self.index_qk_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        new_q, held = qk[:, :, :-1], qk[:, :, -1]
        if cache is not None:
            held = cache.update_indexer(held, self.layer_idx)
        visible = Visible.of(attention_mask.visible, s_q, held.shape[1])
        first, stop = visible.first[:, 0], visible.stop
        if cache is None and not is_tracing(first):
            _check_packed((visible.first != first[:, None]).any())
        cos, sin = (x.expand(batch, -1, -1) for x in position_embeddings)
        new_cos, new_sin = cos[:, -s_q:], sin[:, -s_q:]
        rows = cos.shape[1]  # of a static cache, those that are in use
        if rows > held.shape[1]:
            raise ValueError(
                f"past_key_values: expected positions of the {held.shape[1]} tokens that it holds at most, "
                f"got {rows}; in transformers 5.20 crop() and reset() leave them as they are"
            )
        notes, order = {}, None
        if visible.rows is not None:  # the tokens alone, one after the other
            exists = visible.rows[:, :rows] >= 0
            order = exists.int().argsort(dim=1, descending=True, stable=True)
            held, cos, sin = (x.take_along_dim(order[..., None], 1) for x in (held, cos, sin))
            stop = exists.cumsum(1).int().gather(1, stop.long() - 1)
        elif attention_mask.fixed_rotation and not is_tracing(first):
            notes, known_first = notes_of(held), _first_rows(attention_mask.visible)
            if notes.get("first") != known_first:
                notes.clear()
                notes["first"] = known_first
        sequence = torch.arange(batch, device=held.device)[:, None]

        def pool(members: Tensor) -> tuple[Tensor, Tensor]:
            keys = self.k_layernorm(held[sequence[..., None], members].float().mean(2).to(held.dtype))
            at = sequence, members[..., 0]
            return self._rotated(keys[:, :, None], cos[at], sin[at])[:, :, 0], torch.ones_like(at[1]).bool()

        pools = notes["pools"] = self.extended(notes.get("pools"), rows, first, pool)
        count = (stop - first[:, None]).clamp_min(0)

        def select(t: slice) -> Tensor:
            def query() -> tuple[Tensor, Tensor]:
                q = self._rotated(self.q_layernorm(new_q[:, t]), new_cos[:, t], new_sin[:, t])
                dtype = torch.promote_types(q.dtype, torch.float32)
                return q, q.new_full(q.shape[:3], self.head_dim**-0.5, dtype=dtype)

            parts = self.rows_of_pools(pools, stop[:, t], query), self.rows_of_tail(first, count[:, t])
            selected = torch.cat(parts, -1)
            if order is None:
                return selected
            found = order.gather(1, selected.clamp_min(0).flatten(1).long()).view_as(selected)
            return torch.where(selected >= 0, found, -1).int()

        return self.selected(select, self.chunks(new_q, self.index_n_heads, pools), hidden_states)

    def _rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``x`` ``[B, n, heads, head_dim]``."""
        return self.rotation(x, cos=cos, sin=sin, unsqueeze_dim=2)


class Qwen4ExpAttention(SparseAttention):
    """Its forward combines the mask with what the indexer returns, for the attention function."""

    def forward(self, hidden_states: Tensor, position_embeddings: Any, attention_mask: Tensor, **kwargs):
        kind = self.config.rope_parameters["rope_type"]
        mask = Mask(attention_mask, fixed_rotation="dynamic" not in kind and kind != "longrope")
        return super().forward(hidden_states, position_embeddings, mask, **kwargs)

    def attend(self, query, key, value, mask, *, scaling, **known) -> Tensor:
        return attend_grouped(query, key, value, lambda t: mask[:, t], scaling)


_firsts = WeakTensorKeyDictionary()  # by mask, which all layers of a forward share: read from its device once


def _first_rows(mask: Tensor) -> list[int]:
    """The row of each sequence's first token, of what :func:`~.inputs.visible_rows` made."""
    if mask not in _firsts:
        _firsts[mask] = mask[:, 0, 0, 0].tolist()
    return _firsts[mask]


def _check_packed(packed: Tensor) -> None:
    if packed:
        raise ValueError(
            "position_ids: expected each to follow the one before it, got several sequences packed in a row; "
            "the linear-attention layers of this family do not keep them apart"
        )
