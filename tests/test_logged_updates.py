"""Logged sizes of updates and ranges of v: those of whole tensors, whatever the layout.

The true ones come from main parameters before and after a step, put together from all ranks, and
from v put together likewise.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import megatron_adam_mini
from tests.gather import slices_of, whole_tensors
from tests.megatron_job import Job, Trainer
from tests.ranks import RankError, run_ranks
from tests.test_oracle import decay_of

BASE = Job(layers=2, hidden=32, ffn=48, vocab=64, batch=16, steps=3, lr=1e-2)
BF16 = replace(BASE, bf16=True)
HALF = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5}
REMAINDERS = {"param_remainders": True, "exp_avg_dtype": "bf16"}
LAYOUTS = {
    "tp2-dp2, overlap": (replace(BASE, tp=2, overlap=True, bucket_size=3000), 4),
    "tp2-pp2, tied, biases": (replace(BASE, tp=2, pp=2, tied=True, bias=True), 4),
    "ep2-tp2, experts on two stages": (
        replace(BF16, tp=2, pp=2, ep=2, etp=1, experts=4, layers=2),
        4,
    ),
    "two instances, full v": (replace(BASE, instances=2, adam_mini={"full_v": ["*fc2*"]}), 4),
    "replicated, tp2": (replace(BASE, tp=2, distributed_optimizer=False), 4),
    "remainders, bf16 m": (replace(BF16, adam_mini=REMAINDERS), 2),
    "state on the host": (replace(BF16, optimizer_args=HALF), 2),
    "single phase": (replace(BASE, clip_grad=0.0, adam_mini={"single_phase": True}), 2),
}
# Differences of float32 parameters of 0.05 to 1 by steps of about 1e-2.
RATIO_TOLERANCE = 2e-5
# The same, and m was rounded to 8 bits after it was used.
BF16_TOLERANCE = 2**-9

ROLES = {
    "word_embeddings.weight": "embedding",
    "output_layer.weight": "output",
    "linear_qkv.weight": "qkv",
    "linear_proj.weight": "attention_projection",
    "router.weight": "router",
    "norm.weight": "norm",
    "bias": "bias",
    "fc1.weight": "mlp",
    "fc2.weight": "mlp",
}


def role_of(name: str) -> str:
    """Return the kind of a parameter, written apart from the package."""
    (role,) = {role for suffix, role in ROLES.items() if name.endswith(suffix)}
    return f"expert_{role}" if ".experts." in name else role


def trained(job: Job) -> dict[str, Any]:
    """Return what is logged after some steps, and what the last one changed."""
    trainer = Trainer(job)
    before = slices_of(trainer)
    assert len(megatron_adam_mini.metrics_of(trainer.optimizer, updates=True)) == len(
        megatron_adam_mini.metrics_of(trainer.optimizer)
    ), "there was no step"
    for step in range(job.steps):
        before = slices_of(trainer)
        updated, _, _ = trainer.step(step)
        assert updated
        for group in trainer.optimizer.param_groups:  # as a scheduler does before the loop logs
            group["lr"] *= 0.5
    found = {
        "before": before,
        "after": slices_of(trainer),
        "logged": megatron_adam_mini.metrics_of(trainer.optimizer, updates=True),
    }
    if not job.adam_mini.get("single_phase"):
        trainer.backward(job.steps)
        for buffer in trainer.optimizer.inner.buffers:
            buffer.grad.fill_(math.inf)
        assert trainer.optimizer.step()[0] is False
        found["skipped"] = megatron_adam_mini.metrics_of(trainer.optimizer, updates=True)
    return found


def true_updates(ranks: list[dict[str, Any]], job: Job) -> dict[str, float]:
    """Return what should be logged, from whole tensors in float64."""
    before = whole_tensors([rank["before"] for rank in ranks], "param", job)
    after = whole_tensors([rank["after"] for rank in ranks], "param", job)
    v = whole_tensors([rank["after"] for rank in ranks], "v", job)
    if job.tied:
        for whole in (before, after, v):
            whole.pop("output_layer.weight", None)
    lr = job.lr * 0.5 ** (job.steps - 1)
    by_role: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)
    for name, old in before.items():
        decayed = old.double() * (1 - lr * decay_of(tuple(old.shape), job))
        update = decayed - after[name].double()
        by_role[role_of(name)].append((update, after[name].double(), v[name]))
    found = {}
    for role, tensors in by_role.items():
        updates, params, moments = (
            torch.cat([t.reshape(-1) for t in ts]) for ts in zip(*tensors, strict=True)
        )
        found[f"adam-mini/update-to-weight/{role}"] = float(updates.norm() / params.norm())
        found[f"adam-mini/v-min/{role}"] = float(moments.min())
        found[f"adam-mini/v-max/{role}"] = float(moments.max())
    return found


@pytest.mark.support("what Megatron logs", "test")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_they_are_those_of_whole_tensors(layout: str) -> None:
    job, world = LAYOUTS[layout]
    ranks = run_ranks(world, trained, job)
    expected = true_updates(ranks, job)
    assert len(expected) >= 15
    is_rounded = job.adam_mini.get("exp_avg_dtype") == "bf16"
    tolerance = BF16_TOLERANCE if is_rounded else RATIO_TOLERANCE
    for rank in ranks:
        logged = {n: x for n, x in rank["logged"].items() if "added" not in n and "bytes" not in n}
        assert logged.keys() == expected.keys()
        for name, value in expected.items():
            exact = "/v-" in name
            assert logged[name] == (value if exact else pytest.approx(value, rel=tolerance)), name
        assert logged == {name: ranks[0]["logged"][name] for name in logged}, "on all ranks"
        if "skipped" in rank:
            assert rank["skipped"].keys() == rank["logged"].keys() - expected.keys()


class WandbDouble:
    """Keeps what is logged, by step."""

    def __init__(self) -> None:
        self.logged: dict[int, dict[str, float]] = {}

    def log(self, values: dict[str, float], step: int) -> None:
        assert step not in self.logged
        self.logged[step] = dict(values)


def loop_that_logs(job: Job, folder: str) -> dict[int, dict[str, float]]:
    """Train with writers on the last rank, as Megatron has them; return what reached wandb's."""
    from megatron import training
    from torch import distributed
    from torch.utils.tensorboard import SummaryWriter

    from megatron_adam_mini.mcore.metrics import wrap_training_log

    is_last = distributed.get_rank() == distributed.get_world_size() - 1
    writer, wandb = (SummaryWriter(folder), WandbDouble()) if is_last else (None, None)
    training.get_args = lambda: SimpleNamespace(tensorboard_log_interval=2)
    training.get_tensorboard_writer = lambda: writer
    training.get_wandb_writer = lambda: wandb
    training_log = wrap_training_log(lambda loss, iteration: None)
    trainer = Trainer(job)
    for step in range(job.steps):
        trainer.step(step)
        training_log({}, iteration=step + 1)
    if writer is None or wandb is None:
        return {}
    writer.close()
    return wandb.logged


