"""The columns of a slice as segments: runs of rows of one column set.

Imports numpy and ``partition``. Data flow: ``segments`` -> **ColumnRuns** -> ``column_sums`` (which
sums cross ranks), ``buffer_plan`` (tables for the kernels), ``step_plan`` (elements of a piece).

A run is what a slice holds of one row segment of a column set. Its segments have elements that are
a row apart. Rows of four columns, cut by a slice that begins and ends within a row::

    column of the weight    2  3  0  1  2  3  0  1  2
    segment of the run      0  1  2  3  0  1  2  3  0

so segment ``s`` is column ``(2 + s) % 4``. A run shorter than a row has a segment per element.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from megatron_adam_mini.plan.partition import IntArray


@dataclass(frozen=True)
class ColumnRuns:
    """Runs of a slice, in ascending order; one entry of each array per run (``_C``).

    Attributes:
        start_C, end_C: offsets within the slice.
        parameter_C: index of the parameter.
        set_C: column set of the parameter.
        width_C: columns of the parameter on this rank.
        column_C: column of the run's first element, counted on this rank.
        first_C: the run's first segment, among those of the slice.
        row_stride_C: elements of the whole parameter from one row to the next.
    """

    start_C: IntArray
    end_C: IntArray
    parameter_C: IntArray
    set_C: IntArray
    width_C: IntArray
    column_C: IntArray
    first_C: IntArray
    row_stride_C: IntArray

    def __len__(self) -> int:
        """Return the number of runs."""
        return len(self.start_C)

    @property
    def counts(self) -> IntArray:
        """Segments of each run."""
        found: IntArray = np.minimum(self.width_C, self.end_C - self.start_C)
        return found

    @classmethod
    def joined(cls, parts: Sequence[ColumnRuns]) -> ColumnRuns:
        """Return the runs of several parts, one after the other."""
        none = np.empty(0, dtype=np.int64)
        return cls(
            *(np.concatenate([none, *(getattr(p, f.name) for p in parts)]) for f in fields(cls))
        )


def numbers_within(counts: IntArray) -> IntArray:
    """Return ``0, 1, ..., count - 1`` for each count, one after the other."""
    found: IntArray = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return found
