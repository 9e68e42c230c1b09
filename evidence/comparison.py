"""Runs of a log -> losses of seeds, and gaps between optimizers with their intervals.

Imports ``settings`` and ``grid``. A *gap* is the final validation loss of one optimizer minus that
of another with the same initial weights and batches, so that what seeds have in common drops out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from evidence.grid import (
    Plan,
    Results,
    Setting,
    Storage,
    ablations,
    best_rate,
    final_loss,
    twins,
)
from evidence.settings import Run

#: What a log keeps of a run.
Result = Mapping[str, Any]

#: 0.975 quantiles of Student's t distribution by degrees of freedom.
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Gap:
    """The mean of paired differences, positive where the first optimizer is worse.

    Attributes:
        mean: in nats per token; not finite if a run diverged.
        half_width: of the 95 % confidence interval by the t distribution; infinite with one seed.
        values: of each seed.
    """

    mean: float
    half_width: float
    values: tuple[float, ...]

    @property
    def verdict(self) -> str:
        """``worse``, ``better``, or that the interval holds 0."""
        if not math.isfinite(self.mean):
            return "diverged"
        if self.mean - self.half_width > 0:
            return "worse"
        return "better" if self.mean + self.half_width < 0 else "not told apart"


@dataclass(frozen=True)
class Comparison:
    """One optimizer at one rate in one setting, beside AdamW.

    Attributes:
        optimizer, lr: what was trained.
        losses: final validation loss of each seed.
        gap: to AdamW at the rate of the comparison; ``None`` for AdamW itself.
        second_moments: numbers in v.
        at_edge: the rate is the lowest or highest of the grid, so a better one may lie outside.
    """

    optimizer: str
    lr: float
    losses: tuple[float, ...]
    gap: Gap | None
    second_moments: int
    at_edge: bool

    @property
    def mean(self) -> float:
        """Mean loss of the seeds."""
        return statistics.fmean(self.losses)

    @property
    def spread(self) -> float:
        """Standard deviation of the losses of the seeds."""
        return statistics.stdev(self.losses) if len(self.losses) > 1 else math.nan


def paired_gap(losses: Sequence[float], others: Sequence[float]) -> Gap:
    """Return how far ``losses`` lie above ``others``, seed by seed."""
    values = tuple(loss - other for loss, other in zip(losses, others, strict=True))
    mean = statistics.fmean(values)
    half_width = math.inf
    if len(values) > 1 and math.isfinite(mean):
        half_width = _T[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return Gap(mean, half_width, values)


def tuned(plan: Plan, setting: Setting, results: Results) -> list[Comparison]:
    """Compare each optimizer at its own best rate; those with missing runs are left out."""
    rates = {one: best_rate(plan, setting, one, results) for one in plan.optimizers}
    return _compare(plan, setting, rates, results)


def at_equal_rate(plan: Plan, setting: Setting, results: Results) -> list[Comparison]:
    """Compare all optimizers at AdamW's best rate; those with missing runs are left out."""
    lr = best_rate(plan, setting, "adamw", results)
    return _compare(plan, setting, dict.fromkeys(plan.optimizers, lr), results)


def gaps_during(plan: Plan, setting: Setting, results: Results) -> dict[str, dict[int, Gap]]:
    """Return optimizer -> step -> gap to AdamW at that step, each at its own best rate."""
    losses: dict[str, dict[int, tuple[float, ...]]] = {}
    for entry in tuned(plan, setting, results):
        runs = [plan.run(setting, entry.optimizer, entry.lr, seed) for seed in plan.seeds]
        seeds = [results[run]["validation"] for run in runs]
        steps = (step for step in seeds[0] if all(step in seed for seed in seeds))
        losses[entry.optimizer] = {int(s): tuple(seed[s] for seed in seeds) for s in steps}
    adamw = losses.pop("adamw", {})
    return {
        name: {step: paired_gap(values[step], adamw[step]) for step in values if step in adamw}
        for name, values in losses.items()
    }


def _compare(
    plan: Plan, setting: Setting, rates: dict[str, float | None], results: Results
) -> list[Comparison]:
    found: list[Comparison] = []
    adamw: tuple[float, ...] | None = None
    for optimizer, lr in rates.items():
        if lr is None:
            continue
        runs = [plan.run(setting, optimizer, lr, seed) for seed in plan.seeds]
        losses = losses_of(runs, results)
        if losses is None:
            continue
        adamw = losses if optimizer == "adamw" else adamw
        gap = paired_gap(losses, adamw) if adamw and optimizer != "adamw" else None
        second_moments = results[runs[0]]["second_moments"]
        edges = (min(setting.rates), max(setting.rates)) if len(setting.rates) > 1 else ()
        found.append(Comparison(optimizer, lr, losses, gap, second_moments, lr in edges))
    return found


