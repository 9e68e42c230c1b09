"""Frameworks save and load in orders of their own, and describe checkpoints by other means.

Several orders follow one another in the same ranks: each saves the state as it is, takes a step,
loads, and must find the bits that it saved.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.megatron_job import Job, Trainer
from tests.ranks import run_ranks
from tests.test_checkpoint import metadata_of, model_state
from tests.test_step import state_bits

#: Two tensor- and two data-parallel ranks, SwiGLU, cut rows, several padded buckets.
JOB = Job(
    tp=2, layers=1, hidden=40, heads=4, groups=2, ffn=56, vocab=96, bf16=True, bucket_size=2000,
    steps=1,
)  # fmt: skip

#: As frameworks have them: made once, for all checkpoints of a process.
CONSTANT = {"distrib_optim_sharding_type": "dp_reshardable", "chained_optim_avoid_prefix": True}

Order = Callable[[Trainer, Path], None]
ORDERS: list[Order] = []


def order(function: Order) -> Order:
    ORDERS.append(function)
    return function


def save(
    state: dict[str, Any], folder: Path, metadata: Any = None, *, parallel: bool = False
) -> Any:
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.strategies.filesystem_async import (
        get_write_results_queue,
    )
    from megatron.core.dist_checkpointing.strategies.fully_parallel import (
        FullyParallelSaveStrategyWrapper,
    )
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
    from torch import distributed

    get_write_results_queue("fork")  # see test_checkpoint.save
    if distributed.get_rank() == 0:
        folder.mkdir(parents=True)
    distributed.barrier()
    strategy: Any = TorchDistSaveShardedStrategy()
    if parallel:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        strategy = FullyParallelSaveStrategyWrapper(strategy, group)
    return dist_checkpointing.save(state, str(folder), strategy, content_metadata=metadata)


def load(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    from megatron.core import dist_checkpointing

    return dist_checkpointing.load(state, str(folder))


def saved_whole(trainer: Trainer, folder: Path, metadata: Any = None) -> None:
    state = model_state(trainer, metadata_of(None))
    state["optimizer"] = trainer.optimizer.sharded_state_dict(state, metadata=metadata)
    save(state, folder, metadata)


def requested(trainer: Trainer, metadata: Any = None) -> dict[str, Any]:
    state = model_state(trainer, metadata_of(None))
    state["optimizer"] = trainer.optimizer.sharded_state_dict(
        state, is_loading=True, metadata=metadata
    )
    return state


def take(trainer: Trainer, loaded: dict[str, Any]) -> None:
    # From a dict that was saved before, Megatron loads parts and does not join them.
    model = {k: torch.cat(v) if isinstance(v, list) else v for k, v in loaded["model"].items()}
    trainer.chunks[0].module.module.load_state_dict(model)
    trainer.optimizer.load_state_dict(loaded["optimizer"])


def move(trainer: Trainer) -> None:
    trainer.step(trainer.job.steps)


def assert_written_once(state: dict[str, Any]) -> None:
    """Compare what ranks would write; torch drops copies, but not in every mode of Megatron's."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
    from torch import distributed

    boxes = [
        (entry.key, entry.global_offset)
        for entry in nested_values(state)
        if isinstance(entry, ShardedTensor) and is_main_replica(entry.replica_id)
    ]
    everyone: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, boxes)
    counts = Counter(box for boxes in everyone for box in boxes)
    assert set(counts.values()) == {1}, counts.most_common(3)


@order
def nothing_describes_it(trainer: Trainer, folder: Path) -> None:
    saved_whole(trainer, folder)
    move(trainer)
    take(trainer, load(requested(trainer), folder))


@order
def a_constant_describes_it(trainer: Trainer, folder: Path) -> None:
    before = copy.deepcopy(CONSTANT)
    saved_whole(trainer, folder, CONSTANT)
    assert before == CONSTANT, "what serves for other checkpoints, too, was changed"
    move(trainer)
    take(trainer, load(requested(trainer, CONSTANT), folder))
    assert before == CONSTANT


@order
def model_first_and_apart_with_one_dict(trainer: Trainer, folder: Path) -> None:
    """A save expands entries in the model's dict, and a parallel one renumbers their replicas."""
    from megatron.core import dist_checkpointing

    whole = model_state(trainer, metadata_of(None))
    save({"model": whole["model"]}, folder / "model", CONSTANT, parallel=True)
    state = {"optimizer": trainer.optimizer.sharded_state_dict(whole, metadata=CONSTANT)}
    assert_written_once(state)
    save(state, folder / "optimizer", parallel=True)
    move(trainer)
    about = dist_checkpointing.load_content_metadata(str(folder / "model"))
    assert "adam_mini" not in about
    loaded = load({"model": whole["model"]}, folder / "model")
    request = trainer.optimizer.sharded_state_dict(whole, is_loading=True, metadata=about)
    take(trainer, loaded | load({"optimizer": request}, folder / "optimizer"))


