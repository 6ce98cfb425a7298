"""The CPU kernels in C++ (``kernels/cpu``): loading them, what they take, and calling them.

The library knows nothing of torch: tensors go over as addresses, sizes and strides. It runs on
torch's OpenMP runtime, with torch's number of threads, which is why torch is imported before it is
loaded. ctypes releases the GIL for the length of a call.

Each operation has a function of its record here, and ``refuses`` says what the library does not take: it
takes bf16, fp16 and fp32 whose last dimension is contiguous, and quantised caches.
"""

import ctypes
import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...formats.elements import Format
from ...formats.index_keys import INDEX_K
from ...formats.latent import KV_FORMATS
from ...formats.layout import Layout, layout_of

if TYPE_CHECKING:
    from ..attention import SparseGQAOp, SparseMLAOp
    from ..index import IndexLogitsOp, LightningTopkOp, PhysicalSlotsOp, SelectTopkOp
    from ..writers import QuantiseIndexQOp, WriteIndexKOp, WriteKVOp

LIBRARY = Path(__file__).parents[2] / "_native.so"
DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
NEARLY_ZERO = 2.0**-126  # a softmax_scale of 0 would make NaN of the infinite scores that fill up a block
# Latent caches: the library's number of a format, by its name; None is rows of q's dtype.
ROW_FORMATS = {None: 0, "v32": 1, "v4": 2, "v41": 3, "v41_by_page": 4, "nope": 5}
ROW_FORMATS |= {"v41_fp4": 6, "v41_fp4_by_page": 7}
# Index queries and keys, by their dtype.
INDEX_FORMATS = {torch.float8_e4m3fn: 1, torch.uint8: 2}
INSTALL = (
    "Install a C++17 compiler and then sparse_attn again: pip install --force-reinstall --no-deps "
    "sparse_attn, or pip install -e . in a checkout."
)
# How writers store values and scales, by the names of formats.Layout.
VALUE_KINDS, SCALE_KINDS = {"e4m3": 1, "e2m1": 2}, {"fp32": 0, "ue8m0": 1, "e4m3": 2}
MAX_ROW = 1024  # values of a row that writers take
WRITERS = ("write_kv", "write_index_k", "quantise_index_q")
PEAK_KINDS = {"fp32": 0, "bf16": 1}

_POINTER, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


# The structures of kernels/cpu/common.h; strides count elements, those of scales bytes.
class _IndexArgs(ctypes.Structure):
    _fields_ = [
        *_fields(_POINTER, "q k weights ks ke q_scale k_scale block_table cu_seqlens_q"),
        *_fields(_SIZE, "q_query q_head k_page k_row weights_query block_table_row"),
        *_fields(_SIZE, "q_scale_query q_scale_head k_scale_page k_scale_row"),
        *_fields(_SIZE, "s_q heads d pages page_size tables width"),
        *_fields(_INT, "dtype key_format query_format"),
    ]


class _Segment(ctypes.Structure):
    _fields_ = [
        *_fields(_POINTER, "k v indices topk_length"),
        *_fields(_SIZE, "k_row k_head v_row v_head indices_query indices_head"),
        *_fields(_SIZE, "s_kv topk page_size k_page format"),
    ]


class _AttentionArgs(ctypes.Structure):
    _fields_ = [
        ("segments", _Segment * 2),
        *_fields(_POINTER, "q attn_sink out lse max_logits"),
        *_fields(_SIZE, "q_query q_head out_query out_head lse_query max_logits_query"),
        *_fields(_SIZE, "s_q h_q h_kv d_qk d_v"),
        *_fields(_INT, "n_segments dtype"),
        ("softmax_scale", _FLOAT),
    ]


class _SlotArgs(ctypes.Structure):
    _fields_ = [
        *_fields(_POINTER, "indices block_table cu_seqlens_q out"),
        *_fields(_SIZE, "indices_query block_table_row out_query"),
        *_fields(_SIZE, "s_q topk tables max_pages page_size page_stride"),
    ]


class _Rows(ctypes.Structure):
    _fields_ = [
        *_fields(_POINTER, "x norm_weight norm_bias cos sin"),
        *_fields(_SIZE, "x_token x_head cos_token sin_token"),
        *_fields(_SIZE, "tokens heads width normalised rope_start pairs"),
        *_fields(_INT, "dtype weight_dtype bias_dtype interleaved"),
        *_fields(_FLOAT, "eps hadamard"),
    ]


