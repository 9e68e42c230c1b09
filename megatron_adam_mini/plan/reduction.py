"""Which sums of squares cross ranks, as positions in vectors.

Imports numpy, ``segments`` and ``cut_blocks``. Data flow: segments of all slices of a rank ->
**ReductionPlan** -> ``collectives``, which computes them.

A *domain* is a pair of process groups: dense parameters use the data-parallel and the
tensor-parallel group, experts use their own two. Per step and domain there is at most one
all-reduce in either group, each present only if it completes a block; the plan alone determines
this on every rank.

Replicas of one parameter (norms on all tensor-parallel ranks, tied embeddings on two pipeline
stages) complete their sums in *different* communicators, which may add in different orders:
replicas would drift apart by one unit in the last place. So an all-reduce only adds zeros, which is
exact in any order: every rank that holds a part of a block has a *place* of its own in the vector,
which the others set to zero. After it every rank has all parts, and adds them in the order of
ranks. Only what a single communicator completes is a plain sum.

A block can be cut in three ways:

* at an *edge*, a boundary between two slices that cuts a row segment. Every slice with elements of
  it, usually two, has a place.
* into a *slot*: the block is spread (see ``cut_blocks.spread_blocks``): several row segments, or
  rows on several tensor-parallel ranks. Every slice from the one with its first to the one with its
  last element on this tensor-parallel rank has a place.
* by *columns*: tensor parallelism splits the columns of the weight, and each row with them.

So places in the data-parallel group are as many as slices with parts of cut blocks: at most two for
each boundary, and the slices of a slot. The places of one block are adjacent, in rank order.

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

    DP group   all-reduce of a vector with the places of R 1, then those of Q:
                 dp 0   [5, 0, 3, 0]         the numbers are segments, 0 is zero
                 dp 1   [0, 1, 0, 0]         (its last place is segment 0)
               Both ranks then have all four parts. The first two, in this order, are R 1, the
               others the half of Q on this tensor-parallel rank.
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

import numpy as np

from megatron_adam_mini.plan.cut_blocks import cut_row_segments, spread_blocks, spread_elements
from megatron_adam_mini.plan.layout import BucketLayout
from megatron_adam_mini.plan.ordered_sums import OrderedSums, numel_of, vector_after
from megatron_adam_mini.plan.partition import BoolArray, IntArray, ParameterBlocks
from megatron_adam_mini.plan.segments import SliceSegments


@dataclass(frozen=True)
class ReductionPlan:
    """What completes the sums of one domain on one rank.

    Positions are in the values of the rank, see ``ordered_sums``.

    Attributes:
        dp_size: ranks of the data-parallel group.
        dp_vector, tp_vector: what either group sums.
        before_dp: fills the vector of the data-parallel group.
        between: completes the segments that only data parallelism cuts, and fills the vector of the
            tensor-parallel group.
        after_tp: completes the other segments of cut blocks.
        completed: all of them, ascending.
    """

    dp_size: int
    dp_vector: slice
    tp_vector: slice
    before_dp: OrderedSums
    between: OrderedSums
    after_tp: OrderedSums
    completed: IntArray

    @property
    def dp_numel(self) -> int:
        """Numbers that the data-parallel group sums per step; 0: there is no all-reduce."""
        return numel_of(self.dp_vector) if self.dp_size > 1 else 0

    @property
    def tp_numel(self) -> int:
        """Numbers that the tensor-parallel group sums per step; 0: there is no all-reduce."""
        return numel_of(self.tp_vector)

    @property
    def end(self) -> int:
        """Position behind all vectors."""
        return int(self.tp_vector.stop)


def plan_reduction(
    buckets: Sequence[BucketLayout],
    slices: Sequence[SliceSegments],
    parameters: Sequence[ParameterBlocks],
    *,
    dp_rank: int,
    tp_rank: int,
    tp_size: int,
    dp_replicas: bool,
    first_segment: int = 0,
    end: int | None = None,
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
        first_segment: position of the sum of the domain's first segment.
        end: of all values before the vectors; default: of the segments of ``slices``.
    """
    parts = _plan_parts(buckets, slices, parameters, dp_rank)
    if end is None:
        end = first_segment + len(parts.own_S)
    dp_vector = vector_after(end, parts.num_places)
    dp_cut = np.flatnonzero(parts.own_S >= 0)
    split_rows = _segments_of_split_rows(slices, parameters)
    # What the tensor-parallel groups of several data-parallel ranks complete has places.
    has_places = (parts.own_S[split_rows] >= 0) | dp_replicas
    plain, exact = split_rows[~has_places], split_rows[has_places]
    first, counts = _sources_over_tp(
        parts, plain, exact, (dp_vector.start, first_segment), tp_rank, tp_size
    )
    tp_vector = vector_after(dp_vector.stop, len(counts))
    in_tp = np.flatnonzero(parts.tp_slot_S >= 0)
    by_dp = np.setdiff1d(dp_cut, np.concatenate([exact, in_tp]))
    return ReductionPlan(
        dp_size=buckets[0].num_slices if buckets else 1,
        dp_vector=dp_vector,
        tp_vector=tp_vector,
        before_dp=OrderedSums.grouped(dp_vector, parts.own_S[dp_cut], first_segment + dp_cut),
        between=OrderedSums.of_ranges(
            np.concatenate([first_segment + by_dp, np.arange(tp_vector.start, tp_vector.stop)]),
            np.concatenate([dp_vector.start + parts.first_S[by_dp], first]),
            np.concatenate([parts.counts_S[by_dp], counts]),
        ),
        after_tp=_sums_over_tp(parts, plain, exact, tp_vector, first_segment, tp_size),
        completed=first_segment + np.union1d(dp_cut, split_rows),
    )


