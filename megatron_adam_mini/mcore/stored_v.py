"""v of this rank's segments <-> v of rows and columns, as checkpoints hold it.

Imports ``state_view``, ``pending_load`` and ``piece_values``. Of a block of several rows each row
has v; rows of a column set have 0, and v by column beside it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megatron_adam_mini.mcore.pending_load import PendingLoad
from megatron_adam_mini.mcore.state_view import StateView
from megatron_adam_mini.piece_values import sum_over_segments
from megatron_adam_mini.plan.partition import ParameterBlocks
from megatron_adam_mini.plan.step_plan import ColumnRun, Piece, RowRun
from megatron_adam_mini.state import HOST


def rows_from_v(view: StateView, piece: Piece, v: Tensor) -> Tensor:
    """Return v of every row with elements in the piece, from row ``begin // width`` on.

    Args:
        view: the optimizer.
        piece: the piece.
        v: of its segments.

    Returns:
        New values; 0 for rows whose columns have v.
    """
    width = view.blocks_of(piece).info.row_numel
    rows = v.new_zeros(-(-piece.end // width) - piece.begin // width)
    for run in view.inner.plan.runs_of(piece):
        if isinstance(run, RowRun):
            first, last = run.start_S + piece.begin, run.end_S + piece.begin
            # Segments end at row ends or at the slice's end, so only the first can start within.
            counts = torch.from_numpy(-(-last // width) - first // width).to(v.device)
            start = int(first[0]) // width - piece.begin // width
            stop = -(-int(last[-1]) // width) - piece.begin // width
            rows[start:stop] = v[run.entries].repeat_interleave(counts, output_size=stop - start)
    return rows


def v_from_rows(view: StateView, piece: Piece, rows: Tensor) -> None:
    """Set v of the piece's segments from row values, in host memory; see :func:`rows_from_v`."""
    width = view.blocks_of(piece).info.row_numel
    v = view.state.v_of_segments(piece)
    for run in view.inner.plan.runs_of(piece):
        if isinstance(run, RowRun):
            row = (run.start_S + piece.begin) // width - piece.begin // width
            v[run.entries] = rows[torch.from_numpy(row)]


def columns_from_v(view: StateView, piece: Piece, v: Tensor) -> list[tuple[int, int, Tensor]]:
    """Return v of the columns whose first element, over all rows of their set, is in the piece.

    Args:
        view: the optimizer.
        piece: the piece.
        v: of its segments.

    Returns:
        Column set, first column (counted on this rank) and new values of each run of such columns.
    """
    blocks = view.blocks_of(piece)
    found = []
    for run in view.inner.plan.runs_of(piece):
        if isinstance(run, ColumnRun):
            first = first_element(blocks, run.column_set) - piece.begin
            if first <= run.begin < first + run.width:
                count = min(run.width - run.column, run.end - run.begin)
                values = v[run.entries][:count].clone()
                found.append((run.column_set, run.column, values))
    return found


def first_element(blocks: ParameterBlocks, column_set: int) -> int:
    """Return the first element of a column set in the shard, also if it is on another rank."""
    assert blocks.pattern is not None
    segments = np.arange(len(blocks.pattern.segment_rows), dtype=np.int64)
    (at,) = np.flatnonzero(blocks.pattern.column_set_of(segments) == column_set)[:1]
    row = int(blocks.pattern.row_bounds(segments)[0][at]) - blocks.info.row_offset
    return row * blocks.info.row_numel


def v_from_columns(view: StateView, piece: Piece, columns: Tensor) -> None:
    """Set v of the piece's segments that are columns.

    Args:
        view: the optimizer.
        piece: the piece.
        columns: v of this rank's columns of all sets, in host memory, shape ``(sets, columns)``.
    """
    v = view.state.v_of_segments(piece)
    for run in view.inner.plan.runs_of(piece):
        if isinstance(run, ColumnRun):
            values = columns[run.column_set].roll(-run.column)
            v[run.entries] = values[: run.entries.stop - run.entries.start]


def sums_over_segments(view: StateView, pending: PendingLoad) -> Tensor:
    """Return, for each segment, the sum of its elements' v in the checkpoint; in host memory."""
    inner = view.inner
    sum_S = torch.zeros(inner.plan.num_segments, dtype=torch.float32, device=HOST)
    for number, piece in enumerate(inner.plan.pieces):
        out = sum_S[piece.segments]
        if not len(out) or number in pending.new:
            continue
        if number in pending.elements:
            elements = pending.elements[number]
        else:
            rows, columns = pending.rows.get(number), pending.columns.get(number)
            source = pending.sources[piece.parameter]
            assert source is not None
            elements = elements_of(source, rows, columns, piece.begin, piece.end)
        out.copy_(sum_over_segments(inner.plan, piece, elements))
    return sum_S


def elements_of(
    source: ParameterBlocks, rows: Tensor | None, columns: Tensor | None, begin: int, end: int
) -> Tensor:
    """Return v of elements ``[begin, end)`` of a shard, from v of its rows and columns.

    Args:
        source: its blocks.
        rows: v of its rows from row ``begin // width`` on, if some rows are whole blocks.
        columns: v of this rank's columns of all sets, shape ``(sets, columns)``, if there are any.
        begin: first element.
        end: one past the last.
    """
    assert source.pattern is not None
    width = source.info.row_numel
    first, last = begin // width, -(-end // width)
    if columns is None:
        assert rows is not None
        found = rows[: last - first, None].expand(-1, width)
    else:
        offset = source.info.row_offset
        of_set = source.pattern.column_set_of_rows()[first + offset : last + offset]
        chosen = torch.from_numpy(of_set).to(columns.device)
        found = columns[chosen.clamp(min=0)]
        if rows is not None:
            found = torch.where(chosen[:, None] < 0, rows[: last - first, None], found)
    return found.reshape(-1)[begin - first * width : end - first * width]


def rows_and_columns_of(blocks: ParameterBlocks, elements: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return v of the rows and columns of a whole shard; the inverse of :func:`elements_of`.

    Args:
        blocks: its blocks.
        elements: v of all its elements.

    Returns:
        v of rows, 0 for those of column sets; and of columns, shape ``(sets, columns)``, ``None``
        if there are none.
    """
    assert blocks.pattern is not None
    values = elements.view(-1, blocks.info.row_numel)
    rows = values[:, 0].clone()
    sets = blocks.pattern.num_column_sets
    if not sets:
        return rows, None
    offset = blocks.info.row_offset
    of_set = blocks.pattern.column_set_of_rows()[offset : offset + len(values)]
    columns = values.new_zeros(sets, values.shape[1])
    for number in np.unique(of_set[of_set >= 0]).tolist():
        columns[number] = values[int(np.argmax(of_set == number))]
    rows[torch.from_numpy(of_set >= 0)] = 0
    return rows, columns
