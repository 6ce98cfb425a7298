"""The measured parts of README.md, each made from a record; no figure is typed by hand.

    python benchmarks/readme.py benchmarks/records/RECORD.jsonl            prints the part of this record
    python benchmarks/readme.py benchmarks/records/RECORD.jsonl --write    puts it into README.md

A record of a CPU (``benchmarks/run.py``) gives the part on CPUs, one of a GPU (``benchmarks/gpu.py``) that on
GPUs. A part lies between two comments in README.md; the first names the record, and a test compares the two.
"""

import argparse
import json
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- measured: {} by benchmarks/readme.py -->", "<!-- measured: end -->"
PART = re.compile(r"<!-- measured: (\S+) by [^>]*-->\n.*?<!-- measured: end -->", re.DOTALL)
DENSE = {"dense_sdpa": "torch SDPA", "dense_gemm": "torch GEMM", "dense_own": "our own kernel"}
COLUMNS = [
    "indexer",
    "top-k",
    "attend",
    "**all**",
    "of limit",
    *(f"dense, {name}" for name in DENSE.values()),
]
SHORTEST = 8192  # contexts below it select nearly everything


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("record", type=Path)
    parser.add_argument(
        "--write", action="store_true", help="into README.md, in place of the part that is there"
    )
    options = parser.parse_args()
    text = measured(options.record)
    if not options.write:
        print(text)
        return
    readme, kind = ROOT / "README.md", _read(options.record)[0]["benchmark"]
    before = readme.read_text()
    parts = [part for part in PART.finditer(before) if _read(ROOT / part[1])[0]["benchmark"] == kind]
    if len(parts) != 1:
        sys.exit(f"README.md: expected one part of a {kind} record, up to '{END}', found {len(parts)}")
    readme.write_text(before[: parts[0].start()] + text + before[parts[0].end() :])


def _read(record: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in record.read_text().splitlines()]


def measured(record: Path) -> str:
    """A part of README.md, its two comments included."""
    lines = _read(record)
    layer = [line for line in lines if line["operation"] == "layer"]
    if not layer:
        sys.exit(f"{record}: holds no layer; run `python benchmarks/run.py layer --json {record}`")
    name = record.resolve().relative_to(ROOT).as_posix()
    make = _gpu_part if lines[0]["benchmark"] == "gpu" else _cpu_part
    return "\n".join([BEGIN.format(name), "\n\n".join(make(lines, layer, name)), END])


def _cpu_part(lines: list[dict[str, Any]], layer: list[dict[str, Any]], name: str) -> list[str]:
    decode = [line for line in layer if line["data"] == "decode" and line["context"] >= SHORTEST]
    prefill = next(line for line in layer if line["data"].startswith("prefill"))
    return [
        _wrapped(_introduction(layer[0], name)),
        _table(decode),
        _prefill(prefill),
        _wrapped(_errors(layer)),
        _wrapped(_projections(decode)),
    ]


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 118, break_long_words=False, break_on_hyphens=False)


def _introduction(line: dict[str, Any], name: str) -> str:
    machine, limits = line["machine"], line["limits"]
    threads = "one thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    peak, bandwidth = limits["operations_per_second"] / 1e9, limits["bytes_per_second"] / 1e9
    return (
        "One token through a DeepSeek-V3.2-shaped layer (128 heads, 576 / 512, indexer 64 x 128, k = 2048, "
        f"bf16), {threads} of a machine with {machine['processor']} (bf16 instructions: "
        f"{machine['bf16_instructions']}; {peak:.0f} GFLOP/s in registers and {bandwidth:.1f} GB/s, measured "
        f"in the run), torch {machine['torch']}, medians of {line['rounds']} interleaved rounds: "
        f"`{line['command']}`, {line['date']}, [record]({name}). Milliseconds; in brackets how many times "
        "longer dense takes. *Of limit*: the least time that the machine could take (counted in "
        "`benchmarks/bench/limits.py`) over the time taken."
    )


def _table(decode: list[dict[str, Any]]) -> str:
    rows = [["context", *COLUMNS]]
    for line in decode:
        own = [f"{line[part] * 1e3:.2f}" for part in ("indexer", "topk", "attend")]
        share = f"{line['limit_seconds'] / line['sparse']:.0%}"
        dense = [f"{_ms(line[name])} ({_ratio(line[name] / line['sparse'])})" for name in DENSE]
        rows.append([f"{line['context']:,}", *own, f"**{line['sparse'] * 1e3:.2f}**", share, *dense])
    return _markdown(rows)


def _markdown(rows: list[list[str]]) -> str:
    """A table whose first row is its head."""
    head, *others = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *others])


def _prefill(line: dict[str, Any]) -> str:
    memory = line["peak_bytes"]
    held = f", with {memory / 2**20:.0f} MiB of extra memory" if memory else ""
    return (
        f"Prefill of {line['tokens']} tokens at {line['context']:,}: {line['sparse']:.2f} s, against "
        f"{line['dense_sdpa']:.1f} s (SDPA) and {line['dense_gemm']:.1f} s (per-head GEMM){held}."
    )


