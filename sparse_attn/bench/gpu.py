"""Every operation on a GPU, checked against fp64 and then timed beside dense attention and other libraries.

The same code runs on a CPU with tiny sizes, to try it before there is a GPU.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from .. import reference
from ..formats import index_k_views, pack_index_k, pack_v32_kv, unpack_v32_kv
from ..functional import (
    index_logits,
    lightning_topk,
    merge_attention,
    quantise_index_q,
    select_topk,
    sparse_gqa,
    sparse_mla,
    write_index_k,
    write_kv,
)
from ..testing import assert_close, assert_logits_close
from .timing import Clock, interleaved

PAGE_SIZE = 64
FACTOR = 2.5  # roundings that attention may err by: probabilities are rounded to bf16 too
MLA_SCALE, GQA_SCALE = 192**-0.5, 128**-0.5


class Sizes(NamedTuple):
    contexts: tuple[int, ...]  # whole pages
    batches: tuple[int, ...]  # sequences that decode together
    prefill: tuple[int, int]  # tokens, of context
    rows: tuple[int, ...]  # of logits
    topk: int
    heads: int  # of MLA
    index_heads: int
    gqa_heads: tuple[int, int]  # query, kv


FULL = Sizes((8192, 32768, 131072), (1, 32), (1024, 32768), (1, 64, 1024), 2048, 128, 64, (32, 8))
TINY = Sizes((128,), (2,), (5, 128), (3,), 16, 4, 4, (4, 2))

Functions = dict[str, Callable[[], Tensor]]


class Case(NamedTuple):
    functions: Functions  # by name, ours first
    check: Callable[[], None]  # raises if ours is wrong


Cases = Iterator[tuple[str, Callable[[], Case]]]  # a name, and what makes the tensors


def run(
    console: Console, device: torch.device, sizes: Sizes, rounds: int, clock: Clock, only: str = ""
) -> list[dict[str, Any]]:
    """A line for each case: seconds by function, or why there are none. Prints a table for each group."""
    lines = []
    for group, cases in GROUPS.items():
        if only not in group:
            continue
        part = []
        for name, build in cases(sizes, device):
            console.print(f"[dim]{group}, {name}[/dim]", highlight=False)
            part.append({"group": group, "case": name, **measure(build, rounds, clock)})
        show(console, group, part)
        lines += part
    return lines


def measure(build: Callable[[], Case], rounds: int, clock: Clock) -> dict[str, Any]:
    """Seconds of each function of a case. A wrong result is not timed; a peer that cannot run is named.

    What fails does not end the run: time on the machine may be short.
    """
    try:
        case = build()
        case.check()
    except Exception as error:
        return {"seconds": {}, "failed": {}, "not_timed": _words(error)}
    able, failed = {}, {}
    for name, function in case.functions.items():
        try:
            function()
            able[name] = function
        except Exception as error:  # not built for this card, or out of memory
            failed[name] = _words(error)
    timings = interleaved(able, rounds, clock=clock)
    return {"seconds": {name: dataclasses.asdict(t) for name, t in timings.items()}, "failed": failed}


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def show(console: Console, group: str, lines: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for line in lines for name in line["seconds"]))
    table = Table(
        title=f"{group}, ms (in brackets: times the first)", title_justify="left", box=box.SIMPLE_HEAD
    )
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for line in lines:
        if line["seconds"]:
            base = next(iter(line["seconds"].values()))["median"]
            times = {name: seconds["median"] for name, seconds in line["seconds"].items()}
            cells = [f"{times[n] * 1e3:.4g} ({times[n] / base:.2f})" if n in times else "-" for n in names]
            table.add_row(line["case"], *cells)
    if names:
        console.print(table)
    for line in lines:
        if "not_timed" in line:
            console.print(f"[red]{line['case']}: not timed: {line['not_timed']}[/red]", highlight=False)
        for name, reason in line["failed"].items():
            console.print(f"{line['case']}, {name}: {reason}", highlight=False)


# DeepSeek's layer: one call of the whole, its three parts, and attention over the whole context.


def mla_decode(sizes: Sizes, device: torch.device) -> Cases:
    for batch in sizes.batches:
        for context in sizes.contexts:
            yield f"{batch} x {context:,}", partial(_mla_decode, sizes, device, batch, context)


def _mla_decode(sizes: Sizes, device: torch.device, batch: int, context: int) -> Case:
    q, kv = _normal(device, batch, sizes.heads, 576), _normal(device, batch, context, 576)
    pages = context // PAGE_SIZE
    table = torch.arange(batch * pages, dtype=torch.int32, device=device).view(batch, pages)
    ke = torch.full((batch,), context, dtype=torch.int32, device=device)
    index_q, index_k = (
        _normal(device, batch, sizes.index_heads, 128),
        _normal(device, batch * pages, PAGE_SIZE, 128),
    )

    def sdpa() -> Tensor:  # the heads as query rows: each latent is read once
        return F.scaled_dot_product_attention(q[:, None], kv[:, None], kv[:, None], scale=MLA_SCALE)[:, 0]

    def gemm() -> Tensor:
        return ((q @ kv.mT) * MLA_SCALE).softmax(-1) @ kv[..., :512]

    peers = {"dense SDPA": sdpa, "dense GEMM": gemm} | _if_installed(
        "flashinfer", {"dense FlashInfer": _flashinfer_mla(q, kv)}
    )
    first_row = PAGE_SIZE * table[:, :1]
    return _mla(sizes.topk, (index_q, index_k), (ke * 0, ke), table, q, kv.flatten(0, 1), first_row, peers)


def mla_prefill(sizes: Sizes, device: torch.device) -> Cases:
    tokens, context = sizes.prefill
    yield f"{tokens:,} of {context:,}", partial(_mla_prefill, sizes, device)


def _mla_prefill(sizes: Sizes, device: torch.device) -> Case:
    tokens, context = sizes.prefill
    ke = torch.arange(context - tokens + 1, context + 1, dtype=torch.int32, device=device)
    index = _normal(device, tokens, sizes.index_heads, 128), _normal(device, context, 128)
    q, kv = _normal(device, tokens, sizes.heads, 576), _normal(device, context, 576)
    # Heads of 192 and 128, expanded from the latents: 320 multiplications a pair, not 1088.
    wide_q, wide_k = (_normal(device, 1, sizes.heads, n, 192) for n in (tokens, context))
    wide_v = F.pad(_normal(device, 1, sizes.heads, context, 128), (0, 64))  # flash attention wants one width
    peers = {"dense SDPA, heads expanded": lambda: _sdpa_causal(wide_q, wide_k, wide_v, MLA_SCALE)}
    return _mla(sizes.topk, index, (ke * 0, ke), None, q, kv, None, peers)


def _mla(
    topk: int,
    index: tuple[Tensor, Tensor],  # queries and keys of the indexer
    ranges: tuple[Tensor, Tensor],
    block_table: Tensor | None,
    q: Tensor,  # [s_q, heads, 576]
    kv: Tensor,  # [rows, 576]
    first_row: Tensor | None,  # [s_q, 1]: where the rows of each query start in kv
    peers: Functions,
) -> Case:
    weights = torch.randn(index[0].shape[:2], device=q.device)
    inputs = *index, weights

    def score() -> Tensor:
        return index_logits(*inputs, *ranges, block_table=block_table)

    def select() -> Tensor:
        selected = lightning_topk(*inputs, topk, *ranges, block_table=block_table)
        return selected if first_row is None else torch.where(selected < 0, -1, selected + first_row)

    def attend(indices: Tensor) -> Tensor:
        return sparse_mla(q, kv, indices, softmax_scale=MLA_SCALE)

    logits, indices = score(), select()
    packed = _packed(kv)
    t = sorted({0, len(q) - 1})  # queries that are checked

    def attend_fp8() -> Tensor:
        return sparse_mla(q, packed, indices, softmax_scale=MLA_SCALE)

    def exact(rows: Tensor, gathered: Tensor) -> Tensor:
        return reference.sparse_mla(q[t].double(), gathered, rows, 512, MLA_SCALE)[0]

    @cache
    def warp_specialised() -> Callable[[], Tensor]:  # where it is wrong the others are timed nonetheless
        function = partial(sparse_mla, q, kv, indices, softmax_scale=MLA_SCALE, variant="warp_specialized")
        assert_close(function()[t], exact(*_rows(indices[t], kv)), FACTOR)
        return function

    def check() -> None:
        table, keys = (None, index[1]) if block_table is None else _pages(block_table[t], index[1])
        scored = index[0][t].double(), keys.double(), weights[t].double(), *(x[t] for x in ranges)
        assert_close(logits[t], reference.index_logits(*scored, block_table=table))
        selected = reference.select_topk(logits, topk, *ranges)
        if first_row is not None:
            selected = torch.where(selected < 0, -1, selected + first_row)
        assert torch.equal(indices, selected), "the selection differs from the reference's"
        assert_close(attend(indices)[t], exact(*_rows(indices[t], kv)), FACTOR)
        rows, gathered = _rows(indices[t], packed.flatten(0, 1))
        assert_close(attend_fp8()[t], exact(rows, unpack_v32_kv(gathered, torch.float64)), FACTOR)

    def flash_mla() -> Tensor:
        from flash_mla import flash_mla_sparse_fwd

        return flash_mla_sparse_fwd(q, kv[:, None], indices[:, None], MLA_SCALE)[0]

    @cache
    def flash_mla_fp8() -> Callable[[], Tensor]:
        from flash_mla import flash_mla_with_kvcache, get_mla_metadata

        inputs = q[:, None], packed[:, :, None], None, None, 512, *get_mla_metadata(), MLA_SCALE, False, True
        return lambda: flash_mla_with_kvcache(*inputs, indices[:, None])[0].flatten(0, 1)

    functions = {
        "indexer + top-k + attend": lambda: attend(select()),
        "indexer": score,
        "top-k": lambda: select_topk(logits, topk, *ranges),
        "attend": lambda: attend(indices),
        "attend, fp8 cache": attend_fp8,
        **({"attend, warp-specialised": lambda: warp_specialised()()} if _is_hopper(q.device) else {}),
        **_if_installed(
            "flash_mla",
            {"attend, FlashMLA": flash_mla, "attend, FlashMLA fp8 cache": lambda: flash_mla_fp8()()},
        ),
        **peers,
    }
    return Case(functions, check)


def gqa_decode(sizes: Sizes, device: torch.device) -> Cases:
    for batch in sizes.batches:
        for context in sizes.contexts:
            yield f"{batch} x {context:,}", partial(_gqa_decode, sizes, device, batch, context)


def _gqa_decode(sizes: Sizes, device: torch.device, batch: int, context: int) -> Case:
    h_q, h_kv = sizes.gqa_heads
    q = _normal(device, batch, h_q, 128)
    k, v = (_normal(device, batch * context, h_kv, 128) for _ in "kv")
    # The heads of a group as query rows: each key is read once.
    grouped = q.unflatten(1, (h_kv, -1))
    keys, values = (x.unflatten(0, (batch, context)).transpose(1, 2).contiguous() for x in (k, v))
    peers = {"dense SDPA": lambda: F.scaled_dot_product_attention(grouped, keys, values).flatten(1, 2)}
    ke = torch.full((batch,), context, device=device)
    first_row = context * torch.arange(batch, device=device)[:, None]
    return _gqa(sizes.topk, q, k, v, ke, first_row, peers)


def gqa_prefill(sizes: Sizes, device: torch.device) -> Cases:
    tokens, context = sizes.prefill
    yield f"{tokens:,} of {context:,}", partial(_gqa_prefill, sizes, device)


def _gqa_prefill(sizes: Sizes, device: torch.device) -> Case:
    (tokens, context), (h_q, h_kv) = sizes.prefill, sizes.gqa_heads
    q = _normal(device, tokens, h_q, 128)
    k, v = (_normal(device, context, h_kv, 128) for _ in "kv")
    heads_first = [x.transpose(0, 1)[None].contiguous() for x in (q, k, v)]

    def sdpa() -> Tensor:
        return _sdpa_causal(*heads_first, GQA_SCALE)[0].transpose(0, 1)

    def flashinfer() -> Tensor:
        from flashinfer import single_prefill_with_kv_cache

        return single_prefill_with_kv_cache(q, k, v, causal=True)

    peers = {"dense SDPA": sdpa, **_if_installed("flashinfer", {"dense FlashInfer": flashinfer})}
    ke = torch.arange(context - tokens + 1, context + 1, device=device)
    return _gqa(sizes.topk, q, k, v, ke, torch.zeros_like(ke)[:, None], peers)


def _gqa(topk: int, q: Tensor, k: Tensor, v: Tensor, ke: Tensor, first_row: Tensor, peers: Functions) -> Case:
    """Random selections among the ``ke`` tokens that each query sees, in the rows from ``first_row`` on."""
    order = torch.rand(len(q), int(ke.max()), device=q.device)
    order.masked_fill_(torch.arange(order.shape[1], device=q.device) >= ke[:, None], -1.0)
    score, selected = order.topk(topk)
    indices = torch.where(score < 0, -1, selected + first_row).sort().values.int()

    def ours() -> Tensor:
        return sparse_gqa(q, k, v, indices)

    def check() -> None:
        t = sorted({0, len(q) - 1})
        rows, *gathered = _rows(indices[t], k, v)
        exact, _ = reference.sparse_gqa(q[t].double(), *gathered, rows, GQA_SCALE)
        assert_close(ours()[t], exact, FACTOR)

    return Case({"sparse_gqa": ours, **peers}, check)


def top_k(sizes: Sizes, device: torch.device) -> Cases:
    for rows in sizes.rows:
        for context in sizes.contexts:
            yield f"{rows} x {context:,}", partial(_top_k, sizes.topk, rows, context, device)


def _top_k(topk: int, rows: int, context: int, device: torch.device) -> Case:
    logits = torch.randn(rows, context, device=device)
    ke = torch.full((rows,), context, dtype=torch.int32, device=device)
    ks = torch.zeros_like(ke)

    def ours() -> Tensor:
        return select_topk(logits, topk, ks, ke)

    def check() -> None:
        expected = reference.select_topk(logits, topk, ks, ke)
        assert torch.equal(ours(), expected), "the selection differs from the reference's"

    peers = {"torch.topk, unordered": lambda: logits.topk(topk, sorted=False).indices}
    return Case({"select_topk": ours, **peers}, check)


def merge(sizes: Sizes, device: torch.device) -> Cases:
    for batch in sizes.batches:
        yield f"8 parts x {batch}", partial(_merge, sizes.heads, batch, device)


def _merge(heads: int, batch: int, device: torch.device) -> Case:
    outs, lses = _normal(device, 8, batch, heads, 512), torch.randn(8, batch, heads, device=device)

    def ours() -> Tensor:
        return merge_attention(outs, lses)[0]

    def check() -> None:
        assert_close(ours(), reference.merge_attention(outs.double(), lses.double())[0])

    peers = {"torch": lambda: (lses.softmax(0)[..., None] * outs).sum(0)}
    return Case({"merge_attention": ours, **peers}, check)


def fp8_indexer(sizes: Sizes, device: torch.device) -> Cases:
    for batch in sizes.batches:
        for context in sizes.contexts:
            yield f"{batch} x {context:,}", partial(_fp8_indexer, sizes, device, batch, context)


def _fp8_indexer(sizes: Sizes, device: torch.device, batch: int, context: int) -> Case:
    """Decode over paged keys: fp8 queries and keys, bf16 queries and fp8 keys, and both in bf16."""
    n = batch * context // PAGE_SIZE
    q, weights = _normal(device, batch, sizes.index_heads, 128), torch.randn(batch, sizes.index_heads)
    weights = weights.to(device)
    k, table = _normal(device, n, PAGE_SIZE, 128), torch.randperm(n, device=device).int().view(batch, -1)
    packed = pack_index_k(k)
    codes, folded = quantise_index_q(q, weights, hadamard=False)
    ke = torch.full((batch,), context, dtype=torch.int32, device=device)
    ks = torch.zeros_like(ke)

    def score(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
        return index_logits(q, k, weights, ks, ke, block_table=table)

    def check() -> None:
        t = sorted({0, batch - 1})
        pages = table[t].flatten().long()
        own = torch.arange(len(pages), dtype=torch.int32, device=device).view(len(t), -1)
        values, scales = (part[pages] for part in index_k_views(packed))
        scored = {"weights": folded[t], "ks": ks[t], "ke": ke[t], "block_table": own}
        assert_logits_close(score(codes, packed, folded)[t], codes[t], values, k_scale=scales, **scored)

    functions = {
        "index_logits": lambda: score(codes, packed, folded),
        "index_logits, bf16 queries": lambda: score(q, packed, weights),
        "index_logits, bf16": lambda: score(q, k, weights),
        "lightning_topk": lambda: lightning_topk(
            codes, packed, folded, sizes.topk, ks, ke, block_table=table
        ),
    }
    return Case(functions, check)


def writers(sizes: Sizes, device: torch.device) -> Cases:
    tokens, _ = sizes.prefill
    yield f"{tokens:,} tokens", partial(_writers, sizes.index_heads, tokens, device)


def _writers(heads: int, tokens: int, device: torch.device) -> Case:
    """New tokens of one layer into its caches; a peer does the same in torch."""
    kv, k, q = (_normal(device, tokens, *shape) for shape in ((576,), (128,), (heads, 128)))
    norm, weights = _normal(device, 512), torch.randn(tokens, heads, device=device)
    angle = torch.randn(tokens, 32, device=device)
    turn = {"cos": angle.cos(), "sin": angle.sin()}
    slots = torch.randperm(tokens, device=device)
    n = -(-tokens // PAGE_SIZE)
    caches = [torch.zeros(n, PAGE_SIZE, size, dtype=torch.uint8, device=device) for size in (656, 132)]

    def latents(backend: str = "auto") -> Tensor:
        write_kv(kv, caches[0], slots, norm_weight=norm, **turn, pairing="interleaved", backend=backend)
        return caches[0]

    def keys(backend: str = "auto") -> Tensor:
        layer_norm = {"norm_weight": norm[:128], "norm_bias": norm[128:256]}
        write_index_k(k, caches[1], slots, **layer_norm, **turn, pairing="half", backend=backend)
        return caches[1]

    def check() -> None:
        for write in (latents, keys):  # sums of another order may round a few values to a neighbour
            ours, expected = write().clone(), write("reference")
            assert (ours != expected).float().mean() < 1e-2, "the bytes differ from the reference's"

    functions = {
        "write_kv": latents,
        "write_index_k": keys,
        "quantise_index_q": lambda: quantise_index_q(q, weights, **turn, pairing="half")[0],
        "write_kv, torch": partial(latents, "reference"),
        "write_index_k, torch": partial(keys, "reference"),
    }
    return Case(functions, check)


GROUPS: dict[str, Callable[[Sizes, torch.device], Cases]] = {
    "MLA decode": mla_decode,
    "MLA prefill": mla_prefill,
    "GQA decode": gqa_decode,
    "GQA prefill": gqa_prefill,
    "select_topk": top_k,
    "merge_attention": merge,
    "fp8 indexer": fp8_indexer,
    "writers": writers,
}


def _normal(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=device)


def _rows(indices: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
    """Indices into the selected rows alone, and those rows in fp64: whole caches would not fit."""
    places = torch.arange(indices.numel(), dtype=torch.int32, device=indices.device).view_as(indices)
    slots = indices.clamp(min=0).flatten().long()
    rows = (cache[slots] for cache in caches)
    return torch.where(indices < 0, -1, places), *(r if r.dtype == torch.uint8 else r.double() for r in rows)


def _packed(kv: Tensor) -> Tensor:
    """In pages of 656 bytes a token, made in parts: the fp32 copies of a whole cache would not fit."""
    return torch.cat([pack_v32_kv(part) for part in kv.split(1 << 18)]).unflatten(0, (-1, PAGE_SIZE))


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def _pages(table: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(table.numel(), dtype=torch.int32, device=table.device).view_as(table), pages[
        table.flatten().long()
    ]


def _if_installed(package: str, functions: Functions) -> Functions:
    return functions if find_spec(package) else {}


def _sdpa_causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q ``[1, h_q, s_q, d]`` are the last of the positions of k and v ``[1, h_kv, s_kv, d]``."""
    mask = causal_lower_right(q.shape[2], k.shape[2])  # not a tensor: torch takes its flash kernel
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def _flashinfer_mla(q: Tensor, kv: Tensor) -> Callable[[], Tensor]:
    """Dense absorbed MLA of one query a sequence, planned once as an engine would."""

    @cache
    def plan() -> Callable[[], Tensor]:
        from flashinfer.mla import BatchMLAPagedAttentionWrapper

        batch, context = kv.shape[:2]
        wrapper = BatchMLAPagedAttentionWrapper(torch.empty(128 << 20, dtype=torch.int8, device=q.device))
        starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
        rows = torch.arange(batch * context, dtype=torch.int32, device=q.device)
        lengths = torch.full((batch,), context, dtype=torch.int32, device=q.device)
        shape = q.shape[1], 512, 64, 1  # heads, latent, RoPE, page size
        wrapper.plan(starts, starts * context, rows, lengths, *shape, False, MLA_SCALE, q.dtype, kv.dtype)
        parts = *q.split([512, 64], -1), *kv.flatten(0, 1)[:, None].split([512, 64], -1)
        return partial(wrapper.run, *(part.contiguous() for part in parts))

    return lambda: plan()()
