"""Buffers that a step updates before all others, because their weights are wanted first.

Imports ``decision`` and ``state``. Data flow: buffers of the first layers -> **EarlyBuffers** ->
order of updates, and a call in between (Megatron's gather of these weights).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from megatron_adam_mini.decision import Decision
from megatron_adam_mini.state import BufferState


class EarlyBuffers(NamedTuple):
    """Buffers whose weights are wanted before those of all others.

    Attributes:
        numbers: of the buffers in the plan; ``None``: all.
        then: called once these are updated, if the step is taken; ``None``: nothing is.
    """

    numbers: frozenset[int] | None = None
    then: Callable[[], None] | None = None

    def split(
        self, buffers: Sequence[BufferState]
    ) -> tuple[Sequence[BufferState], Sequence[BufferState]]:
        """Return the early ones of all buffers of a rank, and the others."""
        if self.numbers is None:
            return buffers, ()
        parts: tuple[list[BufferState], list[BufferState]] = ([], [])
        for number, held in enumerate(buffers):
            parts[number not in self.numbers].append(held)
        return parts

    def call(self, decision: Decision) -> None:
        """Call what comes after them; only for this the host waits for the decision."""
        if self.then is not None and decision.read().updated:
            self.then()


#: All buffers in their order, and nothing in between.
NO_EARLY_BUFFERS = EarlyBuffers()
