"""All integers that one rank's step needs, in one frozen object.

Imports numpy and the modules of this folder. Data flow: parameters with their blocks, layouts of
Megatron's buffers -> **StepPlan** -> agreement (its shared part), state, kernels, collectives,
checkpoints.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_adam_mini.plan.buffer_plan import (
    BufferPlan,
    Entries,
    SlicePlan,
    Window,
    plan_buffer,
)
from megatron_adam_mini.plan.column_sums import ColumnPlan, plan_columns
from megatron_adam_mini.plan.layout import BucketLayout, BufferLayout
from megatron_adam_mini.plan.partition import BoolArray, IntArray, ParameterBlocks
from megatron_adam_mini.plan.reduction import ReductionPlan, plan_reduction
from megatron_adam_mini.plan.segments import element_numbers, segment_slice

#: Names of domains.
DENSE, EXPERT = "dense", "expert"


@dataclass(frozen=True)
class DomainLayout:
    """Buffers that share one pair of process groups, and this rank's position in the groups.

    Attributes:
        name: ``DENSE`` or ``EXPERT``.
        buffers: the same on all ranks of both groups; all have the same number of slices.
        dp_rank: this rank in the group whose ranks share the slices.
        tp_rank, tp_size: this rank in the tensor-parallel group of these parameters, and its size.
        dp_replicas: whether ranks in other tensor-parallel groups update the same slices.
    """

    name: str
    buffers: tuple[BufferLayout, ...]
    dp_rank: int = 0
    tp_rank: int = 0
    tp_size: int = 1
    dp_replicas: bool = False

    @property
    def buckets(self) -> list[BucketLayout]:
        """All buckets, buffer after buffer."""
        return [bucket for buffer in self.buffers for bucket in buffer.buckets]

    @property
    def num_slices(self) -> int:
        """Data-parallel ranks that share each bucket."""
        return self.buckets[0].num_slices if self.buckets else 1


@dataclass(frozen=True)
class Piece:
    """The elements of one parameter that one slice holds.

    Attributes:
        parameter: index of the parameter.
        buffer: index of the buffer.
        bucket: number of the bucket in the buffer.
        begin, end: elements ``[begin, end)`` of the flattened tensor-parallel shard.
        window: their position in the buffer and in the state.
        segments: entries of its segments in the vectors ``_S``; empty if it has none.
        elements: its elements in the vector of second moments per element; empty if it has none.
    """

    parameter: int
    buffer: int
    bucket: int
    begin: int
    end: int
    window: Window
    segments: slice
    elements: slice

    @property
    def is_elementwise(self) -> bool:
        """Whether each of its elements has its own second moment."""
        return bool(self.elements.stop > self.elements.start)


class RowRun(NamedTuple):
    """Consecutive segments of a piece that consist of rows.

    Attributes:
        entries: their entries among those of the piece.
        start_S, end_S: their elements, counted in the piece.
    """

    entries: slice
    start_S: IntArray
    end_S: IntArray


class ColumnRun(NamedTuple):
    """A run of rows whose columns are segments; see ``column_runs``.

    Attributes:
        entries: of its segments, among those of the piece.
        begin, end: its elements, counted in the piece.
        width: elements of a row on this rank; element ``x`` is of segment ``(x - begin) % width``.
        column_set: number of the set.
        column: column of the first segment, counted on this rank.
    """

    entries: slice
    begin: int
    end: int
    width: int
    column_set: int
    column: int


@dataclass(frozen=True, eq=False)
class StepPlan:
    """All integers of one rank's step; made by :func:`plan_step`.

    Vectors ``_S`` have one entry per segment of the rank, domain after domain, buffer after
    buffer; in vectors ``_SR`` one entry per element range follows. The *values* of the rank are a
    vector of sums ``_SR``, and behind it what collectives of all domains work on.

    Attributes:
        parameters: all parameters of the rank.
        domains: dense, then experts if there are any.
        buffers: those of all domains.
        reductions, columns: what completes sums; one per domain.
        num_values: length of the values.
        is_cut_S: whether the segment's block is cut; columns count as cut.
        block_numel_S: elements of the segment's whole block, over all ranks.
        parameter_SR: index of the parameter.
        norm_domain_SR: int8, domain whose gradient norm includes the entry; -1: none.
    """

    parameters: tuple[ParameterBlocks, ...]
    domains: tuple[DomainLayout, ...]
    buffers: tuple[BufferPlan, ...]
    reductions: tuple[ReductionPlan, ...]
    columns: tuple[ColumnPlan, ...]
    num_values: int
    is_cut_S: BoolArray
    block_numel_S: IntArray
    parameter_SR: IntArray
    norm_domain_SR: NDArray[np.int8]

    def __post_init__(self) -> None:
        """Check for errors that would make a step wrong without notice.

        Raises:
            ValueError: a table does not cover the elements of a piece, an entry is not used
                exactly once, or a position is out of range.
        """
        tables = [table for b in self.buffers for table in (b.segments, b.columns, b.ranges)]
        joined = np.sort(
            np.concatenate([np.empty(0, dtype=np.int64), *(t.indices for t in tables)])
        )
        if not np.array_equal(joined, np.arange(len(self.parameter_SR))):
            raise ValueError("Adam-mini's plan does not give each segment an entry of its own.")
        held_by_buffer = [0] * len(self.buffers)
        for piece in self.pieces:
            held_by_buffer[piece.buffer] += piece.window.numel
        for number, (buffer, held) in enumerate(zip(self.buffers, held_by_buffer, strict=True)):
            columns, rows = buffer.columns, (buffer.segments, buffer.ranges)
            covered = columns.numel + sum(table.numel for table in rows)
            starts = [table.start_S + table.shifts for table in rows]
            starts.append(columns.start_C + columns.shift_C)
            first = min(int(start.min(initial=0)) for start in starts)
            reach = max(columns.state_reach, *(table.state_reach for table in rows))
            if covered != held or first < 0 or reach > buffer.state_numel:
                raise ValueError(
                    f"Adam-mini's plan for buffer {number} covers {covered} elements of {held}, "
                    f"from {first} up to {reach} in a state of {buffer.state_numel}."
                )
            if len(buffer.uncut) + len(buffer.cut) != len(buffer.segments):
                raise ValueError(f"Adam-mini's plan for buffer {number} updates a segment twice.")
        completed = [plan.completed for plan in self.reductions]
        for positions in [*completed, *(plan.completed for plan in self.columns)]:
            if positions.max(initial=-1) >= self.num_segments:
                raise ValueError("Adam-mini's plan completes sums that the rank does not have.")

    @property
    def num_segments(self) -> int:
        """Segments of the rank, S."""
        return len(self.block_numel_S)

    @property
    def num_elementwise(self) -> int:
        """Elements of all element ranges, E."""
        return sum(buffer.ranges.numel for buffer in self.buffers)

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """This rank's pieces, in the order of its buckets."""
        return tuple(
            piece
            for number, buffer in enumerate(self.buffers)
            for bucket, slice_plan in enumerate(buffer.slices)
            for piece in self._pieces_of(number, bucket, slice_plan)
        )

    def _pieces_of(self, buffer: int, bucket: int, slice_plan: SlicePlan) -> Iterator[Piece]:
        segments, start = slice_plan.segments, slice_plan.window.in_buffer.start
        of_segments = _runs_of(segments.parameter_S)
        of_ranges = _runs_of(segments.parameter_R)
        length_R = segments.end_R - segments.start_R
        before_R = np.cumsum(length_R) - length_R
        for placement in slice_plan.bucket.placements:
            first = max(placement.start + slice_plan.bucket.offset - start, 0)
            last = min(placement.end + slice_plan.bucket.offset - start, slice_plan.window.numel)
            if first >= last:
                continue
            run = of_segments.get(placement.parameter, range(0))
            first_segment, _, elements = slice_plan.first
            if placement.parameter in of_ranges:
                elements += int(before_R[of_ranges[placement.parameter].start])
            shift = start - slice_plan.bucket.offset - placement.start
            yield Piece(
                parameter=placement.parameter,
                buffer=buffer,
                bucket=bucket,
                begin=first + shift,
                end=last + shift,
                window=slice_plan.window.part(first, last),
                segments=slice(first_segment + run.start, first_segment + run.stop),
                elements=slice(elements, elements + (0 if run else last - first)),
            )

    def runs_of(self, piece: Piece) -> list[RowRun | ColumnRun]:
        """Return which elements the segments of a piece have, in ascending order."""
        slice_plan = self.buffers[piece.buffer].slices[piece.bucket]
        held, columns = slice_plan.segments, slice_plan.segments.columns
        first = piece.segments.start - slice_plan.first.segment
        last = piece.segments.stop - slice_plan.first.segment
        # Elements of the slice count from its begin, those of the piece from its own.
        begin = piece.window.in_buffer.start - slice_plan.window.in_buffer.start
        found: list[RowRun | ColumnRun] = []
        entry = first

        def add_rows(end: int) -> None:
            if entry < end:
                here, own = slice(entry, end), slice(entry - first, end - first)
                starts, ends = held.start_S[here] - begin, held.end_S[here] - begin
                found.append(RowRun(own, starts, ends))

        for run in np.flatnonzero(columns.parameter_C == piece.parameter).tolist():
            add_rows(int(columns.first_C[run]))
            entry = int(columns.first_C[run] + columns.counts[run])
            found.append(
                ColumnRun(
                    slice(int(columns.first_C[run]) - first, entry - first),
                    int(columns.start_C[run]) - begin,
                    int(columns.end_C[run]) - begin,
                    int(columns.width_C[run]),
                    int(columns.set_C[run]),
                    int(columns.column_C[run]),
                )
            )
        add_rows(last)
        return found

    def first_element_numbers(self) -> NDArray[np.int32]:
        """Return the number of the first element of each segment and range: int32 bits, ``(SR,)``.

        For the noise of stochastic rounding. It depends on the parameter's name and the position
        in it, not on the rank, so replicas round alike.
        """
        names = np.asarray(
            [zlib.crc32(blocks.info.name.encode()) for blocks in self.parameters], dtype=np.int64
        )
        segments: list[IntArray] = []
        ranges: list[IntArray] = []
        for buffer in self.buffers:
            rank = self.domains[buffer.domain].dp_rank
            for slice_plan in buffer.slices:
                for into, starts, owners in (
                    (segments, slice_plan.segments.start_S, slice_plan.segments.parameter_S),
                    (ranges, slice_plan.segments.start_R, slice_plan.segments.parameter_R),
                ):
                    numbers = element_numbers(
                        slice_plan.bucket, self.parameters, rank, starts, owners
                    )
                    into.append(names[owners] + numbers)
        number_SR = np.concatenate([np.empty(0, dtype=np.int64), *segments, *ranges])
        return (number_SR & 0xFFFFFFFF).astype(np.uint32).view(np.int32)

    def shared_part(self, domain: DomainLayout) -> list[dict[str, Any]]:
        """Return what all ranks with a domain's buckets share of the plan, as plain values.

        One entry per parameter, in the order of the buckets; ``agreement`` compares its hash. What
        else ranks must share follows from it. Where blocks are cut is not part of it: one
        tensor-parallel rank may hold other row segments of a weight than the next.

        Args:
            domain: one of :attr:`domains`.
        """
        return [
            {
                "bucket": index,
                "bucket_numel": bucket.numel,
                "slices": bucket.num_slices,
                "at": [placement.start, placement.end],
                **self.parameters[placement.parameter].identity(),
            }
            for index, bucket in enumerate(domain.buckets)
            for placement in bucket.placements
        ]


