"""The selections of a model's indexers: recorded as they are made, or replayed in their place."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Selections:
    """What each indexer of a model selected for each token, in the order in which the model read the tokens.

    ``selections[layer_idx]`` is ``[B, tokens, k]`` int32: rows of the cache (for DeepSeek-V4 its compressed
    entries; for MiniMax-M3 blocks of rows, those of one kv head after those of another), negative for none.
    Only layers with an indexer have one; the others share the selection of a layer before them. Four bytes
    are kept per index: ``4 * B * tokens * k`` for each indexer.

    Args:
        layers: such tensors by the number of their layer, for a selection that was made elsewhere.
        device: where recorded selections are kept; by default where they are made.
    """

    def __init__(
        self, layers: dict[int, Tensor] | None = None, *, device: torch.device | str | None = None
    ) -> None:
        for layer, selected in (layers or {}).items():
            if not isinstance(selected, Tensor) or selected.dtype != torch.int32 or selected.dim() != 3:
                got = f"{list(selected.shape)} {selected.dtype}" if isinstance(selected, Tensor) else selected
                raise ValueError(f"layers[{layer}]: expected [B, tokens, k] int32, got {got!r:.80}")
        self.device = device
        self._calls = {layer: [selected] for layer, selected in (layers or {}).items()}

    def __getitem__(self, layer_idx: int) -> Tensor:
        calls = self._calls[layer_idx]
        if len(calls) > 1:  # the widest of them: a short context has fewer than topk rows
            width = max(selected.shape[2] for selected in calls)
            joined = [F.pad(selected, (0, width - selected.shape[2]), value=-1) for selected in calls]
            self._calls[layer_idx] = calls = [torch.cat(joined, 1)]
        return calls[0]

    def __iter__(self) -> Iterator[int]:
        return iter(self._calls)

    def __len__(self) -> int:
        return len(self._calls)

    @property
    def nbytes(self) -> int:
        return sum(selected.nbytes for calls in self._calls.values() for selected in calls)

    def append(self, layer_idx: int, selected: Tensor) -> None:
        """``selected`` ``[B, S, k]`` int32, of the next S tokens."""
        self._calls.setdefault(layer_idx, []).append(selected.to(self.device or selected.device))


class _Replay:
    """Where each layer is in the selections that it replays."""

    def __init__(self, selections: Selections) -> None:
        self.selections, self.read = selections, dict.fromkeys(selections, 0)

    def next(self, layer_idx: int, batch: int, tokens: int, device: torch.device) -> Tensor:
        start = self.read[layer_idx]
        selected = self.selections[layer_idx][:, start : start + tokens]
        if selected.shape[:2] != (batch, tokens):
            raise ValueError(
                f"selections: expected [{batch}, {start + tokens}, k] at least for layer {layer_idx}, got "
                f"{list(self.selections[layer_idx].shape)}"
            )
        self.read[layer_idx] = start + tokens
        return selected.to(device)


class Indexer:
    """Mixed into the indexer classes of transformers, beside how each of them selects."""

    recorded_by: Callable[[Tensor], None] | None = None
    replayed_from: Callable[[int, int, torch.device], Tensor] | None = None
    __getattr__: Callable[[str], Any]  # for type checkers: the other attributes are those of transformers

    def selected(
        self, select: Callable[[slice], Tensor], chunks: Iterable[slice], hidden_states: Tensor
    ) -> Tensor:
        """``[B, S, k]`` int32: what ``select`` gives for chunks of the new tokens, or what is replayed."""
        if self.replayed_from is not None:
            batch, tokens = hidden_states.shape[:2]
            return self.replayed_from(batch, tokens, hidden_states.device)
        out = torch.cat([select(t) for t in chunks], 1)
        if self.recorded_by is not None:
            self.recorded_by(out)
        return out


@contextlib.contextmanager
def record(model: nn.Module, device: torch.device | str | None = None) -> Iterator[Selections]:
    """Record what the indexers of a model that enable() changed select, from a sequence's first token on.

    Args:
        device: where the selections are kept; by default where they are made.

    Yields:
        :class:`Selections`, which grow with every call of the model.
    """
    selections = Selections(device=device)
    for layer, indexer in (indexers := _indexers(model)).items():
        indexer.recorded_by = functools.partial(selections.append, layer)
    try:
        yield selections
    finally:
        for indexer in indexers.values():
            indexer.recorded_by = None


@contextlib.contextmanager
def replay(model: nn.Module, selections: Selections) -> Iterator[None]:
    """Let the layers of a model that enable() changed read what ``selections`` says, in its order of tokens.

    The calls may be divided otherwise than those that were recorded (a whole text at once, for instance, that
    was generated token by token), but need the same batch and padding. Keys of the indexers are stored as
    usual, so the model may go on with its own selections afterwards. Beam search and rejected drafts are not
    supported: both read tokens again.

    Raises:
        TypeError: something else than Selections.
        ValueError: there is no selection for one of the model's indexers, or, while replaying, too few tokens
            or another batch.
    """
    if not isinstance(selections, Selections):
        raise TypeError(f"selections: expected Selections, got {type(selections).__name__}")
    indexers = _indexers(model)
    missing = sorted({*indexers} - {*selections})
    if missing:
        raise ValueError(
            f"selections: expected one for each layer with an indexer, got none for layers {missing}"
        )
    source = _Replay(selections)
    for layer, indexer in indexers.items():
        indexer.replayed_from = functools.partial(source.next, layer)
    try:
        yield
    finally:
        for indexer in indexers.values():
            indexer.replayed_from = None


def _indexers(model: nn.Module) -> dict[int, Indexer]:
    """By the number of the layer that each is in; not every indexer knows it."""
    found: dict[int, Indexer] = {}
    for layer in model.modules():
        number: Any = getattr(layer, "layer_idx", None)
        if number is not None:
            found.update((number, module) for module in layer.modules() if isinstance(module, Indexer))
    if not found:
        raise ValueError(f"model: expected one that enable() changed, got {type(model).__name__}")
    return found
