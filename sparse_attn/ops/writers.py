"""Writers: new tokens into quantised caches, and fp8 index queries, each in one pass.

Names of sizes, errors and ``backend`` are those of :mod:`sparse_attn.ops.index`. On a CPU the reference does
the work: each value is read and written once.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..formats import FP8_MIN_SCALE, INDEX_K_FORMATS, KV_FORMATS, format_of
from . import call, check, register
from .check import WRITER_FLOATS
from .records import Cache, Output

WRITTEN = {name: KV_FORMATS[name] for name in ("v32", "v4")}
PAIRINGS = ("half", "interleaved")


@register("write_kv")
class WriteKVOp(NamedTuple):
    kv: Tensor  # [tokens, 576 or 512]
    slots: Tensor  # [tokens] int32 or int64
    eps: float
    power_of_two: bool
    min_scale: float
    cache: Cache  # [pages, page_size, 656 or 584] uint8
    norm_weight: Tensor | None = None  # [512]
    cos: Tensor | None = None  # [tokens, 32] fp32
    sin: Tensor | None = None
    pairing: str | None = None  # "half" or "interleaved"


@register("write_index_k")
class WriteIndexKOp(NamedTuple):
    k: Tensor  # [tokens, 128]
    slots: Tensor  # [tokens] int32 or int64
    eps: float
    hadamard: bool
    power_of_two: bool
    min_scale: float
    cache: Cache  # [pages, page_size, 132] uint8
    norm_weight: Tensor | None = None  # [128]
    norm_bias: Tensor | None = None
    cos: Tensor | None = None  # [tokens, rope_dim / 2] fp32
    sin: Tensor | None = None
    pairing: str | None = None


@register("quantise_index_q")
class QuantiseIndexQOp(NamedTuple):
    q: Tensor  # [s_q, h, d]
    weights: Tensor  # [s_q, h]
    hadamard: bool
    power_of_two: bool
    min_scale: float
    out: Output  # [s_q, h, d] bytes of e4m3
    out_weights: Output  # [s_q, h]
    cos: Tensor | None = None  # [s_q, rope_dim / 2] fp32
    sin: Tensor | None = None
    pairing: str | None = None


def write_kv(
    kv: Tensor,
    cache: Tensor,
    slots: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    pairing: str | None = None,
    power_of_two: bool = True,
    min_scale: float = FP8_MIN_SCALE,
    backend: str = "auto",
) -> None:
    """Append new tokens to a quantised latent cache: RMSNorm, RoPE and packing in one pass.

    ``RMSNorm(kv[:, :512]) = kv[:, :512] / sqrt(mean(kv[:, :512] ** 2) + eps) * norm_weight``; then the last
    64 values are turned by RoPE; then the bytes are those of :func:`sparse_attn.formats.pack_v32_kv` or
    :func:`sparse_attn.formats.pack_v4_kv`. All in fp32, rounded once.

    Args:
        kv: ``[tokens, 576]`` for 656 bytes per token (the latent, and the key's RoPE dimensions, which the
            norm leaves out), ``[tokens, 512]`` for 584 (RoPE dimensions last); bf16, fp16 or fp32.
        cache: uint8 with 656 or 584 bytes per token, in a shape that :func:`sparse_mla` reads; written in
            place.
        slots: ``[tokens]`` int32 or int64, ``page * page_size + offset``. A slot that does not exist (-1) is
            skipped. Two tokens in one slot leave the bytes of either, or of both mixed.
        norm_weight: ``[512]``; None leaves out the norm.
        cos, sin: ``[tokens, 32]`` fp32, of each token's position; None leaves out the rotation.
        pairing: with ``cos`` "interleaved" or "half", as in :func:`sparse_attn.rope.apply_rope`.
        power_of_two, min_scale: of the scales, as in :func:`sparse_attn.formats.pack_v32_kv`; scales of 584
            bytes are always powers of two.

    Source: the attention of the DeepSeek-V2 report, section 2.1, and FlashMLA's cache formats.
    """
    if not isinstance(cache, Tensor):
        raise TypeError(f"cache: expected a tensor [pages, page_size, bytes], got {type(cache).__name__}")
    fmt = format_of("cache", cache, WRITTEN)
    dims: dict[str, int] = {}
    check.tensor("kv", kv, f"tokens {fmt.width}", dims, WRITER_FLOATS)
    cache = check.quantised_pages("cache", cache, fmt, kv.device)
    fmt.check_in_place("cache", cache)
    if fmt.bytes == 584 and not power_of_two:
        raise ValueError("power_of_two: expected True, as cache has 584 bytes per token, got False")
    check.optional("norm_weight", norm_weight, "512", dims, WRITER_FLOATS, kv.device)
    check.tensor("slots", slots, "tokens", dims, (torch.int32, torch.int64), kv.device)
    _check_rope(cos, sin, pairing, "32", 64, dims, kv.device)
    _check_scale(min_scale)
    check.call(backend, kv.device, kv, norm_weight)
    required = kv, slots, eps, power_of_two, min_scale, cache
    call("write_kv", WriteKVOp(*required, norm_weight, cos, sin, pairing), backend)


def write_index_k(
    k: Tensor,
    cache: Tensor,
    slots: Tensor,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    pairing: str | None = None,
    hadamard: bool = True,
    power_of_two: bool = True,
    min_scale: float = FP8_MIN_SCALE,
    backend: str = "auto",
) -> None:
    """Append new index keys to an fp8 cache: LayerNorm, RoPE, Hadamard and packing in one pass.

    ``LayerNorm(k) = (k - mean) / sqrt(var + eps) * norm_weight + norm_bias``; then RoPE turns the leading
    dimensions; then the key is multiplied by the orthonormal Hadamard matrix, which spreads outliers and must
    be done to queries too (:func:`quantise_index_q`); then the bytes are those of
    :func:`sparse_attn.formats.pack_index_k`. All in fp32, rounded once.

    Args:
        k: ``[tokens, 128]``, bf16, fp16 or fp32.
        cache: ``[pages, page_size, 132]`` uint8, written in place.
        slots: ``[tokens]`` int32 or int64, as in :func:`write_kv`.
        norm_weight, norm_bias: ``[128]``; None, both, leaves out the norm.
        cos, sin: ``[tokens, rope_dim / 2]`` fp32, of each token's position; None leaves out the rotation.
        pairing: with ``cos`` "half" (DeepSeek-V3.2) or "interleaved" (GLM-5).
        hadamard: multiply by the Hadamard matrix.
        power_of_two, min_scale: of the scales, as in :func:`sparse_attn.formats.pack_v32_kv`.

    Source: DeepSeek-V3.2's inference code.
    """
    dims: dict[str, int] = {}
    check.tensor("k", k, "tokens 128", dims, WRITER_FLOATS)
    check.tensor("cache", cache, "pages page_size 132", dims, (torch.uint8,), k.device)
    INDEX_K_FORMATS["fp8_index"].check_in_place("cache", cache)
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError("norm_weight and norm_bias: expected both or neither")
    check.optional("norm_weight", norm_weight, "128", dims, WRITER_FLOATS, k.device)
    check.optional("norm_bias", norm_bias, "128", dims, WRITER_FLOATS, k.device)
    check.tensor("slots", slots, "tokens", dims, (torch.int32, torch.int64), k.device)
    _check_rope(cos, sin, pairing, "half_rope_dim", 128, dims, k.device)
    _check_scale(min_scale)
    check.call(backend, k.device, k, norm_weight, norm_bias)
    required = k, slots, eps, hadamard, power_of_two, min_scale, cache
    call("write_index_k", WriteIndexKOp(*required, norm_weight, norm_bias, cos, sin, pairing), backend)


def quantise_index_q(
    q: Tensor,
    weights: Tensor,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    pairing: str | None = None,
    hadamard: bool = True,
    power_of_two: bool = True,
    min_scale: float = FP8_MIN_SCALE,
    out: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """fp8 index queries: RoPE, Hadamard and e4m3 in one pass, their scales multiplied into the weights.

    ``scale = max(amax / 448, min_scale)`` of each head; the results are ``q / scale`` in e4m3 and
    ``weights * scale``: what :func:`lightning_topk` takes beside fp8 keys.

    Args:
        q: ``[s_q, index_n_heads, index_head_dim]``, bf16, fp16 or fp32; index_head_dim a power of two.
        weights: ``[s_q, index_n_heads]`` fp32.
        cos, sin, pairing, hadamard, power_of_two, min_scale: as in :func:`write_index_k`.
        out: the pair to fill.

    Returns:
        q in float8_e4m3fn and weights in fp32, of the same shapes.

    Source: DeepSeek-V3.2's inference code; folding the scale is DeepGEMM's convention.
    """
    dims: dict[str, int] = {}
    check.tensor("q", q, "tokens index_n_heads index_head_dim", dims, WRITER_FLOATS)
    d = q.shape[2]
    if d < 16 or d & (d - 1):
        raise ValueError(f"q: expected a power of two from 16 on as index_head_dim, got {d}")
    check.tensor("weights", weights, "tokens index_n_heads", dims, (torch.float32,), q.device)
    _check_rope(cos, sin, pairing, "half_rope_dim", d, dims, q.device)
    _check_scale(min_scale)
    check.call(backend, q.device, q, weights)
    if out is not None and (not isinstance(out, tuple) or len(out) != 2):
        raise TypeError(f"out: expected the pair (q, weights), got {type(out).__name__}")
    out_q, out_weights = out or (None, None)
    shape = {"tokens": q.shape[0], "index_n_heads": q.shape[1]}
    out_weights = check.output("out weights", out_weights, shape, torch.float32, q.device)
    out_q = check.output("out q", out_q, {**shape, "index_head_dim": d}, torch.float8_e4m3fn, q.device)
    outputs = out_q.view(torch.uint8), out_weights
    required = q, weights, hadamard, power_of_two, min_scale, *outputs
    call("quantise_index_q", QuantiseIndexQOp(*required, cos, sin, pairing), backend)
    return out_q, out_weights


def _check_rope(cos, sin, pairing, columns: str, d: int, dims: dict[str, int], device) -> None:
    """cos and sin of a rotation of at most d dimensions, or neither."""
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin: expected both or neither")
    if cos is None:
        return
    check.tensor("cos", cos, f"tokens {columns}", dims, (torch.float32,), device)
    check.tensor("sin", sin, f"tokens {columns}", dims, (torch.float32,), device)
    if 2 * cos.shape[1] > d:
        raise ValueError(f"cos: expected at most {d // 2} columns, got {cos.shape[1]}")
    if pairing not in PAIRINGS:
        raise ValueError(f"pairing: expected 'half' or 'interleaved' with cos, got {pairing!r}")


def _check_scale(min_scale: float) -> None:
    if not min_scale > 0:
        raise ValueError(f"min_scale: expected a positive number, got {min_scale}")
