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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_adam_mini.plan.buffer_plan import (
    BufferPlan,
    Entries,
    SlicePlan,
    Window,
    plan_buffer,
)
from megatron_adam_mini.plan.layout import (
    BoolArray,
    BucketLayout,
    BufferLayout,
    element_numbers,
    segment_slice,
)
from megatron_adam_mini.plan.partition import IntArray, ParameterBlocks
from megatron_adam_mini.plan.reduction import ReductionPlan, plan_reduction

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


@dataclass(frozen=True, eq=False)
class StepPlan:
    """All integers of one rank's step; made by :func:`plan_step`.

    Vectors ``_S`` have one entry per segment of the rank, domain after domain, buffer after
    buffer; in vectors ``_SR`` one entry per element range follows.

    Attributes:
        parameters: all parameters of the rank.
        domains: dense, then experts if there are any.
        buffers: those of all domains.
        reductions: one per domain.
        domain_segments: for each domain, its part of the vectors ``_S``.
        is_cut_S: whether the segment's block is cut.
        block_numel_S: elements of the segment's whole block, over all ranks.
        parameter_SR: index of the parameter.
        norm_domain_SR: int8, domain whose gradient norm includes the entry; -1: none.
    """

    parameters: tuple[ParameterBlocks, ...]
    domains: tuple[DomainLayout, ...]
    buffers: tuple[BufferPlan, ...]
    reductions: tuple[ReductionPlan, ...]
    domain_segments: tuple[slice, ...]
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
        entries = [buffer.segments.indices for buffer in self.buffers]
        entries += [buffer.ranges.indices for buffer in self.buffers]
        joined = np.concatenate([np.empty(0, dtype=np.int64), *entries])
        if not np.array_equal(joined, np.arange(len(self.parameter_SR))):
            raise ValueError("Adam-mini's plan does not give each segment an entry of its own.")
        held_by_buffer = [0] * len(self.buffers)
        for piece in self.pieces:
            held_by_buffer[piece.buffer] += piece.window.numel
        for number, (buffer, held) in enumerate(zip(self.buffers, held_by_buffer, strict=True)):
            covered = buffer.segments.numel + buffer.ranges.numel
            tables = buffer.segments, buffer.ranges
            first = min(int((t.start_S + t.shifts).min(initial=0)) for t in tables)
            reach = max(t.state_reach for t in tables)
            if covered != held or first < 0 or reach > buffer.state_numel:
                raise ValueError(
                    f"Adam-mini's plan for buffer {number} covers {covered} elements of {held}, "
                    f"from {first} up to {reach} in a state of {buffer.state_numel}."
                )
            if len(buffer.uncut) + len(buffer.cut) != len(buffer.segments):
                raise ValueError(f"Adam-mini's plan for buffer {number} updates a segment twice.")
        for reduction, here in zip(self.reductions, self.domain_segments, strict=True):
            completed = reduction.completed
            if len(completed) and completed[-1] >= here.stop - here.start:
                raise ValueError("Adam-mini's plan completes sums that the domain does not have.")

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

    def segment_bounds(self, piece: Piece) -> tuple[IntArray, IntArray]:
        """Return first and one-past-last element of each segment of a piece.

        Like ``piece.begin``, they count in the flattened tensor-parallel shard.
        """
        table = self.buffers[piece.buffer].segments
        first = int(table.indices[0]) if len(table) else 0
        here = slice(piece.segments.start - first, piece.segments.stop - first)
        shift = piece.begin - piece.window.in_buffer.start
        return table.start_S[here] + shift, table.end_S[here] + shift

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
    reductions = tuple(
        plan_reduction(
            domain.buckets,
            domain_parts,
            parameters,
            dp_rank=domain.dp_rank,
            tp_rank=domain.tp_rank,
            tp_size=domain.tp_size,
            dp_replicas=domain.dp_replicas,
        )
        for domain, domain_parts in zip(domains, parts, strict=True)
    )
    sizes = [sum(held.num_segments for held in domain_parts) for domain_parts in parts]
    ends = np.cumsum([0, *sizes]).tolist()
    domain_segments = tuple(slice(a, b) for a, b in pairwise(ends))
    is_cut_S = np.zeros(ends[-1], dtype=np.bool_)
    for here, reduction in zip(domain_segments, reductions, strict=True):
        is_cut_S[here.start + reduction.completed] = True

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

    every = [held for domain_parts in parts for held in domain_parts]
    none = np.empty(0, dtype=np.int64)
    parameter_SR = np.concatenate(
        [none, *(held.parameter_S for held in every), *(held.parameter_R for held in every)]
    )
    return StepPlan(
        parameters=tuple(parameters),
        domains=tuple(domains),
        buffers=tuple(buffers),
        reductions=reductions,
        domain_segments=domain_segments,
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