def _sources_over_tp(
    parts: _Parts,
    plain: IntArray,
    exact: IntArray,
    begins: tuple[int, int],
    tp_rank: int,
    tp_size: int,
) -> tuple[IntArray, IntArray]:
    """Return where the sources of each number in the tensor-parallel group's vector are.

    Plain sums come first, then the places of each rank: of ``exact`` segments, then of slots.

    Args:
        parts: of the domain.
        plain: segments that a plain sum completes.
        exact: segments with a place for each tensor-parallel rank.
        begins: of the data-parallel group's vector, and of the segments.
        tp_rank: whose places get something.
        tp_size: ranks with places.

    Returns:
        First source and number of sources; none for places of other ranks.
    """
    dp_begin, first_segment = begins
    num_places = len(exact) + len(parts.tp_slots)
    first, counts = np.zeros((2, len(plain) + tp_size * num_places), dtype=np.int64)
    first[: len(plain)], counts[: len(plain)] = first_segment + plain, 1
    begin = len(plain) + tp_rank * num_places
    own = first[begin : begin + num_places], counts[begin : begin + num_places]
    # Where data parallelism cuts the block, too: all parts of it on this tensor-parallel rank.
    cut = parts.own_S[exact] >= 0
    own[0][: len(exact)] = np.where(cut, dp_begin + parts.first_S[exact], first_segment + exact)
    own[1][: len(exact)] = np.where(cut, parts.counts_S[exact], 1)
    own[0][len(exact) :] = dp_begin + parts.first_of_slot[parts.tp_slots]
    own[1][len(exact) :] = parts.counts_of_slot[parts.tp_slots]
    return first, counts


def _sums_over_tp(
    parts: _Parts,
    plain: IntArray,
    exact: IntArray,
    tp_vector: slice,
    first_segment: int,
    tp_size: int,
) -> OrderedSums:
    """Return what completes segments from the tensor-parallel group's vector."""
    begin = tp_vector.start + len(plain)
    num_places = len(exact) + len(parts.tp_slots)
    in_tp = np.flatnonzero(parts.tp_slot_S >= 0)
    place = np.concatenate([np.arange(len(exact)), len(exact) + parts.tp_slot_S[in_tp]])
    of_ranks = begin + num_places * np.arange(tp_size, dtype=np.int64)
    plain_sums = np.arange(tp_vector.start, begin)[:, None]
    return OrderedSums.joined(
        [
            OrderedSums.of_rows(first_segment + plain, plain_sums),
            OrderedSums.of_rows(
                first_segment + np.concatenate([exact, in_tp]), place[:, None] + of_ranks
            ),
        ]
    )


@dataclass(frozen=True)
class _Parts:
    """Places in the vector of the data-parallel group, counted from its begin.

    Attributes:
        num_places: all of them.
        own_S: place of each segment, -1 if data parallelism does not cut its block (spread blocks
            count as cut). Segments of a slot share one.
        first_S, counts_S: the places of all parts of its block on this tensor-parallel rank.
        tp_slots: slots with segments on other tensor-parallel ranks.
        tp_slot_S: number of a segment's slot among these, or -1.
        first_of_slot, counts_of_slot: the places of all parts of each slot.
    """

    num_places: int
    own_S: IntArray
    first_S: IntArray
    counts_S: IntArray
    tp_slots: IntArray
    tp_slot_S: IntArray
    first_of_slot: IntArray
    counts_of_slot: IntArray


