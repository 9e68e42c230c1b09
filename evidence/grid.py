"""Which runs answer which question, and in which order.

Imports ``settings``. Stages:

* *tuned*: for each setting (size, length, corpus) and optimizer, all rates of the grid with the
  first seed; then all seeds at the best rate, and at AdamW's best rate.
* *map*: rates x warm-ups, to see where training is stable.
* *ablation*: one change of rules, beta2 or warm-up at a time.
* *storage*: Adam-mini with bfloat16 weights and its state in fewer bits; see ``storage``.
* *twin*: the same runs in plain PyTorch and through Megatron; see ``twin``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evidence.settings import OPTIMIZERS, STORAGES, Run

#: What the log has found.
Results = Mapping[Run, dict[str, Any]]

#: Without presets that are coarser than the paper's.
_COMPARED = tuple(name for name in OPTIMIZERS if name not in ("first", "tensor"))

#: Storage that gives another training than float32 state, and that which does not.
_PAIRS = {
    "float32": "remainders",
    "bf16 m, stochastic": "lean",
    "fp8 m": "fp8 m, remainders",
}
STORED_OTHERWISE = tuple(name for name in STORAGES if name not in _PAIRS.values())
SAME_BITS = tuple(name for pair in _PAIRS.items() for name in pair)

#: Kind of parameter -> patterns of its names in ``model.Llama``.
KINDS = {
    "embedding": ("embed_tokens.weight",),
    "output": ("lm_head.weight",),
    "Query": ("*q_proj.weight",),
    "Key": ("*k_proj.weight",),
    "Value": ("*v_proj.weight",),
    "attention projection": ("*o_proj.weight",),
    "MLP": ("*gate_proj.weight", "*up_proj.weight", "*down_proj.weight"),
    "norms": ("*norm.weight",),
}


@dataclass(frozen=True)
class Setting:
    """What optimizers are compared on, each with the same rates to choose from.

    Attributes:
        size, corpus, steps: see ``settings.Run``.
        rates: the grid.
    """

    size: str
    steps: int
    rates: tuple[float, ...]
    corpus: str = "source"

    @property
    def name(self) -> str:
        """Short and unique."""
        corpus = "" if self.corpus == "source" else f", {Path(self.corpus).stem}"
        return f"{self.size}, {self.steps} steps{corpus}"


@dataclass(frozen=True)
class Map:
    """A stability map: every rate with every warm-up, and the seeds of each."""

    size: str
    steps: int
    rates: tuple[float, ...]
    warmups: tuple[int, ...]
    seeds: tuple[int, ...] = (0, 1)

    def runs(self, plan: Plan, optimizer: str, lr: float, warmup: int) -> list[Run]:
        """Return the runs of one cell."""
        setting = Setting(self.size, self.steps, self.rates)
        runs = (plan.run(setting, optimizer, lr, seed) for seed in self.seeds)
        return [replace(run, warmup=warmup) for run in runs]


@dataclass(frozen=True)
class Ablation:
    """Where changes of Adam-mini are tried, one at a time."""

    size: str
    steps: int
    lr: float


@dataclass(frozen=True)
class Twin:
    """What is trained by both paths of the product."""

    size: str
    steps: int
    lr: float
    optimizers: tuple[str, ...] = ("adamw", "paper", "row")


@dataclass(frozen=True)
class Storage:
    """Where ways to store the state are compared, at a rate that was found in stage *tuned*.

    Attributes:
        size, steps, lr, optimizer: of all runs.
        ways: keys of ``settings.STORAGES``, all compared with the first.
        seeds: of each.
    """

    size: str
    steps: int
    lr: float
    ways: tuple[str, ...] = STORED_OTHERWISE
    seeds: tuple[int, ...] = (0, 1, 2)
    optimizer: str = "row"

    @property
    def name(self) -> str:
        """Short and unique."""
        return f"{self.size}, {self.steps} steps"

    def run(self, plan: Plan, way: str, seed: int) -> Run:
        """Return one run."""
        setting = Setting(self.size, self.steps, ())
        return replace(plan.run(setting, self.optimizer, self.lr, seed), storage=way)


@dataclass(frozen=True)
class Plan:
    """All that is asked.

    Attributes:
        settings: of the stage *tuned*, the most important one first.
        optimizers: of the stages *tuned* and *map*.
        seeds: the first one tunes.
        warmup: share of a run; not of the map's.
        map, ablation, twin: ``None``: left out.
        storage: the most important one first.
        device: see ``settings.Run``.
    """

    settings: tuple[Setting, ...]
    optimizers: tuple[str, ...] = _COMPARED
    seeds: tuple[int, ...] = (0, 1, 2)
    warmup: float = 0.1
    map: Map | None = None
    ablation: Ablation | None = None
    twin: Twin | None = None
    storage: tuple[Storage, ...] = ()
    device: str = "cpu"

    def run(self, setting: Setting, optimizer: str, lr: float, seed: int) -> Run:
        """Return one run of a setting."""
        return Run(
            optimizer=optimizer,
            size=setting.size,
            corpus=setting.corpus,
            lr=lr,
            warmup=round(setting.steps * self.warmup),
            steps=setting.steps,
            seed=seed,
            device=self.device,
        )


_RATES = (1e-3, 2e-3, 4e-3, 8e-3)
_RATES_SMALL = (2e-3, 4e-3, 8e-3, 16e-3)
_CPU = Plan(
    settings=(
        Setting("0.04M", 800, _RATES_SMALL),
        Setting("0.13M", 800, _RATES),
        Setting("0.38M", 800, _RATES),
        Setting("0.85M", 800, _RATES[:3]),
        Setting("0.04M", 200, _RATES_SMALL),
        Setting("0.04M", 3200, _RATES_SMALL),
        Setting("0.13M", 800, _RATES, "docstrings"),
    ),
    map=Map("0.04M", 200, (2e-3, 4e-3, 8e-3, 16e-3, 32e-3), (0, 10, 40)),
    ablation=Ablation("0.13M", 800, 2e-3),
    twin=Twin("0.13M", 800, 4e-3),
    storage=(
        Storage("0.13M", 800, 4e-3, seeds=tuple(range(6))),
        Storage("0.04M", 200, 4e-3, SAME_BITS, (0,)),
        Storage("0.13M", 2000, 4e-3, seeds=(0,)),
        Storage("0.04M", 800, 16e-3, seeds=tuple(range(6))),
    ),
)
_RATES_LARGE = (2.5e-4, 5e-4, 1e-3, 2e-3)
PLANS = {
    "cpu": _CPU,
    # 20 tokens per parameter of the paper's vocabulary, and its warm-up of 1 %.
    "paper": replace(
        _CPU,
        settings=(
            Setting("39M", 7800, _RATES_LARGE),
            Setting("67M", 13400, _RATES_LARGE),
        ),
        warmup=0.01,
        map=None,
        ablation=None,
        twin=None,
        storage=(),
    ),
    "gpu": replace(
        _CPU,
        settings=(Setting("0.85M", 16000, _RATES), Setting("5M", 3200, _RATES_LARGE)),
        map=None,
        ablation=None,
        twin=None,
        storage=(),
    ),
    # What examples/demo.py shows: the best rate of both in the plan `cpu`.
    "demo": Plan(settings=(Setting("0.13M", 800, (4e-3,)),), optimizers=("adamw", "row")),
    "toy": Plan(
        settings=(Setting("toy", 8, (1e-3, 1e-2)), Setting("toy", 16, (1e-3, 1e-2))),
        seeds=(0, 1),
        map=Map("toy", 4, (1e-3, 1e-2), (0, 2)),
        ablation=Ablation("toy", 4, 1e-2),
        storage=(Storage("toy", 8, 1e-2, seeds=(0, 1)), Storage("toy", 4, 1e-2, SAME_BITS, (0,))),
    ),
}


def pending(plan: Plan, results: Results) -> list[Run]:
    """Return the runs that are not done yet and can be, the most important one first.

    Args:
        plan: what is asked.
        results: what is done. Seeds of a setting follow once its rates are.
    """
    stages = (
        *(_tuned(plan, results), _twins(plan), _map(plan), _ablation(plan)),
        _storage(plan),
    )
    wanted = dict.fromkeys(run for stage in stages for run in stage)
    return [run for run in wanted if run not in results]


def best_rate(plan: Plan, setting: Setting, optimizer: str, results: Results) -> float | None:
    """Return the rate of the lowest final loss of the first seed; ``None``: not all are done."""
    runs = [plan.run(setting, optimizer, lr, plan.seeds[0]) for lr in setting.rates]
    if any(run not in results for run in runs):
        return None
    return min(runs, key=lambda run: final_loss(run, results[run])).lr


def final_loss(run: Run, result: Mapping[str, Any]) -> float:
    """Return the validation loss at the end of a run; infinity if it diverged."""
    return float(result["validation"].get(str(run.steps), math.inf))


def _tuned(plan: Plan, results: Results) -> Iterator[Run]:
    for setting in plan.settings:
        for optimizer in plan.optimizers:
            for lr in setting.rates:
                yield plan.run(setting, optimizer, lr, plan.seeds[0])
        adamw = best_rate(plan, setting, "adamw", results)
        for shared in (False, True):  # the tuned rates first
            for optimizer in plan.optimizers:
                lr = adamw if shared else best_rate(plan, setting, optimizer, results)
                if lr is not None:
                    yield from (plan.run(setting, optimizer, lr, seed) for seed in plan.seeds)


def _map(plan: Plan) -> Iterator[Run]:
    if plan.map is None:
        return
    for optimizer in plan.optimizers:
        for warmup in plan.map.warmups:
            for lr in plan.map.rates:
                yield from plan.map.runs(plan, optimizer, lr, warmup)


def ablations(plan: Plan) -> dict[str, Run]:
    """Return what is changed -> the run with the first seed; the first two change nothing."""
    assert plan.ablation is not None
    setting = Setting(plan.ablation.size, plan.ablation.steps, ())
    adamw = plan.run(setting, "adamw", plan.ablation.lr, plan.seeds[0])
    paper = replace(adamw, optimizer="paper")

    def by_rule(rule: str, *kinds: str) -> Run:
        return replace(paper, rules=tuple((name, rule) for kind in kinds for name in KINDS[kind]))

    short = round(plan.ablation.steps * 0.0125)
    changes = {
        "AdamW": adamw,
        "Adam-mini (paper)": paper,
        **{f"full v: {kind}": by_rule("element", kind) for kind in KINDS},
        **{
            f"the preset {name}": replace(paper, optimizer=name)
            for name in plan.optimizers
            if name not in ("adamw", "paper")
        },
        "Value as one block": replace(paper, value_as_block=True),
    }
    for name, value in (("beta2 0.99", {"beta2": 0.99}), (f"warm-up {short}", {"warmup": short})):
        changes[f"AdamW, {name}"] = replace(adamw, **value)
        changes[f"Adam-mini (paper), {name}"] = replace(paper, **value)
    return changes


def twins(plan: Plan) -> dict[str, tuple[Run, Run]]:
    """Return optimizer -> its run in plain PyTorch, and the same by Megatron."""
    assert plan.twin is not None
    setting = Setting(plan.twin.size, plan.twin.steps, ())
    runs = [plan.run(setting, name, plan.twin.lr, plan.seeds[0]) for name in plan.twin.optimizers]
    return {run.optimizer: (run, replace(run, trainer="megatron")) for run in runs}


def _twins(plan: Plan) -> Iterator[Run]:
    if plan.twin is not None:
        for pair in twins(plan).values():
            yield from pair


def _ablation(plan: Plan) -> Iterator[Run]:
    if plan.ablation is None:
        return
    for run in ablations(plan).values():
        yield from (replace(run, seed=seed) for seed in plan.seeds)


def _storage(plan: Plan) -> Iterator[Run]:
    for test in plan.storage:
        for seed in test.seeds:
            yield from (test.run(plan, way, seed) for way in test.ways)
