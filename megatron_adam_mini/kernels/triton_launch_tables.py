"""Launch tables and scratch of the Triton kernels, made when a table is first used, and kept.

Imports torch and numpy. Data flow: SegmentTable, ColumnTable, OrderedSums -> tiles
(``triton_tiles``, ``column_tiles``) -> words (``tile_words``) -> **tensors on the device** ->
``triton_gpu``.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from megatron_adam_mini.kernels.column_tiles import RECTANGLE_FIELDS, Cut, rectangles, sums
from megatron_adam_mini.kernels.tile_words import (
    COLUMN_WORDS,
    PACKED_WORDS,
    ROW_WORDS,
    WINDOW_WORDS,
    words,
)
from megatron_adam_mini.kernels.triton_tiles import (
    COLUMN_WINDOW_FIELDS,
    ROW_FIELDS,
    WINDOW_FIELDS,
    RowKind,
    by_vec,
    column_windows,
    is_long,
    parts,
    row_tiles,
    windows,
)
from megatron_adam_mini.plan.column_table import ColumnTable
from megatron_adam_mini.plan.ordered_sums import OrderedSums
from megatron_adam_mini.plan.partition import IntArray
from megatron_adam_mini.plan.segment_table import SegmentTable

#: Columns side by side in a program, and elements that it adds up.
COLUMNS, COLUMN_NUMEL = 256, 32768
#: Segments whose partial sums of columns a program adds up.
SEGMENTS = 32


class SegmentLaunches:
    """Launch tables and scratch of one table of segments, made on first use."""

    def __init__(self, segments: SegmentTable, device: torch.device) -> None:
        self.segments = segments
        self.device = device
        self._windows: dict[tuple[int, bool], list[tuple[int, Tensor]]] = {}
        self._rows: dict[int, list[tuple[RowKind, Tensor]]] = {}
        self._parts: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all tables and scratch made so far."""
        tables = [tiles for launches in self._windows.values() for _, tiles in launches]
        tables += [tiles for launches in self._rows.values() for _, tiles in launches]
        tables += [tensor for kept in self._parts.values() for tensor in kept]
        halves: list[SegmentLaunches] = [
            vars(self)[name] for name in ("short", "long") if name in vars(self)
        ]
        return sum(tensor.nbytes for tensor in tables) + sum(half.nbytes for half in halves)

    @cached_property
    def short(self) -> SegmentLaunches:
        """Launches of the segments that are summed whole."""
        return SegmentLaunches(self.segments.subset(~is_long(self.segments)), self.device)

    @cached_property
    def long(self) -> SegmentLaunches:
        """Launches of the segments that are summed in parts."""
        return SegmentLaunches(self.segments.subset(is_long(self.segments)), self.device)

    def windows(self, vec: int, *, packed: bool = False) -> list[tuple[int, Tensor]]:
        """Return, for each launch, elements per access and windows."""
        if (vec, packed) not in self._windows:
            found = windows(self.segments, vec, packed=packed)
            layout = PACKED_WORDS if packed else WINDOW_WORDS
            self._windows[vec, packed] = [
                (size, to_device(words(tiles, WINDOW_FIELDS, layout), self.device))
                for size, tiles in found.items()
            ]
        return self._windows[vec, packed]

    def rows(self, vec: int) -> list[tuple[RowKind, Tensor]]:
        """Return, for each launch, its kind of row tiles, and the tiles on the device."""
        if vec not in self._rows:
            self._rows[vec] = [
                (kind, to_device(words(tiles, ROW_FIELDS, ROW_WORDS), self.device))
                for kind, tiles in row_tiles(self.segments, vec)
            ]
        return self._rows[vec]

    def parts(self, vec: int) -> tuple[Tensor, Tensor]:
        """Return entry, first part and number of parts of long segments, and their scratch."""
        if vec not in self._parts:
            start, _, index_S, segment_T = parts(self.segments, vec)
            first_S = np.searchsorted(segment_T, np.arange(len(index_S)))
            count_S = np.bincount(segment_T, minlength=len(index_S))
            self._parts[vec] = (
                to_device(np.stack([index_S, first_S, count_S], axis=1), self.device),
                torch.zeros(len(start), dtype=torch.float32, device=self.device),
            )
        return self._parts[vec]


class ColumnSumLaunches:
    """Launch tables and scratch of one table of columns, for sums."""

    def __init__(self, table: ColumnTable, vec: int, device: torch.device) -> None:
        cut = Cut(columns=COLUMNS, numel=COLUMN_NUMEL, line=1024, multiple=vec)
        found, bounds = rectangles(table, cut)
        found = found[:, : RECTANGLE_FIELDS.index("partial") + 1]
        suits = (found[:, :3] % vec == 0).all(axis=1)  # start, stride and columns
        #: Elements per access and rectangles of each launch.
        self.tiles = [
            (size, to_device(tiles, device)) for size, tiles in by_vec(found, suits, vec).items()
        ]
        #: What adds up the partial sums.
        self.blocks = to_device(sums(table, bounds, SEGMENTS), device)
        self.partials = torch.zeros(int(bounds[-1]), dtype=torch.float32, device=device)
        tables = [tiles for _, tiles in self.tiles]
        self.nbytes = sum(tensor.nbytes for tensor in (*tables, self.blocks, self.partials))


class ColumnUpdateLaunches:
    """Launch tables of one table of columns, for updates."""

    def __init__(self, table: ColumnTable, vec: int, device: torch.device) -> None:
        #: Elements per access and windows of each launch.
        self.tiles = [
            (size, to_device(words(tiles, COLUMN_WINDOW_FIELDS, COLUMN_WORDS), device))
            for size, tiles in column_windows(table, vec).items()
        ]
        self.nbytes = sum(tiles.nbytes for _, tiles in self.tiles)


def sum_positions(table: OrderedSums, device: torch.device) -> list[Tensor]:
    """Return targets, bounds and sources of sums, int32."""
    found = (table.target, table.bounds, table.source)
    return [torch.from_numpy(positions.astype(np.int32)).to(device) for positions in found]


def to_device(table: IntArray, device: torch.device) -> Tensor:
    """Return a table on the device."""
    return torch.from_numpy(np.ascontiguousarray(table)).to(device)
