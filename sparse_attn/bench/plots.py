"""PNG plots of benchmark results."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from .timing import describe

PARTS = {"indexer": "#4c78a8", "topk": "#9ecae9", "attend": "#54a24b"}
DENSE = {
    "dense_sdpa": ("dense, SDPA", "#e45756"),
    "dense_gemm": ("dense, chunked GEMM", "#f58518"),
    "dense_own": ("dense, our own kernel", "#eeca3b"),
}


def decode_plot(results: dict[str, Any], path: Path) -> None:
    """Time of one decode step by context: the parts of sparse attention beside the dense forms."""
    rows = results["decode"]
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    width = 0.2
    for x, row in enumerate(rows):
        bottom = 0.0
        for part, colour in PARTS.items():
            label = part.replace("topk", "top-k") if x == 0 else None
            axis.bar(x - width, row[part] * 1e3, width, bottom=bottom, color=colour, label=label)
            bottom += row[part] * 1e3
        axis.text(x - width, bottom, f"{row['sparse'] * 1e3:.1f}", ha="center", va="bottom", fontsize=8)
        for place, (name, (label, colour)) in enumerate(DENSE.items()):
            ms = row[name] * 1e3
            axis.bar(x + place * width, ms, width, color=colour, label=label if x == 0 else None)
            axis.text(
                *(x + place * width, ms, f"{ms:.0f}\n{row[name] / row['sparse']:.1f}x"),
                **{"ha": "center", "va": "bottom", "fontsize": 8},
            )
    axis.set_xticks(range(len(rows)), [f"{row['context'] // 1024}k tokens" for row in rows])
    axis.set_ylabel("ms a token and layer")
    axis.margins(y=0.15)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    axis.set_title(f"DeepSeek-V3.2-shaped layer, decode\n{describe(results['machine'])}", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)
