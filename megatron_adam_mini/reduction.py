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

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, distributed

from megatron_adam_mini.layout import (
    BucketLayout,
    SliceSegments,
    crosses_tp,
    cut_boundaries,
    row_parallel,
    spread_blocks,
)
from megatron_adam_mini.partition import IntArray, ParameterBlocks


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
    slots: dict[tuple[int, int], int] = {}
    for bucket in buckets:
        for placement in bucket.placements:
            for block in spread_blocks(parameters[placement.parameter]):
                slots[placement.parameter, int(block)] = len(slots)
    own: list[list[int]] = [[] for _ in slots]  # this rank's segments of each slot

    edges: list[list[int]] = []  # head and tail of each cut bucket
    chains: list[tuple[int, list[tuple[int, int]]]] = []  # segment -> (rank, contribution)
    spread_segments: list[tuple[int, int]] = []  # segment -> slot
    cut: set[int] = set()
    for index, (bucket, part) in enumerate(zip(buckets, slices, strict=True)):
        base = int(offsets[index])
        spread = _slots_of(part, parameters, slots)
        for segment in np.flatnonzero(spread >= 0).tolist():
            own[spread[segment]].append(base + segment)
            spread_segments.append((base + segment, int(spread[segment])))
        if not cut_boundaries(bucket, parameters).any():
            continue
        head_at = len(edges)
        edges += [[], []]
        clipped = (part.clipped_left_S | part.clipped_right_S) & (spread < 0)
        for segment in np.flatnonzero(clipped).tolist():
            is_head = bool(part.clipped_left_S[segment])
            edges[head_at if is_head else head_at + 1].append(base + segment)
            first, last = _ranks_of_segment(bucket, part, parameters, segment)
            chain = [(first, head_at + 1)] + [(r, head_at) for r in range(first + 1, last + 1)]
            chains.append((base + segment, chain))
            cut.add(base + segment)

    num_edges = len(edges)
    contributions = num_edges + len(slots)
    gathered = dp_size > 1 and contributions > 0
    sources = dp_size if dp_size > 1 else 1

    dp_target: list[int] = []
    dp_rows: list[list[int]] = []
    for segment, chain in chains:
        dp_target.append(segment)
        dp_rows.append([rank * contributions + position for rank, position in chain])
    names = list(slots)
    in_tp = [crosses_tp(parameters[parameter]) for parameter, _ in names]
    for segment, slot in spread_segments:
        if not in_tp[slot]:
            dp_target.append(segment)
            dp_rows.append([r * contributions + num_edges + slot for r in range(sources)])

    # Tensor-parallel group: rows of row-parallel weights, and slots that cross its ranks.
    split_columns = np.asarray([row_parallel(blocks) for blocks in parameters], dtype=np.bool_)
    columns = [
        np.flatnonzero(split_columns[part.parameter_S]) + base
        for part, base in zip(slices, offsets, strict=False)
    ]
    rows = np.concatenate(columns) if columns else np.empty(0, dtype=np.int64)
    several = cut | {segment for segment, _ in spread_segments}
    is_exact = np.isin(rows, sorted(several)) | dp_replicas
    plain, exact = rows[~is_exact], rows[is_exact]
    tp_slots = [slot for slot, crosses in enumerate(in_tp) if crosses]
    slot_place = {slot: len(exact) + place for place, slot in enumerate(tp_slots)}
    num_exact = len(exact) + len(tp_slots)
    tp_target = exact.tolist()
    tp_rows = [[t * num_exact + place for t in range(tp_size)] for place in range(len(exact))]
    for segment, slot in spread_segments:
        if in_tp[slot]:
            tp_target.append(segment)
            tp_rows.append([t * num_exact + slot_place[slot] for t in range(tp_size)])

    return ReductionPlan(
        dp_size=dp_size,
        tp_size=tp_size,
        tp_rank=tp_rank,
        contribution=_table(edges + own),
        gathers=gathered,
        dp_target=np.asarray(dp_target, dtype=np.int64),
        dp_table=_table(dp_rows),
        tp_plain=plain,
        tp_exact=exact,
        tp_slot_table=_table(
            [[r * contributions + num_edges + s for r in range(sources)] for s in tp_slots]
        ),
        tp_target=np.asarray(tp_target, dtype=np.int64),
        tp_table=_table(tp_rows),
    )


