"""A DeepSeek-V3.2-shaped attention layer on this machine, sparse against dense: time, memory, error.

    python examples/v32_layer.py --contexts 8192 32768 65536 --output v32-layer

Needs: pip install "sparse_attn[demo]"
"""

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 32768, 65536])
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--output", type=Path, default=Path("v32-layer"), help="folder for the plot")
    options = parser.parse_args()
    try:
        from rich.console import Console

        from sparse_attn.bench import layer
    except ModuleNotFoundError as error:
        raise SystemExit(f'{error.name} is missing: pip install "sparse_attn[demo]"') from None
    layer.run(Console(), options.output, contexts=options.contexts, threads=options.threads)


if __name__ == "__main__":
    main()