@order
def one_dict_is_saved_twice_and_loaded(trainer: Trainer, folder: Path) -> None:
    state = model_state(trainer, metadata_of(None))
    state["optimizer"] = trainer.optimizer.sharded_state_dict(state)
    save(state, folder / "first", CONSTANT, parallel=True)
    save(state, folder / "second", CONSTANT, parallel=True)
    for name in ("first", "second"):
        move(trainer)
        take(trainer, load(state, folder / name))


@order
def one_dict_for_loading_is_saved_and_loaded_twice(trainer: Trainer, folder: Path) -> None:
    state = requested(trainer)
    save(state, folder)
    for _ in range(2):
        move(trainer)
        take(trainer, load(state, folder))


@order
def a_request_is_dropped_and_a_save_comes_between(trainer: Trainer, folder: Path) -> None:
    saved_whole(trainer, folder / "wanted")
    move(trainer)
    requested(trainer)
    first, second = requested(trainer), requested(trainer)
    saved_whole(trainer, folder / "other")
    other = load(second, folder / "other")
    take(trainer, load(first, folder / "wanted"))
    take(trainer, other)
    take(trainer, load(first, folder / "wanted"))


@order
def the_metadata_are_those_of_another_save(trainer: Trainer, folder: Path) -> None:
    from megatron.core import dist_checkpointing

    saved_whole(trainer, folder)
    about = dist_checkpointing.load_content_metadata(str(folder))
    assert about["distrib_optim_sharding_type"] == "fully_reshardable"
    about["adam_mini"]["layout"] = "dp_reshardable"
    move(trainer)
    take(trainer, load(requested(trainer, about), folder))


@order
def the_optimizer_stands_elsewhere(trainer: Trainer, folder: Path) -> None:
    whole = model_state(trainer, metadata_of(None))

    def made(**how: Any) -> dict[str, Any]:
        return trainer.optimizer.sharded_state_dict(whole, **how)

    save(made(), folder / "alone")
    save({"engine": [{"optimizer": made()}]}, folder / "nested")
    save({"model": whole["model"]}, folder / "model")
    for name, inside in (
        ("alone", lambda x: x),
        ("nested", lambda x: {"engine": [{"optimizer": x}]}),
    ):
        move(trainer)
        loaded = load(inside(made(is_loading=True, metadata=CONSTANT)), folder / name)
        own = loaded if name == "alone" else loaded["engine"][0]["optimizer"]
        take(trainer, load({"model": whole["model"]}, folder / "model") | {"optimizer": own})


@order
def what_was_loaded_is_given_twice(trainer: Trainer, folder: Path) -> None:
    saved_whole(trainer, folder)
    move(trainer)
    loaded = load(requested(trainer), folder)
    take(trainer, loaded)
    take(trainer, loaded)


@order
def it_is_away_while_it_is_saved(trainer: Trainer, folder: Path) -> None:
    trainer.optimizer.offload_to_cpu()
    saved_whole(trainer, folder)
    trainer.optimizer.restore_from_cpu()
    move(trainer)
    request = requested(trainer)
    trainer.optimizer.offload_to_cpu()
    take(trainer, load(request, folder))


def in_all_orders(job: Job, folder: str) -> dict[str, bool]:
    trainer = Trainer(job)
    for step in range(job.steps):
        trainer.step(step)
    wanted, found = state_bits(trainer), {}
    for each in ORDERS:
        each(trainer, Path(folder, each.__name__))
        found[each.__name__] = state_bits(trainer) == wanted
    move(trainer)
    assert state_bits(trainer) != wanted, "a step moves nothing"
    return found


LOW_PRECISION = {"param_remainders": True, "exp_avg_dtype": "bf16"}


@pytest.mark.support("checkpoints as frameworks save and load them", "test")
@pytest.mark.parametrize(
    ("job", "world"),
    [(JOB, 4), (replace(JOB, tp=1, adam_mini=LOW_PRECISION), 2)],
    ids=["float32", "16 bits"],
)
def test_every_order_saves_and_loads_all_bits(job: Job, world: int, tmp_path: Path) -> None:
    for found in run_ranks(world, in_all_orders, job, str(tmp_path)):
        assert found == {each.__name__: True for each in ORDERS}
    assert len(ORDERS) == 10


def save_late(job: Job, folder: str) -> tuple[str, str]:
    """Save a dict that was made a step before."""
    trainer = Trainer(job)
    state = model_state(trainer, metadata_of(None))
    state["optimizer"] = trainer.optimizer.sharded_state_dict(state)
    move(trainer)
    wanted = state_bits(trainer)
    save(state, Path(folder, "late"))
    move(trainer)
    take(trainer, load(requested(trainer), Path(folder, "late")))
    return wanted, state_bits(trainer)


