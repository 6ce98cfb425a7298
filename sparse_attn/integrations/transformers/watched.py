"""A model with dense attention, watched while it reads: what its attention layers compute with."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .inputs import NAME

WATCHED = f"{NAME}_watched"  # its name in transformers' registries


class Heads(NamedTuple):
    """What an attention layer has read of one text, and what it computes with."""

    hidden_states: Tensor  # [T, hidden_size]
    angles: tuple[Tensor, Tensor]  # cos and sin, [T, d]
    query: Tensor  # [kv_heads, group, T, d]
    key: Tensor  # [kv_heads, T, d]
    value: Tensor  # [kv_heads, T, d_v]
    scaling: float

    def attention(self, t: Tensor) -> Tensor:
        """``[kv_heads, group, n, T]`` fp32: what queries at positions ``t`` ``[n]`` pay to every token."""
        scores = (self.query[:, :, t] @ self.key[:, None].transpose(-1, -2)).float() * self.scaling
        future = torch.arange(scores.shape[-1], device=t.device) > t[:, None]
        return scores.masked_fill_(future, -torch.inf).softmax(-1)


@contextlib.contextmanager
def watched(
    model: PreTrainedModel,
    layers: dict[int, nn.Module],
    watch: Callable[[int, Heads], Tensor | None],
) -> Iterator[None]:
    """Call ``watch`` at the attention of each layer, while the model reads one text without a cache.

    What it returns, ``[T, heads, d_v]``, is what the layer's attention gives, unless that is None.
    """
    before: Any = model.config.get_text_config()._attn_implementation
    given: dict[nn.Module, dict[str, Any]] = {}

    def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
        given[module] = {"hidden_states": args[0] if args else kwargs["hidden_states"], **kwargs}

    def attend(number: int, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float):
        held = given.pop(module)
        cos, sin = (x[0].float() for x in held["position_embeddings"])
        grouped = query[0].unflatten(0, (key.shape[1], -1))
        return watch(number, Heads(held["hidden_states"][0], (cos, sin), grouped, key[0], value[0], scaling))

    handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in layers.values()]
    for number, module in layers.items():
        module._watched_by = (attend, number)  # pyright: ignore[reportArgumentType]
    model.set_attn_implementation(WATCHED)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        for handle, module in zip(handles, layers.values(), strict=True):
            handle.remove()
            del module._watched_by


def _watched_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options
):
    if hasattr(module, "_watched_by"):
        attend, number = module._watched_by
        scaling = options.get("scaling") or query.shape[-1] ** -0.5
        instead = attend(number, module, query, key, value, scaling)
        if instead is not None:
            return instead[None], None
    return sdpa_attention_forward(module, query, key, value, mask, **options)


AttentionInterface.register(WATCHED, _watched_attention)
AttentionMaskInterface.register(WATCHED, sdpa_mask)


def between(t: Tensor, tokens: int) -> Tensor:
    """``[n, tokens]``: whether a token lies between the first one and a query's own, at ``t`` ``[n]``."""
    s = torch.arange(tokens, device=t.device)
    return (s > 0) & (s < t[:, None])
