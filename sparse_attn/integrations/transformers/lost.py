"""What each layer of a model loses at how few tokens, so that they can be shared out among layers.

Where a layer's attention reads few tokens its output is off by ``d``. What the model predicts, behind that
token and all later ones, is then off by about ``(g d)^2 / 2`` nats. ``g`` is the gradient of the logarithm of
the probability of tokens that are drawn from the predictions themselves, so that this is their Fisher
information along ``d``. One pass forward and one backward give that of all layers.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .indexers import HiddenStates, Indexers
from .watched import Heads, between, watched

COUNTS = (32, 64, 128, 256, 512, 1024, 2048)  # tokens at which it is measured
QUERIES = 256  # of a text, at which it is measured
TOKENS = 4096  # that are read of a text at most: what they activate is kept for the gradients


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
        texts: ``[tokens]`` each.
    """
    indexers.counts = [*COUNTS]
    texts = [text[:TOKENS].to(model.device) for text in texts]
    with _frozen(model):
        shown = tqdm(texts, "what layers lose", disable=not progress)
        losses = [_lost(model, layers, indexers, text) for text in shown]
    for number in layers:
        lost = torch.stack([of[number] for of in losses]).mean(0)
        indexers.lost[number] = lost.cummin(0).values.tolist()  # by chance more tokens may seem to lose more


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Without gradients of weights."""
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in learning:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in learning:
            weight.requires_grad_(True)


@torch.enable_grad()
def _lost(
    model: PreTrainedModel, layers: dict[int, nn.Module], indexers: Indexers, text: Tensor
) -> dict[int, Tensor]:
    """By layer, ``[len(COUNTS)]`` fp32: the mean over some queries behind the first quarter."""
    t = torch.arange(len(text) // 4, len(text), max(1, len(text) * 3 // 4 // QUERIES), device=model.device)
    outs: dict[int, Tensor] = {}
    errors: dict[int, Tensor] = {}

    def watch(number: int, heads: Heads) -> Tensor:
        outs[number] = _dense(heads)
        errors[number] = _errors(indexers[number], heads, t)
        return outs[number]

    with watched(model, layers, watch):
        states = model.base_model(text[None], use_cache=False).last_hidden_state[0]
    gradients = torch.autograd.grad(states, [*outs.values()], _of_own_predictions(model, states.detach()))
    return {
        number: (errors[number] * g[t].flatten(1).float()).sum(-1).square().mean(1) / 2
        for number, g in zip(outs, gradients, strict=True)
    }


def _dense(heads: Heads) -> Tensor:
    """``[T, heads, d_v]``, with a gradient."""
    group = heads.query.shape[1]
    q = heads.query.flatten(0, 1)
    k, v = (x.repeat_interleave(group, 0) for x in (heads.key, heads.value))
    out = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=heads.scaling)
    out = out[0].transpose(0, 1)
    return out if out.requires_grad else out.requires_grad_()  # the first layer reads no weight that learns


@torch.no_grad()
def _errors(indexer: HiddenStates, heads: Heads, t: Tensor) -> Tensor:
    """``[len(COUNTS), n, heads * d_v]``: what the outputs of queries ``t`` ``[n]`` are off by."""
    tokens = len(heads.hidden_states)
    errors = []
    for part in t.split(64):
        scores = indexer.scores(heads.hidden_states.float(), heads.angles, part)
        scores.masked_fill_(~between(part, tokens), -torch.inf)
        scores[:, 0] = torch.inf
        scores[torch.arange(len(part)), part] = torch.inf
        rank = scores.argsort(dim=1, descending=True).argsort(dim=1)
        attention, value = heads.attention(part), heads.value[:, None].float()
        dense = attention @ value
        outs = []
        for count in COUNTS:
            kept = attention * (rank < count)
            outs.append((kept @ value) / kept.sum(-1, keepdim=True))
        error = torch.stack(outs) - dense  # [len(COUNTS), kv_heads, group, n, d_v]
        errors.append(error.flatten(1, 2).transpose(1, 2).flatten(2))
    return torch.cat(errors, 1)


def _of_own_predictions(model: PreTrainedModel, states: Tensor) -> Tensor:
    """The gradient of the last hidden states ``[T, hidden_size]``: of the log-probability of one drawn token
    behind each."""
    project: Any = model.get_output_embeddings()
    generator = torch.Generator(states.device).manual_seed(0)
    gradients = []
    for part in states.split(256):  # the logits of all would take a vocabulary per token
        part = part.requires_grad_()
        logs = project(part).float().log_softmax(-1)
        drawn = torch.multinomial(logs.detach().exp(), 1, generator=generator)
        gradients += torch.autograd.grad(logs.gather(1, drawn).sum(), part)
    return torch.cat(gradients)
