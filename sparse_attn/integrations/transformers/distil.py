"""Indexers distilled from the dense attention of a model: DeepSeek's warm-up.

The model reads some texts with dense attention. Each layer's indexer then learns to score a token by the
attention that it gets, the mean over the query heads. The loss is :func:`~.gradients.divergence` over the
tokens between a sequence's first one and the query's own, which are always selected. A query weighs as much
as the attention that it pays to them. Layers are independent of each other.

Source: DeepSeek-V3.2 report, section 2.1, dense warm-up; there all queries weigh the same.
"""

import contextlib
import hashlib
import json
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .attach import full_layers
from .gradients import divergence
from .indexers import HiddenStates, Indexers
from .lost import measure_lost
from .watched import Heads, between, watched

LAST = 64  # tokens at the end of a text that are always among its queries: there a text asks
ATTEMPTS = 3  # at a layer whose loss stays flat
AT_A_TIME = 64  # queries of a step of the optimiser


def distill(
    model: PreTrainedModel,
    texts: Sequence[Tensor],
    *,
    index_n_heads: int = 4,
    index_head_dim: int = 64,
    index_rope_dim: int | None = None,
    steps: int = 400,
    queries: int = 256,
    learning_rate: float = 5e-2,
    folder: Path | str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Indexers:
    """Train an indexer for each layer of a model that reads all tokens, from its dense attention.

    Texts should be as long as those that the indexers will serve, and contain what they will be asked for:
    an indexer that never saw a question about something far away does not find it. The last tenth of the
    texts (at least one) is not trained on: there it is measured what each layer loses at how few tokens, from
    which :func:`attach` gives each layer its share. That keeps what 4,096 tokens activate, for a backward.

    Args:
        model: on any device; its weights stay as they are.
        texts: token ids, ``[tokens]`` each; two at least.
        index_n_heads: index heads of a layer.
        index_head_dim: dimensions of an index head.
        index_rope_dim: of those, how many are rotated; by default half of them, at most the model's own.
        steps: of the optimiser for each layer.
        queries: of a text, for which the attention is stored.
        learning_rate: of AdamW at its highest, relative to the weights at the start.
        folder: where the attention and finished layers are stored, so that a run that was stopped goes on;
            by default a temporary one. It takes ``2 * tokens * (hidden_size + queries)`` bytes per text and
            layer.
        seed: of the weights and the choice of queries.
        progress: show bars.

    Returns:
        The indexers, in fp32 on the model's device, for :func:`attach` and :func:`save_indexer`.
    """
    layers = full_layers(model)
    hidden_size = model.config.get_text_config().hidden_size
    _check(texts, index_n_heads, index_head_dim, index_rope_dim, steps, queries)
    held_out = max(1, len(texts) // 10)
    with contextlib.ExitStack() as stack:
        place = Path(folder or stack.enter_context(tempfile.TemporaryDirectory()))
        place.mkdir(parents=True, exist_ok=True)
        files = [place / f"text-{number}.safetensors" for number in range(len(texts) - held_out)]
        embeddings: Any = model.get_input_embeddings()
        weights = embeddings.weight[:64].double().sum().item()
        digests = [_digest(weights, text.tolist(), queries, seed) for text in texts]
        for number, file in enumerate(tqdm(files, "dense attention", disable=not progress)):
            if not _finished(file, digests[number]):
                stored = _read(model, layers, texts[number], queries, seed + number)
                _save(stored, file, digests[number])
        with safe_open(files[0], "pt") as first:
            model_dim = first.get_slice("cos").get_shape()[-1]
        rope_dim = index_rope_dim or min(index_head_dim // 2, model_dim)
        size = {"n_heads": index_n_heads, "head_dim": index_head_dim, "rope_dim": rope_dim}
        indexers = Indexers(hidden_size, {number: dict(size) for number in layers}).to(model.device)
        run = _digest(size, steps, learning_rate, digests)
        for number in tqdm(layers, "layers", disable=not progress):
            file = place / f"layer-{number}.safetensors"
            if _finished(file, run):
                indexers[number].load_state_dict(load_file(file))
            else:
                examples = [_Example.of(text, number, model.device) for text in files]
                _train(indexers[number], number, examples, steps, learning_rate, seed)
                _save(indexers[number].state_dict(), file, run)
    measure_lost(model, layers, indexers, texts[-held_out:], progress)
    return indexers.eval()


def _digest(*made_from: Any) -> str:
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()


def _finished(file: Path, digest: str) -> bool:
    """Whether there is a file, and then of this run."""
    if not file.exists():
        return False
    with safe_open(file, "pt") as held:
        if held.metadata()["made_from"] != digest:
            raise ValueError(f"folder: expected one of the same arguments, got {file} of others")
    return True


def _save(tensors: dict[str, Tensor], file: Path, digest: str) -> None:
    """As a whole or not at all."""
    part = file.with_suffix(".part")
    made = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    save_file(made, part, {"made_from": digest})
    part.rename(file)


def _check(
    texts: Sequence[Tensor], heads: int, head_dim: int, rope_dim: int | None, steps: int, queries: int
) -> None:
    if len(texts) < 2:
        raise ValueError(f"texts: expected two at least, got {len(texts)}")
    for number, text in enumerate(texts):
        if not isinstance(text, Tensor) or text.dim() != 1 or text.dtype != torch.long:
            got = f"{list(text.shape)} {text.dtype}" if isinstance(text, Tensor) else type(text).__name__
            raise ValueError(f"texts[{number}]: expected token ids [tokens] int64, got {got}")
        if len(text) <= LAST:
            raise ValueError(f"texts[{number}]: expected more than {LAST} tokens, got {len(text)}")
    for name, value in (("index_n_heads", heads), ("steps", steps), ("queries", queries)):
        if value < 1:
            raise ValueError(f"{name}: expected 1 at least, got {value}")
    if head_dim < 4 or head_dim % 4:
        raise ValueError(f"index_head_dim: expected a multiple of 4, got {head_dim}")
    if rope_dim is not None and (rope_dim < 2 or rope_dim % 2 or rope_dim > head_dim):
        raise ValueError(
            f"index_rope_dim: expected an even number up to index_head_dim={head_dim}, got {rope_dim}"
        )


# The dense attention


@torch.no_grad()
def _read(
    model: PreTrainedModel, layers: dict[int, nn.Module], text: Tensor, queries: int, seed: int
) -> dict[str, Tensor]:
    """The hidden states of every layer and what some queries attend to."""
    t = _some_queries(len(text), queries, seed).to(model.device)
    stored: dict[str, Tensor] = {"queries": t}

    def watch(number: int, heads: Heads) -> None:
        parts = [heads.attention(part).mean((0, 1)) for part in t.split(64)]
        stored[f"attention.{number}"] = torch.cat(parts).half()
        stored[f"hidden_states.{number}"] = heads.hidden_states.bfloat16()
        stored["cos"], stored["sin"] = heads.angles  # the same in every layer

    with watched(model, layers, watch):
        model.base_model(text[None].to(model.device), use_cache=False)
    return stored


def _some_queries(tokens: int, queries: int, seed: int) -> Tensor:
    """Positions, ascending: the last ones, and others drawn from where there is something to select."""
    generator = torch.Generator().manual_seed(seed)
    last = torch.arange(tokens - LAST, tokens)
    drawn = torch.randperm(tokens - LAST - 2, generator=generator)[: max(0, queries - LAST)] + 2
    return torch.cat([drawn.sort().values, last[-queries:]])


# Training


class _Example(NamedTuple):
    """A text for one layer."""

    hidden_states: Tensor  # [T, hidden_size] bf16
    angles: tuple[Tensor, Tensor]
    queries: Tensor  # [n] int64
    attention: Tensor  # [n, T] fp16

    @classmethod
    def of(cls, file: Path, layer: int, device: torch.device) -> "_Example":
        with safe_open(file, "pt", str(device)) as held:
            names = f"hidden_states.{layer}", "cos", "sin", "queries", f"attention.{layer}"
            hidden_states, cos, sin, queries, attention = (held.get_tensor(name) for name in names)
        return cls(hidden_states, (cos, sin), queries, attention)


def _train(
    indexer: HiddenStates, number: int, examples: list[_Example], steps: int, rate: float, seed: int
) -> None:
    """With hidden states scaled to a mean square of 1, so that one rate suits all layers."""
    some = torch.cat([x.hidden_states[::64] for x in examples]).float()
    rms = some.square().mean().sqrt()
    scaled = [x._replace(hidden_states=x.hidden_states / rms) for x in examples]
    for attempt in range(ATTEMPTS):
        generator = torch.Generator().manual_seed(seed + attempt)
        _initialise(indexer, some.mean(0) / rms, generator)
        losses = _optimise(indexer, scaled, steps, rate / 2**attempt, generator)
        quarter = max(1, len(losses) // 4)
        if sum(losses[-quarter:]) < 0.98 * sum(losses[:quarter]) or len(losses) < 8:
            break  # it learned; a layer whose relus all died has a flat loss
    else:
        warnings.warn(f"layer {number} did not learn in {ATTEMPTS} attempts", stacklevel=3)
    with torch.no_grad():
        for linear in (indexer.wq_b, indexer.wk, indexer.weights_proj):
            linear.weight /= rms


@torch.no_grad()
def _initialise(indexer: HiddenStates, mean: Tensor, generator: torch.Generator) -> None:
    """Weights for which q, k and the heads' weights are about 1, for hidden states with such a mean."""
    for linear in (indexer.wq_b, indexer.wk):
        random = torch.randn(linear.weight.shape, generator=generator).to(mean.device)
        linear.weight.copy_(random / len(mean) ** 0.5)
    indexer.weights_proj.weight.copy_((mean / mean.square().sum()).expand(indexer.n_heads, -1))


def _optimise(
    indexer: HiddenStates, examples: list[_Example], steps: int, rate: float, generator: torch.Generator
) -> list[float]:
    """The loss at each step; the rate rises for a tenth of them and falls to nothing."""
    rate = rate / indexer.wk.in_features**0.5
    optimiser = torch.optim.AdamW(indexer.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.0)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )
    losses, order = [], []
    for _ in range(steps):
        order = order or torch.randperm(len(examples), generator=generator).tolist()[::-1]
        example = examples[order.pop()]
        some = torch.randperm(len(example.queries), generator=generator)[:AT_A_TIME]
        with torch.enable_grad():
            loss = _loss(indexer, example, some.to(example.queries.device))
            optimiser.zero_grad()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(indexer.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def _loss(indexer: HiddenStates, example: _Example, some: Tensor) -> Tensor:
    t = example.queries[some]
    scores = indexer.scores(example.hidden_states.float(), example.angles, t)
    return divergence(example.attention[some].float(), scores, between(t, scores.shape[1])).mean()
