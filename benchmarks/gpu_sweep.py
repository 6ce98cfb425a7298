"""Time every configuration that a kernel could take on this machine's GPU, beside the one that it takes.

For each kind of input: the result of each configuration must be as close to fp64 as the tests ask, or it is
named and not timed. Configurations are compiled by several processes first. Times as in benchmarks/gpu.py,
best first.
"""

import argparse
import contextlib
import dataclasses
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.attention import FACTOR, SCALE
from bench.operations import in_shares
from bench.tensors import gathered, normal, packed
from bench.timing import CudaClock, append_json, interleaved
from sparse_attn import index_logits, quantise_index_q, reference, select_topk, sparse_gqa, sparse_mla
from sparse_attn.formats import pack_index_k, unpack
from sparse_attn.kernels import configs
from sparse_attn.kernels import index_logits as index_kernel
from sparse_attn.kernels import select_topk as topk_kernel
from sparse_attn.kernels.configs import AttentionConfig, IndexConfig
from sparse_attn.testing import assert_close

DEVICE = torch.device("cuda", 0)
ROWS = 1 << 20  # of the cache that queries select from: 1.2 GB, far more than an L2 cache
TOPK = 2048
HOPPER = "warp-specialised"  # the kernel for sm_90, which has no configurations, for all that it can compute


class Inputs(NamedTuple):
    run: Callable[[], torch.Tensor]
    check: Callable[[torch.Tensor], None]  # raises where the result is wrong


class Sweep(NamedTuple):
    label: str
    inputs: Callable[[], Inputs]
    place: Callable[[Any], contextlib.AbstractContextManager]  # puts a configuration in place
    candidates: list[Any]


# -- What is swept


