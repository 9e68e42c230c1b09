"""Which sums of squares are taken at once: those of a bucket, or what is left of a buffer.

Imports numpy and ``buffer_plan``. Data flow: buffer plan, parameters that come later ->
**BucketTables** -> ``overlapped_sums``. They are parts of the tables of the buffer; entries and
positions are the same, and so is each sum, bit for bit: it depends on its own segment alone.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from megatron_adam_mini.plan.buffer_plan import BufferPlan, Window
from megatron_adam_mini.plan.column_table import ColumnTable
from megatron_adam_mini.plan.partition import BoolArray, IntArray
from megatron_adam_mini.plan.segment_table import SegmentTable


class BucketTables(NamedTuple):
    """Tables whose sums are taken at once; a :class:`BufferPlan` has all of a buffer.

    Attributes:
        segments: segments but columns.
        columns: segments that are columns.
        ranges: element ranges.
    """

    segments: SegmentTable
    columns: ColumnTable
    ranges: SegmentTable


def tables_by_bucket(plan: BufferPlan, chosen_SR: BoolArray) -> list[BucketTables]:
    """Return, for each bucket of a buffer, the tables of chosen segments and ranges.

    Args:
        plan: this rank's slices of the buffer.
        chosen_SR: which entries of the rank are wanted.
    """
    return [
        BucketTables(
            _rows(plan.segments, chosen_SR, slice_plan.window),
            _columns(plan.columns, chosen_SR, slice_plan.window),
            _rows(plan.ranges, chosen_SR, slice_plan.window),
        )
        for slice_plan in plan.slices
    ]


def tables_of(plan: BufferPlan, chosen_SR: BoolArray) -> BucketTables:
    """Return the tables of chosen segments and ranges of a buffer."""
    return BucketTables(
        plan.segments.subset(chosen_SR[plan.segments.indices]),
        plan.columns.subset(chosen_SR[plan.columns.index_C]),
        plan.ranges.subset(chosen_SR[plan.ranges.indices]),
    )


def _rows(table: SegmentTable, chosen_SR: BoolArray, window: Window) -> SegmentTable:
    here = _between(table.start_S, window)
    part = SegmentTable(
        table.start_S[here], table.end_S[here], table.indices[here], table.shifts[here]
    )
    return part.subset(chosen_SR[part.indices])


def _columns(table: ColumnTable, chosen_SR: BoolArray, window: Window) -> ColumnTable:
    here = _between(table.start_C, window)
    chosen_C = np.zeros(len(table), dtype=np.bool_)
    chosen_C[here] = chosen_SR[table.index_C[here]]
    return table.subset(chosen_C)


def _between(start: IntArray, window: Window) -> slice:
    """Return which of ascending starts lie in a window of the buffer."""
    bounds = (window.in_buffer.start, window.in_buffer.stop)
    return slice(*np.searchsorted(start, bounds).tolist())
