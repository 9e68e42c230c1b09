"""``--overlap-param-gather-with-optimizer-step``: the first chunk's gather starts within the step.

Megatron makes two optimizers for it, one of the first model chunk and one of the others. Adam-mini
remains one: it updates the first chunk's buffers first, experts' included.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.megatron_job import Job, Trainer
from tests.ranks import RankError, run_ranks
from tests.test_step import digest, state_bits
from tests.training_run import OVERLAPPING_STAGES, Run, assert_same_state, make_dataset, train

EARLY = {"overlap_param_gather_with_optimizer_step": True}
JOB = Job(layers=4, pp=2, vpp=2, overlap=True, bucket_size=3000)


def run(job: Job) -> dict[str, Any]:
    """Take ordinary steps, a skipped one, and one with squares beyond float32."""
    from torch import distributed

    trainer = Trainer(job)
    begun = record_begin_of_gathers(trainer)
    bits = []
    for step in range(5):
        trainer.backward(step)
        grad = trainer.optimizer.inner.grad(trainer.optimizer.inner.plan.pieces[0])
        if step in (1, 3) and distributed.get_rank() == 1:
            grad[0] = float("inf") if step == 1 else 1e25
        updated, norm, _ = trainer.optimizer.step()
        trainer.sync_params()
        bits.append((updated, norm, state_bits(trainer)))
    return {"bits": bits, "begun": begun}


def record_begin_of_gathers(trainer: Trainer) -> list[bool]:
    """Return a list that gets, for each gather of a step, whether the last chunk is still old."""
    first, last = trainer.chunks[0], trainer.chunks[-1]
    start, step = first.start_param_sync, trainer.optimizer.member.step
    weights = digest(last.parameters())
    begun = []

    def start_and_look(*args: Any, **kwargs: Any) -> None:
        if kwargs.get("force_dispatch"):
            begun.append(digest(last.parameters()) == weights)
        start(*args, **kwargs)

    def step_and_look() -> Any:
        nonlocal weights
        weights = digest(last.parameters())
        return step()

    first.start_param_sync = start_and_look
    trainer.optimizer.member.step = step_and_look
    return begun


CASES = {
    "virtual stages": (JOB, 4),
    "bf16, remainders, cut heads": (
        replace(JOB, bf16=True, tp=2, groups=1, adam_mini={"param_remainders": True}),
        4,
    ),
    "experts": (replace(JOB, experts=2, ep=2), 4),
    "half of the state on the host": (
        replace(
            JOB,
            bf16=True,
            optimizer_args={"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5},
        ),
        4,
    ),
    "single phase": (replace(JOB, clip_grad=0.0, adam_mini={"single_phase": True}), 4),
}


@pytest.mark.support("parameter gather within the step", "overlap")
@pytest.mark.parametrize("case", CASES)
def test_an_early_gather_changes_no_bit(case: str) -> None:
    job, world = CASES[case]
    plain = run_ranks(world, run, job)
    early = run_ranks(world, run, replace(job, optimizer_args=job.optimizer_args | EARLY))
    for one, other in zip(plain, early, strict=True):
        assert one["bits"] == other["bits"]
        assert one["begun"] == []
        taken = [updated for updated, *_ in one["bits"]]
        assert len(other["begun"]) == sum(taken)
        if not job.optimizer_args:  # what is offloaded comes last, whatever its chunk
            assert any(other["begun"]), "the other chunks are updated before the gather starts"
        if not job.adam_mini.get("single_phase"):  # which knows no norm, and skips no step
            assert taken == [True, False, True, True, True]
            assert one["bits"][3][1] > 1e24


@pytest.mark.support("parameter gather within the step", "overlap")
def test_the_flag_changes_no_bit_of_a_training_loop(tmp_path: Path) -> None:
    flags = f"{make_dataset(tmp_path / 'text')} {OVERLAPPING_STAGES}"
    plain = run_ranks(4, train, Run(flags))
    early = run_ranks(4, train, Run(f"{flags} --overlap-param-gather-with-optimizer-step"))
    for one, other in zip(plain, early, strict=True):
        assert (one.error, other.error) == (None, None)
        assert_same_state(one.end, other.end)
        for name, weight in one.end["weights"].items():
            assert np.array_equal(weight, other.end["weights"][name]), name


def loaded(job: Job) -> bool:
    """Load while the gather of a step is in flight; return whether all weights are the loaded."""
    trainer = Trainer(job)
    trainer.step(0)
    trainer.sync_params()
    weights = digest(p for chunk in trainer.chunks for p in chunk.parameters())
    member = trainer.optimizer.member
    saved = member.get_parameter_state_dp_zero()
    trainer.step(1)
    member.load_parameter_state_from_dp_zero(saved)
    return weights == digest(p for chunk in trainer.chunks for p in chunk.parameters())


def test_a_load_right_after_a_step_reaches_the_weights_of_all_ranks() -> None:
    assert run_ranks(4, loaded, replace(JOB, bf16=True, optimizer_args=EARLY)) == [True] * 4


def build(job: Job) -> None:
    Trainer(job)


@pytest.mark.parametrize("change", [{"overlap": False}, {"distributed_optimizer": False}])
def test_it_is_refused_where_nobody_waits_for_the_gather(change: dict[str, bool]) -> None:
    job = replace(JOB, optimizer_args=EARLY, **change)
    with pytest.raises(RankError) as caught:
        run_ranks(2, build, job)
    assert len(caught.value.errors) == 2
    for kind, text in caught.value.errors.values():
        assert kind == "ValueError"
        assert "--overlap-param-gather-with-optimizer-step needs" in text
        assert "Remedy:" in text
