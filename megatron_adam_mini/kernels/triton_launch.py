"""How Triton kernels are launched: options, device, elements per access.

Imports torch and triton. Data flow: tensors -> **launch** -> kernels; what is launched when:
``triton_gpu``.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from megatron_adam_mini.kernels.triton_storage import load_float32

#: Eight warps: 8 elements per thread and stream, two 16-byte vectors of float32. No contraction
#: to fused multiply-add: results equal the reference bit for bit, and memory-bound kernels lose
#: nothing.
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Launch a kernel, unless it has nothing to do."""
    if programs:
        kernel[(programs,)](*arguments, **constants, **OPTIONS)


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's GPU the current one, as Triton launches there.

    Raises:
        ValueError: the tensor is on the CPU, and kernels are not interpreted.
    """
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    if isinstance(load_float32, triton.JITFunction):  # interpreted functions have another type
        raise ValueError(
            f"Adam-mini backend='triton' got tensors on {str(tensor.device)!r}; allowed: 'cuda'. "
            "Choose another backend, or set TRITON_INTERPRET=1 to interpret the kernels."
        )
    return nullcontext()


def elements_per_access(*streams: Tensor | None) -> int:
    """Return how many elements are 16 bytes of the widest stream; 1 if one is not aligned."""
    found = [stream for stream in streams if stream is not None]
    if any(stream.data_ptr() % 16 for stream in found):
        return 1
    return 16 // max(stream.element_size() for stream in found)


def as_bits(stream: Tensor | None) -> Tensor | None:
    """Return a bfloat16 stream as int16, any other as it is; see ``triton_storage``."""
    if stream is None or stream.dtype != torch.bfloat16:
        return stream
    return stream.view(torch.int16)
