"""Megatron's older format ``torch``: one file per model-parallel part, gathered and scattered."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gather import slices_of, weights_of, whole_tensors
from tests.megatron_job import Job, Trainer
from tests.ranks import run_ranks
from tests.test_checkpoint import BASE, STATE, adam_state, compare_with_adam

JOB = replace(BASE, tp=2, bias=True)
JOBS = {
    "bf16, cut heads and rows": (JOB, 4),
    "float32": (replace(JOB, bf16=False, tp=1), 2),
    "remainders, bf16 m": (
        replace(JOB, tp=1, adam_mini={"param_remainders": True, "exp_avg_dtype": "bf16"}),
        2,
    ),
    "8-bit m, elements": (
        replace(JOB, tp=1, adam_mini={"exp_avg_dtype": "fp8", "preset": "first"}),
        2,
    ),
    "pipeline, tied": (replace(JOB, tp=1, pp=2, tied=True), 4),
    "several instances": (replace(JOB, tp=1, instances=2), 4),
    "replicated": (replace(JOB, tp=1, distributed_optimizer=False, overlap=False), 2),
}


def model_parallel_file(folder: str) -> str:
    from megatron.core import parallel_state

    tp = parallel_state.get_tensor_model_parallel_rank()
    return f"{folder}/{tp}-{parallel_state.get_pipeline_model_parallel_rank()}.pt"


def save(trainer: Trainer, folder: str) -> None:
    """Save as megatron.training does: one model file and one optimizer file per part."""
    from megatron.core import parallel_state

    trainer.sync_params()
    if trainer.job.distributed_optimizer:
        trainer.optimizer.save_parameter_state(model_parallel_file(folder) + ".optim")
    if parallel_state.get_data_parallel_rank() == 0:
        model = [chunk.state_dict_for_save_checkpoint() for chunk in trainer.chunks]
        saved = {"model": model, "optimizer": trainer.optimizer.state_dict()}
        torch.save(saved, model_parallel_file(folder))
    torch.distributed.barrier()


def load(trainer: Trainer, folder: str) -> None:
    saved = torch.load(model_parallel_file(folder), weights_only=False)
    for chunk, state in zip(trainer.chunks, saved["model"], strict=True):
        chunk.load_state_dict(state)
    trainer.optimizer.load_state_dict(saved["optimizer"])
    if trainer.job.distributed_optimizer:
        trainer.optimizer.load_parameter_state(
            model_parallel_file(folder) + ".optim", update_legacy_format=False
        )


def train_and_save(job: Job, folder: str) -> Any:
    trainer = Trainer(job)
    for step in range(job.steps):
        trainer.step(step)
    save(trainer, folder)
    return slices_of(trainer), weights_of(trainer), trainer.step(job.steps)[1]


def load_and_train(job: Job, folder: str) -> Any:
    trainer = Trainer(job)
    trainer.step(0)
    load(trainer, folder)
    assert trainer.optimizer.inner.main_params.step_count == job.steps
    found = slices_of(trainer), weights_of(trainer)
    return *found, trainer.step(job.steps)[1]


def compare(saved: Any, saved_job: Job, loaded: Any, job: Job) -> None:
    for key in (*STATE, "weight"):
        part = int(key == "weight")
        before = whole_tensors([rank[part] for rank in saved], key, saved_job)
        after = whole_tensors([rank[part] for rank in loaded], key, job)
        assert before.keys() == after.keys()
        for name, value in after.items():
            assert torch.equal(before[name], value), f"{key} {name}"
            assert key != "exp_avg" or value.any(), f"{name}: the state never moved"


@pytest.mark.parametrize("case", JOBS)
def test_state_comes_back_bit_for_bit(case: str, tmp_path: Path) -> None:
    job, world = JOBS[case]
    saved = run_ranks(world, train_and_save, job, str(tmp_path))
    loaded = run_ranks(world, load_and_train, job, str(tmp_path))
    compare(saved, job, loaded, job)
    assert {rank[2] for rank in saved} == {rank[2] for rank in loaded}, "the next step differs"


def test_any_number_of_data_parallel_ranks_and_any_buckets(tmp_path: Path) -> None:
    saved = run_ranks(4, train_and_save, JOB, str(tmp_path))
    for world, bucket_size in ((2, None), (6, 500)):
        job = replace(JOB, bucket_size=bucket_size, batch=12)
        loaded = run_ranks(world, load_and_train, job, str(tmp_path))
        compare(saved, JOB, loaded, job)


def errors_of(job: Job, folder: str) -> list[str]:
    trainer = Trainer(job)
    found = []
    path = Path(model_parallel_file(folder) + ".optim")
    for name in (path, path.with_suffix(".missing"), path.with_suffix(".cut"), Path(folder, "bit")):
        try:
            trainer.optimizer.load_parameter_state(str(name))
            found.append("no error")
        except (ValueError, RuntimeError) as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def test_another_layout_and_damaged_files_are_refused_on_all_ranks(tmp_path: Path) -> None:
    job = replace(JOB, tp=1)
    run_ranks(2, train_and_save, job, str(tmp_path))
    whole = (tmp_path / "0-0.pt.optim").read_bytes()
    for tp in "01":
        (tmp_path / f"{tp}-0.pt.optim").write_bytes(whole)
        (tmp_path / f"{tp}-0.pt.cut").write_bytes(whole[: len(whole) // 2])
    middle = len(whole) // 2
    (tmp_path / "bit").write_bytes(
        whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    )
    found = run_ranks(4, errors_of, replace(job, tp=2), str(tmp_path))
    for layout, missing, cut, bit in found:
        assert "--ckpt-format torch_dist" in layout
        assert "elements of it: it was saved under another" in layout
        assert "0-0.pt.missing" in missing or "1-0.pt.missing" in missing
        assert "cannot be read" in cut
        assert "checksum" in bit
    assert {text.split(":")[0] for rank in found for text in rank} == {"ValueError", "RuntimeError"}


def adam_run(job: Job, folder: str) -> Any:
    trainer = Trainer(job)
    for step in range(job.steps):
        trainer.step(step)
    save(trainer, folder)
    return adam_state(trainer), weights_of(trainer)


@pytest.mark.parametrize("world", [4, 2])
def test_adam_is_taken_over_by_means_over_blocks(world: int, tmp_path: Path) -> None:
    adam = replace(JOB, optimizer="adam")
    saved = run_ranks(4, adam_run, adam, str(tmp_path))
    loaded = run_ranks(world, load_and_train, JOB, str(tmp_path))
    compare_with_adam(saved, adam, loaded, JOB)


def other_calls(job: Job) -> dict[str, Any]:
    trainer = Trainer(job)
    trainer.step(0)
    trainer.sync_params()
    (member,) = trainer.optimizer.chained_optimizers
    before = slices_of(trainer)
    found: dict[str, Any] = {}
    gathered = [
        member.get_parameter_state_dp_zero(use_gloo_comm=gloo, return_on_all_ranks=everywhere)
        for gloo in (True, False)
        for everywhere in (False, True)
    ]
    found["who"] = [state is not None for state in gathered]
    found["equal"] = torch.equal(
        *(state["parameters"]["output_layer.weight"]["param"] for state in gathered[1::2])
    )
    empty = member.get_parameter_state_dp_zero(empty_data=True, return_on_all_ranks=True)
    found["empty"] = not any(t.any() for p in empty["parameters"].values() for t in p.values())
    stream = io.BytesIO()
    torch.save(trainer.optimizer.state_dict(), stream)
    stream.seek(0)
    common = torch.load(stream, weights_only=True)
    found["step"] = {group["step"] for group in common["optimizer"]["param_groups"]}
    trainer.step(1)
    trainer.optimizer.load_state_dict(common)
    member.load_parameter_state_from_dp_zero(gathered[0])
    found["back"] = all(
        (a.values[key] == b.values[key]).all()
        for a, b in zip(before, slices_of(trainer), strict=True)
        for key in STATE
    )
    found["is_loading"] = sorted(trainer.optimizer.state_dict(is_loading=True))
    try:
        member.load_parameter_state_from_dp_zero(gathered[0], update_legacy_format=True)
    except NotImplementedError as error:
        found["old"] = "--optimizer adam first" in str(error)
    return found


def test_the_calls_of_tools() -> None:
    for rank, found in enumerate(run_ranks(2, other_calls, replace(JOB, tp=1))):
        assert found == {
            "who": [rank == 0, True, rank == 0, True],
            "equal": True,
            "empty": True,
            "step": {1},
            "back": True,
            "is_loading": ["adam_mini", "optimizer"],
            "old": True,
        }


def in_vain(job: Job, folder: str) -> list[tuple[str, str]]:
    """Load files of which one rank's is Adam's, then save where one rank cannot."""
    from megatron.core import parallel_state

    adam = Trainer(replace(job, optimizer="adam"))
    adam.step(0)
    adams = adam.optimizer.chained_optimizers[0].get_parameter_state_dp_zero()
    parallel_state.destroy_model_parallel()
    (member,) = Trainer(job).optimizer.chained_optimizers
    own = member.get_parameter_state_dp_zero()
    first = torch.distributed.get_rank() == 0
    found = []
    for call, argument in (
        (member.load_parameter_state_from_dp_zero, own if first else adams),
        (member.save_parameter_state, f"{folder}/{'missing/' if first else ''}file"),
    ):
        try:
            call(argument)
            found.append(("", "no error"))
        except (OSError, RuntimeError, ValueError) as error:
            found.append((type(error).__name__, str(error)))
    return found


def test_what_one_rank_cannot_do_is_an_error_on_all(tmp_path: Path) -> None:
    for (kind, mixed), (_, unsaved) in run_ranks(2, in_vain, JOB, str(tmp_path)):
        assert kind == "ValueError"
        assert "Ranks 0 and 1 have optimizer state of different runs" in mixed
        assert "missing" in unsaved


def refused_dict(job: Job) -> tuple[str, int]:
    trainer = Trainer(job)
    common = trainer.optimizer.state_dict()
    trainer.step(0)
    del common["parameter_state"]
    with pytest.raises(ValueError, match="has no parameter state of Adam-mini") as caught:
        trainer.optimizer.load_state_dict(common)
    return str(caught.value), trainer.optimizer.inner.main_params.step_count


def test_a_dict_that_is_refused_changes_nothing() -> None:
    job = replace(JOB, tp=1, distributed_optimizer=False, overlap=False)
    for text, step in run_ranks(2, refused_dict, job):
        assert "--no-load-optim" in text
        assert step == 1
