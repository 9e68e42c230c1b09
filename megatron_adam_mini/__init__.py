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
__all__ = ["AdamMini", "AdamMiniConfig", "__version__", "register"]


def register() -> Registration:
    """Make ``--optimizer adam_mini`` and ``OptimizerConfig(optimizer="adam_mini")`` work.

    Call it once before Megatron parses its arguments. Idempotent.

    Returns:
        A handle whose ``undo()`` restores Megatron's own functions.
    """
    from megatron_adam_mini.mcore.registration import register as register_with_megatron

    return register_with_megatron()


def __getattr__(name: str) -> Any:
    if name == "AdamMini":
        from megatron_adam_mini.standalone.optimizer import AdamMini

        return AdamMini
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
