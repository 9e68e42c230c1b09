"""Adam-mini starts from every format of Megatron's Adam, at every data-parallel size.

Megatron's Adam trains and saves; each checkpoint is then loaded by runs of 1, 2 and 4 ranks.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.gather import Part, slices_of
from tests.megatron_job import Job, Trainer
from tests.ranks import RankError, run_ranks
from tests.test_checkpoint import BASE, adam_state, compare_with_adam, load, save

DP = (1, 2, 4)
#: Several buckets, all padded at their ends.
PADDED = replace(BASE, layers=1, optimizer="adam", steps=1)
#: Several buckets that end at multiples of 128: others are written wrong in the first format.
ALIGNED = Job(
    layers=1, hidden=128, heads=4, groups=2, ffn=128, vocab=128, bf16=True, bucket_size=20000,
    optimizer="adam", steps=1,
)  # fmt: skip
PLAIN = replace(PADDED, distributed_optimizer=False)

#: Job, ranks of the saving runs, formats that each of them saves.
CASES: dict[str, tuple[Job, tuple[int, ...], tuple[str | None, ...]]] = {
    "model space": (ALIGNED, DP, ("fully_reshardable",)),
    "buckets": (PADDED, DP, ("dp_reshardable", "dp_zero_gather_scatter")),
    "without the distributed optimizer": (PLAIN, (2,), (None,)),
}


def train_and_save(job: Job, folder: str, formats: tuple[str | None, ...]) -> list[Part]:
    trainer = Trainer(job)
    for step in range(job.steps):
        trainer.step(step)
    trainer.sync_params()
    for sharding in formats:
        save(trainer, str(made(folder, sharding)), sharding)
    return adam_state(trainer)


def made(folder: str | Path, sharding: str | None) -> Path:
    from torch import distributed

    path = Path(folder, str(sharding))
    path.mkdir(parents=True, exist_ok=True)
    distributed.barrier()
    return path


def load_each(job: Job, folders: list[str]) -> list[tuple[list[Part], int]]:
    """Load one checkpoint after the other, each over NaN; return the state after each."""
    trainer, found = Trainer(job), []
    params = trainer.optimizer.inner.main_params
    for folder in folders:
        for tensor in params.attach().flat_tensors():
            tensor.fill_(float("nan"))
        params.step_count = 0
        load(trainer, folder)
        found.append((slices_of(trainer), params.step_count))
    return found


@pytest.mark.support("data parallelism, distributed optimizer", "conversion")
@pytest.mark.support("start from Megatron's Adam, in every format", "test")
@pytest.mark.parametrize("case", CASES)
def test_adam_mini_starts_from_every_format_at_every_size(case: str, tmp_path: Path) -> None:
    adam_job, worlds, formats = CASES[case]
    adam = {
        world: run_ranks(world, train_and_save, adam_job, str(tmp_path / str(world)), formats)
        for world in worlds
    }
    saved = [(world, tmp_path / str(world) / str(name)) for world in worlds for name in formats]
    job = replace(adam_job, optimizer="adam_mini")
    targets = [(job, world) for world in DP]
    if case == "buckets":
        targets.append((replace(job, instances=2), 4))
    for target, world in targets:
        loaded = run_ranks(world, load_each, target, [str(folder) for _, folder in saved])
        for number, (saving, _) in enumerate(saved):
            compare_with_adam(
                [(parts,) for parts in adam[saving]], adam_job, [r[number] for r in loaded], target
            )
            assert {r[number][1] for r in loaded} == {adam_job.steps}


# Other layouts, and formats that nobody can read.


def load_refused(job: Job, folder: str) -> None:
    load(Trainer(job), folder)


OTHERS = {
    "tensor parallel": {"tp": 2},
    "buckets": {"bucket_size": None},
    "no distributed optimizer": {"distributed_optimizer": False},
}


@pytest.mark.parametrize("sharding", ["dp_reshardable", "dp_zero_gather_scatter"])
def test_buckets_of_another_layout_are_refused_on_all_ranks(sharding: str, tmp_path: Path) -> None:
    run_ranks(1, train_and_save, PADDED, str(tmp_path), (sharding,))
    for name, other in OTHERS.items():
        if (name, sharding) == ("buckets", "dp_zero_gather_scatter"):
            continue  # whole buffers, whatever their buckets
        job = replace(PADDED, optimizer="adam_mini", **other)
        with pytest.raises(RankError) as caught:
            run_ranks(2, load_refused, job, str(tmp_path / sharding), timeout=60)
        assert len(caught.value.errors) == 2
        remedy = "--use-distributed-optimizer" if "no" in name else "buckets"
        for kind, text in caught.value.errors.values():
            assert kind in ("ValueError", "RuntimeError"), (name, kind, text)
            assert remedy in text, (name, text)


def write_deprecated(job: Job, folder: str) -> str:
    trainer = Trainer(job)
    trainer.step(0)
    try:
        save(trainer, str(made(folder, "x")), "fully_sharded_model_space")
    except Exception as error:
        return str(error)
    return "written"


def test_megatron_itself_cannot_write_the_deprecated_model_space(tmp_path: Path) -> None:
    """Nor read it, so Adam-mini need not."""
    (text,) = run_ranks(1, write_deprecated, PADDED, str(tmp_path))
    assert "flattened_range is not supported" in text


UNREADABLE = [
    ({"param_state_sharding_type": "fully_sharded_model_space"}, "fully_sharded_model_space"),
    ({"param_state_sharding_type": "fully_sharded_bucket_space"}, "dp_reshardable"),
    ({0: {}, 1: {}}, "format None"),
    ({}, "holds no optimizer state"),
    (None, "--no-load-optim"),
]


def refusals() -> list[str]:
    from megatron_adam_mini.mcore.adam_import import format_of_adam

    found = []
    for common, _ in UNREADABLE:
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (its text is compared)
            format_of_adam(common)
        found.append(str(caught.value))
    return found


def test_what_cannot_be_read_is_refused_by_name() -> None:
    (found,) = run_ranks(1, refusals)
    for text, (_, words) in zip(found, UNREADABLE, strict=True):
        assert words in text