def _errors(layer: list[dict[str, Any]]) -> str:
    error, rounding = (max(line["errors"][name] for line in layer) for name in ("attention", "bf16_rounding"))
    return (
        f"Relative error against fp64: {error:.2e}; rounding the exact result to bf16 alone makes "
        f"{rounding:.2e}."
    )


def _projections(decode: list[dict[str, Any]]) -> str:
    first, last = (
        (f"{_ms(line['layer'])} ms at {line['context']:,}", f"{line['projections'] / line['layer']:.0%}")
        for line in (decode[0], decode[-1])
    )
    return (
        "The projections are the same on both sides and are not counted: matrix-vector products, which are "
        f"left to torch. With them a decode step of the layer takes {first[0]} tokens, {first[1]} of it in "
        f"projections, and {last[0]} ({last[1]})."
    )


# On a GPU


def _gpu_part(lines: list[dict[str, Any]], layer: list[dict[str, Any]], name: str) -> list[str]:
    decode = [line for line in layer if line["data"].startswith("decode")]
    return [
        _wrapped(_gpu_introduction(lines[0], name)),
        _gpu_table(decode),
        _wrapped(_gpu_prefill(next(line for line in layer if line["data"].startswith("prefill")))),
        _gpu_attention(lines),
        _wrapped(_errors([line for line in layer if "errors" in line])),
    ]


def _gpu_introduction(line: dict[str, Any], name: str) -> str:
    machine, limits = line["machine"], line["limits"]
    peak, bandwidth = limits["operations_per_second"] / 1e12, limits["bytes_per_second"] / 1e12
    command = "python " + line["command"].removeprefix("python ")  # old records leave it out
    return (
        f"The same layer's step on one {machine['gpu']} ({peak:.0f} TFLOP/s in bf16 and {bandwidth:.1f} "
        f"TB/s, measured in the run), torch {machine['torch']}, Triton {machine['triton']}: a token of each "
        "of several sequences. Microseconds of captured graphs, the L2 cache flushed before each: "
        f"`{command}`, {line['date']}, [record]({name})."
    )


def _gpu_table(decode: list[dict[str, Any]]) -> str:
    rows = [["sequences", "context", *COLUMNS]]
    for line in decode:
        own = [f"{line[part] * 1e6:.0f}" for part in ("indexer", "topk", "attend")]
        share = f"{line['limit_seconds'] / line['sparse']:.0%}"
        dense = [
            f"{line[n] * 1e6:,.0f} ({_ratio(line[n] / line['sparse'])})" if n in line else "-" for n in DENSE
        ]
        total = f"**{line['sparse'] * 1e6:.0f}**"
        rows.append([_sequences(line), f"{line['context']:,}", *own, total, share, *dense])
    return _markdown(rows)


def _sequences(line: dict[str, Any]) -> str:
    found = re.search(r"(\d+) sequences", line["data"])
    return found[1] if found else "1"


def _gpu_prefill(line: dict[str, Any]) -> str:
    parts = ", ".join(
        f"{name} {line[key] * 1e3:.1f}" for name, key in (("indexer", "indexer"), ("top-k", "topk"))
    )
    against = (
        f", against {line['dense_sdpa'] * 1e3:.1f} ms of torch SDPA (per head)"
        if "dense_sdpa" in line
        else ""
    )
    return (
        f"Prefill of {line['tokens']:,} tokens at {line['context']:,}, 128 heads: "
        f"{line['sparse'] * 1e3:.1f} ms ({parts}, attention {line['attend'] * 1e3:.1f}){against}."
    )


def _gpu_attention(lines: list[dict[str, Any]]) -> str:
    """Attention alone over bf16 and fp8 caches, for each number of heads that a process may hold."""
    rows = [["attention", "bf16, us", "TFLOP/s", "fp8 cache, us", "TFLOP/s"]]
    for line in lines:
        heads = re.match(r"(\d+) heads", line["data"])
        whole = line["operation"] == "layer" and line["data"].startswith("prefill")
        most = (
            line["operation"] == "attention"
            and line["data"].startswith("gaussian")
            and line["context"] == 32768
        )
        if "attend" not in line["seconds"] or not (heads or whole or most):
            continue
        cells = []
        for name in ("attend", "attend, fp8 cache"):
            seconds = line["seconds"][name]["median"]
            operations = _attention_operations(line, int(heads[1]) if heads else 128)
            cells += [f"{seconds * 1e6:,.0f}", f"{operations / seconds / 1e12:.0f}"]
        what = "prefill of 4,096" if "prefill" in line["data"] else f"decode of {_sequences(line)}"
        rows.append([f"{heads[1] if heads else 128} heads, {what}", *cells])
    return _markdown(rows)


def _attention_operations(line: dict[str, Any], heads: int) -> float:
    """Two for each multiply-add over 2048 tokens per query, of 576 columns and then of 512."""
    queries = line.get("tokens") or (4096 if "prefill" in line["data"] else int(_sequences(line)))
    return 2.0 * queries * 2048 * heads * (576 + 512)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f}" if seconds >= 0.0995 else f"{seconds * 1e3:.1f}"


def _ratio(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 9.95 else f"{ratio:.1f}x"


if __name__ == "__main__":
    main()