class _Quantisation(ctypes.Structure):
    _fields_ = [
        *_fields(_SIZE, "quantised group"),
        *_fields(_INT, "values scales power_of_two"),
        ("min_scale", _FLOAT),
    ]


class _WriteArgs(ctypes.Structure):
    _fields_ = [
        ("rows", _Rows),
        ("how", _Quantisation),
        *_fields(_POINTER, "cache slots"),
        *_fields(_SIZE, "slot_bytes pages page_size page_step"),
        *_fields(_SIZE, "values_step scales_start scales_step rope_start rope_step"),
        ("cache_dtype", _INT),
    ]


class _QuantiseArgs(ctypes.Structure):
    _fields_ = [
        ("rows", _Rows),
        ("how", _Quantisation),
        *_fields(_POINTER, "weights out out_weights"),
        *_fields(_SIZE, "weights_token out_token out_head out_weights_token"),
    ]


class _SelectArgs(ctypes.Structure):
    _fields_ = [
        *_fields(_POINTER, "logits ks ke out"),
        *_fields(_SIZE, "logits_query out_query s_q s_kv topk"),
    ]


_STRUCTURES = {
    s.__name__[1:]: s
    for s in (
        *(_IndexArgs, _Segment, _AttentionArgs, _SelectArgs, _SlotArgs),
        *(_Rows, _Quantisation, _WriteArgs, _QuantiseArgs),
    )
}
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "sizeof": (_SIZE, [ctypes.c_char_p]),
    "isas": (_INT, []),
    "isa_name": (ctypes.c_char_p, [_INT]),
    "isa_supported": (_INT, [_INT]),
    "default_isa": (_INT, []),
    "has_openmp": (_INT, []),
    "index_logits": (None, [_INT, _INT, _POINTER, _POINTER, _SIZE]),
    "select_topk": (None, [_INT, _INT, _POINTER]),
    "lightning_topk": (None, [_INT, _INT, _POINTER, _SIZE, _SIZE, _POINTER, _SIZE, _POINTER, _SIZE]),
    "physical_slots": (None, [_INT, _INT, _POINTER]),
    "attend": (None, [_INT, _INT, _POINTER]),
    "write": (None, [_INT, _INT, _POINTER]),
    "quantise": (None, [_INT, _INT, _POINTER]),
    "peak": (_SIZE, [_INT, _INT, _SIZE]),
}


class _Library(ctypes.CDLL):
    """The loaded library: its functions, and the instruction sets that this machine runs, the best first."""

    def __init__(self, path: Path):
        super().__init__(str(path))
        for name, (result, arguments) in _FUNCTIONS.items():
            function = self[f"sparse_attn_{name}"]
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        for name, structure in _STRUCTURES.items():
            theirs, ours = self.sizeof(name.encode()), ctypes.sizeof(structure)
            if theirs != ours:
                raise ImportError(
                    f"sparse_attn: {path.name} was built from other sources ({name}: {theirs} bytes there, "
                    f"{ours} here). {INSTALL}"
                )
        supported = [isa for isa in range(self.isas()) if self.isa_supported(isa)]
        self.numbers = {self.isa_name(isa).decode(): isa for isa in supported}
        self.isa: int | None = self.default_isa()  # in use; None leaves the work to torch


@functools.cache
def _library() -> _Library | None:
    """The library, or None with one warning that says why it is not in use."""
    try:
        return _Library(LIBRARY)
    except (OSError, AttributeError) as error:
        reason = f"cannot be loaded ({error})" if LIBRARY.exists() else "was not built"
    warnings.warn(
        f"sparse_attn: {LIBRARY.name} {reason}, so the CPU runs on torch, several times slower. {INSTALL}",
        RuntimeWarning,
        stacklevel=3,
    )
    return None


def _run(function: str, args: ctypes.Structure, *rest: int) -> None:
    library = _library()
    assert library is not None  # else ``refuses`` has said so
    getattr(library, function)(library.isa, torch.get_num_threads(), ctypes.byref(args), *rest)


def available() -> bool:
    """Whether the C++ kernels are in use."""
    library = _library()
    return library is not None and library.isa is not None


def instruction_sets() -> list[str]:
    """Those that the library has and this machine runs, the widest first."""
    library = _library()
    return list(library.numbers) if library else []


def instruction_set() -> str | None:
    """The one in use; None when torch does the work."""
    library = _library()
    return library.isa_name(library.isa).decode() if library and library.isa is not None else None