def _plan_parts(
    buckets: Sequence[BucketLayout],
    slices: Sequence[SliceSegments],
    parameters: Sequence[ParameterBlocks],
    dp_rank: int,
) -> _Parts:
    """Give every part of a cut block a place: those at edges, bucket by bucket, then slots."""
    slots = _plan_slots(buckets, slices, parameters)
    own_S = np.full(len(slots.slot_S), -1, dtype=np.int64)
    first_S, counts_S = np.zeros((2, len(own_S)), dtype=np.int64)
    num_places = base = 0
    for bucket, held in zip(buckets, slices, strict=True):
        first_of_bucket, base = base, base + held.num_segments
        cut_B = cut_row_segments(bucket, parameters)
        counts = np.bincount(cut_B[cut_B >= 0]) + 1  # one part more than boundaries
        first = num_places + np.cumsum(counts) - counts
        num_places += int(counts.sum())
        is_spread = slots.slot_S[first_of_bucket:base] >= 0
        clipped = (held.clipped_left_S | held.clipped_right_S) & ~is_spread
        for segment in np.flatnonzero(clipped).tolist():
            # A row segment that fills the slice continues on both sides.
            number = cut_B[dp_rank - 1 if held.clipped_left_S[segment] else dp_rank]
            at = first_of_bucket + segment
            first_S[at], counts_S[at] = first[number], counts[number]
            own_S[at] = first[number] + np.count_nonzero(cut_B[:dp_rank] == number)
    spread = np.flatnonzero(slots.slot_S >= 0)
    of_spread = slots.slot_S[spread]
    first = num_places + np.cumsum(slots.counts) - slots.counts
    first_S[spread], counts_S[spread] = first[of_spread], slots.counts[of_spread]
    own_S[spread] = first[of_spread] + dp_rank - slots.first_slice[of_spread]
    number = np.where(slots.in_tp, np.cumsum(slots.in_tp) - 1, -1)
    tp_slot_S = np.full(len(own_S), -1, dtype=np.int64)
    tp_slot_S[spread] = number[of_spread]
    return _Parts(
        num_places + int(slots.counts.sum()),
        own_S,
        first_S,
        counts_S,
        np.flatnonzero(slots.in_tp),
        tp_slot_S,
        first,
        slots.counts,
    )


@dataclass(frozen=True)
class _Slots:
    """Spread blocks of a domain, in an order that is the same on all ranks of both groups.

    Attributes:
        in_tp: whether the block has segments on other tensor-parallel ranks.
        first_slice, counts: the slices from its first to its last element on this one.
        slot_S: slot of each segment, -1 for segments of blocks that are not spread.
    """

    in_tp: BoolArray
    first_slice: IntArray
    counts: IntArray
    slot_S: IntArray


def _plan_slots(
    buckets: Sequence[BucketLayout],
    slices: Sequence[SliceSegments],
    parameters: Sequence[ParameterBlocks],
) -> _Slots:
    first_slot: dict[int, int] = {}
    none = np.empty(0, dtype=np.int64)
    in_tp = [np.empty(0, dtype=np.bool_)]
    first_slice, counts = [none], [none]
    num_slots = 0
    for bucket in buckets:
        for placement in bucket.placements:
            blocks = parameters[placement.parameter]
            first, end = spread_elements(blocks)
            if not len(first):
                continue
            first_slot[placement.parameter] = num_slots
            num_slots += len(first)
            in_tp.append(np.full(len(first), blocks.info.rows_are_split))
            first_slice.append((placement.start + first) // bucket.slice_numel)
            last_slice = (placement.start + end - 1) // bucket.slice_numel
            counts.append(np.where(first < end, last_slice + 1 - first_slice[-1], 0))
    slot_S = [_slots_of(held, parameters, first_slot) for held in slices]
    return _Slots(
        np.concatenate(in_tp),
        np.concatenate(first_slice),
        np.concatenate(counts),
        np.concatenate([none, *slot_S]),
    )


def _segments_of_split_rows(
    slices: Sequence[SliceSegments], parameters: Sequence[ParameterBlocks]
) -> IntArray:
    """Return the segments of rows of which every tensor-parallel rank has a part."""
    is_split = np.asarray([blocks.info.row_parallel for blocks in parameters], dtype=np.bool_)
    parameter_S = np.concatenate(
        [np.empty(0, dtype=np.int64), *(held.parameter_S for held in slices)]
    )
    no_flags = np.empty(0, dtype=np.bool_)
    is_column_S = np.concatenate([no_flags, *(held.is_column_S for held in slices)])
    return np.flatnonzero(is_split[parameter_S] & ~is_column_S)


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
