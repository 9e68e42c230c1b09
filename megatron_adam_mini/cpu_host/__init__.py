"""CPU host: unmodified Megatron-Core on CPU cores, with gloo.

Megatron-Core requires CUDA. ``enable`` replaces the functions of ``torch.cuda`` that it calls, so
a run under any layout of tensor, pipeline and data parallelism can be started, debugged and tested
on a machine without a GPU. It changes no computation: the same torch operations run on the same
values, on the CPU (and gloo's all-gather of several dtypes at once is mended).

What a CPU host cannot show: streams are always empty, so a race between communication and
computation stays hidden; NCCL, Transformer Engine and FP8 do not run.

Imports torch, never Megatron; nothing in the optimizer depends on this package.
"""

import os
import sys
from typing import Any

import torch

from megatron_adam_mini.cpu_host import gloo, megatron_imports, tensor_device, torch_cuda
from megatron_adam_mini.cpu_host.flags import CPU_FLAGS, with_cpu_flags

__all__ = ["CPU_FLAGS", "enable", "is_enabled", "with_cpu_flags"]

_ENVIRONMENT = {
    # For torch in this process and in its children: generated kernels would need a compiler run
    # for each rank.
    "TORCHDYNAMO_DISABLE": "1",
    "TORCH_COMPILE_DISABLE": "1",
    # Megatron needs it for the order of CUDA kernels and refuses to start without it.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
}

_enabled = False


def is_enabled() -> bool:
    """Return whether ``enable`` was called; then ``torch.cuda.is_available()`` is always true."""
    return _enabled


def enable(force: bool = False) -> None:
    """Replace ``torch.cuda`` in this process, so that Megatron-Core runs on the CPU.

    Call it before Megatron-Core is imported. A second call does nothing. It cannot be undone
    within a process. Tensors are redirected in the calling thread only; another thread that
    requests a CUDA device gets torch's error.

    Args:
        force: enable it even if CUDA is available; its devices then stay unused.

    Raises:
        RuntimeError: if CUDA is available and ``force`` is False, or if Megatron-Core has already
            been imported.
    """
    global _enabled
    if _enabled:
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError(
            "the CPU host must be enabled before megatron.core is imported, because Megatron keeps "
            "what it finds in torch.cuda at import; call megatron_adam_mini.cpu_host.enable() at "
            "the top of the program"
        )
    if torch.cuda.is_available() and not force:
        raise RuntimeError(
            "the CPU host is for machines without a GPU, and torch sees "
            f"{torch.cuda.device_count()} here; run without --cpu-host, hide the GPUs "
            "(CUDA_VISIBLE_DEVICES=''), or call enable(force=True)"
        )
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    torch.compile = _run_eagerly
    gloo.install()
    torch_cuda.install()
    tensor_device.install()
    megatron_imports.install()
    _enabled = True


def _run_eagerly(model: Any = None, **_: Any) -> Any:
    """Replace a disabled ``torch.compile``, whose import would take seconds on every rank."""
    return (lambda function: function) if model is None else model
