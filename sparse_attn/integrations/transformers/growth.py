"""Dynamic caches that grow in place: transformers' own layers copy all their rows at every token.

The tensors that a layer of the cache holds have the usual shapes, but are views of larger buffers: the next
rows are written behind them.
"""

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.cache_utils import DynamicIndexedLayer
from transformers.utils.import_utils import is_tracing

SPARE = 8  # a new buffer is larger than needed by one row in so many


class _Room:
    """A buffer, and how many of its rows are in use: a view that ends earlier must not write into it."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer, self.filled = buffer, 0

    def takes(self, start: int, stop: int) -> bool:
        frozen = self.buffer.is_inference() and not torch.is_inference_mode_enabled()
        return start == self.filled and stop <= self.buffer.shape[-2] and not frozen


_rooms = WeakTensorKeyDictionary()  # by view; a view that was cropped, reordered or copied has none


def update(
    cache, layer_idx: int, latent: Tensor, k_rope: Tensor, index_k: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``cache.update`` and ``cache.update_indexer``: new rows in, all rows out.

    Args:
        latent, k_rope: ``[B, 1, S, d]``.
        index_k: ``[B, S, index_head_dim]``, or None for a layer without an indexer.
    """
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    new = {"keys": latent, "values": k_rope, "indexer_keys": index_k}
    if type(layer) is DynamicIndexedLayer and not cache.offloading and not is_tracing(latent):
        held = {name: getattr(layer, name) for name, rows in new.items() if rows is not None}
        if all(rows is not None and _kind(rows) == _kind(new[name]) for name, rows in held.items()):
            grown = {name: _append(rows, new[name]) for name, rows in held.items()}
            for name, rows in grown.items():
                setattr(layer, name, rows)
            return grown["keys"], grown["values"], grown.get("indexer_keys")
    latent, k_rope = cache.update(latent, k_rope, layer_idx)
    if index_k is not None:
        index_k = cache.update_indexer(index_k, layer_idx)
    return latent, k_rope, index_k


def _kind(rows: Tensor) -> tuple:
    """What rows must have in common to lie in one tensor."""
    return rows.shape[:-2], rows.shape[-1], rows.dtype, rows.device


def _append(held: Tensor, new: Tensor) -> Tensor:
    """``torch.cat([held, new], -2)``; ``held`` is copied only if its buffer is full."""
    start, stop = held.shape[-2], held.shape[-2] + new.shape[-2]
    room = _rooms.get(held)
    if room is None or not room.takes(start, stop):
        room = _Room(held.new_empty(*held.shape[:-2], stop + stop // SPARE + 1, held.shape[-1]))
        room.buffer[..., :start, :] = held
    room.buffer[..., start:stop, :] = new
    room.filled = stop
    rows = room.buffer[..., :stop, :]
    _rooms[rows] = room
    return rows
