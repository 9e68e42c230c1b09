"""Kernels over columns against matrices and loops over elements in float64.

Triton's kernels run in its interpreter, in ``test_triton.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_adam_mini import rounding
from megatron_adam_mini.config import BACKENDS
from megatron_adam_mini.kernels import cpu, reference, select_backend
from megatron_adam_mini.kernels.column_tiles import (
    RECTANGLE_FIELDS,
    SUMS_FIELDS,
    Cut,
    rectangles,
    sums,
)
from megatron_adam_mini.plan.column_table import ColumnTable
from megatron_adam_mini.plan.segment_table import SegmentTable
from tests.test_kernels import (
    BETA1,
    CPU,
    NAN,
    STORAGE,
    SUM_RTOL,
    UPDATE_TOL,
    assert_equal_bits,
    bits,
    elements_of,
    groups_of,
    is_stochastic,
    m_of,
    noise,
    positive,
    scalars_of,
    scales_of,
    tensors_of,
    unchanged,
    vectors_of,
    writes_segments_only,
)

#: Runs: gap before it, elements, width, elements of the run that are elsewhere, and the gap in the
#: state if it is another one. The last number is the gap at the end of the buffer.
LAYOUTS = {
    "matrix": ([(0, 12 * 32, 32, 0)], 0),
    "within rows": ([(3, 100, 17, 0), (5, 64, 16, 0, 2)], 4),
    "shorter than a row": ([(1, 5, 9, 0), (0, 300, 1000, 0), (0, 1, 1, 0)], 1),
    "narrow": ([(0, 700, 1, 0), (2, 901, 2, 0), (1, 640, 3, 0, 9), (1, 1111, 100, 0)], 0),
    "wide": ([(7, 9000, 2500, 0, 0), (64, 16_384 + 5, 16_384, 0, 3)], 0),
    "tall": ([(0, 300_007, 272, 0)], 9),
    "none": ([], 10),
    "empty slice": ([], 0),
}
#: Parts of runs, which are updated but not summed.
PARTS = {
    "parts": ([(0, 33, 8, 5), (4, 64, 16, 32, 1), (0, 3, 8, 79)], 2),
    "wide parts": ([(1, 9000, 4096, 4000), (0, 2100, 1025, 77_777, 8)], 0),
}
SMALL = [name for name in (*LAYOUTS, *PARTS) if name not in ("wide", "tall", "wide parts")]

#: Rows of the whole parameter from one row of a run to the next; of numbers 32 bits count.
STRIDES = (1, 3, 2**32 + 7)


@dataclass
class Runs:
    """Runs in a buffer and in the state; their entries are some of vectors with more entries.

    Has what the helpers for :class:`tests.test_kernels.Layout` ask for.
    """

    pieces: list[tuple[int, ...]]
    tail: int = 0

    @cached_property
    def starts(self) -> list[int]:
        return self._starts([piece[0] for piece in self.pieces])

    @cached_property
    def state_starts(self) -> list[int]:
        return self._starts([piece[4] if len(piece) > 4 else piece[0] for piece in self.pieces])

    def _starts(self, gaps: list[int]) -> list[int]:
        found, end = [], 0
        for gap, (_, numel, *_) in zip(gaps, self.pieces, strict=True):
            found.append(end + gap)
            end = found[-1] + numel
        return found

    @property
    def numel(self) -> int:
        return max([a + p[1] for a, p in zip(self.starts, self.pieces, strict=True)] or [0]) + (
            self.tail
        )

    @property
    def state_numel(self) -> int:
        ends = [a + p[1] for a, p in zip(self.state_starts, self.pieces, strict=True)]
        return max(ends or [0]) + self.tail

    @property
    def in_place(self) -> Runs:
        """The same with state that lies where its buffer does."""
        return Runs([piece[:4] for piece in self.pieces], self.tail)

    @cached_property
    def index(self) -> list[int]:
        """Each run's first entry; two are free before it."""
        found, end = [], 0
        for _, numel, width, skip, *_ in self.pieces:
            found.append(end + 2)
            end = found[-1] + min(width, skip + numel)
        return [*found, end + 2]

    @property
    def entries(self) -> int:
        return self.index[-1] + 1

    @cached_property
    def table(self) -> ColumnTable:
        numbers = [
            (a, a + numel, width, first, skip, s - a, STRIDES[i % 3] * width)
            for i, (a, s, first, (_, numel, width, skip, *_)) in enumerate(
                zip(self.starts, self.state_starts, self.index, self.pieces, strict=False)
            )
        ]
        return ColumnTable(*np.asarray(numbers, dtype=np.int64).reshape(-1, 7).T)

    @cached_property
    def at(self) -> Tensor:
        """Elements of the buffer that are in runs."""
        return self._elements(self.starts)

    @cached_property
    def state_at(self) -> Tensor:
        """The same elements in the state."""
        return self._elements(self.state_starts)

    def _elements(self, starts: list[int]) -> Tensor:
        found = [torch.arange(a, a + p[1]) for a, p in zip(starts, self.pieces, strict=True)]
        return torch.cat([torch.empty(0, dtype=torch.int64), *found])

    @property
    def of_elements(self) -> Iterator[tuple[int, int]]:
        """Entry and number of all elements, counted one by one."""
        origins = self.origins.tolist()
        for i, (_, numel, width, skip, *_) in enumerate(self.pieces):
            row = column = 0
            for element in range(skip + numel):
                if element >= skip:
                    entry = self.index[i] + column
                    yield entry, origins[entry] + row * STRIDES[i % 3] * width
                row, column = (row, column + 1) if column + 1 < width else (row + 1, 0)

    @cached_property
    def origins(self) -> Tensor:
        return (torch.arange(self.entries) * 7 + 0xFFFFFF00).to(torch.int32)

    def dense_sums(self, values_N: Tensor) -> Tensor:
        """Return the sums of squares of columns of matrices, zero where a run has no elements."""
        found = torch.full((self.entries,), NAN, dtype=torch.float64)
        for a, first, (_, numel, width, skip, *_) in zip(
            self.starts, self.index, self.pieces, strict=False
        ):
            matrix = torch.zeros(-(-(skip + numel) // width), width, dtype=torch.float64)
            matrix.view(-1)[skip : skip + numel] = values_N[a : a + numel]
            count = min(width, skip + numel)
            found[first : first + count] = (matrix**2).sum(dim=0)[:count]
        return found


def runs_of(name: str) -> Runs:
    return Runs(*(LAYOUTS | PARTS)[name])


@st.composite
def any_runs(draw, *, parts: bool) -> Runs:
    """Runs of all kinds of widths, which begin and end anywhere."""
    pieces = []
    for _ in range(draw(st.integers(1, 3))):
        width = draw(
            st.one_of(
                st.integers(1, 40), st.sampled_from([64, 255, 256, 257, 1376, 2048, 2049, 4096])
            )
        )
        numel = draw(st.integers(1, min(9 * width + 5, 20_000)))
        skip = draw(st.integers(0, 3 * width)) if parts else 0
        pieces.append((draw(st.integers(0, 20)), numel, width, skip, draw(st.integers(0, 20))))
    return Runs(pieces, draw(st.integers(0, 3)))


@pytest.fixture(params=[name for name in BACKENDS if name in ("reference", "cpu")])
def kernels(request):
    return select_backend(request.param, CPU)


@contextmanager
def limited(level: int, threads: int) -> Iterator[None]:
    """Let the C++ kernels use at most an instruction set and so many threads."""
    before = torch.get_num_threads()
    cpu.library().adam_mini_limit_level(level)
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        cpu.library().adam_mini_limit_level(9)
        torch.set_num_threads(before)


def grads_of(runs: Runs, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """Return gradients, NaN outside of runs."""
    grad = torch.full((runs.numel,), NAN, dtype=dtype)
    grad[runs.at] = noise(runs.numel, seed, dtype)[runs.at]
    return grad


def summed(backend, runs: Runs, grad: Tensor) -> Tensor:
    found = torch.full((runs.entries,), NAN)  # must be overwritten, not added to
    with unchanged(grad=grad):
        backend.column_sum_sq_(found, grad, runs.table)
    return found


def vectors_for(runs: Runs, storage: str):
    return vectors_of(
        runs.entries,
        step_size_S=positive(runs.entries, 13) * 1e-2,
        origin_SR=runs.origins if is_stochastic(storage) else None,
        exp_avg_scale_S2=scales_of(storage, runs.entries),
    )


def updated(backend, runs: Runs, storage: str, table: ColumnTable | None = None):
    tensors, vectors = tensors_of(storage, runs), vectors_for(runs, storage)
    with writes_segments_only(tensors, runs), unchanged(**vectors._asdict()):
        backend.update_columns_(tensors, table or runs.table, vectors, scalars_of())
    return tensors


# column_sum_sq_.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_sums_of_columns(kernels, name, dtype):
    runs = runs_of(name)
    grad = grads_of(runs, dtype)
    expected = runs.dense_sums(grad.double())
    found = summed(kernels, runs, grad)
    torch.testing.assert_close(found.double(), expected, rtol=SUM_RTOL, atol=0, equal_nan=True)


@settings(max_examples=50, deadline=None)
@given(runs=any_runs(parts=False))
def test_sums_of_columns_of_any_runs(runs):
    grad = grads_of(runs, torch.float32)
    expected = runs.dense_sums(grad.double())
    for backend in (reference, cpu):
        found = summed(backend, runs, grad)
        torch.testing.assert_close(found.double(), expected, rtol=SUM_RTOL, atol=0, equal_nan=True)


def test_columns_of_bfloat16_are_not_summed_in_bfloat16(kernels):
    grad = torch.ones(2 * 257, dtype=torch.bfloat16)
    grad[-2:] = 0.0625
    runs = Runs([(0, 2 * 257, 2, 0)])
    assert summed(kernels, runs, grad)[2:4].tolist() == [256 + 0.0625**2] * 2


@pytest.mark.parametrize("name", ["matrix", "within rows", "narrow"])
def test_columns_keep_non_finite_values_apart(kernels, name):
    runs = runs_of(name)
    elements = list(runs.of_elements)
    for poison in (float("inf"), float("-inf"), NAN):
        for victim in (0, len(elements) // 2, len(elements) - 1):
            grad = noise(runs.numel, 2)
            grad[runs.at[victim]] = poison
            found = torch.zeros(runs.entries)
            kernels.column_sum_sq_(found, grad, runs.table)
            assert (~found.isfinite()).nonzero().flatten().tolist() == [elements[victim][0]]


def test_sums_of_a_run_depend_on_its_values_alone(kernels):
    """Not on its place, nor on other runs: replicas must agree."""
    alone, among = Runs([(0, 50_000, 700, 0)]), Runs([(3, 90, 7, 0), (11, 50_000, 700, 0)], 5)
    grad = grads_of(among, torch.float32)
    first = summed(kernels, alone, grad[among.starts[1] : among.starts[1] + 50_000].clone())
    at = among.index[1]
    assert torch.equal(first[2:702], summed(kernels, among, grad)[at : at + 700])


def test_sums_refuse_parts_of_runs():
    message = "sums of columns over parts of runs (skip 32) are not sums of segments"
    runs = Runs([(0, 8, 4, 32)])
    with pytest.raises(ValueError, match=re.escape(message)):
        cpu.column_sum_sq_(torch.zeros(runs.entries), torch.zeros(8), runs.table)


# update_columns_.


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("name", SMALL)
def test_update_of_columns(kernels, name, storage):
    runs = runs_of(name)
    before = elements_of(tensors_of(storage, runs), runs)
    vectors, scalars = vectors_for(runs, storage), scalars_of()
    after = elements_of(updated(kernels, runs, storage), runs)
    entry, number = torch.tensor([*runs.of_elements], dtype=torch.int64).reshape(-1, 2).T

    scales = vectors.exp_avg_scale_S2
    scale_before, scale_after = (None, None) if scales is None else scales[entry].unbind(dim=1)
    olds, news = m_of(before.exp_avg, scale_before), m_of(after.exp_avg, scale_after)
    old, g = olds.double(), before.grad.double() * 0.37
    m, size = BETA1 * old + (1 - BETA1) * g, old.abs() + g.abs()
    p, step_size = before.param.double(), vectors.step_size_S[entry].double()
    expected = (1 - 1e-2 * (groups_of(runs.entries)[entry].double() + 1) * 0.1) * p - step_size * m
    assert ((after.param - expected).abs() <= UPDATE_TOL * (p.abs() + size)).all()
    # What storage of m in few bits may add: one of two neighbours.
    stored = {torch.float32: 0, torch.bfloat16: 2.0**-7, torch.uint8: 2.0**-3}[after.exp_avg.dtype]
    least = 0.0 if scale_after is None else scale_after * 2.0**-9
    limit = UPDATE_TOL * size + torch.maximum(stored * m.abs(), torch.as_tensor(least))
    assert ((news - m).abs() <= limit).all()
    if vectors.origin_SR is not None:
        # In float32, as kernels have it before they round it.
        factor = scalars.grad_scale * (1 - BETA1)
        exact = olds * BETA1 + before.grad.float() * factor
        noises = rounding.noise16(number, scalars.noise_key)
        if scale_after is None:
            rounded = rounding.to_bfloat16_stochastic(exact, noises)
        else:
            rounded = rounding.to_fp8_stochastic(exact, scale_after, noises)
        assert_equal_bits([after.exp_avg], [rounded])
    if storage == "quantized weight":
        assert torch.equal(after.weight, before.weight)
    elif after.weight is not None:
        rounded = rounding.to_weight(after.param, after.weight.dtype)
        assert torch.equal(bits(after.weight), bits(rounded))


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("name", [name for name in (*LAYOUTS, *PARTS) if name != "tall"])
def test_update_of_columns_equals_the_reference_bit_for_bit(name, storage):
    runs = runs_of(name)
    assert_equal_bits(updated(cpu, runs, storage), updated(reference, runs, storage))


@settings(max_examples=80, deadline=None)
@given(runs=any_runs(parts=True), storage=st.sampled_from([*STORAGE]))
def test_update_of_columns_of_any_runs_equals_the_reference(runs, storage):
    assert_equal_bits(updated(cpu, runs, storage), updated(reference, runs, storage))


@pytest.mark.parametrize("storage", ["fp32", "bf16 m, remainders", "8-bit m, remainders"])
@pytest.mark.parametrize("name", ["within rows", "wide", "parts"])
def test_where_a_run_is_cut_and_where_its_state_lies_change_no_bit(kernels, name, storage):
    runs = runs_of(name)
    expected = elements_of(updated(kernels, runs, storage), runs)
    here = runs.in_place
    assert_equal_bits(elements_of(updated(kernels, here, storage), here), expected)
    columns = (getattr(runs.table, field.name).tolist() for field in fields(ColumnTable))
    cut: list[list[int]] = []
    for start, end, *numbers in zip(*columns, strict=True):
        ends = sorted({start, end, start + (end - start) // 3, end - 1} & {*range(start, end + 1)})
        for a, b in pairwise(ends):
            width, index, skip, *others = numbers
            cut.append([a, b, width, index, skip + a - start, *others])
    table = ColumnTable(*np.asarray(cut, dtype=np.int64).T)
    assert_equal_bits(elements_of(updated(kernels, runs, storage, table), runs), expected)


@pytest.mark.parametrize("storage", STORAGE)
def test_columns_of_one_row_are_segments_of_one_element(kernels, storage):
    """The limit that ties the kernels over rows and over columns together."""
    runs = Runs([(3, 300, 300, 0)])
    at, first = runs.starts[0] + np.arange(300), runs.index[0]
    table = SegmentTable(at, at + 1, first + np.arange(300))
    mine = updated(kernels, runs, storage)
    theirs = tensors_of(storage, runs)
    kernels.update_(theirs, table, vectors_for(runs, storage), scalars_of())
    assert_equal_bits(mine, theirs)
    other = torch.full((runs.entries,), NAN)
    kernels.segment_sum_sq_(other, mine.grad, table)
    assert_equal_bits([summed(kernels, runs, mine.grad)], [other])


@pytest.mark.parametrize("grad_scale", [NAN, float("inf")])
def test_no_column_changes_in_a_skipped_step(kernels, grad_scale):
    runs = runs_of("within rows")
    tensors, vectors = (
        f("bf16 m, remainders", runs) for f in (tensors_of, lambda s, r: vectors_for(r, s))
    )
    with unchanged(**tensors._asdict(), **vectors._asdict()):
        kernels.update_columns_(tensors, runs.table, vectors, scalars_of(grad_scale=grad_scale))


@pytest.mark.parametrize("name", ["narrow", "wide", "tall"])
def test_instruction_sets_and_threads_change_no_bit_of_columns(name):
    runs, found = runs_of(name), []
    for level, threads in ((0, 1), (1, 2), (2, 3), (2, 1)):
        with limited(level, threads):
            of_sums = [
                summed(cpu, runs, grads_of(runs, kind)) for kind in (torch.float32, torch.float16)
            ]
            updates = [updated(cpu, runs, f"{m} m, remainders") for m in ("bf16", "8-bit")]
            found.append([*of_sums, *updates[0], *updates[1]])
    for other in found[1:]:
        assert_equal_bits(found[0], other)


# Rectangles.


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("columns", [64, 256])
@pytest.mark.parametrize("name", SMALL)
def test_rectangles_cover_every_element_once(name, columns, multiple):
    runs, covered = runs_of(name), []
    cut = Cut(columns=columns, numel=4 * columns, line=100, multiple=multiple)
    found, bounds = rectangles(runs.table, cut)
    parts = np.zeros(bounds[-1], dtype=np.int64)
    for row in found:
        it = dict(zip(RECTANGLE_FIELDS, row.tolist(), strict=True))
        assert it["columns"] <= columns
        assert it["lines"] * it["columns"] <= max(cut.numel, it["columns"])
        assert it["stride"] % it["width"] == it["stride"] % multiple == 0
        parts[it["partial"] : it["partial"] + it["columns"]] += 1
        for line in range(it["lines"]):
            for column in range(it["columns"]):
                element = column + line * it["stride"]
                r, segment = divmod(it["position"] + element, it["width"])
                entry = it["index"] + segment
                number = int(runs.origins[entry]) + r * it["row_stride"]
                at = it["start"] + element
                covered.append((at, at + it["shift"], entry, number))
    expected = zip(runs.at.tolist(), runs.state_at.tolist(), runs.of_elements, strict=True)
    assert sorted(covered) == sorted((a, s, *entry) for a, s, entry in expected)
    assert (parts == 1).all()


@pytest.mark.parametrize("name", [name for name in SMALL if name in LAYOUTS])
def test_every_partial_sum_is_added_once_to_its_segment(name):
    runs = runs_of(name)
    found, bounds = rectangles(runs.table, Cut(columns=64, numel=256, line=20))
    entry = np.zeros(bounds[-1], dtype=np.int64)
    for row in found:
        it = dict(zip(RECTANGLE_FIELDS, row.tolist(), strict=True))
        columns = np.arange(it["columns"])
        entry[it["partial"] + columns] = it["index"] + (it["position"] + columns) % it["width"]
    added, entries = np.zeros(bounds[-1], dtype=np.int64), []
    for row in sums(runs.table, bounds, 10):
        it = dict(zip(SUMS_FIELDS, row.tolist(), strict=True))
        assert 0 < it["segments"] <= 10
        for segment in range(it["segments"]):
            at = np.arange(it["partial"] + segment, it["end"], it["width"])
            assert (entry[at] == it["index"] + segment).all()
            added[at] += 1
            entries.append(it["index"] + segment)
    assert (added == 1).all()
    assert sorted(entries) == sorted({e for e, _ in runs.of_elements})


@pytest.mark.parametrize("short", ["param", "exp_avg", "weight", "grad", "step_size_S"])
def test_cpp_kernels_know_how_far_columns_reach(short):
    runs = Runs([(2, 60, 16, 0, 5)])
    tensors, vectors = tensors_of("bf16 m", runs), vectors_for(runs, "bf16 m")
    if short in tensors._fields:
        tensors = tensors._replace(**{short: getattr(tensors, short)[:-1].clone()})
    else:
        vectors = vectors._replace(step_size_S=vectors.step_size_S[:17].clone())
    with pytest.raises(ValueError, match=r"needed are (62|65|18) adjacent"):
        cpu.update_columns_(tensors, runs.table, vectors, scalars_of())
