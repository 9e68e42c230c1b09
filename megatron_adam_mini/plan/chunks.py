"""The state on the host in chunks that are updated one after the other, as tables for the kernels.

Imports numpy and the modules before it. Data flow: shares on the host -> **ChunkPlan** ->
``host_update``.

Gradients and weights of a chunk are copied to the host and lie there as in the state: element ``x``
of the chunk is element ``begin + x`` of the share. A chunk may end within a segment: once the
step size is known, each element is updated by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_adam_mini.plan.buffer_plan import Window
from megatron_adam_mini.plan.column_table import ColumnTable
from megatron_adam_mini.plan.partition import IntArray
from megatron_adam_mini.plan.segment_table import SegmentTable
from megatron_adam_mini.plan.shares import Share
from megatron_adam_mini.plan.step_plan import Piece


@dataclass(frozen=True, eq=False)
class Parts:
    """What chunks hold of segments, or of element ranges; one entry for each.

    Attributes:
        source: entry of the whole one in the rank's vectors ``_SR``.
        offset: its elements before the part; 0 for columns, whose tables count them.
    """

    source: IntArray
    offset: IntArray


@dataclass(frozen=True, eq=False)
class Chunk:
    """Consecutive elements of a share.

    Attributes:
        share: the share.
        begin: first element, counted in the share.
        segments, columns, ranges: tables with positions in the chunk, entries in
            :class:`ChunkPlan`, and ``begin`` as their shift.
        elements: its part of the share's elements with a second moment each.
        windows: what is copied: positions in the buffer, and in the chunk.
    """

    share: Share
    begin: int
    segments: SegmentTable
    columns: ColumnTable
    ranges: SegmentTable
    elements: slice
    windows: tuple[Window, ...]

    @property
    def tables(self) -> tuple[SegmentTable | ColumnTable, ...]:
        """All tables."""
        return self.segments, self.columns, self.ranges


@dataclass(frozen=True, eq=False)
class ChunkPlan:
    """All chunks of a rank.

    Attributes:
        chunks: in the order of their update.
        segments: parts of segments, in the order of the chunks; columns come last in each.
        ranges: parts of element ranges, likewise.
    """

    chunks: tuple[Chunk, ...]
    segments: Parts
    ranges: Parts


def plan_chunks(shares: Iterable[Share], pieces: Sequence[Piece], limit: int) -> ChunkPlan:
    """Cut shares into chunks.

    Args:
        shares: on the host.
        pieces: of the rank.
        limit: largest number of elements of a chunk.
    """
    chunks: list[Chunk] = []
    segments, ranges = _Clipper(), _Clipper()
    windows_of: dict[int, list[Window]] = {}
    for piece in pieces:
        windows_of.setdefault(piece.buffer, []).append(piece.window)
    for share in shares:
        elements = 0
        for begin in range(0, share.numel, limit):
            first = share.in_state.start + begin
            last = min(first + limit, share.in_state.stop)
            of_ranges = ranges.clip(share.plan.ranges, first, last, begin)
            found = Chunk(
                share=share,
                begin=begin,
                segments=segments.clip(share.plan.segments, first, last, begin),
                columns=segments.clip_columns(share.plan.columns, first, last, begin),
                ranges=of_ranges,
                elements=slice(elements, elements + of_ranges.numel),
                windows=_windows(windows_of[share.number], first, last),
            )
            elements += of_ranges.numel
            if found.windows:
                chunks.append(found)
    return ChunkPlan(tuple(chunks), segments.parts(), ranges.parts())


class _Clipper:
    """Cuts tables, and numbers what comes out."""

    def __init__(self) -> None:
        self._count = 0
        self._source: list[IntArray] = [np.empty(0, dtype=np.int64)]
        self._offset: list[IntArray] = [np.empty(0, dtype=np.int64)]

    def clip(self, table: SegmentTable, first: int, last: int, begin: int) -> SegmentTable:
        """Return what positions ``[first, last)`` of the state hold of a table."""
        start, end = table.start_S + table.shifts, table.end_S + table.shifts
        here = (end > first) & (start < last)
        start, end, source = start[here], end[here], table.indices[here]
        number = self._count + np.arange(len(start))
        self._count += len(start)
        self._source.append(source)
        self._offset.append(np.maximum(first - start, 0))
        return SegmentTable(
            np.maximum(start, first) - first,
            np.minimum(end, last) - first,
            number,
            np.full(len(start), begin, dtype=np.int64),
        )

    def clip_columns(self, table: ColumnTable, first: int, last: int, begin: int) -> ColumnTable:
        """Return what positions ``[first, last)`` of the state hold of runs of rows."""
        start, end = table.start_C + table.shift_C, table.end_C + table.shift_C
        here = (end > first) & (start < last)
        part, start, end = table.subset(here), start[here], end[here]
        part = replace(
            part,
            start_C=np.maximum(start, first) - first,
            end_C=np.minimum(end, last) - first,
            skip_C=np.maximum(first - start, 0),
            shift_C=np.full(len(start), begin, dtype=np.int64),
        )
        self._source.append(part.indices)
        self._offset.append(np.zeros(len(part.indices), dtype=np.int64))
        number_C = self._count + np.cumsum(part.counts) - part.counts
        self._count += len(part.indices)
        return replace(part, index_C=number_C)

    def parts(self) -> Parts:
        return Parts(np.concatenate(self._source), np.concatenate(self._offset))


def _windows(windows: Sequence[Window], first: int, last: int) -> tuple[Window, ...]:
    """Return what positions ``[first, last)`` of the state hold of pieces, neighbours joined."""
    found: list[Window] = []
    for window in windows:
        start = window.in_state.start
        begin, end = max(first - start, 0), min(last - start, window.numel)
        if begin >= end:
            continue
        in_buffer, in_state = window.part(begin, end)
        in_chunk = slice(in_state.start - first, in_state.stop - first)
        if found and (in_buffer.start, in_chunk.start) == (
            found[-1].in_buffer.stop,
            found[-1].in_state.stop,
        ):
            in_buffer = slice(found[-1].in_buffer.start, in_buffer.stop)
            in_chunk = slice(found[-1].in_state.start, in_chunk.stop)
            found.pop()
        found.append(Window(in_buffer, in_chunk))
    return tuple(found)
