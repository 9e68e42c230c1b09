"""Which sums of squares cross ranks, as positions in vectors.

Imports numpy and ``layout``. Data flow: segments of all slices of a rank -> **ReductionPlan** ->
``collectives``, which computes them.

A *domain* is a pair of process groups: dense parameters use the data-parallel and the
tensor-parallel group, experts use their own two. Per step and domain there is at most one
all-gather in the data-parallel group and one all-reduce in the tensor-parallel group, each
present only if it completes a block; the plan alone determines this on every rank.

Blocks that data parallelism cuts take an all-gather and a sum in rank order, because replicas of
one parameter (norms on all tensor-parallel ranks, tied embeddings on two pipeline stages) complete
their sums in *different* communicators, which may add in different orders: replicas would drift
apart by one unit in the last place. For the same reason, sums that several communicators need have
one place per tensor-parallel rank in the all-reduced vector, so the all-reduce only adds zeros to
them.

A block can be cut in three ways:

* at an *edge*, a boundary between two slices that cuts a row segment. The last segment of the one
  slice (its *back*) and the first one of the next (its *front*) belong to one block, as do whole
  slices between them. Every rank contributes the sums of its front and back, for each such bucket.
* into a *slot*: the block is spread (see ``layout.spread_blocks``): several row segments, or rows
  on several tensor-parallel ranks. Every rank contributes one sum per slot.
* by *columns*: tensor parallelism splits the columns of the weight, and each row with them.

Blocks that are columns have a reduction of their own, see ``column_sums``.

Worked example, TP 2 x DP 2. Of the first bucket, ``P`` is row-parallel, 3 rows of 4, so every
tensor-parallel rank holds 3 half rows; ``Q`` is one attention head of 4 rows of 2, of which every
tensor-parallel rank holds 2, and the boundary at element 8 cuts these again. The second bucket
holds ``R``, 2 rows of 6 that tensor parallelism does not split; the boundary cuts the second one::

    element    0     2     4     6     8    10    12          16
    bucket 0   | P 0 | P 1 | P 2 |  Q  |  Q  |     padding     |
    segments     0     1     2     3     0
    bucket 1   |       R 0       |       R 1       |  padding  |
    segments           4           5       1
    DP rank    |<--------- 0 --------->|<--------- 1 --------->|

    DP group   every rank contributes [front of bucket 1, back of bucket 1, slot of Q]:
                 dp 0   [  -, 5, 3]          the numbers are segments
                 dp 1   [  1, -, 0]
               The all-gather brings the six sums. Back of dp 0 + front of dp 1 is R 1. The two
               sums of the slot, in rank order, are the half of Q on this tensor-parallel rank.
    TP group   all-reduce of two vectors, one in the group of each DP rank:
                 dp 0   [P 0, P 1, P 2, Q of tp 0, Q of tp 1]
                 dp 1   [               Q of tp 0, Q of tp 1]
               The rows of P are complete with it (plain sums). Q of tp 0 + Q of tp 1, added in this
               order, is the sum of Q, with the same bits on all four ranks.

``tests/test_reduction.py`` checks the plans of this example, number by number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from megatron_adam_mini.plan.layout import (
    BoolArray,
    BucketLayout,
    SliceSegments,
    crosses_tp,
    cut_boundaries,
    row_parallel,
    spread_blocks,
)
from megatron_adam_mini.plan.partition import IntArray, ParameterBlocks


@dataclass(frozen=True)
class ReductionPlan:
    """Positions that one rank needs to complete the sums of one domain.

    ``S`` counts the segments of all the rank's slices in the domain, one after the other. A table
    holds positions in a source vector, one row per sum; -1 stands for zero.

    Attributes:
        dp_size, tp_size, tp_rank: sizes of the two groups, and this rank in the second.
        contribution: ``(C, k)`` into the S sums: what this rank contributes to its
            data-parallel group: front and back of each cut bucket, then one entry per slot.
        gathers: whether there is an all-gather.
        dp_target, dp_table: segments that the data-parallel group completes, and ``(n, k)`` into
            the gathered ``(dp_size * C)`` contributions.
        tp_plain: segments that a plain sum over the tensor-parallel group completes.
        tp_exact: segments whose sums must have the same bits in several communicators.
        tp_slot_table: ``(slots, dp_size)`` into the gathered contributions.
        tp_target, tp_table: segments completed from the exact part of the all-reduced vector,
            and ``(n, tp_size)`` into it.
    """

    dp_size: int
    tp_size: int
    tp_rank: int
    contribution: IntArray
    gathers: bool
    dp_target: IntArray
    dp_table: IntArray
    tp_plain: IntArray
    tp_exact: IntArray
    tp_slot_table: IntArray
    tp_target: IntArray
    tp_table: IntArray

    @property
    def num_contributions(self) -> int:
        """Numbers that this rank contributes to its data-parallel group per step."""
        return len(self.contribution)

    @property
    def completed(self) -> IntArray:
        """Segments whose own sums are not those of their blocks, ascending."""
        return np.unique(
            np.concatenate([self.dp_target, self.tp_plain, self.tp_exact, self.tp_target])
        )

    @property
    def num_exact(self) -> int:
        """Numbers with one place per tensor-parallel rank."""
        return len(self.tp_exact) + len(self.tp_slot_table)

    @property
    def tp_numel(self) -> int:
        """Numbers in the vector that the tensor-parallel group sums per step."""
        return len(self.tp_plain) + self.tp_size * self.num_exact


def plan_reduction(
    buckets: Sequence[BucketLayout],
    slices: Sequence[SliceSegments],
    parameters: Sequence[ParameterBlocks],
    *,
    dp_rank: int,
    tp_rank: int,
    tp_size: int,
    dp_replicas: bool,
) -> ReductionPlan:
    """Find the cut blocks of one domain, and plan what completes their sums.

    Args:
        buckets: all buckets of the domain, the same list on all ranks of both groups.
        slices: this rank's slice of each of them.
        parameters: all parameters that the placements index.
        dp_rank: this rank's slice; every bucket has the same number of slices.
        tp_rank: this rank in the tensor-parallel group.
        tp_size: size of the tensor-parallel group.
        dp_replicas: whether ranks in other tensor-parallel groups update the same slice (no
            distributed optimizer, or several instances of it) and must get the same bits.
    """
    dp_size = buckets[0].num_slices if buckets else 1
    slots = _plan_slots(buckets, slices, parameters)
    edges = _plan_edges(buckets, slices, parameters, slots, dp_rank)
    columns = _segments_of_split_rows(slices, parameters)
    # Where the contributions of each data-parallel rank begin among all gathered ones.
    first_of_rank = (edges.num_edges + slots.num_slots) * np.arange(dp_size, dtype=np.int64)
    return ReductionPlan(
        dp_size=dp_size,
        tp_size=tp_size,
        tp_rank=tp_rank,
        **_plan_dp(slots, edges, first_of_rank),
        **_plan_tp(slots, edges, columns, first_of_rank, tp_size=tp_size, replicas=dp_replicas),
    )


def _plan_dp(slots: _Slots, edges: _Edges, first_of_rank: IntArray) -> dict[str, Any]:
    """Return what this rank contributes to the data-parallel group, and which sums it completes."""
    chains = _table([[int(first_of_rank[r]) + at for r, at in chain] for chain in edges.chains])
    # Slots on other tensor-parallel ranks, too, are completed by _plan_tp.
    segments = np.flatnonzero((slots.slot_S >= 0) & ~slots.is_in_tp_S)
    from_slots = (edges.num_edges + slots.slot_S[segments])[:, None] + first_of_rank
    spread_S = np.flatnonzero(slots.slot_S >= 0)
    offered_slots = _grouped(slots.slot_S[spread_S], spread_S, slots.num_slots)
    contribution = _stack(_table(edges.offered), offered_slots)
    return {
        "contribution": contribution,
        "gathers": len(first_of_rank) > 1 and len(contribution) > 0,
        "dp_target": np.concatenate([edges.cut_S, segments]),
        "dp_table": _stack(chains, from_slots),
    }


def _plan_tp(
    slots: _Slots,
    edges: _Edges,
    columns: IntArray,
    first_of_rank: IntArray,
    *,
    tp_size: int,
    replicas: bool,
) -> dict[str, Any]:
    """Return what the tensor-parallel group adds up: plain sums, then places of each rank's own.

    Args:
        slots: spread blocks.
        edges: row segments that boundaries cut.
        columns: segments of rows of which every tensor-parallel rank holds a part.
        first_of_rank: first of the gathered contributions of each data-parallel rank.
        tp_size: tensor-parallel ranks.
        replicas: other tensor-parallel groups complete the very same sums.
    """
    # What the tensor-parallel groups of several data-parallel ranks complete.
    in_several_groups = slots.slot_S >= 0
    in_several_groups[edges.cut_S] = True
    is_exact = in_several_groups[columns] | replicas
    exact = columns[is_exact]

    tp_slots = np.flatnonzero(slots.in_tp)
    num_exact = len(exact) + len(tp_slots)
    place_of_slot = len(exact) + np.cumsum(slots.in_tp) - 1
    segments = np.flatnonzero(slots.is_in_tp_S)
    places = np.concatenate([np.arange(len(exact)), place_of_slot[slots.slot_S[segments]]])
    return {
        "tp_plain": columns[~is_exact],
        "tp_exact": exact,
        "tp_slot_table": (edges.num_edges + tp_slots)[:, None] + first_of_rank,
        "tp_target": np.concatenate([exact, segments]),
        "tp_table": places[:, None] + num_exact * np.arange(tp_size, dtype=np.int64),
    }


@dataclass(frozen=True)
class _Slots:
    """Spread blocks of a domain, in an order that is the same on all ranks of both groups.

    Attributes:
        in_tp: for each slot, whether its block has segments on other tensor-parallel ranks.
        slot_S: slot of each segment, -1 for segments of blocks that are not spread.
    """

    in_tp: BoolArray
    slot_S: IntArray

    @property
    def num_slots(self) -> int:
        """Number of slots."""
        return len(self.in_tp)

    @property
    def is_in_tp_S(self) -> BoolArray:  # noqa: N802 (shape suffix)
        """Whether a segment's slot is also on other tensor-parallel ranks."""
        is_spread = self.slot_S >= 0
        is_spread[is_spread] = self.in_tp[self.slot_S[is_spread]]
        return is_spread


