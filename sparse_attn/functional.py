"""The public functions: check every argument, allocate the outputs, call the op.

Shapes use these names: ``s_q`` query tokens and ``s_kv`` key tokens (packed: all sequences of a
batch one after the other), ``h_q`` and ``h_kv`` heads, ``d`` sizes of a head, ``topk`` columns of
an index row. Wrong arguments raise TypeError (not a tensor, wrong dtype) or ValueError (shape,
device, range, gradients) before anything runs.

``backend`` is "auto" (by device: cpu or triton), "cpu", "triton" or "reference"; an explicit
choice is obeyed or refused, never replaced. fp64 runs on "cpu" and "reference".
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops
from .checks import (
    FLOATS,
    WRITER_FLOATS,
    check_attention_outputs,
    check_block_table,
    check_call,
    check_index_inputs,
    check_latent,
    check_output,
    check_parts,
    check_quantised_pages,
    check_ranges,
    check_rope,
    check_scale,
    check_selection,
    check_sink,
    check_slots,
    check_tensor,
    check_topk,
    check_triton_latent,
    check_warp_specialized,
    runs_triton,
)
from .formats import FP8_MIN_SCALE, INDEX_K_FORMATS, KV_FORMATS
from .reference import compute_dtype

DEFAULT_WORKSPACE_BYTES = 256 << 20

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
    keys, width = check_index_inputs(q, k, weights, ks, ke, q_scale, k_scale, block_table, backend)
    out = check_output("out", out, {"s_q": q.shape[0], "width": width}, compute_dtype(q.dtype), q.device)
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
    check_topk(topk)
    dims: dict[str, int] = {}
    check_tensor("logits", logits, "s_q s_kv", dims, (torch.float32, torch.float64))
    check_ranges(ks, ke, dims, logits.device)
    check_call(backend, logits.device, logits)
    out = check_output("out", out, {"s_q": logits.shape[0], "topk": topk}, torch.int32, logits.device)
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
    check_topk(topk)
    keys, _ = check_index_inputs(q, k, weights, ks, ke, q_scale, k_scale, block_table, backend)
    if workspace_bytes <= 0:
        raise ValueError(f"workspace_bytes: expected a positive number of bytes, got {workspace_bytes}")
    out = check_output("out", out, {"s_q": q.shape[0], "topk": topk}, torch.int32, q.device)
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
    check_tensor("indices", indices, "s_q topk", dims, (torch.int32,))
    check_block_table(block_table, dims, indices.shape[0], indices.device)
    if isinstance(page_size, bool) or not isinstance(page_size, int) or page_size < 1:
        raise ValueError(f"page_size: expected a positive int, got {page_size!r}")
    check_call(backend, indices.device)
    dims = {"s_q": indices.shape[0], "topk": indices.shape[1]}
    out = check_output("out", out, dims, torch.int32, indices.device)
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
    check_tensor("kv", kv, f"tokens {fmt.width}", dims, WRITER_FLOATS)
    cache = check_quantised_pages("cache", cache, fmt, kv.device)
    fmt.check_in_place("cache", cache)
    if fmt.bytes == 584 and not power_of_two:
        raise ValueError("power_of_two: expected True, as cache has 584 bytes a token, got False")
    if norm_weight is not None:
        check_tensor("norm_weight", norm_weight, "512", dims, WRITER_FLOATS, kv.device)
    check_slots(slots, dims, kv.device)
    check_rope(cos, sin, pairing, "32", 64, dims, kv.device)
    check_scale(min_scale)
    check_call(backend, kv.device, kv, norm_weight)
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
    check_tensor("k", k, "tokens 128", dims, WRITER_FLOATS)
    check_tensor("cache", cache, "pages page_size 132", dims, (torch.uint8,), k.device)
    INDEX_K_FORMATS[132].check_in_place("cache", cache)
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError("norm_weight and norm_bias: expected both or neither")
    if norm_weight is not None:
        check_tensor("norm_weight", norm_weight, "128", dims, WRITER_FLOATS, k.device)
        check_tensor("norm_bias", norm_bias, "128", dims, WRITER_FLOATS, k.device)
    check_slots(slots, dims, k.device)
    check_rope(cos, sin, pairing, "half_rope_dim", 128, dims, k.device)
    check_scale(min_scale)
    check_call(backend, k.device, k, norm_weight, norm_bias)
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
    check_tensor("q", q, "tokens index_n_heads index_head_dim", dims, WRITER_FLOATS)
    d = q.shape[2]
    if d < 16 or d & (d - 1):
        raise ValueError(f"q: expected a power of two from 16 on as index_head_dim, got {d}")
    check_tensor("weights", weights, "tokens index_n_heads", dims, (torch.float32,), q.device)
    check_rope(cos, sin, pairing, "half_rope_dim", d, dims, q.device)
    check_scale(min_scale)
    check_call(backend, q.device, q, weights)
    if out is not None and (not isinstance(out, tuple) or len(out) != 2):
        raise TypeError(f"out: expected the pair (q, weights), got {type(out).__name__}")
    out_q, out_weights = out or (None, None)
    shape = {"tokens": q.shape[0], "index_n_heads": q.shape[1]}
    out_weights = check_output("out weights", out_weights, shape, torch.float32, q.device)
    out_q = check_output("out q", out_q, {**shape, "index_head_dim": d}, torch.float8_e4m3fn, q.device)
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
    check_tensor("q", q, "s_q h_q d_qk", dims, FLOATS)
    kv = check_latent("kv", kv, dims, q, d_v)
    check_selection("indices", indices, "s_q topk", "topk_length", topk_length, dims, q.device)
    if not 1 <= d_v <= q.shape[2]:
        raise ValueError(f"d_v: expected 1 to d_qk={q.shape[2]}, got {d_v}")
    check_sink(attn_sink, dims, q.device)
    if (extra_kv is None) != (extra_indices is None):
        raise ValueError("extra_kv and extra_indices: expected both or neither")
    if extra_kv is not None:
        extra_dims = {name: size for name, size in dims.items() if name in ("s_q", "d_qk")}
        extra_kv = check_latent("extra_kv", extra_kv, extra_dims, q, d_v)
        check_selection(
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
    check_call(backend, q.device, q, kv, attn_sink, extra_kv)
    if runs_triton(backend, q.device):
        check_triton_latent("kv", kv, q)
        check_triton_latent("extra_kv", extra_kv, q)
    asked = {"lse": return_lse, "max_logits": return_max_logits}
    outputs = check_attention_outputs(out, q, d_v, asked)
    scale = q.shape[2] ** -0.5 if softmax_scale is None else float(softmax_scale)
    inputs = (q, kv, indices, d_v, scale, topk_length, attn_sink)
    name = "sparse_mla"
    if variant is not None:
        check_warp_specialized(variant, backend, q, kv, extra_kv, d_v, scale, outputs[0])
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
    check_tensor("q", q, "s_q h_q d", dims, FLOATS)
    check_tensor("k", k, "s_kv h_kv d", dims, (q.dtype,), q.device)
    check_tensor("v", v, "s_kv h_kv d_v", dims, (q.dtype,), q.device)
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"q: expected h_q to be a multiple of k's h_kv={k.shape[1]}, got h_q={q.shape[1]}")
    per_head = isinstance(indices, Tensor) and indices.dim() == 3
    spec = "s_q h_kv topk" if per_head else "s_q topk"
    check_selection("indices", indices, spec, "topk_length", topk_length, dims, q.device)
    check_sink(attn_sink, dims, q.device)
    check_call(backend, q.device, q, k, v, attn_sink)
    out, lse = check_attention_outputs(out, q, v.shape[2], {"lse": return_lse})
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
    outs, lses = check_parts("outs", outs), check_parts("lses", lses)
    dims: dict[str, int] = {}
    check_tensor("outs", outs, "n s_q h d_v", dims, FLOATS)
    check_tensor("lses", lses, "n s_q h", dims, (compute_dtype(outs.dtype),), outs.device)
    check_call(backend, outs.device, outs, lses)
    merged, lse = check_attention_outputs(out, outs, outs.shape[3], {"lse": True})
    ops.call("merge_attention", backend, (outs, lses), (merged, lse))
    return merged, lse
