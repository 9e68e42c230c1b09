"""One v per column in Megatron: checkpoints, other partitions, storage, what is refused.

Steps are compared with the oracle in ``test_oracle``, plans in ``test_layout`` and its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_adam_mini.checkpoint.reader import Checkpoint
from megatron_adam_mini.checkpoint.writer import CheckpointWriter
from megatron_adam_mini.cli import main
from megatron_adam_mini.convert.inspection import inspect
from tests import test_offload, test_parameter_state
from tests.adam_checkpoints import MINI, SAVED, load_each, read_all, saved
from tests.gather import slices_of, whole_tensors
from tests.megatron_job import Job, Trainer
from tests.ranks import RankError, run_ranks
from tests.test_checkpoint import (
    ADAM_FORMATS,
    BASE,
    averaged,
    compare,
    compare_with_adam,
    load_and_show,
    train_adam_and_save,
    train_and_save,
)
from tests.test_convert import layers_of
from tests.test_huge_gradients import SMALL, Grads, write
from tests.test_oracle import labels_of

SLIM = {"preset": "slim"}
JOB = replace(BASE, adam_mini=SLIM)
GIVEN = replace(SMALL, steps=3)


def test_v_of_columns_loads_under_any_layout(tmp_path: Path) -> None:
    saved_job = replace(JOB, tp=2)
    saved = run_ranks(4, train_and_save, saved_job, str(tmp_path))
    for job, world in (
        (replace(JOB, bucket_size=1), 3),
        (replace(JOB, tp=4, distributed_optimizer=False), 4),
        (replace(JOB, pp=2), 2),
    ):
        compare(saved, saved_job, run_ranks(world, load_and_show, job, str(tmp_path)), job)


def test_v_of_columns_beside_flat_buckets_and_in_format_torch(tmp_path: Path) -> None:
    job = replace(JOB, tp=2, adam_mini=SLIM | {"checkpoint_format": "buckets"})
    saved = run_ranks(4, train_and_save, job, str(tmp_path))
    compare(saved, job, run_ranks(2, load_and_show, job, str(tmp_path)), job)
    (tmp_path / "torch").mkdir()
    folder = str(tmp_path / "torch")
    saved = run_ranks(4, test_parameter_state.train_and_save, job, folder)
    loaded = run_ranks(2, test_parameter_state.load_and_train, job, folder)
    test_parameter_state.compare(saved, job, loaded, job)


def v_of(ranks: list[Any], job: Job) -> dict[str, torch.Tensor]:
    return whole_tensors([rank[0] for rank in ranks], "v", job)


def test_adams_v_is_averaged_over_columns(tmp_path: Path) -> None:
    adam_job, world = ADAM_FORMATS["fully_reshardable"]
    adam = run_ranks(world, train_adam_and_save, adam_job, str(tmp_path), "fully_reshardable")
    job = replace(JOB, groups=adam_job.groups)
    compare_with_adam(adam, adam_job, run_ranks(3, load_and_show, job, str(tmp_path)), job)


def test_v_per_element_is_averaged_over_columns(tmp_path: Path) -> None:
    saved_job = replace(BASE, tp=2, adam_mini={"full_v": ("*",)})
    saved = run_ranks(4, train_and_save, saved_job, str(tmp_path))
    job = replace(JOB, adam_mini=SLIM | {"convert_partition": True})
    loaded = run_ranks(3, load_and_show, job, str(tmp_path))
    before, after = v_of(saved, saved_job), v_of(loaded, job)
    assert before.keys() == after.keys()
    for name, value in after.items():
        expected = averaged(before[name], labels_of(name, tuple(value.shape), job))
        torch.testing.assert_close(value, expected.float(), rtol=1e-6, atol=0)


def test_columns_are_no_union_of_rows_and_one_block_is_one_of_columns(tmp_path: Path) -> None:
    saved_job = replace(JOB, tp=2, pp=2)
    saved = run_ranks(4, train_and_save, saved_job, str(tmp_path))
    converts = SLIM | {"convert_partition": True}
    job = replace(JOB, adam_mini=converts | {"rules": (("*.weight", "tensor"),)})
    loaded = run_ranks(3, load_and_show, job, str(tmp_path))
    before, after = v_of(saved, saved_job), v_of(loaded, job)
    for name, value in after.items():
        expected = before[name].double().mean().expand(value.shape)
        torch.testing.assert_close(value, expected.float(), rtol=1e-6, atol=0)
    for options in ({"rules": (("*linear_qkv.weight", "row"),)}, {"preset": "paper"}):
        job = replace(JOB, adam_mini=converts | options)
        with pytest.raises(RankError) as caught:
            run_ranks(2, load_and_show, job, str(tmp_path))
        assert all("finer or cut otherwise" in text for _, text in caught.value.errors.values())


# Storage, and steps of all kinds.


def test_bits_are_those_of_a_run_without_offload() -> None:
    """Chunks on the host cut runs of rows; skipped steps, float64 sums, stochastic rounding."""
    job = replace(test_offload.JOB, adam_mini=SLIM | test_offload.SMALL)
    plain = run_ranks(4, test_offload.run, job)
    assert [updated for updated, *_ in plain[0]["outcomes"]] == [True, False, True, True]
    host = test_offload.offloaded(job, 0.5)
    test_offload.assert_same(plain, run_ranks(4, test_offload.run, host, True))


def given_steps(job: Job) -> Any:
    """Take steps with gradients that are the same in every layout."""
    trainer = Trainer(job)
    for step in range(job.steps):
        write(trainer, Grads(10.0**-step))
        trainer.optimizer.step()
        trainer.sync_params()
    return slices_of(trainer)


def test_noise_of_stochastic_rounding_is_that_of_the_element() -> None:
    options = SLIM | {"exp_avg_dtype": "bf16", "stochastic_rounding": True}
    job = replace(GIVEN, adam_mini=options, bf16=True)
    whole = whole_tensors(run_ranks(1, given_steps, job), "exp_avg", job)
    for other, world in ((job, 3), (replace(job, tp=2, bucket_size=None), 2)):
        found = whole_tensors(run_ranks(world, given_steps, other), "exp_avg", other)
        for name, value in whole.items():
            # Gate and up of each tensor-parallel rank are numbered one after the other.
            if other.tp == 1 or "linear_fc1" not in name:
                assert torch.equal(found[name], value), name


def test_a_single_phase_makes_the_same_step() -> None:
    job = replace(GIVEN, adam_mini=SLIM, tp=2, clip_grad=0.0)
    two = run_ranks(4, given_steps, job)
    one = run_ranks(4, given_steps, replace(job, adam_mini=SLIM | {"single_phase": True}))
    for key in ("param", "exp_avg", "v"):
        expected = whole_tensors(two, key, job)
        for name, value in whole_tensors(one, key, job).items():
            assert torch.equal(value, expected[name]), f"{key} {name}"


def refusals(jobs: list[Job]) -> list[str]:
    found = []
    for job in jobs:
        with pytest.raises(NotImplementedError) as caught:
            Trainer(job)
        found.append(str(caught.value))
        parallel_state_destroy()
    return found


def parallel_state_destroy() -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()


def test_columns_without_a_meaning_are_refused() -> None:
    experts = replace(GIVEN, experts=2, bias=False)
    interleaved = {"moe_mlp_glu_interleave_size": 8}
    jobs = [
        replace(experts, config_args=interleaved, adam_mini=SLIM),
    ]
    (found,) = run_ranks(1, refusals, jobs)
    assert "rows of gate and up alternate" in found[0]


# Offline.


def elements_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return Adam's v in a checkpoint, by key."""
    prefix = "optimizer.state.exp_avg_sq."
    return {k.removeprefix(prefix): v for k, v in read_all(folder).items() if k.startswith(prefix)}


