"""The command ``sparse-attn``."""

import argparse
import json
import time
from pathlib import Path

from .bench import options as bench_options
from .demo import INSTALL


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="sparse-attn", description="DeepSeek Sparse Attention on this machine."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo", help="a real model and a DeepSeek-V3.2-shaped layer, sparse against dense"
    )
    demo.add_argument("--part", choices=["model", "layer", "all"], default="all", help="default: all")
    demo.add_argument("--tokens", type=int, default=2048, help="length of the text (default 2048)")
    demo.add_argument("--text", type=Path, help="a text file instead of Python's own documentation")
    demo.add_argument("--threads", type=int, default=1, help="torch threads of the layer part (default 1)")
    demo.add_argument(
        "--output", type=Path, default=Path("sparse-attn-demo"), help="folder for plots and results.json"
    )
    doctor = commands.add_parser("doctor", help="what runs on what here, why, and whether it is right")
    doctor.add_argument("--json", action="store_true", help="for other programs")
    doctor.add_argument(
        "--arch",
        type=int,
        nargs="+",
        default=[],
        help="list the Triton configurations of these too, e.g. 90",
    )
    bench = commands.add_parser("bench", help="every operation against dense attention, with plots")
    bench.add_argument(
        "operations", nargs="*", metavar="operation", help=f"of {', '.join(bench_options.NAMES)}; all"
    )
    bench_options.add_arguments(bench)
    options = parser.parse_args(arguments)
    if options.command == "doctor":
        raise SystemExit(_doctor(options))
    try:
        if options.command == "bench":
            raise SystemExit(_bench(options, bench))
        _demo(options)
    except ModuleNotFoundError as error:
        raise SystemExit(f"sparse-attn {options.command} needs {error.name}: {INSTALL}") from None


def _demo(options: argparse.Namespace) -> None:
    from rich.console import Console

    from .bench import layer
    from .demo import model

    console = Console()
    start = time.perf_counter()
    options.output.mkdir(parents=True, exist_ok=True)
    results = {}
    if options.part in ("model", "all"):
        console.rule("1. A real model: SmolLM2-135M-Instruct")
        results["model"] = model.run(console, options.output, tokens=options.tokens, text=options.text)
    if options.part in ("layer", "all"):
        console.rule("2. A DeepSeek-V3.2-shaped layer: 128 heads, indexer 64 x 128, k = 2048")
        results["layer"] = layer.run(console, options.output, threads=options.threads)
    (options.output / "results.json").write_text(json.dumps(results, indent=1))
    console.print(
        f"{time.perf_counter() - start:.0f} s. Plots and results.json are in {options.output}/. "
        "All of this ran on the CPU."
    )


def _bench(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from .bench import run

    unknown = [name for name in options.operations if name not in bench_options.NAMES]
    if unknown:
        parser.error(
            f"operation: expected some of {', '.join(bench_options.NAMES)}, got {', '.join(unknown)}"
        )
    return 0 if run.run(options, options.operations or list(bench_options.NAMES)) else 1


def _doctor(options: argparse.Namespace) -> int:
    from . import doctor

    found = doctor.examine(tuple(options.arch))
    print(json.dumps(found, indent=1)) if options.json else doctor.show(found)
    return 1 if found["problems"] else 0
