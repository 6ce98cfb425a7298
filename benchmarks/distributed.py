"""A layer divided over ranks: what a step takes and what travels, and what that would be on many cards.

    python benchmarks/distributed.py measure   ranks of this machine over gloo, one thread each, checked first
    python benchmarks/distributed.py check     what the arithmetic of `plan` says of the measured steps
    python benchmarks/distributed.py plan      steps of DeepSeek-V3.2's attention on 1 to 64 cards, computed

Ranks share this machine's cores and memory, so `measure` is about what is divided and what travels, and about
equal results; it is no speed-up of a cluster. The layer has DeepSeek-V3.2's attention, with a hidden size of
1024 to save time. Caches are filled with random rows.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from bench import cluster
from bench.command import table
from bench.limits import bandwidth
from bench.ranks import Traffic, counted, on_ranks
from bench.timing import Timing, append_json, describe, interleaved
from sparse_attn import DSACache, DSAConfig, SparseMLA, index_logits, lightning_topk, select_topk
from sparse_attn.distributed.division import Division
from sparse_attn.distributed.ranks import Ranks
from sparse_attn.distributed.shards import best, candidates
from sparse_attn.testing import relative_error

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "benchmarks" / "records" / "2026-11-28-epyc-distributed.jsonl"
PAGE, PLOT = ROOT / "docs" / "distributed.md", ROOT / "docs" / "distributed_plan.png"
BEGIN, END = "<!-- computed: begin, by benchmarks/distributed.py plan -->", "<!-- computed: end -->"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}  # partial outputs are rounded before they are merged
ONLY = ("decode", "chunk", "indexer")
TINY = {"num_attention_heads": 8, "q_lora_rank": 32, "index_n_heads": 8, "index_topk": 24}
TINY_OPTIONS = {"context": 96, "chunk": 32, "rounds": 1, "hidden": 64, "link_bytes": [1 << 10, 1 << 14]}


def main() -> None:
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    does = command.add_subparsers(dest="does", required=True)
    measuring = does.add_parser("measure", help="on ranks of this machine")
    measuring.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    measuring.add_argument("--context", type=int, default=16384, help="tokens that the caches hold")
    measuring.add_argument("--chunk", type=int, default=256, help="new tokens of the prefill")
    measuring.add_argument("--hidden", type=int, default=1024, help="hidden size")
    measuring.add_argument("--dtype", choices=DTYPES, default="float32")
    measuring.add_argument(
        "--rounds", type=int, default=3, help="rounds, of decode five times as many (default 3)"
    )
    measuring.add_argument("--only", choices=ONLY, nargs="+", default=ONLY, help="default all")
    measuring.add_argument("--dry-run", action="store_true", help="tiny sizes, to see that it runs")
    measuring.add_argument("--json", metavar="FILE", help="append the figures, one JSON object per line")
    measuring.set_defaults(link_bytes=[1 << 16, 1 << 24])
    checking = does.add_parser("check", help="the arithmetic beside a record")
    checking.add_argument("record", type=Path, nargs="?", default=RECORD, help="what `measure --json` wrote")
    planning = does.add_parser("plan", help="1 to 64 cards")
    planning.add_argument("--write", action="store_true", help="put tables and plot into docs/")
    options = command.parse_args()
    if options.does == "measure":
        if options.dry_run:
            vars(options).update(TINY_OPTIONS)
        refuse_wrong(options, measuring)
        measure(options)
    elif options.does == "check":
        check(options.record)
    else:
        plan(options.write)


def refuse_wrong(options: argparse.Namespace, command: argparse.ArgumentParser) -> None:
    config = config_of(options)
    heads, topk = config.num_attention_heads, config.index_topk
    if wrong := [n for n in options.ranks if n < 1 or heads % n or config.index_n_heads % n]:
        command.error(
            f"--ranks: expected numbers that divide {heads} and {config.index_n_heads} index heads, got "
            f"{', '.join(map(str, wrong))}"
        )
    if options.context <= topk:
        command.error(
            f"--context: expected more than the {topk} tokens that are selected, got {options.context}"
        )
    if not 1 <= options.chunk < options.context:
        command.error(f"--chunk: expected 1 to {options.context - 1} tokens, got {options.chunk}")
    if options.rounds < 1:
        command.error(f"--rounds: expected 1 or more, got {options.rounds}")


def config_of(options: argparse.Namespace) -> DSAConfig:
    return DSAConfig.deepseek_v32(hidden_size=options.hidden, **(TINY if options.dry_run else {}))


# On ranks of this machine


class Filled(NamedTuple):
    """A step and all that one process has for it: the ranks are forks, and share this memory."""

    name: str
    step: cluster.Step
    cu_seqlens: torch.Tensor
    hidden: torch.Tensor
    whole: SparseMLA
    cache: DSACache
    expected: torch.Tensor | None = None
    positions: torch.Tensor | None = None

    def call(self, layer: SparseMLA, cache: DSACache) -> tuple[torch.Tensor, torch.Tensor]:
        """The step, with a cache that holds what comes before it."""
        for sequence in range(self.step.sequences):
            cache.truncate(self.step.context - self.step.tokens, sequence)
        return layer(self.hidden, cache=cache, cu_seqlens_q=self.cu_seqlens, return_indices=True)


def measure(options: argparse.Namespace) -> None:
    console = Console()
    console.print(f"[dim]{describe()}, {os.cpu_count()} cores[/dim]", highlight=False)
    arguments = ["python benchmarks/distributed.py", *sys.argv[1:]]
    about = {
        "command": " ".join(arguments),
        "date": f"{datetime.date.today():%Y-%m-%d}",
        **{name: getattr(options, name) for name in ("context", "hidden", "dtype", "rounds", "dry_run")},
    }
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows: dict[str, list[dict]] = {"layer": [], "indexer": [], "link": [], "machine": []}

    def add(kind: str, new: list[dict]) -> None:
        rows[kind] += new
        append_json(options.json, "distributed", [{"kind": kind, **about, **row} for row in new])

    with torch.no_grad():
        if "decode" in options.only:
            add("machine", [merging(options)])
        for filled in steps(options):
            for world in options.ranks:
                of_ranks = on_ranks(world, lambda filled=filled: layer_on_a_rank(filled, options))
                add("layer", layer_rows(filled, world, of_ranks, options))
        inputs = index_inputs(options)
        for world in [n for n in options.ranks if n > 1 and "indexer" in options.only]:
            of_ranks = on_ranks(world, lambda: (indexer_on_a_rank(*inputs, options), link_on_a_rank(options)))
            indexers, links = zip(*of_ranks, strict=True)
            add("indexer", indexer_rows(world, indexers))
            add("link", link_rows(world, links, options))
    if rows["layer"]:
        show_layer(console, rows["layer"])
    if rows["indexer"]:
        show_indexer(console, rows["indexer"])


def steps(options: argparse.Namespace) -> Iterator[Filled]:
    """Each with a cache of random rows, and what one process makes of it."""
    config, dtype = config_of(options), DTYPES[options.dtype]
    whole = SparseMLA(config, dtype=dtype)
    for name, sequences, tokens in (
        ("decode of 1", 1, 1),
        ("decode of 8", 8, 1),
        (f"chunk of {options.chunk}", 1, options.chunk),
    ):
        if name.split()[0] not in options.only:
            continue
        step = cluster.Step(sequences, tokens, options.context)
        cache = DSACache(config, options.context, sequences, dtype=dtype)
        fill(cache, [torch.randn_like(cache[part]) for part in ("kv", "index_k")])
        hidden = torch.randn(step.queries, config.hidden_size, dtype=dtype)
        cu_seqlens = torch.arange(sequences + 1) * tokens
        filled = Filled(name, step, cu_seqlens, hidden, whole, cache)
        expected, positions = filled.call(whole, cache)
        yield filled._replace(expected=expected, positions=positions)


def fill(cache: DSACache, rows: list[torch.Tensor]) -> None:
    """Directly: a prefill of so many tokens would take minutes."""
    for part, values in zip(("kv", "index_k"), rows, strict=True):
        cache[part].copy_(values)
    cache._lengths.fill_(cache.max_tokens)


def meshes() -> Iterator[tuple[cluster.Split, DeviceMesh]]:
    """Every way to divide a layer over the ranks that there are."""
    for split in cluster.splits(dist.get_world_size()):
        yield split, init_device_mesh("cpu", tuple(split), mesh_dim_names=split._fields)


def layer_on_a_rank(filled: Filled, options: argparse.Namespace) -> dict[str, Any]:
    """Checks, bytes, memory and seconds of each split; and seconds of one process, while others wait."""
    divided, alone = {}, []
    for split, mesh in meshes():
        layer = SparseMLA(filled.whole.config, mesh=mesh, dtype=filled.hidden.dtype)
        layer.load_state_dict(layer.part_of(filled.whole.state_dict()))
        cache = DSACache(
            layer.config, options.context, filled.step.sequences, dtype=filled.hidden.dtype, mesh=mesh
        )
        mine = cache.shards.to_local(torch.arange(options.context)) >= 0
        padded = torch.zeros(cache.capacity - int(mine.sum()), dtype=torch.int64)
        taken = torch.cat([torch.arange(options.context)[mine], padded])
        fill(cache, [filled.cache[part][:, taken] for part in ("kv", "index_k")])
        out, positions = filled.call(layer, cache)
        checked = {
            "positions_equal": torch.equal(positions, filled.positions),
            "difference": relative_error(out, filled.expected),
            "keys_bytes": sum(cache[part].nbytes for part in ("kv", "index_k")),
        }
        divided[split] = {"layer": layer, "cache": cache, "checked": checked, "samples": []}
    for _ in range(options.rounds * (5 if filled.step.tokens == 1 else 1)):
        if dist.get_rank() == 0:
            alone.append(timed(filled, filled.whole, filled.cache)[0])
        for of_split in divided.values():
            dist.barrier()
            seconds, received = timed(filled, of_split["layer"], of_split["cache"])
            of_split["samples"].append(seconds)
            of_split["checked"]["received"] = received
    return {
        "alone": alone,
        **{split: {k: d[k] for k in ("checked", "samples")} for split, d in divided.items()},
    }


def timed(filled: Filled, layer: SparseMLA, cache: DSACache) -> tuple[dict[str, float], dict[str, int]]:
    """Seconds of a step and of its collectives, CPU seconds of its parts, and the bytes that were received.

    CPU seconds are those in which this rank computes: without waiting, and without what other processes take.
    """
    seconds: dict[str, float] = {}
    with counted() as traffic, parts_timed(layer, traffic, seconds):
        start, cpu = time.perf_counter(), time.thread_time()
        filled.call(layer, cache)
        seconds["step"], seconds["cpu"] = time.perf_counter() - start, time.thread_time() - cpu
    seconds["collectives"] = traffic.seconds
    return seconds, dict(traffic.received)


@contextlib.contextmanager
def parts_timed(layer: SparseMLA, traffic: Traffic, seconds: dict[str, float]) -> Iterator[None]:
    """Selection and attention of a layer apart; the rest of its step is projections."""

    def timing(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments):
            start = time.thread_time()
            with traffic.of(part):
                result = function(*arguments)
            seconds[part] = time.thread_time() - start
            return result

        return call

    division = layer.division
    division.select = timing("selection", division.select)
    division.attend = timing("attention", division.attend)
    try:
        yield
    finally:
        del division.select, division.attend  # the methods of the class are there again


def layer_rows(filled: Filled, world: int, of_ranks: list[dict], options: argparse.Namespace) -> list[dict]:
    made = []
    stored = sum(filled.cache[part].nbytes for part in ("kv", "index_k"))
    for split in cluster.splits(world):
        divided = [of_rank[split] for of_rank in of_ranks]
        checks = [rank["checked"] for rank in divided]
        difference = max(check["difference"] for check in checks)
        if not all(check["positions_equal"] for check in checks) or difference > TOLERANCE[options.dtype]:
            raise SystemExit(
                f"{filled.name}, {split}: the ranks differ from one process, outputs by {difference:.1e}"
            )
        received = [{"selection": 0, "attention": 0, "output": 0, **check["received"]} for check in checks]
        formula = division_of(filled.whole.config, filled.step, split, options.dtype).received()
        if any(of_rank != formula for of_rank in received):
            raise SystemExit(f"{filled.name}, {split}: received {received}, expected {formula}")
        samples = [rank["samples"] for rank in divided]
        made.append({
            "case": filled.name,
            **filled.step._asdict(),
            "ranks": world,
            **split._asdict(),
            "seconds": {name: over_ranks(samples, name, SECONDS[name]) for name in SECONDS},
            "one_process_seconds": {
                name: over_ranks([of_ranks[0]["alone"]], name, max) for name in SECONDS
            },
            "received_bytes": received[0],
            "formula_bytes": formula,
            "positions_equal": True,
            "difference": difference,
            "keys_bytes": max(check["keys_bytes"] for check in checks),
            "share_of_keys": max(check["keys_bytes"] for check in checks) / stored,
        })  # fmt: skip
    return made


# How those of a step's ranks are joined: it lasts as long as on the slowest, which waits the least.
SECONDS = {"step": max, "collectives": min, "cpu": max, "selection": max, "attention": max}


def over_ranks(samples: list[list[dict]], part: str, join: Callable) -> dict[str, float]:
    """Of samples by rank and round."""
    rounds = [join([sample[part] for sample in of_round]) for of_round in zip(*samples, strict=True)]
    return dataclasses.asdict(Timing.of(rounds))


def division_of(config: DSAConfig, step: cluster.Step, split: cluster.Split, dtype: str) -> cluster.Division:
    size = DTYPES[dtype].itemsize
    stored = cluster.Format(
        size * (config.kv_lora_rank + config.qk_rope_head_dim), size * config.index_head_dim
    )
    return cluster.Division(config, step, split, stored, size)


def merging(options: argparse.Namespace) -> dict[str, Any]:
    """What a machine needs apart from the parts of a step: seconds per candidate merged, bytes copied."""
    topk = config_of(options).index_topk
    positions = torch.arange(4 * topk).expand(8, -1).contiguous()
    found = candidates(positions, torch.randn(positions.shape))
    timing = interleaved({"best": lambda: best(found, topk)}, options.rounds)["best"]
    copied = bandwidth() if not options.dry_run else 1e9
    return {"seconds_per_candidate": timing.median / found.numel(), "bytes_per_second": copied}


# The indexer under tensor parallelism


def index_inputs(options: argparse.Namespace) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """q, k, weights, ks, ke of the last tokens of a context, and the selection of one process."""
    c, dtype = config_of(options), DTYPES[options.dtype]
    q = torch.randn(options.chunk, c.index_n_heads, c.index_head_dim, dtype=dtype)
    k = torch.randn(options.context, c.index_head_dim, dtype=dtype)
    ke = torch.arange(options.context - options.chunk, options.context, dtype=torch.int32) + 1
    inputs = q, k, torch.randn(options.chunk, c.index_n_heads), torch.zeros_like(ke), ke
    q, k, weights, ks, ke = inputs
    return inputs, lightning_topk(q, k, weights, c.index_topk, ks, ke)


def indexer_on_a_rank(
    inputs: tuple[torch.Tensor, ...], expected: torch.Tensor, options: argparse.Namespace
) -> dict[tuple[int, str], dict]:
    """Of one query, and of all; every rank has all keys, as under tensor parallelism."""
    config = config_of(options)
    division = Division(init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",)), config)
    ranks, topk, found = division.tp, config.index_topk, {}
    share = config.index_n_heads // ranks.size
    own = slice(ranks.rank * share, (ranks.rank + 1) * share)
    all_q, k, *others = inputs
    for queries in (1, len(expected)):
        q, weights, ks, ke = (x[-queries:] for x in (all_q, *others))

        def some(begin: int, end: int, q=q, weights=weights, ks=ks, ke=ke) -> torch.Tensor:
            part = slice(begin, end)
            return lightning_topk(q[part], k, weights[part], topk, ks[part], ke[part])

        def summed(q=q, weights=weights, ks=ks, ke=ke) -> torch.Tensor:
            return ranks.sum(index_logits(q[:, own].contiguous(), k, weights[:, own].contiguous(), ks, ke))

        def by_heads(summed=summed, ks=ks, ke=ke) -> torch.Tensor:
            return select_topk(summed(), topk, ks, ke)

        ways = {
            "all ranks select for all": lambda some=some, n=queries: some(0, n),
            "queries divided": lambda some=some, n=queries: division.spread(some, n, ranks),
            "heads divided, logits summed": by_heads,
        }
        for way, select in ways.items():
            differ = (select() != expected[-queries:]).any(1).sum().item()
            found[queries, way] = {"rows_that_differ": differ, "logits_that_differ": 0.0, "samples": []}
        whole = index_logits(q, k, weights, ks, ke)
        differ = (summed() != whole).sum() / whole.isfinite().sum()
        found[queries, "heads divided, logits summed"]["logits_that_differ"] = differ.item()
        for _ in range(options.rounds):
            for way, select in ways.items():
                dist.barrier()
                with counted() as traffic:
                    start, cpu = time.perf_counter(), time.thread_time()
                    select()
                    step, cpu = time.perf_counter() - start, time.thread_time() - cpu
                sample = {"step": step, "collectives": traffic.seconds, "cpu": cpu}
                found[queries, way]["samples"].append(sample)
                found[queries, way]["received"] = sum(traffic.received.values())
    return found


def indexer_rows(world: int, of_ranks: tuple[dict, ...]) -> list[dict]:
    return [
        {
            "case": f"indexer, {queries} quer{'y' if queries == 1 else 'ies'}",
            "queries": queries,
            "way": way,
            "ranks": world,
            "seconds": {
                part: over_ranks([rank[queries, way]["samples"] for rank in of_ranks], part, join)
                for part, join in (("step", max), ("collectives", min), ("cpu", max))
            },
            "received_bytes": first["received"],
            "logits_that_differ": first["logits_that_differ"],
            "rows_that_differ": max(rank[queries, way]["rows_that_differ"] for rank in of_ranks),
        }
        for (queries, way), first in of_ranks[0].items()
    ]


# The collectives alone


def link_on_a_rank(options: argparse.Namespace) -> dict[tuple[str, int], list[float]]:
    """Seconds by collective and bytes received."""
    ranks = Ranks.of(init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",)))
    samples: dict[tuple[str, int], list[float]] = {}
    for _ in range(2 * options.rounds + 1):
        for received in options.link_bytes:
            x = torch.zeros(received // (ranks.size - 1), dtype=torch.uint8)
            parts = x.expand(ranks.size, -1).contiguous()
            for name, collective in (("gather", lambda x=x: ranks.gather(x)),
                                     ("exchange", lambda parts=parts: ranks.exchange(parts))):  # fmt: skip
                dist.barrier()
                start = time.perf_counter()
                collective()
                samples.setdefault((name, received), []).append(time.perf_counter() - start)
    return {key: seconds[1:] for key, seconds in samples.items()}


def link_rows(world: int, of_ranks: tuple[dict, ...], options: argparse.Namespace) -> list[dict]:
    """A line through two sizes, each the mean of both collectives."""
    seconds = {}
    for received in options.link_bytes:
        both = [
            statistics.median(map(max, zip(*(rank[name, received] for rank in of_ranks), strict=True)))
            for name in ("gather", "exchange")
        ]
        seconds[received] = statistics.mean(both)
    (small, first), (large, second) = seconds.items()
    rate = (large - small) / max(second - first, 1e-9)
    link = cluster.Link(max(0.0, first - small / rate), rate)
    return [{"ranks": world, "seconds": seconds, **dataclasses.asdict(link)}]


def show_layer(console: Console, rows: list[dict]) -> None:
    cells = []
    for row in rows:
        seconds, alone = row["seconds"], row["one_process_seconds"]
        cells.append([
            row["case"],
            str(cluster.Split(row["tp"], row["cp"])),
            f"{1e3 * seconds['step']['median']:,.1f}",
            *(f"{seconds[name]['median'] / alone[name]['median']:.2f}" for name in ("step", "cpu")),
            f"{1e3 * seconds['collectives']['median']:,.1f}",
            *(f"{received / 1e6:,.3f}" for received in row["received_bytes"].values()),
            f"{row['share_of_keys']:.2f}",
            f"{row['difference']:.0e}",
        ])  # fmt: skip
    headings = (
        "",
        "ranks",
        "ms",
        "/ one",
        "CPU / one",
        "coll. ms",
        "select",
        "attend",
        "output",
        "keys",
        "differ",
    )
    console.print(table(headings, cells, words=2))
    console.print(
        "/ one: of the time of one process; CPU: of its CPU time, which each rank takes. select, attend, "
        "output: MB received per rank, counted at the collectives and equal to the formulas of traffic.py "
        "(output, a sum: to a ring's). keys: share of the cache on a rank. Positions are one process's."
    )


def show_indexer(console: Console, rows: list[dict]) -> None:
    cells = []
    for row in rows:
        same = (r for r in rows if (r["ranks"], r["queries"]) == (row["ranks"], row["queries"]))
        seconds, first = row["seconds"], next(same)["seconds"]
        cells.append([
            row["case"],
            row["way"],
            str(row["ranks"]),
            f"{1e3 * seconds['step']['median']:,.1f}",
            *(f"{seconds[name]['median'] / first[name]['median']:.2f}" for name in ("step", "cpu")),
            f"{row['received_bytes'] / 1e6:,.3f}",
            f"{row['logits_that_differ']:.0%}",
            str(row["rows_that_differ"]),
        ])  # fmt: skip
    headings = (
        "",
        "way",
        "ranks",
        "ms",
        "/ first",
        "CPU / first",
        "MB received",
        "logits differ",
        "rows differ",
    )
    console.print(table(headings, cells, words=2))


# The arithmetic beside what was measured


def read(record: Path) -> dict[str, list[dict]]:
    """The lines of a record by kind."""
    if not record.is_file():
        sys.exit(f"record: expected a file that `measure --json` wrote, got {record}")
    lines: dict[str, list[dict]] = {}
    for line in map(json.loads, record.read_text().splitlines()):
        lines.setdefault(line["kind"], []).append(line)
    return lines


def device_of(lines: dict[str, list[dict]], case: str) -> cluster.Device:
    """This machine, from CPU seconds of one rank: selection and attention of a chunk and of one token.

    Projections are those of one rank in the same case, as torch's products of 8 rows take several times as
    long as its rates for 1 and for 256 rows say.
    """
    ones = {row["case"]: row for row in lines["layer"] if row["ranks"] == 1}
    chunk = next(row for row in ones.values() if row["tokens"] > 1)
    token, same = ones["decode of 1"], ones[case]
    machine = lines["machine"][0]
    bandwidth, rates = machine["bytes_per_second"], {}
    for part in ("selection", "attention"):
        peak = work_of(chunk, part).operations / seconds_of(chunk)[part]
        rate = cluster.Rate(0.0, bandwidth, peak)
        floor = seconds_of(token)[part] - rate.seconds(work_of(token, part))
        rates[part] = dataclasses.replace(rate, floor=max(0.0, floor))
    return cluster.Device(
        name=machine["machine"]["processor"],
        memory_bytes=0.0,
        project=cluster.Rate(0.0, work_of(same, "projections").bytes / seconds_of(same)["projections"]),
        index=rates["selection"],
        topk=cluster.TopK(0.0, 0.0, float("inf"), float("inf")),  # within the selection's seconds
        attend=rates["attention"],
        merge=cluster.Rate(0.0, bandwidth),
        candidates=cluster.Rate(0.0, 8 / machine["seconds_per_candidate"]),
    )


def seconds_of(row: dict) -> dict[str, float]:
    """CPU seconds of the parts of a measured step."""
    seconds = {name: timing["median"] for name, timing in row["seconds"].items()}
    return {**seconds, "projections": seconds["cpu"] - seconds["selection"] - seconds["attention"]}


def division_of_row(row: dict) -> cluster.Division:
    config = config_of(argparse.Namespace(hidden=row["hidden"], dry_run=row["dry_run"]))
    step = cluster.Step(row["sequences"], row["tokens"], row["context"])
    return division_of(config, step, cluster.Split(row["tp"], row["cp"]), row["dtype"])


def work_of(row: dict, part: str) -> cluster.Work:
    """What the arithmetic counts of a part of one rank's step."""
    return {
        "selection": lambda d: d.index_work(),
        "attention": lambda d: d.attention_work(),
        "projections": lambda d: d.projection_work(),
    }[part](division_of_row(row))


