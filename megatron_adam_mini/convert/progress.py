"""A progress bar on a terminal, nothing elsewhere. Standard library only."""

from __future__ import annotations

import sys
import time
from types import TracebackType

_WIDTH = 30


class Progress:
    """Counts bytes; use it as a context manager.

    Args:
        total: bytes at the end.
        label: what is done with them.
    """

    def __init__(self, total: int, label: str) -> None:
        self._total, self._label = max(total, 1), label
        self._done, self._shown = 0, 0.0
        self._visible = sys.stderr.isatty()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._visible:
            self._show()
            sys.stderr.write("\n")

    def advance(self, num_bytes: int) -> None:
        """Count some more bytes."""
        self._done += num_bytes
        if self._visible and time.monotonic() - self._shown > 0.1:
            self._show()

    def _show(self) -> None:
        part = min(self._done / self._total, 1.0)
        bar = "#" * int(part * _WIDTH)
        sys.stderr.write(f"\r{self._label} [{bar:<{_WIDTH}}] {part:4.0%} {size(self._done)}")
        sys.stderr.flush()
        self._shown = time.monotonic()


def size(num_bytes: float) -> str:
    """Return a number of bytes in words."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
