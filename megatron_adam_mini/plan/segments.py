"""Blocks x slice -> segments: where blocks lie in a rank's slice of a bucket.

Imports numpy, ``layout``, ``partition`` and ``column_runs``. Data flow: partition, layout of a
bucket -> **SliceSegments** -> reduction, step plan.

A bucket is cut without regard for rows. Four rows of six elements in one bucket of three slices::

    bucket   | row 0       | row 1       | row 2       | row 3       |
    slices   | rank 0          | rank 1          | rank 2            |
    segments   row 0, row 1      row 1, row 2      row 2, row 3

so rows 1 and 2 are cut blocks: each has segments on two ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from megatron_adam_mini.plan.column_runs import ColumnRuns, numbers_within
from megatron_adam_mini.plan.layout import BucketLayout, Placement
from megatron_adam_mini.plan.partition import BoolArray, IntArray, ParameterBlocks, RowPattern


@dataclass(frozen=True)
class SliceSegments:
    """Segments and element ranges of one slice, both in ascending order (of first elements).

    Attributes:
        start_S, end_S: offsets within the slice; those of first and last element for columns.
        parameter_S: index of the parameter.
        row_segment_S: row segment of the parameter's pattern.
        block_S: block of the parameter.
        block_numel_S: elements of the whole block, over all ranks.
        clipped_left_S, clipped_right_S: the row segment continues in the slice before, after;
            never for columns.
        start_R, end_R, parameter_R: element ranges.
        columns: runs of segments that are columns.
    """

    start_S: IntArray
    end_S: IntArray
    parameter_S: IntArray
    row_segment_S: IntArray
    block_S: IntArray
    block_numel_S: IntArray
    clipped_left_S: BoolArray
    clipped_right_S: BoolArray
    start_R: IntArray
    end_R: IntArray
    parameter_R: IntArray
    columns: ColumnRuns

    @cached_property
    def is_column_S(self) -> BoolArray:  # noqa: N802 (shape suffix)
        """Whether a segment is a column, or a part of one."""
        found = np.zeros(self.num_segments, dtype=np.bool_)
        counts = self.columns.counts
        found[np.repeat(self.columns.first_C, counts) + numbers_within(counts)] = True
        return found

    @property
    def num_segments(self) -> int:
        """Number of segments, S."""
        return len(self.start_S)

    @property
    def num_ranges(self) -> int:
        """Number of element ranges, R."""
        return len(self.start_R)

    @property
    def num_elementwise(self) -> int:
        """Elements of all element ranges."""
        return int((self.end_R - self.start_R).sum())


@dataclass(frozen=True)
class SliceSize:
    """Numbers of segments and elements in one slice.

    Attributes:
        num_segments: segments, each with one second moment.
        num_elementwise: elements that have a second moment each.
        num_elements: elements of parameters, without the gaps between them.
    """

    num_segments: int
    num_elementwise: int
    num_elements: int


def slice_size(bucket: BucketLayout, parameters: Sequence[ParameterBlocks], rank: int) -> SliceSize:
    """Count the segments and elements of slice ``rank`` without listing the segments."""
    segments = elementwise = elements = 0
    for _, blocks, first, last in _parts(bucket, parameters, rank):
        elements += last - first
        if blocks.pattern is None:
            elementwise += last - first
        else:
            segments += _num_segments(blocks, blocks.pattern, first, last)
    return SliceSize(segments, elementwise, elements)


def segment_slice(
    bucket: BucketLayout, parameters: Sequence[ParameterBlocks], rank: int
) -> SliceSegments:
    """List the segments of slice ``rank`` of a bucket.

    Args:
        bucket: the bucket's integers.
        parameters: all parameters; placements index into them.
        rank: which slice, ``0 <= rank < bucket.num_slices``.
    """
    begin = rank * bucket.slice_numel
    found: list[_Segments] = []
    ranges: list[tuple[int, int, int]] = []
    runs: list[ColumnRuns] = []
    num_segments = 0
    for placement, blocks, first, last in _parts(bucket, parameters, rank):
        shift = placement.start - begin
        if blocks.pattern is None:
            ranges.append((first + shift, last + shift, placement.parameter))
            continue
        held = _row_segments(placement.parameter, blocks, blocks.pattern, first, last)
        if blocks.pattern.num_column_sets:
            held, of_parameter = _with_columns(held, blocks, blocks.pattern, shift, num_segments)
            runs.append(of_parameter)
        found.append(held._replace(start=held.start + shift, end=held.end + shift))
        num_segments += len(held.start)
    table = np.asarray(ranges, dtype=np.int64).reshape(-1, 3)
    none, no_flags = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.bool_)
    return SliceSegments(
        start_S=np.concatenate([none, *(held.start for held in found)]),
        end_S=np.concatenate([none, *(held.end for held in found)]),
        parameter_S=np.concatenate([none, *(held.parameter for held in found)]),
        row_segment_S=np.concatenate([none, *(held.row_segment for held in found)]),
        block_S=np.concatenate([none, *(held.block for held in found)]),
        block_numel_S=np.concatenate([none, *(held.block_numel for held in found)]),
        clipped_left_S=np.concatenate([no_flags, *(held.clipped_left for held in found)]),
        clipped_right_S=np.concatenate([no_flags, *(held.clipped_right for held in found)]),
        start_R=table[:, 0].copy(),
        end_R=table[:, 1].copy(),
        parameter_R=table[:, 2].copy(),
        columns=ColumnRuns.joined(runs),
    )


class _Segments(NamedTuple):
    """Segments of one parameter in a slice, as in :class:`SliceSegments`."""

    start: IntArray
    end: IntArray
    parameter: IntArray
    row_segment: IntArray
    block: IntArray
    block_numel: IntArray
    clipped_left: BoolArray
    clipped_right: BoolArray


def _row_segments(
    parameter: int, blocks: ParameterBlocks, pattern: RowPattern, first: int, last: int
) -> _Segments:
    """Return what local elements ``[first, last)`` hold of row segments; they count in the shard.

    ``block_numel`` of a column set is that of all of its rows.
    """
    width, offset = blocks.info.row_numel, blocks.info.row_offset
    between = _segments_between(blocks, pattern, first, last)
    segments = np.arange(between.start, between.stop, dtype=np.int64)
    low, high = pattern.row_bounds(segments)
    # Rows of other tensor-parallel ranks are not in the local tensor.
    low = np.maximum((low - offset) * width, 0)
    high = np.minimum((high - offset) * width, blocks.info.numel)
    return _Segments(
        np.maximum(low, first),
        np.minimum(high, last),
        np.full(len(segments), parameter, dtype=np.int64),
        segments,
        pattern.block_of_row_segment(segments),
        pattern.rows_of_block(segments) * width * blocks.info.part_of_rows[0],
        low < first,
        high > last,
    )


def _with_columns(
    held: _Segments, blocks: ParameterBlocks, pattern: RowPattern, shift: int, num_segments: int
) -> tuple[_Segments, ColumnRuns]:
    """Divide the row segments of column sets into columns.

    Args:
        held: row segments of one parameter in the slice.
        blocks: the parameter.
        pattern: its blocks.
        shift: position in the slice minus position in the shard.
        num_segments: segments of the slice before those of the parameter.

    Returns:
        The segments, and the runs that have columns.
    """
    width, (parts, part) = blocks.info.row_numel, blocks.info.part_of_rows
    of_set = pattern.column_set_of(held.row_segment)
    is_run = of_set >= 0
    counts = np.where(is_run, np.minimum(width, held.end - held.start), 1)
    first_C = num_segments + np.cumsum(counts) - counts
    start_C, same = held.start[is_run], np.ones(int(is_run.sum()), dtype=np.int64)
    runs = ColumnRuns(
        start_C + shift,
        held.end[is_run] + shift,
        held.parameter[is_run],
        of_set[is_run],
        same * width,
        start_C % width,
        first_C[is_run],
        same * width * parts,
    )
    row = np.repeat(np.arange(len(counts)), counts)  # row segment of each segment
    is_column = is_run[row]
    start = held.start[row] + numbers_within(counts)
    last = start + (held.end[row] - 1 - start) // width * width
    column = part * width + start % width
    return _Segments(
        start,
        np.where(is_column, last + 1, held.end[row]),
        held.parameter[row],
        held.row_segment[row],
        held.block[row] + np.where(is_column, column, 0),
        held.block_numel[row] // np.where(is_column, width * parts, 1),
        held.clipped_left[row] & ~is_column,
        held.clipped_right[row] & ~is_column,
    ), runs


def element_numbers(
    bucket: BucketLayout,
    parameters: Sequence[ParameterBlocks],
    rank: int,
    starts: IntArray,
    owners: IntArray,
) -> IntArray:
    """Return flat positions of elements of slice ``rank`` in their whole parameters.

    Rows are numbered as in :class:`~megatron_adam_mini.plan.partition.RowPattern`, columns over
    all tensor-parallel ranks, so the numbers of a weight do not depend on the layout (except that
    the order of rows of gated MLPs follows the tensor-parallel size).

    Args:
        bucket: the bucket's integers.
        parameters: all parameters.
        rank: which slice.
        starts: offsets of the elements within the slice.
        owners: index of the parameter at each of them.
    """
    found = np.zeros(len(starts), dtype=np.int64)
    for placement in bucket.placements:
        here = owners == placement.parameter
        info = parameters[placement.parameter].info
        row, column = np.divmod(
            starts[here] + rank * bucket.slice_numel - placement.start, info.row_numel
        )
        parts, part = info.part_of_rows
        found[here] = ((info.row_offset + row) * parts + part) * info.row_numel + column
    return found


def _parts(
    bucket: BucketLayout, parameters: Sequence[ParameterBlocks], rank: int
) -> Iterator[tuple[Placement, ParameterBlocks, int, int]]:
    """Yield each parameter in a slice, with its first and one-past-last element there."""
    begin = rank * bucket.slice_numel
    end = begin + bucket.slice_numel
    for placement in bucket.overlapping(begin, end):
        first = max(begin, placement.start) - placement.start
        last = min(end, placement.end) - placement.start
        yield placement, parameters[placement.parameter], first, last


def _segments_between(blocks: ParameterBlocks, pattern: RowPattern, first: int, last: int) -> range:
    """Return the row segments that have local elements in ``[first, last)``."""
    offset, width = blocks.info.row_offset, blocks.info.row_numel
    return range(
        pattern.row_segment_of(offset + first // width),
        pattern.row_segment_of(offset + (last - 1) // width) + 1,
    )


def _num_segments(blocks: ParameterBlocks, pattern: RowPattern, first: int, last: int) -> int:
    """Return the number of segments among local elements ``[first, last)``."""
    if not pattern.num_column_sets:
        return len(_segments_between(blocks, pattern, first, last))
    held = _row_segments(0, blocks, pattern, first, last)
    is_run = pattern.column_set_of(held.row_segment) >= 0
    counts = np.minimum(blocks.info.row_numel, held.end - held.start)
    return int(np.where(is_run, counts, 1).sum())
