"""Pipeline stages without any trainable dense parameter, or without a trainable expert.

Their ranks take part in saves and loads of every format, and each file is written by one rank.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gather import slices_of, whole_tensors
from tests.megatron_job import Job, Trainer
from tests.ranks import run_ranks
from tests.test_checkpoint import STATE, load, save
from tests.test_models import ADAPTERS

#: A mixture of experts; the second stage has one layer and the output layer.
MOE = Job(
    hidden=56, heads=4, groups=2, vocab=96, layers=2, experts=2, bf16=True, overlap=True,
    bucket_size=3000, steps=2, pp=2, batch=8,
)  # fmt: skip
LAST = "decoder.layers.1"
OUTPUT = ("output_layer", "decoder.final_layernorm")
#: Job, ranks, and the parts of the model that have a file: stage and expert-parallel rank.
CASES = {
    "adapters on the first stage": (
        replace(ADAPTERS, pp=2, steps=2, batch=8, bf16=True, adam_mini={"lean": True}),
        4,
        ["00", "10"],
    ),
    "experts alone on the last stage": (
        replace(
            MOE,
            ep=2,
            frozen=(
                *OUTPUT,
                *(f"{LAST}.{name}" for name in ("input", "pre_mlp", "self_attention", "mlp.r")),
            ),
        ),
        8,
        ["00", "01", "10", "11"],
    ),
    # The first rank of dense parameters has a file, the other expert-parallel one has nothing.
    "no experts on the last stage": (
        replace(MOE, ep=2, frozen=(f"{LAST}.mlp.e",), adam_mini={"checkpoint_format": "buckets"}),
        4,
        ["00", "01", "10"],
    ),
}


def part_and_replica() -> tuple[str, int]:
    """Return which part of the model this rank has, and which of the ranks with the part it is."""
    from megatron.core import parallel_state

    stage = parallel_state.get_pipeline_model_parallel_rank()
    experts = parallel_state.get_expert_model_parallel_rank()
    return f"{stage}{experts}", parallel_state.get_expert_data_parallel_rank()


def train_and_save(job: Job, folder: str) -> Any:
    """Save in both of Megatron's formats; every rank names a file of its own."""
    trainer = Trainer(job)
    for step in range(job.steps):
        trainer.step(step)
    part, replica = part_and_replica()
    trainer.optimizer.save_parameter_state(f"{folder}/{part}-{replica}.pt")
    save(trainer, f"{folder}/dist")
    return slices_of(trainer)


def load_both(job: Job, folder: str) -> Any:
    """Return the state after loading each of them over NaN."""
    trainer, found = Trainer(job), []
    state = trainer.optimizer.inner.main_params.attach()
    part, _ = part_and_replica()
    for load_it in (
        lambda: trainer.optimizer.load_parameter_state(f"{folder}/{part}-0.pt"),
        lambda: load(trainer, f"{folder}/dist"),
    ):
        for tensor in state.flat_tensors():
            tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
        load_it()
        found.append(slices_of(trainer))
    return found


@pytest.mark.support("frozen parameters, LoRA", "reshard")
@pytest.mark.parametrize("case", CASES)
def test_ranks_whose_parameters_are_frozen_save_and_load(case: str, tmp_path: Path) -> None:
    job, world, parts = CASES[case]
    Path(tmp_path, "dist").mkdir()
    saved = run_ranks(world, train_and_save, job, str(tmp_path))
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == [f"{p}-0.pt" for p in parts]
    loaded = run_ranks(2 * job.ep, load_both, job, str(tmp_path))
    for number in range(2):
        for key in STATE:
            before = whole_tensors(saved, key, job)
            after = whole_tensors([rank[number] for rank in loaded], key, job)
            assert before.keys() == after.keys()
            for name, value in after.items():
                assert torch.equal(before[name], value), f"{key} {name}"
