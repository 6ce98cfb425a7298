"""Is each op right on a device? One small hostile case per op, against the fp64 reference.

``CHECKS[name](backend, device)`` raises AssertionError where the op is wrong. ``sparse-attn doctor`` runs
them on the machine it is called on; whoever ports a kernel runs them on theirs.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import formats
from .. import reference as exact
from ..formats.index_keys import INDEX_K
from ..ops import attention, index, writers
from . import assert_close, assert_logits_close, gqa_inputs, index_inputs, mla_inputs, to_pages

Check = Callable[[str, torch.device], None]


def _on(device: torch.device, inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in inputs.items()}


def _check_index(name: str, backend: str, device: torch.device) -> None:
    inputs = index_inputs(4, 300, 16, 64)
    here = _on(device, inputs)
    ranges = here["ks"], here["ke"]
    logits = index.index_logits(**here, backend=backend)
    if name == "index_logits":
        return assert_logits_close(logits, **inputs)
    if name == "select_topk":
        chosen = index.select_topk(logits, 32, *ranges, backend=backend)
    else:
        chosen = index.lightning_topk(**here, topk=32, backend=backend)
    _equal(chosen, exact.select_topk(logits.cpu(), 32, inputs["ks"], inputs["ke"]), "the selection")


def _check_slots(backend: str, device: torch.device) -> None:
    _, table = to_pages(torch.zeros(40, 1), 16)
    indices = torch.tensor([[0, 39, -1, 47, 48, 2**31 - 1]], dtype=torch.int32)
    here = indices.to(device), table.to(device)
    slots = index.physical_slots(*here, 16, backend=backend)
    _equal(slots, exact.physical_slots(indices, table, 16), "a slot")
    sequences = torch.tensor([0, 1], dtype=torch.int32)
    slots = index.physical_slots(
        *here, 16, cu_seqlens_q=sequences.to(device), page_stride=20, backend=backend
    )
    _equal(slots, exact.physical_slots(indices, table, 16, 20, sequences), "a slot of a sequence")


def _check_mla(backend: str, device: torch.device) -> None:
    inputs = mla_inputs(3, 40, 20, 16, 576, dtype=torch.bfloat16)
    _check_attention(attention.sparse_mla, backend, device, inputs)
    for name, fmt in formats.KV_FORMATS.items():
        kv = inputs["kv"].nan_to_num()[:, : fmt.width].unflatten(0, (5, 8))
        quantised = {**inputs, "q": inputs["q"][..., : fmt.width], "kv": fmt.pack(kv), "kv_format": name}
        rows = formats.unpack(quantised["kv"], torch.float64, name).flatten(0, 1)
        _check_attention(attention.sparse_mla, backend, device, quantised, {"kv": rows, "kv_format": None})


def _check_gqa(backend: str, device: torch.device) -> None:
    inputs = gqa_inputs(3, 40, 8, 2, 16, 64, 64, dtype=torch.bfloat16)
    _check_attention(attention.sparse_gqa, backend, device, inputs)


def _check_attention(
    function: Callable,
    backend: str,
    device: torch.device,
    inputs: dict[str, Any],
    values: dict[str, Any] | None = None,  # what quantised inputs hold
) -> None:
    def widen(x: Any) -> Any:
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    out, lse = function(**_on(device, inputs), return_lse=True, backend=backend)
    wide = {name: widen(x) for name, x in inputs.items()} | (values or {})
    expected, expected_lse = function(**wide, return_lse=True, backend="reference")
    assert_close(out.cpu(), expected, 1.5)
    torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=1e-4, atol=1e-4)


def _check_merge(backend: str, device: torch.device) -> None:
    g = torch.Generator().manual_seed(0)
    outs, lses = torch.randn(3, 4, 8, 64, generator=g), torch.randn(3, 4, 8, generator=g)
    lses[0] = float("-inf")  # an empty part, whose output nobody reads
    outs[0] = float("nan")
    lses[:, 1] = float("-inf")
    merged, lse = attention.merge_attention(outs.to(device), lses.to(device), backend=backend)
    expected, expected_lse = exact.merge_attention(outs.double(), lses.double())
    assert_close(merged.cpu(), expected)
    assert_close(lse.cpu(), expected_lse)


SLOTS = torch.tensor([5, -1, 0, 31, 2**31 - 1])  # the second and the last do not exist


def _check_kv(backend: str, device: torch.device) -> None:
    for name, fmt in formats.KV_FORMATS.items():
        write = functools.partial(writers.write_kv, cache_format=name)
        _check_writer(write, fmt.width, fmt, backend, device)
    for width in (576, 512):
        _check_writer(writers.write_kv, width, None, backend, device)


def _check_index_k(backend: str, device: torch.device) -> None:
    write = functools.partial(writers.write_index_k, hadamard=False)
    for fmt in (INDEX_K, None):
        _check_writer(write, 128, fmt, backend, device)


def _check_writer(
    write: Callable, width: int, fmt: formats.Format | None, backend: str, device: torch.device
) -> None:
    rows = torch.randn(5, width, generator=torch.Generator().manual_seed(0))
    cache = torch.zeros(1, 32, width, dtype=torch.bfloat16)
    if fmt is not None:
        cache = fmt.pack(cache.float())
    written = cache.to(device, copy=True)
    write(rows.to(device), written, SLOTS.to(device), backend=backend)
    expected = (cache,) if fmt is None else fmt.views(cache)
    sources = (rows[None].to(cache.dtype),) if fmt is None else fmt.views(fmt.pack(rows[None]))
    for part, source in zip(expected, sources, strict=True):
        part[0, [5, 0, 31]] = source[0, [0, 2, 3]]
    _equal(written, cache, "a byte of the cache")


def _check_index_q(backend: str, device: torch.device) -> None:
    g = torch.Generator().manual_seed(0)
    q, weights = torch.randn(3, 4, 128, generator=g), torch.randn(3, 4, generator=g)
    packed, scaled = writers.quantise_index_q(
        q.to(device), weights.to(device), hadamard=False, backend=backend
    )
    keys, scales = formats.index_k_views(formats.pack_index_k(q))
    _equal(packed.view(torch.uint8), keys.view(torch.uint8), "a byte")
    torch.testing.assert_close(scaled.cpu(), weights * scales)


def _equal(actual: Tensor, expected: Tensor, what: str) -> None:
    if not torch.equal(actual.cpu(), expected):
        raise AssertionError(f"{what} differs from the reference's")


CHECKS: dict[str, Check] = {
    **{n: functools.partial(_check_index, n) for n in ("index_logits", "select_topk", "lightning_topk")},
    "physical_slots": _check_slots,
    "sparse_mla": _check_mla,
    "sparse_gqa": _check_gqa,
    "merge_attention": _check_merge,
    "write_kv": _check_kv,
    "write_index_k": _check_index_k,
    "quantise_index_q": _check_index_q,
}
