"""The numbers that change from step to step, stored on the device for the kernels.

Imports torch and ``rounding``. Data flow: parameter groups, step, clipping -> **StepScalars**
-> kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_adam_mini.rounding import mix32


class StepScalars:
    """Hyper-parameters of one step in tensors that are allocated once and refilled in place.

    On a CPU, kernels read what :meth:`write` writes. A GPU gets one asynchronous copy of it from
    pinned memory by :meth:`send`, so :meth:`write` does not wait for the device (unless that is a
    whole step behind), nor does a kernel that reads it. Kernels started again with the same
    arguments, after the same copy, use the numbers that were written last.

    Args:
        num_groups: parameter groups, ``G``.
        device: where the kernels run.
        seed: of stochastic rounding.

    Attributes:
        grad_scale: factor of the gradients (inverse loss scale times clipping), float32 scalar:
            the tensor that :meth:`fill` got, or one of its own. **Not finite means: skip the
            step**; kernels then write nothing.
        bias_corrections: ``1 - beta1 ** step`` and ``1 - beta2 ** step``, float32, shape ``(2,)``.
        hyper_G3: ``lr``, ``eps``, ``1 - lr * weight_decay``, float32, shape ``(G, 3)``.
        noise_key: int64 scalar in ``[0, 2**32)``, different in each step.
        beta1: decay of m.
        beta2: decay of v.
    """

    def __init__(self, num_groups: int, device: torch.device, *, seed: int = 0) -> None:
        floats, on_gpu = 3 + 3 * num_groups, device.type == "cuda"
        # One tensor, so one copy: 8 bytes for the key of the noise, then float32.
        self._host = torch.zeros(
            1 + -(-floats // 2), dtype=torch.int64, device="cpu", pin_memory=on_gpu
        )
        self._device = self._host if device.type == "cpu" else self._host.to(device)
        self._host_key = self._host.numpy()[:1]
        self._host_floats: np.ndarray[Any, Any] = self._host[1:].numpy().view(np.float32)
        self._seed = seed
        self._copied: Any = torch.cuda.Event(external=True) if on_gpu else None  # type: ignore[no-untyped-call]
        self.noise_key = self._device[0]
        values = self._device[1:].view(torch.float32)[:floats]
        self._known_scale, self.bias_corrections = values[0], values[1:3]
        self.grad_scale = self._known_scale
        self.hyper_G3 = values[3:].view(-1, 3)
        self.beta1 = self.beta2 = 0.0

    def fill(
        self,
        groups: Sequence[Mapping[str, Any]],
        *,
        betas: tuple[float, float],
        step: int,
        grad_scale: float | Tensor,
    ) -> None:
        """Set all numbers for step ``step`` (counted from 1), and :meth:`send` them.

        Args: as of :meth:`write`.
        """
        self.write(groups, betas=betas, step=step, grad_scale=grad_scale)
        self.send()

    def write(
        self,
        groups: Sequence[Mapping[str, Any]],
        *,
        betas: tuple[float, float],
        step: int,
        grad_scale: float | Tensor,
    ) -> None:
        """Set all numbers for step ``step`` (counted from 1) on the host.

        ``grad_scale`` may be a float32 scalar on the device, which kernels then read where it is.
        """
        if self._copied is not None:
            self._copied.synchronize()  # the previous step may not have read its numbers yet
        self.beta1, self.beta2 = betas
        known = 0.0 if isinstance(grad_scale, Tensor) else grad_scale
        values = [known, 1 - self.beta1**step, 1 - self.beta2**step]
        for group in groups:
            lr = group["lr"]
            values += (lr, group["eps"], 1.0 - lr * group["weight_decay"])
        self._host_floats[: len(values)] = values
        self._host_key[0] = mix32(mix32(self._seed) + step)
        self.grad_scale = grad_scale if isinstance(grad_scale, Tensor) else self._known_scale

    def send(self) -> None:
        """Start to copy them to the device."""
        if self._device is not self._host:
            self._device.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._device.device))