def predicted(row: dict, device: cluster.Device, lines: dict[str, list[dict]]) -> dict[str, float]:
    """Seconds of a measured step, as :data:`SECONDS` names them; ranks take turns on the cores."""
    links = {line["ranks"]: cluster.Link(line["latency"], line["bytes_per_second"]) for line in lines["link"]}
    division, collectives = division_of_row(row), 0.0
    for collective in division.collectives():  # of groups as large as those that were timed alone
        link = links[collective.ranks]
        collectives += cluster.Links(link, link).seconds(collective)
    seconds = division.seconds(device, cluster.NODES_OF_8)
    del seconds["collectives"]
    turns = max(1.0, row["ranks"] / row["machine"]["cores"])
    cpu = sum(seconds.values())
    return {"cpu": cpu, "collectives": collectives, "step": turns * cpu + collectives}


def compared(lines: dict[str, list[dict]]) -> list[tuple[dict, dict[str, float]]]:
    """Every measured step, and predicted / measured of what a fit did not use."""
    made = []
    for row in lines["layer"]:
        model, seconds = predicted(row, device_of(lines, row["case"]), lines), row["seconds"]
        fitted = row["ranks"] == 1
        ratios = {name: model[name] / seconds[name]["median"] for name in model if seconds[name]["median"]}
        made.append((row, {} if fitted else ratios))
    return made


