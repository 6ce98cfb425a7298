"""The operations as ``torch.library`` ops: schemas, fakes, and one implementation a device.

Every op fills outputs that its caller allocated and returns nothing, so one schema serves plain
calls, ``out=``, CUDA graphs and ``torch.compile``. Implementations are imported at their first call.
"""

import functools
import importlib
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import native, reference

SPARSE_MLA = (
    "(Tensor q, Tensor kv, Tensor indices, int d_v, float softmax_scale, "
    "Tensor? topk_length, Tensor? attn_sink, Tensor? extra_kv, Tensor? extra_indices, "
    "Tensor? extra_topk_length, Tensor(a!) out, Tensor(b!) lse, Tensor(c!) max_logits) -> ()"
)
# kv and extra_kv come as rows [slots, d_qk], or quantised (uint8) as [pages, page_size, bytes] with any
# distance between pages. Quantised index queries and keys come as values, e4m3 or pairs of e2m1 (uint8), and
# their scales: of e4m3 keys one fp32, of e2m1 bytes [..., d / 32] of ue8m0; e4m3 queries have none. Where an
# op writes e4m3, it writes bytes.
SCHEMAS = {
    "index_logits": "(Tensor q, Tensor k, Tensor weights, Tensor ks, Tensor ke, Tensor? q_scale, "
    "Tensor? k_scale, Tensor? block_table, Tensor(a!) out) -> ()",
    "select_topk": "(Tensor logits, int topk, Tensor ks, Tensor ke, Tensor(a!) out) -> ()",
    "lightning_topk": "(Tensor q, Tensor k, Tensor weights, int topk, Tensor ks, Tensor ke, "
    "Tensor? q_scale, Tensor? k_scale, Tensor? block_table, int workspace_bytes, Tensor(a!) out) -> ()",
    "physical_slots": "(Tensor indices, Tensor block_table, int page_size, Tensor(a!) out) -> ()",
    "write_kv": "(Tensor kv, Tensor slots, Tensor? norm_weight, float eps, Tensor? cos, Tensor? sin, "
    "str? pairing, bool power_of_two, float min_scale, Tensor(a!) cache) -> ()",
    "write_index_k": "(Tensor k, Tensor slots, Tensor? norm_weight, Tensor? norm_bias, float eps, "
    "Tensor? cos, Tensor? sin, str? pairing, bool hadamard, bool power_of_two, float min_scale, "
    "Tensor(a!) cache) -> ()",
    "quantise_index_q": "(Tensor q, Tensor weights, Tensor? cos, Tensor? sin, str? pairing, bool hadamard, "
    "bool power_of_two, float min_scale, Tensor(a!) out, Tensor(b!) out_weights) -> ()",
    "sparse_mla": SPARSE_MLA,
    "sparse_mla_hopper": SPARSE_MLA,
    "sparse_gqa": "(Tensor q, Tensor k, Tensor v, Tensor indices, float softmax_scale, "
    "Tensor? topk_length, Tensor? attn_sink, Tensor(a!) out, Tensor(b!) lse) -> ()",
    "merge_attention": "(Tensor outs, Tensor lses, Tensor(a!) out, Tensor(b!) lse) -> ()",
}

TRITON_ONLY = ("sparse_mla_hopper",)
# Their definition fills the outputs, caches among them, and is what runs on the CPU.
WRITERS = ("write_kv", "write_index_k", "quantise_index_q")
DISPATCH_KEYS = {"cpu": "CPU", "triton": "CUDA"}
BACKENDS = ("auto", "reference", *DISPATCH_KEYS)

# What scoring and selection hold for each logit of a row. In torch: the logit, its masked and sorted
# copies, int64 positions. In Triton: the logit, and the list of kernels/select_topk.py.
BYTES_PER_LOGIT = {"cpu": 40, "triton": 5}


@functools.cache
def implementation(name: str, backend: str) -> Callable[..., None]:
    """The function that runs op ``name`` on ``backend`` ("cpu" or "triton")."""
    if backend == "cpu" and hasattr(native, name):
        return functools.partial(_native_or_torch, name, getattr(native, name), _torch_or_triton(name, "cpu"))
    return _torch_or_triton(name, backend)


def _native_or_torch(name: str, in_cpp: Callable[..., None], in_torch: Callable[..., None], *args) -> None:
    (in_cpp if native.supports(name, *args) else in_torch)(*args)


