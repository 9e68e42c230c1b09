"""This rank's slices of one buffer, and the tables of them that kernels walk.

Imports numpy and the modules before it. Data flow: segments of slices, layout of the buffer ->
**BufferPlan** -> step plan, state, kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatron_adam_mini.plan.column_table import ColumnTable
from megatron_adam_mini.plan.layout import BucketLayout, BufferLayout, state_starts
from megatron_adam_mini.plan.partition import BoolArray, IntArray
from megatron_adam_mini.plan.segment_table import SegmentTable
from megatron_adam_mini.plan.segments import SliceSegments

#: Number of elements that are rounded, added or moved between memories at a time, outside of steps:
#: that takes several temporaries of this length.
PART_NUMEL = 2**22


class Window(NamedTuple):
    """A run of elements: its position in a buffer, and in the state of this rank's slices."""

    in_buffer: slice
    in_state: slice

    @property
    def numel(self) -> int:
        """Number of elements."""
        return int(self.in_buffer.stop - self.in_buffer.start)

    def part(self, begin: int, end: int) -> Window:
        """Return elements ``[begin, end)`` of the window."""
        buffer, state = self.in_buffer.start, self.in_state.start
        return Window(slice(buffer + begin, buffer + end), slice(state + begin, state + end))

    def parts(self) -> Iterator[tuple[slice, Window]]:
        """Yield parts of at most ``PART_NUMEL`` elements: where each is in the window, and it."""
        for begin in range(0, self.numel, PART_NUMEL):
            end = min(begin + PART_NUMEL, self.numel)
            yield slice(begin, end), self.part(begin, end)


class Entries(NamedTuple):
    """Positions in a rank's vectors of segments, of element ranges, and of their elements."""

    segment: int
    element_range: int
    element: int


@dataclass(frozen=True, eq=False)
class SlicePlan:
    """The slice of one bucket.

    Attributes:
        bucket: the whole bucket.
        segments: segments and element ranges of the slice.
        window: position of the slice in its buffer and in the state.
        first: its first entries in the rank's vectors.
    """

    bucket: BucketLayout
    segments: SliceSegments
    window: Window
    first: Entries


@dataclass(frozen=True, eq=False)
class BufferPlan:
    """This rank's slices of one buffer, and the tables that the kernels walk.

    Attributes:
        domain: index of the buffer's domain.
        slices: one per bucket.
        state_numel: elements of one state tensor of the buffer.
        elements: the buffer's part of the vector of second moments per element.
        segments: all segments but columns.
        uncut: those of uncut blocks.
        cut: those of cut blocks.
        columns: segments that are columns.
        ranges: element ranges.
    """

    domain: int
    slices: tuple[SlicePlan, ...]
    state_numel: int
    elements: slice
    segments: SegmentTable
    uncut: SegmentTable
    cut: SegmentTable
    columns: ColumnTable
    ranges: SegmentTable

    @property
    def tables(self) -> tuple[SegmentTable | ColumnTable, ...]:
        """All tables; one may be there twice."""
        return self.segments, self.uncut, self.cut, self.columns, self.ranges


def plan_buffer(
    layout: BufferLayout,
    parts: Sequence[SliceSegments],
    *,
    domain: int,
    rank: int,
    first: Entries,
    is_cut_S: BoolArray,
) -> tuple[BufferPlan, Entries]:
    """Plan this rank's slices of one buffer.

    Args:
        layout: the buffer.
        parts: segments of this rank's slice of each bucket.
        domain: index of the buffer's domain.
        rank: data-parallel rank that owns the slices.
        first: entries of the first segment, range and element.
        is_cut_S: whether a segment's block is cut, for all segments of the rank.

    Returns:
        The plan, and the first entries of the next buffer.
    """
    starts, state_numel = state_starts(layout, rank)
    slices, following = [], first
    for bucket, held, state_start in zip(layout.buckets, parts, starts, strict=True):
        begin, numel = bucket.offset + rank * bucket.slice_numel, bucket.slice_numel
        window = Window(slice(begin, begin + numel), slice(state_start, state_start + numel))
        slices.append(SlicePlan(bucket, held, window, following))
        following = Entries(
            following.segment + held.num_segments,
            following.element_range + held.num_ranges,
            following.element + held.num_elementwise,
        )
    segments = _table(slices, ranges=False)
    cut_S = is_cut_S[segments.indices]
    plan = BufferPlan(
        domain=domain,
        slices=tuple(slices),
        state_numel=state_numel,
        elements=slice(first.element, following.element),
        segments=segments,
        # The same object if no block is cut: kernels then derive launch tables only once.
        uncut=segments.subset(~cut_S) if cut_S.any() else segments,
        cut=segments.subset(cut_S),
        columns=_column_table(slices),
        ranges=_table(slices, ranges=True),
    )
    return plan, following


def _table(slices: Sequence[SlicePlan], *, ranges: bool) -> SegmentTable:
    """Return the table of all segments but columns of some slices, or of all element ranges."""
    columns: list[list[IntArray]] = [[np.empty(0, dtype=np.int64)] for _ in range(4)]
    for slice_plan in slices:
        segments, begin = slice_plan.segments, slice_plan.window.in_buffer.start
        if ranges:
            start, end, first = segments.start_R, segments.end_R, slice_plan.first.element_range
            chosen = np.arange(len(start))
        else:
            start, end, first = segments.start_S, segments.end_S, slice_plan.first.segment
            chosen = np.flatnonzero(~segments.is_column_S)
        values = (
            start[chosen] + begin,
            end[chosen] + begin,
            first + chosen,
            np.full(len(chosen), slice_plan.window.in_state.start - begin, dtype=np.int64),
        )
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    return SegmentTable(*(np.concatenate(column) for column in columns))


def _column_table(slices: Sequence[SlicePlan]) -> ColumnTable:
    """Return the table of all segments of some slices that are columns."""
    parts = []
    for slice_plan in slices:
        runs, begin = slice_plan.segments.columns, slice_plan.window.in_buffer.start
        same = np.ones(len(runs), dtype=np.int64)
        parts.append(
            (
                runs.start_C + begin,
                runs.end_C + begin,
                runs.width_C,
                runs.first_C + slice_plan.first.segment,
                0 * same,
                (slice_plan.window.in_state.start - begin) * same,
                runs.row_stride_C,
            )
        )
    return ColumnTable.joined(parts)