@dataclass(frozen=True)
class _Edges:
    """Row segments that boundaries between slices cut.

    Attributes:
        offered: segments that this rank contributes: front and back of each cut bucket, or nothing.
        cut_S: segments whose row segments continue in other slices.
        chains: for each of them, ``(data-parallel rank, entry of its contribution)`` of all ranks
            that hold a segment of the same row segment, in rank order.
    """

    offered: list[list[int]]
    cut_S: IntArray
    chains: list[list[tuple[int, int]]]

    @property
    def num_edges(self) -> int:
        """Number of fronts and backs that every rank contributes."""
        return len(self.offered)


def _plan_slots(
    buckets: Sequence[BucketLayout],
    slices: Sequence[SliceSegments],
    parameters: Sequence[ParameterBlocks],
) -> _Slots:
    first_slot: dict[int, int] = {}
    in_tp = [np.empty(0, dtype=np.bool_)]
    num_slots = 0
    for bucket in buckets:
        for placement in bucket.placements:
            blocks = parameters[placement.parameter]
            num_spread = len(spread_blocks(blocks))
            if num_spread:
                first_slot[placement.parameter] = num_slots
                in_tp.append(np.full(num_spread, crosses_tp(blocks)))
                num_slots += num_spread
    slot_S = [_slots_of(held, parameters, first_slot) for held in slices]
    return _Slots(np.concatenate(in_tp), np.concatenate([np.empty(0, dtype=np.int64), *slot_S]))


