"""What every release of Megatron-Core, torch and Python is tried with, by ``tools/releases.sh``.

The suite runs on one release. This file has one small test for each promise that depends on the
release, at most four ranks each; its markers fill the section on releases of ``docs/support.md``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import megatron.core
import pytest
import torch

import megatron_adam_mini
from tests import crossing, test_checkpoint, test_overlapped_sums, test_standalone_ranks
from tests.megatron_job import Job
from tests.ranks import RankError, run_ranks, start_program
from tests.support import OF_OTHERS, OF_RELEASES, OTHERS, row_of
from tests.test_checkpoint import (
    ADAM_FORMATS,
    compare,
    compare_with_adam,
    load_and_show,
    train_adam_and_save,
    train_and_save,
)
from tests.test_compat import hooks_of_this_release
from tests.test_oracle import compare_runs, sharded_run, unsharded, world_of
from tests.test_step import bits_per_step
from tests.training_run import MODEL, SCHEDULE, Run, assert_same_state, make_dataset, train

ROOT = Path(__file__).resolve().parent.parent
RELEASE = megatron.core.__version__.partition("+")[0]
#: What this environment shows, as ``tests/support.py`` calls it.
ROW = row_of(RELEASE, torch.__version__.partition("+")[0], "{}.{}".format(*sys.version_info))
TIMEOUT_S = 240

BASE = Job(overlap=True, bucket_size=3000, steps=5)


def shows(column: str) -> pytest.MarkDecorator:
    """Mark a test as one that fills a cell of this row, or leave it out if there is no such."""
    if column in (OF_OTHERS if ROW in OTHERS else OF_RELEASES):
        return pytest.mark.support(ROW, column)
    return pytest.mark.skip(reason=f"the row {ROW!r} has no column {column!r}")


@shows("train")
def test_a_run_equals_the_unsharded_oracle() -> None:
    job = replace(BASE, tp=2)
    compare_runs(job, run_ranks(world_of(job, 2), sharded_run, job), unsharded(job))


@shows("release overlap")
def test_overlap_on_equals_overlap_off_bit_for_bit() -> None:
    job = Job(tp=2, bf16=True, steps=4)
    overlap = replace(job, overlap=True)
    plain, other, early = (
        run_ranks(4, test_overlapped_sums.run, variant)
        for variant in (job, overlap, test_overlapped_sums.overlapped(overlap))
    )
    for (bits, _), (same, _), (same_again, used) in zip(plain, other, early, strict=True):
        assert bits == same == same_again
        assert min(used) > 0


@shows("release reshard")
def test_saved_under_one_layout_loads_under_others(tmp_path: Path) -> None:
    job = replace(test_checkpoint.BASE, tp=2)
    saved = run_ranks(4, train_and_save, job, str(tmp_path))
    for other, world in ((replace(job, tp=1, pp=2), 2), (replace(job, tp=1), 3)):
        compare(saved, job, run_ranks(world, load_and_show, other, str(tmp_path)), other)


@shows("register")
def test_a_script_needs_no_megatron_training() -> None:
    """The wheel of 0.16.1 has none."""
    job = Job(bf16=True, overlap=True)
    with_it = run_ranks(2, bits_per_step, job)
    assert run_ranks(2, bits_without_megatron_training, job) == with_it


def bits_without_megatron_training(job: Job) -> list[str]:
    """Train where importing megatron.training fails as if it were not installed."""
    for name in [name for name in sys.modules if name.startswith("megatron.training")]:
        del sys.modules[name]
    sys.modules["megatron.training"] = None  # type: ignore[assignment]
    return bits_per_step(job)


@shows("neighbours")
@pytest.mark.skipif("ADAM_MINI_SAVED" not in os.environ, reason="tools/releases.sh saves them")
def test_checkpoints_of_neighbours_load() -> None:
    """Saved by the release before and the one after, each loaded under another layout.

    Since 0.19 a checkpoint has no file for its common state, which older releases ask for.
    """
    found = crossing.neighbours(Path(os.environ["ADAM_MINI_SAVED"]), RELEASE)
    assert len(found) > 1, "run tools/releases.sh with several releases"
    job = replace(crossing.JOB, tp=1, pp=2)
    mine = (found[RELEASE][0] / "common.pt").exists()
    for folder, held in found.values():
        if mine and not (folder / "common.pt").exists():
            with pytest.raises(RankError, match=r"common.pt does not exist"):
                run_ranks(2, load_and_show, job, str(folder))
            continue
        compare(held, crossing.JOB, run_ranks(2, load_and_show, job, str(folder)), job)


@shows("adam")
@pytest.mark.parametrize("sharding", ["fully_reshardable", "dp_reshardable"])
def test_adam_checkpoint_gives_its_masters_and_m_and_the_mean_of_v(
    sharding: str, tmp_path: Path
) -> None:
    adam_job = replace(ADAM_FORMATS[sharding][0], pp=1, layers=2)
    adam = run_ranks(4, train_adam_and_save, adam_job, str(tmp_path), sharding)
    job = replace(adam_job, optimizer="adam_mini")
    compare_with_adam(adam, adam_job, run_ranks(2, load_and_show, job, str(tmp_path)), job)


@shows("adam")
def test_what_is_known_of_megatrons_own_format_is_true(tmp_path: Path) -> None:
    test_checkpoint.test_megatron_writes_fully_reshardable_state_as_compat_says(tmp_path)


@shows("experts")
def test_experts_equal_the_unsharded_oracle_and_reshard(tmp_path: Path) -> None:
    job = replace(BASE, experts=4, tp=2, ep=2, etp=1)
    compare_runs(job, run_ranks(4, sharded_run, job), unsharded(job))
    saved_job = replace(test_checkpoint.BASE, layers=2, experts=4, ep=2)
    saved = run_ranks(2, train_and_save, saved_job, str(tmp_path))
    other = replace(saved_job, ep=1, pp=2)
    compare(saved, saved_job, run_ranks(2, load_and_show, other, str(tmp_path)), other)


@shows("plain")
def test_plain_pytorch_trains_and_reshards(tmp_path: Path) -> None:
    for layout in (("fsdp", 3, {}, None), ("tp", 2, {}, [32]), ("fsdp tp", 4, {}, None)):
        test_standalone_ranks.test_blocks_are_completed_over_the_mesh(*layout)
    # Not with "fsdp": on gloo, torch 2.8 adds its ranks' gradients instead of averaging them. Steps
    # do not depend on the scale of gradients, but a run that goes on under another layout does.
    test_standalone_ranks.test_a_distributed_checkpoint_loads_under_another_layout(
        "tp", 2, "none", 1, tmp_path
    )


# With megatron.training.


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("data") / "text")


@shows("resume")
@shows("launch")
def test_a_run_by_the_launcher_is_resumed_bit_for_bit(data: str, tmp_path: Path) -> None:
    def go(flags: str, optimizer: str = "adam_mini") -> Any:
        seen = run_ranks(2, train, Run(f"{data} {flags}", optimizer))
        assert [s.error for s in seen] == [None, None]
        return seen

    straight = go("")
    go(f"--save {tmp_path} --exit-interval 4")
    resumed = go(f"--load {tmp_path}")
    assert {seen.iterations[0] for seen in resumed} == {4}
    for before, after in zip(straight, resumed, strict=True):
        assert_same_state(before.end, after.end)


@shows("register")
def test_all_that_is_wrapped_exists_and_is_restored() -> None:
    (found,) = run_ranks(1, hooks_of_this_release)
    assert len(found) == (15 if RELEASE == "0.16.1" else 16)
    assert found == dict.fromkeys(found, True)
    (same,) = run_ranks(1, names_after_registration)
    assert same == {"wrapped": True, "where it was imported": True, "restored": True}


def names_after_registration() -> dict[str, bool]:
    """Register when a script has imported Megatron's function by name already."""
    from megatron.core import optimizer
    from megatron.training import training

    original = training.get_megatron_optimizer
    handle = megatron_adam_mini.register()
    facts = {
        "wrapped": handle is megatron_adam_mini.register(),
        "where it was imported": training.get_megatron_optimizer
        is optimizer.get_megatron_optimizer,
    }
    handle.undo()
    facts["restored"] = training.get_megatron_optimizer is original
    return facts


