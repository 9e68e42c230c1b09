"""``ordered_sum_`` of plain torch and C++, against Python's own additions in float64.

Triton's is compared with them in ``triton_parity.py``.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adam_mini.kernels import cpu, reference
from megatron_adam_mini.plan.ordered_sums import OrderedSums

INF, NAN = float("inf"), float("nan")


def table_of(rows: list[tuple[int, list[int]]]) -> OrderedSums:
    """Return a table from targets with their sources."""
    return OrderedSums(
        np.asarray([target for target, _ in rows], dtype=np.int64),
        np.asarray([len(sources) for _, sources in rows], dtype=np.int64),
        np.asarray([at for _, sources in rows for at in sources], dtype=np.int64),
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[float], list[tuple[int, list[int]]]]:
    """Values, and rows whose targets are among the last of them, in any order."""
    numbers = st.floats(-(2.0**40), 2.0**40, width=32)
    values = draw(st.lists(numbers, min_size=1, max_size=8))
    targets = draw(st.permutations(range(len(values), len(values) + draw(st.integers(0, 5)))))
    source = st.lists(st.integers(0, len(values) - 1), max_size=6)
    return values, [(target, draw(source)) for target in targets]


@settings(deadline=None)
@given(cases())
def test_rows_are_added_from_left_to_right(case):
    given_values, rows = case
    values = torch.tensor([*given_values, *[7.0] * (len(rows) + 1)])
    expected = values.tolist()
    for target, sources in rows:
        total = 0.0
        for at in sources:
            total += given_values[at]
        expected[target] = total
    for kernels in (reference, cpu):
        found = values.clone()
        kernels.ordered_sum_(found, table_of(rows))
        assert torch.equal(found, torch.tensor(expected, dtype=torch.float64).float())


@pytest.mark.parametrize("kernels", [reference, cpu])
def test_the_order_of_sources_alone_counts(kernels):
    # In float64, (2**53 + 1) + 1 loses both ones and (1 + 1) + 2**53 keeps them.
    values = torch.tensor([2.0**53, 1.0, 1.0, -(2.0**53), NAN, NAN])
    kernels.ordered_sum_(values, table_of([(5, [1, 2, 0, 3]), (4, [0, 1, 2, 3])]))
    assert values[4:].tolist() == [0.0, 2.0]


@pytest.mark.parametrize("kernels", [reference, cpu])
def test_a_row_without_sources_is_zero_also_next_to_non_finite_values(kernels):
    values = torch.tensor([INF, NAN, 3.0, *[NAN] * 4, 5.0])
    kernels.ordered_sum_(values, table_of([(3, []), (6, [0, 2]), (4, [2]), (5, [1, 2])]))
    assert values[3:5].tolist() == [0.0, 3.0]
    assert not values[5:7].isfinite().any()
    assert values[7] == 5.0


def test_threads_change_no_bit():
    """More rows than one thread takes."""
    generator = np.random.default_rng(0)
    values = torch.from_numpy(generator.random(1000, dtype=np.float32))
    counts = generator.integers(0, 4, 40_000)
    sources = generator.integers(0, 1000, counts.sum())
    table = OrderedSums(1000 + generator.permutation(40_000), counts, sources)
    found = [torch.cat([values, torch.full((40_000,), NAN)]) for _ in range(3)]
    threads = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            cpu.ordered_sum_(found[number - 1], table)
    finally:
        torch.set_num_threads(threads)
    reference.ordered_sum_(found[2], table)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
