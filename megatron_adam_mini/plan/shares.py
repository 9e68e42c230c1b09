"""Which part of the state lies in device memory, and which in host memory.

Imports the modules before it. Data flow: step plan, fraction -> **Share** -> state,
kernels.

All sums and collectives read gradients where they are, on the device. So where the state of a piece
lies is this rank's own decision: it changes no collective, and ranks need not agree on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_adam_mini.plan.buffer_plan import BufferPlan, SlicePlan, Window
from megatron_adam_mini.plan.segment_table import SegmentTable
from megatron_adam_mini.plan.step_plan import Piece, StepPlan


@dataclass(frozen=True, eq=False)
class Share:
    """A run of the state of one buffer that lies in one memory; no piece is in two of them.

    Attributes:
        number: index of the buffer.
        on_host: whether it lies in host memory.
        plan: of the buffer; its tables hold this share only.
        in_state: positions in the state of the buffer.
        elements: its part of the rank's elements with a second moment each.
    """

    number: int
    on_host: bool
    plan: BufferPlan
    in_state: slice
    elements: slice

    @property
    def numel(self) -> int:
        """Elements of one tensor of the share, gaps included."""
        return int(self.in_state.stop - self.in_state.start)

    def holds(self, piece: Piece) -> bool:
        """Return whether the state of a piece is here."""
        start = piece.window.in_state.start
        return piece.buffer == self.number and self.in_state.start <= start < self.in_state.stop

    def own(self, in_state: slice) -> slice:
        """Return where positions of the buffer's state are in the tensors of the share.

        Raises:
            IndexError: they are of another share.
        """
        begin, end = self.in_state.start, self.in_state.stop
        if not begin <= in_state.start <= in_state.stop <= end:
            raise IndexError(
                f"State [{in_state.start}, {in_state.stop}) of buffer {self.number} is not in the "
                f"share [{begin}, {end}); RankState.of(piece) finds the one that has it."
            )
        return slice(in_state.start - begin, in_state.stop - begin)

    def own_elements(self, elements: slice) -> slice:
        """Return where elements of the rank are among those of the share."""
        if elements.start == elements.stop:
            return slice(0, 0)
        begin = self.elements.start
        return slice(elements.start - begin, elements.stop - begin)

    @property
    def windows(self) -> list[tuple[int, SlicePlan, Window]]:
        """This share of each slice: number of the slice, its plan, and the window."""
        found = []
        for index, slice_plan in enumerate(self.plan.slices):
            start = slice_plan.window.in_state.start
            first = max(self.in_state.start - start, 0)
            last = min(self.in_state.stop - start, slice_plan.window.numel)
            if first < last:
                found.append((index, slice_plan, slice_plan.window.part(first, last)))
        return found


def plan_shares(plan: StepPlan, host_fraction: float) -> tuple[list[Share], dict[int, Share]]:
    """Divide the state between device and host.

    In host memory are the last pieces of each domain, until they have at least a fraction of the
    domain's elements on this rank. So at most one buffer of a domain is divided.

    Returns:
        Shares on the device, one for each buffer (some may be empty); and shares on the host, by
        index of the buffer.
    """
    chosen = _on_host(plan, host_fraction)
    first_of = {piece.buffer: piece for piece in reversed(plan.pieces)}
    on_device, on_host = [], {}
    for number, buffer in enumerate(plan.buffers):
        end, elements = buffer.state_numel, buffer.elements
        pieces = chosen.get(number)
        if pieces is None:
            on_device.append(Share(number, False, buffer, slice(0, end), elements))
            continue
        # A gap before the first piece of the buffer needs no share of its own.
        cut = 0 if pieces[0] is first_of[number] else pieces[0].window.in_state.start
        e_cut = min((p.elements.start for p in pieces if p.is_elementwise), default=elements.stop)
        on_device.append(
            _share(number, buffer, slice(0, cut), slice(elements.start, e_cut), on_host=False)
        )
        on_host[number] = _share(
            number, buffer, slice(cut, end), slice(e_cut, elements.stop), on_host=True
        )
    return on_device, on_host


def host_start(numels: Sequence[int], fraction: float) -> int:
    """Return the number of the first piece whose state is on the host.

    Args:
        numels: elements of the pieces, in their order.
        fraction: of all elements, that the host must have at least.
    """
    wanted, held, first = fraction * sum(numels), 0, len(numels)
    while first and held < wanted:
        first -= 1
        held += numels[first]
    return first


def _on_host(plan: StepPlan, fraction: float) -> dict[int, list[Piece]]:
    """Return the pieces whose state is on the host, by index of their buffer."""
    found: dict[int, list[Piece]] = {}
    for domain in range(len(plan.domains)):
        pieces = [p for p in plan.pieces if plan.buffers[p.buffer].domain == domain]
        for piece in pieces[host_start([p.window.numel for p in pieces], fraction) :]:
            found.setdefault(piece.buffer, []).append(piece)
    return found


def _share(
    number: int, plan: BufferPlan, in_state: slice, elements: slice, *, on_host: bool
) -> Share:
    def own(table: SegmentTable) -> SegmentTable:
        position = table.start_S + table.shifts
        return table.subset((position >= in_state.start) & (position < in_state.stop))

    position_C = plan.columns.start_C + plan.columns.shift_C
    part = replace(
        plan,
        segments=own(plan.segments),
        uncut=own(plan.uncut),
        cut=own(plan.cut),
        columns=plan.columns.subset((position_C >= in_state.start) & (position_C < in_state.stop)),
        ranges=own(plan.ranges),
    )
    return Share(number, on_host, part, in_state, elements)