def check(record: Path) -> None:
    lines, console, cells = read(record), Console(), []
    cases = {(row["case"].split()[0], row["ranks"]) for row in lines.get("layer", [])}
    worlds = {world for _, world in cases} - {1}
    if (
        not cases >= {("decode", 1), ("chunk", 1)}
        or {row["ranks"] for row in lines.get("link", [])} != worlds
    ):
        sys.exit(f"{record}: expected one rank's decode and chunk, and the links of all others; measure them")
    pairs = compared(lines)
    names = "cpu", "collectives", "step"
    for row, ratios in pairs:
        measured = [f"{1e3 * row['seconds'][name]['median']:,.1f}" for name in names]
        cells.append([row["case"], str(cluster.Split(row["tp"], row["cp"])), *measured])
        cells[-1] += [f"{ratios[name]:.2f}" if name in ratios else "-" for name in names]
    measured, ratios = (
        [f"{name}{what}" for name in ("CPU", "collectives", "step")] for what in (" ms", " x")
    )
    console.print(table(("", "ranks", *measured, *ratios), cells, words=2))
    console.print(
        "ms: measured; x: predicted / measured. A dash: the prediction was fitted to it, or it is 0."
    )
    alone = [row["one_process_seconds"] for row, _ in pairs]
    busy = [seconds["step"]["median"] / seconds["cpu"]["median"] for seconds in alone]
    console.print(
        f"One process took {min(busy):.2f} to {max(busy):.2f} times its CPU time: above 1, other programs "
        "had the cores, and measured steps are too long."
    )
    for name in names:
        found = [ratios[name] for _, ratios in pairs if name in ratios]
        console.print(
            f"{name}: predicted / measured {min(found):.2f} to {max(found):.2f}, "
            f"median {statistics.median(found):.2f}"
        )


