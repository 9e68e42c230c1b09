"""Which sums of squares cross ranks, and the only collectives of a step.

Imports ``layout`` and torch.distributed. Data flow: segments of all slices of a rank
-> :func:`plan_reduction` (integers) -> :class:`Reduction` (tensors, groups) -> complete sums.

A *domain* is a pair of process groups: dense parameters use the data-parallel and the
tensor-parallel group, experts use their own two. Per step and domain there is at most one
all-gather in the data-parallel group and one all-reduce in the tensor-parallel group, each
present only where a block is cut, which every rank knows from the plan alone.

Why an all-gather and a sum in rank order for blocks that data parallelism cuts: replicas of one
parameter (norms on all tensor-parallel ranks, tied embeddings on two pipeline stages) complete
their sums in *different* communicators, which may add in different orders. Replicas would drift
apart by one unit in the last place. For the same reason each tensor-parallel rank puts the sums
whose result several communicators need into places of its own in the all-reduced vector, so
that the all-reduce only adds zeros to them.

Vocabulary: see ``layout``. A *slot* stands for one spread block. Table = matrix of positions
into a source vector; -1 stands for zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megatron_adam_mini.plan.layout import (
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

    ``S`` counts the segments of all the rank's slices in the domain, one after the other.

    Attributes:
        contribution: ``(C, k)`` into the S sums: what this rank offers to its
            data-parallel group: two entries per cut bucket, then one per slot.
        dp_target, dp_table: segments that the data-parallel group completes, and ``(n, k)`` into
            the gathered ``(dp_size * C)`` contributions.
        tp_plain: segments that a plain sum over the tensor-parallel group completes.
        tp_exact: segments that need the same bits in several communicators.
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
        """Numbers that this rank offers to its data-parallel group per step."""
        return len(self.contribution)

    @property
    def completed(self) -> IntArray:
        """Segments whose sums this rank does not have alone, ascending."""
        return np.unique(
            np.concatenate([self.dp_target, self.tp_plain, self.tp_exact, self.tp_target])
        )

    @property
    def num_exact(self) -> int:
        """Numbers that each tensor-parallel rank has in places of its own."""
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
    """Find every block of one domain that is cut, and what completes it.

    Args:
        buckets: all buckets of the domain, the same list on all ranks of both groups.
        slices: this rank's slice of each of them.
        parameters: all parameters that the placements index.
        dp_rank: this rank's slice; every bucket has the same number of slices.
        tp_rank: this rank in the tensor-parallel group.
        tp_size: size of the tensor-parallel group.
        dp_replicas: the same slice is also updated by ranks in other tensor-parallel groups
            (no distributed optimizer, or several instances of it), which must get the same bits.
    """
    dp_size = buckets[0].num_slices if buckets else 1
    offsets = np.cumsum([0] + [s.num_segments for s in slices])

    # Slots, in an order that depends on what all ranks of both groups agree on.
    first_slot: dict[int, int] = {}
    in_tp = np.empty(0, dtype=np.bool_)
    for bucket in buckets:
        for placement in bucket.placements:
            spread = spread_blocks(parameters[placement.parameter])
            if len(spread):
                first_slot[placement.parameter] = len(in_tp)
                crosses = np.full(len(spread), crosses_tp(parameters[placement.parameter]))
                in_tp = np.concatenate([in_tp, crosses])
    slot_S = np.concatenate(
        [np.empty(0, dtype=np.int64)] + [_slots_of(s, parameters, first_slot) for s in slices]
    )
    spread_S = np.flatnonzero(slot_S >= 0)
    slots = slot_S[spread_S]

    edges: list[list[int]] = []  # head and tail of each cut bucket
    chains: list[tuple[int, list[tuple[int, int]]]] = []  # segment -> (rank, contribution)
    for base, bucket, part in zip(offsets[:-1].tolist(), buckets, slices, strict=True):
        if not cut_boundaries(bucket, parameters).any():
            continue
        head_at = len(edges)
        edges += [[], []]
        single = slot_S[base : base + part.num_segments] < 0
        clipped = (part.clipped_left_S | part.clipped_right_S) & single
        for segment in np.flatnonzero(clipped).tolist():
            is_head = bool(part.clipped_left_S[segment])
            edges[head_at if is_head else head_at + 1].append(base + segment)
            first, last = _ranks_of_segment(bucket, part, parameters, segment, dp_rank)
            chain = [(first, head_at + 1)] + [(r, head_at) for r in range(first + 1, last + 1)]
            chains.append((base + segment, chain))

    num_edges = len(edges)
    contributions = num_edges + len(in_tp)
    gathered = dp_size > 1 and contributions > 0
    from_every_rank = contributions * np.arange(dp_size, dtype=np.int64)
    cut_S = np.asarray([segment for segment, _ in chains], dtype=np.int64)
    cut_table = _table([[r * contributions + at for r, at in chain] for _, chain in chains])
    in_dp = ~in_tp[slots]

    # Tensor-parallel group: rows of row-parallel weights, and slots that cross its ranks.
    split_columns = np.asarray([row_parallel(blocks) for blocks in parameters], dtype=np.bool_)
    columns = [
        np.flatnonzero(split_columns[part.parameter_S]) + base
        for part, base in zip(slices, offsets, strict=False)
    ]
    rows = np.concatenate(columns) if columns else np.empty(0, dtype=np.int64)
    several = slot_S >= 0
    several[cut_S] = True
    is_exact = several[rows] | dp_replicas
    plain, exact = rows[~is_exact], rows[is_exact]
    tp_slots = np.flatnonzero(in_tp)
    num_exact = len(exact) + len(tp_slots)
    place_of_slot = len(exact) + np.cumsum(in_tp) - 1
    places = np.concatenate([np.arange(len(exact)), place_of_slot[slots[~in_dp]]])

    return ReductionPlan(
        dp_size=dp_size,
        tp_size=tp_size,
        tp_rank=tp_rank,
        contribution=_stack(_table(edges), _grouped(slots, spread_S, len(in_tp))),
        gathers=gathered,
        dp_target=np.concatenate([cut_S, spread_S[in_dp]]),
        dp_table=_stack(cut_table, (num_edges + slots[in_dp])[:, None] + from_every_rank),
        tp_plain=plain,
        tp_exact=exact,
        tp_slot_table=(num_edges + tp_slots)[:, None] + from_every_rank,
        tp_target=np.concatenate([exact, spread_S[~in_dp]]),
        tp_table=places[:, None] + num_exact * np.arange(tp_size, dtype=np.int64),
    )


def _table(rows: Sequence[Sequence[int]]) -> IntArray:
    width = max([len(row) for row in rows] + [1])
    table = np.full((len(rows), width), -1, dtype=np.int64)
    for index, row in enumerate(rows):
        table[index, : len(row)] = row
    return table


def _stack(above: IntArray, below: IntArray) -> IntArray:
    """Put one table below another; the narrower one is filled up with -1."""
    width = max(above.shape[1], below.shape[1])
    return np.concatenate(
        [
            np.pad(table, ((0, 0), (0, width - table.shape[1])), constant_values=-1)
            for table in (above, below)
        ]
    )


def _grouped(rows: IntArray, values: IntArray, num_rows: int) -> IntArray:
    """Return a table with ``values[i]`` in row ``rows[i]``, in the order in which they come."""
    order = np.argsort(rows, kind="stable")
    counts = np.bincount(rows, minlength=num_rows)
    width = max(int(counts.max(initial=0)), 1)
    table = np.full((num_rows, width), -1, dtype=np.int64)
    column = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    table[rows[order], column] = values[order]
    return table


def _slots_of(
    part: SliceSegments, parameters: Sequence[ParameterBlocks], first_slot: Mapping[int, int]
) -> IntArray:
    """Return the slot of each segment, -1 for segments of blocks that are not spread."""
    found = np.full(part.num_segments, -1, dtype=np.int64)
    # The segments of a parameter follow one another.
    changes = np.flatnonzero(np.diff(part.parameter_S)) + 1
    for begin, end in pairwise([0, *changes.tolist(), part.num_segments]):
        if begin == end or int(part.parameter_S[begin]) not in first_slot:
            continue
        parameter = int(part.parameter_S[begin])
        spread = spread_blocks(parameters[parameter])
        index = np.searchsorted(spread, part.block_S[begin:end])
        is_spread = np.isin(part.block_S[begin:end], spread)
        found[begin:end] = np.where(is_spread, first_slot[parameter] + index, -1)
    return found


def _ranks_of_segment(
    bucket: BucketLayout,
    part: SliceSegments,
    parameters: Sequence[ParameterBlocks],
    segment: int,
    dp_rank: int,
) -> tuple[int, int]:
    """Return the first and last slice that a row segment touches."""
    begin = dp_rank * bucket.slice_numel + int(part.start_S[segment])
    (placement,) = bucket.overlapping(begin, begin + 1)
    blocks = parameters[placement.parameter]
    assert blocks.pattern is not None
    low, high = blocks.pattern.segment_bounds(part.row_segment_S[segment : segment + 1])
    offset, width = blocks.info.row_offset, blocks.info.row_numel
    first = placement.start + max(0, (int(low[0]) - offset) * width)
    last = placement.start + min(blocks.info.numel, (int(high[0]) - offset) * width) - 1
    return first // bucket.slice_numel, last // bucket.slice_numel
