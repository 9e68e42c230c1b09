"""What ``get_megatron_optimizer`` returns: Megatron's own chain, with Adam-mini as its only member.

Imports megatron.core and ``distributed_optimizer``. Megatron's callers, and those of frameworks,
look for a chain: they ask for its class, walk its members, and call on it what they call on a
member. All of that is Megatron's code; only what it would compute from the gradients of the
members is asked of Adam-mini here.
"""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor

from megatron_adam_mini.mcore.distributed_optimizer import AdamMiniOptimizer
from megatron_adam_mini.optimizer import AdamMini


class AdamMiniChainedOptimizer(ChainedOptimizer):  # type: ignore[misc]
    """Megatron's chain of optimizers around one :class:`AdamMiniOptimizer`.

    Args:
        member: the optimizer.
    """

    def __init__(self, member: AdamMiniOptimizer) -> None:
        super().__init__([member])
        self.grad_norms_by_group: dict[str, float] = {}

    @property
    def member(self) -> AdamMiniOptimizer:
        """The only member."""
        member: AdamMiniOptimizer = self.chained_optimizers[0]
        return member

    @property
    def inner(self) -> AdamMini:
        """State and step of this rank."""
        return self.member.inner

    @property
    def manifest(self) -> dict[str, Any]:
        """Partition of the whole model."""
        return self.member.manifest

    def step(self) -> tuple[bool, float | None, int | None]:
        """Take one step, see :meth:`AdamMiniOptimizer.step`; all ranks must call it."""
        return self.member.step()

    def clip_grad_norm(self, clip_grad: float) -> float:
        """Set the clipping factor of the update, and return the norm before clipping."""
        return self.member.clip_grad_norm(clip_grad)

    def get_grads_for_grad_norm(self, grad_norm_group: str | None = None) -> list[Tensor]:
        """Return this rank's gradients that count in the norm."""
        return self.member.get_grads_for_grad_norm(grad_norm_group)

    def count_zeros(self) -> int:
        """Return the number of zeros in the model's gradients, each parameter counted once."""
        return self.member.count_zeros()

    def state_dict(self, is_loading: bool = False) -> dict[str, Any]:
        """Return groups, steps and loss scale, see :meth:`AdamMiniOptimizer.state_dict`."""
        return self.member.state_dict(is_loading)

    def state_bytes(self) -> dict[str, int]:
        """Return the bytes of this rank's optimizer state: main_param, exp_avg, exp_avg_sq."""
        return self.member.state_bytes()

    def communication_per_step(self) -> dict[str, Any]:
        """Return what Adam-mini adds per step on this rank: collectives, and bytes by group."""
        return self.member.communication_per_step()
