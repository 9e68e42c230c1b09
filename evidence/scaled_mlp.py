"""An MLP whose layers are scaled apart: the same function, with blocks as unlike as one wants.

Imports torch, numpy, ``networks`` and the package. Layer l computes ``c_l W_l x``, and W_l starts
as ``c_l^-1`` times the usual weights, so that every degree starts from the same function, while the
Hessian of layer l is ``c_l^2`` times what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from evidence.networks import CLASSES, classify, pictures
from megatron_adam_mini import AdamMini
from megatron_adam_mini.heterogeneity.measurement import Measurement, Options, measure

WIDTHS = (768, 32, 32, 32, CLASSES)
#: Powers of ten of the layers' factors, in multiples of the degree; their sum is zero.
EXPONENTS = (-1.0, 1.0, -1.0, 1.0)
DEGREES = (0.0, 0.5, 1.0, 1.5)
#: Two rates per decade.
RATES = tuple(float(rate) for rate in 10 ** (np.arange(-8, 2) / 2))
STEPS = 50
SEEDS = 2
BETAS = (0.9, 0.99)


class ScaledMLP(nn.Module):
    """Four linear layers without biases, ReLU between them.

    Args:
        degree: of heterogeneity: the factors are 10 to the degree, and to minus the degree.
    """

    def __init__(self, degree: float) -> None:
        super().__init__()
        self.factors = [10 ** (degree * exponent) for exponent in EXPONENTS]
        self.layers = nn.ModuleList(
            nn.Linear(inside, outside, bias=False) for inside, outside in pairwise(WIDTHS)
        )
        with torch.no_grad():
            for layer, factor in zip(self.layers, self.factors, strict=True):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                layer.weight /= factor

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of pictures."""
        x = x.flatten(1)
        for number, (layer, factor) in enumerate(zip(self.layers, self.factors, strict=True)):
            x = factor * layer(functional.relu(x) if number else x)
        return x


def _sgd(module: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=lr, momentum=BETAS[0])


def _adam(module: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(module.parameters(), lr=lr, betas=BETAS)


def _adam_mini(module: nn.Module, lr: float) -> torch.optim.Optimizer:
    """One second moment for each row, as the paper's partition has it for an MLP."""
    return AdamMini(
        module.named_parameters(), lr=lr, betas=BETAS, weight_decay=0.0, rules={"*": "row"}
    )


METHODS: dict[str, Callable[[nn.Module, float], torch.optim.Optimizer]] = {
    "SGD with momentum": _sgd,
    "Adam": _adam,
    "Adam-mini": _adam_mini,
}


class Trained(NamedTuple):
    """A method at one degree.

    Attributes:
        losses: of the last step, one for each seed, at the best rate.
        rates: that.
    """

    losses: tuple[float, ...]
    rates: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean of the losses."""
        return float(np.mean(self.losses))


def train(degree: float, name: str, rate: float, steps: int, seed: int) -> float:
    """Return the last loss of a training on 256 pictures at once; infinite if it is lost."""
    torch.manual_seed(seed)
    module, batch = ScaledMLP(degree), _batch(seed)
    optimizer = METHODS[name](module, rate)
    loss = classify(module, batch)
    for _ in range(steps):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss = classify(module, batch)
        if not torch.isfinite(loss) or loss > 100:
            return np.inf
    return float(loss.detach())


def _batch(seed: int) -> tuple[Tensor, Tensor]:
    """Return pictures with classes of which a fifth are wrong, so that there is much to learn."""
    inputs, classes = pictures(256, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    wrong = torch.rand(len(classes), generator=generator) < 0.2
    other = torch.randint(CLASSES, classes.shape, generator=generator)
    return inputs, torch.where(wrong, other, classes)


def tuned(
    degree: float,
    name: str,
    *,
    rates: Sequence[float] = RATES,
    steps: int = STEPS,
    seeds: int = SEEDS,
) -> Trained:
    """Return a method's losses at its best rate."""
    losses, best = [], []
    for seed in range(seeds):
        tried = [train(degree, name, rate, steps, seed) for rate in rates]
        losses.append(min(tried))
        best.append(rates[int(np.argmin(tried))])
    return Trained(tuple(losses), tuple(best))


def heterogeneity(degree: float, **changes: Any) -> Measurement:
    """Return the spectra of the four layers at the start."""
    torch.manual_seed(0)
    return measure(ScaledMLP(degree), classify, [_batch(0)], Options(**{"steps": 15, **changes}))
