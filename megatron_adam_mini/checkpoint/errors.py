"""The two kinds of errors that callers must distinguish."""

from __future__ import annotations


class UnreadableError(ValueError):
    """The request cannot be fulfilled with this input; exit code 2."""


class CorruptError(ValueError):
    """The checkpoint is readable, but its content is wrong; exit code 1."""
