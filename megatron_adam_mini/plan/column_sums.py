"""Which sums of columns cross ranks, as positions in one vector per domain.

Imports numpy, ``layout`` and ``column_runs``. Data flow: segments of all slices of a rank ->
**ColumnPlan** -> ``collectives``, which computes the sums.

Every data-parallel rank may hold rows of every column, and has few numbers for it, one per column
of each weight. So these sums have no slots (see ``reduction``), with a place for each rank, but a
vector with one place per column, the same on all ranks of the domain's groups, of which each
data-parallel rank adds up a share::

    columns            0  1  2  3 | 4  5  6  7      two ranks
    partial sums       every rank has some of both halves
    all-to-all         rank 0 gets all of 0 to 3,   rank 1 those of 4 to 7
    complete share     added in rank order; over tensor-parallel ranks, too, where these split rows
    all-gather         every rank has all columns

As in ``reduction``, each sum is added in the order of ranks, so replicas get the same bits in
different communicators. A weight whose columns tensor parallelism splits has the local ones there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_adam_mini.plan.column_runs import ColumnRuns, numbers_within
from megatron_adam_mini.plan.layout import BucketLayout
from megatron_adam_mini.plan.ordered_sums import OrderedSums, vector_after
from megatron_adam_mini.plan.partition import BoolArray, IntArray, ParameterBlocks
from megatron_adam_mini.plan.segments import SliceSegments


@dataclass(frozen=True)
class ColumnPlan:
    """What completes the sums of a domain's columns on one rank.

    Positions are in the values of the rank, see ``ordered_sums``. Vectors are empty where nothing
    is sent.

    Attributes:
        dp_size: ranks that share the slices.
        columns: one place per column, a multiple of ``dp_size``.
        received: what the all-to-all brings: the shares of all data-parallel ranks.
        share: what this rank completes; the same as ``columns`` if there is one rank.
        crossing: copies of those columns of the share to which tensor-parallel ranks add.
        gathered: those of all tensor-parallel ranks.
        own: fills ``columns`` with this rank's sums; then comes the all-to-all.
        over_dp: completes ``share`` and fills ``crossing``; then comes the tensor-parallel gather.
        over_tp: completes the columns of ``share`` that cross; then comes the data-parallel gather.
        result: puts the sums of columns in the places of their segments.
        completed: positions of these segments.
    """

    dp_size: int
    columns: slice
    received: slice
    share: slice
    crossing: slice
    gathered: slice
    own: OrderedSums
    over_dp: OrderedSums
    over_tp: OrderedSums
    result: OrderedSums
    completed: IntArray

    @property
    def end(self) -> int:
        """Position behind all vectors."""
        return int(self.gathered.stop)


def plan_columns(
    buckets: Sequence[BucketLayout],
    slices: Sequence[SliceSegments],
    parameters: Sequence[ParameterBlocks],
    *,
    dp_rank: int,
    tp_size: int,
    first_segment: int = 0,
    end: int | None = None,
) -> ColumnPlan:
    """Plan what completes the sums of one domain's columns.

    Args:
        buckets: all buckets of the domain, the same list on all ranks of both groups.
        slices: this rank's slice of each of them.
        parameters: all parameters that the placements index.
        dp_rank: this rank's slice.
        tp_size: size of the tensor-parallel group.
        first_segment: position of the sum of the domain's first segment.
        end: of all values before the vectors; default: of the segments of ``slices``.
    """
    dp_size = buckets[0].num_slices if buckets else 1
    first_of, crosses = _places(buckets, parameters)
    numel = -(-len(crosses) // dp_size) * dp_size
    share_numel = numel // dp_size
    cross = np.flatnonzero(crosses)
    cross = cross[cross // max(share_numel, 1) == dp_rank] - dp_rank * share_numel

    first_S = first_segment + np.cumsum([0, *(held.num_segments for held in slices)])
    columns = vector_after(int(first_S[-1]) if end is None else end, numel)
    received = vector_after(columns.stop, numel if dp_size > 1 else 0)
    share = vector_after(received.stop, share_numel) if dp_size > 1 else columns
    crossing = vector_after(max(share.stop, received.stop), len(cross))
    gathered = vector_after(crossing.stop, tp_size * len(cross))

    found = [_positions(held.columns, first_of) for held in slices]
    segment, place, number = (
        np.concatenate([np.empty(0, dtype=np.int64), *values])
        for values in (
            [part[0] + first for part, first in zip(found, first_S[:-1], strict=True)],
            [part[1] for part in found],
            _run_numbers([held.columns for held in slices]),
        )
    )
    order = np.argsort(number, kind="stable")
    segment, place = segment[order], place[order]
    # Sources of each column of the share: what each data-parallel rank sent.
    sent = received.start + share_numel * np.arange(dp_size if dp_size > 1 else 0, dtype=np.int64)
    of_share = np.arange(share_numel if dp_size > 1 else 0)
    of_cross = sent if dp_size > 1 else np.asarray([share.start])
    of_tp = gathered.start + len(cross) * np.arange(tp_size, dtype=np.int64)
    return ColumnPlan(
        dp_size=dp_size,
        columns=columns,
        received=received,
        share=share,
        crossing=crossing,
        gathered=gathered,
        own=OrderedSums.grouped(columns, place, segment),
        over_dp=OrderedSums.joined(
            [
                OrderedSums.of_rows(share.start + of_share, of_share[:, None] + sent),
                OrderedSums.of_rows(
                    np.arange(crossing.start, crossing.stop), cross[:, None] + of_cross
                ),
            ]
        ),
        over_tp=OrderedSums.of_rows(share.start + cross, np.arange(len(cross))[:, None] + of_tp),
        result=OrderedSums.of_rows(segment, columns.start + place[:, None]),
        completed=segment,
    )


def _places(
    buckets: Sequence[BucketLayout], parameters: Sequence[ParameterBlocks]
) -> tuple[dict[int, int], BoolArray]:
    """Return each parameter's first place, and for each place whether tensor parallelism adds."""
    first_of: dict[int, int] = {}
    crosses = [np.empty(0, dtype=np.bool_)]
    numel = 0
    for placement in (p for bucket in buckets for p in bucket.placements):
        blocks = parameters[placement.parameter]
        if blocks.num_column_sets:
            count = blocks.num_column_sets * blocks.info.row_numel
            first_of[placement.parameter] = numel
            crosses.append(np.full(count, blocks.info.rows_are_split))
            numel += count
    return first_of, np.concatenate(crosses)


def _positions(runs: ColumnRuns, first_of: dict[int, int]) -> tuple[IntArray, IntArray]:
    """Return the segments of all runs, and their places in the vector."""
    first = np.asarray([first_of[p] for p in runs.parameter_C.tolist()], dtype=np.int64)
    counts, number = runs.counts, numbers_within(runs.counts)
    column = (np.repeat(runs.column_C, counts) + number) % np.repeat(runs.width_C, counts)
    base = np.repeat(first + runs.set_C * runs.width_C, counts)
    return np.repeat(runs.first_C, counts) + number, base + column


def _run_numbers(slices: Sequence[ColumnRuns]) -> list[IntArray]:
    """Return, for each segment of all runs, how many runs of its column set come before."""
    seen: dict[tuple[int, int], int] = {}
    found = []
    for runs in slices:
        numbers = []
        for key in zip(runs.parameter_C.tolist(), runs.set_C.tolist(), strict=True):
            numbers.append(seen.get(key, 0))
            seen[key] = numbers[-1] + 1
        found.append(np.repeat(np.asarray(numbers, dtype=np.int64), runs.counts))
    return found