def plan_step(parameters: Sequence[ParameterBlocks], domains: Sequence[DomainLayout]) -> StepPlan:
    """Plan the step of one rank.

    Args:
        parameters: all parameters of the rank with their blocks.
        domains: their buffers; placements index into ``parameters``.
    """
    parts = [
        [segment_slice(bucket, parameters, domain.dp_rank) for bucket in domain.buckets]
        for domain in domains
    ]
    every = [held for domain_parts in parts for held in domain_parts]
    sizes = [sum(held.num_segments for held in domain_parts) for domain_parts in parts]
    ends = np.cumsum([0, *sizes]).tolist()
    num_values = ends[-1] + sum(held.num_ranges for held in every)
    reductions: list[ReductionPlan] = []
    columns: list[ColumnPlan] = []
    for domain, domain_parts, first_segment in zip(domains, parts, ends[:-1], strict=True):
        reductions.append(
            plan_reduction(
                domain.buckets,
                domain_parts,
                parameters,
                dp_rank=domain.dp_rank,
                tp_rank=domain.tp_rank,
                tp_size=domain.tp_size,
                dp_replicas=domain.dp_replicas,
                first_segment=first_segment,
                end=num_values,
            )
        )
        columns.append(
            plan_columns(
                domain.buckets,
                domain_parts,
                parameters,
                dp_rank=domain.dp_rank,
                tp_size=domain.tp_size,
                first_segment=first_segment,
                end=reductions[-1].end,
            )
        )
        num_values = columns[-1].end
    is_cut_S = np.zeros(ends[-1], dtype=np.bool_)
    for rows, of_columns in zip(reductions, columns, strict=True):
        is_cut_S[rows.completed] = True
        is_cut_S[of_columns.completed] = True

    buffers: list[BufferPlan] = []
    first = Entries(segment=0, element_range=ends[-1], element=0)
    for number, (domain, domain_parts) in enumerate(zip(domains, parts, strict=True)):
        remaining = iter(domain_parts)
        for layout in domain.buffers:
            plan, first = plan_buffer(
                layout,
                list(islice(remaining, len(layout.buckets))),
                domain=number,
                rank=domain.dp_rank,
                first=first,
                is_cut_S=is_cut_S,
            )
            buffers.append(plan)

    none = np.empty(0, dtype=np.int64)
    parameter_SR = np.concatenate(
        [none, *(held.parameter_S for held in every), *(held.parameter_R for held in every)]
    )
    return StepPlan(
        parameters=tuple(parameters),
        domains=tuple(domains),
        buffers=tuple(buffers),
        reductions=tuple(reductions),
        columns=tuple(columns),
        num_values=num_values,
        is_cut_S=is_cut_S,
        block_numel_S=np.concatenate([none, *(held.block_numel_S for held in every)]),
        parameter_SR=parameter_SR,
        norm_domain_SR=_norm_domains(parameters, domains)[parameter_SR],
    )


def _norm_domains(
    parameters: Sequence[ParameterBlocks], domains: Sequence[DomainLayout]
) -> NDArray[np.int8]:
    """Return, for each parameter, the domain whose norm includes it, -1 for none."""
    number = {domain.name: index for index, domain in enumerate(domains)}
    return np.asarray(
        [
            number[EXPERT if blocks.info.expert else DENSE] if blocks.info.in_norm else -1
            for blocks in parameters
        ],
        dtype=np.int8,
    )


def _runs_of(owners: IntArray) -> dict[int, range]:
    """Return the entries of each owner, which are one run: a slice holds a parameter in one run."""
    bounds = [0, *(np.flatnonzero(np.diff(owners)) + 1).tolist(), len(owners)]
    return {int(owners[a]): range(a, b) for a, b in pairwise(bounds) if a < b}
