"""What transformers hands to an attention layer: masks, modes, memory; and what of it is refused."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import causal_mask_function
from transformers.utils.import_utils import is_tracing

NAME = "sparse_attn"  # of the attention and mask functions in transformers' registries
QUERY_BYTES = 64 << 20  # of queries at a time


def padding_of(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **kwargs,
) -> Tensor | None:
    """The mask function that transformers calls once per forward, in place of one that builds ``[S, T]``.

    Args:
        attention_mask: ``[B, tokens]`` bool, False where a token is padding; tokens behind its end are
            padding, as in transformers' own mask functions.
        local_size: the window of a model with sliding windows, which keeps ``kv_length`` rows from the
            token ``kv_offset`` on.

    Returns:
        None without padding. With a window ``[B, kv_length]`` bool, the rows that may be read. Else
        ``[B]`` int32, the first row that may be read, when all padding is on the left; otherwise
        ``[B, kv_length]`` int32, the slot of each row that may be read and -1 for padding. Causality and
        the window are not in it: the layers take them from the cache's positions.
    """
    if local_size is None and mask_function is not causal_mask_function:
        raise ValueError(
            f"attention_mask: expected plain causal attention, got another mask function; {PACKED}"
        )
    if attention_mask is None:
        return None
    mask = attention_mask[:, kv_offset : kv_offset + kv_length]
    if local_size is not None:
        mask = F.pad(mask, (0, kv_length - mask.shape[1]))
        return None if mask.all() else mask
    if not is_tracing(mask) and mask.shape[1] == q_offset + q_length and (mask[:, 1:] >= mask[:, :-1]).all():
        first = (~mask).sum(1, dtype=torch.int32)
        return first if first.any() else None
    slots = torch.arange(batch_size * kv_length, dtype=torch.int32, device=device).view(batch_size, kv_length)
    return torch.where(F.pad(mask, (0, kv_length - mask.shape[1])), slots, -1)


PACKED = (
    "several sequences packed in a row (position_ids that restart) are not supported: pass one per row, with "
    "padding, and when compiling without a cache an attention_mask"
)


def check(layer: Any, hidden_states: Tensor, padding: Tensor | None, kwargs: dict) -> None:
    """Raise ValueError for a mode or an argument with which an attention layer's result would be wrong."""
    name = type(layer).__name__
    if layer.training:
        raise ValueError(
            f"model: expected evaluation mode, got training mode in {name}: sparse_attn is for inference "
            "and has no backward (so no gradient checkpointing); call model.eval(), or disable(model) "
            "to train"
        )
    if torch.is_grad_enabled() and hidden_states.requires_grad:
        raise ValueError(
            "gradients: sparse_attn is for inference and has no backward, but the hidden states require "
            "grad; call the model under torch.no_grad() or torch.inference_mode()"
        )
    if layer.config._attn_implementation != NAME or (padding is not None and padding.dim() > 2):
        got = "none" if padding is None else list(padding.shape)
        raise ValueError(
            f"attention_mask: expected one of shape [batch, tokens], or none, got {got} under "
            f"attn_implementation {layer.config._attn_implementation!r}; 4-D masks are not supported, and "
            f"the implementation is {NAME!r} until disable(model)"
        )
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions: expected False, got True; there is no [S, T] matrix to return")


def check_rows(padding: Tensor | None, batch: int, rows: int, *shapes: tuple[int, ...]) -> None:
    """Raise ValueError unless slots fit int32 and ``padding`` is None, ``[B, T]`` or of ``shapes``."""
    if batch * rows >= 2**31:
        raise ValueError(f"past_key_values: expected B * T below 2**31, got {batch} * {rows}")
    if padding is not None and tuple(padding.shape) not in ((batch, rows), *shapes):
        raise ValueError(f"attention_mask: expected shape {[batch, rows]}, got {list(padding.shape)}")


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
