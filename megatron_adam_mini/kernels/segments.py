"""The table of segments in the form that kernels read.

Imports torch and numpy. Data flow: layout.SliceSegments -> **SegmentTable** -> kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_adam_mini.partition import IntArray

_T = TypeVar("_T")

#: Columns of :meth:`SegmentTable.tiles`.
TILE_FIELDS = ("start", "length", "count", "index", "packed", "within", "partial")


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
        origin_S: number of each segment's first element for stochastic rounding, 32 bits used;
            elements of one segment are numbered on from it. Default: its offset in the slice.
    """

    start_S: IntArray  # noqa: N815 (shape suffix)
    end_S: IntArray  # noqa: N815
    device: torch.device
    index_S: IntArray | None = None  # noqa: N815
    origin_S: IntArray | None = None  # noqa: N815

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
            self.origins[chosen_S],
        )

    def derived(self, make: Callable[[SegmentTable], _T]) -> _T:
        """Return ``make(self)``, made once and kept as long as the table."""
        kept: dict[Any, Any] = self._derived
        if make not in kept:
            kept[make] = make(self)
        found: _T = kept[make]
        return found

    @cached_property
    def _derived(self) -> dict[Any, Any]:
        return {}

    @cached_property
    def indices(self) -> IntArray:
        """``index_S`` with its default."""
        return np.arange(len(self), dtype=np.int64) if self.index_S is None else self.index_S

    @cached_property
    def origins(self) -> IntArray:
        """``origin_S`` with its default, in ``[0, 2**32)``."""
        return (self.start_S if self.origin_S is None else self.origin_S) & 0xFFFFFFFF

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

    def tiles(self, limit: int, *, split: bool) -> IntArray:
        """Cut the runs into pieces of work of at most about ``limit`` elements.

        A tile is either ``count`` whole segments of ``length`` elements each, or (``split``, and
        only if the segment is longer than ``limit``) a part of one segment.

        Returns:
            int64, shape ``(T, 7)``, columns :data:`TILE_FIELDS`: ``start`` in the slice,
            ``length``, ``count``, ``index`` of the first segment's entry, ``packed`` elements of
            the table before the tile, ``within`` elements of the segment before the tile, and
            ``partial``: -1 for whole segments, else the number of the part among all parts.
        """
        tiles: list[IntArray] = [np.empty((0, len(TILE_FIELDS)), dtype=np.int64)]
        packed = parts = 0
        for run in self.runs:
            if split and run.length > limit:
                per_segment = -(-run.length // limit)
                segment = np.repeat(np.arange(run.count), per_segment)
                within = np.tile(np.arange(per_segment) * limit, run.count)
                columns = [
                    run.start + segment * run.length + within,
                    np.minimum(run.length - within, limit),
                    np.ones_like(segment),
                    run.first + segment,
                    packed + segment * run.length + within,
                    within,
                    parts + np.arange(len(segment)),
                ]
                parts += len(segment)
            else:
                rows = max(1, limit // run.length)
                rows -= rows % 8 if rows > 8 else 0  # the loops take eight rows at once
                first = np.arange(0, run.count, rows)
                columns = [
                    run.start + first * run.length,
                    np.full_like(first, run.length),
                    np.minimum(run.count - first, rows),
                    run.first + first,
                    packed + first * run.length,
                    np.zeros_like(first),
                    np.full_like(first, -1),
                ]
            tiles.append(np.stack(columns, axis=1).astype(np.int64))
            packed += run.count * run.length
        return np.ascontiguousarray(np.concatenate(tiles))

    @cached_property
    def origin_tensor(self) -> Tensor:
        """``origins`` by entry in the vectors, int64 on the device; 0 where there is none."""
        size = int(self.indices.max(initial=-1)) + 1
        found = np.zeros(size, dtype=np.int64)
        found[self.indices] = self.origins
        return torch.from_numpy(found).to(self.device)
