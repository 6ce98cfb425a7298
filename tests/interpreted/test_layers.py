"""Layers over the Triton kernels, with a capturable cache: prefill, decode and drafts, as on the CPU."""

import pytest
import torch

from sparse_attn import DSACache, DSAConfig, SparseGQA, SparseMLA
from sparse_attn.testing import relative_error

COMMON = {"hidden_size": 64, "num_attention_heads": 4, "index_n_heads": 16, "index_topk": 12}
MLA = DSAConfig.deepseek_v32(**COMMON, q_lora_rank=32, indexer_fp8=True)
GQA = DSAConfig(**COMMON, num_key_value_heads=2, head_dim=32, index_head_dim=32, indexer_rope="half")


@pytest.mark.parametrize(
    "layer, config, dtype, cache_dtype, budget",
    [
        (SparseMLA, MLA, torch.float32, torch.float8_e4m3fn, 1e-5),
        (SparseMLA, MLA, torch.bfloat16, torch.bfloat16, 2e-2),
        (SparseGQA, GQA, torch.float32, torch.float32, 1e-5),
    ],
)
def test_a_layer_computes_on_triton_what_it_does_on_the_cpu(layer, config, dtype, cache_dtype, budget):
    on_triton, on_cpu = (layer(config, dtype=dtype, backend=backend) for backend in ("triton", "cpu"))
    on_cpu.load_state_dict(on_triton.state_dict())
    caches = [DSACache(config, 40, batch_size=2, dtype=cache_dtype, capturable=c) for c in (True, False)]
    for counts in ([20, 3], [1, 1], [2, 14]):
        hidden, boundaries = torch.randn(sum(counts), 64, dtype=dtype), torch.tensor([0, *counts]).cumsum(0)
        with torch.inference_mode():
            got, expected = (
                each(hidden, cache=cache, cu_seqlens_q=boundaries)
                for each, cache in zip((on_triton, on_cpu), caches, strict=True)
            )
        assert relative_error(got, expected) < budget
    if cache_dtype == torch.float8_e4m3fn:
        for b, length in enumerate((23, 18)):
            assert torch.equal(*(cache["kv"][b, :length] for cache in caches))