def test_a_dict_made_before_a_step_is_saved_as_of_one_step(tmp_path: Path) -> None:
    for wanted, found in run_ranks(2, save_late, JOB, str(tmp_path)):
        assert found == wanted


# Refused, with the true reason.


def with_unwrapped_functions(trainer: Trainer, folder: Path) -> None:
    """As a program that imported the names before Adam-mini was registered."""
    from megatron.core import dist_checkpointing

    save_itself = dist_checkpointing.save.__wrapped__
    load_itself = dist_checkpointing.load.__wrapped__
    folder.mkdir(exist_ok=True)
    state = model_state(trainer, metadata_of(None))
    state["optimizer"] = trainer.optimizer.sharded_state_dict(state)
    save_itself(state, str(folder), content_metadata=dict(CONSTANT))
    wanted = state_bits(trainer)
    move(trainer)
    take(trainer, load(requested(trainer), folder))  # one of the two is enough
    assert state_bits(trainer) == wanted
    identity = dist_checkpointing.load_common_state_dict(str(folder))["optimizer"]["adam_mini"]
    move(trainer)
    take(trainer, load_itself(requested(trainer, {"adam_mini": identity}), str(folder)))
    assert state_bits(trainer) == wanted
    take(trainer, load_itself(requested(trainer, CONSTANT), str(folder)))


def what_was_asked_for(trainer: Trainer, folder: Path) -> None:
    trainer.optimizer.load_state_dict(requested(trainer)["optimizer"])


def trained_on_since(trainer: Trainer, folder: Path) -> None:
    saved_whole(trainer, folder)
    loaded = load(requested(trainer), folder)
    take(trainer, loaded)
    move(trainer)
    take(trainer, loaded)


def of_another_optimizer(trainer: Trainer, folder: Path) -> None:
    saved_whole(trainer, folder)
    loaded = load(requested(trainer), folder)
    trainer._build_optimizer().load_state_dict(loaded["optimizer"])


def a_folder_without_it(trainer: Trainer, folder: Path) -> None:
    save({"model": model_state(trainer, metadata_of(None))["model"]}, folder, CONSTANT)
    load(requested(trainer, CONSTANT), folder)


def twice_in_one_folder(trainer: Trainer, folder: Path) -> None:
    state = model_state(trainer, metadata_of(None))
    state["actor"] = trainer.optimizer.sharded_state_dict(state)
    state["critic"] = trainer.optimizer.sharded_state_dict(state)
    save(state, folder)


def with_half_of_the_model(trainer: Trainer, folder: Path) -> None:
    state = model_state(trainer, metadata_of(None))
    halved = dict(list(state["model"].items())[::2])
    trainer.optimizer.sharded_state_dict({"model": halved}, is_loading=True)


def saved_without_a_norm(trainer: Trainer, folder: Path) -> None:
    """One rank has the state of a small parameter; the other would wait for it in the save."""
    state = model_state(trainer, metadata_of(None))
    kept = {key: entry for key, entry in state["model"].items() if "final_layernorm" not in key}
    assert len(kept) < len(state["model"])
    trainer.optimizer.sharded_state_dict({"model": kept})


REFUSED = {
    with_unwrapped_functions: ["content metadata", "load_content_metadata(folder)", "register()"],
    what_was_asked_for: ["dist_checkpointing.load"],
    trained_on_since: ["trained on since"],
    of_another_optimizer: ["another optimizer"],
    a_folder_without_it: ["holds no optimizer state"],
    twice_in_one_folder: ["2 times", "folder of its own"],
    with_half_of_the_model: ["model's sharded state dict", "keep_vars=True"],
    saved_without_a_norm: ["final_layernorm", "model's sharded state dict", "keep_vars=True"],
}


def in_vain(job: Job, folder: str) -> dict[str, tuple[str, str]]:
    trainer, found = Trainer(job), {}
    trainer.step(0)
    for each in REFUSED:
        try:
            each(trainer, Path(folder, each.__name__))
        except Exception as error:
            found[each.__name__] = type(error).__name__, str(error)
    return found


def test_what_cannot_work_is_refused_on_all_ranks(tmp_path: Path) -> None:
    ranks = run_ranks(2, in_vain, replace(JOB, tp=1), str(tmp_path))
    for each, words in REFUSED.items():
        found = [rank[each.__name__] for rank in ranks]
        kinds = {"ValueError"} | ({"RuntimeError"} if each is saved_without_a_norm else set())
        assert {kind for kind, _ in found} == kinds, found
        assert all(word in text for word in words for _, text in found), found
