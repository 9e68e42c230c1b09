"""Checkpoints of mixtures of experts: saved under one expert-parallel layout, loaded under another.

Every value bit for bit; and Adam-mini starts from each format of Megatron's Adam, whose chain has
an optimizer for experts.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_adam_mini.checkpoint.reader import Checkpoint
from tests.gather import slices_of, weights_of
from tests.megatron_job import Job, Trainer
from tests.ranks import RankError, run_ranks
from tests.test_checkpoint import (
    compare,
    compare_with_adam,
    load_and_show,
    manifest_and_stored_keys,
    train_adam_and_save,
    train_and_save,
)

BASE = Job(
    hidden=56, heads=4, groups=2, vocab=96, layers=2, experts=4, bf16=True, overlap=True,
    bucket_size=3000, steps=2,
)  # fmt: skip
DENSE_FIRST = {"moe_layer_freq": [0, 1]}

#: Job and ranks.
LAYOUTS = {
    "one rank": (BASE, 1),
    "ep2-dp4": (replace(BASE, ep=2), 4),
    "ep4": (replace(BASE, ep=4), 4),
    "tp2-ep2-etp1": (replace(BASE, tp=2, ep=2, etp=1), 4),
    "ep2-etp2, dp4": (
        replace(BASE, ep=2, etp=2, config_args={"moe_token_dispatcher_type": "allgather"}),
        4,
    ),
    "pp2-ep2": (replace(BASE, pp=2, ep=2), 4),
    "ep2, replicated state": (replace(BASE, ep=2, distributed_optimizer=False), 2),
    "ep2, two instances": (replace(BASE, ep=2, instances=2), 4),
}


@pytest.mark.support(
    {
        "ep*": "expert parallelism",
        "*etp*": "expert tensor parallelism",
        "*": "mixture of experts",
    },
    "reshard",
)
@pytest.mark.parametrize("source", LAYOUTS)
def test_experts_saved_under_one_layout_load_under_others(source: str, tmp_path: Path) -> None:
    saved_job, world = LAYOUTS[source]
    saved = run_ranks(world, train_and_save, saved_job, str(tmp_path))
    names = list(LAYOUTS)
    for step in (1, 4):
        job, load_world = LAYOUTS[names[(names.index(source) + step) % len(names)]]
        loaded = run_ranks(load_world, load_and_show, job, str(tmp_path), step == 4)
        compare(saved, saved_job, loaded, job)


def test_a_dense_first_layer_reshards(tmp_path: Path) -> None:
    """Layers are unequal, so Megatron's keys have the layer's number, but not the expert's."""
    saved_job = replace(BASE, pp=2, ep=2, config_args=DENSE_FIRST)
    saved = run_ranks(4, train_and_save, saved_job, str(tmp_path))
    job = replace(saved_job, pp=1, ep=4)
    compare(saved, saved_job, run_ranks(4, load_and_show, job, str(tmp_path)), job)


@pytest.mark.support("multi-token prediction", "reshard")
def test_multi_token_prediction_reshards(tmp_path: Path) -> None:
    saved_job = replace(BASE, pp=2, ep=2, mtp=1)
    saved = run_ranks(4, train_and_save, saved_job, str(tmp_path))
    job = replace(saved_job, pp=1, tp=2, ep=2, etp=1)
    compare(saved, saved_job, run_ranks(2, load_and_show, job, str(tmp_path)), job)


@pytest.mark.parametrize("config_args", [{}, DENSE_FIRST], ids=["experts", "dense first"])
def test_the_manifest_has_the_keys_that_are_stored(config_args: dict[str, Any]) -> None:
    job = replace(BASE, ep=2, mtp=1, config_args=config_args)
    found = run_ranks(2, manifest_and_stored_keys, job)
    manifest = found[0][0]
    assert manifest == found[1][0]
    stored = found[0][1] | found[1][1]
    assert manifest.keys() == stored.keys()
    assert {name: key for name, key in manifest.items() if key != stored[name]} == {}
    name = "decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight"
    assert manifest[name] == "decoder.layers.1.mlp.experts.experts.3.linear_fc1.weight"


