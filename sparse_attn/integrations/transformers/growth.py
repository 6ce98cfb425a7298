"""Dynamic caches that grow in place: transformers' own layers copy all their rows at every token.

The tensors that a layer of the cache holds have the usual shapes, but are views of larger buffers: the next
rows are written behind them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.cache_utils import Cache, DynamicLayer
from transformers.utils.import_utils import is_tracing

SPARE = 8  # a new buffer is larger than needed by one row in so many


class _Room:
    """A buffer, and how many of its rows are in use: a view that ends earlier must not write into it."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer, self.filled = buffer, 0
        self.notes: dict[str, Any] = {}

    def takes(self, start: int, stop: int) -> bool:
        frozen = self.buffer.is_inference() and not torch.is_inference_mode_enabled()
        return start == self.filled and stop <= self.buffer.shape[-2] and not frozen


_rooms = WeakTensorKeyDictionary()  # by view; a view that was cropped, reordered or copied has none


class Growing:
    """A cache as an attention layer sees it, whose dynamic layers grow in place."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        layer = self._plain(layer_idx)
        if layer is not None and same_kind(layer.keys, keys) and same_kind(layer.values, values):
            layer.keys, layer.values = append(layer.keys, keys), append(layer.values, values)
            return layer.keys, layer.values
        return self.cache.update(keys, values, layer_idx, *args, **kwargs)

    def update_indexer(self, keys: Tensor, layer_idx: int) -> Tensor:
        layer = self._plain(layer_idx)
        if layer is not None and same_kind(layer.indexer_keys, keys):
            layer.indexer_keys = append(layer.indexer_keys, keys)
            return layer.indexer_keys
        return self.cache.update_indexer(keys, layer_idx)

    def _plain(self, layer_idx: int) -> Any:
        """The cache's layer if it only ever appends what it is given, and holds something."""
        layer: Any = next(iter(self.cache.layers[layer_idx:]), None)
        appends = layer is not None and type(layer).update is DynamicLayer.update
        return layer if appends and not self.cache.offloading else None


def growing(cache: Cache | None) -> Any:
    """The cache with layers that grow in place; while compiling, the cache itself."""
    return cache if cache is None or is_tracing(torch.empty(0)) else Growing(cache)


def update_index(cache: Any, keys: Tensor, layer_idx: int) -> Tensor:
    """Store index keys ``[B, 1, S, d]`` in a layer of the cache that takes them itself (MiniMax-M3); all of
    them so far, ``[B, 1, T, d]``."""
    layer = cache.layers[layer_idx]
    if not hasattr(layer, "update_index"):
        raise ValueError(
            "past_key_values: expected transformers.DynamicCache(config=model.config), whose layer "
            f"{layer_idx} holds index keys, got {type(layer).__name__}"
        )
    plain = cache._plain(layer_idx) if isinstance(cache, Growing) else None
    if plain is not None and same_kind(plain.idx_keys, keys):
        plain.idx_keys = append(plain.idx_keys, keys)
        return plain.idx_keys
    return layer.update_index(keys)


def append(held: Tensor, new: Tensor) -> Tensor:
    """``torch.cat([held, new], -2)``; ``held`` is copied only if its buffer is full."""
    start, stop = held.shape[-2], held.shape[-2] + new.shape[-2]
    room = _rooms.get(held)
    if room is None or not room.takes(start, stop):
        notes = notes_of(held)
        room = _Room(held.new_empty(*held.shape[:-2], stop + stop // SPARE + 1, held.shape[-1]))
        room.buffer[..., :start, :] = held
        room.notes.update(notes)
        notes.clear()  # one owner, who may change them in place
    room.buffer[..., start:stop, :] = new
    room.filled = stop
    rows = room.buffer[..., :stop, :]
    _rooms[rows] = room
    return rows


def notes_of(rows: Tensor) -> dict[str, Any]:
    """What was derived from rows of a cache, for whoever derives it to keep: it goes with them as they grow,
    and not into a part, a copy or another order of them. Rows that do not grow start with none each time."""
    room = None if is_tracing(rows) else _rooms.get(rows)
    return room.notes if room is not None and room.filled == rows.shape[-2] else {}


def same_kind(held: Tensor | None, new: Tensor) -> bool:
    """Whether rows may lie in one tensor with those that are held, if any are."""
    if held is None or held.dim() != new.dim():
        return False
    kinds = [(rows.shape[:-2], rows.shape[-1], rows.dtype, rows.device) for rows in (held, new)]
    return kinds[0] == kinds[1]
