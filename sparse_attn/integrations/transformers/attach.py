"""DSA for models that were trained with dense grouped-query attention."""

import copy
import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .families import DENSE, accepted_by, attention_names, subclass
from .grouped import GroupedAttention
from .indexers import AttentionScores, HiddenStates, Indexers

ATTACHED: dict[type[nn.Module], type[nn.Module]] = {}  # transformers' class: ours
INTERFACE = "ALL_ATTENTION_FUNCTIONS"  # transformers' registry, as the modules of its models call it
CHANGING = {
    "attn_logit_softcapping": "soft-capped scores",
    "sinks": "attention sinks",
}  # attributes of layers


def attached_class(theirs: type[nn.Module]) -> type[nn.Module]:
    """Ours, made when it is first asked for."""
    if theirs not in ATTACHED:
        ATTACHED[theirs] = subclass(theirs, GroupedAttention, accepted=accepted_by(theirs))
    return ATTACHED[theirs]


def grouped_layers(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The attention layers of a decoder by their numbers.

    Raises:
        TypeError: there is one that DSA cannot be attached to; or none.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a transformers model, got {type(model).__name__}")
    if model.config.is_encoder_decoder:
        raise TypeError(f"model: expected a decoder, got {model.config.model_type}, which has an encoder too")
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        if _calls_interface(module) and getattr(module, "is_causal", False):
            _check_layer(model, module)
            number: Any = module.layer_idx
            found[number] = module
    if not any(_window(module) is None for module in found.values()):
        names = attention_names(model)
        what = f"with {', '.join(names)}" if names else "without attention"
        raise TypeError(
            f"model: expected a decoder whose layers read all tokens through {INTERFACE}, got "
            f"{model.config.model_type} {what}"
        )
    return found


def full_layers(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Those of :func:`grouped_layers` that read all tokens."""
    return {number: module for number, module in grouped_layers(model).items() if _window(module) is None}


def _window(module: Any) -> int | None:
    return getattr(module, "sliding_window", None) if getattr(module, "is_sliding", True) else None


def _theirs(module: nn.Module) -> type[nn.Module]:
    """transformers' class of a module, whether it was changed or not."""
    return DENSE.get(type(module), type(module))


def _calls_interface(module: nn.Module) -> bool:
    forward = inspect.unwrap(_theirs(module).forward)
    return INTERFACE in getattr(getattr(forward, "__code__", None), "co_names", ())


def _check_layer(model: PreTrainedModel, module: Any) -> None:
    theirs = _theirs(module)

    def refuse(reason: str) -> None:
        raise TypeError(f"model: cannot attach to {model.config.model_type}: {theirs.__name__} {reason}")

    if type(module) in DENSE and type(module) not in ATTACHED.values():
        refuse("has an indexer of its own, which enable() made sparse")
    if hasattr(module, "indexer") and type(module) not in ATTACHED.values():
        refuse("has an indexer of its own; call enable(model)")
    if getattr(module, "layer_idx", None) is None or not hasattr(module, "num_key_value_groups"):
        refuse("is not grouped-query attention that knows the number of its layer")
    for attribute, meaning in CHANGING.items():
        if getattr(module, attribute, None) is not None:
            refuse(f"has {meaning} ({attribute}), which sparse_gqa does not compute here")
    takes = inspect.signature(theirs.forward).parameters
    if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in takes.values()):
        refuse("does not hand keyword arguments on to the attention function")


def indexers_of(
    layers: dict[int, nn.Module], topk: int | Sequence[int], indexer: "Indexers | None", hidden_size: int
) -> "dict[int, AttentionScores] | dict[int, HiddenStates]":
    """An indexer for each layer that reads all tokens, with its number of tokens.

    Raises:
        TypeError, ValueError: they do not fit the model.
    """
    full = [number for number, module in layers.items() if _window(module) is None]
    if indexer is not None:
        if not isinstance(indexer, Indexers):
            raise TypeError(f"indexer: expected Indexers (of distill or load_indexer), got {indexer!r:.60}")
        if (indexer.hidden_size, [*indexer.sizes]) != (hidden_size, full):
            raise ValueError(
                f"indexer: expected hidden_size={hidden_size} and layers {full}, got "
                f"{indexer.hidden_size} and {[*indexer.sizes]}"
            )
    if isinstance(topk, int):
        counts = [topk] * len(full) if indexer is None else indexer.allocate(topk)
    else:
        counts = list(topk)
    if len(counts) != len(full) or not all(isinstance(k, int) and k > 2 for k in counts):
        raise ValueError(
            f"topk: expected an integer above 2, or one for each of the {len(full)} layers that read all "
            f"tokens, got {topk!r:.80}"
        )
    if indexer is None:
        return {number: AttentionScores(k) for number, k in zip(full, counts, strict=True)}
    made = {number: copy.deepcopy(indexer[number]) for number in full}
    for (number, one), k in zip(made.items(), counts, strict=True):
        one.layer_idx, one.index_topk = number, k
    return made
