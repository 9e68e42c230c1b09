"""The parts of an optimizer that saving and loading use.

Imports megatron.core's checkpoint types, ``optimizer`` and ``model_space``. Data flow:
``saved_state`` makes a **StateView** of what the optimizer has at that moment -> ``checkpoint``,
``adam_import`` and ``parameter_state``, which read it, or write into it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.distributed import ProcessGroup
from torch.nn import Parameter

from megatron_adam_mini.mcore.model_space import ModelEntries, ModelEntry
from megatron_adam_mini.optimizer import AdamMini
from megatron_adam_mini.plan.partition import ParameterBlocks
from megatron_adam_mini.plan.step_plan import DENSE, Piece
from megatron_adam_mini.state import BufferState, RankState


@dataclass(frozen=True)
class DomainPart:
    """What this rank has of one domain's parameters, in formats that are bound to a layout.

    Attributes:
        name: of the domain.
        data_parallel_group: ranks that share the state, ``None`` without the distributed optimizer.
        model_parallel_rank: returns the number among the parts that tensor, pipeline and, for
            experts, expert parallelism make of the model. Called where it is needed: a caller's
            own process groups may lack its group.
        chain: prefix of its keys in Megatron's formats, which have an optimizer for each domain.
    """

    name: str
    data_parallel_group: ProcessGroup | None
    model_parallel_rank: Callable[[], int]
    chain: str

    @property
    def key(self) -> str:
        """Name of this part in keys of Adam-mini's own format."""
        prefix = "" if self.name == DENSE else f"{self.name}_"
        return f"{prefix}model_parallel_{self.model_parallel_rank()}"

    @property
    def adam_key(self) -> str:
        """Prefix of the keys of Megatron's formats of buckets."""
        return f"{self.chain}optimizer.distributed.dp_group_idx_{self.model_parallel_rank()}."


@dataclass(frozen=True)
class StateView:
    """The parts of an optimizer that saving and loading use.

    Attributes:
        inner: the optimizer of this rank.
        state: its state.
        parameters: the model's parameters, in the plan's numbering.
        param_groups: groups whose values a load sets.
        saved_groups: set by a load to the checkpoint's groups, see ``param_groups.load_groups``.
        grad_scaler: Megatron's loss scaler, or ``None``.
        manifest: partition of the whole model.
        replica: number of the optimizer instance, which distinguishes holders of one slice;
            ``None`` without the distributed optimizer: every data-parallel rank holds everything.
        domains: this rank's parts of the plan's domains.
        sizes: returns the sizes of the parallel layout, recorded in checkpoints.
    """

    inner: AdamMini
    state: RankState
    parameters: Sequence[Parameter]
    param_groups: list[dict[str, Any]]
    saved_groups: list[Mapping[str, Any] | None]
    grad_scaler: Any
    manifest: dict[str, Any]
    replica: int | None
    domains: Sequence[DomainPart]
    sizes: Callable[[], dict[str, int]]

    def state_of(self, piece: Piece) -> BufferState:
        """Return the state that contains a piece."""
        return self.state.of(piece)

    def domain_of(self, piece: Piece) -> DomainPart:
        """Return the domain that a piece belongs to."""
        return self.domains[self.inner.plan.buffers[piece.buffer].domain]

    def blocks_of(self, piece: Piece) -> ParameterBlocks:
        """Return this run's blocks of a piece's parameter."""
        return self.inner.plan.parameters[piece.parameter]

    def entry_of(self, piece: Piece, entries: ModelEntries) -> ModelEntry:
        """Return where a piece's parameter lies in the whole model.

        Args:
            piece: the piece.
            entries: of the model's sharded state dict.

        Raises:
            ValueError: that dict lacks the parameter.
        """
        found = entries.find(self.parameters[piece.parameter])
        info = self.blocks_of(piece).info
        if found is None:
            raise ValueError(
                f"Parameter {info.name!r} is not in the model's sharded state dict, so Adam-mini "
                "cannot tell where its state belongs; pass the whole model's, built with "
                "keep_vars=True."
            )
        return ModelEntry(found, self.replica, is_copy=not info.in_norm)

    def tp_rank_of_rows(self, piece: Piece) -> int | None:
        """Return the tensor-parallel rank if every rank of its group holds a part of each row."""
        info = self.blocks_of(piece).info
        return info.tp_rank if info.row_parallel else None
