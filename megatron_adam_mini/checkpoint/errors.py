"""What can be wrong, in the two ways that a caller must tell apart."""

from __future__ import annotations


class UnreadableError(ValueError):
    """Something was asked that cannot be done with this input; exit code 2."""


class CorruptError(ValueError):
    """The checkpoint is readable, and what it holds is wrong; exit code 1."""