def has_openmp() -> bool:
    """Whether the library was built with OpenMP; without it, it runs on one thread."""
    library = _library()
    return bool(library and library.has_openmp())


@contextmanager
def use(name: str | None) -> Iterator[None]:
    """Within the block everything runs on the named instruction set, on torch if it is None. For tests."""
    if name is not None and name not in instruction_sets():
        raise ValueError(f"name: expected one of {instruction_sets()} or None, got {name!r}")
    library = _library()
    if library is None:
        yield
        return
    before, library.isa = library.isa, None if name is None else library.numbers[name]
    try:
        yield
    finally:
        library.isa = before


def peak(kind: str, rounds: int) -> int:
    """Run multiply-adds ("fp32" or "bf16") in registers only; how many operations it made, 0 if none."""
    library = _library()
    return library.peak(library.isa, PEAK_KINDS[kind], rounds) if library and library.isa is not None else 0


def without_gaps(a: Any) -> Any:
    """The record with contiguous ks, ke, topk_length and attn_sink: callers cut them out of other tensors."""
    if _all_contiguous(a):
        return a
    vectors = {f: x for f, x in zip(a._fields, a, strict=True) if isinstance(x, Tensor) and x.dim() == 1}
    return a._replace(**{field: x.contiguous() for field, x in vectors.items()})


def _all_contiguous(a: Any) -> bool:
    return False not in [x.is_contiguous() for x in a if isinstance(x, Tensor)]  # quicker than a generator


def refuses(name: str, a: Any) -> str | None:
    """Why the library does not run op ``name`` of the record ``a``, or None."""
    if not available():
        return "the C++ kernels are not in use"
    for field, x in () if _all_contiguous(a) else zip(a._fields, a, strict=True):
        if isinstance(x, Tensor) and x.stride(-1) != 1 and x.shape[-1] > 1:
            return f"{field}: expected a contiguous last dimension, got strides {x.stride()}"
    if name in WRITERS:
        return _writer_refuses(a)
    if name == "select_topk":
        return None if a.logits.dtype == torch.float32 else f"logits: expected fp32, got {a.logits.dtype}"
    if name == "physical_slots":
        return None
    q, k = a[:2]
    if min(q.shape[1:]) == 0:
        return f"q: expected heads and a head dimension, got shape {list(q.shape)}"
    taken = q.dtype == k.dtype and q.dtype in DTYPES
    if name in ("sparse_mla", "sparse_gqa"):
        taken |= q.dtype in DTYPES and k.dtype == torch.uint8
    else:  # e4m3 keys are decoded a whole vector at a time
        taken |= k.dtype in INDEX_FORMATS and q.dtype != torch.float64 and k.shape[-1] % 16 == 0
    return None if taken else f"q and keys: not read as {q.dtype} and {k.dtype} of {list(k.shape)}"


def _writer_refuses(a: Any) -> str | None:
    x, weight, bias = a[0], getattr(a, "norm_weight", None), getattr(a, "norm_bias", None)
    for t in (x, weight, bias):
        if t is not None and t.dtype not in DTYPES:
            return f"dtype: expected bf16, fp16 or fp32, got {t.dtype}"
    if not 0 < x.shape[-1] <= MAX_ROW:
        return f"{a._fields[0]}: expected rows of at most {MAX_ROW} values, got {x.shape[-1]}"
    return None


def _set_addresses(args: ctypes.Structure, a: Any, *fields: str) -> None:
    """Point ``args`` to tensors of the record, each of the same name; null where there is none."""
    for field in fields:
        tensor = getattr(a, field)
        setattr(args, field, None if tensor is None else tensor.data_ptr())


def _index_args(a: "IndexLogitsOp | LightningTopkOp") -> _IndexArgs:
    q, k, table, q_scale, k_scale = a.q, a.k, a.block_table, a.q_scale, a.k_scale
    args = _IndexArgs()
    _set_addresses(args, a, "q", "k", "weights", "ks", "ke", "q_scale", "k_scale")
    _set_addresses(args, a, "block_table", "cu_seqlens_q")
    args.s_q, args.heads, args.d = q.shape
    args.q_query, args.q_head, _ = q.stride()
    args.k_page, args.k_row, args.weights_query = k.stride(0), k.stride(-2), a.weights.stride(0)
    args.dtype = DTYPES.get(q.dtype, DTYPES[torch.bfloat16])  # bf16 holds every value of a quantised query
    args.key_format, args.query_format = INDEX_FORMATS.get(k.dtype, 0), INDEX_FORMATS.get(q.dtype, 0)
    if q.dtype == torch.uint8:
        args.d *= 2
    if table is None:
        args.pages, args.page_size, args.tables, args.width = 1, k.shape[0], 1, k.shape[0]
    else:
        args.pages, args.page_size, _ = k.shape
        args.tables, args.width = table.shape[0], table.shape[1] * k.shape[1]
        args.block_table_row = table.stride(0)
    if q_scale is not None:
        args.q_scale_query, args.q_scale_head, _ = q_scale.stride()
    if k_scale is not None:
        strides = [k_scale.element_size() * stride for stride in k_scale.stride()]
        args.k_scale_page, args.k_scale_row = (0, strides[0]) if table is None else strides[:2]
    return args