def _plan_edges(
    buckets: Sequence[BucketLayout],
    slices: Sequence[SliceSegments],
    parameters: Sequence[ParameterBlocks],
    slots: _Slots,
    dp_rank: int,
) -> _Edges:
    offered: list[list[int]] = []
    cut: list[int] = []
    chains: list[list[tuple[int, int]]] = []
    base = 0
    for bucket, held in zip(buckets, slices, strict=True):
        first_of_bucket, base = base, base + held.num_segments
        # Every rank contributes front and back of such a bucket, even if they are empty: the
        # vectors of an all-gather have equal length.
        if not cut_boundaries(bucket, parameters).any():
            continue
        front_at, back_at = len(offered), len(offered) + 1
        offered += [[], []]
        not_spread = slots.slot_S[first_of_bucket:base] < 0
        clipped = (held.clipped_left_S | held.clipped_right_S) & not_spread
        for segment in np.flatnonzero(clipped).tolist():
            # A row segment that fills the slice continues on both sides; it counts as a front.
            entry = front_at if held.clipped_left_S[segment] else back_at
            offered[entry].append(first_of_bucket + segment)
            cut.append(first_of_bucket + segment)
            first, last = _ranks_of_segment(bucket, held, parameters, segment, dp_rank)
            chains.append([(first, back_at)] + [(r, front_at) for r in range(first + 1, last + 1)])
    return _Edges(offered, np.asarray(cut, dtype=np.int64), chains)


