"""Dense attention as a good engineer would write it in torch: what sparse attention must beat.

Decode forms take q ``[batch, h_q, 576]`` of one token per sequence and the latents kv
``[batch, s_kv, 576]``, and give ``[batch, h_q, 512]``: absorbed multi-head latent attention over every token.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from sparse_attn import sparse_mla

from .timing import interleaved


@functools.cache
def gemm_dtype() -> torch.dtype:
    """In which dtype torch multiplies bf16 tensors fastest here, conversion included.

    Without bf16 instructions its bf16 product is many times slower than the fp32 one.
    """
    a, b = torch.randn(128, 576).bfloat16(), torch.randn(2048, 576).bfloat16()
    timings = interleaved(
        {dtype: lambda dtype=dtype: a.to(dtype) @ b.to(dtype).mT for dtype in (a.dtype, torch.float32)},
        rounds=3,
    )
    return min(timings, key=lambda dtype: timings[dtype].low)


def sdpa_folded(q: Tensor, kv: Tensor, scale: float, d_v: int = 512) -> Tensor:
    """torch's flash attention with the heads as query rows, so that kv is read once for all heads."""
    # The value is as wide as the key: with 512 columns torch does not use its flash kernel.
    every = kv[:, None]
    return F.scaled_dot_product_attention(q[:, None], every, every, scale=scale)[:, 0, :, :d_v]


def gemm(q: Tensor, kv: Tensor, scale: float, d_v: int = 512) -> Tensor:
    """Two matrix products in the tensors' own dtype."""
    return (q @ kv.mT * scale).softmax(-1) @ kv[..., :d_v]


def gemm_chunked(q: Tensor, kv: Tensor, scale: float, d_v: int = 512, chunk: int = 4096) -> Tensor:
    """On a CPU: two products per chunk of keys in the fastest dtype, with an online softmax in fp32."""
    rows, dtype = q.shape[:-1], gemm_dtype()
    row_max = torch.full((*rows, 1), float("-inf"))
    row_sum, acc = torch.zeros(*rows, 1), torch.zeros(*rows, d_v)
    scaled = (q * scale).to(dtype)
    for keys in (keys.to(dtype) for keys in kv.split(chunk, -2)):
        scores = (scaled @ keys.mT).float()
        new_max = torch.maximum(row_max, scores.amax(-1, keepdim=True))
        scores.sub_(new_max).exp_()
        alpha = (row_max - new_max).exp_()
        row_sum.mul_(alpha).add_(scores.sum(-1, keepdim=True))
        acc.mul_(alpha).add_(scores.to(dtype) @ keys[..., :d_v])
        row_max = new_max
    return (acc / row_sum).to(q.dtype)


def own_kernel(q: Tensor, kv: Tensor, scale: float, d_v: int = 512) -> Tensor:
    """This library's attention with every token selected: the baseline with equally good kernels."""
    everything = torch.arange(kv.shape[:2].numel(), dtype=torch.int32, device=kv.device).view(kv.shape[:2])
    return sparse_mla(q, kv.flatten(0, 1), everything, d_v=d_v, softmax_scale=scale)


def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's flex_attention, compiled; the first call includes compiling."""
    return _compiled_flex()(q, k, v)


@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def mha_causal(q: Tensor, k: Tensor, v: Tensor, scale: float, block: int = 128) -> Tensor:
    """Prefill over expanded keys and values, head by head, on a CPU; queries are the last s_q positions.

    q ``[heads, s_q, 192]``, k ``[heads, s_kv, 192]``, v ``[heads, s_kv, 128]`` -> ``[heads, s_q, 128]``.
    Unabsorbed heads cost 320 multiplications per pair where absorbed ones cost 1088.
    """
    s_q, s_kv = q.shape[1], k.shape[1]
    out = torch.empty(*q.shape[:2], v.shape[2], dtype=q.dtype)
    for head, (queries, keys, values) in enumerate(zip(q, k, v, strict=True)):
        queries, keys, values = (x.to(gemm_dtype()) for x in (queries, keys, values))
        for start in range(0, s_q, block):
            stop = min(start + block, s_q)
            seen = s_kv - s_q + stop
            hidden = torch.ones(stop - start, seen, dtype=torch.bool).triu(s_kv - s_q + start + 1)
            scores = (queries[start:stop] @ keys[:seen].mT).mul_(scale).masked_fill_(hidden, float("-inf"))
            out[head, start:stop] = scores.softmax(-1) @ values[:seen]
    return out


def sdpa_causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The same by torch's flash attention, which needs v padded to k's width; heads may be grouped."""
    mask = causal_lower_right(q.shape[1], k.shape[1])  # no tensor, so a GPU can use the flash kernel
    grouped = q.shape[0] != k.shape[0]
    q, k, v = q[None], k[None], v[None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)[0]
