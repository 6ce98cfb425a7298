"""What transformers hands to an attention layer: masks, modes, memory; and what of it is refused."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import causal_mask_function
from transformers.utils.import_utils import is_tracing

from ...ops import NAMESPACE

NAME = NAMESPACE  # of the attention and mask functions in transformers' registries, which copies share
QUERY_BYTES = 64 << 20  # of queries at a time
# What the layers of a family may be given beside the arguments that their own forward names.
ACCEPTED = {
    *("cache", "past_key_values", "use_cache", "position_ids", "position_embeddings"),
    *("num_items_in_batch", "output_hidden_states", "output_router_logits"),
}
REASONS = {
    "output_attentions": "there is no [S, T] matrix to return",
    "cu_seq_lens": "sequences that are packed in a row are found from position_ids",
}
NEUTRAL = {"output_attentions": False, "is_causal": True}  # the value that means what is done anyway


def visible_rows(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs,
) -> Tensor:
    """The mask function that transformers calls once per forward, in place of one that builds ``[S, T]``.

    Args:
        attention_mask: ``[B, tokens]`` bool, False where a token is padding; tokens behind its end are
            padding, as in transformers' own mask functions.
        kv_offset: the token in the first row of a cache that keeps a window.

    Returns:
        A tensor for :meth:`Visible.of`, of four dimensions because transformers leaves such masks alone.
        ``[B, 1, S, 2]`` int32, the first row that each token may read and the row behind the last one. If
        padding is not all on the left, ``[B, 1, 1, 1 + T]`` int64: the row of the first new token, then
        the number of each row of the cache, -1 for padding.
    """
    last = torch.arange(q_length, device=device) + (q_offset - kv_offset)
    last = last.expand(batch_size, -1)
    first = torch.zeros_like(last)
    sequences = _packed_sequences(mask_function)
    if sequences is not None:
        first = torch.searchsorted(sequences, sequences)
    if attention_mask is not None:
        mask = attention_mask[:, kv_offset : kv_offset + kv_length]
        if is_tracing(mask) or not _is_left_padding(mask, q_offset + q_length - kv_offset):
            exists = F.pad(mask, (0, kv_length - mask.shape[1]))
            rows = torch.where(exists, torch.arange(kv_length, device=device), -1)
            return torch.cat([last[:, :1], rows], 1)[:, None, None]
        first = first + (~mask).sum(1, keepdim=True)
    return torch.stack([first, last + 1], -1)[:, None].int()


def _is_left_padding(mask: Tensor, tokens: int | Tensor) -> bool:
    return bool(mask.shape[1] == tokens) and bool((mask[:, 1:] >= mask[:, :-1]).all())


def _packed_sequences(mask_function: Callable) -> Tensor | None:
    """The number of each token's sequence, ``[B, S]``, if several are packed in a row.

    Raises:
        ValueError: another attention than a causal one, with or without a window.
    """
    if mask_function is causal_mask_function:
        return None
    if is_tracing(torch.empty(0)):  # transformers then calls every row packed that has no mask and no cache
        raise ValueError("attention_mask: expected one when compiling without a cache, got None")
    made_by = mask_function.__qualname__.partition(".")[0]
    if made_by == "sliding_window_overlay":
        return None
    held = inspect.getclosurevars(mask_function).nonlocals
    if made_by == "packed_sequence_mask_function":
        return held["packed_sequence_mask"]
    if made_by == "remap_positions_for_packed_sequence":
        return _packed_sequences(held["mask_function"])
    if made_by == "and_masks":
        found = [_packed_sequences(part) for part in held["mask_functions"]]
        return next((sequences for sequences in found if sequences is not None), None)
    raise ValueError(
        "attention_mask: expected causal attention, with or without a window, got "
        f"{mask_function.__qualname__}"
    )


class Visible(NamedTuple):
    """The rows that each of S new tokens may read: from ``first`` to before ``stop``, those that exist."""

    first: Tensor  # [B, S] int32
    stop: Tensor  # [B, S] int32
    rows: Tensor | None  # [B, T] int32, a row's number or -1 for padding; None if all padding is below first

    @classmethod
    def of(cls, mask: Tensor, s_q: int, rows: int, window: int | None = None) -> "Visible":
        """From what :func:`visible_rows` made, for a cache of ``rows`` rows; with or without its dimension of
        heads. ``window``: of the layer, counted in tokens."""
        ours = isinstance(mask, Tensor) and mask.dtype in (torch.int32, torch.int64) and mask.dim() in (3, 4)
        if not ours:
            got = "none for a layer" if mask is None else f"a 4-D mask of {mask.dtype}"
            raise ValueError(f"attention_mask: expected one of shape [batch, tokens], or none, got {got}")
        mask = mask.flatten(0, -3)
        if mask.dtype == torch.int32:
            first, stop, numbers = mask[..., 0], mask[..., 1], None
        else:
            start, numbers = mask[:, 0, :1].int(), mask[:, 0, 1:].int()
            stop = start + torch.arange(1, s_q + 1, dtype=torch.int32, device=mask.device)
            first = torch.zeros_like(stop)
            if numbers.shape[1] != rows:
                batch, tokens = numbers.shape
                raise ValueError(f"attention_mask: expected shape {[batch, rows]}, got {[batch, tokens]}")
        if window is not None:
            first = torch.maximum(first, stop - window)
        if mask.shape[0] * rows >= 2**31:
            raise ValueError(f"cache: expected B * T below 2**31, got {mask.shape[0]} * {rows}")
        return cls(first, stop, numbers)

    def part(self, t: slice) -> "Visible":
        """Of some of the new tokens."""
        return Visible(self.first[:, t], self.stop[:, t], self.rows)

    def numbers(self, rows: int) -> Tensor:
        """``[B, T]`` int32: the number of each of ``rows`` rows, -1 for padding that is not below first."""
        if self.rows is not None:
            return self.rows
        return torch.arange(rows, dtype=torch.int32, device=self.stop.device).expand(len(self.stop), -1)

    def table(self, rows: int) -> Tensor:
        """``[B, S, T]`` int32: each row of the cache, or -1 where a token may not read it."""
        row = self.numbers(rows)[:, None]
        return torch.where((row >= self.first[..., None]) & (row < self.stop[..., None]), row, -1)


def check(layer: Any, hidden_states: Tensor, kwargs: dict) -> None:
    """Raise ValueError for a mode or TypeError for an argument with which a layer's result would be wrong."""
    name = type(layer).__name__
    has_backward = getattr(layer, "adapting", None) is not None
    if layer.training and not has_backward:
        raise ValueError(
            f"model: expected evaluation mode, got training mode in {name}: sparse_attn is for inference "
            "and has no backward (so no gradient checkpointing); call model.eval(), or disable(model) "
            "to train"
        )
    if torch.is_grad_enabled() and hidden_states.requires_grad and not has_backward:
        raise ValueError(
            "gradients: sparse_attn is for inference and has no backward, but the hidden states require "
            "grad; call the model under torch.no_grad() or torch.inference_mode()"
        )
    if layer.config._attn_implementation != NAME:
        raise ValueError(
            f"attn_implementation: expected {NAME!r} until disable(model), got "
            f"{layer.config._attn_implementation!r}"
        )
    for key, value in kwargs.items():
        if key not in layer.accepted and value is not None and value != NEUTRAL.get(key):
            why = next((f"; {why}" for start, why in REASONS.items() if key.startswith(start)), "")
            raise TypeError(f"{key}: {name} does not know this argument, got {value!r:.60}{why}")


def query_chunks(s_q: int, bytes_per_token: int) -> Iterator[slice]:
    """Slices of a prompt's tokens whose queries take QUERY_BYTES together, or of one token."""
    step = max(1, QUERY_BYTES // bytes_per_token)
    return (slice(t, min(t + step, s_q)) for t in range(0, s_q, step))


def slots_of(rows: Tensor, rows_per_sequence: int) -> Tensor:
    """Rows of each sequence ``[B, s_q, n]``, negative for none, as ``[B * s_q, n]`` slots ``b * T + row``."""
    batch = rows.shape[0]
    if batch > 1:
        first = rows_per_sequence * torch.arange(batch, dtype=torch.int32, device=rows.device)
        rows = torch.where(rows >= 0, rows + first[:, None, None], -1)
    return rows.flatten(0, 1)
