"""The options of ``sparse-attn bench`` and of the scripts in ``benchmarks/``; needs nothing of an extra."""

import argparse
from pathlib import Path

from .operations import OPERATIONS

NAMES = (*OPERATIONS, "layer")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="few sizes, less than two minutes")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="append the figures, one JSON object a line"
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where plots go; none without it")
