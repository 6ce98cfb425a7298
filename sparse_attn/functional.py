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
from .formats import INDEX_K_BYTES, INDEX_K_DIM, V32_KV_BYTES, V32_KV_LATENT, V32_KV_ROPE
from .reference import compute_dtype

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
DEFAULT_WORKSPACE_BYTES = 256 << 20

__all__ = [
    "index_logits",
    "lightning_topk",
    "merge_attention",
    "select_topk",
    "sparse_gqa",
    "sparse_mla",
]


def index_logits(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    ks: Tensor,
    ke: Tensor,
    *,
    block_table: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Lightning-indexer scores, ``sum_j weights[t, j] * relu(q[t, j] . k[s])``.

    Args:
        q: ``[s_q, index_n_heads, index_head_dim]``, bf16, fp16, fp32 or fp64.
        k: ``[s_kv, index_head_dim]`` in q's dtype; with ``block_table`` a paged cache
            ``[pages, page_size, index_head_dim]``, or one of fp8 keys ``[pages, page_size, 132]``
            uint8 (:func:`sparse_attn.formats.index_k_views`; index_head_dim is then 128).
        weights: ``[s_q, index_n_heads]`` fp32 (fp64 with fp64 q); may be negative.
        ks, ke: ``[s_q]`` int32. Query t sees keys ``ks[t] <= s < ke[t]``, clamped to the keys that
            exist; a reversed range is empty.
        block_table: ``[n, max_pages]`` int32, s_q a multiple of n; consecutive queries share a row.
            Position s is found in page ``block_table[row, s // page_size]``; a page id outside
            ``[0, pages)`` holds nothing.
        out: ``[s_q, width]`` to fill.

    Returns:
        ``[s_q, width]`` fp32 (fp64 with fp64 q), -inf outside the range; width is s_kv, or
        ``max_pages * page_size``. This is the one function whose memory grows with s_q * s_kv.

    Source: DeepSeek-V3.2 report, equation 1.
    """
    width = _check_index_inputs(q, k, weights, ks, ke, block_table, backend)
    out = _output("out", out, {"s_q": q.shape[0], "width": width}, compute_dtype(q.dtype), q.device)
    ops.call("index_logits", backend, (q, k, weights, ks, ke, block_table), (out,))
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
    _check_index_inputs(q, k, weights, ks, ke, block_table, backend)
    if workspace_bytes <= 0:
        raise ValueError(f"workspace_bytes: expected a positive number of bytes, got {workspace_bytes}")
    out = _output("out", out, {"s_q": q.shape[0], "topk": topk}, torch.int32, q.device)
    inputs = (q, k, weights, topk, ks, ke, block_table, workspace_bytes)
    ops.call("lightning_topk", backend, inputs, (out,))
    return out


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
    out: Tensor | tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Multi-head latent attention in absorbed form over the selected tokens of each query.

    Every head reads the same latent row; its first ``d_v`` values are the value. Rows that are not
    selected never reach a result, whatever they hold.

    Args:
        q: ``[s_q, h_q, d_qk]``, bf16, fp16, fp32 or fp64.
        kv: ``[s_kv, d_qk]`` in q's dtype, or a paged cache ``[pages, page_size, d_qk]`` or
            ``[pages, page_size, 1, d_qk]`` without gaps between pages, addressed by physical slot
            ``page * page_size + offset``. With 656 bytes in place of d_qk, uint8, it is an fp8 cache
            (:func:`sparse_attn.formats.v32_kv_views`; d_qk is then 576).
        indices: ``[s_q, topk]`` int32. Any index < 0 or >= s_kv is ignored, wherever it stands; a
            duplicate counts twice.
        d_v: size of the value, at most d_qk.
        softmax_scale: default ``d_qk ** -0.5``. Models use the scale of the unabsorbed head.
        topk_length: ``[s_q]`` int32, cuts each row of indices.
        attn_sink: ``[h_q]`` fp32, a logit that enters the denominator only.
        extra_kv, extra_indices, extra_topk_length: a second segment in the same softmax.
        return_lse: also return the log of the softmax's denominator.
        out: the tensor to fill; with ``return_lse`` the pair (out, lse).

    Returns:
        out ``[s_q, h_q, d_v]`` in q's dtype, and with ``return_lse`` lse ``[s_q, h_q]`` fp32 (fp64
        with fp64 q): natural log, without the sink. A query with nothing to attend to has out = 0
        and lse = -inf.

    Source: DeepSeek-V2 report, section 2.1; the argument names are FlashMLA's.
    """
    dims: dict[str, int] = {}
    _check("q", q, "s_q h_q d_qk", dims, FLOATS)
    kv = _flatten_pages("kv", kv, dims, q)
    _check_selection("indices", indices, "s_q topk", "topk_length", topk_length, dims, q.device)
    if not 1 <= d_v <= q.shape[2]:
        raise ValueError(f"d_v: expected 1 to d_qk={q.shape[2]}, got {d_v}")
    _check_sink(attn_sink, dims, q.device)
    if (extra_kv is None) != (extra_indices is None):
        raise ValueError("extra_kv and extra_indices: expected both or neither")
    if extra_kv is not None:
        extra_dims = {name: size for name, size in dims.items() if name in ("s_q", "d_qk")}
        extra_kv = _flatten_pages("extra_kv", extra_kv, extra_dims, q)
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
    out, lse = _attention_outputs(out, q, d_v, return_lse)
    scale = q.shape[2] ** -0.5 if softmax_scale is None else float(softmax_scale)
    inputs = (q, kv, indices, d_v, scale, topk_length, attn_sink)
    ops.call("sparse_mla", backend, (*inputs, extra_kv, extra_indices, extra_topk_length), (out, lse))
    return (out, lse) if return_lse else out


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
    out, lse = _attention_outputs(out, q, v.shape[2], return_lse)
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
    merged, lse = _attention_outputs(out, outs, outs.shape[3], True)
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
    axes = spec.split()
    shape = tensor.shape
    if len(shape) != len(axes) or any(_size(a, dims, n) != n for a, n in zip(axes, shape, strict=True)):
        raise ValueError(f"{name}: expected shape [{_named(spec, dims)}], got {list(shape)}")
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected dtype {expected}, got {str(tensor.dtype).removeprefix('torch.')}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, got {tensor.device}")
    dims.update(zip(axes, shape, strict=True))


def _size(axis: str, dims: dict[str, int], default: int) -> int:
    return int(axis) if axis.isdigit() else dims.get(axis, default)


def _named(spec: str, dims: dict[str, int]) -> str:
    return ", ".join(
        f"{axis}={dims[axis]}" if axis in dims and not axis.isdigit() else axis for axis in spec.split()
    )


def _check_index_inputs(q, k, weights, ks, ke, block_table, backend: str) -> int:
    dims: dict[str, int] = {}
    _check("q", q, "s_q index_n_heads index_head_dim", dims, FLOATS)
    if isinstance(k, Tensor) and k.dtype == torch.uint8:
        _check_fp8_index_keys(k, block_table, dims, q.device)
    else:
        key_spec = "s_kv index_head_dim" if block_table is None else "pages page_size index_head_dim"
        _check("k", k, key_spec, dims, (q.dtype,), q.device)
    _check("weights", weights, "s_q index_n_heads", dims, (compute_dtype(q.dtype),), q.device)
    _check_ranges(ks, ke, dims, q.device)
    _check_call(backend, q.device, q, k, weights)
    if block_table is None:
        return k.shape[0]
    _check("block_table", block_table, "n max_pages", dims, (torch.int32,), q.device)
    n = block_table.shape[0]
    if (n == 0 and q.shape[0] > 0) or (n > 0 and q.shape[0] % n):
        raise ValueError(f"block_table: expected a number of rows that divides s_q={q.shape[0]}, got {n}")
    return block_table.shape[1] * k.shape[1]


def _check_fp8_index_keys(k: Tensor, block_table, dims: dict[str, int], device: torch.device) -> None:
    if block_table is None:
        raise ValueError("block_table: expected with an fp8 cache of index keys, got None")
    if dims["index_head_dim"] != INDEX_K_DIM:
        raise ValueError(
            f"q: expected index_head_dim={INDEX_K_DIM} for fp8 keys, got {dims['index_head_dim']}"
        )
    _check("k", k, f"pages page_size {INDEX_K_BYTES}", dims, (torch.uint8,), device)
    if k.stride()[1:] != (INDEX_K_BYTES, 1):
        raise ValueError(f"k: expected pages that are contiguous in themselves, got strides {k.stride()}")


def _check_ranges(ks: Tensor, ke: Tensor, dims: dict[str, int], device: torch.device) -> None:
    _check("ks", ks, "s_q", dims, (torch.int32,), device)
    _check("ke", ke, "s_q", dims, (torch.int32,), device)


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
    runs_triton = backend == "triton" or (backend == "auto" and device.type == "cuda")
    if runs_triton and any(t is not None and t.dtype == torch.float64 for t in tensors):
        raise TypeError("dtype: the triton backend takes bfloat16, float16 or float32, got float64")
    if runs_triton and any(t is not None and t.dtype == torch.uint8 for t in tensors):
        raise TypeError("dtype: the triton backend does not read uint8 caches, got one; unpack it first")


def _flatten_pages(name: str, kv: Tensor, dims: dict[str, int], q: Tensor) -> Tensor:
    """``[slots, d_qk]`` (or 656 bytes) from the three shapes that a latent cache may have, never copied."""
    fp8 = isinstance(kv, Tensor) and kv.dtype == torch.uint8
    row = str(V32_KV_BYTES) if fp8 else "d_qk"
    specs = {3: f"pages page_size {row}", 4: f"pages page_size 1 {row}"}
    spec = specs.get(kv.dim(), f"s_kv {row}") if isinstance(kv, Tensor) else f"s_kv {row}"
    _check(name, kv, spec, dict(dims), (torch.uint8 if fp8 else q.dtype,), q.device)
    if fp8 and q.shape[2] != V32_KV_LATENT + V32_KV_ROPE:
        raise ValueError(
            f"q: expected d_qk={V32_KV_LATENT + V32_KV_ROPE} for a {row}-byte cache, got {q.shape[2]}"
        )
    if kv.dim() == 2:
        return kv
    if kv.dim() == 4:
        kv = kv.squeeze(2)
    pages, page_size, size = kv.shape
    if pages > 1 and kv.stride(0) != page_size * kv.stride(1):
        raise ValueError(
            f"{name}: expected pages that follow each other without gaps, got strides {kv.stride()}; "
            "a slot number could not address it without a copy of the cache"
        )
    return kv.as_strided((pages * page_size, size), kv.stride()[1:])


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


def _attention_outputs(out, q: Tensor, d_v: int, return_lse: bool) -> tuple[Tensor, Tensor]:
    lse = None
    if return_lse and out is not None:
        if not isinstance(out, tuple) or len(out) != 2:
            raise TypeError(f"out: expected the pair (out, lse) with return_lse, got {type(out).__name__}")
        out, lse = out
    dims = {"s_q": q.shape[-3], "h_q": q.shape[-2]}
    result = _output("out", out, {**dims, "d_v": d_v}, q.dtype, q.device)
    return result, _output("lse", lse, dims, compute_dtype(q.dtype), q.device)