# On many cards


CONTEXTS = {"128k": 1 << 17, "512k": 1 << 19, "1M": 1 << 20, "4M": 4 << 20, "10M": 10 << 20}
OF_64 = cluster.Split(1, 64), cluster.Split(8, 8), cluster.Split(64, 1)
CARDS = (1, 2, 4, 8, 16, 32, 64)
WORK = {"decode, 1 sequence": (1, 1), "decode, 32 sequences": (32, 1), "prefill of 8,192": (1, 8192)}
Best = tuple[cluster.Division, dict[str, float]] | None


def planned(config: DSAConfig) -> dict[str, dict[str, list[Best]]]:
    """The best division by work, context and number of cards."""
    return {
        work: {
            name: [
                cluster.best(config, cluster.Step(*step, context), n, cluster.H200, cluster.NODES_OF_8)
                for n in CARDS
            ]
            for name, context in CONTEXTS.items()
        }
        for work, step in WORK.items()
    }


def plan(write: bool) -> None:
    config = DSAConfig.deepseek_v32()
    made = planned(config)
    text = markdown(config, made)
    print(text)
    if write:
        from bench.plots import plan_plot

        plan_plot(made, CARDS, PLOT)
        page = PAGE.read_text() if PAGE.is_file() else f"# Over several cards\n\n{BEGIN}\n{END}\n"
        before, _, rest = page.partition(BEGIN)
        _, found, after = rest.partition(END)
        if not found:
            sys.exit(f"{PAGE.name}: expected '{BEGIN}' and after it '{END}'")
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def wrapped(text: str) -> str:
    return textwrap.fill(text, 118, break_long_words=False, break_on_hyphens=False)


