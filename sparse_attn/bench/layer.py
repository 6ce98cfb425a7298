"""A DeepSeek-V3.2-shaped attention layer on this machine: sparse against dense, decode and prefill."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from .. import reference
from ..attention import SparseMLA
from ..cache import DSACache
from ..config import DSAConfig
from ..functional import index_logits, lightning_topk, select_topk, sparse_mla
from ..testing import relative_error
from . import dense
from .timing import Timing, describe, interleaved, machine, peak_memory

DENSE_HEADS = 4  # of 128 that the dense prefill forms are timed on; their time is proportional
DENSE_DECODE = {"dense_sdpa": "SDPA", "dense_gemm": "GEMM", "dense_own": "own"}
DENSE_PREFILL = {"dense_sdpa": "SDPA", "dense_gemm": "GEMM by head"}
CHECKED_QUERIES = 4  # of a prefill that are compared with the reference


@dataclasses.dataclass(frozen=True)
class Step:
    """What one call of the layer hands to the sparse operations."""

    q: Tensor  # [tokens, 128, 576]
    kv: Tensor  # [s_kv, 576]
    index_q: Tensor  # [tokens, 64, 128]
    index_k: Tensor  # [s_kv, 128]
    weights: Tensor  # [tokens, 64]
    ks: Tensor  # [tokens]
    ke: Tensor  # [tokens]

    @property
    def index(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.index_q, self.index_k, self.weights


def run(
    console: Console,
    output_dir: Path | None = None,
    *,
    contexts: Sequence[int] = (8192, 32768, 65536),
    prefill_tokens: int = 512,
    prefill_context: int = 32768,
    rounds: int = 5,
    threads: int = 1,
    config: DSAConfig | None = None,
) -> dict[str, Any]:
    """Measure, print tables, plot to ``output_dir/layer_decode.png``; return the figures (seconds, bytes).

    One thread by default: on a machine that does other work too, a few threads wait for each other
    more than they compute, and ratios say nothing.
    """
    config = config or DSAConfig.deepseek_v32()
    torch.manual_seed(0)
    with torch.inference_mode(), _threads(threads), Progress(console=console, transient=True) as progress:
        results: dict[str, Any] = {"machine": machine(), "decode": [], "prefill": None}
        layer = SparseMLA(config, dtype=torch.bfloat16)
        cache = _filled_cache(config, max(*contexts, prefill_context))
        task = progress.add_task("layer: decode", total=len(contexts) * rounds * 8)
        for context in contexts:
            results["decode"].append(_decode(layer, cache, context, rounds, lambda: progress.advance(task)))
        task = progress.add_task("layer: prefill", total=2 + 4 * rounds)
        results["prefill"] = _prefill(
            layer, cache, prefill_context, prefill_tokens, rounds, lambda: progress.advance(task)
        )
    _print(console, results)
    if output_dir is not None:
        results["plot"] = str(_plot(results, output_dir / "layer_decode.png"))
    return results


@contextlib.contextmanager
def _threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _filled_cache(config: DSAConfig, tokens: int) -> DSACache:
    """Random latents and index keys in place of a prefill of the whole context."""
    cache = DSACache(config, tokens, dtype=torch.bfloat16)
    for name in ("kv", "index_k"):
        cache[name].normal_()
    return cache


def _step(layer: SparseMLA, cache: DSACache, context: int, tokens: int) -> Step:
    """The last ``tokens`` of a context, through the layer's own projections."""
    hidden = torch.randn(tokens, layer.config.hidden_size, dtype=torch.bfloat16)
    positions = torch.arange(context - tokens, context)
    q, _, q_lora = layer._project(hidden, positions)
    index_q, weights = layer.indexer.queries(hidden, q_lora, positions)
    ke = (positions + 1).int()
    kv, index_k = cache["kv"][0, :context], cache["index_k"][0, :context]
    return Step(q, kv, index_q, index_k, weights, torch.zeros_like(ke), ke)


