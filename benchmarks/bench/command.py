"""What the scripts share: their options, and tables of numbers."""

import argparse
from collections.abc import Iterable

from rich.table import Table


def parser(doc: str, rounds: int | None = None) -> argparse.ArgumentParser:
    """A parser that explains itself by ``doc``; with --json, and with --rounds where there is a default."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    if rounds is not None:
        made.add_argument("--rounds", type=int, default=rounds, help=f"interleaved rounds (default {rounds})")
    made.add_argument("--json", metavar="FILE", help="append the figures, one JSON object per line")
    return made


def table(headings: Iterable[str], rows: Iterable[Iterable[str]], words: int = 1, **options) -> Table:
    """A table whose first ``words`` columns hold words, the others numbers; ``options`` are rich's."""
    made = Table(**options)
    for place, heading in enumerate(headings):
        made.add_column(heading, justify="left" if place < words else "right")
    for cells in rows:
        made.add_row(*cells)
    return made
