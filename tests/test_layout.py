"""Segments of bucket slices: every element exactly once, against a brute force over elements."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adam_mini.config import AdamMiniConfig
from megatron_adam_mini.plan.cut_blocks import cut_row_segments, spread_blocks, spread_elements
from megatron_adam_mini.plan.layout import BucketLayout, Placement
from megatron_adam_mini.plan.parameter_info import HeadGeometry, ParameterInfo
from megatron_adam_mini.plan.partition import ParameterBlocks, partition_parameter
from megatron_adam_mini.plan.segments import SliceSize, segment_slice, slice_size


@dataclass(frozen=True)
class Kind:
    """One parameter: whole shape, rule, how it is split, and its heads (groups, per group, dim)."""

    shape: tuple[int, ...]
    rule: str
    tp_dim: int | None = None
    heads: tuple[int, int, int, bool] | None = None
    value_as_block: bool = False

    def blocks(self, tp_size: int, tp_rank: int) -> ParameterBlocks:
        """Return what the package makes of it on one tensor-parallel rank."""
        split = self.tp_dim is not None and tp_size > 1
        heads = None
        if self.heads is not None:
            groups, per_group, dim, gated = self.heads
            heads = HeadGeometry(
                num_heads=groups * per_group, num_query_groups=groups, head_dim=dim, gated=gated
            )
        info = ParameterInfo(
            name="weight",
            shape=tuple(
                size // tp_size if split and index == self.tp_dim else size
                for index, size in enumerate(self.shape)
            ),
            role="unknown",
            tp_dim=self.tp_dim if split else None,
            tp_size=tp_size if split else 1,
            tp_rank=tp_rank if split else 0,
            heads=heads,
        )
        config = AdamMiniConfig(rules=(("*", self.rule),), value_as_block=self.value_as_block)
        return partition_parameter(info, config)

    def row_labels(self) -> list[int]:
        """Label the rows of the whole tensor one by one, apart from the package."""
        if self.rule == "row":
            return list(range(self.shape[0]))
        if self.rule != "head":
            return [0] * self.shape[0]
        groups, per_group, dim, gated = self.heads
        names = []
        for group in range(groups):
            for head in range(per_group):
                names += [("q", group, head)] * dim
            if gated:
                names += [("gate", group, row) for row in range(per_group * dim)]
            names += [("k", group)] * dim
            names += [("v",) if self.value_as_block else ("v", group, row) for row in range(dim)]
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        return [numbers[name] for name in names]

    def labels(self) -> np.ndarray:
        """Return the label of each element of the whole tensor; -1 where v is per element."""
        if self.rule == "element":
            return np.full(self.shape, -1)
        rows = np.asarray(self.row_labels()).reshape(-1, *[1] * (len(self.shape) - 1))
        return np.broadcast_to(rows, self.shape)

    def local(self, whole: np.ndarray, tp_size: int, tp_rank: int) -> np.ndarray:
        """Return one tensor-parallel rank's part of an array of the whole shape."""
        if self.tp_dim is None or tp_size == 1:
            return whole
        return np.split(whole, tp_size, axis=self.tp_dim)[tp_rank]

    def spread_labels(self, tp_size: int) -> set[int]:
        """Return the labels whose elements are no single run of rows of one rank."""
        if self.rule == "element":
            return set()
        labels = np.asarray(self.row_labels())
        found = set()
        for label in set(labels.tolist()):
            rows = np.flatnonzero(labels == label)
            ranks = rows // (len(labels) // tp_size) if self.tp_dim == 0 else rows * 0
            if rows[-1] - rows[0] + 1 != len(rows) or len(set(ranks.tolist())) > 1:
                found.add(label)
        return found


