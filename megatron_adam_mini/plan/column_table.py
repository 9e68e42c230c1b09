"""Runs of rows whose columns are segments: elements of one segment are a row apart.

Imports numpy, ``column_runs`` and ``derived_tables``. Data flow: ``buffer_plan`` -> **ColumnTable**
-> kernels.

A run of eight elements that begins with the third element of a row of three columns, and one whose
first four elements lie elsewhere (``skip`` 4)::

    element of the run      0  1  2  3  4  5  6  7           4  5  6  7
    column of the weight    2  0  1  2  0  1  2  0           0  1  2  0
    segment of the run      0  1  2  0  1  2  0  1           1  2  0  1
    element of the segment  0  0  0  1  1  1  2  2           1  1  2  2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

from megatron_adam_mini.plan.column_runs import numbers_within
from megatron_adam_mini.plan.derived_tables import DerivedTables
from megatron_adam_mini.plan.partition import BoolArray, IntArray


@dataclass(frozen=True, eq=False)
class ColumnTable(DerivedTables):
    """Runs, in ascending order; one entry of each array per run (``_C``).

    Element ``x`` of the buffer, in ``[start, end)`` of a run, is element ``x + shift`` of the
    state. With ``k, s = divmod(skip + x - start, width)``, it is element ``k`` of segment ``s`` of
    the run, whose entry in vectors is ``index + s``. A run has ``min(width, skip + end - start)``
    segments.

    Attributes:
        start_C, end_C: int64, elements of the buffer.
        width_C: int64, columns of the weight on this rank.
        index_C: int64, entry of the run's first segment.
        skip_C: int64, elements of the run before ``start``, which are elsewhere.
        shift_C: int64, position in the state minus position in the buffer.
        row_stride_C: int64, elements of the whole parameter from one element of a segment to the
            next; for the noise of stochastic rounding.
    """

    start_C: IntArray
    end_C: IntArray
    width_C: IntArray
    index_C: IntArray
    skip_C: IntArray
    shift_C: IntArray
    row_stride_C: IntArray

    def __len__(self) -> int:
        """Return the number of runs."""
        return len(self.start_C)

    def subset(self, chosen_C: BoolArray) -> ColumnTable:
        """Return the table of the chosen runs; entries and positions stay the same."""
        return ColumnTable(*(getattr(self, field.name)[chosen_C] for field in fields(self)))

    @classmethod
    def joined(cls, parts: Sequence[Sequence[IntArray]]) -> ColumnTable:
        """Return the table of several parts, one after the other.

        Args:
            parts: the arrays of each, in the order of the attributes.
        """
        none = np.empty(0, dtype=np.int64)
        columns = zip(*parts, strict=True) if parts else [()] * len(fields(cls))
        return cls(*(np.concatenate([none, *column]) for column in columns))

    @cached_property
    def indices(self) -> IntArray:
        """Entries of the segments of all runs, one run after the other."""
        first = np.repeat(self.index_C, self.counts)
        return first + numbers_within(self.counts)

    @cached_property
    def counts(self) -> IntArray:
        """Segments of each run."""
        found: IntArray = np.minimum(self.width_C, self.skip_C + self.end_C - self.start_C)
        return found

    @cached_property
    def numel(self) -> int:
        """Elements of all runs."""
        return int((self.end_C - self.start_C).sum())

    @cached_property
    def num_entries(self) -> int:
        """Number of entries that vectors must have for this table."""
        return int((self.index_C + self.counts).max(initial=0))

    @cached_property
    def reach(self) -> int:
        """Number of elements that the buffer must have."""
        return int(self.end_C.max(initial=0))

    @cached_property
    def state_reach(self) -> int:
        """Number of elements that the state must have."""
        return int((self.end_C + self.shift_C).max(initial=0))
