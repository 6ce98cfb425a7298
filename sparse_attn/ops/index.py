"""The lightning indexer and the selection: logits, the exact top-k, the two together, and slots of a cache.

Shapes use these names: ``s_q`` query tokens and ``s_kv`` key tokens (packed: all sequences of a batch one
after the other), ``h_q`` and ``h_kv`` heads, ``d`` sizes of a head, ``topk`` columns of an index row. Wrong
arguments raise TypeError (not a tensor, wrong dtype) or ValueError (shape, device, range, gradients) before
anything runs.

``backend`` is "auto" (by device: cpu or triton), "cpu", "triton" or "reference"; an explicit choice is
obeyed or refused, never replaced. "cpu" is the C++ library, and torch for what that does not take: fp64, a
last dimension with gaps, or a machine without a C++ compiler. fp64 runs on "cpu" and "reference".
"""

from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor

from ..formats import INDEX_K_FORMATS, format_of
from ..reference import compute_dtype, scores_of
from . import call, check, implementation, register
from .check import FLOATS, INT32, dtype_name
from .records import OptionalOutput, Output, in_chunks

DEFAULT_WORKSPACE_BYTES = 256 << 20
E2M1_WIDTHS = (64, 128)  # index_head_dim of e2m1 queries and keys

# What scoring and selection hold for each logit of a row. In torch: the logit, its masked and sorted
# copies, int64 positions. In Triton: the logit, and the list of kernels/select_topk.py.
BYTES_PER_LOGIT = {"cpu": 40, "triton": 5}
BYTES_PER_SCORE = 32  # of those that lightning_topk returns: positions in 64 bits, twice, and the scores


@register("index_logits")
class IndexLogitsOp(NamedTuple):
    q: Tensor  # [s_q, h, d]; e4m3, or e2m1 as bytes [s_q, h, d / 2]
    k: Tensor  # [s_kv, d], or pages [pages, page_size, d]; of e2m1 d / 2
    weights: Tensor  # [s_q, h]
    ks: Tensor  # [s_q] int32
    ke: Tensor  # [s_q] int32
    out: Output  # [s_q, width]
    q_scale: Tensor | None = None  # of e2m1: [s_q, h, d / 32] bytes of ue8m0
    k_scale: Tensor | None = None  # of e4m3: [...] fp32; of e2m1: [..., d / 32] bytes of ue8m0
    block_table: Tensor | None = None  # [n, max_pages] int32
    cu_seqlens_q: Tensor | None = None  # [n + 1] int32; without it each row of the table has s_q / n queries
    batch_invariant: bool = False
    clean: bool = True  # without it a backend may leave logits outside [ks, ke) as they are


@register("select_topk")
class SelectTopkOp(NamedTuple):
    logits: Tensor  # [s_q, s_kv]
    topk: int
    ks: Tensor  # [s_q] int32
    ke: Tensor  # [s_q] int32
    out: Output  # [s_q, topk] int32