@dataclass(frozen=True)
class Case:
    """A bucket as one tensor-parallel rank holds it, and what brute force says of its elements."""

    kinds: Sequence[Kind]
    gaps: Sequence[int]
    num_slices: int
    tp_size: int = 1
    tp_rank: int = 0

    def build(self) -> tuple[BucketLayout, list[ParameterBlocks], np.ndarray, np.ndarray]:
        """Return bucket, blocks, and the parameter and label of each element (-1: gap)."""
        blocks = [kind.blocks(self.tp_size, self.tp_rank) for kind in self.kinds]
        placements, owner, label = [], [], []
        for index, (kind, gap) in enumerate(zip(self.kinds, self.gaps[:-1], strict=True)):
            local = kind.local(kind.labels(), self.tp_size, self.tp_rank).reshape(-1)
            owner += [-1] * gap
            label += [-1] * gap
            placements.append(Placement(index, len(owner), len(owner) + len(local)))
            owner += [index] * len(local)
            label += local.tolist()
        padding = self.gaps[-1] + -(len(owner) + self.gaps[-1]) % self.num_slices
        bucket = BucketLayout(len(owner) + padding, self.num_slices, tuple(placements))
        owner += [-1] * padding
        label += [-1] * padding
        return bucket, blocks, np.asarray(owner), np.asarray(label)


def check(case: Case) -> None:
    """Compare all slices of a bucket with brute force."""
    bucket, blocks, owner, label = case.build()
    shared = owner >= 0
    shared &= label >= 0
    elementwise = (owner >= 0) & (label < 0)
    whole = [kind.labels() for kind in case.kinds]
    spread = [kind.spread_labels(case.tp_size) for kind in case.kinds]
    # Where element i continues the block of element i - 1 in memory.
    joins = np.zeros(bucket.numel + 1, dtype=bool)
    joins[1:-1] = shared[1:] & (owner[1:] == owner[:-1]) & (label[1:] == label[:-1])

    seen = np.zeros(bucket.numel, dtype=int)
    seen_ranges = np.zeros(bucket.numel, dtype=int)
    block_of_label: dict[tuple[int, int], int] = {}
    for rank in range(bucket.num_slices):
        part = segment_slice(bucket, blocks, rank)
        begin = rank * bucket.slice_numel
        assert part.num_segments == len(part.end_S) == len(part.block_numel_S)
        assert (part.start_S < part.end_S).all(), "a segment is empty"
        assert (part.start_S[1:] >= part.end_S[:-1]).all(), "segments overlap or descend"
        assert (part.start_R < part.end_R).all()
        assert (part.start_R[1:] >= part.end_R[:-1]).all()
        window = slice(begin, begin + bucket.slice_numel)
        assert part.num_elementwise == elementwise[window].sum()
        assert slice_size(bucket, blocks, rank) == SliceSize(
            part.num_segments, int(elementwise[window].sum()), int((owner[window] >= 0).sum())
        )
        for s in range(part.num_segments):
            low, high = begin + int(part.start_S[s]), begin + int(part.end_S[s])
            assert begin <= low < high <= begin + bucket.slice_numel
            seen[low:high] += 1
            parameter = int(part.parameter_S[s])
            assert (owner[low:high] == parameter).all()
            assert (label[low:high] == label[low]).all()
            mine = int(label[low])
            # Maximal: a segment ends only where its block or the slice ends.
            assert not joins[low] or low == begin
            assert not joins[high] or high == begin + bucket.slice_numel
            assert bool(part.clipped_left_S[s]) == bool(joins[low])
            assert bool(part.clipped_right_S[s]) == bool(joins[high])
            assert part.block_numel_S[s] == (whole[parameter] == mine).sum()
            # Block numbers and labels determine each other.
            block = int(part.block_S[s])
            assert block_of_label.setdefault((parameter, mine), block) == block
            # The row segment really is the one whose rows hold these elements.
            pattern, info = blocks[parameter].pattern, blocks[parameter].info
            rows = pattern.row_bounds(part.row_segment_S[s : s + 1])
            start = bucket.placements[parameter].start
            row = info.row_offset + np.asarray([low - start, high - 1 - start]) // info.row_numel
            assert rows[0][0] <= row[0] <= row[1] < rows[1][0]
            assert pattern.block_of_row_segment(part.row_segment_S[s : s + 1])[0] == block
        for r in range(part.num_ranges):
            low, high = begin + int(part.start_R[r]), begin + int(part.end_R[r])
            assert (owner[low:high] == part.parameter_R[r]).all()
            seen_ranges[low:high] += 1
    np.testing.assert_array_equal(seen, shared.astype(int))
    np.testing.assert_array_equal(seen_ranges, elementwise.astype(int))
    assert len({(p, b) for (p, _), b in block_of_label.items()}) == len(block_of_label)

    for parameter, kind in enumerate(case.kinds):
        found = spread_blocks(blocks[parameter])
        assert found.tolist() == sorted(set(found.tolist()))
        assert len(found) == len(spread[parameter])
        for (owner_of, name), block in block_of_label.items():
            if owner_of == parameter:
                assert (name in spread[parameter]) == (block in found)
        local = label[bucket.placements[parameter].start : bucket.placements[parameter].end]
        block_at = [block_of_label.get((parameter, name), -1) for name in local.tolist()]
        for block, first, end in zip(found, *spread_elements(blocks[parameter]), strict=True):
            here = np.flatnonzero(np.asarray(block_at) == block)
            assert (first, end) == ((here[0], here[-1] + 1) if len(here) else (0, 0))
        split = kind.tp_dim is not None and case.tp_size > 1
        assert blocks[parameter].info.rows_are_split == (split and kind.tp_dim == 0)
        assert blocks[parameter].info.row_parallel == (split and kind.tp_dim == 1)

    run = np.cumsum(~joins)  # number of the row segment that an element is of
    cut: list[int] = []
    for index in range(1, bucket.num_slices):
        at = index * bucket.slice_numel
        counts = bool(joins[at]) and label[at] not in spread[owner[at]]
        cut.append(int(run[at]) if counts else -1)
    numbers = {at: number for number, at in enumerate(sorted(set(cut) - {-1}))}
    expected = [numbers.get(at, -1) for at in cut]
    assert cut_row_segments(bucket, blocks).tolist() == expected


