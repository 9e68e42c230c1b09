"""Module, loss and batches -> the spectra of its blocks and their distances.

Imports torch, numpy, ``config``, ``standalone`` and the modules before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from megatron_adam_mini.config import AdamMiniConfig
from megatron_adam_mini.heterogeneity.distance import Axis, average, distances, log_axis
from megatron_adam_mini.heterogeneity.lanczos import FloatArray, Spectrum, spectrum
from megatron_adam_mini.heterogeneity.parts import Part, parts_of
from megatron_adam_mini.heterogeneity.products import BlockHessian, Loss
from megatron_adam_mini.standalone.blocks import Heads

DTYPES = {"float32": torch.float32, "float64": torch.float64}

#: Standard deviation of the Gaussians in the authors' published code, which is 1e-5 ** 0.5.
LINEAR_WIDTH = 1e-5**0.5


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to measure.

    Args:
        config: its preset and rules make the blocks; one per tensor unless given.
        heads: of the module, for rules that need them.
        patterns, vectors, blocks_per_parameter: see :func:`parts.parts_of`.
        steps: Lanczos steps, which are Hessian-vector products, of each probe.
        probes: random vectors for each block, an even number.
        floor: of the logarithmic axis, relative to the largest eigenvalue of all blocks.
        width: of the smoothing on it, in decades.
        seed: of probes and drawn blocks.
        dtype: ``float32`` or ``float64``: of parameters, batches and vectors.
        device: where all of it happens.

    Raises:
        ValueError: a value is not allowed.
    """

    config: AdamMiniConfig = field(default_factory=lambda: AdamMiniConfig(preset="tensor"))
    heads: Heads = field(default_factory=Heads)
    patterns: tuple[str, ...] = ("*",)
    vectors: bool = False
    blocks_per_parameter: int = 4
    steps: int = 30
    probes: int = 4
    floor: float = 1e-6
    width: float = 0.5
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Check every value."""
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is not known; allowed: {', '.join(DTYPES)}.")
        for name in ("steps", "blocks_per_parameter"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed; it must be >= 1.")
        if self.probes < 2 or self.probes % 2:
            raise ValueError(
                f"probes={self.probes} is not allowed; it must be an even number, so that one half "
                "can be compared with the other."
            )
        for name in ("floor", "width"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed; it must be > 0.")


@dataclass(frozen=True, eq=False)
class Measurement:
    """What was found.

    Attributes:
        names: of the blocks.
        numels: their elements.
        halves: for each block, the spectra from the first and from the second half of the probes.
        options: how it was measured.
    """

    names: tuple[str, ...]
    numels: tuple[int, ...]
    halves: tuple[tuple[Spectrum, Spectrum], ...]
    options: Options

    @property
    def spectra(self) -> list[Spectrum]:
        """The spectrum of each block."""
        return [
            Spectrum(
                np.concatenate([half.nodes for half in both]),
                np.concatenate([half.weights for half in both]) / 2,
            )
            for both in self.halves
        ]

    @property
    def axis(self) -> Axis:
        """The logarithmic axis of these spectra."""
        return log_axis(self.spectra, floor=self.options.floor, width=self.options.width)

    def distances(self, axis: Axis | None = None) -> FloatArray:
        """Return the divergence of each pair of blocks, on the logarithmic axis or another."""
        return distances(self.spectra, axis or self.axis)

    def js0(self, axis: Axis | None = None) -> float:
        """Return the mean divergence over pairs of blocks, in nats."""
        return average(self.distances(axis))

    def noise(self, axis: Axis | None = None) -> float:
        """Return the mean divergence of two estimates of one block, each of half the probes.

        What :meth:`js0` would be about, or a little less, if all blocks were alike.
        """
        chosen = axis or self.axis
        return float(np.mean([distances(both, chosen)[0, 1] for both in self.halves]))

    @property
    def largest(self) -> list[float]:
        """The largest magnitude of an eigenvalue of each block."""
        return [max(map(abs, spectrum.range)) for spectrum in self.spectra]


def measure(
    module: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    options: Options | None = None,
    *,
    progress: bool = False,
) -> Measurement:
    """Measure the spectra of a module's blocks, one block after the other.

    Memory: parameters, one graph of the gradient by one parameter, and ``steps + 2`` vectors of the
    size of a block.

    Args:
        module: its parameters are moved to the device and dtype (in place); it stays in the mode
            that it is in, so call ``eval()`` first if it has dropout.
        loss: ``loss(module, batch)`` -> scalar.
        batches: tensors, or lists, tuples and dicts of them; the Hessian is that of the mean loss.
        options: how; ``None``: the defaults.
        progress: show a bar on standard error.

    Raises:
        ValueError: there are no batches, the loss is no finite scalar, or is not the same twice.
    """
    chosen = options or Options()
    device, dtype = torch.device(chosen.device), DTYPES[chosen.dtype]
    module.to(device, dtype)
    moved = [_moved(batch, device, dtype) for batch in batches]
    _check_loss(module, loss, moved)
    parts = parts_of(
        module,
        chosen.config,
        chosen.heads,
        patterns=chosen.patterns,
        vectors=chosen.vectors,
        blocks_per_parameter=chosen.blocks_per_parameter,
        seed=chosen.seed,
    )
    bar = tqdm(parts, desc="spectra", unit="block", disable=not progress)
    halves = tuple(
        _halves(part, number, BlockHessian(part, module, loss, moved), chosen)
        for number, part in enumerate(bar)
    )
    return Measurement(
        tuple(part.name for part in parts), tuple(part.numel for part in parts), halves, chosen
    )


def _halves(
    part: Part, number: int, product: BlockHessian, options: Options
) -> tuple[Spectrum, Spectrum]:
    generator = torch.Generator().manual_seed(options.seed + 1_000_003 * number)
    first, second = (
        spectrum(
            product,
            part.numel,
            steps=options.steps,
            probes=options.probes // 2,
            generator=generator,
            dtype=DTYPES[options.dtype],
            device=part.param.device,
        )
        for _ in range(2)
    )
    return first, second


def _check_loss(module: nn.Module, loss: Loss, batches: Sequence[Any]) -> None:
    if not batches:
        raise ValueError("There are no batches; give one at least, whose loss has a Hessian.")
    with torch.no_grad():
        first, second = (loss(module, batches[0]) for _ in range(2))
    if first.numel() != 1 or not torch.isfinite(first).all():
        raise ValueError(
            f"The loss is {first}; it must be one finite number, the mean over the batch."
        )
    if not torch.equal(first, second):
        raise ValueError(
            f"The loss of one batch is {float(first)}, then {float(second)}: something in the "
            "model is random, and products with its Hessian would not belong together. Remedy: "
            "module.eval(), or no dropout."
        )


def _moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a batch on a device, its floating-point tensors in a dtype."""
    if isinstance(value, Tensor):
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device, dtype) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_moved(item, device, dtype) for item in value)
    return value
