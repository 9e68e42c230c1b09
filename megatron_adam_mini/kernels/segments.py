"""The table of segments in the form that kernels read.

Imports torch and numpy. Data flow: layout.SliceSegments -> **SegmentTable** -> kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from megatron_adam_mini.partition import IntArray


@dataclass(frozen=True)
class Run:
    """``count`` adjacent segments of ``length`` elements each, from element ``start`` on.

    ``first`` is the index of the first of them. ``flat[run.window].view(count, length)`` has one
    segment per row.
    """

    first: int
    count: int
    start: int
    length: int

    @property
    def segments(self) -> slice:
        """Indices of the segments."""
        return slice(self.first, self.first + self.count)

    @property
    def window(self) -> slice:
        """Elements of the flat slice."""
        return slice(self.start, self.start + self.count * self.length)


@dataclass(frozen=True)
class SegmentTable:
    """Segments ``[start_S, end_S)`` of one slice, ascending and disjoint; gaps are allowed.

    Args:
        start_S, end_S: int64, shape ``(S,)``, offsets in elements.
        device: where kernels that read the table as tensors want it.
    """

    start_S: IntArray  # noqa: N815 (shape suffix)
    end_S: IntArray  # noqa: N815
    device: torch.device

    def __len__(self) -> int:
        """Return the number of segments."""
        return len(self.start_S)

    @cached_property
    def starts(self) -> Tensor:
        """``start_S`` as an int64 tensor on the device."""
        return torch.from_numpy(self.start_S).to(self.device)

    @cached_property
    def ends(self) -> Tensor:
        """``end_S`` as an int64 tensor on the device."""
        return torch.from_numpy(self.end_S).to(self.device)

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """Adjacent segments of equal length, so that plain torch needs no loop over segments."""
        if not len(self):
            return ()
        length = self.end_S - self.start_S
        breaks = (length[1:] != length[:-1]) | (self.start_S[1:] != self.end_S[:-1])
        first = np.concatenate([[0], np.flatnonzero(breaks) + 1, [len(self)]])
        return tuple(
            Run(int(a), int(b - a), int(self.start_S[a]), int(length[a]))
            for a, b in pairwise(first)
        )