def attention(queries: int, heads: int, fp8: bool) -> Inputs:
    q, kv = normal(DEVICE, queries, heads, 576), normal(DEVICE, ROWS, 576)
    indices = torch.randint(ROWS, (queries, TOPK), dtype=torch.int32, device=DEVICE)
    cache = packed(kv) if fp8 else kv

    def check(out: torch.Tensor) -> None:
        t = sorted({0, queries // 2, queries - 1})
        rows, picked = gathered(indices[t], cache.flatten(0, 1) if fp8 else cache)
        values = unpack(picked, torch.float64) if fp8 else picked.double()
        exact = reference.sparse_mla(q[t].double(), values, rows, 512, SCALE)[0]
        assert_close(out[t], exact, FACTOR["cuda"])

    return Inputs(lambda: sparse_mla(q, cache, indices, softmax_scale=SCALE), check)


def gqa(queries: int, h_q: int, h_kv: int, d: int) -> Inputs:
    rows_of_cache = ROWS // 4
    q = normal(DEVICE, queries, h_q, d)
    k, v = (normal(DEVICE, rows_of_cache, h_kv, d) for _ in "kv")
    indices = torch.randint(rows_of_cache, (queries, TOPK), dtype=torch.int32, device=DEVICE)

    def check(out: torch.Tensor) -> None:
        t = [0, queries - 1]
        rows, *kv = gathered(indices[t], k, v)
        exact = reference.sparse_gqa(q[t].double(), *(x.double() for x in kv), rows, d**-0.5)[0]
        assert_close(out[t], exact, FACTOR["cuda"])

    return Inputs(lambda: sparse_gqa(q, k, v, indices), check)


def paged_index(batch: int, context: int, form: str) -> Inputs:
    """One query per sequence, keys in pages of 64."""
    k = normal(DEVICE, batch * context // 64, 64, 128)
    table = torch.randperm(len(k), dtype=torch.int32, device=DEVICE).view(batch, -1)
    ke = torch.full((batch,), context, dtype=torch.int32, device=DEVICE)
    return _index(normal(DEVICE, batch, 64, 128), k, ke, form, block_table=table)


def prefill_index(tokens: int, context: int, form: str) -> Inputs:
    k = normal(DEVICE, context, 128)
    ke = torch.arange(context - tokens + 1, context + 1, dtype=torch.int32, device=DEVICE)
    return _index(normal(DEVICE, tokens, 64, 128), k, ke, form)


def _index(q: torch.Tensor, k: torch.Tensor, ke: torch.Tensor, form: str, **options: Any) -> Inputs:
    weights = torch.randn(q.shape[:2], device=DEVICE)
    if form == "fp8":
        pages = k if k.dim() == 3 else k.unflatten(0, (-1, 64))
        k = pack_index_k(pages)
        if "block_table" not in options:
            table = torch.arange(len(k), dtype=torch.int32, device=DEVICE)[None]
            options["block_table"] = table.expand(1, -1)
        q, weights = quantise_index_q(q, weights, hadamard=False)
    ks = torch.zeros_like(ke)
    first = index_logits(q, k, weights, ks, ke, **options)

    def check(logits: torch.Tensor) -> None:
        seen = torch.isfinite(first)
        assert torch.equal(seen, torch.isfinite(logits)), "other positions are seen"
        error = (logits - first)[seen].abs().max() / first[seen].abs().max()
        assert error < 1e-4, f"differs from the present configuration by {error:.1e}"

    return Inputs(lambda: index_logits(q, k, weights, ks, ke, **options), check)


def top_k(rows: int, context: int) -> Inputs:
    logits = torch.randn(rows, context, device=DEVICE)
    ks = torch.zeros(rows, dtype=torch.int32, device=DEVICE)
    ke = ks + context

    def check(selected: torch.Tensor) -> None:
        assert torch.equal(selected, reference.select_topk(logits, TOPK, ks, ke)), "the selection differs"

    return Inputs(lambda: select_topk(logits, TOPK, ks, ke), check)


# -- Where configurations lie


@contextlib.contextmanager
def in_table(table: str, heads: int | None, config: Any) -> Iterator[None]:
    """Make ``config`` what this GPU takes: for heads per program of attention, or for the indexer's keys."""
    if config == HOPPER:
        with constants(configs, ("WARP_SPECIALISED",), ("all",)):
            yield
        return
    entries, arch = getattr(configs, table), configs.architecture(DEVICE)
    before = entries.get(arch)
    if heads is not None:
        config = {heads: config}
    entries[arch] = config
    try:
        with constants(configs, ("WARP_SPECIALISED",), ("none",)):
            yield
    finally:
        entries.pop(arch)
        if before is not None:
            entries[arch] = before


@contextlib.contextmanager
def constants(module: Any, names: tuple[str, ...], values: tuple[Any, ...]) -> Iterator[None]:
    before = tuple(getattr(module, name) for name in names)
    for name, value in zip(names, values, strict=True):
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(module, name, value)


@contextlib.contextmanager
def indexer_config(table: str, config: tuple[IndexConfig, int | None]) -> Iterator[None]:
    """A configuration, and how many keys a program takes; None: as the kernel chooses."""
    entry, keys = config
    lengths = index_kernel.KEYS_PER_PROGRAM if keys is None else (keys,)
    with in_table(table, None, entry), constants(index_kernel, ("KEYS_PER_PROGRAM",), (lengths,)):
        yield


@contextlib.contextmanager
def splits(count: int | None) -> Iterator[None]:
    """All queries in one launch, so many programs for the keys of each; None: as attention_launches says."""
    if count is None:
        yield
        return

    def forced(queries: int, *_: int) -> tuple[configs.Launch, ...]:
        return (configs.Launch(slice(0, queries), count),)

    with constants(configs, ("attention_launches",), (forced,)):
        yield


A = AttentionConfig
BF16_64 = [
    A(64, 8, 2, True), A(64, 8, 3, True), A(32, 8, 5, True), A(32, 8, 4, True), A(32, 8, 3, True),
    A(64, 16, 2, True), A(32, 8, 5, False, True), A(32, 8, 3, False, True), A(32, 16, 5, True),
    A(64, 8, 2, False, True),
]  # fmt: skip
FP8_64 = [
    A(32, 8, 5, False, True), A(32, 8, 5, True), A(32, 8, 4, True), A(32, 8, 3, True), A(64, 8, 2, True),
    A(64, 8, 3, True), A(64, 16, 2, True), A(32, 16, 3, True), A(32, 8, 3, False, True), A(64, 8, 5, True),
]  # fmt: skip
BF16_32 = [
    A(64, 8, 5), A(64, 8, 3), A(32, 8, 5), A(64, 8, 4), A(32, 8, 3), A(64, 8, 5, True),
    A(32, 4, 3, False, True, 2), A(32, 4, 5, False, True), A(64, 8, 5, False, True),
]  # fmt: skip
FP8_32 = [
    A(16, 4, 3, False, True, 2), A(32, 8, 5), A(64, 8, 3), A(64, 8, 5), A(32, 8, 3), A(32, 8, 5, False, True),
    A(64, 8, 5, True), A(32, 4, 3, False, True, 2), A(32, 8, 3, False, True, 2),
]  # fmt: skip
BF16_16 = [
    A(64, 8, 5), A(64, 8, 3), A(64, 8, 4), A(32, 4, 5), A(32, 4, 3, blocks=2), A(64, 4, 5),
    A(64, 4, 3, blocks=2), A(32, 8, 5), A(32, 8, 3, blocks=2), A(128, 8, 3), A(32, 4, 5, blocks=2),
    A(32, 4, 5, blocks=3),
]  # fmt: skip
FP8_16 = [
    A(64, 8, 5), A(64, 8, 3), A(32, 4, 3, blocks=2), A(32, 4, 5, blocks=2), A(32, 4, 5, blocks=3),
    A(32, 8, 5), A(32, 8, 3, blocks=2), A(64, 4, 3, blocks=2), A(64, 4, 5), A(64, 8, 5, blocks=2),
    A(128, 8, 3),
]  # fmt: skip
GQA = [
    A(64, 4, 2, blocks=2), A(64, 4, 3, blocks=2), A(64, 4, 4), A(32, 4, 4, blocks=3), A(32, 4, 5, blocks=2),
    A(64, 8, 3), A(128, 8, 2), A(128, 4, 2), A(32, 4, 3, blocks=4), A(64, 4, 2, blocks=3), A(128, 8, 3),
    A(64, 2, 3, blocks=2), A(32, 2, 4, blocks=4),
]  # fmt: skip
MQA = [
    A(64, 4, 2, True, blocks=2), A(64, 8, 2, True, blocks=2), A(64, 8, 3, True), A(64, 4, 3, True, blocks=2),
    A(64, 4, 2, blocks=2), A(32, 8, 3, True, blocks=2),
]  # fmt: skip
# Heads matter in prefill: programs of one query have those of the model. None: see indexer_config.
INDEX = [
    (IndexConfig(*sizes), None)
    for sizes in ((256, 64, 4, 3), (256, 64, 4, 4), (128, 64, 4, 4), (128, 128, 4, 3), (128, 128, 4, 4))
]
SPLITS = [None, 1, 2, 3, 4, 6]
TOP_K = [(block, warps) for block in (1024, 2048, 4096, 8192) for warps in (4, 8, 16)]


def sweeps() -> Iterator[Sweep]:
    """In each, what this GPU takes comes first."""
    mla = {
        (128, False): (64, "SPARSE_MLA", BF16_64), (128, True): (64, "SPARSE_MLA_FP8", FP8_64),
        (32, False): (32, "SPARSE_MLA", BF16_32), (32, True): (32, "SPARSE_MLA_FP8", FP8_32),
        (16, False): (16, "SPARSE_MLA", BF16_16), (16, True): (16, "SPARSE_MLA_FP8", FP8_16),
    }  # fmt: skip
    for (heads, fp8), (block, table, candidates) in mla.items():
        for queries in (1, 32, 128, 1024) if heads != 32 else (128,):
            yield Sweep(
                f"sparse_mla, {heads} heads, {'fp8' if fp8 else 'bf16'}, {queries} queries",
                partial(attention, queries, heads, fp8),
                partial(in_table, table, block),
                _from(_entry(table)[block], [HOPPER, *candidates]),
            )
    for heads, fp8, queries in itertools.product((128, 64, 16), (False, True), (45, 67, 89, 133)):
        yield Sweep(
            f"splits, {heads} heads, {'fp8' if fp8 else 'bf16'}, {queries} queries",
            *(partial(attention, queries, heads, fp8), splits, SPLITS),
        )
    grouped = _entry("SPARSE_GQA")
    for (h_q, h_kv, block, candidates), queries in itertools.product(
        ((32, 8, 16, GQA), (64, 1, max(grouped), MQA)), (1, 32, 1024)
    ):
        yield Sweep(
            f"sparse_gqa, {h_q} / {h_kv} heads of 128, {queries} queries",
            partial(gqa, queries, h_q, h_kv, 128),
            partial(in_table, "SPARSE_GQA", block),
            _from(grouped[block], candidates),
        )
    for form, table in (("bf16", "INDEX_LOGITS"), ("fp8", "INDEX_LOGITS_FP8")):
        candidates = _from((_entry(table), None), INDEX)
        for shape, inputs in (
            *((f"{batch} x 128k paged", partial(paged_index, batch, 1 << 17, form)) for batch in (1, 32)),
            ("prefill 4k of 32k", partial(prefill_index, 4096, 32768, form)),
        ):
            yield Sweep(f"index_logits, {form}, {shape}", inputs, partial(indexer_config, table), candidates)
    for rows, context in ((4096, 32768), (64, 32768), (1, 8192), (1, 131072), (32, 131072)):
        place = partial(constants, topk_kernel, ("BLOCK", "NUM_WARPS"))
        candidates = _from((topk_kernel.BLOCK, topk_kernel.NUM_WARPS), TOP_K)
        yield Sweep(
            f"select_topk, {rows} x {context // 1024}k", partial(top_k, rows, context), place, candidates
        )


def _entry(table: str) -> Any:
    """What this GPU takes from a table, or, for a list without a GPU, an H100."""
    arch = configs.architecture(DEVICE) if torch.cuda.is_available() else 90
    return configs.nearest(getattr(configs, table), arch)


def _from(first: Any, candidates: list[Any]) -> list[Any]:
    return [first, *(candidate for candidate in candidates if candidate != first)]


# -- Running them


def run(
    sweep: Sweep, clock: CudaClock | None, rounds: int, share: int = 0, shares: int = 1
) -> list[dict[str, Any]]:
    """A line per candidate; without a clock nothing is timed, and only a share of them is called."""
    torch.manual_seed(0)
    inputs, able, lines = sweep.inputs(), {}, []
    for candidate in sweep.candidates[share::shares]:
        name, function = str(candidate), partial(_in_place, sweep, candidate, inputs)
        try:
            out = function()
            if clock:
                inputs.check(out)
            able[name] = function
        except Exception as error:
            words = str(error).splitlines()[0][:120]
            lines.append({"sweep": sweep.label, "config": name, "failed": f"{type(error).__name__}: {words}"})
    if clock:
        for name, timing in interleaved(able, rounds, clock=clock).items():
            lines.append({"sweep": sweep.label, "config": name, **dataclasses.asdict(timing)})
    return lines


def _in_place(sweep: Sweep, candidate: Any, inputs: Inputs) -> torch.Tensor:
    with sweep.place(candidate):
        return inputs.run()


def compile_share(only: str, share: int, shares: int) -> None:
    with torch.inference_mode():
        for sweep in sweeps():
            if re.search(only, sweep.label):
                run(sweep, None, 0, share, shares)
                torch.cuda.empty_cache()


def show(sweep: Sweep, lines: list[dict[str, Any]]) -> None:
    timed = {line["config"]: line["median"] for line in lines if "median" in line}
    present = timed.get(str(sweep.candidates[0]))
    print(f"\n{sweep.label}")
    for config, median in sorted(timed.items(), key=lambda item: item[1]):
        against = f"{present / median:5.2f}x" if present else ""
        mark = "  <- present" if config == str(sweep.candidates[0]) else ""
        print(f"  {median * 1e6:9.1f} us {against}  {config}{mark}")
    for line in lines:
        if "failed" in line:
            print(f"  {'-':>12} {line['config']}: {line['failed']}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="REGEX", help="sweeps whose name it matches")
    parser.add_argument("--first", type=int, metavar="N", help="only the N first configurations of each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--jobs", type=int, default=min(16, os.cpu_count() or 1), help="processes that compile"
    )
    parser.add_argument("--json", type=Path, help="a file to which each line is added")
    parser.add_argument(
        "--once", type=int, metavar="N", help="call the N-th configuration once, untimed: for ncu"
    )
    parser.add_argument("--list", action="store_true", help="names of the sweeps")
    options = parser.parse_args()
    chosen = [
        sweep._replace(candidates=sweep.candidates[: options.first])
        for sweep in sweeps()
        if re.search(options.only, sweep.label)
    ]
    if options.list or not chosen:
        print(*(sweep.label for sweep in sweeps()), sep="\n")
        return
    if not torch.cuda.is_available():
        sys.exit(
            f"gpu_sweep needs a CUDA GPU, and torch {torch.__version__} finds none (--list names the sweeps)."
        )
    if options.once:
        with torch.inference_mode():
            for sweep in chosen:
                _in_place(sweep, sweep.candidates[options.once - 1], sweep.inputs())
        return
    in_shares(compile_share, (options.only,), options.jobs)
    clock = CudaClock(DEVICE)
    with torch.inference_mode():
        for sweep in chosen:
            lines = run(sweep, clock, options.rounds)
            show(sweep, lines)
            append_json(options.json, "gpu sweep", lines)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
