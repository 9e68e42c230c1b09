"""Layouts of a search -> a picture.

Imports ``memory``, ``search_report`` and, once it draws, matplotlib.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_adam_mini.estimate.memory import FORMATS
from megatron_adam_mini.estimate.search_report import fitting, name_of

_GB = 10**9
#: Layouts that are drawn.
_MOST = 12
_COLORS = ("#4c72b0", "#dd8452", "#55a868")


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw what the first layouts that fit need, beside the memory of a GPU, as a PNG.

    Raises:
        ValueError: matplotlib is not installed, or no layout fits.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            "--plot needs matplotlib, which is not installed; run pip install "
            "'megatron-adam-mini[plot]', or leave --plot out."
        ) from error
    rows = fitting(report)[:_MOST]
    if not rows:
        raise ValueError("No layout fits, so there is nothing to draw; leave --plot out.")
    figure = Figure(figsize=(8, 1.2 + 0.55 * len(rows)), layout="constrained")
    axes = figure.subplots()
    shown = report["shown"]
    height = 0.8 / len(shown)
    for place, name in enumerate(shown):
        at = [row + (place - 1) * height for row in range(len(rows))]
        state = [entry["bytes"][name] / _GB for entry in rows]
        axes.barh(at, state, height, color=_COLORS[place], label=FORMATS[name].label)
        extra = [entry["activations"].get(1, 0) / _GB for entry in rows]
        if any(extra):
            what = "activations of a micro-batch of 1" if place == len(shown) - 1 else None
            axes.barh(at, extra, height, left=state, color="#cccccc", hatch="//", label=what)
    cluster = report["cluster"]
    axes.axvline(cluster["gpu_memory"] / _GB, color="black", linestyle="--", linewidth=1)
    experts = report["model"]["num_experts"] is not None
    axes.set_yticks(range(len(rows)), [name_of(entry, experts=experts) for entry in rows])
    axes.invert_yaxis()
    axes.set_xlabel("GB of the largest rank")
    axes.set_title(
        f"{report['parameters'] / 1e9:.1f}B parameters on {cluster['world_size']} GPUs of "
        f"{cluster['gpu_memory'] / _GB:g} GB (dashed)"
    )
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=110, format="png")