def _attend(layer: SparseMLA, step: Step, indices: Tensor, t: slice = slice(None)) -> Tensor:
    config = layer.config
    return sparse_mla(
        step.q[t], step.kv, indices[t], d_v=config.kv_lora_rank, softmax_scale=config.softmax_scale
    )


def _errors(layer: SparseMLA, step: Step, indices: Tensor, queries: Sequence[int]) -> dict[str, float]:
    """Relative errors against the fp64 reference for some queries, and the rounding to bf16 alone.

    Raises AssertionError if the selection is not exactly the reference's for the same logits.
    """
    t = list(queries)
    logits = index_logits(step.index_q[t], step.index_k, step.weights[t], step.ks[t], step.ke[t])
    exact_logits = reference.index_logits(
        step.index_q[t].double(), step.index_k.double(), step.weights[t].double(), step.ks[t], step.ke[t]
    )
    expected = reference.select_topk(logits, indices.shape[1], step.ks[t], step.ke[t])
    assert torch.equal(indices[t], expected), "the selection differs from the reference's"
    config = layer.config
    exact, *_ = reference.sparse_mla(
        step.q[t].double(), step.kv.double(), indices[t], config.kv_lora_rank, config.softmax_scale
    )
    return {
        "logits": relative_error(logits, exact_logits),
        "attention": relative_error(_attend(layer, step, indices, t), exact),
        "bf16_rounding": relative_error(exact.bfloat16(), exact),
    }


def _decode(layer: SparseMLA, cache: DSACache, context: int, rounds: int, advance) -> dict[str, Any]:
    step, topk = _step(layer, cache, context, 1), layer.config.index_topk
    scale, d_v = layer.config.softmax_scale, layer.config.kv_lora_rank
    ranges = step.ks, step.ke
    logits = index_logits(*step.index, *ranges)
    indices = select_topk(logits, topk, *ranges)
    errors = _errors(layer, step, indices, [0])
    q = step.q[0]

    def sparse() -> Tensor:
        return _attend(layer, step, lightning_topk(*step.index, topk, *ranges))

    token = torch.randn(1, layer.config.hidden_size, dtype=torch.bfloat16)
    cache.reset()
    cache.commit(cache.place([context - 1]))  # as if a prefill had written what is there

    def whole_layer() -> None:
        layer(token, cache=cache)
        cache.truncate(context - 1)

    timings = interleaved(
        {
            "indexer": lambda: index_logits(*step.index, *ranges),
            "topk": lambda: select_topk(logits, topk, *ranges),
            "attend": lambda: _attend(layer, step, indices),
            "sparse": sparse,
            "dense_sdpa": lambda: dense.sdpa_folded(q, step.kv, scale, d_v),
            "dense_gemm": lambda: dense.gemm_chunked(q, step.kv, scale, d_v),
            "dense_own": lambda: dense.own_kernel(q, step.kv, scale, d_v),
            "layer": whole_layer,
        },
        rounds,
        advance,
    )
    seconds = _seconds(timings)
    seconds["projections"] = seconds["layer"] - seconds["sparse"]
    return {"context": context, "errors": errors, **seconds, "timings": _quantiles(timings)}