def losses_of(runs: Sequence[Run], results: Results) -> tuple[float, ...] | None:
    """Return the final losses of runs, ``None`` if one is missing."""
    if any(run not in results for run in runs):
        return None
    return tuple(final_loss(run, results[run]) for run in runs)


def stability_map(plan: Plan, optimizer: str, results: Results) -> list[list[float]] | None:
    """Return mean final losses, a list of rates for each warm-up; ``None``: a run is missing."""
    assert plan.map is not None
    rows = []
    for warmup in plan.map.warmups:
        row = []
        for lr in plan.map.rates:
            runs = plan.map.runs(plan, optimizer, lr, warmup)
            losses = losses_of(runs, results)
            if losses is None:
                return None
            row.append(statistics.fmean(losses))
        rows.append(row)
    return rows


@dataclass(frozen=True)
class TwinRuns:
    """The same run in plain PyTorch and by Megatron.

    Attributes:
        optimizer: of both.
        torch, megatron: final validation loss.
        difference: the largest one between points of the two curves of training losses.
        points: how many these are.
    """

    optimizer: str
    torch: float
    megatron: float
    difference: float
    points: int


def twin_runs(plan: Plan, results: Results) -> list[TwinRuns]:
    """Return the pairs that are complete."""
    found = []
    for name, pair in twins(plan).items() if plan.twin else ():
        losses = losses_of(pair, results)
        if losses is not None:
            points = list(zip(*(results[run]["training"] for run in pair), strict=True))
            difference = max(abs(one - other) for one, other in points)
            found.append(TwinRuns(name, *losses, difference, len(points)))
    return found


@dataclass(frozen=True)
class Change:
    """One line of the ablation.

    Attributes:
        name: what was changed.
        losses: of the seeds.
        to_adamw: gap to AdamW with the same beta2 and warm-up; ``None`` for AdamW.
        to_paper: gap to the unchanged Adam-mini; ``None`` for AdamW and for itself.
    """

    name: str
    losses: tuple[float, ...]
    to_adamw: Gap | None
    to_paper: Gap | None


def ablation(plan: Plan, results: Results) -> list[Change]:
    """Return the lines of the ablation that are complete."""
    if plan.ablation is None:
        return []

    def of(run: Run) -> tuple[float, ...] | None:
        return losses_of([replace(run, seed=seed) for seed in plan.seeds], results)

    changes = ablations(plan)
    paper = of(changes["Adam-mini (paper)"])
    found = []
    for name, run in changes.items():
        losses = of(run)
        adamw = of(replace(run, optimizer="adamw", rules=(), value_as_block=False))
        if losses is None or adamw is None or paper is None:
            continue
        to_adamw = paired_gap(losses, adamw) if run.optimizer != "adamw" else None
        to_paper = paired_gap(losses, paper) if to_adamw and losses != paper else None
        found.append(Change(name, losses, to_adamw, to_paper))
    return found


@dataclass(frozen=True)
class Stored:
    """One way to store the state, beside the first of its test.

    Attributes:
        way: key of ``settings.STORAGES``.
        losses: final validation loss of each seed.
        gap: to the first way; ``None`` for itself.
        norms: what is watched -> its ratio to that of the first way in each quarter of the run,
            mean over seeds.
        same_bits: whether state and losses of all seeds are those of the first way.
    """

    way: str
    losses: tuple[float, ...]
    gap: Gap | None
    norms: dict[str, list[float]]
    same_bits: bool


def stored(plan: Plan, test: Storage, results: Results) -> list[Stored]:
    """Compare the ways of a test whose runs are complete; none, if the first is not."""
    runs = {way: [test.run(plan, way, seed) for seed in test.seeds] for way in test.ways}
    losses = {way: losses_of(of_way, results) for way, of_way in runs.items()}
    first, base = runs[test.ways[0]], losses[test.ways[0]]
    if base is None:
        return []
    return [
        Stored(
            way,
            own,
            paired_gap(own, base) if way != test.ways[0] else None,
            _ratios([results[run] for run in runs[way]], [results[run] for run in first]),
            all(
                results[run][key] == results[other][key]
                for run, other in zip(runs[way], first, strict=True)
                for key in ("state", "training", "validation")
            ),
        )
        for way, own in losses.items()
        if own is not None
    ]


def _ratios(found: Sequence[Result], others: Sequence[Result]) -> dict[str, list[float]]:
    """Return the mean ratios of norms, for each quarter of the run."""
    ratios = {}
    for name in found[0]["norms"]:
        pairs = [
            [one / other for one, other in zip(a["norms"][name], b["norms"][name], strict=True)]
            for a, b in zip(found, others, strict=True)
        ]
        points = len(pairs[0])
        cuts = [round(part * points / 4) for part in range(5)]
        ratios[name] = [
            statistics.fmean(value for of_seed in pairs for value in of_seed[low:high])
            for low, high in pairwise(cuts)
        ]
    return ratios
