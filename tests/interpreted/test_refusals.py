"""What the Triton kernels cannot do is refused, by name, before any of them starts."""

import pytest
import torch

import sparse_attn
from sparse_attn.formats import KV_FORMATS
from sparse_attn.testing import gqa_inputs, index_inputs, mla_inputs

INDICES = torch.zeros(1, 3, dtype=torch.int32)
OUTS = torch.zeros(2, 3, 4, 8, dtype=torch.float64)


@pytest.mark.parametrize(
    "function, inputs",
    [
        ("index_logits", index_inputs(3, 20, dtype=torch.float64)),
        ("lightning_topk", {**index_inputs(3, 20, dtype=torch.float64), "topk": 4}),
        ("select_topk", {"logits": torch.zeros(3, 20).double(), "topk": 4}),
        ("sparse_mla", {**mla_inputs(3, 20, dtype=torch.float64), "d_v": 32}),
        ("sparse_gqa", gqa_inputs(3, 20, dtype=torch.float64)),
        ("merge_attention", {"outs": OUTS, "lses": OUTS[..., 0]}),
    ],
)
def test_fp64(function, inputs):
    with pytest.raises(TypeError, match="triton backend takes bfloat16, float16 or float32, got float64"):
        getattr(sparse_attn, function)(**inputs, backend="triton")


@pytest.mark.parametrize("name", KV_FORMATS)
def test_fp16_over_latent_caches(name):
    fmt = KV_FORMATS[name]
    kv = torch.zeros(4, 8, fmt.bytes, dtype=torch.uint8)
    q, plain = torch.zeros(1, 2, fmt.width).half(), torch.zeros(8, fmt.width).half()
    for caches, quantised in (
        ({"kv": kv, "kv_format": name}, "kv"),
        ({"kv": plain, "extra_kv": kv, "extra_indices": INDICES, "extra_kv_format": name}, "extra_kv"),
    ):
        words = f"q: expected bfloat16 or float32, as {quantised} is quantised, got float16"
        with pytest.raises((TypeError, ValueError), match=words):
            sparse_attn.sparse_mla(q, indices=INDICES, **caches, backend="triton")


def test_pages_that_32_bits_cannot_address():
    kv = torch.empty(1, 2**31 // 656 + 2, 656, dtype=torch.uint8)  # none of it is touched
    with pytest.raises(ValueError, match="kv: expected pages of less than 2 GiB, got 3273605 tokens"):
        sparse_attn.sparse_mla(torch.zeros(1, 2, 576), kv, INDICES, backend="triton")


@pytest.mark.parametrize(
    "dtype, d_qk, d_v, words",
    [
        (torch.bfloat16, 1040, 512, r"at most 1024 columns in bfloat16, got 1024 \+ 16 for d_qk=1040"),
        (torch.float32, 580, 560, r"at most 576 columns in float32, got 1024 for d_qk=580, d_v=560"),
    ],
)
def test_wide_keys(dtype, d_qk, d_v, words):
    q, kv = torch.zeros(1, 2, d_qk, dtype=dtype), torch.zeros(8, d_qk, dtype=dtype)
    with pytest.raises(ValueError, match=words):
        sparse_attn.sparse_mla(q, kv, INDICES, d_v=d_v, backend="triton")


def test_index_keys():
    inputs = index_inputs(1, 8, 2, 128, dtype=torch.float16)
    inputs["k"] = torch.zeros(4, 8, 68, dtype=torch.uint8)
    refused = pytest.raises(TypeError, match="q: expected bfloat16 or float32, as k is e2m1, got float16")
    with refused:
        sparse_attn.index_logits(**inputs, backend="triton")
    with refused:
        sparse_attn.lightning_topk(**inputs, topk=2, backend="triton")
