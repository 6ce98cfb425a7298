"""The measured part of README.md, made from a record of ``benchmarks/run.py``; no figure is typed by hand.

    python benchmarks/readme.py benchmarks/records/RECORD.jsonl            prints it
    python benchmarks/readme.py benchmarks/records/RECORD.jsonl --write    puts it into README.md

It lies between two comments in README.md; the first names the record, and a test compares the two.
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
    readme = ROOT / "README.md"
    new, count = PART.subn(lambda _: text, readme.read_text())
    if count != 1:
        sys.exit(f"README.md: expected one part from '{BEGIN.format('RECORD')}' to '{END}', found {count}")
    readme.write_text(new)


def measured(record: Path) -> str:
    """The part of README.md, its two comments included."""
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    layer = [line for line in lines if line["operation"] == "layer"]
    if not layer:
        sys.exit(f"{record}: holds no layer; run `python benchmarks/run.py layer --json {record}`")
    decode = [line for line in layer if line["data"] == "decode" and line["context"] >= SHORTEST]
    prefill = next(line for line in layer if line["data"].startswith("prefill"))
    name = record.resolve().relative_to(ROOT).as_posix()
    parts = [
        _wrapped(_introduction(layer[0], name)),
        _table(decode),
        _prefill(prefill),
        _wrapped(_errors(layer)),
        _wrapped(_projections(decode)),
    ]
    return "\n".join([BEGIN.format(name), "\n\n".join(parts), END])


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
    head = ["context", "indexer", "top-k", "attend", "**all**", "of limit"]
    rows = [head + [f"dense, {name}" for name in DENSE.values()], ["---"] * (len(head) + len(DENSE))]
    for line in decode:
        own = [f"{line[part] * 1e3:.2f}" for part in ("indexer", "topk", "attend")]
        share = f"{line['limit_seconds'] / line['sparse']:.0%}"
        dense = [f"{_ms(line[name])} ({_ratio(line[name] / line['sparse'])})" for name in DENSE]
        rows.append([f"{line['context']:,}", *own, f"**{line['sparse'] * 1e3:.2f}**", share, *dense])
    return "\n".join(
        "|" + "|".join(f" {cell} " if cell != "---" else cell for cell in row) + "|" for row in rows
    )


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


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f}" if seconds >= 0.0995 else f"{seconds * 1e3:.1f}"


def _ratio(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 9.95 else f"{ratio:.1f}x"


if __name__ == "__main__":
    main()