def test_both_writers_get_them_at_their_intervals(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    job = replace(BASE, tp=2, steps=6, adam_mini={"log_updates_interval": 3})
    *others, wandb = run_ranks(4, loop_that_logs, job, str(tmp_path))
    assert others == [{}] * 3
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tensorboard: dict[int, dict[str, float]] = defaultdict(dict)
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            tensorboard[event.step][name] = event.value
    assert tensorboard.keys() == wandb.keys() == {2, 3, 4, 6}
    for step, values in wandb.items():
        assert tensorboard[step] == pytest.approx(values, rel=1e-6)
        assert any("update-to-weight" in name for name in values) == (step in (3, 6))
        assert any("state-bytes" in name for name in values) == (step in (2, 4, 6))


def one_interval_each() -> None:
    from torch import distributed

    Trainer(replace(BASE, adam_mini={"log_updates_interval": distributed.get_rank()}))


def test_ranks_that_would_not_measure_together_are_told() -> None:
    with pytest.raises(RankError, match="log_updates_interval"):
        run_ranks(2, one_interval_each)


def of_another_optimizer() -> None:
    megatron_adam_mini.metrics_of(torch.optim.SGD([torch.zeros(1)]))


def test_other_optimizers_have_no_such_metrics() -> None:
    with pytest.raises(RankError, match=r"TypeError.*optimizer='adam_mini', got SGD"):
        run_ranks(1, of_another_optimizer)
