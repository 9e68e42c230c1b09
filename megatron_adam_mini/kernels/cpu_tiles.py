"""How the C++ kernels cut a table of segments into tiles for threads.

Imports numpy. Data flow: SegmentTable -> **tiles** -> kernels (``cpu``).
"""

from __future__ import annotations

import numpy as np

from megatron_adam_mini.plan.partition import IntArray
from megatron_adam_mini.plan.segment_table import SegmentTable

#: Columns of :func:`tiles`; ``Tile`` in cpu.cpp.
TILE_FIELDS = ("start", "length", "count", "index", "packed", "within", "partial", "shift")


def tiles(table: SegmentTable, limit: int, *, split: bool) -> IntArray:
    """Cut the runs into tiles of at most about ``limit`` elements.

    A tile is either ``count`` whole segments of ``length`` elements each, or (``split``, and
    only if the segment is longer than ``limit``) a part of one segment.

    Returns:
        int64, shape ``(T, 8)``, columns :data:`TILE_FIELDS`: ``start`` in the buffer,
        ``length``, ``count``, ``index`` of the first segment's entry, ``packed`` elements of
        the table before the tile, ``within`` elements of the segment before the tile,
        ``partial``: -1 for whole segments, else the number of the part among all parts, and
        ``shift``: position in the state minus position in the buffer.
    """
    found: list[IntArray] = [np.empty((0, len(TILE_FIELDS)), dtype=np.int64)]
    packed = parts = 0
    for run in table.runs:
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
                np.full_like(segment, run.shift),
            ]
            parts += len(segment)
        else:
            rows = max(1, limit // run.length)
            rows -= rows % 8 if rows > 8 else 0  # the loops treat eight rows at once
            first = np.arange(0, run.count, rows)
            columns = [
                run.start + first * run.length,
                np.full_like(first, run.length),
                np.minimum(run.count - first, rows),
                run.first + first,
                packed + first * run.length,
                np.zeros_like(first),
                np.full_like(first, -1),
                np.full_like(first, run.shift),
            ]
        found.append(np.stack(columns, axis=1).astype(np.int64))
        packed += run.count * run.length
    return np.ascontiguousarray(np.concatenate(found))
