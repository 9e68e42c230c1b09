"""Measurement -> a picture.

Imports numpy, ``distance``, ``measurement`` and, once it draws, matplotlib.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_adam_mini.heterogeneity.distance import densities
from megatron_adam_mini.heterogeneity.measurement import Measurement

#: Blocks whose names are written.
_MOST_NAMES = 40


def draw(measured: Measurement, path: Path, title: str = "") -> None:
    """Draw the spectra of all blocks and their distances, side by side, as a PNG.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            "--plot needs matplotlib, which is not installed; run pip install "
            "'megatron-adam-mini[plot]', or leave --plot out."
        ) from error
    rows = len(measured.names)
    figure = Figure(figsize=(12, 1.6 + 0.2 * min(rows, _MOST_NAMES)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    draw_spectra(left, measured)
    image = right.imshow(measured.distances(), vmin=0, vmax=np.log(2), cmap="viridis")
    right.set_xticks([])
    right.set_yticks([])
    right.set_title(f"Jensen-Shannon divergence, nats; mean {measured.js0():.3f}")
    figure.colorbar(image, ax=right)
    if title:
        figure.suptitle(title)
    figure.savefig(path, dpi=90, format="png")


def draw_spectra(axes: Any, measured: Measurement) -> None:
    """Draw the smoothed spectrum of each block as a row of colours on matplotlib's axes."""
    axis = measured.axis
    found = densities(measured.spectra, axis)
    shown = np.log10(np.maximum(found.masses / np.diff(found.edges), 1e-5))
    rows = len(measured.names)
    axes.pcolormesh(found.edges, np.arange(rows + 1), shown, cmap="magma", rasterized=True)
    if rows <= _MOST_NAMES:
        axes.set_yticks(np.arange(rows) + 0.5, measured.names, fontsize=6)
    else:
        axes.set_yticks([])
    axes.invert_yaxis()
    assert axis.floor is not None
    least = np.ceil(np.log10(axis.floor)) + 1
    exponents = np.arange(least, np.log10(max(measured.largest)) + 1, 3)
    values = [*(-(10.0 ** exponents[::-1])), 0.0, *(10.0**exponents)]
    labels = [_label(value) for value in values]
    places = axis.places(np.array(values))
    inside = (places >= found.edges[0]) & (places <= found.edges[-1])
    axes.set_xticks(places[inside], np.array(labels)[inside], fontsize=7)
    axes.set_xlabel("eigenvalue")
    axes.set_title("spectral density of each block, logarithmic colours")


def _label(value: float) -> str:
    if value == 0:
        return "0"
    exponent = round(np.log10(abs(value)))
    return f"${'-' if value < 0 else ''}10^{{{exponent}}}$"