def _segments_of_split_rows(
    slices: Sequence[SliceSegments], parameters: Sequence[ParameterBlocks]
) -> IntArray:
    """Return the segments of rows of which every tensor-parallel rank has a part."""
    is_split = np.asarray([row_parallel(blocks) for blocks in parameters], dtype=np.bool_)
    parameter_S = np.concatenate(
        [np.empty(0, dtype=np.int64), *(held.parameter_S for held in slices)]
    )
    no_flags = np.empty(0, dtype=np.bool_)
    is_column_S = np.concatenate([no_flags, *(held.is_column_S for held in slices)])
    return np.flatnonzero(is_split[parameter_S] & ~is_column_S)


def _table(rows: Sequence[Sequence[int]]) -> IntArray:
    width = max([len(row) for row in rows] + [1])
    table = np.full((len(rows), width), -1, dtype=np.int64)
    for index, row in enumerate(rows):
        table[index, : len(row)] = row
    return table


def _stack(above: IntArray, below: IntArray) -> IntArray:
    """Put one table below another; the narrower one is padded with -1.

    A table without rows does not count: its width would add empty columns.
    """
    width = max((table.shape[1] for table in (above, below) if len(table)), default=1)
    return np.concatenate(
        [
            np.pad(table, ((0, 0), (0, width - table.shape[1])), constant_values=-1)
            for table in (above, below)
            if len(table)
        ]
        or [np.empty((0, width), dtype=np.int64)]
    )


def _grouped(rows: IntArray, values: IntArray, num_rows: int) -> IntArray:
    """Return a table with ``values[i]`` in row ``rows[i]``, in their original order."""
    order = np.argsort(rows, kind="stable")
    counts = np.bincount(rows, minlength=num_rows)
    width = max(int(counts.max(initial=0)), 1)
    table = np.full((num_rows, width), -1, dtype=np.int64)
    column = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    table[rows[order], column] = values[order]
    return table


def _slots_of(
    held: SliceSegments, parameters: Sequence[ParameterBlocks], first_slot: Mapping[int, int]
) -> IntArray:
    """Return the slot of each segment, -1 for segments of blocks that are not spread."""
    found = np.full(held.num_segments, -1, dtype=np.int64)
    # The segments of a parameter are adjacent.
    changes = np.flatnonzero(np.diff(held.parameter_S)) + 1
    for begin, end in pairwise([0, *changes.tolist(), held.num_segments]):
        if begin == end or int(held.parameter_S[begin]) not in first_slot:
            continue
        parameter = int(held.parameter_S[begin])
        spread = spread_blocks(parameters[parameter])
        index = np.searchsorted(spread, held.block_S[begin:end])
        is_spread = np.isin(held.block_S[begin:end], spread)
        found[begin:end] = np.where(is_spread, first_slot[parameter] + index, -1)
    return found


def _ranks_of_segment(
    bucket: BucketLayout,
    held: SliceSegments,
    parameters: Sequence[ParameterBlocks],
    segment: int,
    dp_rank: int,
) -> tuple[int, int]:
    """Return the first and last slice that hold elements of a row segment."""
    begin = dp_rank * bucket.slice_numel + int(held.start_S[segment])
    (placement,) = bucket.overlapping(begin, begin + 1)
    blocks = parameters[placement.parameter]
    assert blocks.pattern is not None
    low, high = blocks.pattern.row_bounds(held.row_segment_S[segment : segment + 1])
    offset, width = blocks.info.row_offset, blocks.info.row_numel
    first = placement.start + max(0, (int(low[0]) - offset) * width)
    last = placement.start + min(blocks.info.numel, (int(high[0]) - offset) * width) - 1
    return first // bucket.slice_numel, last // bucket.slice_numel
