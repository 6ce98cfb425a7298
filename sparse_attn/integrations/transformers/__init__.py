"""Sparse attention inside the models of Hugging Face transformers: DeepSeek-V3.2, GLM-5, DeepSeek-V4.

``enable(model)`` gives the attention layers of a loaded model another forward, ``disable(model)``
takes it back. The model keeps its weights, its config and its cache classes, and the layers store in a
cache what transformers' own layers store: either may continue where the other stopped.

No ``[S, T]`` mask is built and no latent is expanded. Queries are taken in chunks, so that the memory beside
the cache does not grow with the queries of a whole prompt.

Shapes: ``B`` sequences of a batch, ``S`` new tokens, ``T`` rows of the cache (for a static cache
its full length). Row t of sequence b is slot ``b * T + t``.
"""

import types

import transformers
from torch import nn

OLDEST, NEWEST = (5, 20), (5, 23)  # the releases of transformers that the tests have passed with
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

from . import deepseek_v4, deepseek_v32  # noqa: E402
from .inputs import NAME, padding_of  # noqa: E402

__all__ = ["disable", "enable"]

SPARSE = {**deepseek_v32.SPARSE, **deepseek_v4.SPARSE}
DENSE = {sparse: dense for dense, sparse in SPARSE.items()}
CLASSES = " or ".join(cls.__name__ for cls in SPARSE)
BEFORE = "_attn_implementation_before_sparse"  # the attribute of a changed model that disable() needs


def enable(model: PreTrainedModel) -> None:
    """Make the attention layers of ``model`` sparse, in place. Enabling twice changes nothing.

    Args:
        model: one with DeepseekV32Attention, GlmMoeDsaAttention or DeepseekV4Attention layers, for instance
            a DeepseekV32ForCausalLM; its weights in bf16, fp16, fp32 or fp64 (kv_b_proj also in
            block-quantised fp8).

    Raises:
        TypeError: another kind of model, or a kv_b_proj whose weight cannot be read (adapters, other
            quantisations).
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a transformers model, got {type(model).__name__}")
    layers = [module for module in model.modules() if type(module) in SPARSE]
    if not layers and not any(type(module) in DENSE for module in model.modules()):
        found = sorted({name for m in model.modules() if (name := type(m).__name__).endswith("Attention")})
        raise TypeError(
            f"model: expected attention layers of class {CLASSES} (transformers {transformers.__version__}, "
            f"{TESTED}), got {type(model).__name__} with {', '.join(found) or 'no attention layer'}"
        )
    for layer in layers:
        if type(layer) in deepseek_v32.SPARSE:
            deepseek_v32.check_kv_b_proj(layer.get_submodule("kv_b_proj"))
    for layer in layers:
        _change_class(layer, SPARSE[type(layer)])
    if layers:
        setattr(model, BEFORE, model.config._attn_implementation)
        model.set_attn_implementation(NAME)


def disable(model: PreTrainedModel) -> None:
    """Undo :func:`enable`; a model that it did not change stays as it is."""
    layers = [module for module in model.modules() if type(module) in DENSE]
    for layer in layers:
        _change_class(layer, DENSE[type(layer)])
    if layers:
        model.set_attn_implementation(getattr(model, BEFORE))
        delattr(model, BEFORE)


def _change_class(layer: nn.Module, cls: type[nn.Module]) -> None:
    layer.__class__ = cls
    if "_old_forward" in vars(layer):  # accelerate's hooks keep the forward that they wrap
        vars(layer)["_old_forward"] = types.MethodType(cls.forward, layer)


def _never(module: nn.Module, *args, **kwargs):
    """Registered as the attention function: the layers that enable() changed do not call it."""
    raise TypeError(
        f"attn_implementation: {NAME!r} is set for {type(module).__name__}, whose forward was not replaced; "
        f"call sparse_attn.integrations.transformers.enable(model), for models with layers of {CLASSES}"
    )


AttentionMaskInterface.register(NAME, padding_of)
AttentionInterface.register(NAME, _never)
