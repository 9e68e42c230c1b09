"""The plan of a step: every element in one table at its own place, and plans that are refused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adam_mini.plan.layout import (
    STATE_ALIGNMENT,
    BucketLayout,
    BufferLayout,
    Placement,
    state_starts,
)
from megatron_adam_mini.plan.partition import ParameterBlocks
from megatron_adam_mini.plan.segment_table import SegmentTable
from megatron_adam_mini.plan.step_plan import DomainLayout, StepPlan, plan_step
from tests.test_layout import Case, Kind, cases


def buffer_of(buckets: Sequence[BucketLayout]) -> BufferLayout:
    """Put buckets one after the other, as Megatron does."""
    offset, placed = 0, []
    for bucket in buckets:
        placed.append(replace(bucket, offset=offset))
        offset += bucket.numel
    return BufferLayout(tuple(placed))


def joined(found: Sequence[Case]) -> tuple[list[BucketLayout], list[ParameterBlocks], np.ndarray]:
    """Return buckets, parameters, and the parameter of each element of the buffer (-1: gap)."""
    buckets: list[BucketLayout] = []
    parameters: list[ParameterBlocks] = []
    owners = [np.empty(0, dtype=np.int64)]
    for case in found:
        bucket, blocks, owner, _ = case.build()
        moved = [replace(p, parameter=p.parameter + len(parameters)) for p in bucket.placements]
        buckets.append(replace(bucket, placements=tuple(moved)))
        owners.append(np.where(owner < 0, -1, owner + len(parameters)))
        parameters += blocks
    return buckets, parameters, np.concatenate(owners)


@st.composite
def plans(draw: st.DrawFn) -> tuple[StepPlan, np.ndarray]:
    """Two buffers of up to three buckets each; return the plan and owners of both buffers."""
    first = draw(cases())
    slices, tp = first.num_slices, {"tp_size": first.tp_size, "tp_rank": first.tp_rank}
    members = [
        replace(case, num_slices=slices, tp_size=1, tp_rank=0)
        for case in draw(st.lists(cases(), max_size=3))
        if not any(k.tp_dim is not None for k in case.kinds)
    ]
    buckets, parameters, owner = joined([first, *members])
    cut = draw(st.integers(1, len(buckets)))
    buffers = (buffer_of(buckets[:cut]), buffer_of(buckets[cut:]))
    domain = DomainLayout("dense", buffers, dp_rank=draw(st.integers(0, slices - 1)), **tp)
    return plan_step(parameters, [domain]), owner


@settings(max_examples=150, deadline=None)
@given(plans())
def test_any_plan_has_every_element_once_in_buffer_state_and_tables(found):
    plan, owner = found
    rank, base, entries = plan.domains[0].dp_rank, 0, []
    for number, (buffer, layout) in enumerate(
        zip(plan.buffers, plan.domains[0].buffers, strict=True)
    ):
        numel = sum(bucket.numel for bucket in layout.buckets)
        expected = owner[base : base + numel].copy()
        for bucket in layout.buckets:  # what other ranks hold
            begin = bucket.offset + rank * bucket.slice_numel
            expected[bucket.offset : begin] = -1
            expected[begin + bucket.slice_numel : bucket.offset + bucket.numel] = -1
        base += numel

        by_piece, by_table = np.full(numel, -1), np.full(numel, -1)
        in_state = np.zeros(buffer.state_numel, dtype=np.int64)
        for piece in plan.pieces:
            if piece.buffer == number:
                by_piece[piece.window.in_buffer] = piece.parameter
                in_state[piece.window.in_state] += 1
                assert piece.window.numel == piece.end - piece.begin
        for table in (buffer.segments, buffer.ranges):
            for start, end, index, shift in zip(
                table.start_S, table.end_S, table.indices, table.shifts, strict=True
            ):
                by_table[start:end] = plan.parameter_SR[index]
                assert in_state[start + shift : end + shift].tolist() == [1] * (end - start)
                assert shift % STATE_ALIGNMENT == 0, "another place in a vector"
        np.testing.assert_array_equal(by_piece, expected)
        np.testing.assert_array_equal(by_table, expected)
        assert in_state.max(initial=0) <= 1, "two elements share a place"
        entries += [*buffer.segments.indices, *buffer.ranges.indices]
        np.testing.assert_array_equal(
            np.sort(np.concatenate([buffer.cut.indices, buffer.uncut.indices])),
            buffer.segments.indices,
        )
    assert sorted(entries) == list(range(len(plan.parameter_SR)))


@settings(max_examples=100, deadline=None)
@given(plans())
def test_segments_and_elements_of_a_piece_are_its_own(found):
    plan, _ = found
    elements = []
    for piece in plan.pieces:
        blocks = plan.parameters[piece.parameter]
        assert piece.is_elementwise == (blocks.pattern is None)
        assert set(plan.parameter_SR[piece.segments].tolist()) <= {piece.parameter}
        elements += range(piece.elements.start, piece.elements.stop)
        if not piece.is_elementwise:
            (run,) = plan.runs_of(piece)
            assert run.start_S[0] == 0
            assert run.end_S[-1] == piece.end - piece.begin
            np.testing.assert_array_equal(run.start_S[1:], run.end_S[:-1])
    assert elements == list(range(plan.num_elementwise))


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 20)), min_size=1, max_size=5),
    st.integers(1, 9),
)
def test_state_follows_the_phase_of_its_slices_and_wastes_little(sizes, num_slices):
    offset, buckets = 0, []
    for slice_numel, gap in sizes:
        offset += gap
        buckets.append(BucketLayout(slice_numel * num_slices, num_slices, (), offset))
        offset += slice_numel * num_slices
    buffer = BufferLayout(tuple(buckets))
    many, many_numel = state_starts(buffer, np.arange(num_slices))  # type: ignore[arg-type]
    for rank in range(num_slices):
        starts, numel = state_starts(buffer, rank)
        assert [int(s[rank]) for s in map(np.asarray, many)] == starts
        assert int(np.asarray(many_numel)[rank]) == numel
        end = 0
        for bucket, start in zip(buckets, starts, strict=True):
            begin = bucket.offset + rank * bucket.slice_numel
            assert start % STATE_ALIGNMENT == begin % STATE_ALIGNMENT
            assert end <= start < end + STATE_ALIGNMENT
            end = start + bucket.slice_numel
        assert numel == end


# Named cases.


def small_plan(**changes: object) -> StepPlan:
    kinds = [Kind((4, 6), "row"), Kind((5,), "element")]
    bucket = BucketLayout(32, 2, (Placement(0, 0, 24), Placement(1, 24, 29)))
    domain = DomainLayout("dense", (BufferLayout((bucket,)),))
    parameters = [kind.blocks(1, 0) for kind in kinds]
    return plan_step(parameters, [replace(domain, **changes)])


def test_a_plan_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        small_plan().parameters = ()  # type: ignore[misc]


def test_a_plan_that_misses_elements_is_refused():
    plan = small_plan()
    (buffer,) = plan.buffers
    table = buffer.segments
    shorter = SegmentTable(table.start_S, table.end_S - 1, table.index_S, table.shift_S)
    with pytest.raises(ValueError, match=re.escape("covers 13 elements of 16")):
        replace(plan, buffers=(replace(buffer, segments=shorter, uncut=shorter),))


def test_a_plan_with_state_outside_of_what_is_allocated_is_refused():
    plan = small_plan()
    (buffer,) = plan.buffers
    with pytest.raises(ValueError, match="up to 16 in a state of 15"):
        replace(plan, buffers=(replace(buffer, state_numel=15),))
    table = buffer.segments
    before = SegmentTable(table.start_S, table.end_S, table.index_S, table.shifts - 1)
    with pytest.raises(ValueError, match="from -1 up to"):
        replace(plan, buffers=(replace(buffer, segments=before, uncut=before),))


def test_a_plan_with_one_entry_for_two_segments_is_refused():
    plan = small_plan()
    (buffer,) = plan.buffers
    table = buffer.segments
    twice = SegmentTable(table.start_S, table.end_S, table.indices * 0, table.shift_S)
    with pytest.raises(ValueError, match="an entry of its own"):
        replace(plan, buffers=(replace(buffer, segments=twice),))


def test_a_plan_that_updates_a_segment_twice_is_refused():
    plan = small_plan()
    (buffer,) = plan.buffers
    with pytest.raises(ValueError, match="updates a segment twice"):
        replace(plan, buffers=(replace(buffer, cut=buffer.segments, uncut=buffer.segments),))


def test_the_shared_part_is_equal_on_all_ranks_and_names_what_differs():
    plans = [small_plan(dp_rank=rank) for rank in (0, 1)]
    shared = [plan.shared_part(plan.domains[0]) for plan in plans]
    assert shared[0] == shared[1]
    assert [entry["at"] for entry in shared[0]] == [[0, 24], [24, 29]]


def test_the_shared_part_is_equal_where_only_one_tensor_parallel_rank_has_a_cut_head():
    """One query group over two ranks: the boundary meets a head on one, Value rows on the other."""
    kind = Kind((24, 2), "head", tp_dim=0, heads=(1, 4, 4, False))
    bucket = BucketLayout(36, 2, (Placement(0, 0, 24),))
    plans = [
        plan_step(
            [kind.blocks(2, tp_rank)],
            [DomainLayout("dense", (BufferLayout((bucket,)),), tp_rank=tp_rank, tp_size=2)],
        )
        for tp_rank in (0, 1)
    ]
    first, second = (plan.reductions[0].dp_numel for plan in plans)
    assert first != second, "the case shows nothing"
    shared = [plan.shared_part(plan.domains[0]) for plan in plans]
    assert shared[0] == shared[1]


def test_buckets_that_overlap_or_differ_in_slices_are_refused():
    with pytest.raises(ValueError, match="starts at element 4 of its buffer, inside of the one"):
        BufferLayout((BucketLayout(8, 2, ()), BucketLayout(8, 2, (), 4)))
    with pytest.raises(ValueError, match=re.escape("different numbers of slices ([2, 4])")):
        BufferLayout((BucketLayout(8, 2, ()), BucketLayout(8, 4, (), 8)))
