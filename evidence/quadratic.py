"""Quadratic problems of blocks, and how far each method gets: the talk's, made runnable.

Imports torch, numpy and the package's ``AdamMini``. A problem is ``sum_b x_b . H_b x_b / 2``, one
parameter for each block b; methods see gradients only. Every method has the best rate of the same
grid by the loss at the end; blockwise gradient descent has the best one of each block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from megatron_adam_mini import AdamMini

#: The talk's eigenvalues by block; the mixture has the same, one of each kind in every block.
HETEROGENEOUS = ((1.0, 2.0, 3.0), (99.0, 100.0, 101.0), (1998.0, 1999.0, 2000.0))
HOMOGENEOUS = ((1.0, 99.0, 1998.0), (2.0, 100.0, 1999.0), (3.0, 101.0, 2000.0))
#: Three rates per decade.
RATES = tuple(float(rate) for rate in 10 ** (np.arange(-12, 1) / 3))
#: Without momentum, which gradient descent does not have either.
BETAS = (0.0, 0.99)
STEPS = 200
SEEDS = 3

Make = Callable[[nn.ParameterList, float], torch.optim.Optimizer]


class Run(NamedTuple):
    """A method on a problem.

    Attributes:
        losses: loss of each step by that of the start, shape ``(seeds, steps + 1)``.
        rates: the best rate of each seed; empty if there is nothing to tune.
    """

    losses: np.ndarray
    rates: tuple[float, ...]

    @property
    def last(self) -> float:
        """Median over seeds of the loss at the end, by that of the start."""
        return float(np.median(self.losses[:, -1]))


def rotated(eigenvalues: Sequence[float], amount: float, seed: int) -> Tensor:
    """Return a matrix with given eigenvalues, float64, shape ``(d, d)``.

    Args:
        eigenvalues: in the order of the diagonal when nothing is rotated.
        amount: 0: diagonal; 1 or more: eigenvectors in random directions, dense.
        seed: of the directions.
    """
    generator = torch.Generator().manual_seed(seed)
    size = len(eigenvalues)
    square = torch.randn(size, size, generator=generator, dtype=torch.float64)
    turn = torch.matrix_exp(amount * (square - square.T) / 2)
    diagonal = torch.tensor(eigenvalues, dtype=torch.float64)
    return (turn * diagonal) @ turn.T


def problem(blocks: Sequence[Sequence[float]], seed: int, amount: float = 1.0) -> list[Tensor]:
    """Return H_b of each block, float32, rotated each in its own way."""
    return [
        rotated(block, amount, 100 * seed + number).float() for number, block in enumerate(blocks)
    ]


def _sgd(params: nn.ParameterList, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr)


def _adam(params: nn.ParameterList, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=lr, betas=BETAS)


def _adam_mini(params: nn.ParameterList, lr: float) -> torch.optim.Optimizer:
    """One second moment for each tensor, which is a block: the paper's Algorithm 3."""
    return AdamMini(
        params.named_parameters(), lr=lr, betas=BETAS, weight_decay=0.0, rules={"*": "tensor"}
    )


METHODS: dict[str, Make] = {
    "gradient descent": _sgd,
    "Adam": _adam,
    "Adam-mini": _adam_mini,
}
BLOCKWISE = "blockwise gradient descent"