# Exhaustive: every pair of small kinds, every number of slices, every rank, with and without gaps.

SMALL = [
    Kind((1,), "tensor"),
    Kind((5,), "tensor"),
    Kind((5,), "row"),
    Kind((4, 3), "row"),
    Kind((4, 3), "row", tp_dim=0),
    Kind((2, 4), "row", tp_dim=1),
    Kind((4,), "tensor", tp_dim=0),
    Kind((2, 4), "tensor", tp_dim=1),
    Kind((4, 2), "element", tp_dim=0),
    Kind((2, 2, 2), "row", tp_dim=1),
    Kind((8, 1), "head", tp_dim=0, heads=(2, 2, 1, False)),
    Kind((8, 2), "head", tp_dim=0, heads=(1, 2, 2, False), value_as_block=True),
    Kind((12, 1), "head", tp_dim=0, heads=(1, 2, 2, True)),
    Kind((16, 1), "head", heads=(2, 2, 2, False), value_as_block=True),
]


@pytest.mark.parametrize("first", range(len(SMALL)))
def test_all_small_buckets(first):
    sizes = [1, 2, 4] if (SMALL[first].tp_dim is not None) else [1, 2]
    for second, num_slices, tp_size in product(SMALL, (1, 2, 3, 5, 8), sizes):
        kinds = (SMALL[first], second)
        if any(k.tp_dim is not None and k.shape[k.tp_dim] % tp_size for k in kinds):
            continue
        for tp_rank in {0, tp_size - 1}:
            gaps = (num_slices % 3, tp_size % 3, num_slices % 2)
            check(Case(kinds, gaps, num_slices, tp_size, tp_rank))


# Hypothesis: longer lists, odd sizes, every tensor-parallel size that the heads allow.


@st.composite
def kinds(draw: st.DrawFn, tp_size: int) -> Kind:
    tp_dim = draw(st.sampled_from([None, 0, 1]))
    rule = draw(st.sampled_from(["row", "tensor", "element", "head", "head"]))
    heads = None
    if rule == "head":
        groups, per_group = draw(st.integers(1, 4)), draw(st.integers(1, 3))
        dim, gated = draw(st.integers(1, 4)), draw(st.booleans())
        rows = groups * (per_group * (2 if gated else 1) + 2) * dim
        if tp_dim == 0 and rows % tp_size:
            # As in Megatron, the rows of the fused weight must divide; scale the head size.
            dim *= tp_size
            rows *= tp_size
        heads = (groups, per_group, dim, gated)
        shape = [rows, draw(st.integers(1, 3))]
    else:
        ndim = draw(st.integers(2 if tp_dim == 1 else 1, 3))
        shape = [draw(st.integers(1, 5)) for _ in range(ndim)]
        if tp_dim == 0:
            shape[0] *= tp_size
    if tp_dim == 1:
        shape[1] *= tp_size
    return Kind(tuple(shape), rule, tp_dim, heads, draw(st.booleans()))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    tp_size = draw(st.sampled_from([1, 2, 3, 4, 8]))
    members = draw(st.lists(kinds(tp_size), min_size=0, max_size=4))
    gaps = draw(st.lists(st.integers(0, 5), min_size=len(members) + 1, max_size=len(members) + 1))
    num_slices = draw(st.sampled_from([1, 2, 3, 4, 7, 8, 16]))
    return Case(members, gaps, num_slices, tp_size, draw(st.integers(0, tp_size - 1)))


