"""The arithmetic of a step on flat tensors; each backend has the same functions.

``reference`` (plain torch) is the specification: results of another backend may differ from it only
by the rounding that the order of additions causes. ``cpu`` calls C++ (``cpu.cpp``, which includes
``cpu_*.inc``); ``triton_gpu`` launches the kernels of ``triton_*_kernels``.

Arguments are the same everywhere: tensors of a buffer, a segment table, vectors with one entry per
segment, the numbers of the step. Data flow: gradients -> ``segment_sum_sq_`` -> ``ordered_sum_``
around collectives -> ``segment_step_size_`` -> ``update_`` / ``update_elementwise_`` -> main
parameters, ``exp_avg``, model weights.
"""

from __future__ import annotations

import importlib
import logging
import os
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from megatron_adam_mini.config import BACKENDS
from megatron_adam_mini.kernels.arguments import BufferTensors, SegmentVectors
from megatron_adam_mini.kernels.scalars import StepScalars
from megatron_adam_mini.plan.column_table import ColumnTable
from megatron_adam_mini.plan.segment_table import SegmentTable

__all__ = ["BufferTensors", "SegmentVectors", "StepScalars", "select_backend", "sum_squares_"]

logger = logging.getLogger(__name__)

_MODULES = {"reference": "reference", "cpu": "cpu", "triton": "triton_gpu"}
_DEVICES = {"cpu": ("cpu",), "triton": ("cuda",)}


def select_backend(name: str, device: torch.device) -> ModuleType:
    """Return the module that holds the kernels of a backend.

    Args:
        name: one of ``config.BACKENDS``; ``auto`` selects ``cpu`` or ``triton`` by device, and
            plain torch if that is not installed, with a warning that gives the reason.
        device: where the slices are; what devices torch finds on the machine does not matter.

    Raises:
        ValueError: the backend is unknown, or does not run on the device.
        ImportError: the backend was selected by name and is not installed.
    """
    if name not in BACKENDS:
        raise ValueError(
            f"Adam-mini backend={name!r} is not known; allowed: {', '.join(BACKENDS)}."
        )
    if name == "auto":
        fast = next((k for k, devices in _DEVICES.items() if device.type in devices), "reference")
        try:
            return _load(fast)
        except ImportError as error:
            _warn_once(
                f"Adam-mini runs on plain torch, which takes several times as long per step and "
                f"large temporaries: {error}"
            )
            return _load("reference")
    # Triton's interpreter runs on the CPU; it is how these kernels are tested without a GPU.
    interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted and device.type not in _DEVICES.get(name, (device.type,)):
        raise ValueError(
            f"Adam-mini backend={name!r} runs on {' and '.join(_DEVICES[name])} tensors, but the "
            f"gradients are on {device}. Remedy: backend='auto' picks what fits."
        )
    return _load(name)


def sum_squares_(
    kernels: ModuleType, sum_sq_SR: Tensor, grad_N: Tensor, *tables: SegmentTable | ColumnTable
) -> None:
    """Write the sums of squares of the segments of tables, one after the other.

    Args:
        kernels: a backend.
        sum_sq_SR: float32; the entries of the tables are overwritten.
        grad_N: gradients of the buffer.
        tables: of that buffer; those without segments are left out.
    """
    for table in tables:
        if not len(table):
            continue
        if isinstance(table, ColumnTable):
            kernels.column_sum_sq_(sum_sq_SR, grad_N, table)
        else:
            kernels.segment_sum_sq_(sum_sq_SR, grad_N, table)


def _load(name: str) -> ModuleType:
    try:
        module = importlib.import_module(f"megatron_adam_mini.kernels.{_MODULES[name]}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "triton":
            raise
        raise ImportError(
            "Adam-mini backend='triton' needs the package triton, which comes with torch's CUDA "
            "builds for Linux. Remedy: pip install triton, or backend='reference'."
        ) from error
    if name == "cpu":
        module.library()
    return module


@lru_cache
def _warn_once(message: str) -> None:
    logger.warning(message)
