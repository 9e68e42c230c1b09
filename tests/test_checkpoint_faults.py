"""Damaged checkpoints: every rank says what is wrong and where, and nothing is loaded."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_adam_mini.checkpoint.reader import Checkpoint
from megatron_adam_mini.checkpoint.writer import CheckpointWriter
from tests.megatron_job import Job, Trainer
from tests.ranks import RankError, run_ranks
from tests.test_checkpoint import load, metadata_of, model_state, train_and_save
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
    tensors = Checkpoint(folder).tensors
    chunk = max(
        (c for key, t in tensors.items() if "exp_avg" in key for c in t.chunks),
        key=lambda c: c.length,
    )
    data = bytearray(chunk.path.read_bytes())
    data[chunk.position + chunk.length // 2] ^= 0x10
    chunk.path.write_bytes(data)
    return chunk.path.name


@pytest.mark.support("damaged or malicious checkpoints are refused", "test")
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


# Code in a checkpoint.


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def in_metadata(folder: Path, evil: Evil) -> None:
    metadata = Checkpoint(folder).metadata
    metadata.version = evil
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def in_common_state(folder: Path, evil: Evil) -> None:
    rewrite(folder, lambda writer, common: writer.finish({**common, "evil": evil}))


def in_another_object(folder: Path, evil: Evil) -> None:
    """As the state of a random number generator is."""

    def add(writer: CheckpointWriter, common: dict[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save([evil], buffer)
        writer._place("rng_state/shard_0_1", (), (), buffer.getbuffer())
        writer._entries["rng_state/shard_0_1"] = BytesStorageMetadata()
        writer.finish(common)

    rewrite(folder, add)


def rewrite(folder: Path, finish: Any) -> None:
    source, result = Checkpoint(folder), folder.with_name("changed")
    result.mkdir()
    writer = CheckpointWriter(source, result)
    writer.copy([*source.tensors, *source.objects])
    finish(writer, source.common)
    shutil.rmtree(folder)
    result.rename(folder)


def load_rng_too(job: Job, folder: str, checked: bool) -> list[str]:
    """Load as Megatron does, with an entry that is no tensor; return what stopped each part."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedObject
    from megatron.training import global_vars

    trainer = Trainer(job)
    if not checked:
        # As --adam-mini-no-file-check does.
        global_vars.set_args(Namespace(optimizer="adam_mini", adam_mini_check_files=False))
    before = state_bits(trainer)
    errors = []
    for read in (
        dist_checkpointing.load_common_state_dict,
        dist_checkpointing.load_content_metadata,
    ):
        try:
            read(folder)
        except ValueError as error:
            errors.append(str(error))
    metadata = metadata_of(None)
    state = model_state(trainer, metadata)
    state["optimizer"] = trainer.optimizer.sharded_state_dict(state, is_loading=True)
    state["rng"] = ShardedObject("rng_state", None, (1,), (0,), replica_id=0)
    try:
        dist_checkpointing.load(state, folder, strict="log_all")
    except (ValueError, RuntimeError) as error:
        errors.append(str(error))
    assert state_bits(trainer) == before or not checked, "something was loaded"
    return errors


@pytest.mark.support("damaged or malicious checkpoints are refused", "test")
@pytest.mark.parametrize("put", [in_metadata, in_common_state, in_another_object])
def test_code_in_a_checkpoint_is_refused_before_it_runs(
    put: Any, saved: Path, tmp_path: Path
) -> None:
    folder, mark = shutil.copytree(saved, tmp_path / "copy"), tmp_path / "evil-was-here"
    put(folder, Evil(mark))
    for errors in run_ranks(2, load_rng_too, JOB, str(folder), True, timeout=60):
        assert len(errors) == (1 if put is in_another_object else 3), errors
        for text in errors:
            assert "posix.mkdir" in text
            assert str(folder) in text
    assert not mark.exists()


@pytest.mark.parametrize("put", [in_metadata, in_common_state, in_another_object])
def test_without_the_file_check_megatron_runs_it(put: Any, saved: Path, tmp_path: Path) -> None:
    """Or the test above would prove nothing, and the documentation would be wrong."""
    folder, mark = shutil.copytree(saved, tmp_path / "copy"), tmp_path / "evil-was-here"
    put(folder, Evil(mark))
    job = replace(JOB, adam_mini={"check_files": False})
    with contextlib.suppress(RankError):
        run_ranks(1, load_rng_too, job, str(folder), False, timeout=60)
    assert mark.exists()
