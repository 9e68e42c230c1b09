"""Adam-mini as a distributed optimizer for Megatron-style 3D parallelism, and for plain PyTorch.

Importing this package imports neither torch nor megatron; :func:`register` does, and the name
``AdamMini`` imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_adam_mini.config import AdamMiniConfig

if TYPE_CHECKING:
    from megatron_adam_mini.mcore.registration import Registration
    from megatron_adam_mini.standalone.optimizer import AdamMini

__version__ = "0.1.0"
__all__ = ["AdamMini", "AdamMiniConfig", "__version__", "metrics_of", "register"]


def register() -> Registration:
    """Make ``--optimizer adam_mini`` and ``OptimizerConfig(optimizer="adam_mini")`` work.

    Call it once before Megatron parses its arguments. Idempotent.

    Returns:
        A handle whose ``undo()`` restores Megatron's own functions.
    """
    from megatron_adam_mini.mcore.registration import register as register_with_megatron

    return register_with_megatron()


def metrics_of(
    optimizer: Any, *, updates: bool = False, heterogeneity: bool = False
) -> dict[str, float]:
    """Return what Megatron's loop logs of Adam-mini, for a loop of your own; see ``docs/logs.md``.

    Args:
        optimizer: what ``get_megatron_optimizer`` returned.
        updates: also how large the last update was beside the weights, and the range of v. All
            ranks must then call it, between a step and anything else that changes the state.
        heterogeneity: also how unlike v is within blocks, of parameters that keep one per element;
            all ranks must then call it.

    Returns:
        Names, which begin with ``adam-mini/``, and values.

    Raises:
        TypeError: the optimizer is not Adam-mini.
    """
    from megatron_adam_mini.mcore.distributed_optimizer import AdamMiniOptimizer
    from megatron_adam_mini.mcore.metrics import metrics_of as metrics_of_member

    member = getattr(optimizer, "member", optimizer)
    if not isinstance(member, AdamMiniOptimizer):
        raise TypeError(
            f"metrics_of needs what get_megatron_optimizer returns for optimizer='adam_mini', got "
            f"{type(optimizer).__name__}."
        )
    return metrics_of_member(member, updates=updates, heterogeneity=heterogeneity)


def __getattr__(name: str) -> Any:
    if name == "AdamMini":
        from megatron_adam_mini.standalone.optimizer import AdamMini

        return AdamMini
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