def index_logits(a: "IndexLogitsOp") -> None:
    if a.out.numel() == 0:
        return
    _run("index_logits", _index_args(a), a.out.data_ptr(), a.out.stride(0))


def select_topk(a: "SelectTopkOp") -> None:
    args = _SelectArgs(topk=a.topk)
    _set_addresses(args, a, "logits", "ks", "ke", "out")
    args.s_q, args.s_kv = a.logits.shape
    args.logits_query, args.out_query = a.logits.stride(0), a.out.stride(0)
    _run("select_topk", args)


def lightning_topk(a: "LightningTopkOp") -> None:
    scores = (0, 0) if a.scores is None else (a.scores.data_ptr(), a.scores.stride(0))
    rest = a.topk, a.workspace_bytes, a.out.data_ptr(), a.out.stride(0), *scores
    _run("lightning_topk", _index_args(a), *rest)


def physical_slots(a: "PhysicalSlotsOp") -> None:
    args = _SlotArgs(page_size=a.page_size, page_stride=a.page_stride)
    _set_addresses(args, a, "indices", "block_table", "cu_seqlens_q", "out")
    (args.s_q, args.topk), (args.tables, args.max_pages) = a.indices.shape, a.block_table.shape
    args.indices_query, args.block_table_row = a.indices.stride(0), a.block_table.stride(0)
    args.out_query = a.out.stride(0)
    _run("physical_slots", args)


def sparse_mla(a: "SparseMLAOp") -> None:
    args = _attention_args(a, h_kv=1, d_v=a.d_v)
    args.max_logits, args.max_logits_query = a.max_logits.data_ptr(), a.max_logits.stride(0)
    _set_latent(args.segments[0], a.kv, a.kv_format, a.indices, a.topk_length)
    if a.extra_kv is not None and a.extra_indices is not None:
        args.n_segments = 2
        extra = a.extra_kv, a.extra_kv_format, a.extra_indices, a.extra_topk_length
        _set_latent(args.segments[1], *extra)
    _run("attend", args)


def _set_latent(
    segment: _Segment, kv: Tensor, kv_format: str | None, indices: Tensor, topk_length: Tensor | None
) -> None:
    segment.k = segment.v = kv.data_ptr()
    segment.format, segment.page_size = ROW_FORMATS[kv_format], kv.shape[1] if kv.dim() == 3 else 1
    segment.k_page = kv.stride(0)
    segment.k_row = segment.v_row = kv.stride(1) if segment.page_size > 1 else kv.stride(0)
    segment.s_kv = kv.shape[0] * segment.page_size
    _set_selection(segment, indices, topk_length)


def sparse_gqa(a: "SparseGQAOp") -> None:
    args = _attention_args(a, h_kv=a.k.shape[1], d_v=a.v.shape[2])
    segment = args.segments[0]
    segment.k, segment.v = a.k.data_ptr(), a.v.data_ptr()
    segment.k_row, segment.k_head, _ = a.k.stride()
    segment.v_row, segment.v_head, _ = a.v.stride()
    segment.s_kv, segment.page_size = a.k.shape[0], 1
    _set_selection(segment, a.indices, a.topk_length)
    _run("attend", args)


def _set_selection(segment: _Segment, indices: Tensor, topk_length: Tensor | None) -> None:
    segment.indices, segment.topk = indices.data_ptr(), indices.shape[-1]
    segment.indices_query = indices.stride(0)
    segment.indices_head = indices.stride(1) if indices.dim() == 3 else 0
    segment.topk_length = None if topk_length is None else topk_length.data_ptr()


