"""What happens before the first step: kernels and tables, and ranks that cannot make them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megatron_adam_mini.decision import Decision
from megatron_adam_mini.exchange import alone
from megatron_adam_mini.kernels import cpu, reference
from megatron_adam_mini.kernels.toolchain import describe_toolchain
from megatron_adam_mini.optimizer import AdamMini
from megatron_adam_mini.overlapped_sums import Bucket, OverlappedSums
from megatron_adam_mini.plan.derived_tables import DerivedTables
from tests.megatron_job import Job, Trainer
from tests.ranks import RankError, run_ranks
from tests.warm_up import HALF_ON_THE_HOST, MODES, assert_unchanged, lasting, make_rank

TINY = {"layers": 1, "hidden": 16}


IN_ONE_PROCESS = [mode for mode in MODES if mode != HALF_ON_THE_HOST]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("mode", IN_ONE_PROCESS)
def test_a_warm_up_writes_nothing_that_lasts(mode: str, backend: str) -> None:
    """``tests/triton_parity.py`` does the same with interpreted kernels."""
    check_what_is_written(mode, backend)


@pytest.mark.parametrize("mode", IN_ONE_PROCESS)
def test_the_first_step_makes_no_tables(mode: str) -> None:
    check_tables(mode)


@pytest.mark.parametrize("mode", IN_ONE_PROCESS)
def test_the_first_step_compiles_nothing(mode: str) -> None:
    pytest.importorskip("triton")
    check_launches(mode)


def test_the_same_with_state_on_the_host() -> None:
    run_ranks(1, check_with_state_on_the_host)


def check_with_state_on_the_host() -> None:
    for backend in ("cpu", "reference"):
        check_what_is_written(HALF_ON_THE_HOST, backend)
    check_tables(HALF_ON_THE_HOST)
    check_launches(HALF_ON_THE_HOST)


def test_sums_behind_the_first_backward_pass_make_no_tables() -> None:
    run_ranks(1, check_tables_of_overlapped_sums)


def check_tables_of_overlapped_sums() -> None:
    optimizer = make_rank("columns", "cpu")
    plan, buffers = optimizer.plan, optimizer.buffers
    late = [blocks.info.role == "embedding" for blocks in plan.parameters]
    sums = OverlappedSums(plan, buffers, cpu, late, device=optimizer.device)
    optimizer.overlapped_sums = sums
    for buffer in buffers:
        buffer.grad.nan_to_num_()
    optimizer.warm_up(clip_grad=1.0)
    buckets = [Bucket(n, i) for n, b in enumerate(plan.buffers) for i in range(len(b.slices))]
    with without_new_tables():
        sums.take(buckets, lambda: None)
        sums.complete(range(len(buffers)))
        take_step(optimizer)
    assert sums.used == len(buckets)


def check_what_is_written(mode: str, backend: str) -> None:
    optimizer = make_rank(mode, backend)
    before = lasting(optimizer)
    assert optimizer.warm_up(clip_grad=1.0, inv_scale=torch.tensor([0.5]))
    assert_unchanged(optimizer, before)


def check_tables(mode: str) -> None:
    optimizer = make_rank(mode, "cpu")
    optimizer.warm_up(clip_grad=1.0)
    before = lasting(optimizer)
    with without_new_tables():
        take_step(optimizer)
    with pytest.raises(AssertionError):  # it was a step, so these tests can fail
        assert_unchanged(optimizer, before)


@contextmanager
def without_new_tables() -> Iterator[None]:
    with patch.object(
        DerivedTables, "derived", lambda table, *made: table._derived[made[0], made[1:]]
    ):
        yield


def check_launches(mode: str) -> None:
    from megatron_adam_mini.kernels import triton_gpu, triton_launch_tables

    optimizer = make_rank(mode, "reference")
    optimizer.kernels = triton_gpu
    with recorded_launches(triton_gpu) as compiled:
        optimizer.warm_up(clip_grad=1.0, inv_scale=torch.tensor([1.0]))
        assert compiled
        known = set(compiled)
        with patch.object(triton_launch_tables, "to_device", None):  # it makes no tables either
            take_step(optimizer)
    assert compiled == known


def take_step(optimizer: AdamMini) -> None:
    """Take a step as Megatron's optimizer does, but alone."""
    for group in optimizer.main_params.param_groups:
        group["lr"] = 1e-3
    for buffer in optimizer.buffers:
        if buffer.grad.isnan().any():
            buffer.grad.nan_to_num_()
    with alone(), torch.no_grad():
        if optimizer.config.single_phase:
            optimizer.sum_squares_of_cut_blocks()
            decision = Decision()
        else:
            inv_scale = torch.tensor([1.0])
            decision = optimizer.decide(optimizer.sum_squares(), clip_grad=1.0, inv_scale=inv_scale)
        optimizer.update(decision)
        assert optimizer.finish(decision).updated


