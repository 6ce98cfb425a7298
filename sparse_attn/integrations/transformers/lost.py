"""What each layer of a model loses at how few tokens, so that they can be shared out among layers.

How a layer's loss falls with the tokens follows from the squared error of its attention's output; how much it
is, from the model's predictions when this layer alone is sparse.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .grouped import attend_grouped
from .indexers import Indexers
from .inputs import visible_rows
from .watched import Heads, between, watched

COUNTS = (32, 64, 128, 256, 512, 1024, 2048)  # tokens at which the error is measured
WEIGHED_AT = 128  # the one of them at which layers are sparse alone,
TOKENS = 2048  # while the model reads at most so many
EVERY = 4  # positions of which one is predicted


@torch.no_grad()
def measure_lost(
    model: PreTrainedModel,
    layers: dict[int, nn.Module],
    indexers: Indexers,
    texts: Sequence[Tensor],
    progress: bool = True,
) -> None:
    """Fill ``counts`` and ``lost`` of the indexers: nats per token at each of COUNTS, if layers add up.

    Args:
        layers: by their numbers.
        texts: ``[tokens]`` each. The last one weighs the layers.
    """
    errors = [_errors(model, layers, indexers, text) for text in texts]
    text = texts[-1][:TOKENS].to(model.device)
    dense = _predictions(model, text)
    indexers.counts = [*COUNTS]
    for number in tqdm(layers, "what each layer loses", disable=not progress):
        with watched(model, {number: layers[number]}, _sparse(indexers)):
            sparse = _predictions(model, text)
        nats = (dense.exp() * (dense - sparse)).sum(-1).mean().clamp_min(0)
        error = torch.stack([of[number] for of in errors]).mean(0)
        at = error[COUNTS.index(WEIGHED_AT)]
        indexers.lost[number] = (error * (nats / at if at > 0 else 0)).tolist()


def _sparse(indexers: Indexers):
    def watch(number: int, heads: Heads) -> Tensor:
        indexer = indexers[number]
        indexer.index_topk = WEIGHED_AT
        tokens = len(heads.hidden_states)
        mask = visible_rows(1, tokens, tokens, device=heads.hidden_states.device)
        states, angles = heads.hidden_states[None].float(), (heads.angles[0][None], heads.angles[1][None])
        indices = indexer(states, states, angles, mask)
        q, k, v = heads.query.flatten(0, 1)[None], heads.key[None], heads.value[None]
        return attend_grouped(q, k, v, lambda t: indices[:, t], heads.scaling)[0]

    return watch


def _predictions(model: PreTrainedModel, text: Tensor) -> Tensor:
    """``[n, vocabulary]`` fp32 logarithms, at some positions behind the first quarter."""
    at = torch.arange(len(text) // 4, len(text), EVERY, device=model.device)
    states = model.base_model(text[None], use_cache=False).last_hidden_state[0, at]
    project: Any = model.get_output_embeddings()
    return project(states).float().log_softmax(-1)


def _errors(
    model: PreTrainedModel, layers: dict[int, nn.Module], indexers: Indexers, text: Tensor
) -> dict[int, Tensor]:
    """By layer, ``[len(COUNTS)]``: the mean over some queries behind the first quarter."""
    t = torch.arange(len(text) // 4, len(text), max(1, len(text) // 256), device=model.device)
    lost: dict[int, Tensor] = {}

    def watch(number: int, heads: Heads) -> None:
        scores = indexers[number].scores(heads.hidden_states.float(), heads.angles, t)
        scores.masked_fill_(~between(t, len(text)), -torch.inf)
        scores[:, 0] = torch.inf
        scores[torch.arange(len(t)), t] = torch.inf
        rank = scores.argsort(dim=1, descending=True).argsort(dim=1)
        attention = heads.attention(t)
        project = _output_projection(layers[number])
        outs = []
        for count in (len(text), *COUNTS):
            kept = attention * (rank < count)
            out = (kept / kept.sum(-1, keepdim=True)).to(heads.value.dtype) @ heads.value[:, None]
            outs.append(project(out.flatten(0, 1).transpose(0, 1).flatten(1)).float())
        lost[number] = torch.stack([(out - outs[0]).square().sum(-1).mean() for out in outs[1:]])

    with watched(model, layers, watch):
        model.base_model(text[None].to(model.device), use_cache=False)
    return lost


def _output_projection(layer: nn.Module) -> nn.Linear:
    """The last linear layer of an attention module but for its indexer: models name it differently."""
    return [module for name, module in layer.named_children() if isinstance(module, nn.Linear)][-1]
