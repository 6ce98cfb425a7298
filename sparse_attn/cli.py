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
    architectures = "list the Triton configurations of these too, e.g. 90"
    command.add_argument("--arch", type=int, nargs="+", default=[], help=architectures)
    options = parser.parse_args(arguments)
    try:
        found = doctor.examine(tuple(options.arch))
    except ImportError as error:  # nothing runs with a library that was built from other sources
        raise SystemExit(f"Problem: {error}") from None
    print(json.dumps(found, indent=1)) if options.json else doctor.show(found)
    raise SystemExit(1 if found["problems"] else 0)
