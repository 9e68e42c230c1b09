"""``decoupled_weight_decay=False``: the decay is a part of the gradient, in m and in every v."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.gather import slices_of, whole_tensors
from tests.megatron_job import Job, Trainer
from tests.ranks import run_ranks
from tests.reference import WholeTensorAdamMini
from tests.test_oracle import (
    BASE,
    BETAS,
    SAME_GRADIENT_TOLERANCE,
    assert_close,
    check_replicas,
    decay_of,
    labels_of,
    sharded_run,
    world_of,
)

COUPLED = {"decoupled_weight_decay": False}
JOB = replace(BASE, steps=4, optimizer_args=COUPLED, weight_decay=0.5)
#: Job and data-parallel size.
LAYOUTS = {
    "tp2, pp2, dp2, overlap": (replace(JOB, tp=2, pp=2, tied=True), 2),
    "bf16, dp3": (replace(JOB, bf16=True, overlap=False), 3),
    "remainders, one group, tp4": (
        replace(JOB, bf16=True, tp=4, groups=1, adam_mini={"param_remainders": True}),
        1,
    ),
    "fp16 with loss scale, replicated": (
        replace(
            JOB, fp16=True, tp=2, distributed_optimizer=False,
            optimizer_args={**COUPLED, "initial_loss_scale": 64.0},
        ),
        1,
    ),
    "state in host memory": (
        replace(
            JOB, bf16=True,
            optimizer_args={
                **COUPLED, "optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5
            },
        ),
        2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LAYOUTS)
def test_the_decay_enters_gradients_after_clipping(case: str) -> None:
    job, dp = LAYOUTS[case]
    ranks = run_ranks(world_of(job, dp), sharded_run, job)
    check_replicas(ranks, job)
    start = whole_tensors([r["initial"] for r in ranks], "param", job)
    oracle = {
        name: WholeTensorAdamMini(value, labels_of(name, tuple(value.shape), job))
        for name, value in start.items()
    }
    for step in range(job.steps):
        grads = whole_tensors([r["grads"][step] for r in ranks], "grad", job)
        grads = {n: g.double() / ranks[0]["scales"][step] for n, g in grads.items()}
        if job.tied:
            del grads["output_layer.weight"]
        norm = float(sum(g.square().sum() for g in grads.values())) ** 0.5
        scale = min(1.0, job.clip_grad / (norm + 1e-6))
        for name, grad in grads.items():
            decay = decay_of(tuple(grad.shape), job) * oracle[name].param
            oracle[name].step(grad * scale + decay, lr=job.lr, weight_decay=0.0, **BETAS)
    for key in ("param", "exp_avg", "v"):
        final = whole_tensors([r["final"] for r in ranks], key, job)
        for name, one in oracle.items():
            if not (job.tied and name == "output_layer.weight"):
                expected = one.v_of_elements() if key == "v" else getattr(one, key)
                assert_close(final[name], expected, SAME_GRADIENT_TOLERANCE, f"{key} {name}")


# Elementwise, both do the same in float32; the order of their operations differs.
ADAM_TOLERANCE = 1e-6


def weights_after(job: Job) -> dict[str, Any]:
    trainer = Trainer(job)
    for step in range(job.steps):
        trainer.step(step)
    trainer.sync_params()
    from tests.megatron_job import global_names

    return {n: p.detach().clone() for n, p in global_names(trainer.chunks).items()}


def test_with_a_full_v_it_is_megatrons_adam() -> None:
    job = replace(JOB, overlap=False, adam_mini={"full_v": ("*",)})
    mini = run_ranks(2, weights_after, job)
    adam = run_ranks(2, weights_after, replace(job, optimizer="adam", adam_mini={}))
    decoupled = run_ranks(2, weights_after, replace(job, optimizer_args={}))
    for name, weight in adam[0].items():
        assert_close(mini[0][name], weight, ADAM_TOLERANCE, name)
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    assert not torch.allclose(decoupled[0][name], adam[0][name], atol=1e-4)


def skipped(job: Job) -> list[bool]:
    trainer = Trainer(job)
    trainer.step(0)
    before = slices_of(trainer)
    trainer.backward(1)
    for chunk in trainer.chunks:
        for param in chunk.parameters():
            param.main_grad.fill_(float("nan"))
    updated, _, _ = trainer.optimizer.step()
    after = slices_of(trainer)
    same = all(
        (one.values[key] == other.values[key]).all()
        for one, other in zip(before, after, strict=True)
        for key in ("param", "exp_avg", "v")
    )
    return [updated, same, trainer.step(2)[0]]


def test_a_skipped_step_changes_nothing() -> None:
    assert run_ranks(2, skipped, JOB) == [[False, True, True]] * 2


def zeros(job: Job) -> Any:
    return Trainer(job).step(0)[2]


def test_zeros_are_counted_before_the_decay_enters() -> None:
    logged = {"log_num_zeros_in_grad": True}
    # Rows of the vocabulary that no token uses have no gradient.
    job = replace(BASE, padded_vocab=256, weight_decay=0.5, optimizer_args=logged)
    coupled = replace(job, optimizer_args=logged | COUPLED)
    expected = run_ranks(2, zeros, job)
    assert expected[0] >= 128 * job.hidden
    assert run_ranks(2, zeros, coupled) == expected


def refused(job: Job) -> str:
    with pytest.raises(ValueError, match="decoupled") as caught:
        Trainer(job)
    return str(caught.value)


def test_what_would_lose_the_decay_is_refused() -> None:
    for text in run_ranks(2, refused, replace(JOB, bf16=True, grad_fp32=False)):
        assert "Remedy: --accumulate-allreduce-grads-in-fp32" in text
    once = replace(JOB, clip_grad=0.0, adam_mini={"single_phase": True})
    for text in run_ranks(2, refused, once):
        assert "reads each gradient once" in text
