"""Sparse attention inside the models of Hugging Face transformers that have a lightning indexer.

``enable(model)`` gives the attention layers of a loaded model, their indexers and compressors other classes,
``disable(model)`` takes them back. The model keeps its weights, its config and its cache classes, and the
layers store in a cache what transformers' own layers store: either may continue where the other stopped.

No ``[S, T]`` mask is built and no latent is expanded. Queries are taken in chunks, so that the memory beside
the cache does not grow with the queries of a whole prompt.

Shapes: ``B`` sequences of a batch, ``S`` new tokens, ``T`` rows of the cache (for a static cache
its full length). Row t of sequence b is slot ``b * T + t``.
"""

import types
from collections.abc import Sequence
from typing import Any

import transformers
from torch import Tensor, nn

OLDEST, NEWEST = (5, 20), (5, 24)  # the releases of transformers that the tests have passed with
TESTED = f"tested with {OLDEST[0]}.{OLDEST[1]}.x to {NEWEST[0]}.{NEWEST[1]}.x"


def _check_version(version: str) -> None:
    release = tuple(int(part) for part in version.split(".")[:2])
    if not OLDEST <= release <= NEWEST:
        raise ImportError(
            f"transformers: sparse_attn.integrations.transformers is {TESTED}, got {version}; "
            "the internals of its layers change between releases"
        )


_check_version(transformers.__version__)

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel  # noqa: E402

from .adapt import adapt  # noqa: E402
from .attach import ATTACHED, attached_class, grouped_layers, indexers_of  # noqa: E402
from .distil import distill  # noqa: E402
from .families import DENSE, SPARSE, SUPPORTED, attention_names  # noqa: E402
from .indexers import Indexers, load_indexer, save_indexer  # noqa: E402
from .inputs import NAME, visible_rows  # noqa: E402
from .kept import kept_attention  # noqa: E402
from .latent import LatentAttention, check_kv_b_proj  # noqa: E402
from .selections import Selections, record, replay  # noqa: E402

__all__ = [
    "Indexers",
    "Selections",
    "adapt",
    "attach",
    "disable",
    "distill",
    "enable",
    "kept_attention",
    "load_indexer",
    "record",
    "replay",
    "save_indexer",
]

BEFORE = "_attn_implementation_before_sparse"  # the attribute of a changed model that disable() needs


def enable(model: PreTrainedModel) -> None:
    """Make the attention layers of ``model`` sparse, in place. Enabling twice changes nothing.

    Args:
        model: one of a family with an indexer, for instance a DeepseekV32ForCausalLM; its weights in bf16,
            fp16, fp32 or fp64 (kv_b_proj also in block-quantised fp8).

    Raises:
        TypeError: another kind of model, or a kv_b_proj whose weight cannot be read (adapters, other
            quantisations).
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a transformers model, got {type(model).__name__}")
    changed = [module for module in model.modules() if type(module) in SPARSE]
    if not changed and not any(type(module) in DENSE for module in model.modules()):
        found = attention_names(model)
        raise TypeError(
            f"model: expected one of {', '.join(SUPPORTED)} (transformers {transformers.__version__}, "
            f"{TESTED}), got {model.config.model_type} with {', '.join(found) or 'no attention layer'}"
        )
    for module in changed:
        if issubclass(SPARSE[type(module)], LatentAttention):
            check_kv_b_proj(module.get_submodule("kv_b_proj"))
    for module in changed:
        _change_class(module, SPARSE[type(module)])
    if changed:
        setattr(model, BEFORE, model.config.get_text_config()._attn_implementation)
        _set_implementation(model, NAME)


def attach(model: PreTrainedModel, *, topk: int | Sequence[int], indexer: Indexers | None = None) -> None:
    """Make the layers of a model with dense attention read ``topk`` tokens per query, in place.

    For decoders with grouped-query attention (multi-head and multi-query included) that call transformers'
    attention interface: Llama, Mistral, Qwen2 and Qwen3, SmolLM3, Phi-3, Gemma3 and others. Layers with a
    window stay dense within it. Attaching again gives other indexers or another topk; a cache goes on only
    with the indexer that it began with.

    Args:
        model: its weights stay as they are, except that its attention layers get a submodule ``indexer``.
        topk: tokens that each query reads, above 2: in every layer, or one number per layer that reads all
            tokens. One number with ``indexer`` is the average, if the indexer knows what each layer loses.
        indexer: of :func:`distill` or :func:`load_indexer`. Without one, the tokens with the most attention
            are selected: the quality of a perfect indexer, at nearly the cost of dense attention.

    Raises:
        TypeError: a model that this cannot be done to, or no Indexers.
        ValueError: an indexer of another model, or a topk that is none.
    """
    layers = grouped_layers(model)
    made = indexers_of(layers, topk, indexer, model.config.get_text_config().hidden_size)
    before = model.config.get_text_config()._attn_implementation
    for number, module in layers.items():
        if type(module) not in ATTACHED.values():
            _change_class(module, attached_class(type(module)))
        weight = next(module.parameters())
        one = made.get(number)
        found = None if one is None else one.to(weight.device, weight.dtype)
        module.indexer = found  # pyright: ignore[reportArgumentType]
    if before != NAME:
        setattr(model, BEFORE, before)
        _set_implementation(model, NAME)


def disable(model: PreTrainedModel) -> None:
    """Undo :func:`enable` or :func:`attach`; a model that neither changed stays as it is."""
    changed = [module for module in model.modules() if type(module) in DENSE]
    for module in changed:
        if type(module) in ATTACHED.values():
            del module.indexer
        _change_class(module, DENSE[type(module)])
    if changed:
        _set_implementation(model, getattr(model, BEFORE))
        delattr(model, BEFORE)


def _set_implementation(model: PreTrainedModel, name: str) -> None:
    """Of the text model alone, where there are also encoders of images or sound."""
    parts = {
        key
        for key in model.config.sub_configs
        if getattr(model.config, key) is model.config.get_text_config()
    }
    model.set_attn_implementation(dict.fromkeys(parts, name) if parts else name)


def _change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    module.__class__ = cls
    if "_old_forward" in vars(module):  # accelerate's hooks keep the forward that they wrap
        vars(module)["_old_forward"] = types.MethodType(cls.forward, module)


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options):
    """The attention function that transformers' forwards call."""
    if type(module) not in DENSE:
        raise TypeError(
            f"attn_implementation: {NAME!r} is set for {type(module).__name__}, whose class was not changed; "
            f"call sparse_attn.integrations.transformers.enable(model), for {', '.join(SUPPORTED)}"
        )
    options.pop("dropout", None)  # 0 in evaluation mode
    attend: Any = module.attend
    return attend(query, key, value, mask, **options), None


AttentionMaskInterface.register(NAME, visible_rows)
AttentionInterface.register(NAME, _attend)
