"""The public functions: check every argument, allocate the outputs, call the op.

Shapes use these names: ``s_q`` query tokens and ``s_kv`` key tokens (packed: all sequences of a
batch one after the other), ``h_q`` and ``h_kv`` heads, ``d`` sizes of a head, ``topk`` columns of
an index row. Wrong arguments raise TypeError (not a tensor, wrong dtype) or ValueError (shape,
device, range, gradients) before anything runs.

``backend`` is "auto" (by device: cpu or triton), "cpu", "triton" or "reference"; an explicit
choice is obeyed or refused, never replaced. fp64 runs on "cpu" and "reference".
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .formats import FP8_MIN_SCALE, INDEX_K_FORMATS, KV_FORMATS, Format, format_of
from .reference import compute_dtype

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
WRITER_FLOATS = FLOATS[:3]
PAIRINGS = ("half", "interleaved")
DEFAULT_WORKSPACE_BYTES = 256 << 20
QUANTISED_D_V = 512  # of every latent format
E2M1_WIDTH = 128  # index_head_dim of e2m1 queries and keys
TRITON_KV_BYTES = (656, 584)  # a token, in the quantised caches that the Triton kernels read

__all__ = [
    "index_logits",
    "lightning_topk",
    "merge_attention",
    "physical_slots",
    "quantise_index_q",
    "select_topk",
    "sparse_gqa",
    "sparse_mla",
    "write_index_k",
    "write_kv",
]


def index_logits(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    ks: Tensor,
    ke: Tensor,
    *,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    block_table: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Lightning-indexer scores, ``sum_j weights[t, j] * relu(q[t, j] . k[s])``.

    Args:
        q: ``[s_q, index_n_heads, index_head_dim]``, bf16, fp16, fp32 or fp64. Or quantised, where k is too:
            float8_e4m3fn, whose scales the caller multiplies into ``weights``; or e2m1, uint8
            ``[s_q, index_n_heads, 64]`` of index_head_dim 128, two values in a byte, the even one low.
        k: ``[s_kv, index_head_dim]`` in q's dtype; with ``block_table`` a paged cache
            ``[pages, page_size, index_head_dim]``. Or quantised in the same shapes, beside ``k_scale``:
            float8_e4m3fn, or e2m1 (uint8, 64 bytes a key). Or a packed cache that holds its scales,
            uint8 ``[pages, page_size, bytes]`` with 132 bytes (fp8) or 68 (mxfp4) a key
            (:mod:`sparse_attn.formats`); without ``block_table`` it is read in the order of the pages.
        weights: ``[s_q, index_n_heads]`` fp32 (fp64 with fp64 q); may be negative.
        ks, ke: ``[s_q]`` int32. Query t sees keys ``ks[t] <= s < ke[t]``, clamped to the keys that
            exist; a reversed range is empty.
        q_scale: with e2m1 q, ``[s_q, index_n_heads]`` int32: four ue8m0 scales, one for 32 values, the
            first in the low byte.
        k_scale: with e4m3 k one fp32 scale a key, not negative; with e2m1 k int32 as in ``q_scale``.
            ``[s_kv]``, or with ``block_table`` ``[pages, page_size]``.
        block_table: ``[n, max_pages]`` int32, s_q a multiple of n; consecutive queries share a row.
            Position s is found in page ``block_table[row, s // page_size]``; a page id outside
            ``[0, pages)`` holds nothing.
        out: ``[s_q, width]`` to fill.

    Returns:
        ``[s_q, width]`` fp32 (fp64 with fp64 q), -inf outside the range; width is s_kv, or
        ``max_pages * page_size``, or for a packed cache without ``block_table`` ``pages * page_size``. This
        is the one function whose memory grows with s_q * s_kv.

    Source: DeepSeek-V3.2 report, equation 1; quantised operands are DeepGEMM's.
    """
    keys, width = _check_index_inputs(q, k, weights, ks, ke, q_scale, k_scale, block_table, backend)
    out = _output("out", out, {"s_q": q.shape[0], "width": width}, compute_dtype(q.dtype), q.device)
    ops.call("index_logits", backend, (q, keys.k, weights, ks, ke, *keys[1:]), (out,))
    return out


