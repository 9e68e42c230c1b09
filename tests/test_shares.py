"""The division of the state between device and host, and the host's chunks: each element once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adam_mini.estimate.offload import host_size
from megatron_adam_mini.plan.chunks import plan_chunks
from megatron_adam_mini.plan.shares import Share, host_start, plan_shares
from tests.test_step_plan import plans

FRACTIONS = st.sampled_from([0.0, 0.01, 0.3, 0.5, 0.9, 1.0])


def test_the_last_pieces_are_on_the_host() -> None:
    assert [host_start([5, 1, 4], f) for f in (0.0, 0.1, 0.4, 0.41, 0.5, 0.51, 1.0)] == [
        3, 2, 2, 1, 1, 0, 0,
    ]  # fmt: skip
    assert host_start([], 0.5) == 0


def test_a_place_in_another_share_is_an_error() -> None:
    plan: Any = None
    share = Share(3, True, plan, slice(16, 32), slice(0, 0))
    assert share.own(slice(20, 32)) == slice(4, 16)
    for wrong in (slice(12, 20), slice(30, 33)):
        with pytest.raises(IndexError, match=r"of buffer 3 is not in the share \[16, 32\)"):
            share.own(wrong)


@settings(max_examples=150, deadline=None)
@given(plans(), FRACTIONS)
def test_every_piece_has_its_state_in_one_memory(found, fraction):
    plan, _ = found
    on_device, on_host = plan_shares(plan, fraction)
    assert [share.number for share in on_device] == list(range(len(plan.buffers)))
    shares = [*on_device, *on_host.values()]
    assert all(sum(share.holds(piece) for share in shares) == 1 for piece in plan.pieces)
    held = [next(share for share in shares if share.holds(piece)) for piece in plan.pieces]
    sizes = [p.window.numel for p in plan.pieces]
    offloaded = [n for n, share in zip(sizes, held, strict=True) if share.on_host]
    assert sum(offloaded) >= fraction * sum(sizes)
    assert not offloaded or sum(offloaded[1:]) < fraction * sum(sizes), "one piece too many"
    # The last pieces, and with them all of their state and tables.
    assert [share.on_host for share in held] == sorted(share.on_host for share in held)
    for piece, share in zip(plan.pieces, held, strict=True):
        place = share.own(piece.window.in_state)
        assert 0 <= place.start < place.stop <= share.numel
        elements, numel = share.own_elements(piece.elements), share.elements
        assert 0 <= elements.start <= elements.stop <= numel.stop - numel.start
    for number, buffer in enumerate(plan.buffers):
        own = [share for share in shares if share.number == number]
        assert sum(share.numel for share in own) == buffer.state_numel
        for table in ("segments", "uncut", "cut", "ranges"):
            entries = np.concatenate([getattr(share.plan, table).indices for share in own])
            np.testing.assert_array_equal(np.sort(entries), np.sort(getattr(buffer, table).indices))
    domain = plan.domains[0]
    state = sum(share.numel for share in on_host.values())
    elements = sum(share.elements.stop - share.elements.start for share in on_host.values())
    assert host_size(domain.buffers, plan.parameters, domain.dp_rank, fraction) == (state, elements)


@settings(max_examples=150, deadline=None)
@given(plans(), FRACTIONS, st.integers(1, 60))
def test_chunks_hold_every_element_of_the_host_once_and_in_its_place(found, fraction, limit):
    plan, _ = found
    _, on_host = plan_shares(plan, fraction)
    planned = plan_chunks(on_host.values(), plan.pieces, limit)
    entries_S, entries_R = [], []
    for number, share in on_host.items():
        by_table = np.full(share.numel, -1)
        copied = np.full(share.numel, -1)  # where in the buffer
        expected, position = by_table.copy(), copied.copy()
        for piece in plan.pieces:
            if share.holds(piece):
                expected[share.own(piece.window.in_state)] = piece.parameter
                position[share.own(piece.window.in_state)] = np.arange(
                    piece.window.in_buffer.start, piece.window.in_buffer.stop
                )
        done = 0
        for chunk in (c for c in planned.chunks if c.share is share):
            for in_buffer, in_chunk in chunk.windows:
                at = np.arange(in_chunk.start, in_chunk.stop) + chunk.begin
                assert in_chunk.stop <= limit
                assert (copied[at] == -1).all()
                copied[at] = np.arange(in_buffer.start, in_buffer.stop)
            for table, parts, seen, whole in (
                (chunk.segments, planned.segments, entries_S, plan.buffers[number].segments),
                (chunk.ranges, planned.ranges, entries_R, plan.buffers[number].ranges),
            ):
                seen += table.indices.tolist()
                for start, end, entry, shift in zip(
                    table.start_S, table.end_S, table.indices, table.shifts, strict=True
                ):
                    assert shift == chunk.begin
                    at = slice(start + shift, end + shift)
                    assert (by_table[at] == -1).all()
                    by_table[at] = plan.parameter_SR[parts.source[entry]]
                    (row,) = np.flatnonzero(whole.indices == parts.source[entry])
                    first = whole.start_S[row] + whole.shifts[row] - share.in_state.start
                    assert start + shift == first + parts.offset[entry]
            assert chunk.elements == slice(done, done + chunk.ranges.numel)
            done = chunk.elements.stop
        assert done == share.elements.stop - share.elements.start
        np.testing.assert_array_equal(by_table, expected)
        np.testing.assert_array_equal(copied, position)
    assert entries_S == list(range(len(planned.segments.source)))
    assert entries_R == list(range(len(planned.ranges.source)))
