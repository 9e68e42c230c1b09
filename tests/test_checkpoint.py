"""Checkpoints: saved under one layout, loaded under another, every value bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gather import slices_of, weights_of, whole_tensors
from tests.megatron_job import Job, Trainer
from tests.ranks import run_ranks

# Hidden 56 pads buckets, small buckets cut rows, heads and norms.
BASE = Job(
    hidden=56, heads=4, groups=2, ffn=120, vocab=96, layers=4, bf16=True, overlap=True,
    bucket_size=3000, steps=3,
)  # fmt: skip
STATE = ("param", "exp_avg", "v")


def unwrapped(trainer: Trainer) -> list[Any]:
    from megatron.core.utils import unwrap_model

    return unwrap_model(trainer.chunks)


def model_state(trainer: Trainer, metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the model's sharded state dict under the names that Megatron uses."""
    chunks = unwrapped(trainer)
    names = ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]
    return {
        name: chunk.sharded_state_dict(metadata=metadata)
        for name, chunk in zip(names, chunks, strict=True)
    }


def metadata_of(sharding: str | None) -> dict[str, Any]:
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    found = {
        "dp_cp_group": group,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }
    return found | ({"distrib_optim_sharding_type": sharding} if sharding else {})


def save(trainer: Trainer, folder: str, sharding: str | None = "fully_reshardable") -> None:
    """Save as megatron.training does, fully parallel."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.strategies.fully_parallel import (
        FullyParallelSaveStrategyWrapper,
    )
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
    from megatron.core.dist_checkpointing.utils import _clean_metadata_for_serialization

    metadata = metadata_of(sharding)
    state = model_state(trainer, metadata)
    state["optimizer"] = trainer.optimizer.sharded_state_dict(state, metadata=metadata)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    dist_checkpointing.save(
        state,
        folder,
        FullyParallelSaveStrategyWrapper(TorchDistSaveShardedStrategy(), group),
        content_metadata=_clean_metadata_for_serialization(metadata),
    )


def load(trainer: Trainer, folder: str, *, parallel: bool = False) -> None:
    """Load as megatron.training does."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.strategies.fully_parallel import (
        FullyParallelLoadStrategyWrapper,
    )
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy

    metadata = dist_checkpointing.load_content_metadata(folder) or {}
    metadata |= {"dp_cp_group": metadata_of(None)["dp_cp_group"]}
    state = model_state(trainer, metadata)
    state["optimizer"] = trainer.optimizer.sharded_state_dict(
        state, is_loading=True, metadata=metadata
    )
    strategy: Any = TorchDistLoadShardedStrategy()
    if parallel:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        strategy = FullyParallelLoadStrategyWrapper(strategy, group)
    loaded = dist_checkpointing.load(state, folder, strategy, strict="raise_all")
    for index, chunk in enumerate(unwrapped(trainer)):
        chunk.load_state_dict(loaded["model" if len(trainer.chunks) == 1 else f"model{index}"])
    trainer.optimizer.load_state_dict(loaded["optimizer"])


def train_and_save(job: Job, folder: str, sharding: str | None = "fully_reshardable") -> Any:
    trainer = Trainer(job)
    for step in range(job.steps):
        trainer.step(step)
    save(trainer, folder, sharding)
    return slices_of(trainer), weights_of(trainer)


def load_and_show(job: Job, folder: str, parallel: bool = False) -> Any:
    trainer = Trainer(job)
    for group in trainer.optimizer.param_groups:
        group["lr"] = 1.0  # the saved one must come back
    load(trainer, folder, parallel=parallel)
    optimizer = trainer.optimizer
    found = slices_of(trainer), weights_of(trainer), optimizer.engine.step_count
    return *found, [group["lr"] for group in optimizer.param_groups]


def compare(saved: list[Any], saved_job: Job, loaded: list[Any], job: Job) -> None:
    """Compare every state value and every weight, bit for bit, beyond padded vocabulary rows."""
    for key in STATE:
        before = whole_tensors([r[0] for r in saved], key, saved_job)
        after = whole_tensors([r[0] for r in loaded], key, job)
        assert before.keys() - {"output_layer.weight"} == after.keys() - {"output_layer.weight"}
        for name, value in after.items():
            assert torch.equal(before[name], value), f"{key} {name}"
            if key == "exp_avg":
                assert value.abs().max() > 0, f"{name}: the state never moved"
    weights = whole_tensors([r[1] for r in loaded], "weight", job)
    masters = whole_tensors([r[0] for r in loaded], "param", job)
    for name, weight in weights.items():
        assert torch.equal(weight, masters[name].bfloat16().float()), f"weights {name}"
    assert {r[2] for r in loaded} == {saved_job.steps}
    assert {lr for r in loaded for lr in r[3]} == {saved_job.lr}


LAYOUTS = {
    "tp1-dp1": (BASE, 1),
    "tp1-dp3": (BASE, 3),
    "tp2-pp2-dp2": (replace(BASE, tp=2, pp=2), 8),
    "tp4-dp2": (replace(BASE, tp=4), 8),
    "pp2-vpp2-dp1": (replace(BASE, pp=2, vpp=2), 2),
    "pp4-dp1, other buckets": (replace(BASE, pp=4, bucket_size=1), 4),
    "tp2-dp1, replicated state": (replace(BASE, tp=2, distributed_optimizer=False), 2),
    "tp2-dp2, two instances": (replace(BASE, tp=2, instances=2), 8),
}


@pytest.mark.parametrize("source", LAYOUTS)
def test_saved_under_one_layout_loads_under_every_other(source: str, tmp_path: Path) -> None:
    saved_job, world = LAYOUTS[source]
    saved = run_ranks(world, train_and_save, saved_job, str(tmp_path))
    for index, (job, load_world) in enumerate(LAYOUTS.values()):
        loaded = run_ranks(load_world, load_and_show, job, str(tmp_path), index % 2 == 1)
        compare(saved, saved_job, loaded, job)