class Reduction:
    """Completes the sums of one domain, with preallocated buffers.

    A step calls, on all ranks of both groups and in this order, :meth:`complete_over_dp_`,
    :meth:`start_tp`, :meth:`finish_tp_`; what does not depend on blocks cut by tensor
    parallelism may run between the last two.

    Args:
        plan: this rank's positions.
        num_segments: S of the domain.
        dp_group: group that shares the buckets' slices; unused if ``plan.dp_size == 1``.
        tp_group: tensor-parallel group; unused if ``plan.tp_size == 1``.
        device: device of the sums.
    """

    def __init__(
        self,
        plan: ReductionPlan,
        num_segments: int,
        *,
        dp_group: distributed.ProcessGroup | None,
        tp_group: distributed.ProcessGroup | None,
        device: torch.device,
    ) -> None:
        self.plan = plan
        self.dp_group = dp_group
        self.tp_group = tp_group

        def zeros(numel: int) -> Tensor:
            return torch.zeros(numel, dtype=torch.float32, device=device)

        # Parts of the vector that the tensor-parallel group adds up: plain sums, then places of
        # each rank's own, for sums of segments and for sums of slots.
        self._tp_vector = zeros(plan.tp_numel)
        self._plain, places = self._tp_vector.tensor_split([len(plan.tp_plain)])
        begin = plan.tp_rank * plan.num_exact
        own = places[begin : begin + plan.num_exact]
        self._exact, self._slots = own.tensor_split([len(plan.tp_exact)])

        gathered = plan.dp_size * plan.num_contributions
        self._gathered = zeros(gathered)
        self._offered = zeros(plan.num_contributions) if plan.gathers else self._gathered
        self._offer = OrderedSum(plan.contribution, num_segments, device)
        self._sum_dp = OrderedSum(plan.dp_table, gathered, device)
        self._sum_slots = OrderedSum(plan.tp_slot_table, gathered, device)
        self._sum_tp = OrderedSum(plan.tp_table, len(places), device)
        self._places = places
        self._tp_plain, self._tp_exact, self._dp_target, self._tp_target = (
            torch.from_numpy(positions).to(device)
            for positions in (plan.tp_plain, plan.tp_exact, plan.dp_target, plan.tp_target)
        )
        self._dp_sums = zeros(len(plan.dp_target))
        self._tp_sums = zeros(len(plan.tp_target))
        self._in_flight: distributed.Work | None = None

    @property
    def collectives(self) -> list[tuple[str, int]]:
        """Collectives of one step: group and bytes of the vector that this rank receives."""
        found = []
        if self.plan.gathers:
            found.append(("dp", 4 * self._gathered.numel()))
        if self.plan.tp_numel:
            found.append(("tp", 4 * self._tp_vector.numel()))
        return found

    def complete_over_dp_(self, sum_sq_S: Tensor) -> None:
        """Complete the sums of blocks that data parallelism cuts (modified in place).

        Args:
            sum_sq_S: this rank's partial sums, float32, shape ``(S,)``.
        """
        if self.plan.num_contributions == 0:
            return
        self._offer(sum_sq_S, out=self._offered)
        if self.plan.gathers:
            distributed.all_gather_into_tensor(self._gathered, self._offered, group=self.dp_group)
        if len(self._dp_target):
            self._sum_dp(self._gathered, out=self._dp_sums)
            sum_sq_S.index_copy_(0, self._dp_target, self._dp_sums)

    def start_tp(self, sum_sq_S: Tensor) -> None:
        """Send off the sums of blocks that tensor parallelism cuts.

        Args:
            sum_sq_S: sums that are complete over data parallelism, float32, shape ``(S,)``.
        """
        if self.plan.tp_numel == 0:
            return
        if self._in_flight is not None:  # of a step that was skipped
            self._in_flight.wait()
        self._tp_vector.zero_()
        torch.index_select(sum_sq_S, 0, self._tp_plain, out=self._plain)
        torch.index_select(sum_sq_S, 0, self._tp_exact, out=self._exact)
        if len(self._slots):
            self._sum_slots(self._gathered, out=self._slots)
        self._in_flight = distributed.all_reduce(
            self._tp_vector, group=self.tp_group, async_op=True
        )

    def finish_tp_(self, sum_sq_S: Tensor) -> None:
        """Wait for what :meth:`start_tp` sent, and put the sums in their places."""
        if self._in_flight is None:
            return
        self._in_flight.wait()
        self._in_flight = None
        sum_sq_S.index_copy_(0, self._tp_plain, self._plain)
        if len(self._tp_target):
            self._sum_tp(self._places, out=self._tp_sums)
            sum_sq_S.index_copy_(0, self._tp_target, self._tp_sums)