def start(hessians: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Return where a run starts: standard normal."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    return [torch.randn(len(hessian), generator=generator) for hessian in hessians]


def _loss(hessians: Sequence[Tensor], at: Sequence[Tensor]) -> float:
    return sum(float(x @ hessian @ x) / 2 for hessian, x in zip(hessians, at, strict=True))


def descend(
    hessians: Sequence[Tensor], make: Make, rate: float, steps: int, begin: Sequence[Tensor]
) -> np.ndarray:
    """Return the loss of each step by that of the start, shape ``(steps + 1,)``; inf if lost."""
    params = nn.ParameterList(x.clone() for x in begin)
    optimizer = make(params, rate)
    losses = []
    with torch.no_grad():
        for step in range(steps + 1):
            loss = 0.0
            for param, hessian in zip(params, hessians, strict=True):
                param.grad = hessian @ param
                loss += float(param @ param.grad) / 2
            losses.append(loss)
            if not loss <= 1e3 * losses[0]:
                return np.array(losses + [np.inf] * (steps - step)) / losses[0]
            optimizer.step()
    return np.array(losses) / losses[0]


def tuned(
    problems: Sequence[Sequence[Tensor]], name: str, steps: int, rates: Sequence[float]
) -> Run:
    """Return a method's runs at its best rate, one for each problem; its place is the seed."""
    losses, best = [], []
    for seed, hessians in enumerate(problems):
        tried = [
            descend(hessians, METHODS[name], rate, steps, start(hessians, seed)) for rate in rates
        ]
        least = int(np.argmin([run[-1] for run in tried]))
        losses.append(tried[least])
        best.append(rates[least])
    return Run(np.stack(losses), tuple(best))


def blockwise(problems: Sequence[Sequence[Tensor]], steps: int, rates: Sequence[float]) -> Run:
    """Return gradient descent with each block's best rate.

    Blocks do not know of each other, so each is tuned alone; besides the grid,
    ``2 / (least + largest eigenvalue)`` is tried, which no rate beats in the long run.
    """
    runs = []
    for seed, hessians in enumerate(problems):
        starts = start(hessians, seed)
        total = np.zeros(steps + 1)
        for hessian, begin in zip(hessians, starts, strict=True):
            ends = torch.linalg.eigvalsh(hessian.double())[[0, -1]]
            tried = [
                descend([hessian], _sgd, rate, steps, [begin])
                for rate in (*rates, 2 / float(ends.sum()))
            ]
            total += min(tried, key=lambda run: float(run[-1])) * _loss([hessian], [begin])
        runs.append(total / _loss(hessians, starts))
    return Run(np.stack(runs), ())


def compare(
    blocks: Sequence[Sequence[float]],
    *,
    amount: float = 1.0,
    seeds: int = SEEDS,
    steps: int = STEPS,
    rates: Sequence[float] = RATES,
) -> dict[str, Run]:
    """Return what every method makes of the same problems."""
    problems = [problem(blocks, seed, amount) for seed in range(seeds)]
    found = {name: tuned(problems, name, steps, rates) for name in METHODS}
    return found | {BLOCKWISE: blockwise(problems, steps, rates)}


# How much a diagonal preconditioner helps.


def tau(hessian: Tensor) -> float:
    """Return the share of the diagonal: ``sum_i |H_ii| / sum_ij |H_ij|``; 1: H is diagonal."""
    return float(hessian.diagonal().abs().sum() / hessian.abs().sum())


def ratio(hessian: Tensor, seed: int) -> float:
    """Return r = condition number of D H, by that of H.

    D is Adam's preconditioner at its first step, ``1 / |g|`` with g = H x and x from a standard
    normal distribution. Below 1, it helps; Adam-mini's is a number within a block, so its r is 1.
    """
    generator = torch.Generator().manual_seed(seed)
    gradient = hessian @ torch.randn(len(hessian), generator=generator, dtype=hessian.dtype)
    scale = gradient.abs().rsqrt()
    return condition(scale[:, None] * hessian * scale) / condition(hessian)


def condition(matrix: Tensor) -> float:
    """Return the condition number of a positive definite matrix."""
    values = torch.linalg.eigvalsh(matrix)
    return float(values[-1] / values[0])


def between(size: int, kappa: float, seed: int) -> list[float]:
    """Return eigenvalues from 1 to kappa, both included, with random logarithms between."""
    drawn = np.random.default_rng(seed).uniform(0, np.log10(kappa), size - 2)
    return [1.0, *(float(value) for value in 10**drawn), float(kappa)]


def ratios(
    size: int, kappa: float, amounts: Sequence[float], trials: int
) -> list[tuple[float, float]]:
    """Return the medians of tau and r over trials, for each amount of rotation."""
    found = []
    for amount in amounts:
        made = [rotated(between(size, kappa, seed), amount, seed) for seed in range(trials)]
        taus = [tau(hessian) for hessian in made]
        rs = [ratio(hessian, seed) for seed, hessian in enumerate(made)]
        found.append((float(np.median(taus)), float(np.median(rs))))
    return found
