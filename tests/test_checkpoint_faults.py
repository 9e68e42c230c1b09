"""Damaged checkpoints: every rank says what is wrong and where, and nothing is loaded."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.megatron_job import Job, Trainer
from tests.ranks import RankError, run_ranks
from tests.test_checkpoint import load, train_and_save
from tests.test_step import state_bits

JOB = Job(layers=1, bf16=True, overlap=True, bucket_size=3000, steps=2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(2, train_and_save, JOB, str(folder))
    return folder


def load_damaged(job: Job, folder: str) -> None:
    trainer = Trainer(job)
    before = state_bits(trainer)
    try:
        load(trainer, folder)
    finally:
        assert state_bits(trainer) == before, "something was loaded"


def largest(folder: Path) -> Path:
    """Return a file of state; rank 0's first also holds the common state, see below."""
    return max(folder.glob("__1_*.distcp"), key=lambda path: path.stat().st_size)


def truncate(folder: Path) -> str:
    path = largest(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path.name


def remove(folder: Path) -> str:
    path = largest(folder)
    path.unlink()
    return path.name


def empty(folder: Path) -> str:
    path = largest(folder)
    path.write_bytes(b"")
    return path.name


def flip_bits(folder: Path) -> str:
    """Flip one bit in the middle of the data of some tensor."""
    from megatron_adam_mini.offline.reader import Checkpoint

    tensors = Checkpoint(folder).tensors
    chunk = max(
        (c for key, t in tensors.items() if "exp_avg" in key for c in t.chunks),
        key=lambda c: c.length,
    )
    data = bytearray(chunk.path.read_bytes())
    data[chunk.position + chunk.length // 2] ^= 0x10
    chunk.path.write_bytes(data)
    return chunk.path.name


@pytest.mark.parametrize("damage", [truncate, remove, empty, flip_bits])
def test_damaged_shard_file_is_named_on_all_ranks(damage: Any, saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "copy")
    name = damage(folder)
    with pytest.raises(RankError) as caught:
        run_ranks(2, load_damaged, JOB, str(folder), timeout=60)
    assert len(caught.value.errors) == 2, "a rank did not raise"
    for kind, text in caught.value.errors.values():
        assert kind in ("CorruptError", "RuntimeError"), (kind, text)
        assert name in text


@pytest.mark.parametrize("name", [".metadata", "metadata.json", "__0_0.distcp"])
@pytest.mark.parametrize("cut", [True, False])
def test_damaged_metadata_is_an_error_on_all_ranks(
    name: str, cut: bool, saved: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(saved, tmp_path / "copy")
    path = folder / name
    if cut:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.unlink()
    with pytest.raises(RankError) as caught:
        run_ranks(2, load_damaged, JOB, str(folder), timeout=60)
    assert len(caught.value.errors) == 2
    assert all(kind != "Timeout" for kind, _ in caught.value.errors.values())


def test_undamaged_copy_loads(saved: Path, tmp_path: Path) -> None:
    """Or the tests above would prove nothing."""
    folder = shutil.copytree(saved, tmp_path / "copy")
    with pytest.raises(RankError, match="something was loaded"):
        run_ranks(2, load_damaged, JOB, str(folder))


def test_file_check_can_be_switched_off(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "copy")
    flip_bits(folder)
    job = replace(JOB, adam_mini={"check_files": False})
    with pytest.raises(RankError, match="something was loaded"):
        run_ranks(2, load_damaged, job, str(folder))
