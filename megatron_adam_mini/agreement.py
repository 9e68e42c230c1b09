"""All ranks agree on one plan, or all ranks raise, before any collective of a step can hang.

Imports torch.distributed, and ``plan`` for its hash. Runs once, at construction and after load.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import distributed
from torch.distributed.checkpoint.api import CheckpointException

from megatron_adam_mini.plan.manifest import short_hash

P = TypeVar("P")
T = TypeVar("T")


@dataclass(frozen=True)
class PlanRecord:
    """What one rank contributes to the check.

    Attributes:
        rules: must be equal on all ranks: the partition options, and others that a step depends on.
        layouts: parameters and buffers by the name of the ranks that hold the same ones, which
            must have the same layout: one line per parameter, in buffer order.
        matched: name patterns of the options that matched a parameter on this rank.
        error: an exception raised while this rank planned, or ``None``.
    """

    rules: dict[str, Any]
    layouts: dict[str, Sequence[dict[str, Any]]] = field(default_factory=dict)
    matched: frozenset[str] = frozenset()
    error: Exception | None = field(default=None, compare=False)


def check_agreement(
    record: PlanRecord,
    *,
    patterns: Sequence[str],
    group: distributed.ProcessGroup | None = None,
) -> None:
    """Compare the plans of all ranks of ``group``; every one of them must call it.

    One gather of a few hundred bytes per rank; the plans themselves travel only when they differ.

    Args:
        record: this rank's plan, or the error that prevented it.
        patterns: name patterns of the options; each must match somewhere.
        group: ranks to compare, default all.

    Raises:
        Exception: on the rank that failed to plan, its own error.
        RuntimeError: on the others; and on every rank when plans differ. Names the ranks.
        ValueError: on every rank when a name pattern matches no parameter anywhere.
    """
    hashes = {ranks: short_hash(list(layout)) for ranks, layout in record.layouts.items()}
    error = None if record.error is None else f"{type(record.error).__name__}: {record.error}"
    mine = (short_hash(record.rules), hashes, sorted(record.matched), error)
    everyone = gather(mine, group)

    failed = [(rank, entry[3]) for rank, entry in enumerate(everyone) if entry[3] is not None]
    if record.error is not None:
        raise record.error
    if failed:
        rank, message = failed[0]
        raise RuntimeError(f"Adam-mini could not plan its step on rank {rank}: {message}")

    first: dict[str, int] = {}
    for rank, entry in enumerate(everyone):
        if entry[0] != everyone[0][0]:
            _raise_difference(record, group, 0, rank, None)
        for ranks, layout_hash in entry[1].items():
            other = first.setdefault(ranks, rank)
            if layout_hash != everyone[other][1][ranks]:
                _raise_difference(record, group, other, rank, ranks)

    found = {pattern for entry in everyone for pattern in entry[2]}
    missing = [pattern for pattern in patterns if pattern not in found]
    if missing:
        raise ValueError(
            f"Adam-mini name patterns {missing} match no parameter of the model. Patterns are "
            "matched with fnmatch against global names such as "
            "'decoder.layers.0.mlp.linear_fc1.weight'; --adam-mini-manifest, or manifest() of "
            "AdamMini, lists all of them."
        )


def agree_on_plan(
    make: Callable[[], tuple[P, PlanRecord]],
    *,
    patterns: Sequence[str],
    group: distributed.ProcessGroup | None = None,
) -> P:
    """Plan on every rank; return this rank's plan once all have one and the plans agree.

    An error on one rank, even an unexpected one, is raised on all of them before the first
    collective of a step.

    Args:
        make: makes this rank's plan and its record for the check; must not communicate.
        patterns: as for :func:`check_agreement`; so are the errors.
        group: ranks to compare, default all.
    """
    try:
        plan, record = make()
    except Exception as error:
        check_agreement(PlanRecord({}, error=error), patterns=patterns, group=group)
        raise
    check_agreement(record, patterns=patterns, group=group)
    return plan


def on_all_ranks(
    work: Callable[[], T], failure: str, group: distributed.ProcessGroup | None = None
) -> T:
    """Do something on all ranks, and raise on all of them if it fails on any.

    Args:
        work: called on every rank; it must not leave some ranks waiting for others that fail.
        failure: message for the ranks that did not fail themselves.
        group: these ranks, default all.

    Raises:
        Exception: on a rank that failed, its own error.
        RuntimeError: on the others.
    """
    outcome: list[T] = []
    error: Exception | CheckpointException | None = None
    try:
        outcome.append(work())
    except (Exception, CheckpointException) as caught:  # torch's own is not an Exception
        error = caught
    everyone = gather(None if error is None else f"{type(error).__name__}: {error}", group)
    if error is not None:
        raise error
    for rank, message in enumerate(everyone):
        if message is not None:
            raise RuntimeError(f"{failure}: rank {rank} found {message}")
    return outcome[0]


def _raise_difference(
    record: PlanRecord,
    group: distributed.ProcessGroup | None,
    left: int,
    right: int,
    ranks: str | None,
) -> None:
    """Tell all ranks the difference, and raise; all get here, since all saw the same hashes.

    A layout may have megabytes, and with NCCL all ranks' would lie on the device at once. So one of
    the two ranks sends its own, and the other says how they differ.

    Args:
        record: of this rank.
        group: ranks that compare.
        left: first of the two that differ.
        right: the other.
        ranks: key of the layouts that differ; ``None``: the options differ.
    """
    own: Any = record.rules if ranks is None else list(record.layouts.get(ranks, ()))
    others = _from(left, own, group)
    here = "" if _rank(group) != right else _difference(others, own, left, right, ranks)
    difference = _from(right, here, group)
    what = "options" if ranks is None else f"layout of {ranks}"
    raise RuntimeError(
        f"Adam-mini's {what} differs between ranks that must share it: {difference}. "
        "Start every rank with the same flags and model (also requires_grad)."
    )


def _difference(a: Any, b: Any, left: int, right: int, ranks: str | None) -> str:
    """Return in words how what rank ``left`` has, ``a``, differs from ``b`` of rank ``right``."""
    if ranks is None:
        return f"rank {left} has {json.dumps(a)}, rank {right} has {json.dumps(b)}"
    if lacking := [
        f"rank {has} has {sorted(names)}, which rank {lacks} lacks"
        for has, lacks, names in (
            (left, right, _names(a) - _names(b)),
            (right, left, _names(b) - _names(a)),
        )
        if names
    ]:
        return "; ".join(lacking)
    index = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    if index is None:
        longer, index = (left, len(b)) if len(a) > len(b) else (right, len(a))
        entry = (a if longer == left else b)[index]
        return f"only rank {longer} has {json.dumps(entry)}"
    return (
        f"entry {index} is {json.dumps(a[index])} on rank {left} "
        f"and {json.dumps(b[index])} on rank {right}"
    )


def _names(layout: Sequence[dict[str, Any]]) -> set[str]:
    return {str(entry.get("name")) for entry in layout}


def gather(value: T, group: distributed.ProcessGroup | None = None) -> list[T]:
    """Return the values of all ranks of a group, default all; they are pickled to be sent."""
    if not distributed.is_initialized():
        return [value]
    gathered: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(gathered, value, group=group)
    return gathered


def _from(rank: int, value: Any, group: distributed.ProcessGroup | None) -> Any:
    """Return one rank's value on all ranks of a group; it is pickled to be sent."""
    sent = [value]
    distributed.broadcast_object_list(sent, group_src=rank, group=group)
    return sent[0]


def _rank(group: distributed.ProcessGroup | None) -> int:
    return distributed.get_rank(group) if distributed.is_initialized() else 0
