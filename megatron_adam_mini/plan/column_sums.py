"""Which sums of columns cross ranks, as positions in one vector per domain.

Imports numpy, ``layout`` and ``column_runs``. Data flow: segments of all slices of a rank ->
**ColumnPlan** -> ``column_reduction``, which computes the sums.

Every data-parallel rank may hold rows of every column, and has few numbers for it, one per column
of each weight. So these sums have no slots (see ``reduction``), of which every rank gathers those
of all ranks, but a vector with one place per column, the same on all ranks of the domain's groups,
of which each data-parallel rank adds up a share::

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
from itertools import pairwise

import numpy as np

from megatron_adam_mini.plan.column_runs import ColumnRuns, numbers_within
from megatron_adam_mini.plan.layout import BoolArray, BucketLayout, SliceSegments, crosses_tp
from megatron_adam_mini.plan.partition import IntArray, ParameterBlocks


@dataclass(frozen=True)
class ColumnPlan:
    """Positions that one rank needs to complete the sums of a domain's columns.

    ``S`` counts the segments of all the rank's slices in the domain, one after the other.

    Attributes:
        dp_size: ranks that share the slices.
        tp_size: tensor-parallel ranks.
        numel: numbers in the vector, a multiple of ``dp_size``; 0: the domain has no columns.
        segment: all segments that are columns, the first of each place, then the second, ...
        position: place in the vector of each of them.
        rounds: parts of these two, one after the other, in which each place occurs at most once.
        crossing: places of this rank's share, counted in it, to which tensor-parallel ranks add.
    """

    dp_size: int
    tp_size: int
    numel: int
    segment: IntArray
    position: IntArray
    rounds: tuple[slice, ...]
    crossing: IntArray

    @property
    def share_numel(self) -> int:
        """Numbers that each data-parallel rank adds up."""
        return self.numel // self.dp_size


def plan_columns(
    buckets: Sequence[BucketLayout],
    slices: Sequence[SliceSegments],
    parameters: Sequence[ParameterBlocks],
    *,
    dp_rank: int,
    tp_size: int,
) -> ColumnPlan:
    """Plan what completes the sums of one domain's columns.

    Args:
        buckets: all buckets of the domain, the same list on all ranks of both groups.
        slices: this rank's slice of each of them.
        parameters: all parameters that the placements index.
        dp_rank: this rank's slice.
        tp_size: size of the tensor-parallel group.
    """
    dp_size = buckets[0].num_slices if buckets else 1
    first_of, crosses = _places(buckets, parameters)
    numel = -(-len(crosses) // dp_size) * dp_size
    share = numel // dp_size
    crossing = np.flatnonzero(crosses)
    first_S = np.cumsum([0, *(held.num_segments for held in slices)])
    found = [_positions(held.columns, first_of) for held in slices]
    segment, position, number = (
        np.concatenate([np.empty(0, dtype=np.int64), *values])
        for values in (
            [part[0] + first for part, first in zip(found, first_S[:-1], strict=True)],
            [part[1] for part in found],
            _run_numbers([held.columns for held in slices]),
        )
    )
    order = np.argsort(number, kind="stable")
    ends = np.cumsum([0, *np.bincount(number)]).tolist()
    return ColumnPlan(
        dp_size=dp_size,
        tp_size=tp_size,
        numel=numel,
        segment=segment[order],
        position=position[order],
        rounds=tuple(slice(a, b) for a, b in pairwise(ends)),
        crossing=crossing[crossing // max(share, 1) == dp_rank] - dp_rank * share,
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
            crosses.append(np.full(count, crosses_tp(blocks)))
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
