"""What could go wrong in the first step of one rank goes wrong here, on all ranks.

Imports torch and ``kernels``. Data flow: optimizer that ``factory`` has made -> the same, with
kernels compiled and launch tables made.
"""

from __future__ import annotations

import logging
import platform
from typing import Any

import torch
from torch import distributed

from megatron_adam_mini.kernels.toolchain import describe_toolchain

logger = logging.getLogger(__name__)


def prepare_first_step(optimizer: Any) -> None:
    """Compile the kernels of a step and make their tables; local to the rank.

    Args:
        optimizer: an ``AdamMiniOptimizer``.

    Raises:
        RuntimeError: Triton cannot compile or launch a kernel; says what it needs, and where.
    """
    inner = optimizer.inner
    try:
        done = optimizer.warm_up()
        if inner.device.type == "cuda":
            torch.cuda.synchronize(inner.device)  # launches report their errors late
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if inner.kernels.NAME != "triton":
            raise
        raise RuntimeError(
            f"Adam-mini's Triton kernels cannot be compiled or launched on {platform.node()}: "
            f"{type(error).__name__}: {error}. {describe_toolchain()}. Remedy: give this machine "
            "what is missing, or start with a cache folder that a run of the same image, GPU and "
            "flags has filled (docs/gpu.md, First step)."
        ) from error
    if not done and distributed.get_rank() == 0:
        logger.warning(
            "Adam-mini compiles its kernels in the first step, not at start-up: the memory of "
            "gradients or weights was freed before the optimizer was made. A rank that cannot "
            "compile will then fail alone."
        )
