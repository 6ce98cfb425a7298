"""Sparse adaptation: a model and its attached indexers are tuned together, with sparse attention.

Source: DeepSeek-V3.2 report, section 2.1, sparse training stage.
"""

import contextlib
from collections.abc import Iterator

from torch import Tensor
from transformers import PreTrainedModel

from .grouped import GroupedAttention
from .indexers import HiddenStates


@contextlib.contextmanager
def adapt(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Let gradients through the layers of a model to which indexers were attached.

    Inside, sparse attention is computed with operations of torch that have a backward, again in the backward
    for some queries at a time, and the model may be in training mode. Its loss trains the weights of the
    model. Those of the indexers are trained by losses of their own, through which no gradient reaches the
    model: how far the index scores are from the attention to the selected tokens, the mean over queries of
    :func:`~.gradients.divergence`.

    Call the model without a cache.

    Yields:
        The indexers' losses, a scalar per layer and call of the model; clear the list after each step.

    Raises:
        TypeError: a model without indexers that learn.

    Example::

        with adapt(model) as index_losses:
            for ids in batches:
                loss = model(ids, labels=ids, use_cache=False).loss + torch.stack(index_losses).sum()
                loss.backward()
                optimiser.step(), optimiser.zero_grad(), index_losses.clear()
    """
    layers = [m for m in model.modules() if isinstance(m, GroupedAttention)]
    if not any(isinstance(layer.indexer, HiddenStates) for layer in layers):
        raise TypeError(
            f"model: expected one that attach() gave indexers of distill() or load_indexer(), got "
            f"{type(model).__name__}"
        )
    losses: list[Tensor] = []
    for layer in layers:
        layer.adapting = losses
    try:
        yield losses
    finally:
        for layer in layers:
            layer.adapting = None
