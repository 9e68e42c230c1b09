"""How the fast kernels cut runs of rows into rectangles, whose columns they treat side by side.

Imports numpy. Data flow: ColumnTable -> **rectangles, sums of their parts** -> kernels (``cpu``,
``triton_launch_tables``).

A *line* is a row of a run, or several if rows are short, so that vectors have something to do. A
run begins with its first line, wherever that is in the weight; what is left at its end is shorter.
Elements that lie a line apart are in one segment.

Shape suffixes: ``_T`` rectangles.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import numpy as np

from megatron_adam_mini.plan.column_table import ColumnTable
from megatron_adam_mini.plan.partition import IntArray

#: Columns of :func:`rectangles`; ``Rectangle`` in cpu.cpp.
RECTANGLE_FIELDS = (
    "start",
    "stride",
    "columns",
    "lines",
    "partial",
    "index",
    "width",
    "position",
    "shift",
    "row_stride",
)
#: Columns of :func:`sums`; ``ColumnSums`` in cpu.cpp.
SUMS_FIELDS = ("index", "segments", "partial", "end", "width")

#: Rectangles of one line begin at multiples of this.
_GRAIN = 64


@dataclass(frozen=True)
class Cut:
    """Sizes of lines and rectangles.

    Attributes:
        columns: at most so many columns, a multiple of 64.
        numel: at most so many elements, if that is a line or more.
        line: as many rows make a line as have at most so many elements.
        multiple: at least so many rows make a line that its elements are a multiple of this.
    """

    columns: int
    numel: int
    line: int
    multiple: int = 1


def rectangles(table: ColumnTable, cut: Cut) -> tuple[IntArray, IntArray]:
    """Cut the runs into rectangles.

    Returns:
        the rectangles, int64, shape ``(T, 10)``, columns :data:`RECTANGLE_FIELDS`: ``lines`` pieces
        of ``columns`` elements, from ``start`` of the buffer on and ``stride`` apart. Column ``c``
        of the first one is element ``position + c`` of the run, those before it (``skip``)
        included: ``divmod`` by ``width`` gives row and segment, whose entry is ``index`` plus the
        segment. ``partial``: where the sum of column 0 is stored among all partial sums, those of
        the next ones follow. ``shift`` and ``row_stride`` are those of the run.

        where the partial sums of each run begin, and where the last one's end, int64, shape
        ``(C + 1,)``. Partial sums that lie ``width`` apart are of one segment.
    """
    found, partials = [np.empty((0, len(RECTANGLE_FIELDS)), dtype=np.int64)], [0]
    for run in range(len(table)):
        start, width = int(table.start_C[run]), int(table.width_C[run])
        line, end = _line(width, cut), partials[-1]
        whole, rest = divmod(int(table.end_C[run]) - start, line)
        for before, lines, columns in ((0, whole, line), (whole * line, min(rest, 1), rest)):
            if not lines:
                continue
            tall, wide = _size(columns, cut)
            parts = -(-lines // tall)
            part_T, column_T = (axis.ravel() for axis in np.indices((parts, -(-columns // wide))))
            column_T = column_T * wide
            within_T = before + part_T * tall * line + column_T
            fields = {
                "start": start + within_T,
                "stride": line,
                "columns": np.minimum(wide, columns - column_T),
                "lines": np.minimum(tall, lines - part_T * tall),
                "partial": end + part_T * columns + column_T,
                "index": table.index_C[run],
                "width": width,
                "position": table.skip_C[run] + within_T,
                "shift": table.shift_C[run],
                "row_stride": table.row_stride_C[run],
            }
            columns_ = np.broadcast_arrays(*(fields[name] for name in RECTANGLE_FIELDS))
            found.append(np.stack(columns_, axis=1))
            end += parts * columns
        partials.append(end)
    return np.ascontiguousarray(np.concatenate(found)), np.asarray(partials, dtype=np.int64)


def sums(table: ColumnTable, partials: IntArray, segments: int) -> IntArray:
    """Return which partial sums make up the sums of segments, for at most so many at a time.

    Args:
        table: runs that are not parts of longer ones.
        partials: where the partial sums of each run begin; see :func:`rectangles`.
        segments: most segments of a block.

    Returns:
        int64, shape ``(B, 5)``, columns :data:`SUMS_FIELDS`: ``segments`` entries from ``index`` on
        are the sums of partial sums that lie ``width`` apart, the first of each from ``partial``
        on, all before ``end``.

    Raises:
        ValueError: a run is a part of a longer one.
    """
    if table.skip_C.any():
        raise ValueError(
            f"Adam-mini sums of columns over parts of runs (skip {table.skip_C.max()}) are not "
            "sums of segments; allowed: whole runs. Remedy: sum the table that was cut."
        )
    found = [np.empty((0, len(SUMS_FIELDS)), dtype=np.int64)]
    for run in range(len(table)):
        first = np.arange(0, table.counts[run], segments)
        fields = (
            table.index_C[run] + first,
            np.minimum(segments, table.counts[run] - first),
            partials[run] + first,
            partials[run + 1],
            table.width_C[run],
        )
        found.append(np.stack(np.broadcast_arrays(*fields), axis=1))
    return np.ascontiguousarray(np.concatenate(found))


def _line(width: int, cut: Cut) -> int:
    """Return the elements of a line."""
    least = width * (cut.multiple // gcd(width, cut.multiple))
    return least * max(1, cut.line // least)


def _size(columns: int, cut: Cut) -> tuple[int, int]:
    """Return lines and columns of rectangles, all about as large."""
    wide = -(-columns // -(-columns // cut.columns))
    wide += -wide % _GRAIN
    tall = max(1, cut.numel // min(wide, columns))
    return tall - (tall % 8 if tall > 8 else 0), wide  # loops treat eight lines at once
