"""Spectra of several blocks -> how far they lie apart.

Imports torch, numpy and ``lanczos``.

Eigenvalues lie on one of two axes, both common to all blocks. On the *logarithmic* one, an
eigenvalue t lies at ``asinh(t / 2f) / ln(10)``: its decades above the floor f, with its sign, and
linear below f, where it counts as zero. Blocks lie apart if they need learning rates of different
orders of magnitude, and the distance does not change when the loss is multiplied by a constant. On
the *linear* one, where the authors' published code draws spectra, whatever is small beside the
width of the smoothing counts as zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch

from megatron_adam_mini.heterogeneity.lanczos import FloatArray, Spectrum

#: Cells of the grid for each standard deviation of the smoothing, and how far it reaches.
_CELLS, _REACH = 4, 6.0
#: A grid has no more cells than this; then they are as wide as it takes.
_MOST_CELLS = 100_000


@dataclass(frozen=True)
class Axis:
    """Where eigenvalues lie, and how they are smoothed.

    Attributes:
        floor: f of the logarithmic axis; ``None``: the axis is linear.
        width: standard deviation of the Gaussian around each node, in decades, or in eigenvalues.
    """

    floor: float | None
    width: float

    def places(self, values: FloatArray) -> FloatArray:
        """Return where eigenvalues lie."""
        if self.floor is None:
            return values
        return np.asarray(np.arcsinh(values / (2 * self.floor)) / np.log(10.0))


def log_axis(spectra: Sequence[Spectrum], *, floor: float, width: float) -> Axis:
    """Return the logarithmic axis.

    Args:
        spectra: of all blocks.
        floor: relative to the largest magnitude of an eigenvalue of all blocks.
        width: in decades.
    """
    largest = max(abs(end) for spectrum in spectra for end in spectrum.range)
    return Axis(floor * largest or 1.0, width)


class Densities(NamedTuple):
    """Smoothed spectra on a common grid.

    Attributes:
        edges: of the cells, shape ``(cells + 1,)``, as places on the axis.
        masses: of each cell, shape ``(blocks, cells)``; each row sums up to 1.
    """

    edges: FloatArray
    masses: FloatArray


def densities(spectra: Sequence[Spectrum], axis: Axis) -> Densities:
    """Smooth spectra with Gaussians, and integrate them over the cells of a common grid."""
    places = [axis.places(spectrum.nodes) for spectrum in spectra]
    low = min(float(at.min()) for at in places) - _REACH * axis.width
    high = max(float(at.max()) for at in places) + _REACH * axis.width
    cells = min(_MOST_CELLS, int(np.ceil((high - low) / axis.width * _CELLS)))
    edges = np.linspace(low, high, cells + 1)
    masses = [
        _masses(at, spectrum.weights, edges, axis.width)
        for at, spectrum in zip(places, spectra, strict=True)
    ]
    return Densities(edges, np.stack(masses))


def _masses(places: FloatArray, weights: FloatArray, edges: FloatArray, width: float) -> FloatArray:
    below = np.zeros(len(edges))
    for place, weight in zip(places, weights, strict=True):
        scaled = torch.from_numpy((edges - place) / (width * np.sqrt(2.0)))
        below += weight * 0.5 * (1 + torch.erf(scaled).numpy())
    mass = np.diff(below)
    return np.asarray(mass / mass.sum())


def jensen_shannon(first: FloatArray, second: FloatArray) -> float:
    """Return the Jensen-Shannon divergence of two distributions, in nats: from 0 to ln(2).

    ``KL(p || m) / 2 + KL(q || m) / 2`` with ``m = (p + q) / 2``.

    Args:
        first: masses of cells, which sum up to 1.
        second: the same, of the same cells.
    """
    middle = (first + second) / 2
    return _relative_entropy(first, middle) / 2 + _relative_entropy(second, middle) / 2


def _relative_entropy(first: FloatArray, second: FloatArray) -> float:
    there = first > 0
    return float(np.sum(first[there] * np.log(first[there] / second[there])))


def distances(spectra: Sequence[Spectrum], axis: Axis) -> FloatArray:
    """Return the divergence of each pair of spectra, shape ``(blocks, blocks)``."""
    masses = densities(spectra, axis).masses
    found = np.zeros((len(spectra), len(spectra)))
    for first, second in combinations(range(len(spectra)), 2):
        found[first, second] = found[second, first] = jensen_shannon(masses[first], masses[second])
    return found


def average(distance: FloatArray) -> float:
    """Return JS^0: the mean over pairs of different blocks."""
    above = np.triu_indices(len(distance), k=1)
    return float(distance[above].mean())
