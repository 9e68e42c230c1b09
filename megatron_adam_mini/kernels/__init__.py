"""The arithmetic of a step on flat tensors; each backend has the same functions.

``reference`` (plain torch) is the specification: what another backend computes must equal it
within the rounding of the order of additions.

Data flow: gradient slice -> ``block_sum_sq_`` -> reduction -> ``block_step_size_`` ->
``update_`` / ``update_elementwise_`` -> main parameter, ``exp_avg``, model weight.
"""

from __future__ import annotations

from types import ModuleType

from megatron_adam_mini.kernels import reference
from megatron_adam_mini.kernels.segments import SegmentTable

__all__ = ["SegmentTable", "select_backend"]


def select_backend(name: str) -> ModuleType:
    """Return the module that holds the kernels of a backend.

    Raises:
        ValueError: the backend is not known.
    """
    if name in ("auto", "reference"):
        return reference
    raise ValueError(f"Adam-mini backend={name!r} is not known; allowed: auto, reference.")
