"""Which models and settings the platforms take for sparse_attn, and what they say of others."""

from . import BACKEND, CLASS

MODELS = ("deepseek_v32", "glm_moe_dsa", "deepseek_mtp")  # model_type of what the tests serve, and its drafts


def serves(model_config) -> bool:
    return model_config is not None and model_config.hf_text_config.model_type in MODELS


def is_ours(attn_selector_config) -> bool:
    """Whether the layer that is being built is a sparse one of such a model."""
    from vllm.config import get_current_vllm_config_or_none  # imports the platforms

    config = get_current_vllm_config_or_none()
    return attn_selector_config.use_sparse and (config is None or serves(config.model_config))


def kv_cache_dtype(asked: str) -> str:
    """vLLM's short names for fp8 mean DeepSeek's format here, as they do for FLASHMLA_SPARSE."""
    return "fp8_ds_mla" if asked in ("fp8", "fp8_e4m3") else asked


def check_backend(selected_backend, attn_selector_config, capability) -> str:
    """The path of our backend; ValueError where the user chose another, or what it does not do."""
    from .backend import SparseAttnBackend

    if selected_backend is not None and selected_backend.name != BACKEND:
        raise ValueError(
            f"attention_backend: expected {BACKEND} or none for a model with sparse attention, "
            f"got {selected_backend.name}"
        )
    options = attn_selector_config._asdict()
    reasons = SparseAttnBackend.validate_configuration(device_capability=capability, **options)
    if reasons:
        raise ValueError(f"{BACKEND}: {', '.join(reasons)}; got {attn_selector_config}")
    return CLASS
