"""The CPU kernels in C++ (``kernels/cpu``): loading them, what they take, and calling them.

The library knows nothing of torch: tensors go over as addresses, sizes and strides. It runs on
torch's OpenMP runtime, with torch's number of threads, which is why torch is imported before it is
loaded. ctypes releases the GIL for the length of a call.

Each operation has two functions here, of the same arguments as in :mod:`sparse_attn.cpu`: one that
runs it, and ``supports``, which says whether the library takes these arguments. It takes bf16, fp16
and fp32 whose last dimension is contiguous, and quantised caches; everything else is torch's.
"""

import ctypes
import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

LIBRARY = Path(__file__).with_name("_native.so")
DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
# Quantised caches: the library's number of a format, by the bytes of a token.
ROW_FORMATS = {656: 1, 584: 2, 528: 3, 288: 4}
# Index queries and keys, by their dtype.
INDEX_FORMATS = {torch.float8_e4m3fn: 1, torch.uint8: 2}
PEAK_KINDS = {"fp32": 0, "bf16": 1}

_POINTER, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class _IndexArgs(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("q", "k", "weights", "ks", "ke")),
        *((name, _POINTER) for name in ("q_scale", "k_scale", "block_table")),
        *((name, _SIZE) for name in ("q_query", "q_head", "k_page", "k_row", "weights_query", "table_row")),
        *((name, _SIZE) for name in ("q_scale_query", "q_scale_head", "k_scale_page", "k_scale_row")),
        *((name, _SIZE) for name in ("s_q", "heads", "d", "pages", "page_size", "tables", "width")),
        *((name, _INT) for name in ("dtype", "key_format", "query_format")),
    ]


class _Segment(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("k", "v", "indices", "topk_length")),
        *((name, _SIZE) for name in ("k_row", "k_head", "v_row", "v_head", "indices_query", "indices_head")),
        *((name, _SIZE) for name in ("s_kv", "topk", "page_size", "k_page", "format")),
    ]


class _AttentionArgs(ctypes.Structure):
    _fields_ = [
        ("segments", _Segment * 2),
        *((name, _POINTER) for name in ("q", "attn_sink", "out", "lse", "max_logits")),
        *((name, _SIZE) for name in ("q_query", "q_head", "out_query", "out_head", "lse_query")),
        ("max_logits_query", _SIZE),
        *((name, _SIZE) for name in ("s_q", "h_q", "h_kv", "d_qk", "d_v")),
        *(("n_segments", _INT), ("dtype", _INT), ("softmax_scale", _FLOAT)),
    ]


class _SelectArgs(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("logits", "ks", "ke", "out")),
        *((name, _SIZE) for name in ("logits_query", "out_query", "s_q", "s_kv", "topk")),
    ]


_FUNCTIONS = {
    "isas": (_INT, []),
    "isa_name": (ctypes.c_char_p, [_INT]),
    "isa_supported": (_INT, [_INT]),
    "default_isa": (_INT, []),
    "has_openmp": (_INT, []),
    "index_logits": (None, [_INT, _INT, _POINTER, _POINTER, _SIZE]),
    "select_topk": (None, [_INT, _INT, _POINTER]),
    "lightning_topk": (None, [_INT, _INT, _POINTER, _SIZE, _SIZE, _POINTER, _SIZE]),
    "attend": (None, [_INT, _INT, _POINTER]),
    "peak": (_SIZE, [_INT, _INT, _SIZE]),
}


class _Library:
    """The loaded library: its functions, and the instruction sets that this machine runs, the best first."""

    def __init__(self, path: Path):
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, f"sparse_attn_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        supported = [isa for isa in range(self.isas()) if self.isa_supported(isa)]
        self.numbers = {self.isa_name(isa).decode(): isa for isa in supported}
        self.isa = self.default_isa()  # in use