def test_buckets_of_experts_change_their_data_parallel_size_and_no_other(tmp_path: Path) -> None:
    saved_job = replace(BASE, ep=2, adam_mini={"checkpoint_format": "buckets"})
    saved = run_ranks(4, train_and_save, saved_job, str(tmp_path))
    keys = Checkpoint(tmp_path).tensors
    assert any(".expert_model_parallel_1.bucket_" in key for key in keys)
    compare(saved, saved_job, run_ranks(2, load_and_show, saved_job, str(tmp_path)), saved_job)
    with pytest.raises(RankError) as caught:
        run_ranks(4, load_and_show, replace(saved_job, ep=4), str(tmp_path))
    assert all("expert (2, here 4)" in text for _, text in caught.value.errors.values())


# Adam's checkpoints.

ADAM_FORMATS = {
    "fully_reshardable": (replace(BASE, pp=2, ep=2, optimizer="adam", bucket_size=None), 4),
    "dp_reshardable": (replace(BASE, ep=2, optimizer="adam"), 4),
    "dp_zero_gather_scatter": (replace(BASE, ep=2, optimizer="adam"), 4),
    "plain": (replace(BASE, ep=2, optimizer="adam", distributed_optimizer=False), 2),
}


@pytest.mark.support("mixture of experts", "conversion")
@pytest.mark.parametrize("case", ADAM_FORMATS)
def test_adams_chain_gives_masters_and_m_and_the_mean_of_v(case: str, tmp_path: Path) -> None:
    adam_job, world = ADAM_FORMATS[case]
    sharding = None if case == "plain" else case
    adam = run_ranks(world, train_adam_and_save, adam_job, str(tmp_path), sharding)
    targets = [(replace(adam_job, optimizer="adam_mini"), world)]
    if case == "dp_reshardable":
        targets.append((targets[0][0], world // 2))
    elif case in ("fully_reshardable", "plain"):
        targets.append((replace(adam_job, optimizer="adam_mini", pp=1, ep=4), 4))
    for job, ranks in targets:
        loaded = run_ranks(ranks, load_and_show, job, str(tmp_path))
        compare_with_adam(adam, adam_job, loaded, job)
        assert {r[2] for r in loaded} == {adam_job.steps}


# Format torch.


def train_and_save_files(job: Job, folder: str) -> Any:
    from megatron.core import parallel_state

    trainer = Trainer(job)
    for step in range(job.steps):
        trainer.step(step)
    part = parallel_state.get_expert_model_parallel_rank()
    trainer.optimizer.save_parameter_state(f"{folder}/{part}.pt")
    if parallel_state.get_expert_data_parallel_rank() == 0:
        torch.save(trainer.optimizer.state_dict(), f"{folder}/{part}.common.pt")
    torch.distributed.barrier()
    return slices_of(trainer), weights_of(trainer)


def load_files(job: Job, folder: str) -> Any:
    from megatron.core import parallel_state

    trainer = Trainer(replace(job, steps=1))
    trainer.step(7)
    part = parallel_state.get_expert_model_parallel_rank()
    trainer.optimizer.load_state_dict(torch.load(f"{folder}/{part}.common.pt"))
    trainer.optimizer.load_parameter_state(f"{folder}/{part}.pt")
    trainer.optimizer.member._copy_main_params_to_model_params()
    trainer.sync_params()
    optimizer = trainer.optimizer
    found = slices_of(trainer), weights_of(trainer), optimizer.inner.main_params.step_count
    return *found, [group["lr"] for group in optimizer.param_groups]


def test_files_of_format_torch_hold_each_ranks_experts(tmp_path: Path) -> None:
    job = replace(BASE, ep=2)
    saved = run_ranks(4, train_and_save_files, job, str(tmp_path))
    assert sorted(path.name for path in tmp_path.glob("?.pt")) == ["0.pt", "1.pt"]
    compare(saved, job, run_ranks(2, load_files, job, str(tmp_path)), job)


def test_format_torch_is_refused_where_experts_are_split_otherwise(tmp_path: Path) -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(2, train_and_save_files, replace(BASE, tp=2, etp=1), str(tmp_path))
    for kind, text in caught.value.errors.values():
        assert kind == "NotImplementedError"
        assert "--expert-tensor-parallel-size 2" in text
