"""What a load has requested from a checkpoint, until it has returned.

Imports megatron.core's checkpoint types, ``entries`` and ``state``. Data flow: ``checkpoint`` or
``adam_import`` asks -> **PendingLoad** -> Megatron's load fills it -> ``checkpoint`` takes it over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import Tensor

from megatron_adam_mini.mcore.entries import OBJECTS, SHARDS, Shards
from megatron_adam_mini.plan.buffer_plan import Window
from megatron_adam_mini.plan.partition import ParameterBlocks
from megatron_adam_mini.state import HOST, BufferState, RankState


@dataclass
class PendingLoad:
    """What was requested from a checkpoint, until the load has returned it.

    Attributes:
        state: the state that is read into; the optimizer's, if nobody has moved it since.
        asked: entries by name, as in the state dict.
        floats: state, window, and float32 tensors that the entries of ``param`` and ``exp_avg``
            are views of; see ``BufferState.store``.
        rows: row values of each piece, by the piece's number. These and the next two are in host
            memory.
        columns: v of this rank's columns of all sets, likewise; shape ``(sets, columns)``.
        sources: blocks of the checkpoint's v, by parameter.
        elements: element values of each piece whose v is averaged over blocks.
        objects: entries that are not tensors.
        average: whether v is averaged over blocks rather than copied.
        adam_format: format of Megatron's Adam that is read, ``None`` for Adam-mini's own.
        new: numbers of pieces whose parameters were frozen when the checkpoint was saved.
        taken: step count with which the optimizer has taken over what was read, ``None``: not yet.
    """

    state: RankState
    asked: Shards = field(default_factory=dict)
    floats: list[tuple[BufferState, Window, dict[str, Tensor]]] = field(default_factory=list)
    rows: dict[int, Tensor] = field(default_factory=dict)
    columns: dict[int, Tensor] = field(default_factory=dict)
    sources: Sequence[ParameterBlocks | None] = ()
    elements: dict[int, Tensor] = field(default_factory=dict)
    objects: dict[str, ShardedObject] = field(default_factory=dict)
    average: bool = False
    adam_format: str | None = None
    new: set[int] = field(default_factory=set)
    taken: int | None = None

    def floats_of(
        self, state: BufferState, window: Window, *, weights: bool = True
    ) -> dict[str, Tensor]:
        """Return float32 tensors into which ``param`` and ``exp_avg`` of a window are read.

        They are views of the state, or, where it cannot be read in place, in host memory.

        Args:
            state: state of the buffer.
            window: part of it.
            weights: whether to read main parameters that are the model's weights, too.
        """
        views = state.float32_views(window)
        if not state.owns_main_param:
            # Before the optimizer, the model takes over its weights, which may have fewer bits.
            views["param"] = None
            if not weights:
                del views["param"]
        values = {
            kind: torch.empty(window.numel, dtype=torch.float32, device=HOST)
            if view is None
            else view
            for kind, view in views.items()
        }
        self.floats.append((state, window, values))
        return values

    def state_dict(self) -> dict[str, Any]:
        """Return the requested entries as a state dict."""
        return {
            key: dict(value)
            for key, value in ((SHARDS, self.asked), (OBJECTS, self.objects))
            if value  # an empty entry would become part of the common state
        }