@settings(max_examples=300, deadline=None)
@given(cases())
def test_any_bucket(case):
    check(case)


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from([2, 3, 4, 6]))
def test_any_cut_is_invariant(case, num_slices):
    """Cutting a bucket elsewhere moves no element to another block."""

    def block_of_elements(case: Case) -> np.ndarray:
        bucket, blocks, *_ = case.build()
        found = np.full((bucket.numel, 3), -1)
        for rank in range(bucket.num_slices):
            part = segment_slice(bucket, blocks, rank)
            begin = rank * bucket.slice_numel
            for s in range(part.num_segments):
                window = slice(begin + part.start_S[s], begin + part.end_S[s])
                found[window] = part.parameter_S[s], part.block_S[s], part.block_numel_S[s]
        return found

    whole = block_of_elements(replace(case, num_slices=1))
    cut = block_of_elements(replace(case, num_slices=num_slices))
    np.testing.assert_array_equal(cut[: len(whole)], whole)
    assert (cut[len(whole) :] == -1).all()


# Named cases, with the numbers written out.


def part_of(case: Case, rank: int):
    bucket, blocks, *_ = case.build()
    return segment_slice(bucket, blocks, rank)


def test_slice_without_any_parameter():
    case = Case([Kind((2, 2), "row")], (0, 8), 3)
    empty = part_of(case, 2)
    assert (empty.num_segments, empty.num_ranges, empty.num_elementwise) == (0, 0, 0)
    assert empty.start_S.dtype == empty.block_S.dtype == np.int64
    assert empty.clipped_left_S.dtype == np.bool_
    check(case)


def test_bucket_without_any_parameter():
    case = Case([], (6,), 3)
    check(case)
    assert cut_row_segments(case.build()[0], []).tolist() == [-1, -1]


def test_slices_of_one_element():
    case = Case([Kind((3, 3), "row"), Kind((3,), "tensor")], (0, 0, 0), 12)
    check(case)
    middle = part_of(case, 4)
    assert middle.start_S.tolist() == [0]
    assert middle.end_S.tolist() == [1]
    assert middle.clipped_left_S.tolist() == middle.clipped_right_S.tolist() == [True]
    assert cut_row_segments(case.build()[0], case.build()[1]).tolist() == [
        *[0, 0, -1, 1, 1, -1, 2, 2, -1], 3, 3,
    ]  # fmt: skip


def test_norm_that_spans_three_slices():
    case = Case([Kind((2,), "row"), Kind((10,), "tensor"), Kind((3,), "row")], (0,) * 4, 3)
    check(case)
    parts = [part_of(case, rank) for rank in range(3)]
    norm = [(part, part.parameter_S.tolist().index(1)) for part in parts]
    assert [part.clipped_left_S[s] for part, s in norm] == [False, True, True]
    assert [part.clipped_right_S[s] for part, s in norm] == [True, True, False]
    assert [part.block_numel_S[s] for part, s in norm] == [10, 10, 10]


def test_cut_inside_a_head():
    # One query group: Q heads of rows 0-3 and 4-7, K head of rows 8-11, V rows 12-15; 2 columns.
    case = Case([Kind((16, 2), "head", heads=(1, 2, 4, False))], (0, 0), 3)  # 33 elements, 11 each
    check(case)
    left, middle, right = (part_of(case, rank) for rank in range(3))
    assert left.end_S.tolist() == [8, 11]
    assert left.clipped_right_S.tolist() == [False, True]
    assert middle.start_S.tolist() == [0, 5]
    assert middle.end_S.tolist() == [5, 11]
    assert middle.clipped_left_S.tolist() == [True, False]
    assert middle.clipped_right_S.tolist() == [False, True]
    assert right.start_S.tolist() == [0, 2, 4, 6, 8]
    assert right.block_numel_S.tolist() == [8, 2, 2, 2, 2]


