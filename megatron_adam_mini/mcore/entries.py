"""Entries of a sharded state dict, and the values of the state that they hold on a save.

Imports megatron.core's checkpoint types and ``state``. Used by ``checkpoint``, ``flat_buckets``
and ``parameter_state``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from megatron_adam_mini.plan.buffer_plan import Window
from megatron_adam_mini.state import HOST, BufferState

#: Keys of the optimizer's state dict; Megatron's own optimizers use neither.
SHARDS, OBJECTS = "adam_mini_shards", "adam_mini_objects"
#: Entries of a state dict by name, a few boxes each.
Shards = dict[str, dict[str, ShardedTensor]]


def add_entries(shards: Shards, name: str, found: list[ShardedTensor]) -> None:
    """Add entries under a name, unless there are none: an empty dict would become common state."""
    if found:
        shards[name] = {str(index): shard for index, shard in enumerate(found)}


def copy_float32(state: BufferState, kind: str, window: Window, out: Tensor) -> None:
    """Copy ``param`` or ``exp_avg`` of a window, part by part.

    Args:
        state: state of the buffer.
        kind: which.
        window: part of it.
        out: float32, in host memory, shape ``(elements of the window,)``; is written.
    """
    for where, part in window.parts():
        out[where] = state.as_float32(part, kind)


@dataclass(frozen=True)
class HostCopy:
    """``param`` or ``exp_avg`` of a window that is not kept as float32; each slice is a new copy.

    In host memory, which a checkpoint's float32 values need anyway: in device memory, there may be
    no place for them. Megatron's writer does not clone tensors that fill their storage, so each
    box of a checkpoint gets one.

    Attributes:
        state: state of the buffer.
        kind: ``param`` or ``exp_avg``.
        window: part of it.
    """

    state: BufferState
    kind: str
    window: Window

    def __getitem__(self, part: slice) -> Tensor:
        """Return elements of the window, float32."""
        window = self.window.part(part.start, part.stop)
        values = torch.empty(window.numel, dtype=torch.float32, device=HOST)
        copy_float32(self.state, self.kind, window, values)
        return values


def to_save(state: BufferState, window: Window) -> dict[str, Tensor | HostCopy]:
    """Return ``param`` and ``exp_avg`` of a window, for a writer that may be asynchronous."""
    return {
        kind: HostCopy(state, kind, window) if data is None else view_to_save(data)
        for kind, data in state.float32_views(window).items()
    }


def view_to_save(data: Tensor) -> Tensor:
    """Return a view of the state, float32, for a writer that may be asynchronous.

    On the CPU, Megatron's writer clones views but hands over tensors that fill their storage; were
    that the state's own, the next step would write into the checkpoint. On a GPU everything is
    copied to the host.
    """
    fills = data.nbytes == data.untyped_storage().nbytes()
    return data.clone() if fills and data.device.type == "cpu" else data
