"""The harness of distributed tests: errors are kept by rank, nothing waits for ever or is left."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from tests.megatron_job import Job
from tests.ranks import RankError, run_ranks, start_program
from tests.test_checkpoint import train_and_save


def own_rank() -> int:
    from torch import distributed

    return distributed.get_rank()


def raise_on_rank_one() -> None:
    if own_rank() == 1:
        raise ValueError("an odd rank")


def die_on_rank_one() -> None:
    if own_rank() == 1:
        print("last words", flush=True)
        os._exit(3)


def wait_for_rank_one() -> None:
    from torch import distributed

    if own_rank() == 1:
        time.sleep(600)
    distributed.barrier()


def test_results_are_in_the_order_of_ranks() -> None:
    assert run_ranks(3, own_rank) == [0, 1, 2]


def test_every_call_has_processes_of_its_own() -> None:
    (first,), (second,) = run_ranks(1, os.getpid), run_ranks(1, os.getpid)
    assert len({first, second, os.getpid()}) == 3


def imported_by_a_run(folder: str) -> list[str]:
    before = set(sys.modules)
    train_and_save(Job(steps=1), folder)
    return sorted(sys.modules.keys() - before)


def test_a_run_finds_all_imported(tmp_path: Path) -> None:
    """What is missing in ``preload`` is imported by every rank of hundreds of runs."""
    assert run_ranks(1, imported_by_a_run, str(tmp_path)) == [[]]


def test_errors_are_kept_by_rank() -> None:
    with pytest.raises(RankError, match="raise_on_rank_one") as caught:
        run_ranks(2, raise_on_rank_one)
    assert caught.value.errors == {1: ("ValueError", "an odd rank")}


def test_a_rank_that_dies_is_named_with_its_output() -> None:
    with pytest.raises(RankError, match="last words") as caught:
        run_ranks(2, die_on_rank_one)
    assert caught.value.errors == {1: ("Died", "exit code 3")}


def test_ranks_that_wait_are_killed_and_show_where() -> None:
    begun = time.monotonic()
    with pytest.raises(RankError, match="in wait_for_rank_one") as caught:
        run_ranks(2, wait_for_rank_one, timeout=5)
    assert time.monotonic() - begun < 60
    assert {kind for kind, _ in caught.value.errors.values()} == {"Timeout"}


def say_and_sleep(seconds: float) -> None:
    from torch import distributed

    distributed.init_process_group("gloo")  # finds its peers by the environment
    distributed.barrier()
    print(f"rank {own_rank()} in {Path.cwd()}", flush=True)  # in one piece
    time.sleep(seconds)
    if own_rank() == 1:
        raise ValueError("an odd rank")


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_program_that_is_killed(tmp_path: Path) -> None:
    with start_program(2, say_and_sleep, 600, log=tmp_path / "log", folder=tmp_path) as run:
        run.wait_until(lambda: run.output().count(f"in {tmp_path}") == 2, timeout=60)
        family = run.family()
        assert len(family) == 2
        assert all(map(alive, family))
        assert run.poll() is None
    assert not any(map(alive, family))


def test_a_program_that_fails(tmp_path: Path) -> None:
    with start_program(2, say_and_sleep, 0, log=tmp_path / "log", folder=tmp_path) as run:
        assert run.wait(timeout=60) == 1
    assert "ValueError: an odd rank" in run.output()


def test_a_program_that_waits_shows_where(tmp_path: Path) -> None:
    with start_program(2, say_and_sleep, 600, log=tmp_path / "log", folder=tmp_path) as run:
        run.wait_until(lambda: run.output().count("rank") == 2, timeout=60)
        with pytest.raises(AssertionError, match="in say_and_sleep"):
            run.wait(timeout=0)