def _lightning_topk_in_chunks(a: "LightningTopkOp", backend: str) -> None:
    """Score and select as many queries at a time as fit the workspace, at least one."""
    score, select = implementation("index_logits", backend), implementation("select_topk", backend)
    width = a.k.shape[0] if a.block_table is None else a.block_table.shape[1] * a.k.shape[1]
    padded = -(-width // 16) * 16  # rows of logits that start at multiples of 64 bytes are read faster
    row_bytes = BYTES_PER_LOGIT[backend] * padded
    if a.scores is not None:
        row_bytes += BYTES_PER_SCORE * a.topk
    rows = max(1, min(a.q.shape[0], a.workspace_bytes // max(1, row_bytes)))
    logits = torch.empty(rows, padded, dtype=compute_dtype(a.q.dtype), device=a.q.device)[:, :width]
    for part in in_chunks(a, rows):
        held = logits[: part.q.shape[0]]
        inputs = part.q, part.k, part.weights, part.ks, part.ke
        options = part.q_scale, part.k_scale, part.block_table, part.cu_seqlens_q, part.batch_invariant
        # Nobody reads logits outside the ranges, so they need not be cleaned.
        score(IndexLogitsOp(*inputs, held, *options, clean=False))
        select(SelectTopkOp(held, part.topk, part.ks, part.ke, part.out))
        if part.scores is not None:
            part.scores.copy_(scores_of(held, part.out))


@register("lightning_topk", composed=_lightning_topk_in_chunks)
class LightningTopkOp(NamedTuple):
    q: Tensor  # these as in IndexLogitsOp
    k: Tensor
    weights: Tensor
    topk: int
    ks: Tensor
    ke: Tensor
    workspace_bytes: int
    out: Output  # [s_q, topk] int32
    q_scale: Tensor | None = None
    k_scale: Tensor | None = None
    block_table: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    batch_invariant: bool = False
    scores: OptionalOutput = None  # [s_q, topk], of the selected


@register("physical_slots")
class PhysicalSlotsOp(NamedTuple):
    indices: Tensor  # [s_q, topk] int32
    block_table: Tensor  # [n, max_pages] int32
    page_size: int
    page_stride: int  # slots from one page to the next
    out: Output  # [s_q, topk] int32
    cu_seqlens_q: Tensor | None = None  # as in IndexLogitsOp


def index_logits(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    ks: Tensor | None = None,
    ke: Tensor | None = None,
    *,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    block_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    batch_invariant: bool = False,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Lightning-indexer scores, ``sum_j weights[t, j] * relu(q[t, j] . k[s])``.

    Args:
        q: ``[s_q, index_n_heads, index_head_dim]``, bf16, fp16, fp32 or fp64. Or quantised, where k is too:
            float8_e4m3fn, whose scales the caller multiplies into ``weights``; or e2m1 of index_head_dim 64
            or 128, uint8 ``[s_q, index_n_heads, index_head_dim / 2]``, two per byte, the even one low.
        k: ``[s_kv, index_head_dim]`` in q's dtype; with ``block_table`` a paged cache
            ``[pages, page_size, index_head_dim]``. Or quantised in the same shapes, beside ``k_scale``:
            float8_e4m3fn, or e2m1 (uint8). Or a packed cache that holds its scales, uint8 ``[pages,
            page_size, bytes]`` with 132 bytes (fp8), 68 or, of index_head_dim 64, 36 (mxfp4) per key
            (:mod:`sparse_attn.formats`); without ``block_table`` it is read in the order of the pages.
        weights: ``[s_q, index_n_heads]`` fp32 (fp64 with fp64 q); may be negative.
        ks, ke: ``[s_q]`` int32. Query t sees keys ``ks[t] <= s < ke[t]``, clamped to the keys that
            exist; a reversed range is empty. By default a query sees all keys, also those after it: for
            causal attention of the last s_q tokens pass ``ke = torch.arange(s_kv - s_q, s_kv) + 1``, int32.
        q_scale: with e2m1 q, ``[s_q, index_n_heads]`` int32: two or four ue8m0 scales, one per 32 values,
            the first in the low byte; bytes above two scales are not read.
        k_scale: with e4m3 k one fp32 scale per key, not negative; with e2m1 k int32 as in ``q_scale``.
            ``[s_kv]``, or with ``block_table`` ``[pages, page_size]``.
        block_table: ``[n, max_pages]`` int32. Position s is found in page
            ``block_table[row, s // page_size]``; a page id outside ``[0, pages)`` holds nothing. s_q is a
            multiple of n, and ``s_q / n`` consecutive queries share a row, or ``cu_seqlens_q`` says which.
        cu_seqlens_q: ``[n + 1]`` int32, on the device like all inputs: queries ``cu_seqlens_q[i]`` to
            ``cu_seqlens_q[i + 1] - 1`` are sequence i, whose pages are row i of ``block_table``. It begins
            with 0 and never decreases; a sequence may have no query. Queries from its last value on, as a
            padded batch has them, see nothing. Positions, ``ks`` and ``ke`` count within the sequence.
        batch_invariant: the bits of a query's logits do not depend on the other queries of the call. The C++
            kernels always hold to this; a GPU, torch and the reference take longer for it.
        out: ``[s_q, width]`` to fill.

    Returns:
        ``[s_q, width]`` fp32 (fp64 with fp64 q), -inf outside the range; width is s_kv, or
        ``max_pages * page_size``, or for a packed cache without ``block_table`` ``pages * page_size``. This
        is the one function whose memory grows with s_q * s_kv.

    Source: DeepSeek-V3.2 report, equation 1; quantised operands are DeepGEMM's.
    """
    inputs = q, k, weights, ks, ke, q_scale, k_scale, block_table, cu_seqlens_q
    k, ks, ke, optional, width = _check_index_inputs(*inputs, backend)
    out = check.output("out", out, {"s_q": q.shape[0], "width": width}, compute_dtype(q.dtype), q.device)
    call("index_logits", IndexLogitsOp(q, k, weights, ks, ke, out, *optional, batch_invariant), backend)
    return out


def select_topk(
    logits: Tensor,
    topk: int,
    ks: Tensor | None = None,
    ke: Tensor | None = None,
    *,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The positions of the ``topk`` highest logits of each row, exactly.

    Highest score first into the set, ties to the lower position; -0.0 equals +0.0; NaN and -inf
    are never selected. Equal logits give equal indices on every backend and at every run.

    Args:
        logits: ``[s_q, s_kv]`` fp32 or fp64.
        topk: how many positions to keep, at least 1.
        ks, ke: ``[s_q]`` int32; only positions ``ks[t] <= s < ke[t]`` count. By default all do.
        out: ``[s_q, topk]`` int32 to fill.

    Returns:
        ``[s_q, topk]`` int32, ascending within a row, padded with -1 at its end.
    """
    _check_topk(topk)
    dims: dict[str, int] = {}
    check.tensor("logits", logits, "s_q s_kv", dims, (torch.float32, torch.float64))
    ks, ke = _check_ranges(ks, ke, logits.shape[1], dims, logits.device)
    check.call(backend, logits.device, logits)
    out = check.output("out", out, {"s_q": logits.shape[0], "topk": topk}, torch.int32, logits.device)
    call("select_topk", SelectTopkOp(logits, topk, ks, ke, out), backend)
    return out


if TYPE_CHECKING:  # the result's type follows from return_scores, whatever else is passed
    from typing_extensions import Unpack

    class TopkOptions(TypedDict, total=False):
        q_scale: Tensor | None
        k_scale: Tensor | None
        block_table: Tensor | None
        cu_seqlens_q: Tensor | None
        batch_invariant: bool
        workspace_bytes: int
        out: Tensor | tuple[Tensor, Tensor] | None
        backend: str


@overload
def lightning_topk(q: Tensor, k: Tensor, weights: Tensor, topk: int, ks: Tensor | None = ...,
    ke: Tensor | None = ..., *, return_scores: Literal[False] = ..., **options: "Unpack[TopkOptions]",
) -> Tensor: ...  # fmt: skip
@overload
def lightning_topk(q: Tensor, k: Tensor, weights: Tensor, topk: int, ks: Tensor | None = ...,
    ke: Tensor | None = ..., *, return_scores: Literal[True], **options: "Unpack[TopkOptions]",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def lightning_topk(q: Tensor, k: Tensor, weights: Tensor, topk: int, ks: Tensor | None = ...,
    ke: Tensor | None = ..., *, return_scores: bool = ..., **options: "Unpack[TopkOptions]",
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def lightning_topk(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    topk: int,
    ks: Tensor | None = None,
    ke: Tensor | None = None,
    *,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    block_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    batch_invariant: bool = False,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    return_scores: bool = False,
    out: Tensor | tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`select_topk` of :func:`index_logits`, without ever holding ``[s_q, s_kv]``.

    Queries are scored and selected in chunks that fit ``workspace_bytes``, one query at least; the
    size of the chunks never changes the selection, given the same logits.

    Args: see the two functions, and
        workspace_bytes: bounds the temporary memory ("reference" keeps all logits and ignores it).
        return_scores: also return the logits of the selected positions: what a selection over several
            sets of keys, as in context parallelism, is merged by.
        out: the tensor to fill; with return_scores the pair.

    Returns:
        ``[s_q, topk]`` int32 positions, ascending, -1 padded. With return_scores a tuple of them and
        ``[s_q, topk]`` fp32 (fp64 with fp64 q), the logit of each, -inf where the position is -1.
    """
    _check_topk(topk)
    inputs = q, k, weights, ks, ke, q_scale, k_scale, block_table, cu_seqlens_q
    k, ks, ke, optional, _ = _check_index_inputs(*inputs, backend)
    if workspace_bytes <= 0:
        raise ValueError(f"workspace_bytes: expected a positive number of bytes, got {workspace_bytes}")
    sizes, scores = {"s_q": q.shape[0], "topk": topk}, None
    if return_scores:
        if out is not None and not (isinstance(out, tuple) and len(out) == 2):
            got = f"{len(out)} of them" if isinstance(out, tuple) else type(out).__name__
            raise TypeError(f"out: expected the pair (indices, scores), as both are returned, got {got}")
        out, scores = out or (None, None)
        scores = check.output("out scores", scores, sizes, compute_dtype(q.dtype), q.device)
    indices = check.output("out", out, sizes, torch.int32, q.device)
    required = q, k, weights, topk, ks, ke, workspace_bytes, indices
    call("lightning_topk", LightningTopkOp(*required, *optional, batch_invariant, scores), backend)
    return indices if scores is None else (indices, scores)


def physical_slots(
    indices: Tensor,
    block_table: Tensor,
    page_size: int,
    *,
    cu_seqlens_q: Tensor | None = None,
    page_stride: int | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Positions in a sequence to slots of a paged cache, ``page * page_stride + offset``.

    What :func:`lightning_topk` selects through a block table becomes what :func:`sparse_mla` reads.

    Args:
        indices: ``[s_q, topk]`` int32 positions.
        block_table, cu_seqlens_q: as in :func:`index_logits`; a query beyond the last sequence has no slot.
        page_size: tokens per page.
        page_stride: slots from one page to the next, by default page_size. It is larger where pages of a
            cache that is read as rows lie apart, as in an allocation that several layers share.
        out: ``[s_q, topk]`` int32 to fill.

    Returns:
        ``[s_q, topk]`` int32; -1 where the position is negative or beyond the table, and where the
        table holds a negative page or one whose slots int32 cannot number.
    """
    dims: dict[str, int] = {}
    check.tensor("indices", indices, "s_q topk", dims, INT32)
    check.block_table(block_table, cu_seqlens_q, dims, indices.shape[0], indices.device)
    check.integer("page_size", page_size)
    page_stride = page_size if page_stride is None else page_stride
    check.integer("page_stride", page_stride, page_size)
    check.call(backend, indices.device)
    sizes = {"s_q": indices.shape[0], "topk": indices.shape[1]}
    out = check.output("out", out, sizes, torch.int32, indices.device)
    a = PhysicalSlotsOp(indices, block_table, page_size, page_stride, out, cu_seqlens_q)
    call("physical_slots", a, backend)
    return out


def _check_index_inputs(q, k, weights, ks, ke, q_scale, k_scale, block_table, cu_seqlens_q, backend: str):
    """k, ks and ke, the optional inputs, all as the ops take them, and the width of a row of logits."""
    dims: dict[str, int] = {}
    q_scale = _check_index_q(q, q_scale, dims)
    k, k_scale, block_table = _check_index_k(k, k_scale, block_table, q, dims)
    check.tensor("weights", weights, "s_q index_n_heads", dims, (compute_dtype(q.dtype),), q.device)
    if block_table is not None:
        check.block_table(block_table, cu_seqlens_q, dims, q.shape[0], q.device)
        width = block_table.shape[1] * k.shape[1]
    elif cu_seqlens_q is not None:
        raise ValueError("cu_seqlens_q: expected None without block_table, whose rows it gives to queries")
    else:
        width = k.shape[0]
    ks, ke = _check_ranges(ks, ke, width, dims, q.device)
    check.call(backend, q.device, q, k, weights)
    return k, ks, ke, (q_scale, k_scale, block_table, cu_seqlens_q), width


def _check_index_q(q: Tensor, q_scale: Tensor | None, dims: dict[str, int]) -> Tensor | None:
    """The scales of q, in bytes."""
    if isinstance(q, Tensor) and q.dtype == torch.uint8:
        check.tensor("q", q, "s_q index_n_heads index_head_dim/2", dims, (torch.uint8,))
        d = dims["index_head_dim"] = 2 * q.shape[2]
        _check_e2m1_width("q", d)
        q_scale = check.tensor("q_scale", q_scale, "s_q index_n_heads", dims, INT32, q.device)
        return _ue8m0_bytes(q_scale, d)
    check.tensor("q", q, "s_q index_n_heads index_head_dim", dims, (*FLOATS, torch.float8_e4m3fn))
    if q_scale is not None:
        raise ValueError("q_scale: expected None, as q is not e2m1 (scales of e4m3 go into weights)")
    return None


def _check_index_k(
    k: Tensor, k_scale: Tensor | None, block_table: Tensor | None, q: Tensor, dims: dict[str, int]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """k, its scales and the block table as the ops take them; a packed cache becomes views of its parts."""
    dtype = k.dtype if isinstance(k, Tensor) else None
    if dtype == torch.uint8 and k_scale is None:
        fmt = format_of("k", k, INDEX_K_FORMATS)
        check.tensor("k", k, f"pages page_size {fmt.bytes}", dims, (torch.uint8,), q.device)
        check.in_format("k", k, fmt, dims["index_head_dim"], "index_head_dim")
        if block_table is None:
            block_table = torch.arange(k.shape[0], dtype=torch.int32, device=k.device)[None]
        keys, k_scale = fmt.views(k)
        return keys, k_scale, block_table
    rows = "s_kv" if block_table is None else "pages page_size"
    if dtype == torch.uint8:
        d = dims["index_head_dim"]
        _check_e2m1_width("k", d)
        dims["index_head_dim/2"] = d // 2
        check.tensor("k", k, f"{rows} index_head_dim/2", dims, (torch.uint8,), q.device)
        k_scale = check.tensor("k_scale", k_scale, rows, dims, INT32, q.device)
        return k, _ue8m0_bytes(k_scale, d), block_table
    if dtype == torch.float8_e4m3fn:
        check.tensor("k", k, f"{rows} index_head_dim", dims, (torch.float8_e4m3fn,), q.device)
        check.tensor("k_scale", k_scale, rows, dims, (torch.float32,), q.device)
        return k, k_scale, block_table
    if q.dtype not in FLOATS:
        kind = type(k).__name__ if dtype is None else dtype_name(dtype)
        raise TypeError(f"k: expected quantised keys (float8_e4m3fn or uint8), as q is quantised, got {kind}")
    check.tensor("k", k, f"{rows} index_head_dim", dims, (q.dtype,), q.device)
    if k_scale is not None:
        raise ValueError("k_scale: expected None, as k is not quantised")
    return k, None, block_table


def _check_e2m1_width(name: str, d: int) -> None:
    if d not in E2M1_WIDTHS:
        widths = " or ".join(map(str, E2M1_WIDTHS))
        raise ValueError(f"q: expected index_head_dim {widths}, as {name} is e2m1, got {d}")


def _ue8m0_bytes(scales: Tensor, d: int) -> Tensor:
    """``[..., d / 32]`` uint8 of int32 scales, the low byte first; a view."""
    return scales[..., None].view(torch.uint8)[..., : d // 32]


def _check_ranges(
    ks: Tensor | None, ke: Tensor | None, width: int, dims: dict[str, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """The ranges, by default of all ``width`` positions."""
    if ks is None:
        ks = torch.zeros(dims["s_q"], dtype=torch.int32, device=device)
    if ke is None:
        ke = torch.full((dims["s_q"],), width, dtype=torch.int32, device=device)
    check.tensor("ks", ks, "s_q", dims, INT32, device)
    check.tensor("ke", ke, "s_q", dims, INT32, device)
    return ks, ke


def _check_topk(topk: int) -> None:
    if isinstance(topk, bool | Tensor | float):
        raise TypeError(f"topk: expected an int, got {type(topk).__name__}")
    if topk < 1:
        raise ValueError(f"topk: expected at least 1, got {topk}")
