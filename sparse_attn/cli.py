"""The command ``sparse-attn``."""

import argparse
import json

from . import doctor


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="sparse-attn", description="DeepSeek Sparse Attention on this machine."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("doctor", help="what runs on what here, why, and whether it is right")
    command.add_argument("--json", action="store_true", help="for other programs")
    command.add_argument(
        "--arch",
        type=int,
        nargs="+",
        default=[],
        help="list the Triton configurations of these too, e.g. 90",
    )
    options = parser.parse_args(arguments)
    found = doctor.examine(tuple(options.arch))
    print(json.dumps(found, indent=1)) if options.json else doctor.show(found)
    raise SystemExit(1 if found["problems"] else 0)