def select_topk(
    logits: Tensor, topk: int, ks: Tensor, ke: Tensor, *, out: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """The positions of the ``topk`` highest logits of each row, exactly.

    Highest score first into the set, ties to the lower position; -0.0 equals +0.0; NaN and -inf
    are never selected. Equal logits give equal indices on every backend and at every run.

    Args:
        logits: ``[s_q, s_kv]`` fp32 or fp64.
        topk: how many positions to keep, at least 1.
        ks, ke: ``[s_q]`` int32; only positions ``ks[t] <= s < ke[t]`` count.
        out: ``[s_q, topk]`` int32 to fill.

    Returns:
        ``[s_q, topk]`` int32, ascending within a row, padded with -1 at its end.
    """
    _check_topk(topk)
    dims: dict[str, int] = {}
    _check("logits", logits, "s_q s_kv", dims, (torch.float32, torch.float64))
    _check_ranges(ks, ke, dims, logits.device)
    _check_call(backend, logits.device, logits)
    out = _output("out", out, {"s_q": logits.shape[0], "topk": topk}, torch.int32, logits.device)
    ops.call("select_topk", backend, (logits, topk, ks, ke), (out,))
    return out


def lightning_topk(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    topk: int,
    ks: Tensor,
    ke: Tensor,
    *,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    block_table: Tensor | None = None,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """:func:`select_topk` of :func:`index_logits`, without ever holding ``[s_q, s_kv]``.

    Queries are scored and selected in chunks that fit ``workspace_bytes``, one query at least; the
    size of the chunks never changes the selection, given the same logits.

    Args: see the two functions; ``workspace_bytes`` bounds the temporary memory ("reference" keeps
        all logits and ignores it).

    Returns:
        ``[s_q, topk]`` int32 positions, ascending, -1 padded.
    """
    _check_topk(topk)
    keys, _ = _check_index_inputs(q, k, weights, ks, ke, q_scale, k_scale, block_table, backend)
    if workspace_bytes <= 0:
        raise ValueError(f"workspace_bytes: expected a positive number of bytes, got {workspace_bytes}")
    out = _output("out", out, {"s_q": q.shape[0], "topk": topk}, torch.int32, q.device)
    inputs = (q, keys.k, weights, topk, ks, ke, *keys[1:], workspace_bytes)
    ops.call("lightning_topk", backend, inputs, (out,))
    return out


def physical_slots(
    indices: Tensor, block_table: Tensor, page_size: int, *, out: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Positions in a sequence to slots of a paged cache, ``page * page_size + offset``.

    What :func:`lightning_topk` selects through a block table becomes what :func:`sparse_mla` reads.

    Args:
        indices: ``[s_q, topk]`` int32 positions.
        block_table: ``[n, max_pages]`` int32, s_q a multiple of n; consecutive queries share a row.
        page_size: tokens a page.
        out: ``[s_q, topk]`` int32 to fill.

    Returns:
        ``[s_q, topk]`` int32; -1 where the position is negative or beyond the table, and where the
        table holds a negative page or one whose slots int32 cannot number.
    """
    dims: dict[str, int] = {}
    _check("indices", indices, "s_q topk", dims, (torch.int32,))
    _check_block_table(block_table, dims, indices.shape[0], indices.device)
    if isinstance(page_size, bool) or not isinstance(page_size, int) or page_size < 1:
        raise ValueError(f"page_size: expected a positive int, got {page_size!r}")
    _check_call(backend, indices.device)
    dims = {"s_q": indices.shape[0], "topk": indices.shape[1]}
    out = _output("out", out, dims, torch.int32, indices.device)
    ops.call("physical_slots", backend, (indices, block_table, page_size), (out,))
    return out


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
        kv: ``[tokens, 576]`` for 656 bytes a token (the latent, and the key's RoPE dimensions, which the
            norm leaves out), ``[tokens, 512]`` for 584 (RoPE dimensions last); bf16, fp16 or fp32.
        cache: uint8 with 656 or 584 bytes a token, in a shape that :func:`sparse_mla` reads; filled in place.
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
    if cache.shape[-1:] not in ((656,), (584,)):
        raise ValueError(
            f"cache: expected 656 or 584 bytes a token as the last dimension, got {list(cache.shape)}"
        )
    fmt = KV_FORMATS[cache.shape[-1]]
    dims: dict[str, int] = {}
    _check("kv", kv, f"tokens {fmt.width}", dims, WRITER_FLOATS)
    cache = _quantised_pages("cache", cache, fmt, kv.device)
    fmt.check_in_place("cache", cache)
    if fmt.bytes == 584 and not power_of_two:
        raise ValueError("power_of_two: expected True, as cache has 584 bytes a token, got False")
    if norm_weight is not None:
        _check("norm_weight", norm_weight, "512", dims, WRITER_FLOATS, kv.device)
    _check_slots(slots, dims, kv.device)
    _check_rope(cos, sin, pairing, "32", 64, dims, kv.device)
    _check_scale(min_scale)
    _check_call(backend, kv.device, kv, norm_weight)
    inputs = (kv, slots, norm_weight, eps, cos, sin, pairing, power_of_two, min_scale)
    ops.call("write_kv", backend, inputs, (cache,))


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
    _check("k", k, "tokens 128", dims, WRITER_FLOATS)
    _check("cache", cache, "pages page_size 132", dims, (torch.uint8,), k.device)
    INDEX_K_FORMATS[132].check_in_place("cache", cache)
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError("norm_weight and norm_bias: expected both or neither")
    if norm_weight is not None:
        _check("norm_weight", norm_weight, "128", dims, WRITER_FLOATS, k.device)
        _check("norm_bias", norm_bias, "128", dims, WRITER_FLOATS, k.device)
    _check_slots(slots, dims, k.device)
    _check_rope(cos, sin, pairing, "half_rope_dim", 128, dims, k.device)
    _check_scale(min_scale)
    _check_call(backend, k.device, k, norm_weight, norm_bias)
    inputs = (k, slots, norm_weight, norm_bias, eps, cos, sin, pairing, hadamard, power_of_two, min_scale)
    ops.call("write_index_k", backend, inputs, (cache,))


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
    _check("q", q, "tokens index_n_heads index_head_dim", dims, WRITER_FLOATS)
    d = q.shape[2]
    if d < 16 or d & (d - 1):
        raise ValueError(f"q: expected a power of two from 16 on as index_head_dim, got {d}")
    _check("weights", weights, "tokens index_n_heads", dims, (torch.float32,), q.device)
    _check_rope(cos, sin, pairing, "half_rope_dim", d, dims, q.device)
    _check_scale(min_scale)
    _check_call(backend, q.device, q, weights)
    if out is not None and (not isinstance(out, tuple) or len(out) != 2):
        raise TypeError(f"out: expected the pair (q, weights), got {type(out).__name__}")
    out_q, out_weights = out or (None, None)
    shape = {"tokens": q.shape[0], "index_n_heads": q.shape[1]}
    out_weights = _output("out weights", out_weights, shape, torch.float32, q.device)
    out_q = _output("out q", out_q, {**shape, "index_head_dim": d}, torch.float8_e4m3fn, q.device)
    inputs = (q, weights, cos, sin, pairing, hadamard, power_of_two, min_scale)
    ops.call("quantise_index_q", backend, inputs, (out_q.view(torch.uint8), out_weights))
    return out_q, out_weights


def sparse_mla(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    *,
    d_v: int = 512,
    softmax_scale: float | None = None,
    topk_length: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_kv: Tensor | None = None,
    extra_indices: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
    return_lse: bool = False,
    return_max_logits: bool = False,
    out: Tensor | tuple[Tensor, ...] | None = None,
    backend: str = "auto",
    variant: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Multi-head latent attention in absorbed form over the selected tokens of each query.

    Every head reads the same latent row; its first ``d_v`` values are the value. Rows that are not
    selected never reach a result, whatever they hold.

    Args:
        q: ``[s_q, h_q, d_qk]``, bf16, fp16, fp32 or fp64.
        kv: ``[s_kv, d_qk]`` in q's dtype, or a paged cache ``[pages, page_size, d_qk]`` or
            ``[pages, page_size, 1, d_qk]`` without gaps between pages, addressed by physical slot
            ``page * page_size + offset``. Or quantised, uint8 with 656 bytes in place of d_qk = 576, or
            584 (in pages only), 528 or 288 in place of d_qk = 512 (:mod:`sparse_attn.formats`); d_v is then
            512, and pages may have any distance.
        indices: ``[s_q, topk]`` int32. Any index < 0 or >= s_kv is ignored, wherever it stands; a
            duplicate counts twice.
        d_v: size of the value, at most d_qk; 512 with a quantised cache.
        softmax_scale: default ``d_qk ** -0.5``. Models use the scale of the unabsorbed head.
        topk_length: ``[s_q]`` int32, cuts each row of indices.
        attn_sink: ``[h_q]`` fp32, a logit that enters the denominator only.
        extra_kv, extra_indices, extra_topk_length: a second segment in the same softmax, of the same d_qk;
            it may be quantised otherwise than kv, or not at all.
        return_lse: also return the log of the softmax's denominator.
        return_max_logits: also return the highest logit, ``softmax_scale * q . kv``.
        out: the tensor to fill, or the tuple of those that are returned.
        variant: None, or "warp_specialized" for the triton kernel written for sm_90 (Hopper). **That one
            has never run on a GPU**, so it is never chosen by itself. It takes bf16, d_qk = 576,
            d_v = 512, h_q a multiple of 64, a positive scale, and rows of q, kv and out that are
            contiguous and begin at multiples of 32 bytes; the rest is refused.

    Returns:
        out ``[s_q, h_q, d_v]`` in q's dtype, then what was asked for, ``[s_q, h_q]`` fp32 (fp64 with
        fp64 q): lse, natural log, and max_logits, both without the sink. A query with nothing to attend
        to has out = 0 and both -inf.

    Source: DeepSeek-V2 report, section 2.1; the argument names are FlashMLA's.
    """
    dims: dict[str, int] = {}
    _check("q", q, "s_q h_q d_qk", dims, FLOATS)
    kv = _check_latent("kv", kv, dims, q, d_v)
    _check_selection("indices", indices, "s_q topk", "topk_length", topk_length, dims, q.device)
    if not 1 <= d_v <= q.shape[2]:
        raise ValueError(f"d_v: expected 1 to d_qk={q.shape[2]}, got {d_v}")
    _check_sink(attn_sink, dims, q.device)
    if (extra_kv is None) != (extra_indices is None):
        raise ValueError("extra_kv and extra_indices: expected both or neither")
    if extra_kv is not None:
        extra_dims = {name: size for name, size in dims.items() if name in ("s_q", "d_qk")}
        extra_kv = _check_latent("extra_kv", extra_kv, extra_dims, q, d_v)
        _check_selection(
            "extra_indices",
            extra_indices,
            "s_q extra_topk",
            "extra_topk_length",
            extra_topk_length,
            extra_dims,
            q.device,
        )
    elif extra_topk_length is not None:
        raise ValueError("extra_topk_length: expected None without extra_kv")
    _check_call(backend, q.device, q, kv, attn_sink, extra_kv)
    if _runs_triton(backend, q.device):
        _check_triton_latent("kv", kv, q)
        _check_triton_latent("extra_kv", extra_kv, q)
    asked = {"lse": return_lse, "max_logits": return_max_logits}
    outputs = _attention_outputs(out, q, d_v, asked)
    scale = q.shape[2] ** -0.5 if softmax_scale is None else float(softmax_scale)
    inputs = (q, kv, indices, d_v, scale, topk_length, attn_sink)
    name = "sparse_mla"
    if variant is not None:
        _check_warp_specialized(variant, backend, q, kv, extra_kv, d_v, scale, outputs[0])
        name, backend = "sparse_mla_hopper", "triton"
    ops.call(name, backend, (*inputs, extra_kv, extra_indices, extra_topk_length), outputs)
    if not (return_lse or return_max_logits):
        return outputs[0]
    return outputs[0], *(tensor for tensor, wanted in zip(outputs[1:], asked.values(), strict=True) if wanted)


def sparse_gqa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    *,
    softmax_scale: float | None = None,
    topk_length: Tensor | None = None,
    attn_sink: Tensor | None = None,
    return_lse: bool = False,
    out: Tensor | tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Grouped-query attention over the selected tokens of each query (multi-query when h_kv is 1).

    Args:
        q: ``[s_q, h_q, d]``, bf16, fp16, fp32 or fp64; h_q a multiple of h_kv.
        k, v: ``[s_kv, h_kv, d]`` and ``[s_kv, h_kv, d_v]`` in q's dtype.
        indices: ``[s_q, topk]`` int32, shared by all heads, or ``[s_q, h_kv, topk]``.
        softmax_scale: default ``d ** -0.5``.
        topk_length, attn_sink, return_lse, out: as in :func:`sparse_mla`.

    Returns:
        out ``[s_q, h_q, d_v]`` in q's dtype, and with ``return_lse`` lse ``[s_q, h_q]``.
    """
    dims: dict[str, int] = {}
    _check("q", q, "s_q h_q d", dims, FLOATS)
    _check("k", k, "s_kv h_kv d", dims, (q.dtype,), q.device)
    _check("v", v, "s_kv h_kv d_v", dims, (q.dtype,), q.device)
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"q: expected h_q to be a multiple of k's h_kv={k.shape[1]}, got h_q={q.shape[1]}")
    per_head = isinstance(indices, Tensor) and indices.dim() == 3
    spec = "s_q h_kv topk" if per_head else "s_q topk"
    _check_selection("indices", indices, spec, "topk_length", topk_length, dims, q.device)
    _check_sink(attn_sink, dims, q.device)
    _check_call(backend, q.device, q, k, v, attn_sink)
    out, lse = _attention_outputs(out, q, v.shape[2], {"lse": return_lse})
    scale = q.shape[2] ** -0.5 if softmax_scale is None else float(softmax_scale)
    ops.call("sparse_gqa", backend, (q, k, v, indices, scale, topk_length, attn_sink), (out, lse))
    return (out, lse) if return_lse else out


def merge_attention(
    outs: Tensor | Sequence[Tensor],
    lses: Tensor | Sequence[Tensor],
    *,
    out: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Join attention over disjoint sets of keys into attention over their union.

    Args:
        outs: n partial outputs ``[s_q, h, d_v]``, or one tensor ``[n, s_q, h, d_v]``.
        lses: their n natural-log lses ``[s_q, h]`` fp32 (fp64 with fp64 outs), or ``[n, s_q, h]``.
            A part with lse = -inf is empty and its out is not read. Parts must be without a sink.
        out: the pair (out, lse) to fill.

    Returns:
        out ``[s_q, h, d_v]`` in outs' dtype and lse ``[s_q, h]``.
    """
    outs, lses = _stack("outs", outs), _stack("lses", lses)
    dims: dict[str, int] = {}
    _check("outs", outs, "n s_q h d_v", dims, FLOATS)
    _check("lses", lses, "n s_q h", dims, (compute_dtype(outs.dtype),), outs.device)
    _check_call(backend, outs.device, outs, lses)
    merged, lse = _attention_outputs(out, outs, outs.shape[3], {"lse": True})
    ops.call("merge_attention", backend, (outs, lses), (merged, lse))
    return merged, lse


# Checks. ``dims`` collects the size that each name was first seen with, so that a later tensor
# which disagrees is told what was expected of it.


def _check(
    name: str,
    tensor: Tensor,
    spec: str,
    dims: dict[str, int],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device | None = None,
) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor [{_named(spec, dims)}], got {type(tensor).__name__}")
    axes, shape = spec.split(), tensor.shape
    fits = len(axes) == len(shape)
    for axis, n in zip(axes, shape, strict=False):  # a generator would cost more than the rest of a check
        fits = fits and n == (int(axis) if axis.isdigit() else dims.get(axis, n))
    if not fits:
        raise ValueError(f"{name}: expected shape [{_named(spec, dims)}], got {list(shape)}")
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected dtype {expected}, got {str(tensor.dtype).removeprefix('torch.')}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, got {tensor.device}")
    dims.update(zip(axes, shape, strict=True))


def _named(spec: str, dims: dict[str, int]) -> str:
    return ", ".join(
        f"{axis}={dims[axis]}" if axis in dims and not axis.isdigit() else axis for axis in spec.split()
    )


class _IndexKeys(NamedTuple):
    """Where the keys are, and the scales of both operands, as the ops take them."""

    k: Tensor  # values [s_kv, ...] or [pages, page_size, ...], whatever they came in
    q_scale: Tensor | None  # [s_q, index_n_heads, 4] ue8m0 bytes
    k_scale: Tensor | None  # [...] fp32, or [..., 4] ue8m0 bytes
    block_table: Tensor | None


def _check_index_inputs(
    q, k, weights, ks, ke, q_scale, k_scale, block_table, backend: str
) -> tuple[_IndexKeys, int]:
    """The keys and scales for the op, and the width of a row of logits."""
    dims: dict[str, int] = {}
    q_scale = _check_index_q(q, q_scale, dims)
    k, k_scale, block_table = _check_index_k(k, k_scale, block_table, q, dims)
    _check("weights", weights, "s_q index_n_heads", dims, (compute_dtype(q.dtype),), q.device)
    _check_ranges(ks, ke, dims, q.device)
    _check_call(backend, q.device, q, k, weights)
    if _runs_triton(backend, q.device) and q.dtype == torch.float16 and k.dtype == torch.uint8:
        raise TypeError("q: expected bfloat16 or float32, as k is e2m1, got float16 (triton backend)")
    width = k.shape[0]
    if block_table is not None:
        _check_block_table(block_table, dims, q.shape[0], q.device)
        width = block_table.shape[1] * k.shape[1]
    return _IndexKeys(k, q_scale, k_scale, block_table), width


def _check_index_q(q: Tensor, q_scale: Tensor | None, dims: dict[str, int]) -> Tensor | None:
    """The scales of q, in bytes."""
    if isinstance(q, Tensor) and q.dtype == torch.uint8:
        _check("q", q, f"s_q index_n_heads {E2M1_WIDTH // 2}", dims, (torch.uint8,))
        dims["index_head_dim"] = E2M1_WIDTH
        _check("q_scale", q_scale, "s_q index_n_heads", dims, (torch.int32,), q.device)
        return _ue8m0_bytes(q_scale)
    _check("q", q, "s_q index_n_heads index_head_dim", dims, (*FLOATS, torch.float8_e4m3fn))
    if q_scale is not None:
        raise ValueError("q_scale: expected None, as q is not e2m1 (scales of e4m3 go into weights)")
    return None


def _check_index_k(k, k_scale, block_table, q: Tensor, dims: dict[str, int]):
    """k, its scales and the block table as the ops take them; a packed cache becomes views of its parts."""
    dtype = k.dtype if isinstance(k, Tensor) else None
    if dtype == torch.uint8 and k_scale is None:
        fmt = format_of("k", k, INDEX_K_FORMATS)
        _check("k", k, f"pages page_size {fmt.bytes}", dims, (torch.uint8,), q.device)
        _check_format("k", k, fmt, dims["index_head_dim"], "index_head_dim")
        if block_table is None:
            block_table = torch.arange(k.shape[0], dtype=torch.int32, device=k.device)[None]
        return *fmt.views(k), block_table
    rows = "s_kv" if block_table is None else "pages page_size"
    if dtype == torch.uint8:
        if dims["index_head_dim"] != E2M1_WIDTH:
            raise ValueError(
                f"q: expected index_head_dim={E2M1_WIDTH}, as k is e2m1, got {dims['index_head_dim']}"
            )
        _check("k", k, f"{rows} {E2M1_WIDTH // 2}", dims, (torch.uint8,), q.device)
        _check("k_scale", k_scale, rows, dims, (torch.int32,), q.device)
        return k, _ue8m0_bytes(k_scale), block_table
    if dtype == torch.float8_e4m3fn:
        _check("k", k, f"{rows} index_head_dim", dims, (torch.float8_e4m3fn,), q.device)
        _check("k_scale", k_scale, rows, dims, (torch.float32,), q.device)
        return k, k_scale, block_table
    if q.dtype not in FLOATS:
        kind = type(k).__name__ if dtype is None else str(dtype).removeprefix("torch.")
        raise TypeError(f"k: expected quantised keys (float8_e4m3fn or uint8), as q is quantised, got {kind}")
    _check("k", k, f"{rows} index_head_dim", dims, (q.dtype,), q.device)
    if k_scale is not None:
        raise ValueError("k_scale: expected None, as k is not quantised")
    return k, None, block_table


def _ue8m0_bytes(scales: Tensor) -> Tensor:
    """``[..., 4]`` uint8 of int32 scales, the low byte first; a view."""
    return scales[..., None].view(torch.uint8)


def _check_block_table(block_table: Tensor, dims: dict[str, int], s_q: int, device: torch.device) -> None:
    _check("block_table", block_table, "n max_pages", dims, (torch.int32,), device)
    n = block_table.shape[0]
    if (n == 0 and s_q > 0) or (n > 0 and s_q % n):
        raise ValueError(f"block_table: expected a number of rows that divides s_q={s_q}, got {n}")


def _check_format(name: str, cache: Tensor, fmt: Format, width: int, width_name: str) -> None:
    if width != fmt.width:
        raise ValueError(
            f"q: expected {width_name}={fmt.width}, as {name} has {fmt.bytes} bytes a token, got {width}"
        )
    fmt.check_in_place(name, cache)


def _check_ranges(ks: Tensor, ke: Tensor, dims: dict[str, int], device: torch.device) -> None:
    _check("ks", ks, "s_q", dims, (torch.int32,), device)
    _check("ke", ke, "s_q", dims, (torch.int32,), device)


def _check_slots(slots: Tensor, dims: dict[str, int], device: torch.device) -> None:
    _check("slots", slots, "tokens", dims, (torch.int32, torch.int64), device)


def _check_rope(cos, sin, pairing, columns: str, d: int, dims: dict[str, int], device) -> None:
    """cos and sin of a rotation of at most d dimensions, or neither."""
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin: expected both or neither")
    if cos is None:
        return
    _check("cos", cos, f"tokens {columns}", dims, (torch.float32,), device)
    _check("sin", sin, f"tokens {columns}", dims, (torch.float32,), device)
    if 2 * cos.shape[1] > d:
        raise ValueError(f"cos: expected at most {d // 2} columns, got {cos.shape[1]}")
    if pairing not in PAIRINGS:
        raise ValueError(f"pairing: expected 'half' or 'interleaved' with cos, got {pairing!r}")


def _check_scale(min_scale: float) -> None:
    if not min_scale > 0:
        raise ValueError(f"min_scale: expected a positive number, got {min_scale}")


def _check_topk(topk: int) -> None:
    if isinstance(topk, bool | Tensor | float):
        raise TypeError(f"topk: expected an int, got {type(topk).__name__}")
    if topk < 1:
        raise ValueError(f"topk: expected at least 1, got {topk}")


def _check_selection(name, indices, spec, length_name, length, dims, device) -> None:
    _check(name, indices, spec, dims, (torch.int32,), device)
    if length is not None:
        _check(length_name, length, "s_q", dims, (torch.int32,), device)


def _check_sink(attn_sink: Tensor | None, dims: dict[str, int], device: torch.device) -> None:
    if attn_sink is not None:
        _check("attn_sink", attn_sink, "h_q", dims, (torch.float32,), device)


def _check_call(backend: str, device: torch.device, *tensors: Tensor | None) -> None:
    ops.check_backend(backend, device)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ValueError(
            "gradients: sparse_attn is for inference and has no backward, but an input requires grad; "
            "call it under torch.no_grad() or torch.inference_mode()"
        )
    if _runs_triton(backend, device) and any(t is not None and t.dtype == torch.float64 for t in tensors):
        raise TypeError("dtype: the triton backend takes bfloat16, float16 or float32, got float64")


def _runs_triton(backend: str, device: torch.device) -> bool:
    return backend == "triton" or (backend == "auto" and device.type == "cuda")


def _check_triton_latent(name: str, kv: Tensor | None, q: Tensor) -> None:
    if kv is None or kv.dtype != torch.uint8:
        return
    if kv.shape[-1] not in TRITON_KV_BYTES:
        sizes = " or ".join(map(str, TRITON_KV_BYTES))
        raise ValueError(
            f"{name}: the triton backend reads {sizes} bytes a token, got {kv.shape[-1]}; unpack it"
        )
    if q.dtype == torch.float16:  # a value times its scale need not fit
        raise TypeError(
            f"q: expected bfloat16 or float32, as {name} is quantised, got float16 (triton backend)"
        )


def _check_warp_specialized(variant, backend, q, kv, extra_kv, d_v, scale, out) -> None:
    if variant != "warp_specialized":
        raise ValueError(f"variant: expected None or 'warp_specialized', got {variant!r}")
    if backend not in ("auto", "triton") or q.device.type != "cuda":
        raise ValueError(
            f"variant: {variant!r} needs backend 'triton' and cuda tensors, got {backend!r} and {q.device}"
        )
    major, minor = torch.cuda.get_device_capability(q.device)
    if (major, minor) != (9, 0):
        raise ValueError(f"variant: {variant!r} needs sm_90, {q.device} is sm_{major}{minor}")
    _, h_q, d_qk = q.shape
    if h_q % 64:
        raise ValueError(f"q: expected h_q to be a multiple of 64 for {variant!r}, got {h_q}")
    if (d_qk, d_v) != (576, 512):
        raise ValueError(f"q, d_v: expected d_qk=576 and d_v=512 for {variant!r}, got {d_qk} and {d_v}")
    if not scale > 0:
        raise ValueError(f"softmax_scale: expected a positive number for {variant!r}, got {scale}")
    for name, tensor in (("q", q), ("kv", kv), ("extra_kv", extra_kv), ("out", out)):
        if tensor is None:
            continue
        if tensor.dtype != torch.bfloat16:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise TypeError(f"{name}: expected dtype bfloat16 for {variant!r}, got {dtype}")
        if tensor.stride(-1) != 1 or any(n % 16 for n in (tensor.storage_offset(), *tensor.stride()[:-1])):
            raise ValueError(
                f"{name}: expected contiguous rows that begin at multiples of 32 bytes for {variant!r}, "
                f"got strides {tensor.stride()} and offset {tensor.storage_offset()}"
            )
    for name, tensor in (("kv", kv), ("extra_kv", extra_kv)):
        if tensor is not None and tensor.shape[0] * tensor.stride(0) >= 2**36:
            raise ValueError(f"{name}: expected less than 128 GiB for {variant!r}, got {list(tensor.shape)}")


def _check_latent(name: str, kv: Tensor, dims: dict[str, int], q: Tensor, d_v: int) -> Tensor:
    """kv as the ops take it: rows ``[slots, d_qk]`` or pages ``[pages, page_size, bytes]``, never a copy."""
    if isinstance(kv, Tensor) and kv.dtype == torch.uint8:
        return _check_quantised_latent(name, kv, q, d_v)
    specs = {3: "pages page_size d_qk", 4: "pages page_size 1 d_qk"}
    spec = specs.get(kv.dim(), "s_kv d_qk") if isinstance(kv, Tensor) else "s_kv d_qk"
    _check(name, kv, spec, dict(dims), (q.dtype,), q.device)
    if kv.dim() == 2:
        return kv
    if kv.dim() == 4:
        kv = kv.squeeze(2)
    pages, page_size, size = kv.shape
    if page_size == 1:  # whose stride says nothing
        return kv[:, 0]
    if pages > 1 and kv.stride(0) != page_size * kv.stride(1):
        raise ValueError(
            f"{name}: expected pages that follow each other without gaps, got strides {kv.stride()}; "
            "a slot number could not address it without a copy of the cache"
        )
    return kv.as_strided((pages * page_size, size), kv.stride()[1:])


def _check_quantised_latent(name: str, kv: Tensor, q: Tensor, d_v: int) -> Tensor:
    fmt = format_of(name, kv, KV_FORMATS)
    kv = _quantised_pages(name, kv, fmt, q.device)
    _check_format(name, kv, fmt, q.shape[2], "d_qk")
    if d_v != QUANTISED_D_V:
        raise ValueError(f"d_v: expected {QUANTISED_D_V}, as {name} is quantised, got {d_v}")
    return kv


def _quantised_pages(name: str, kv: Tensor, fmt: Format, device: torch.device) -> Tensor:
    """A view ``[pages, page_size, bytes]`` of a cache in any of its shapes."""
    specs = {2: f"s_kv {fmt.bytes}", 3: f"pages page_size {fmt.bytes}", 4: f"pages page_size 1 {fmt.bytes}"}
    rank = kv.dim() if kv.dim() in specs and not (fmt.by_page and kv.dim() == 2) else 3
    _check(name, kv, specs[rank], {}, (torch.uint8,), device)
    if rank == 2:
        return kv[:, None]  # pages of one token
    return kv.squeeze(2) if rank == 4 else kv


def _stack(name: str, parts: Tensor | Sequence[Tensor]) -> Tensor:
    if isinstance(parts, Tensor):
        return parts
    if not isinstance(parts, Sequence) or not parts or not all(isinstance(p, Tensor) for p in parts):
        raise TypeError(f"{name}: expected a tensor or a non-empty sequence of tensors, got {parts!r:.80}")
    if any(p.shape != parts[0].shape for p in parts):
        shapes = ", ".join(str(list(p.shape)) for p in parts)
        raise ValueError(f"{name}: expected parts of one shape, got {shapes}")
    return torch.stack(list(parts))


def _output(
    name: str, out: Tensor | None, dims: dict[str, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    if out is None:
        return torch.empty(tuple(dims.values()), dtype=dtype, device=device)
    _check(name, out, " ".join(dims), dims, (dtype,), device)
    return out


def _attention_outputs(out, q: Tensor, d_v: int, asked: dict[str, bool]) -> tuple[Tensor, ...]:
    """What the op fills: out ``[s_q, h_q, d_v]``, and one ``[s_q, h_q]`` for each name of ``asked``.

    The caller may own those that it asked for: ``out`` is then the first of them, or the tuple of all.
    """
    returned = ["out", *(name for name, wanted in asked.items() if wanted)]
    if out is None or len(returned) == 1:
        out = (out,)
    elif not isinstance(out, tuple) or len(out) != len(returned):
        got = f"{len(out)} of them" if isinstance(out, tuple) else type(out).__name__
        raise TypeError(f"out: expected the tuple ({', '.join(returned)}), as these are returned, got {got}")
    given = dict(zip(returned, out, strict=False))
    dims = {"s_q": q.shape[-3], "h_q": q.shape[-2]}
    result = _output("out", given.get("out"), {**dims, "d_v": d_v}, q.dtype, q.device)
    dtype = compute_dtype(q.dtype)
    return result, *(_output(name, given.get(name), dims, dtype, q.device) for name in asked)
