"""Sums of few numbers each, as positions in one vector: what surrounds the collectives of a step.

Imports numpy, ``column_runs``, ``derived_tables``. Data flow: ``reduction``, ``column_sums`` ->
**OrderedSums** -> ``ordered_sum_`` of the kernels, which ``collectives`` calls.

All positions are in the *values* of a rank: sums of its segments and element ranges, then the
vectors that collectives work on, see :func:`vector_after`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_adam_mini.plan.column_runs import numbers_within
from megatron_adam_mini.plan.derived_tables import DerivedTables
from megatron_adam_mini.plan.partition import IntArray

#: Vectors begin at multiples of so many float32 numbers, 16 bytes.
_ALIGNMENT = 4


def vector_after(end: int, numel: int) -> slice:
    """Return the positions of a vector behind all that ends at ``end``."""
    begin = -(-end // _ALIGNMENT) * _ALIGNMENT
    return slice(begin, begin + numel)


def numel_of(vector: slice) -> int:
    """Return the numbers in a vector."""
    return int(vector.stop - vector.start)


@dataclass(frozen=True, eq=False)
class OrderedSums(DerivedTables):
    """Rows ``values[target] = values[source] + values[next source] + ...``, from left to right.

    A row without sources writes zero.

    Args:
        target: where each row writes, shape ``(rows,)``.
        counts: sources of each row.
        source: all sources, row after row.

    Raises:
        ValueError: a position is written twice, or both read and written.
    """

    target: IntArray
    counts: IntArray
    source: IntArray

    def __post_init__(self) -> None:
        """Check that the order of rows does not matter."""
        if len(self.counts) != len(self.target) or self.counts.sum() != len(self.source):
            raise ValueError(
                f"A table of sums has {len(self.target)} targets, {len(self.counts)} counts with "
                f"sum {self.counts.sum()}, and {len(self.source)} sources; they must match."
            )
        touched = np.zeros(self.num_values, dtype=np.bool_)
        touched[self.target] = True
        if touched.sum() != len(self.target) or touched[self.source].any():
            raise ValueError("A table of sums writes a position twice, or reads what it writes.")

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.target)

    @cached_property
    def num_values(self) -> int:
        """Number of values that there must be."""
        return int(max(self.target.max(initial=-1), self.source.max(initial=-1))) + 1

    @cached_property
    def bounds(self) -> IntArray:
        """Where the sources of each row begin, and the end of the last, shape ``(rows + 1,)``."""
        return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self.counts)])

    @classmethod
    def of_ranges(cls, target: IntArray, first: IntArray, counts: IntArray) -> OrderedSums:
        """Return a table whose rows have adjacent sources, from ``first`` on."""
        return cls(target, counts, np.repeat(first, counts) + numbers_within(counts))

    @classmethod
    def of_rows(cls, target: IntArray, sources: IntArray) -> OrderedSums:
        """Return a table from sources of shape ``(rows, k)``."""
        counts = np.full(len(target), sources.shape[1], dtype=np.int64)
        return cls(target, counts, sources.reshape(-1))

    @classmethod
    def grouped(cls, vector: slice, place: IntArray, source: IntArray) -> OrderedSums:
        """Return a row for each position of a vector.

        Args:
            vector: the positions.
            place: row of each source, counted in the vector.
            source: in the order in which those of a row are added.
        """
        order = np.argsort(place, kind="stable")
        counts = np.bincount(place, minlength=numel_of(vector))
        return cls(np.arange(vector.start, vector.stop), counts, source[order])

    @classmethod
    def joined(cls, tables: Sequence[OrderedSums]) -> OrderedSums:
        """Return the rows of several tables."""
        none = [np.empty(0, dtype=np.int64)]
        return cls(
            np.concatenate(none + [table.target for table in tables]),
            np.concatenate(none + [table.counts for table in tables]),
            np.concatenate(none + [table.source for table in tables]),
        )
