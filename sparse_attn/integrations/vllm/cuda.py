"""vLLM's CUDA platform for GPUs older than sm_90, which none of its own sparse backends runs on."""

from vllm.platforms.cuda import CudaPlatform

from .selection import check_backend, is_ours, kv_cache_dtype, serves


class SparseCudaPlatform(CudaPlatform):
    prefers_sparse_attn = True

    @classmethod
    def get_attn_backend_cls(cls, selected_backend, attn_selector_config, num_heads=None) -> str:
        if is_ours(attn_selector_config):
            return check_backend(selected_backend, attn_selector_config, cls.get_device_capability())
        return super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)

    @classmethod
    def check_and_update_config(cls, vllm_config) -> None:
        cache = vllm_config.cache_config
        if serves(vllm_config.model_config):
            cache.cache_dtype = kv_cache_dtype(cache.cache_dtype)
        super().check_and_update_config(vllm_config)