@contextmanager
def recorded_launches(triton_gpu: Any) -> Iterator[set[tuple[Any, ...]]]:
    """Record what Triton would compile, and let nothing be computed."""
    found: set[tuple[Any, ...]] = set()

    def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        kinds = [
            (value.dtype, value.data_ptr() % 16 == 0) if torch.is_tensor(value) else type(value)
            for value in arguments
        ]
        if programs:
            found.add((kernel.fn.__name__, tuple(kinds), tuple(sorted(constants.items()))))

    with (
        patch.object(triton_gpu, "launch", launch),
        patch.object(triton_gpu, "on_device_of", lambda _: nullcontext()),
    ):
        yield found


@pytest.mark.parametrize("freed", ["grad", "weight"])
def test_a_warm_up_without_memory_does_nothing(freed: str) -> None:
    """As where reinforcement learning frees a model's buffers before it makes the optimizer."""
    optimizer = make_rank("fp32 weights", "cpu")
    getattr(optimizer.buffers[0], freed).untyped_storage().resize_(0)
    with patch.object(cpu, "segment_sum_sq_", None):
        assert not optimizer.warm_up()


# Ranks that cannot compile.


def build_with_broken_kernel(name: str, odd: int) -> None:
    rank = int(os.environ["RANK"])
    cpu.NAME = "triton"  # where a rank that cannot compile is told from other errors

    def broken(*_: Any) -> None:
        raise RuntimeError("Failed to find C compiler.")

    if rank == odd:
        setattr(cpu, name, broken)
    Trainer(Job(**TINY))


@pytest.mark.parametrize(("name", "odd"), [("update_", 1), ("norm_partials_", 0)])
def test_all_ranks_report_one_that_cannot_compile(name: str, odd: int) -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(2, build_with_broken_kernel, name, odd)
    assert set(caught.value.errors) == {0, 1}
    for rank, (kind, text) in caught.value.errors.items():
        assert kind == "RuntimeError"
        if rank != odd:
            assert text.startswith(
                "Adam-mini could not allocate its state, prepare a step or write its manifest: "
                f"rank {odd} found RuntimeError: Adam-mini's Triton kernels cannot be compiled"
            )
        for part in ("Failed to find C compiler.", "TRITON_CACHE_DIR", "Remedy: "):
            assert part in text


def test_a_rank_without_memory_is_reported_as_such() -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(2, build_without_memory)
    (_, own), (kind, other) = (caught.value.errors[rank] for rank in (1, 0))
    assert own == "CUDA out of memory."
    assert kind == "RuntimeError"
    assert other.endswith("rank 1 found OutOfMemoryError: CUDA out of memory.")


def build_without_memory() -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    if os.environ["RANK"] == "1":
        reference.update_ = full
    Trainer(Job(**TINY, adam_mini={"backend": "reference"}))


def test_what_is_missing_is_named(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", "/no/such/cc")
    text = describe_toolchain()
    assert f"TRITON_CACHE_DIR={tmp_path}/cache, which is writable" in text
    assert "CC=/no/such/cc (missing)" in text

    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(file / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    text = describe_toolchain()
    assert f"but {file} is not writable" in text
    assert "CC is not set and neither gcc nor clang is there" in text
    assert f"{tmp_path}/Python.h (missing)" in text
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    assert f"{tmp_path}/.triton/cache (TRITON_CACHE_DIR is not set)" in describe_toolchain()
