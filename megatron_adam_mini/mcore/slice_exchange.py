"""Slices of a bucket on the ranks of a group <-> the whole bucket on the first, in host memory.

Imports torch.distributed. All ranks of a group must call these functions, in the same order. Parts
travel through the device unless the group is gloo's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from megatron_adam_mini.plan.buffer_plan import PART_NUMEL
from megatron_adam_mini.state import HOST


def is_first(group: ProcessGroup | None) -> bool:
    """Return whether this rank is the first of a group; ``None``: it is alone."""
    return group is None or group.rank() == 0


def from_first(value: dict[str, Any], group: ProcessGroup | None) -> dict[str, Any]:
    """Return what the first rank of a group has on all of its ranks; it is pickled to be sent."""
    if group is None:
        return value
    found: list[dict[str, Any]] = [value]
    distributed.broadcast_object_list(found, src=distributed.get_global_rank(group, 0), group=group)
    return found[0]


def gathered(
    values: Tensor, group: ProcessGroup | None, device: torch.device, everywhere: bool
) -> Tensor:
    """Join the slices of all ranks, in the order of ranks; all of it on the CPU.

    Args:
        values: this rank's slice.
        group: all ranks, or ``None``.
        device: of the model, through which parts are sent unless the group is gloo's.
        everywhere: whether to return it on all ranks; otherwise on the first, on others anything.
    """
    if group is None:
        return values
    receives = everywhere or group.rank() == 0
    whole = torch.empty(
        group.size() if receives else 0, len(values), dtype=torch.float32, device=HOST
    )
    for part in _parts(len(values), group):
        mine = values[part].to(_device_of(group, device))
        slices = [torch.empty_like(mine) for _ in range(group.size() if receives else 0)]
        if everywhere:
            distributed.all_gather(slices, mine, group=group)
        else:
            first = distributed.get_global_rank(group, 0)
            distributed.gather(mine, slices or None, dst=first, group=group)
        for row, received in zip(whole, slices, strict=True):
            row[part] = received
    return whole.view(-1)


def scattered(
    whole: Tensor | None, group: ProcessGroup | None, numel: int, device: torch.device
) -> Tensor:
    """Return this rank's slice of what the first rank has; both on the CPU."""
    if group is None:
        assert whole is not None
        return whole
    mine = torch.empty(numel, dtype=torch.float32, device=HOST)
    first = distributed.get_global_rank(group, 0)
    for part in _parts(numel, group):
        slices = None
        if whole is not None:
            rows = whole.view(group.size(), numel)
            slices = [row[part].to(_device_of(group, device)) for row in rows]
        received = torch.empty(
            len(mine[part]), dtype=torch.float32, device=_device_of(group, device)
        )
        distributed.scatter(received, slices, src=first, group=group)
        mine[part] = received
    return mine


def _parts(numel: int, group: ProcessGroup) -> list[slice]:
    """Return parts of a slice, so short that those of all ranks together take little memory."""
    length = max(PART_NUMEL // group.size(), 1)
    return [slice(begin, min(begin + length, numel)) for begin in range(0, numel, length)]


def _device_of(group: ProcessGroup, device: torch.device) -> torch.device:
    return HOST if distributed.get_backend(group) == "gloo" else device
