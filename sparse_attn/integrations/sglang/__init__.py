"""SGLang's DSA models (DeepSeek-V3.2, GLM-5) on GPUs where FlashMLA and DeepGEMM do not run. Unproven.

SGLang finds :func:`register` through the entry point of this package, in each of its processes. Where its
own kernels do not run, on NVIDIA GPUs older than sm_90, it puts the functions of this package in their place;
on newer GPUs it does nothing. What is known comes from unit tests on a CPU, which run SGLang's own methods on
top of the hooks: no model was served, and none of this has run on a GPU (docs/sglang.md).
"""

import functools
import logging
import pkgutil
from collections.abc import Callable
from importlib import metadata

import torch

TESTED = ("0.5.23",)  # releases of SGLang that the tests have passed with
OLDEST_SERVED = (9, 0)  # from this compute capability on FlashMLA and DeepGEMM run

KERNELS, LAYERS = "sglang.kernels.ops", "sglang.srt.layers.attention"
INTERFACE = f"{KERNELS}.attention.flash_mla_interface"
BACKEND, INDEXER = f"{LAYERS}.dsa_backend.DeepseekSparseAttnBackend", f"{LAYERS}.dsa.dsa_indexer.Indexer"
TOPK, UTILS = f"{LAYERS}.dsa.dsa_topk_backend.DSATopKBackend", f"{LAYERS}.dsa.utils"
QUANTISERS, DEQUANTISERS = (
    f"{KERNELS}.quantization.dsa_quant_k_cache",
    f"{KERNELS}.attention.dsa.dequant_k_cache",
)


def register() -> None:
    """Entry point ``sglang.srt.plugins``: the hooks, all of them or none."""
    if served_by_sglang():
        return
    why = refusal() or unreachable()
    if why is not None:
        logging.getLogger(__name__).warning(why)
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target, hook in replacements().items():
        HookRegistry.register(target, hook, HookType.REPLACE)
    for target, hook in wrappers().items():
        HookRegistry.register(target, hook, HookType.AROUND)


def replacements() -> dict[str, Callable]:
    """What stands in the place of SGLang's functions, by their dotted names."""
    from . import attention, caches, indexer

    return {
        f"{INTERFACE}.flash_mla_sparse_fwd": attention.flash_mla_sparse_fwd,
        f"{INTERFACE}.flash_mla_with_kvcache": attention.flash_mla_with_kvcache,
        f"{BACKEND}._forward_fa3": attention.forward_fa3,
        f"{BACKEND}._build_topk_v2_plan": indexer.build_topk_v2_plan,
        f"{INDEXER}._store_index_k_cache": indexer.store_index_k_cache,
        f"{INDEXER}._fused_k_prepare_and_store": indexer.fused_k_prepare_and_store,
        f"{KERNELS}.attention.dsa.indexer_q.fused_q_indexer_rope_first_quant": indexer.fused_q_rope_quant,
        f"{UTILS}.resolve_num_sms": indexer.resolve_num_sms,
        f"{UTILS}.resolve_paged_mqa_logits_metadata_fn": indexer.resolve_paged_mqa_logits_metadata_fn,
        f"{UTILS}.resolve_fp8_paged_mqa_logits_fn": indexer.resolve_fp8_paged_mqa_logits_fn,
        f"{UTILS}.resolve_fp8_mqa_logits_fn": indexer.resolve_fp8_mqa_logits_fn,
        f"{QUANTISERS}.quantize_k_cache": caches.quantize_k_cache,
        f"{QUANTISERS}.quantize_k_cache_separate": caches.quantize_k_cache_separate,
        f"{DEQUANTISERS}.dequantize_k_cache_paged_dsa": caches.dequantize_k_cache_paged_dsa,
    }


def wrappers() -> dict[str, Callable]:
    """What stands around SGLang's functions, which still do what these leave to them."""
    from . import attention, indexer

    return {
        f"{INTERFACE}.get_mla_metadata": attention.get_mla_metadata,
        f"{TOPK}.topk_transform": indexer.topk_transform,
        f"{INDEXER}._get_topk_paged": indexer.get_topk_paged,
        f"{INDEXER}._get_topk_ragged": indexer.get_topk_ragged,
        f"{KERNELS}.quantization.act_quant_triton.act_quant": indexer.act_quant,
    }


def served_by_sglang() -> bool:
    """Whether SGLang's own kernels run here: on newer GPUs, and on devices that are not NVIDIA's."""
    if torch.cuda.is_available():
        return torch.version.hip is not None or torch.cuda.get_device_capability() >= OLDEST_SERVED
    from sglang.srt.utils import is_npu, is_xpu

    return is_npu() or is_xpu()


@functools.cache
def refusal() -> str | None:
    """Why this release of SGLang is left alone; None where it is one that was tested."""
    release, ours = metadata.version("sglang").split("+")[0], metadata.version("sparse_attn")
    if release in TESTED:
        return None
    return (
        f"sglang: sparse_attn {ours} was tested with {', '.join(TESTED)}, got {release}; its hooks are not "
        "registered, as SGLang's internals change between releases"
    )


def unreachable() -> str | None:
    """Why not every hook would find its place: SGLang would pass over such a hook and apply the others."""
    try:
        for target in (*replacements(), *wrappers()):
            pkgutil.resolve_name(target)
    except (ImportError, AttributeError, OSError) as error:  # OSError: a library that needs a GPU's driver
        return (
            f"sglang: sparse_attn's hooks are not registered, as SGLang's modules do not load here: {error}"
        )
    return None
