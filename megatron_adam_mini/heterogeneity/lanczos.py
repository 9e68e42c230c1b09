"""Products with a symmetric matrix -> its spectrum, by stochastic Lanczos quadrature.

Imports torch and numpy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FloatArray = NDArray[np.float64]

#: A residual this much smaller than the matrix, by precision of the vectors, is zero.
_NEGLIGIBLE = 10.0


@dataclass(frozen=True, eq=False)
class Spectrum:
    """A distribution of eigenvalues.

    Attributes:
        nodes: float64, shape ``(nodes,)``.
        weights: of each, the same shape; they sum up to 1.
    """

    nodes: FloatArray
    weights: FloatArray

    def moment(self, power: int) -> float:
        """Return the mean of the eigenvalues to a power: ``trace(H^power) / elements``."""
        return float(self.weights @ self.nodes**power)

    @property
    def range(self) -> tuple[float, float]:
        """Least and largest node; with enough steps, of the eigenvalues."""
        return float(self.nodes.min()), float(self.nodes.max())

    def scaled(self, factor: float) -> Spectrum:
        """Return the spectrum of ``factor`` times the matrix."""
        return Spectrum(self.nodes * factor, self.weights)

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {"nodes": self.nodes.tolist(), "weights": self.weights.tolist()}


def spectrum(
    product: Callable[[Tensor], Tensor],
    numel: int,
    *,
    steps: int,
    probes: int,
    generator: torch.Generator,
    dtype: torch.dtype,
    device: torch.device,
) -> Spectrum:
    """Estimate the spectrum of a symmetric matrix H.

    For each probe u, uniform on the sphere, ``u . f(H) u`` has the mean ``trace(f(H)) / n``, and
    Lanczos' tridiagonal T gives it as ``sum_i (e_1 . y_i)^2 f(theta_i)`` over T's eigenpairs: exact
    for polynomials of degree ``2 * steps - 1``.

    Args:
        product: vector, shape ``(numel,)`` -> H times it.
        numel: n, rows of H.
        steps: products of each probe; no more than ``numel`` are made.
        probes: number of random vectors.
        generator: for them; on the CPU, so that they are the same on every device.
        dtype: of the vectors.
        device: of the vectors.

    Memory: ``steps + 2`` vectors.
    """
    nodes, weights = [], []
    for _ in range(probes):
        start = torch.randn(numel, generator=generator, dtype=torch.float64)
        diagonal, beside = tridiagonal(product, start.to(device, dtype), min(steps, numel))
        matrix = np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
        values, vectors = np.linalg.eigh(matrix)
        nodes.append(values)
        weights.append(vectors[0] ** 2 / probes)
    return Spectrum(np.concatenate(nodes), np.concatenate(weights))


def tridiagonal(
    product: Callable[[Tensor], Tensor], start: Tensor, steps: int
) -> tuple[FloatArray, FloatArray]:
    """Return the diagonal and its neighbours of H in the Krylov space of a vector.

    Every new vector is made orthogonal to all before it, twice (full reorthogonalisation): without
    that, eigenvalues that have converged come again and again.

    Args:
        product: as in :func:`spectrum`.
        start: shape ``(numel,)``; not zero.
        steps: vectors, at most ``numel``.

    Returns:
        Float64, shapes ``(k,)`` and ``(k - 1,)``, where k is ``steps``, or the dimension of the
        Krylov space if that is smaller.
    """
    basis = start.new_empty(steps, len(start))
    basis[0] = start / start.norm()
    diagonal: list[float] = []
    beside: list[float] = []
    size = 0.0
    for step in range(steps):
        rest = product(basis[step])
        if not torch.isfinite(rest).all():
            raise ValueError(
                f"A Hessian-vector product is not finite after {step} Lanczos steps. Remedy: "
                "dtype float64, or a model whose loss and second derivatives are finite."
            )
        size = max(size, float(rest.norm()))
        diagonal.append(float(basis[step] @ rest))
        for _ in range(2):
            rest = rest - basis[: step + 1].T @ (basis[: step + 1] @ rest)
        norm = float(rest.norm())
        if norm <= _NEGLIGIBLE * torch.finfo(start.dtype).eps * size:
            break
        if step + 1 < steps:
            beside.append(norm)
            basis[step + 1] = rest / norm
    return np.array(diagonal), np.array(beside)
