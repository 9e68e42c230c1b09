"""``benchmarks/second_moments.py``: what it says of v whose blocks are known."""

from __future__ import annotations

import pytest
import torch

from benchmarks.second_moments import CASES, candidates, share_within, snr

#: Four rows of a scale each, and elements of a row that are 1 and 3 times as large.
V = torch.tensor([1.0, 10.0, 100.0, 1000.0])[:, None] * torch.tensor([1.0, 3.0])


def test_blocks_are_rows_columns_heads_and_the_whole_part():
    found = candidates(V, head_rows=2)
    assert {name: tuple(blocks.shape) for name, blocks in found.items()} == {
        "row": (4, 2),
        "column": (2, 4),
        "head": (2, 4),
        "whole": (1, 8),
    }
    assert found["head"][1].tolist() == [100.0, 300.0, 1000.0, 3000.0]
    assert candidates(V[:, :1], head_rows=None).keys() == {"whole"}


def test_snr_and_share_within_blocks():
    found = candidates(V, head_rows=2)
    assert snr(found["row"]) == pytest.approx(2.0**2 / 1.0)
    assert snr(found["whole"]) < snr(found["column"]) < snr(found["row"])
    assert share_within(found["whole"]) == pytest.approx(1.0)
    # What varies between rows varies within columns, and the other way round.
    assert share_within(found["row"]) + share_within(found["column"]) == pytest.approx(1.0)
    assert share_within(found["row"]) < 0.1


@pytest.mark.parametrize("case", CASES)
def test_every_part_is_listed_once(case):
    _, _, weights = CASES[case]
    places = [(weight.end, part.name) for weight in weights for part in weight.parts]
    assert len(places) == len(set(places))
