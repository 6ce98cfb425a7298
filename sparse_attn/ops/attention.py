"""Attention over selected rows, MLA and grouped-query, and the merge of partial results.

Names of sizes, errors and ``backend`` are those of :mod:`sparse_attn.ops.index`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, TypedDict, overload

import torch
from torch import Tensor

from ..formats import KV_FORMATS, format_of
from ..reference import compute_dtype
from . import call, check, register
from .check import FLOATS, INT32
from .records import Output

QUANTISED_D_V = 512  # of every latent format


@register("sparse_mla")
class SparseMLAOp(NamedTuple):
    q: Tensor  # [s_q, h_q, d_qk]
    kv: Tensor  # rows [slots, d_qk]; or pages at any distance, [pages, page_size, d_qk] or quantised (uint8)
    indices: Tensor  # [s_q, topk] int32
    d_v: int
    softmax_scale: float
    out: Output  # [s_q, h_q, d_v]
    lse: Output  # [s_q, h_q]
    max_logits: Output  # [s_q, h_q]
    topk_length: Tensor | None = None  # [s_q] int32
    attn_sink: Tensor | None = None  # [h_q] fp32
    extra_kv: Tensor | None = None  # as kv
    extra_indices: Tensor | None = None  # [s_q, extra_topk] int32
    extra_topk_length: Tensor | None = None  # [s_q] int32
    kv_format: str | None = None  # a name of KV_FORMATS if kv is quantised, else None
    extra_kv_format: str | None = None
    batch_invariant: bool = False


@register("sparse_gqa")
class SparseGQAOp(NamedTuple):
    q: Tensor  # [s_q, h_q, d]
    k: Tensor  # [s_kv, h_kv, d]
    v: Tensor  # [s_kv, h_kv, d_v]
    indices: Tensor  # [s_q, topk] or [s_q, h_kv, topk] int32
    softmax_scale: float
    out: Output  # [s_q, h_q, d_v]
    lse: Output  # [s_q, h_q]
    topk_length: Tensor | None = None  # [s_q] int32
    attn_sink: Tensor | None = None  # [h_q] fp32
    batch_invariant: bool = False


@register("merge_attention")
class MergeAttentionOp(NamedTuple):
    outs: Tensor  # [n, s_q, h, d_v]
    lses: Tensor  # [n, s_q, h]
    out: Output  # [s_q, h, d_v]
    lse: Output  # [s_q, h]


Yes: TypeAlias = Literal[True]
No: TypeAlias = Literal[False]
if TYPE_CHECKING:  # the result's type follows from return_*, whatever else is passed
    from typing_extensions import Unpack

    class GQAOptions(TypedDict, total=False):
        softmax_scale: float | None
        topk_length: Tensor | None
        attn_sink: Tensor | None
        batch_invariant: bool
        out: Tensor | tuple[Tensor, ...] | None
        backend: str

    class MLAOptions(GQAOptions, total=False):
        d_v: int
        extra_kv: Tensor | None
        extra_indices: Tensor | None
        extra_topk_length: Tensor | None
        kv_format: str | None
        extra_kv_format: str | None


@overload
def sparse_mla(q: Tensor, kv: Tensor, indices: Tensor, *, return_lse: No = ...,
    return_max_logits: No = ..., **options: "Unpack[MLAOptions]",
) -> Tensor: ...  # fmt: skip
@overload
def sparse_mla(q: Tensor, kv: Tensor, indices: Tensor, *, return_lse: Yes,
    return_max_logits: No = ..., **options: "Unpack[MLAOptions]",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def sparse_mla(q: Tensor, kv: Tensor, indices: Tensor, *, return_lse: No = ...,
    return_max_logits: Yes, **options: "Unpack[MLAOptions]",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def sparse_mla(q: Tensor, kv: Tensor, indices: Tensor, *, return_lse: Yes,
    return_max_logits: Yes, **options: "Unpack[MLAOptions]",
) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip
@overload
def sparse_mla(q: Tensor, kv: Tensor, indices: Tensor, *, return_lse: bool = ...,
    return_max_logits: bool = ..., **options: "Unpack[MLAOptions]",
) -> Tensor | tuple[Tensor, ...]: ...  # fmt: skip
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
    kv_format: str | None = None,
    extra_kv_format: str | None = None,
    batch_invariant: bool = False,
    return_lse: bool = False,
    return_max_logits: bool = False,
    out: Tensor | tuple[Tensor, ...] | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Multi-head latent attention in absorbed form over the selected tokens of each query.

    Every head reads the same latent row; its first ``d_v`` values are the value. Rows that are not
    selected never reach a result, whatever they hold.

    Args:
        q: ``[s_q, h_q, d_qk]``, bf16, fp16, fp32 or fp64.
        kv: ``[s_kv, d_qk]`` in q's dtype, or a paged cache ``[pages, page_size, d_qk]`` or
            ``[pages, page_size, 1, d_qk]``, addressed by physical slot ``page * page_size + offset``. Or
            quantised, uint8 with 656 bytes in place of d_qk = 576, or 584, 528 or 288 in place of
            d_qk = 512 (:mod:`sparse_attn.formats`; formats by page in pages only); d_v is then 512. Pages
            may have any distance.
        indices: ``[s_q, topk]`` int32. Any index < 0 or >= s_kv is ignored, wherever it stands; a
            duplicate counts twice.
        d_v: size of the value, at most d_qk; 512 with a quantised cache.
        softmax_scale: default ``d_qk ** -0.5``. Models use the scale of the unabsorbed head.
        topk_length: ``[s_q]`` int32, cuts each row of indices.
        attn_sink: ``[h_q]`` fp32, a logit that enters the denominator only.
        extra_kv, extra_indices, extra_topk_length: a second segment in the same softmax, of the same d_qk;
            it may be quantised otherwise than kv, or not at all.
        kv_format, extra_kv_format: what the bytes of a quantised cache mean, a name of
            :data:`sparse_attn.formats.KV_FORMATS`. Needed for 528 bytes per token ("v41", "v41_by_page" or
            "nope") and for 288 ("v41_fp4" or "v41_fp4_by_page"), which have several meanings.
        batch_invariant: the bits of a query's result do not depend on the other queries of the call. The C++
            kernels always hold to this; a GPU, torch and the reference take longer for it.
        return_lse: also return the log of the softmax's denominator.
        return_max_logits: also return the highest logit, ``softmax_scale * q . kv``.
        out: the tensor to fill, or the tuple of those that are returned.

    Returns:
        out ``[s_q, h_q, d_v]`` in q's dtype, then what was asked for, ``[s_q, h_q]`` fp32 (fp64 with
        fp64 q): lse, natural log, and max_logits, both without the sink. A query with nothing to attend
        to has out = 0 and both -inf.

    Source: DeepSeek-V2 report, section 2.1; the argument names are FlashMLA's.
    """
    dims: dict[str, int] = {}
    check.tensor("q", q, "s_q h_q d_qk", dims, FLOATS)
    kv, kv_format = _check_latent("kv", kv, kv_format, dims, q, d_v)
    check.tensor("indices", indices, "s_q topk", dims, INT32, q.device)
    check.optional("topk_length", topk_length, "s_q", dims, INT32, q.device)
    if not 1 <= d_v <= q.shape[2]:
        raise ValueError(f"d_v: expected 1 to d_qk={q.shape[2]}, got {d_v}")
    check.optional("attn_sink", attn_sink, "h_q", dims, (torch.float32,), q.device)
    if (extra_kv is None) != (extra_indices is None):
        raise ValueError("extra_kv and extra_indices: expected both or neither")
    if extra_kv is not None:
        extra_dims = {"s_q": dims["s_q"], "d_qk": dims["d_qk"]}
        extra_kv, extra_kv_format = _check_latent("extra_kv", extra_kv, extra_kv_format, extra_dims, q, d_v)
        check.tensor("extra_indices", extra_indices, "s_q extra_topk", extra_dims, INT32, q.device)
        check.optional("extra_topk_length", extra_topk_length, "s_q", extra_dims, INT32, q.device)
    for name, value in (("extra_topk_length", extra_topk_length), ("extra_kv_format", extra_kv_format)):
        if extra_kv is None and value is not None:
            raise ValueError(f"{name}: expected None without extra_kv")
    check.call(backend, q.device, q, kv, attn_sink, extra_kv)
    asked = {"lse": return_lse, "max_logits": return_max_logits}
    result, lse, max_logits = _check_outputs(out, q, d_v, asked)
    scale = q.shape[2] ** -0.5 if softmax_scale is None else float(softmax_scale)
    required = q, kv, indices, d_v, scale, result, lse, max_logits
    extra = extra_kv, extra_indices, extra_topk_length
    options = topk_length, attn_sink, *extra, kv_format, extra_kv_format, batch_invariant
    call("sparse_mla", SparseMLAOp(*required, *options), backend)
    logits = [x for x, wanted in ((lse, return_lse), (max_logits, return_max_logits)) if wanted]
    return (result, *logits) if logits else result


