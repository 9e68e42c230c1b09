"""State in fewer bits where pipeline stages have weights of different kinds, or none to train."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import megatron_adam_mini
from tests.megatron_job import Job, Trainer
from tests.ranks import run_ranks

JOB = Job(
    layers=2, hidden=16, heads=2, groups=1, ffn=24, vocab=32, batch=8, bf16=True, pp=2, steps=2
)  # fmt: skip
AWARE = {"use_precision_aware_optimizer": True}
LAST = ("decoder.layers.1", "output_layer")


def bytes_of(job: Job) -> dict[str, int]:
    megatron_adam_mini.register()
    trainer = Trainer(job)
    for step in range(job.steps):
        assert trainer.step(step)[0]
    return trainer.optimizer.state_bytes()


@pytest.mark.parametrize("changed", [{"adam_mini": {"lean": True}}, {"optimizer_args": AWARE}])
@pytest.mark.parametrize("float32_modules", [(), ("final_layernorm",)])
def test_a_stage_without_bfloat16_weights_to_train(
    changed: dict[str, Any], float32_modules: tuple[str, ...]
) -> None:
    """Its parameters are frozen, or but for a norm in float32; those of the first stage are not."""
    frozen = LAST if float32_modules else (*LAST, "decoder.final_layernorm")
    job = replace(JOB, frozen=frozen, float32_modules=float32_modules, **changed)
    first, last = run_ranks(2, bytes_of, job)
    assert first["main_param"] > 0
    assert last["main_param"] == 0
    assert (last["exp_avg"] > 0) == bool(float32_modules)


def test_recipes_keep_float32_main_parameters_on_stages_without_fp8_weights_too() -> None:
    """As Megatron's precision-aware Adam beside FP8 weights; ranks with others would disagree."""
    job = replace(JOB, fp8="current", frozen=LAST[:1], optimizer_args=AWARE)
    for found in run_ranks(2, bytes_of, job):
        assert found["main_param"] == found["exp_avg"]