def test_head_cut_between_tensor_parallel_ranks():
    # One K/V head on four ranks: four heads of 4 rows make 16, and Q, Q, K, V fall apart evenly.
    aligned = Kind((16, 2), "head", tp_dim=0, heads=(1, 2, 4, False))
    assert spread_blocks(aligned.blocks(4, 0)).tolist() == []
    # On eight ranks every Q and K head lies on two of them; V rows are single rows.
    assert spread_blocks(aligned.blocks(8, 0)).tolist() == [0, 1, 2]
    assert aligned.spread_labels(8) == {0, 1, 2}
    # Two groups of 3 Q heads on four ranks: rank boundaries at rows 5, 10, 15 of 20.
    uneven = Kind((20, 1), "head", tp_dim=0, heads=(2, 3, 2, False))
    check(Case([uneven], (0, 0), 2, 4, 1))
    assert len(spread_blocks(uneven.blocks(4, 2))) == len(uneven.spread_labels(4)) == 2


def test_whole_block_is_counted_over_tensor_parallel_ranks():
    row = part_of(Case([Kind((2, 8), "row", tp_dim=1)], (0, 0), 1, 4, 1), 0)
    assert row.block_numel_S.tolist() == [8, 8]
    tensor = part_of(Case([Kind((8, 2), "tensor", tp_dim=0)], (0, 0), 1, 4, 1), 0)
    assert tensor.block_numel_S.tolist() == [16]
    value = Kind((16, 1), "head", tp_dim=0, heads=(2, 2, 2, False), value_as_block=True)
    found = part_of(Case([value], (0, 0), 1, 2, 1), 0)
    assert found.block_numel_S.tolist() == [2, 2, 2, 4]


def test_bucket_that_does_not_divide_is_refused():
    text = "A bucket of 7 elements cannot be cut into 2 equal slices; Megatron pads buckets"
    with pytest.raises(ValueError, match=re.escape(text)):
        BucketLayout(7, 2, ())


@pytest.mark.parametrize(("tp_dim", "stacked"), [(None, 1), (None, 2), (0, 2), (1, 1)])
def test_columns_of_any_slice(tp_dim: int | None, stacked: int) -> None:
    """Every element is of the segment of its column and set, however slices cut rows."""
    tp_size = 1 if tp_dim is None else 2
    for tp_rank, num_slices, gap in product(range(tp_size), (1, 2, 3, 5, 11), (0, 2)):
        info = ParameterInfo(
            name="weight", shape=(4, 3), role="mlp", tp_dim=tp_dim, tp_size=tp_size,
            tp_rank=tp_rank, num_stacked=stacked,
        )  # fmt: skip
        blocks = [partition_parameter(info, AdamMiniConfig(rules=(("*", "column"),)))]
        numel = -(-(gap + 12) // num_slices) * num_slices
        bucket = BucketLayout(numel, num_slices, (Placement(0, gap, gap + 12),))
        height = info.global_shape[0] // stacked
        seen = []
        for rank in range(num_slices):
            part = segment_slice(bucket, blocks, rank)
            assert slice_size(bucket, blocks, rank).num_segments == part.num_segments
            assert part.is_column_S.all()
            assert (part.block_numel_S == height).all()
            runs = part.columns
            for run in range(len(runs)):
                for at in range(int(runs.start_C[run]), int(runs.end_C[run])):
                    step = (at - int(runs.start_C[run])) % int(runs.width_C[run])
                    row, column = divmod(at + rank * bucket.slice_numel - gap, 3)
                    matrix = row // (4 // stacked)
                    offset = 3 * tp_rank if tp_dim == 1 else 0
                    block = part.block_S[int(runs.first_C[run]) + step]
                    assert block == matrix * info.global_shape[1] + offset + column
                    seen.append((row, column))
        assert sorted(seen) == list(product(range(4), range(3)))
