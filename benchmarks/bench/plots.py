"""PNG plots of benchmark results."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from .case import milliseconds

PARTS = {"indexer": "#4c78a8", "topk": "#9ecae9", "attend": "#54a24b"}
DENSE = {
    "dense_sdpa": ("dense, SDPA", "#e45756"),
    "dense_gemm": ("dense, chunked GEMM", "#f58518"),
    "dense_own": ("dense, our own kernel", "#eeca3b"),
}
CURVES = ("#4c78a8", "#e45756", "#f58518", "#54a24b", "#b279a2", "#9d755d", "#eeca3b")  # ours first


def decode_plot(lines: list[dict[str, Any]], about: str, path: Path) -> None:
    """Time per decode step, by context: the parts of sparse attention beside the dense forms."""
    rows = _one_sequence(lines)
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    width = 0.2
    for x, row in enumerate(rows):
        bottom = 0.0
        for part, colour in PARTS.items():
            label = part.replace("topk", "top-k") if x == 0 else None
            axis.bar(x - width, row[part] * 1e3, width, bottom=bottom, color=colour, label=label)
            bottom += row[part] * 1e3
        axis.text(x - width, bottom, milliseconds(row["sparse"]), ha="center", va="bottom", fontsize=8)
        for place, (name, (label, colour)) in enumerate(DENSE.items()):
            at, ms = x + place * width, row[name] * 1e3
            axis.bar(at, ms, width, color=colour, label=label if x == 0 else None)
            text = f"{milliseconds(row[name])}\n{row[name] / row['sparse']:.1f}x"
            axis.text(at, ms, text, ha="center", va="bottom", fontsize=8)
    axis.set_xticks(range(len(rows)), [f"{row['context'] // 1024}k tokens" for row in rows])
    axis.set_ylabel("ms per token and layer")
    axis.margins(y=0.15)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    axis.set_title(f"DeepSeek-V3.2-shaped layer, decode\n{about}", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def operation_plots(lines: list[dict[str, Any]], about: str, folder: Path) -> list[Path]:
    """Plot time and memory by context, where sparse overtakes dense, share of the limit; gives the files."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    by_operation: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        if "not_timed" not in line:
            by_operation.setdefault(line["operation"], []).append(line)
    layer = _one_sequence(by_operation.pop("layer", []))
    memory = by_operation.pop("memory", [])
    by_operation = {
        name: rows for name, rows in by_operation.items() if len({row["context"] for row in rows}) > 1
    }
    if by_operation:
        made.append(_save(_times(by_operation), folder / "time.png", about))
        made.append(_save(_shares(by_operation, layer), folder / "limits.png", about))
    if memory:
        figure, axis = _figure()
        _curves(axis, memory, "peak_bytes", 2**-20)
        _log_axes(axis, "tokens in the context", "MiB above the inputs", "64 queries select and attend")
        made.append(_save(figure, folder / "memory.png", about))
    if len(layer) > 1:
        made.append(_save(_crossover(layer), folder / "crossover.png", about))
        decode_plot(layer, about, folder / "layer_decode.png")
        made.append(folder / "layer_decode.png")
    return made


def plan_plot(made: dict[str, dict[str, list]], cards: Sequence[int], path: Path) -> None:
    """Computed time of a step by cards, a line per context; a cross where fewer do not hold the keys."""
    figure, axes = plt.subplots(1, len(made), figsize=(11, 4), layout="constrained")
    for axis, (work, by_context) in zip(axes, made.items(), strict=True):
        for (context, line), colour in zip(by_context.items(), CURVES, strict=False):
            fit = [(n, found[1]) for n, found in zip(cards, line, strict=True) if found]
            points = [(n, 1e3 * sum(seconds.values())) for n, seconds in fit]
            if points:
                _line(axis, points, color=colour, label=f"{context} tokens", markersize=4)
                if points[0][0] > cards[0]:
                    _line(axis, points[:1], "x", color=colour, markersize=10)
        _log_axes(axis, "cards", "ms per layer", work)
        axis.set_xticks(cards, [str(n) for n in cards])
        if work.startswith("decode"):  # less than a decade
            axis.set_yscale("linear")
            axis.set_ylim(0)
        axis.legend(frameon=False, fontsize=8, loc="lower left")
    about = (
        "DeepSeek-V3.2's attention layer, the best division of the cards whose bf16 keys fit (cross: fewer "
        "cards do not\nhold them), computed from kernels measured on one H200 and assumed links; nothing ran"
    )
    _save(figure, path, about)