class OrderedSum:
    """``out[i] = sum_j source[table[i, j]]``, added from left to right; -1 stands for zero.

    The order of additions depends on the table alone, so equal inputs give equal bits on every
    rank and device. Adding zero is exact, so wider tables change nothing. Allocates when it is
    made, and not when it is called.

    Args:
        table: int64 positions, shape ``(rows, k)``.
        num_source: entries of the source.
        device: of source and result.
    """

    def __init__(self, table: IntArray, num_source: int, device: torch.device) -> None:
        rows = len(table)
        positions = np.where(table < 0, num_source, table)  # reads the zero at the end
        self._columns = torch.from_numpy(np.ascontiguousarray(positions.T)).to(device)
        self._padded = torch.zeros(num_source + 1 if rows else 1, device=device)
        self._column = torch.zeros(rows, device=device)
        self._total = torch.zeros(rows, dtype=torch.float64, device=device)

    def __call__(self, source: Tensor, *, out: Tensor) -> None:
        """Write the sums to ``out``, float32, shape ``(rows,)``."""
        if not len(out):
            return
        self._padded[:-1].copy_(source)
        self._total.zero_()
        for positions in self._columns:
            torch.index_select(self._padded, 0, positions, out=self._column)
            self._total.add_(self._column)
        out.copy_(self._total)


def _table(rows: Sequence[Sequence[int]]) -> IntArray:
    width = max([len(row) for row in rows] + [1])
    table = np.full((len(rows), width), -1, dtype=np.int64)
    for index, row in enumerate(rows):
        table[index, : len(row)] = row
    return table


def _slots_of(
    part: SliceSegments,
    parameters: Sequence[ParameterBlocks],
    slots: dict[tuple[int, int], int],
) -> IntArray:
    """Return the slot of each segment, -1 for segments of blocks that are not spread."""
    found = np.full(part.num_segments, -1, dtype=np.int64)
    for parameter in np.unique(part.parameter_S):
        spread = spread_blocks(parameters[parameter])
        if len(spread):
            here = np.flatnonzero((part.parameter_S == parameter) & np.isin(part.block_S, spread))
            found[here] = [slots[int(parameter), int(part.block_S[i])] for i in here]
    return found


def _ranks_of_segment(
    bucket: BucketLayout, part: SliceSegments, parameters: Sequence[ParameterBlocks], segment: int
) -> tuple[int, int]:
    """Return the first and last slice that a row segment touches."""
    parameter = int(part.parameter_S[segment])
    placement = next(p for p in bucket.placements if p.parameter == parameter)
    blocks = parameters[parameter]
    assert blocks.pattern is not None
    low, high = blocks.pattern.segment_bounds(part.row_segment_S[segment : segment + 1])
    offset, width = blocks.info.row_offset, blocks.info.row_numel
    first = placement.start + max(0, (int(low[0]) - offset) * width)
    last = placement.start + min(blocks.info.numel, (int(high[0]) - offset) * width) - 1
    return first // bucket.slice_numel, last // bucket.slice_numel
