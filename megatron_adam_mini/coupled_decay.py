"""Weight decay that is not decoupled: it is added to gradients before anything is made of them.

Imports torch, ``plan``, ``state`` and ``main_params``. Data flow: gradients, main parameters ->
gradients (modified in place) -> their sums of squares once more.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megatron_adam_mini.main_params import MainParams
from megatron_adam_mini.plan.step_plan import StepPlan
from megatron_adam_mini.state import Buffer


def add_decay_(
    plan: StepPlan, buffers: Sequence[Buffer], main_params: MainParams, grad_scale: float | Tensor
) -> None:
    """Scale the gradients of a rank, and add weight decay times main parameters to them (in place).

    Args:
        plan: all integers.
        buffers: live tensors of the plan's buffers; gradients in float32.
        main_params: main parameters, and groups with a ``weight_decay`` each.
        grad_scale: factor of the gradients.
    """
    state = main_params.attach()
    for piece in plan.pieces:
        # g <- grad_scale g + weight_decay p
        grad = buffers[piece.buffer].grad[piece.window.in_buffer].mul_(grad_scale)
        decay = main_params.group_of(piece)["weight_decay"]
        if decay:
            param = state.of(piece).main_param(piece.window)
            grad.add_(param.to(grad.device), alpha=decay)