def _one_sequence(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The layer's lines of one sequence that decodes, where all that is drawn was timed."""
    return [line for line in lines if line["data"] == "decode" and {*PARTS, *DENSE} <= line.keys()]


def _first_kind(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines with the first kind of data that the operation was timed with."""
    return [line for line in lines if line["data"] == lines[0]["data"]]


def _line(axis, points: list[tuple[int, float]], style: str = "o-", **options) -> None:
    axis.plot(*zip(*points, strict=True), style, **options)


def _curves(axis, lines: list[dict[str, Any]], what: str, scale: float) -> None:
    series: dict[str, list[tuple[int, float]]] = {}
    for line in _first_kind(lines):
        for name, value in line[what].items():
            value = value["median"] if isinstance(value, dict) else value
            if value:
                series.setdefault(name, []).append((line["context"], value * scale))
    for place, (name, points) in enumerate(series.items()):
        width, colour = 2.4 if place == 0 else 1.2, CURVES[place % len(CURVES)]
        _line(axis, points, markersize=4, label=name, linewidth=width, color=colour)


def _times(by_operation: dict[str, list[dict[str, Any]]]):
    rows = -(-len(by_operation) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(10, 4 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat[len(by_operation) :]:
        axis.set_axis_off()
    for axis, (operation, lines) in zip(axes.flat, by_operation.items(), strict=False):
        _curves(axis, lines, "seconds", 1e3)
        limit = [(line["context"], 1e3 * line["limit_seconds"]) for line in _first_kind(lines)]
        _line(axis, limit, "k:", linewidth=1, label="limit")
        _log_axes(axis, "tokens in the context", "ms", operation)
    return figure


def _shares(by_operation: dict[str, list[dict[str, Any]]], layer: list[dict[str, Any]]):
    figure, axis = _figure()
    for operation, lines in by_operation.items():
        ours = [(line, next(iter(line["seconds"].values()))) for line in _first_kind(lines)]
        points = [(line["context"], 100 * line["limit_seconds"] / t["median"]) for line, t in ours]
        _line(axis, points, label=operation)
    if layer:
        points = [(row["context"], 100 * row["limit_seconds"] / row["sparse"]) for row in layer]
        _line(axis, points, "s-", linewidth=2.4, label="layer, decode")
    _log_axes(axis, "tokens in the context", "% of the limit", "Share of what this machine could do")
    axis.set_yscale("linear")
    axis.set_ylim(0)
    return figure


def _crossover(layer: list[dict[str, Any]]):
    figure, axis = _figure()
    for name, (label, colour) in DENSE.items():
        points = [(row["context"], row[name] / row["sparse"]) for row in layer]
        _line(axis, points, label=label, color=colour)
    axis.axhline(1, color="black", linewidth=0.8)
    title = "Above the line sparse is faster"
    _log_axes(axis, "tokens in the context", "time of dense / time of sparse", title, unit="x")
    return figure


def _figure():
    return plt.subplots(figsize=(7, 4.5), layout="constrained")


def _log_axes(axis, x: str, y: str, title: str, unit: str = "") -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:g}k" if value < 2**20 else "1M")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,g}{unit}")
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.set_title(title, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="upper left")


def _save(figure, path: Path, about: str) -> Path:
    figure.suptitle(about, fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