@functools.cache
def _library() -> _Library | None:
    """The library, or None with one warning that says why it is not in use."""
    try:
        return _Library(LIBRARY)
    except (OSError, AttributeError) as error:
        reason = f"cannot be loaded ({error})" if LIBRARY.exists() else "was not built"
    warnings.warn(
        f"sparse_attn: {LIBRARY.name} {reason}, so the CPU runs on torch, several times slower. Install a "
        "C++17 compiler and then sparse_attn again: pip install --force-reinstall --no-deps sparse_attn, or "
        "pip install -e . in a checkout.",
        RuntimeWarning,
        stacklevel=3,
    )
    return None


_disabled = False


def available() -> bool:
    """Whether the C++ kernels are in use."""
    return not _disabled and _library() is not None


def instruction_sets() -> list[str]:
    """Those that the library has and this machine runs, the widest first."""
    library = _library()
    return list(library.numbers) if library else []


def instruction_set() -> str | None:
    """The one in use; None when torch does the work."""
    library = _library()
    return library.isa_name(library.isa).decode() if library and not _disabled else None


def has_openmp() -> bool:
    """Whether the library was built with OpenMP; without it, it runs on one thread."""
    library = _library()
    return bool(library and library.has_openmp())


@contextmanager
def use(name: str | None) -> Iterator[None]:
    """Within the block everything runs on the named instruction set, on torch if it is None. For tests."""
    global _disabled
    library = _library()
    before = _disabled, library and library.isa
    if name is not None and (library is None or name not in library.numbers):
        raise ValueError(f"name: expected one of {instruction_sets()} or None, got {name!r}")
    _disabled = name is None
    if name is not None:
        library.isa = library.numbers[name]
    try:
        yield
    finally:
        _disabled = before[0]
        if library:
            library.isa = before[1]


def peak(kind: str, rounds: int) -> int:
    """Run multiply-adds ("fp32" or "bf16") in registers only; how many operations it made, 0 if none."""
    library = _library()
    return library.peak(library.isa, PEAK_KINDS[kind], rounds) if library else 0


def supports(name: str, *args) -> bool:
    """Whether op ``name`` runs here with these arguments."""
    if not available():
        return False
    for tensor in args:
        if isinstance(tensor, Tensor) and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            return False
    if name == "select_topk":
        return args[0].dtype == torch.float32
    q, k = args[:2]
    if min(q.shape[1:]) == 0:
        return False
    if name in ("index_logits", "lightning_topk"):
        # e4m3 keys are decoded a whole vector at a time.
        plain = q.dtype == k.dtype and q.dtype in DTYPES
        return plain or (k.dtype in INDEX_FORMATS and q.dtype != torch.float64 and k.shape[-1] % 16 == 0)
    return q.dtype in DTYPES and (q.dtype == k.dtype or k.dtype == torch.uint8)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _index_args(q, k, weights, ks, ke, q_scale, k_scale, block_table) -> _IndexArgs:
    s_q, heads, d = q.shape
    pages, page_size, tables, width, table_row = 1, k.shape[0], 1, k.shape[0], 0
    if block_table is not None:
        pages, page_size, _ = k.shape
        tables, max_pages = block_table.shape
        width, table_row = max_pages * page_size, block_table.stride(0)
    q_scale_query, q_scale_head = (0, 0) if q_scale is None else q_scale.stride()[:2]
    k_scale_page, k_scale_row = 0, 0
    if k_scale is not None:
        strides = k_scale.stride()[:2] if block_table is not None else (0, k_scale.stride(0))
        k_scale_page, k_scale_row = (stride * k_scale.element_size() for stride in strides)
    return _IndexArgs(
        *(_address(tensor) for tensor in (q, k, weights, ks, ke, q_scale, k_scale, block_table)),
        *(q.stride(0), q.stride(1), k.stride(0), k.stride(-2), weights.stride(0), table_row),
        *(q_scale_query, q_scale_head, k_scale_page, k_scale_row),
        *(s_q, heads, 2 * d if q.dtype == torch.uint8 else d, pages, page_size, tables, width),
        DTYPES.get(q.dtype, DTYPES[torch.bfloat16]),  # bf16 holds every value of a quantised query
        *(INDEX_FORMATS.get(x.dtype, 0) for x in (k, q)),
    )