def _prefill(
    layer: SparseMLA, cache: DSACache, context: int, tokens: int, rounds: int, advance
) -> dict[str, Any]:
    step, config = _step(layer, cache, context, tokens), layer.config
    ranges = step.ks, step.ke
    found: dict[str, Tensor] = {}

    def select() -> None:
        found["indices"] = lightning_topk(*step.index, config.index_topk, *ranges)

    def attend() -> Tensor:
        return _attend(layer, step, found["indices"])

    memory = peak_memory(lambda: (select(), attend()))
    advance()
    errors = _errors(layer, step, found["indices"], range(0, tokens, max(1, tokens // CHECKED_QUERIES)))
    advance()
    sparse = interleaved({"select": select, "attend": attend}, rounds, advance)
    d_qk = config.qk_nope_head_dim + config.qk_rope_head_dim
    q, k = (torch.randn(DENSE_HEADS, n, d_qk, dtype=torch.bfloat16) for n in (tokens, context))
    v = torch.randn(DENSE_HEADS, context, config.v_head_dim, dtype=torch.bfloat16)
    some_heads = interleaved(
        {
            "dense_sdpa": lambda: dense.sdpa_causal(q, k, v, config.softmax_scale),
            "dense_gemm": lambda: dense.mha_causal(q, k, v, config.softmax_scale),
        },
        rounds,
        advance,
    )
    share = config.num_attention_heads / DENSE_HEADS
    times = {**_seconds(sparse), **{name: s * share for name, s in _seconds(some_heads).items()}}
    times["sparse"] = times["select"] + times["attend"]
    row = {"context": context, "tokens": tokens, "errors": errors, "peak_bytes": memory, **times}
    return {**row, "timings": _quantiles(sparse | some_heads)}


def _quantiles(timings: dict[str, Timing]) -> dict[str, dict[str, float]]:
    """As measured: of the dense prefill forms on ``DENSE_HEADS`` heads."""
    return {name: dataclasses.asdict(timing) for name, timing in timings.items()}


def _seconds(timings: dict[str, Timing]) -> dict[str, float]:
    return {name: timing.median for name, timing in timings.items()}


def _print(console: Console, results: dict[str, Any]) -> None:
    m = results["machine"]
    console.print(f"[dim]{describe(m)}[/dim]")
    sparse = ("context", "indexer", "top-k", "attend", "all")
    table = _table(
        "Decode of one token, ms: sparse, then dense and its ratio to sparse", sparse, DENSE_DECODE
    )
    for row in results["decode"]:
        parts = [f"{row[name] * 1e3:.2f}" for name in ("indexer", "topk", "attend", "sparse")]
        peers = [f"{row[n] * 1e3:.1f} {_ratio(row[n] / row['sparse'])}" for n in DENSE_DECODE]
        table.add_row(f"{row['context']:,}", *parts, *peers)
    console.print(table)
    console.print(
        "With its projections a decode step takes "
        + ", ".join(f"{r['layer'] * 1e3:.1f} ms at {r['context']:,}" for r in results["decode"])
        + "; they are "
        + ", ".join(f"{r['projections'] / r['layer']:.0%}" for r in results["decode"])
        + " of it.",
        highlight=False,
    )
    p = results["prefill"]
    title = f"Prefill of the last {p['tokens']} of {p['context']:,} tokens, s: sparse, then dense"
    table = _table(title, ("indexer + top-k", "attend", "all", "peak memory"), DENSE_PREFILL)
    memory = "not measured" if p["peak_bytes"] is None else f"{p['peak_bytes'] / 2**20:.0f} MiB"
    peers = [f"{p[n]:.2f} {_ratio(p[n] / p['sparse'])}" for n in DENSE_PREFILL]
    table.add_row(*(f"{p[name]:.2f}" for name in ("select", "attend", "sparse")), memory, *peers)
    console.print(table)
    console.print(
        f"[dim]Dense prefill: per-head attention, timed on {DENSE_HEADS} of 128 heads and scaled. "
        "Projections are the same on both sides and are left out of the tables. SDPA and GEMM are torch's; "
        "own: this library's kernel over every token.[/dim]"
    )
    errors = [row["errors"] for row in (*results["decode"], p)]
    worst = {name: max(e[name] for e in errors) for name in errors[0]}
    console.print(
        f"Relative error against the fp64 reference: logits {worst['logits']:.1e}, attention "
        f"{worst['attention']:.2e} (rounding the exact result to bf16: {worst['bf16_rounding']:.2e}); "
        "every selection checked equals the reference's."
    )


def _ratio(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 9.95 else f"{ratio:.1f}x"


def _table(title: str, sparse: Sequence[str], peers: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for name in sparse:
        table.add_column(name, justify="right", no_wrap=True)
    for name in peers.values():
        table.add_column(name, justify="right", style="green", no_wrap=True)
    return table


def _plot(results: dict[str, Any], path: Path) -> Path:
    from .plots import decode_plot

    path.parent.mkdir(parents=True, exist_ok=True)
    decode_plot(results, path)
    return path