@pytest.mark.parametrize("name", ["adam-tp2", "adam-experts"])
def test_adam_is_converted_to_columns_and_back(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    adam, job = saved(name, tmp_path_factory), SAVED[name][0]
    slim, back = str(tmp_path / "slim"), str(tmp_path / "adam")
    assert main(["convert", "--to", "adam-mini", "--preset", "slim", str(adam), slim]) == 0
    assert main(["verify", slim]) == 0
    assert main(["convert", "--to", "adam", slim, back]) == 0
    before, after = elements_of(adam), elements_of(Path(back))
    assert before.keys() == after.keys()
    slim_job = replace(job, adam_mini=SLIM)
    for key, value in after.items():
        old, new = layers_of(key, before[key]), layers_of(key, value)
        for (full, expected), (_, found) in zip(old, new, strict=True):
            if "eh_proj" not in full:
                mean = averaged(expected, labels_of(full, tuple(found.shape), slim_job))
                torch.testing.assert_close(found, mean.float(), rtol=1e-6, atol=0)
    assert inspect_of(slim)["adam_mini"]["preset"] == "slim"


def inspect_of(folder: str) -> dict[str, Any]:
    return inspect(Checkpoint(Path(folder)))


def test_what_a_run_saved_is_sound_and_no_state_of_the_public_package(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    slim = saved("mini-slim", tmp_path_factory)
    assert main(["verify", str(slim)]) == 0
    assert main(["convert", "--to", "adam", str(slim), str(tmp_path / "adam")]) == 0
    job = replace(MINI, adam_mini=SLIM | {"convert_partition": True})
    for folder in (slim, tmp_path / "adam"):
        (found,) = run_ranks(1, load_each, job, [str(folder)])
        v = whole_tensors([found[0]], "v", job)
        assert set(v) == set(whole_tensors([found[0]], "param", job))
        if folder == slim:
            expected = v
        for name, value in v.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=0)
    capsys.readouterr()
    assert main(["convert", "--to", "public", str(slim), str(tmp_path / "public.pt")]) != 0
    assert "v of columns" in capsys.readouterr().err


def test_faults_in_v_of_columns_are_found(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    slim = Checkpoint(saved("mini-slim", tmp_path_factory))
    prefix = "optimizer.adam_mini.v_"

    def changed(name: str, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> str:
        (tmp_path / name).mkdir()
        writer = CheckpointWriter(slim, tmp_path / name)
        writer.copy(list(slim.objects))
        for key in slim.tensors:
            value = change(key, slim.read(key))
            if value is not None:
                writer.add(key, tuple(value.shape), (0,) * value.ndim, value)
        writer.finish(slim.common)
        assert main(["verify", str(tmp_path / name)]) != 0
        return capsys.readouterr().out

    fc1 = f"{prefix}column.decoder.layers.0.mlp.linear_fc1.weight"
    qkv = f"{prefix}row.decoder.layers.0.self_attention.linear_qkv.weight"
    assert "do not agree" in changed("lost", lambda key, v: None if key == fc1 else v)
    assert "column sets" in changed("one", lambda key, v: v[:1] if key == fc1 else v)
    assert "hold others than 0" in changed("rows", lambda key, v: v + 1 if key == qkv else v)