def markdown(config: DSAConfig, made: dict[str, dict[str, list[Best]]]) -> str:
    """What `plan --write` puts between the marks of docs/distributed.md."""
    blocks = [wrapped(introduction())]
    for work, by_context in made.items():
        head = [f"{work}, {unit_of(work)}", *(f"{n} card{'s' * (n > 1)}" for n in CARDS)]
        rows = [[name, *(cell(found, unit_of(work)) for found in line)] for name, line in by_context.items()]
        blocks.append(lines_of([head, *rows]))
    blocks += [memory_table(config), parts_table(config)]
    return "\n\n".join(blocks)


def introduction() -> str:
    card, links = cluster.H200, cluster.NODES_OF_8
    within, across = (
        f"{link.bytes_per_second / 1e9:.0f} GB/s and {link.latency * 1e6:.0f} us per collective"
        for link in (links.within, links.across)
    )
    return (
        "Computed by `python benchmarks/distributed.py plan`; no cluster ran it. Per attention layer of "
        f"DeepSeek-V3.2, bf16: kernels as one {card.name} measured them, links **assumed** ({within} within "
        f"{links.cards_of_a_node} cards, {across} beyond them). In a cell: the fastest division whose bf16 "
        f"keys of {cluster.LAYERS} layers fit {card.memory_bytes / 1e9:.0f} GB beside nothing else. Experts "
        "and all else that is not attention are left out, and of the memory weights too. A dash: none fits."
    )


