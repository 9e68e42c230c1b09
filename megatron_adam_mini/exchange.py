"""torch.distributed's collectives as a step calls them: a rank by itself can leave them out.

Imports torch.distributed. ``collectives`` communicates through this module only, so what a rank
does before, between and after its collectives can be run without other ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from torch import Tensor, distributed
from torch.distributed import ProcessGroup

_alone = ContextVar("alone", default=False)


class Work(Protocol):
    """A collective in flight."""

    def wait(self) -> Any:
        """Let what follows come after it."""
        ...


class _Nothing:
    def wait(self) -> None:
        pass


@contextmanager
def alone() -> Iterator[None]:
    """Leave out all collectives of a step: results are what was in their memory before."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def all_reduce(
    tensor: Tensor,
    op: Any = distributed.ReduceOp.SUM,
    *,
    group: ProcessGroup | None,
    async_op: bool = False,
) -> Work | None:
    """As torch's; the result is ``None`` unless ``async_op``."""
    if _alone.get():
        return _Nothing() if async_op else None
    work: Work | None = distributed.all_reduce(tensor, op, group=group, async_op=async_op)
    return work


def all_gather_into_tensor(output: Tensor, tensor: Tensor, *, group: ProcessGroup | None) -> None:
    """As torch's."""
    if not _alone.get():
        distributed.all_gather_into_tensor(output, tensor, group=group)


def all_to_all_single(output: Tensor, tensor: Tensor, *, group: ProcessGroup | None) -> None:
    """As torch's."""
    if not _alone.get():
        distributed.all_to_all_single(output, tensor, group=group)