def index_logits(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    ks: Tensor,
    ke: Tensor,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    block_table: Tensor | None,
    out: Tensor,
) -> None:
    if out.numel() == 0:
        return
    library = _library()
    args = _index_args(q, k, weights, ks, ke, q_scale, k_scale, block_table)
    threads = torch.get_num_threads()
    library.index_logits(library.isa, threads, ctypes.byref(args), out.data_ptr(), out.stride(0))


def select_topk(logits: Tensor, topk: int, ks: Tensor, ke: Tensor, out: Tensor) -> None:
    library = _library()
    args = _SelectArgs(
        *(logits.data_ptr(), ks.data_ptr(), ke.data_ptr(), out.data_ptr()),
        *(logits.stride(0), out.stride(0), *logits.shape, topk),
    )
    library.select_topk(library.isa, torch.get_num_threads(), ctypes.byref(args))


def lightning_topk(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    topk: int,
    ks: Tensor,
    ke: Tensor,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    block_table: Tensor | None,
    workspace_bytes: int,
    out: Tensor,
) -> None:
    library = _library()
    args = _index_args(q, k, weights, ks, ke, q_scale, k_scale, block_table)
    library.lightning_topk(
        *(library.isa, torch.get_num_threads(), ctypes.byref(args), topk, workspace_bytes),
        *(out.data_ptr(), out.stride(0)),
    )


def _mla_segment(kv: Tensor, indices: Tensor, topk_length: Tensor | None) -> _Segment:
    row, page_size, page, row_format = kv.stride(-2), 1, kv.stride(0), 0
    if kv.dtype == torch.uint8:
        page_size, row_format = kv.shape[1], ROW_FORMATS[kv.shape[2]]
    return _Segment(
        *(kv.data_ptr(), kv.data_ptr(), indices.data_ptr(), _address(topk_length)),
        *(row, 0, row, 0, indices.stride(0), 0, kv.shape[0] * page_size, indices.shape[1]),
        *(page_size, page, row_format),
    )


def _attend(segments, q, h_kv, d_v, softmax_scale, attn_sink, out, lse, max_logits=None) -> None:
    library = _library()
    s_q, h_q, d_qk = q.shape
    args = _AttentionArgs(
        (_Segment * 2)(*segments),
        *(q.data_ptr(), _address(attn_sink), out.data_ptr(), lse.data_ptr(), _address(max_logits)),
        *(q.stride(0), q.stride(1), out.stride(0), out.stride(1), lse.stride(0)),
        0 if max_logits is None else max_logits.stride(0),
        *(s_q, h_q, h_kv, d_qk, d_v, len(segments), DTYPES[q.dtype], softmax_scale),
    )
    library.attend(library.isa, torch.get_num_threads(), ctypes.byref(args))


def sparse_mla(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    d_v: int,
    softmax_scale: float,
    topk_length: Tensor | None,
    attn_sink: Tensor | None,
    extra_kv: Tensor | None,
    extra_indices: Tensor | None,
    extra_topk_length: Tensor | None,
    out: Tensor,
    lse: Tensor,
    max_logits: Tensor,
) -> None:
    segments = [_mla_segment(kv, indices, topk_length)]
    if extra_kv is not None:
        segments.append(_mla_segment(extra_kv, extra_indices, extra_topk_length))
    _attend(segments, q, 1, d_v, softmax_scale, attn_sink, out, lse, max_logits)


def sparse_gqa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    softmax_scale: float,
    topk_length: Tensor | None,
    attn_sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    segment = _Segment(
        *(k.data_ptr(), v.data_ptr(), indices.data_ptr(), _address(topk_length)),
        *(k.stride(0), k.stride(1), v.stride(0), v.stride(1)),
        *(indices.stride(0), indices.stride(1) if indices.dim() == 3 else 0, k.shape[0], indices.shape[-1]),
        *(1, 0, 0),
    )
    _attend([segment], q, k.shape[1], v.shape[2], softmax_scale, attn_sink, out, lse)