def unit_of(work: str) -> str:
    return "ms" if work.startswith("prefill") else "us"


def cell(found: Best, unit: str) -> str:
    if found is None:
        return "-"
    division, seconds = found
    total = sum(seconds.values())
    return f"{division.split}: {total * 1e3:.1f}" if unit == "ms" else f"{division.split}: {total * 1e6:.0f}"


def memory_table(config: DSAConfig) -> str:
    """Keys of all layers on one card, by how many cards share them out."""
    rows = [["keys per sequence and card, GB: bf16 / fp8", *(f"cp {n}" for n in CARDS)]]
    for name, context in CONTEXTS.items():
        step, cells = cluster.Step(1, 1, context), []
        for n in CARDS:
            division = cluster.Division(config, step, cluster.Split(1, n))
            sizes = [
                cluster.LAYERS * dataclasses.replace(division, stored=stored).keys_bytes() / 1e9
                for stored in (cluster.BF16, cluster.FP8)
            ]
            cells.append(" / ".join(f"{size:,.1f}" for size in sizes))
        rows.append([name, *cells])
    return lines_of(rows)


def parts_table(config: DSAConfig) -> str:
    """Divisions of 8 and of 64 cards at a million tokens whose keys fit."""
    rows = [["1M tokens", "cards", *cluster.PARTS, "all", "MB received"]]
    for work, (sequences, tokens) in WORK.items():
        unit, scale, digits = ("ms", 1e3, 1) if unit_of(work) == "ms" else ("us", 1e6, 0)
        for split in (*cluster.splits(1), *cluster.splits(8), *OF_64):
            division = cluster.Division(config, cluster.Step(sequences, tokens, CONTEXTS["1M"]), split)
            seconds = division.seconds(cluster.H200, cluster.NODES_OF_8)
            parts = [f"{seconds[part] * scale:.{digits}f}" for part in cluster.PARTS]
            total = f"{sum(seconds.values()) * scale:.{digits}f}"
            if cluster.LAYERS * division.keys_bytes() > cluster.H200.memory_bytes:
                continue
            received = f"{sum(division.received().values()) / 1e6:,.1f}"
            rows.append([f"{work}, {unit}", f"{split}", *parts, f"**{total}**", received])
    return lines_of(rows)


def lines_of(rows: list[list[str]]) -> str:
    head, *others = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *others])


if __name__ == "__main__":
    main()