@shows("patch")
def test_a_patched_tree_trains_without_the_launcher(data: str, tmp_path: Path) -> None:
    """The release's own files; nothing but the patch registers Adam-mini."""
    (installed,) = run_ranks(1, folder_of_training)
    shutil.copytree(installed, tmp_path / "megatron/training")
    line = ".".join(RELEASE.split(".")[:2])
    (patch,) = (ROOT / "patches").glob(f"*core_v{line}.patch")
    subprocess.run(
        ["git", "apply", str(patch)],
        cwd=tmp_path,
        env=os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)},
        check=True,
    )
    flags = f"{MODEL} {SCHEDULE} {data} --bf16 --optimizer adam_mini".split()
    log = tmp_path / "log"
    with start_program(2, run_patched, str(tmp_path), flags, log=log, folder=ROOT) as run:
        assert run.wait(TIMEOUT_S) == 0, run.output()[-4000:]
    text = run.output()
    assert f"tree: {tmp_path}" in text
    assert "adam_mini_preset" in text  # in the list of arguments
    assert text.count(" lm loss: ") == 8


def folder_of_training() -> str:
    import megatron.training

    return str(Path(megatron.training.__file__).parent)


def run_patched(tree: str, flags: list[str]) -> None:
    """Run the example on the patched files, as a script that knows nothing of Adam-mini."""
    import runpy

    import megatron

    from megatron_adam_mini import cpu_host
    from tests import older_megatron

    for name in [name for name in sys.modules if name.partition(".training")[0] == "megatron"]:
        if name != "megatron":
            del sys.modules[name]
    sys.path.insert(0, tree)
    megatron.__path__ = [f"{tree}/megatron", *megatron.__path__]
    import megatron.training

    print("tree:", megatron.training.__file__)
    older_megatron.install()
    sys.path.insert(0, str(ROOT / "examples"))
    sys.argv = ["examples/pretrain_llama.py", *cpu_host.with_cpu_flags(flags)]
    runpy.run_path(sys.argv[0], run_name="__main__")
