"""How the Triton kernels cut a table of segments into tiles, one per program.

Imports numpy. Data flow: SegmentTable, ColumnTable -> **windows, row tiles** -> launch tables
(``triton_launch_tables``). Rectangles of columns, for sums: ``column_tiles``.

Alignment is decided here, once and from integers. Kernels move ``vec`` elements per access; a tile
suits this if each of its vectors lies in one segment, entirely inside the tile, at a multiple of
``vec`` in the buffer and in the state. Other tiles go to a launch with single elements.

Shape suffixes: ``_T`` tiles, ``_U`` runs of segments (see ``SegmentTable.runs``), ``_C`` runs of
rows (see ``ColumnTable``).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_adam_mini.plan.column_table import ColumnTable
from megatron_adam_mini.plan.partition import IntArray
from megatron_adam_mini.plan.segment_table import SegmentTable

#: Elements of a window, and of the rectangle that one pass over a row tile loads.
TILE_NUMEL = 2048
#: Longer segments are summed in parts of this length; their g is read from memory twice.
ROW_LIMIT = 16384
#: Width of the smallest rectangle; narrower rows share it, so there are few kernels to compile.
MIN_COLUMNS = 32

WINDOW_FIELDS = (
    "start",
    "low",
    "high",
    "shift",
    "length",
    "index",
    "skip",
    "packed",
    "shift_state",
)
COLUMN_WINDOW_FIELDS = (
    "start",
    "low",
    "high",
    "place",
    "width",
    "index",
    "number",
    "row_stride",
    "shift_state",
)
ROW_FIELDS = ("start", "length", "count", "index", "partial", "shift_state")


class RowKind(NamedTuple):
    """What row tiles of one launch have in common.

    Attributes:
        vec: elements per access.
        columns: width of the rectangle that is loaded at once, a power of two. Only at
            ``TILE_NUMEL`` may rows be longer; they then take several passes.
    """

    vec: int
    columns: int

    @property
    def rows(self) -> int:
        """Rows per tile."""
        return TILE_NUMEL // self.columns


class RowTiles(NamedTuple):
    """Row tiles of one launch.

    Attributes:
        kind: what they have in common.
        tiles: int64, shape ``(T, 6)``, columns :data:`ROW_FIELDS`: ``start`` in the buffer, and
            ``count`` rows of ``length`` elements with entries from ``index`` on; or one part of a
            segment, with ``partial`` its number among all parts (else -1). ``shift_state``:
            position in the state minus position in the buffer.
    """

    kind: RowKind
    tiles: IntArray


def windows(table: SegmentTable, vec: int, *, packed: bool) -> dict[int, IntArray]:
    """Cut the runs into windows of the buffer, for elementwise kernels.

    Args:
        table: segments.
        vec: elements per access of the main path, a power of two.
        packed: whether a stream that holds the table's elements without gaps must be aligned too.

    Returns:
        windows by elements per access (``vec`` and 1, without empty ones): int64, shape ``(T, 9)``,
        columns :data:`WINDOW_FIELDS`. Element ``x`` of a window, ``low <= x < high``, is element
        ``start + x`` of the buffer, ``start + x + shift_state`` of the state and ``packed + x`` of
        the packed stream. It lies in row ``(shift + x) // length`` of the rows with entries from
        ``index`` on, at ``(shift + x) % length``, plus ``skip`` in row 0: ``length`` is clipped to
        the window, so numbers stay small in segments of any length.
    """
    if not len(table):
        return {}
    first_U, count_U, start_U, length_U, shift_U = _columns(table)
    numel_U = count_U * length_U
    packed_U = np.cumsum(numel_U) - numel_U
    grid_U = start_U // vec * vec
    run_T, number_T = _repeat(-(-(start_U + numel_U - grid_U) // TILE_NUMEL))

    begin = grid_U[run_T] + number_T * TILE_NUMEL
    first = np.maximum(begin, start_U[run_T])
    last = np.minimum(begin + TILE_NUMEL, (start_U + numel_U)[run_T])
    length = length_U[run_T]
    row = (first - start_U[run_T]) // length
    into = first - start_U[run_T] - row * length
    left = length - into
    clipped = np.where(length > TILE_NUMEL, np.maximum(TILE_NUMEL - left, 0), into)
    length = np.minimum(length, TILE_NUMEL)
    columns = {
        "start": begin,
        "low": first - begin,
        "high": last - begin,
        "shift": clipped - (first - begin),
        "length": length,
        "index": first_U[run_T] + row,
        "skip": into - clipped,
        "packed": (packed_U - start_U)[run_T] + begin,
        "shift_state": shift_U[run_T],
    }
    one_row = columns["shift"] + columns["high"] <= length
    suits = (columns["low"] % vec == 0) & (columns["high"] % vec == 0)
    suits &= one_row | ((columns["shift"] % vec == 0) & (length % vec == 0))
    suits &= columns["shift_state"] % vec == 0
    if packed:
        suits &= columns["packed"] % vec == 0
    tiles = np.stack([columns[name] for name in WINDOW_FIELDS], axis=1)
    return by_vec(tiles, suits, vec)


def column_windows(table: ColumnTable, vec: int) -> dict[int, IntArray]:
    """Cut runs of rows whose columns are segments into windows of the buffer.

    Returns:
        windows by elements per access, as :func:`windows` does; columns
        :data:`COLUMN_WINDOW_FIELDS`. ``divmod(place + x, width)`` gives the row of element ``x``,
        from the window's first row on, and its segment, whose entry is ``index`` plus the segment.
        In row 0, ``number`` is added to the number of the segment's first element, and in each
        further row ``row_stride`` more; both are below 2**32. A vector may be in two rows.
    """
    start_C, width_C = table.start_C, table.width_C
    grid_C = start_C // vec * vec
    run_T, number_T = _repeat(-(-(table.end_C - grid_C) // TILE_NUMEL))

    begin = grid_C[run_T] + number_T * TILE_NUMEL
    low = np.maximum(begin, start_C[run_T]) - begin
    width = width_C[run_T]
    row, column = np.divmod(table.skip_C[run_T] + begin + low - start_C[run_T], width)
    columns = {
        "start": begin,
        "low": low,
        "high": np.minimum(begin + TILE_NUMEL, table.end_C[run_T]) - begin,
        "place": column - low,
        "width": width,
        "index": table.index_C[run_T],
        "number": row * table.row_stride_C[run_T] % 2**32,
        "row_stride": table.row_stride_C[run_T] % 2**32,
        "shift_state": table.shift_C[run_T],
    }
    suits = (low % vec == 0) & (columns["high"] % vec == 0) & (width >= vec)
    suits &= columns["shift_state"] % vec == 0
    return by_vec(np.stack([columns[n] for n in COLUMN_WINDOW_FIELDS], axis=1), suits, vec)


def row_tiles(table: SegmentTable, vec: int) -> list[RowTiles]:
    """Cut the table into tiles of whole segments, or parts of long ones, for kernels that sum.

    Args:
        table: segments.
        vec: elements per access of the main path, a power of two.

    Returns:
        one entry per launch, of tiles with equal rectangles.
    """
    if not len(table):
        return []
    first_U, count_U, start_U, length_U, shift_U = _columns(table)
    columns_U = np.minimum(TILE_NUMEL, np.maximum(MIN_COLUMNS, _power_of_two(length_U)))
    rows_U = TILE_NUMEL // columns_U
    run_T, number_T = _repeat(np.where(length_U > ROW_LIMIT, 0, -(-count_U // rows_U)))
    row = number_T * rows_U[run_T]
    whole = np.stack(
        [
            start_U[run_T] + row * length_U[run_T],
            length_U[run_T],
            np.minimum(rows_U[run_T], count_U[run_T] - row),
            first_U[run_T] + row,
            np.full_like(row, -1),
            shift_U[run_T],
        ],
        axis=1,
    )
    start, end, index, segment_T = parts(table, vec)
    split = np.stack(
        [
            start,
            end - start,
            np.ones_like(start),
            index[segment_T],
            np.arange(len(start)),
            table.shifts[is_long(table)][segment_T],
        ],
        axis=1,
    )
    tiles = np.concatenate([whole, split])
    width = np.concatenate([columns_U[run_T], np.full(len(split), TILE_NUMEL)])
    suits = (tiles[:, 0] % vec == 0) & (tiles[:, 1] % vec == 0) & (tiles[:, 5] % vec == 0)
    return [
        RowTiles(RowKind(size, int(columns)), found)
        for columns in np.unique(width)
        for size, found in by_vec(tiles[width == columns], suits[width == columns], vec).items()
    ]


def parts(table: SegmentTable, vec: int) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """Return start and end of the parts of long segments, these segments' entries, and owners.

    Only the first part of a segment may start, and only the last one may end, at a position that
    is not a multiple of ``vec``.
    """
    chosen = np.flatnonzero(is_long(table))
    start_S, end_S = table.start_S[chosen], table.end_S[chosen]
    grid_S = start_S // vec * vec
    segment_T, number_T = _repeat(-(-(end_S - grid_S) // ROW_LIMIT))
    begin = grid_S[segment_T] + number_T * ROW_LIMIT
    return (
        np.maximum(begin, start_S[segment_T]),
        np.minimum(begin + ROW_LIMIT, end_S[segment_T]),
        table.indices[chosen],
        segment_T,
    )


def is_long(table: SegmentTable) -> NDArray[np.bool_]:
    """Return which segments are summed in parts."""
    long: NDArray[np.bool_] = table.end_S - table.start_S > ROW_LIMIT
    return long


def _columns(table: SegmentTable) -> IntArray:
    """Return first entry, count, start, length and shift of all runs, one row each."""
    runs = [(run.first, run.count, run.start, run.length, run.shift) for run in table.runs]
    return np.asarray(runs, dtype=np.int64).T


def by_vec(tiles: IntArray, suits: NDArray[np.bool_], vec: int) -> dict[int, IntArray]:
    """Return tiles by elements per access: ``vec`` where it suits, else 1; without empty ones."""
    if vec == 1:
        suits = np.zeros(len(tiles), dtype=np.bool_)
    found = {vec: tiles[suits], 1: tiles[~suits]}
    return {size: np.ascontiguousarray(chosen) for size, chosen in found.items() if len(chosen)}


def _repeat(count: IntArray) -> tuple[IntArray, IntArray]:
    """Return owner ``i`` and number of each item, if every ``i`` has ``count[i]`` items."""
    owner = np.repeat(np.arange(len(count)), count)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)


def _power_of_two(number: IntArray) -> IntArray:
    """Return the smallest power of two not below ``number``, from 1 to 2**53."""
    powers: IntArray = 2 ** np.ceil(np.log2(number)).astype(np.int64)
    return powers
