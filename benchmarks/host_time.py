"""How long the host takes to launch a step, without a GPU.

    python -m benchmarks.plan_scale launches      # its last column

The optimizer runs on tensors without memory, as in ``launches``, but Triton compiles its kernels
(for sm_90) and launches them, up to the call of the driver, which does nothing; nor do collectives.
So this is the time of Python, of Triton's binder, and of torch's few operations, which take longer
without memory than with it. What is missing of a real step: the driver, NCCL's enqueueing, and
waiting for the device.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.launches import alone, step, without_memory
from megatron_adam_mini.config import AdamMiniConfig
from megatron_adam_mini.plan.step_plan import StepPlan

#: Steps, of which the fastest counts: the machine may be busy.
_STEPS = 50


class _Launcher:
    def __init__(self, *_: Any) -> None:
        pass

    def __call__(self, *_: Any) -> None:
        pass


class _Utils:
    """What Triton asks of a driver when it loads a kernel."""

    def load_binary(self, *_: Any) -> tuple[Any, int, int, int, int]:
        """Return module, function, registers, spills and the most threads."""
        return object(), 0, 0, 0, 1024

    def unload_module(self, _: Any) -> None:
        """Do nothing."""

    def get_device_properties(self, _: int) -> dict[str, int]:
        """Return an H100's shared memory."""
        return {"max_shared_mem": 232448}


class _Driver:
    """Triton's driver of a GPU that is not there."""

    launcher_cls = _Launcher
    utils = _Utils()

    def get_current_device(self) -> int:
        """Return the only one."""
        return 0

    def get_current_stream(self, _: int) -> int:
        """Return the default stream."""
        return 0

    def get_current_target(self) -> Any:
        """Return what to compile for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def host_seconds(plan: StepPlan, options: AdamMiniConfig | None = None) -> float:
    """Return the time of the host, in seconds, for a step that is not the first one."""
    optimizer = without_memory(plan, options)
    taken = []
    with _no_driver(), alone(optimizer, Counter()):
        step(optimizer)  # compiles, and makes the launch tables
        for _ in range(_STEPS):
            begin = time.process_time()
            step(optimizer)
            taken.append(time.process_time() - begin)
    return min(taken)


@contextmanager
def _no_driver() -> Iterator[None]:
    from triton.runtime import driver

    before = driver._active
    driver.set_active(_Driver())
    try:
        yield
    finally:
        driver._active = before