def _attention_args(a: "SparseMLAOp | SparseGQAOp", h_kv: int, d_v: int) -> _AttentionArgs:
    """Everything but the rows and their selection: one segment of them."""
    args = _AttentionArgs(h_kv=h_kv, d_v=d_v, n_segments=1, softmax_scale=a.softmax_scale or NEARLY_ZERO)
    _set_addresses(args, a, "q", "attn_sink", "out", "lse")
    args.s_q, args.h_q, args.d_qk = a.q.shape
    args.q_query, args.q_head, _ = a.q.stride()
    args.out_query, args.out_head, _ = a.out.stride()
    args.lse_query, args.dtype = a.lse.stride(0), DTYPES[a.q.dtype]
    return args


def write_kv(a: "WriteKVOp") -> None:
    fmt = None if a.cache_format is None else KV_FORMATS[a.cache_format]
    _write(a, a.kv, fmt, normalised=512, rope_start=a.kv.shape[1] - 64)


def write_index_k(a: "WriteIndexKOp") -> None:
    fmt = INDEX_K if a.cache.dtype == torch.uint8 else None
    _write(a, a.k, fmt, a.norm_bias, normalised=a.k.shape[1], hadamard=a.hadamard)


def _write(
    a: "WriteKVOp | WriteIndexKOp",
    x: Tensor,
    fmt: Format | None,
    norm_bias: Tensor | None = None,
    **rows: Any,
) -> None:
    cache, slots, weight = a.cache, a.slots, a.norm_weight
    if cache.numel() == 0:
        return
    args = _WriteArgs()
    _set_rows(args.rows, a, x, **rows)
    if weight is not None:
        norm = args.rows
        norm.eps, norm.norm_weight, norm.weight_dtype = a.eps, weight.data_ptr(), DTYPES[weight.dtype]
        if norm_bias is not None:
            norm.norm_bias, norm.bias_dtype = norm_bias.data_ptr(), DTYPES[norm_bias.dtype]
    args.cache, args.slots = cache.data_ptr(), slots.data_ptr()
    args.slot_bytes = slots.element_size()
    args.pages, args.page_size, _ = cache.shape
    args.page_step, args.values_step, _ = cache.stride()
    if fmt is None:
        args.cache_dtype = DTYPES[cache.dtype]
        args.page_step *= cache.element_size()
        args.values_step *= cache.element_size()
    else:
        layout = layout_of(fmt, cache)
        _set_quantisation(args.how, a, layout)
        args.values_step = layout.values_step
        args.scales_start, args.scales_step = layout.scales_start, layout.scales_step
        args.rope_start, args.rope_step = layout.rope_start, layout.rope_step
    _run("write", args)


def quantise_index_q(a: "QuantiseIndexQOp") -> None:
    args, d = _QuantiseArgs(), a.q.shape[2]
    _set_rows(args.rows, a, a.q, hadamard=a.hadamard)
    _set_quantisation(args.how, a, Layout("e4m3", "fp32", quantised=d, group=d))
    _set_addresses(args, a, "weights", "out", "out_weights")
    args.out_token, args.out_head, _ = a.out.stride()
    args.weights_token, args.out_weights_token = a.weights.stride(0), a.out_weights.stride(0)
    _run("quantise", args)


def _set_rows(
    rows: _Rows, a: Any, x: Tensor, normalised: int = 0, rope_start: int = 0, hadamard: bool = False
) -> None:
    """Rows ``[tokens, width]`` or ``[tokens, heads, width]``, and all that is done to them but the norm."""
    shape, strides, cos, sin = x.shape, x.stride(), a.cos, a.sin
    rows.x, rows.dtype = x.data_ptr(), DTYPES[x.dtype]
    rows.tokens, rows.width, rows.x_token, rows.heads = shape[0], shape[-1], strides[0], 1
    if len(shape) == 3:
        rows.heads, rows.x_head = shape[1], strides[1]
    rows.normalised, rows.rope_start = normalised, rope_start
    if hadamard:
        rows.hadamard = shape[-1] ** -0.5
    if cos is not None:
        rows.cos, rows.sin, rows.interleaved = cos.data_ptr(), sin.data_ptr(), a.pairing == "interleaved"
        (rows.cos_token, _), (rows.sin_token, _), rows.pairs = cos.stride(), sin.stride(), cos.shape[1]


def _set_quantisation(how: _Quantisation, a: Any, layout: Layout) -> None:
    how.values, how.scales = VALUE_KINDS[layout.values], SCALE_KINDS[layout.scales]
    how.quantised, how.group = layout.quantised, layout.group
    how.power_of_two, how.min_scale = a.power_of_two, a.min_scale
