"""One v per column in Megatron: checkpoints, other partitions, storage, what is refused.

Steps are compared with the oracle in ``test_oracle``, plans in ``test_layout`` and its neighbours.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import test_parameter_state
from tests.gather import whole_tensors
from tests.megatron_job import Job
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
from tests.test_oracle import labels_of

SLIM = {"preset": "slim"}
JOB = replace(BASE, adam_mini=SLIM)


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
