"""Streams and events of the CPU host: nothing is ever pending, so a wait returns at once.

Only the attributes that Megatron uses exist. Any other (such as a handle for a CUDA library) raises
an AttributeError that names it.
"""

import contextlib
import time
from typing import Any

import torch

__all__ = ["Event", "Stream", "current_stream", "default_stream", "set_stream", "use_stream"]


class Stream:
    """A queue that is always empty: a CPU operation is finished when its call returns."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.device = torch.device("cpu")
        self.priority = priority

    def wait_stream(self, stream: "Stream") -> None:
        """Return at once: ``stream`` has nothing left to do."""

    def wait_event(self, event: "Event") -> None:
        """Return at once: all work before ``event`` is done."""

    def record_event(self, event: "Event | None" = None) -> "Event":
        """Record ``event`` (a new one if None) and return it; the expert dispatcher uses it."""
        event = Event() if event is None else event
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Return at once."""

    def query(self) -> bool:
        """Return True: all submitted work is complete."""
        return True

    def __enter__(self) -> "Stream":
        _current.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _current.pop()


_default = Stream()
_current: list[Stream] = [_default]  # the last is current; ``with`` blocks nest


class Event:
    """A recorded point in time; once recorded, it has passed."""

    def __init__(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False
    ) -> None:
        self._enable_timing = enable_timing
        self._recorded_at: float | None = None

    def record(self, stream: Stream | None = None) -> None:
        """Store the current time."""
        self._recorded_at = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        """Return at once."""

    def synchronize(self) -> None:
        """Return at once."""

    def query(self) -> bool:
        """Return True: all work before the event is complete."""
        return True

    def elapsed_time(self, end_event: "Event") -> float:
        """Return the milliseconds from this event to ``end_event``, measured on the host's clock.

        Raises:
            RuntimeError: as with CUDA, if either event was made without ``enable_timing`` or was
                never recorded.
        """
        if not (self._enable_timing and end_event._enable_timing):
            raise RuntimeError(
                "both events must be made with enable_timing=True to measure the time between them"
            )
        if self._recorded_at is None or end_event._recorded_at is None:
            raise RuntimeError(
                "both events must be recorded before the time between them can be measured"
            )
        return (end_event._recorded_at - self._recorded_at) * 1e3


def current_stream(device: Any = None) -> Stream:
    """Return the stream of the innermost ``use_stream``, or the default one."""
    return _current[-1]


def default_stream(device: Any = None) -> Stream:
    """Return the stream that is current unless another one is set."""
    return _default


def set_stream(stream: Stream) -> None:
    """Make ``stream`` the current one."""
    _current[-1] = stream


def use_stream(stream: Stream | None) -> contextlib.AbstractContextManager[Any]:
    """Make ``stream`` the current one for ``with`` blocks; None changes nothing, as in torch.

    Like torch's own, the result may be entered repeatedly: Megatron uses one for two reductions.
    """
    return contextlib.nullcontext() if stream is None else stream
