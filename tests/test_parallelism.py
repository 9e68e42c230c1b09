"""Layouts that only the command line gives, through Megatron's own training loop.

One rank trains and saves. It goes on, and so do runs under each layout: they load that checkpoint,
and must end with the same weights. The rows of the same features against the oracle are in
``test_oracle.py``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.ranks import run_ranks
from tests.training_run import Run, Seen, make_dataset, train

# Gradients that were added in another order, in float32, over four steps of training; relative to
# the largest weight of a tensor.
WEIGHT_TOLERANCE = 2e-5
#: Weights move by more than this times the largest in these steps.
MOVED = 1e-2

MODEL = "--num-layers 4 --global-batch-size 4"

LAYOUTS = {
    "context parallel": ("--context-parallel-size 2", 2),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Seen]:
    """Return the flags that load a checkpoint of iteration 2, and the run that went on."""
    folder = tmp_path_factory.mktemp("parallelism")
    flags = f"{MODEL} {make_dataset(folder / 'text')} --save {folder / 'saved'} --save-interval 2"
    (seen,) = run_ranks(1, train, Run(f"{flags} --exit-interval 2", bf16=False))
    assert seen.error is None
    flags = f"{MODEL} {make_dataset(folder / 'text')} --load {folder / 'saved'} --exit-interval 6"
    (straight,) = run_ranks(1, train, Run(flags, bf16=False))
    return flags, straight


def weights(ranks: list[Seen], when: str) -> dict[str, np.ndarray]:
    """Return all weights of a run without tensor parallelism; copies must be bit-equal."""
    found: dict[str, Any] = {}
    for rank in ranks:
        assert rank.error is None
        for name, value in getattr(rank, when)["weights"].items():
            assert np.array_equal(found.setdefault(name, value), value), name
    return found


@pytest.mark.support({"context parallel": "context parallelism"}, "reshard")
@pytest.mark.parametrize("case", LAYOUTS)
def test_a_run_goes_on_as_on_one_rank(case: str, saved: tuple[str, Seen]) -> None:
    layout, world = LAYOUTS[case]
    flags, straight = saved
    ranks = run_ranks(world, train, Run(f"{flags} {layout}", bf16=False))
    assert {rank.iterations for rank in ranks} == {(2, 6)}
    start, end = weights(ranks, "start"), weights(ranks, "end")
    assert end.keys() == straight.end["weights"].keys()
    for name, expected in straight.end["weights"].items():
        assert np.array_equal(start[name], straight.start["weights"][name]), name
        largest = np.abs(expected).max()
        assert np.abs(end[name] - expected).max() <= WEIGHT_TOLERANCE * largest, name
        assert np.abs(end[name] - start[name]).max() > MOVED * largest, name
