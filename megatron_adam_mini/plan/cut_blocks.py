"""Which blocks are cut: known to all ranks without a list of anyone's segments.

Imports numpy, ``layout`` and ``partition``. Data flow: partition, layout of a bucket -> **row
segments that boundaries cut, spread blocks** -> reduction.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from megatron_adam_mini.plan.layout import BucketLayout
from megatron_adam_mini.plan.partition import IntArray, ParameterBlocks, RowPattern


def cut_row_segments(bucket: BucketLayout, parameters: Sequence[ParameterBlocks]) -> IntArray:
    """Return, for each boundary between slices, the number of the row segment that it cuts, or -1.

    Shape ``(num_slices - 1,)``. Row segments that are cut are numbered in ascending order. Those of
    spread blocks (see :func:`spread_blocks`) do not count: their sums have slots of their own. Nor
    do those of column sets.
    """
    positions = bucket.slice_numel * np.arange(1, bucket.num_slices, dtype=np.int64)
    cut = np.full((len(positions), 2), -1, dtype=np.int64)  # placement, and row segment
    starts = np.asarray([p.start for p in bucket.placements], dtype=np.int64)
    found = np.searchsorted(starts, positions, side="right") - 1
    for number in np.unique(found[found >= 0]).tolist():
        placement = bucket.placements[number]
        blocks = parameters[placement.parameter]
        if blocks.pattern is None:
            continue
        inside = np.flatnonzero(
            (found == number) & (positions > placement.start) & (positions < placement.end)
        )
        element = positions[inside] - placement.start
        offset, width = blocks.info.row_offset, blocks.info.row_numel
        before = blocks.pattern.row_segments_of(offset + (element - 1) // width)
        after = blocks.pattern.row_segments_of(offset + element // width)
        spread = np.isin(blocks.pattern.block_of_row_segment(after), spread_blocks(blocks))
        is_cut = (before == after) & ~spread & (blocks.pattern.column_set_of(after) < 0)
        cut[inside[is_cut]] = np.stack([np.full(is_cut.sum(), number), after[is_cut]], axis=1)
    is_cut = cut[:, 0] >= 0
    is_new = np.any(np.diff(cut[is_cut], axis=0, prepend=-1) != 0, axis=1)
    numbers = np.full(len(positions), -1, dtype=np.int64)
    numbers[is_cut] = np.cumsum(is_new) - 1
    return numbers


def spread_blocks(blocks: ParameterBlocks) -> IntArray:
    """Return the spread blocks of a parameter, ascending, the same on every tensor-parallel rank.

    They are the blocks of several row segments, and, if dimension 0 is split, those that cross a
    boundary between tensor-parallel ranks (a Query or Key head if twice the number of query groups
    is not divisible by the tensor-parallel size). Columns are no spread blocks.
    """
    if blocks.pattern is None:
        return np.empty(0, dtype=np.int64)
    split_rows = blocks.info.shape[0] if blocks.info.rows_are_split else 0
    return _spread_blocks(blocks.pattern, split_rows)


def spread_elements(blocks: ParameterBlocks) -> tuple[IntArray, IntArray]:
    """Return first and one-past-last element that each spread block has in the local tensor.

    Both are 0 for blocks whose elements are all on other tensor-parallel ranks.
    """
    spread, info = spread_blocks(blocks), blocks.info
    if blocks.pattern is None or not len(spread):
        return spread, spread
    rows = info.numel // info.row_numel
    low, high = _spread_rows(blocks.pattern, tuple(spread.tolist()), info.row_offset, rows)
    return low * info.row_numel, high * info.row_numel


@lru_cache(maxsize=512)
def _spread_blocks(pattern: RowPattern, split_rows: int) -> IntArray:
    if pattern.segment_rows == (1,) and pattern.shared == (-1,):
        return np.empty(0, dtype=np.int64)
    segments = np.arange(pattern.num_row_segments, dtype=np.int64)
    spread = pattern.is_of_several(segments)
    if split_rows:
        low, high = pattern.row_bounds(segments)
        crosses = low // split_rows != (high - 1) // split_rows
        spread = spread | (crosses & (pattern.column_set_of(segments) < 0))
    return np.unique(pattern.block_of_row_segment(segments[spread]))


@lru_cache(maxsize=512)
def _spread_rows(
    pattern: RowPattern, spread: tuple[int, ...], offset: int, rows: int
) -> tuple[IntArray, IntArray]:
    """Return first and one-past-last of ``rows`` local rows in which each block has elements."""
    segments = np.arange(pattern.num_row_segments, dtype=np.int64)
    bounds = np.stack(pattern.row_bounds(segments)) - offset
    block = pattern.block_of_row_segment(segments)
    chosen = np.isin(block, spread) & (bounds[0] < rows) & (bounds[1] > 0)
    index = np.searchsorted(spread, block[chosen])
    first = np.full(len(spread), rows, dtype=np.int64)
    last = np.zeros(len(spread), dtype=np.int64)
    np.minimum.at(first, index, np.maximum(bounds[0, chosen], 0))
    np.maximum.at(last, index, np.minimum(bounds[1, chosen], rows))
    return np.where(last > 0, first, 0), last
