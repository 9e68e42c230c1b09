"""The numbers that change from step to step, where kernels read them: on the device.

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
    """Hyper-parameters of one step in tensors that are made once and refilled in place.

    On a GPU they are filled by asynchronous copies from pinned memory, so neither :meth:`fill` nor
    a kernel that reads them waits for the device (unless it is a whole step behind).

    Args:
        num_groups: parameter groups, ``G``.
        device: where the kernels run.
        seed: of stochastic rounding.

    Attributes:
        grad_scale: what gradients are multiplied with (inverse loss scale times clipping),
            float32 scalar. **Not finite means: skip the step**; kernels then write nothing.
        bias_corrections: ``1 - beta1 ** step`` and ``1 - beta2 ** step``, float32, shape ``(2,)``.
        hyper_G3: ``lr``, ``eps``, ``1 - lr * weight_decay``, float32, shape ``(G, 3)``.
        noise_key: int64 scalar in ``[0, 2**32)``, another one in each step.
        beta1: decay of m.
        beta2: decay of v.
    """

    def __init__(self, num_groups: int, device: torch.device, *, seed: int = 0) -> None:
        pinned = device.type == "cuda"
        self._host = torch.zeros(2 + 3 * num_groups, pin_memory=pinned)
        self._host_key = torch.zeros((), dtype=torch.int64, pin_memory=pinned)
        self._device = torch.zeros_like(self._host, device=device)
        self._numpy: np.ndarray[Any, Any] = self._host.numpy()
        self._seed = seed
        self._copied: Any = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]
        self.grad_scale = torch.ones((), device=device)
        self.noise_key = torch.zeros((), dtype=torch.int64, device=device)
        self.beta1 = self.beta2 = 0.0

    @property
    def bias_corrections(self) -> Tensor:
        """See the class."""
        return self._device[:2]

    @property
    def hyper_G3(self) -> Tensor:  # noqa: N802 (shape suffix)
        """See the class."""
        return self._device[2:].view(-1, 3)

    def fill(
        self,
        groups: Sequence[Mapping[str, Any]],
        *,
        betas: tuple[float, float],
        step: int,
        grad_scale: float | Tensor,
    ) -> None:
        """Set everything for step ``step`` (counts from 1)."""
        if self._copied is not None:
            self._copied.synchronize()  # the step before may not have read its numbers yet
        self.beta1, self.beta2 = betas
        self._numpy[0] = 1 - self.beta1**step
        self._numpy[1] = 1 - self.beta2**step
        for index, group in enumerate(groups):
            lr = group["lr"]
            self._numpy[2 + 3 * index : 5 + 3 * index] = (
                lr,
                group["eps"],
                1.0 - lr * group["weight_decay"],
            )
        self._device.copy_(self._host, non_blocking=True)
        self._host_key.fill_(mix32(mix32(self._seed) + step))
        self.noise_key.copy_(self._host_key, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        if isinstance(grad_scale, Tensor):
            self.grad_scale.copy_(grad_scale)
        else:
            self.grad_scale.fill_(grad_scale)