@overload
def sparse_gqa(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, *, return_lse: No = ...,
    **options: "Unpack[GQAOptions]",
) -> Tensor: ...  # fmt: skip
@overload
def sparse_gqa(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, *, return_lse: Yes,
    **options: "Unpack[GQAOptions]",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def sparse_gqa(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, *, return_lse: bool = ...,
    **options: "Unpack[GQAOptions]",
) -> Tensor | tuple[Tensor, ...]: ...  # fmt: skip
def sparse_gqa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    *,
    softmax_scale: float | None = None,
    topk_length: Tensor | None = None,
    attn_sink: Tensor | None = None,
    batch_invariant: bool = False,
    return_lse: bool = False,
    out: Tensor | tuple[Tensor, ...] | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Grouped-query attention over the selected tokens of each query (multi-query when h_kv is 1).

    Args:
        q: ``[s_q, h_q, d]``, bf16, fp16, fp32 or fp64; h_q a multiple of h_kv.
        k, v: ``[s_kv, h_kv, d]`` and ``[s_kv, h_kv, d_v]`` in q's dtype.
        indices: ``[s_q, topk]`` int32, shared by all heads, or ``[s_q, h_kv, topk]``.
        softmax_scale: default ``d ** -0.5``.
        topk_length, attn_sink, batch_invariant, return_lse, out: as in :func:`sparse_mla`.

    Returns:
        out ``[s_q, h_q, d_v]`` in q's dtype, and with ``return_lse`` lse ``[s_q, h_q]``.
    """
    dims: dict[str, int] = {}
    check.tensor("q", q, "s_q h_q d", dims, FLOATS)
    check.tensor("k", k, "s_kv h_kv d", dims, (q.dtype,), q.device)
    check.tensor("v", v, "s_kv h_kv d_v", dims, (q.dtype,), q.device)
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"q: expected h_q to be a multiple of k's h_kv={k.shape[1]}, got h_q={q.shape[1]}")
    per_head = isinstance(indices, Tensor) and indices.dim() == 3
    spec = "s_q h_kv topk" if per_head else "s_q topk"
    check.tensor("indices", indices, spec, dims, INT32, q.device)
    check.optional("topk_length", topk_length, "s_q", dims, INT32, q.device)
    check.optional("attn_sink", attn_sink, "h_q", dims, (torch.float32,), q.device)
    check.call(backend, q.device, q, k, v, attn_sink)
    result, lse = _check_outputs(out, q, v.shape[2], {"lse": return_lse})
    scale = q.shape[2] ** -0.5 if softmax_scale is None else float(softmax_scale)
    required = q, k, v, indices, scale, result, lse
    call("sparse_gqa", SparseGQAOp(*required, topk_length, attn_sink, batch_invariant), backend)
    return (result, lse) if return_lse else result


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
    outs, lses = _check_parts("outs", outs), _check_parts("lses", lses)
    dims: dict[str, int] = {}
    check.tensor("outs", outs, "n s_q h d_v", dims, FLOATS)
    check.tensor("lses", lses, "n s_q h", dims, (compute_dtype(outs.dtype),), outs.device)
    check.call(backend, outs.device, outs, lses)
    merged, lse = _check_outputs(out, outs, outs.shape[3], {"lse": True})
    call("merge_attention", MergeAttentionOp(outs, lses, merged, lse), backend)
    return merged, lse


def _check_latent(
    name: str, kv: Tensor, kv_format: str | None, dims: dict[str, int], q: Tensor, d_v: int
) -> tuple[Tensor, str | None]:
    """kv as the ops take it, never a copy, and the name of its format if it is quantised.

    kv is rows ``[slots, d_qk]``; or pages ``[pages, page_size, d_qk]`` if they lie apart, or if quantised
    ``[pages, page_size, bytes]``.
    """
    if isinstance(kv, Tensor) and kv.dtype == torch.uint8:
        fmt = format_of(name, kv, KV_FORMATS, kv_format, named_by=f"{name}_format")
        kv = check.quantised_pages(name, kv, fmt, q.device)
        check.in_format(name, kv, fmt, q.shape[2], "d_qk")
        if d_v != QUANTISED_D_V:
            raise ValueError(f"d_v: expected {QUANTISED_D_V}, as {name} is quantised, got {d_v}")
        return kv, fmt.name
    specs = {3: "pages page_size d_qk", 4: "pages page_size 1 d_qk"}
    spec = specs.get(kv.dim(), "s_kv d_qk") if isinstance(kv, Tensor) else "s_kv d_qk"
    check.tensor(name, kv, spec, dict(dims), (q.dtype,), q.device)
    if kv_format is not None:
        dtype = check.dtype_name(kv.dtype)
        raise ValueError(f"{name}_format: expected None, as {name} is {dtype} (not uint8), got {kv_format!r}")
    if kv.dim() == 2:
        return kv, None
    if kv.dim() == 4:
        kv = kv.squeeze(2)
    pages, page_size, size = kv.shape
    if page_size == 1:  # whose stride says nothing
        return kv[:, 0], None
    if pages > 1 and page_size > 1 and kv.stride(0) != page_size * kv.stride(1):
        return kv, None
    return kv.as_strided((pages * page_size, size), kv.stride()[1:]), None


def _check_parts(name: str, parts: Tensor | Sequence[Tensor]) -> Tensor:
    if isinstance(parts, Tensor):
        return parts
    if not isinstance(parts, Sequence) or not parts or not all(isinstance(p, Tensor) for p in parts):
        raise TypeError(f"{name}: expected a tensor or a non-empty sequence of tensors, got {parts!r:.80}")
    if any(p.shape != parts[0].shape for p in parts):
        shapes = ", ".join(str(list(p.shape)) for p in parts)
        raise ValueError(f"{name}: expected parts of one shape, got {shapes}")
    return torch.stack(list(parts))


def _check_outputs(out, q: Tensor, d_v: int, asked: dict[str, bool]) -> tuple[Tensor, ...]:
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
    result = check.output("out", given.get("out"), {**dims, "d_v": d_v}, q.dtype, q.device)
    dtype = compute_dtype(q.dtype)
    return result, *(check.output(name, given.get(name), dims, dtype, q.device) for name in asked)