def _torch_or_triton(name: str, backend: str) -> Callable[..., None]:
    if name == "lightning_topk":
        score, select = (implementation(part, backend) for part in ("index_logits", "select_topk"))
        if backend == "triton":
            score = functools.partial(score, clean=False)  # nobody reads what lies outside the ranges
        return functools.partial(_lightning_topk_in_chunks, score, select, BYTES_PER_LOGIT[backend])
    if backend == "cpu" and name in WRITERS:
        return getattr(reference, name)
    module = "sparse_attn.cpu" if backend == "cpu" else f"sparse_attn.kernels.{name}"
    return getattr(importlib.import_module(module), name)


def call(name: str, backend: str, inputs: tuple, outputs: tuple[Tensor, ...]) -> None:
    """Run op ``name`` on ``backend``, filling ``outputs``."""
    if backend == "reference" and name in WRITERS:
        getattr(reference, name)(*inputs, *outputs)
    elif backend == "reference":
        results = getattr(reference, name)(*inputs)
        for out, result in zip(outputs, (results,) if len(outputs) == 1 else results, strict=True):
            out.copy_(result)
    elif backend == "triton" and outputs[0].device.type == "cpu":  # Triton's interpreter
        implementation(name, "triton")(*inputs, *outputs)
    else:
        getattr(torch.ops.sparse_attn, name)(*inputs, *outputs)


def check_backend(backend: str, device: torch.device) -> None:
    """Raise ValueError unless ``backend`` can run tensors on ``device``."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if backend == "reference":
        return
    if backend == "auto" and device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"backend: 'auto' runs on cpu and cuda tensors, got tensors on {device}; "
            "backend='reference' runs on any device, slowly"
        )
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f"backend: 'cpu' needs cpu tensors, got tensors on {device}")
    if backend == "triton" and device.type != "cuda" and not _interpreting(device):
        raise ValueError(
            f"backend: 'triton' needs cuda tensors, got tensors on {device} "
            "(cpu tensors need Triton's interpreter: set TRITON_INTERPRET=1 before triton is imported)"
        )


def _interpreting(device: torch.device) -> bool:
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


def _lightning_topk_in_chunks(
    score: Callable[..., None],
    select: Callable[..., None],
    bytes_per_logit: int,
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
    """Score and select as many queries at a time as fit the workspace, at least one."""
    s_q = q.shape[0]
    width = k.shape[0] if block_table is None else block_table.shape[1] * k.shape[1]
    queries = s_q if block_table is None else s_q // max(1, len(block_table))  # of each table row
    padded = -(-width // 16) * 16  # rows of logits that start at multiples of 64 bytes are read faster
    rows = max(1, min(s_q, workspace_bytes // max(1, bytes_per_logit * padded)))
    logits = torch.empty(rows, padded, dtype=reference.compute_dtype(q.dtype), device=q.device)
    ke = ke.clamp(max=width)
    for t in _chunks(s_q, queries, rows):
        table = None if block_table is None else block_table[t.start // queries : -(-t.stop // queries)]
        chunk = logits[: t.stop - t.start]
        scale = None if q_scale is None else q_scale[t]
        score(q[t], k, weights[t], ks[t], ke[t], scale, k_scale, table, chunk[:, :width])
        select(chunk, topk, ks[t], ke[t], out[t])


def _chunks(s_q: int, queries: int, rows: int) -> Iterator[slice]:
    """Slices of s_q queries, at most ``rows`` each, that hold whole table rows or a part of one."""
    group = max(1, rows // max(1, queries)) * queries
    for first in range(0, s_q, max(1, group)):
        last = min(first + group, s_q)
        yield from (slice(t, min(t + rows, last)) for t in range(first, last, rows))


def _register() -> None:
    for name, schema in SCHEMAS.items():
        op = f"sparse_attn::{name}"
        torch.library.define(op, schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.register_fake(op, lambda *args: None)
        for backend, key in DISPATCH_KEYS.items():
            if backend == "triton" or name not in TRITON_ONLY:
                torch.library.impl(op, key, _deferred(name, backend))


def _deferred(name: str, backend: str) -> Callable[..., None]:
    return lambda *args: implementation(name, backend)(*args)


_register()
