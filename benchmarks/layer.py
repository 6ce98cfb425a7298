"""The whole layer, indexer + top-k + attention, against dense attention: decode and prefill."""

import argparse
import json
from pathlib import Path

from rich.console import Console

from sparse_attn.bench import layer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 32768, 65536, 131072])
    parser.add_argument("--prefill", type=int, nargs=2, default=[512, 32768], metavar=("TOKENS", "CONTEXT"))
    parser.add_argument("--quick", action="store_true", help="two contexts and a small prefill")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--output", type=Path, help="folder for the plot")
    parser.add_argument("--json", metavar="FILE", help="append the figures as one JSON line")
    options = parser.parse_args()
    contexts, (tokens, context) = options.contexts, options.prefill
    if options.quick:
        contexts, tokens, context = [8192, 32768], 64, 8192
    results = layer.run(
        Console(),
        options.output,
        contexts=contexts,
        prefill_tokens=tokens,
        prefill_context=context,
        rounds=options.rounds,
        threads=options.threads,
    )
    if options.json:
        with open(options.json, "a") as file:
            file.write(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
