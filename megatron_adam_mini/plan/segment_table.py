"""The segments of one buffer as a table for the kernels.

Imports numpy and ``derived_tables``. Data flow: ``buffer_plan`` -> **SegmentTable** -> kernels,
which derive their launch tables from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from megatron_adam_mini.plan.derived_tables import DerivedTables
from megatron_adam_mini.plan.partition import BoolArray, IntArray


@dataclass(frozen=True)
class Run:
    """``count`` adjacent segments of ``length`` elements each, from element ``start`` on.

    ``flat[run.in_buffer].view(count, length)`` has one segment per row.

    Attributes:
        first: entry of the first segment in the vectors with one entry per segment.
        count: number of segments.
        start: first element in the buffer.
        length: elements of each segment.
        shift: position in the state minus position in the buffer.
    """

    first: int
    count: int
    start: int
    length: int
    shift: int = 0

    @property
    def entries(self) -> slice:
        """Entries of the segments in the vectors with one entry per segment."""
        return slice(self.first, self.first + self.count)

    @property
    def in_buffer(self) -> slice:
        """Elements of the buffer."""
        return slice(self.start, self.start + self.count * self.length)

    @property
    def in_state(self) -> slice:
        """Positions of the same elements in the state."""
        start = self.start + self.shift
        return slice(start, start + self.count * self.length)


@dataclass(frozen=True, eq=False)
class SegmentTable(DerivedTables):
    """Segments (or element ranges) of a rank in one buffer, ascending and disjoint.

    Positions in buffer and state differ, because gradients and weights lie in Megatron's buffer,
    while the state holds this rank's slices only: element ``x`` of the buffer is element
    ``x + shift`` of the state.

    Args:
        start_S, end_S: int64, shape ``(S,)``, elements of the buffer.
        index_S: int64, entry of each segment in vectors with one entry per segment; default: its
            position in this table.
        shift_S: int64, position in the state minus position in the buffer; default: zero.
    """

    start_S: IntArray
    end_S: IntArray
    index_S: IntArray | None = None
    shift_S: IntArray | None = None

    def __len__(self) -> int:
        """Return the number of segments."""
        return len(self.start_S)

    def subset(self, chosen_S: BoolArray) -> SegmentTable:
        """Return the table of the chosen segments; entries and positions stay the same."""
        return SegmentTable(
            self.start_S[chosen_S],
            self.end_S[chosen_S],
            self.indices[chosen_S],
            self.shifts[chosen_S],
        )

    @cached_property
    def indices(self) -> IntArray:
        """``index_S``, or its default."""
        return np.arange(len(self), dtype=np.int64) if self.index_S is None else self.index_S

    @cached_property
    def shifts(self) -> IntArray:
        """``shift_S``, or its default."""
        return np.zeros(len(self), dtype=np.int64) if self.shift_S is None else self.shift_S

    @cached_property
    def numel(self) -> int:
        """Elements of all segments."""
        return int((self.end_S - self.start_S).sum())

    @cached_property
    def num_entries(self) -> int:
        """Number of entries that vectors must have for this table."""
        return int(self.indices.max(initial=-1)) + 1

    @cached_property
    def reach(self) -> int:
        """Number of elements that the buffer must have."""
        return int(self.end_S.max(initial=0))

    @cached_property
    def state_reach(self) -> int:
        """Number of elements that the state must have."""
        return int((self.end_S + self.shifts).max(initial=0))

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """Adjacent segments of equal length as runs: plain torch needs no loop over segments."""
        if not len(self):
            return ()
        length = self.end_S - self.start_S
        breaks = length[1:] != length[:-1]
        breaks |= self.start_S[1:] != self.end_S[:-1]
        breaks |= self.indices[1:] != self.indices[:-1] + 1
        breaks |= self.shifts[1:] != self.shifts[:-1]
        first = np.concatenate([[0], np.flatnonzero(breaks) + 1, [len(self)]])
        return tuple(
            Run(
                int(self.indices[a]),
                int(b - a),
                int(self.start_S[a]),
                int(length[a]),
                int(self.shifts[a]),
            )
            for a, b in pairwise(first)
        )
