"""The table of segments in the form that kernels read.

Imports torch and numpy. Data flow: layout.SliceSegments -> **SegmentTable** -> kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_adam_mini.plan.partition import IntArray


@dataclass(frozen=True)
class Run:
    """``count`` adjacent segments of ``length`` elements each, from element ``start`` on.

    ``first`` is the place of the first of them in the vectors with one entry per segment.
    ``flat[run.window].view(count, length)`` has one segment per row.
    """

    first: int
    count: int
    start: int
    length: int

    @property
    def segments(self) -> slice:
        """Places of the segments in the vectors with one entry per segment."""
        return slice(self.first, self.first + self.count)

    @property
    def window(self) -> slice:
        """Elements of the flat slice."""
        return slice(self.start, self.start + self.count * self.length)


@dataclass(frozen=True, eq=False)
class SegmentTable:
    """Segments ``[start_S, end_S)`` of one slice, ascending and disjoint; gaps are allowed.

    Args:
        start_S, end_S: int64, shape ``(S,)``, offsets in elements.
        device: where kernels that read the table as tensors want it.
        index_S: where each segment has its entry in vectors with one entry per segment;
            default: its place in this table.
    """

    start_S: IntArray  # noqa: N815 (shape suffix)
    end_S: IntArray  # noqa: N815
    device: torch.device
    index_S: IntArray | None = None  # noqa: N815

    def __len__(self) -> int:
        """Return the number of segments."""
        return len(self.start_S)

    def subset(self, chosen_S: NDArray[np.bool_]) -> SegmentTable:
        """Return the table of the chosen segments; their entries stay where they are."""
        return SegmentTable(
            self.start_S[chosen_S],
            self.end_S[chosen_S],
            self.device,
            self.indices[chosen_S],
        )

    def derived[T](self, make: Callable[[SegmentTable], T]) -> T:
        """Return ``make(self)``, made once and kept as long as the table."""
        kept: dict[Any, Any] = self._derived
        if make not in kept:
            kept[make] = make(self)
        found: T = kept[make]
        return found

    @cached_property
    def _derived(self) -> dict[Any, Any]:
        return {}

    @cached_property
    def indices(self) -> IntArray:
        """``index_S`` with its default."""
        return np.arange(len(self), dtype=np.int64) if self.index_S is None else self.index_S

    @cached_property
    def numel(self) -> int:
        """Elements of all segments."""
        return int((self.end_S - self.start_S).sum())

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """Adjacent segments of equal length, so that plain torch needs no loop over segments."""
        if not len(self):
            return ()
        length = self.end_S - self.start_S
        breaks = length[1:] != length[:-1]
        breaks |= self.start_S[1:] != self.end_S[:-1]
        breaks |= self.indices[1:] != self.indices[:-1] + 1
        first = np.concatenate([[0], np.flatnonzero(breaks) + 1, [len(self)]])
        return tuple(
            Run(int(self.indices[a]), int(b - a), int(self.start_S[a]), int(length[a]))
            for a, b in pairwise(first)
        )
