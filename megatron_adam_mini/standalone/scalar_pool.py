"""The numbers of one step, for each parameter group and each count of steps.

Imports torch and ``kernels``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_adam_mini.kernels import StepScalars


class ScalarPool:
    """Scalars that kernels read, allocated once and used again in every step.

    Parameters of one group share theirs, as long as they have taken the same number of steps.
    """

    def __init__(self) -> None:
        self._kept: dict[torch.device, list[StepScalars]] = {}
        self._of: dict[tuple[torch.device, int, int], StepScalars] = {}

    def begin_step(self) -> None:
        """Forget the numbers of the step before."""
        self._of = {}

    def of(self, group: Mapping[str, Any], step: Tensor, param: Tensor) -> StepScalars:
        """Return the scalars of a parameter of ``group`` that takes its step number ``step``."""
        key = param.device, id(group), int(step)
        if key not in self._of:
            kept = self._kept.setdefault(param.device, [])
            used = sum(device == param.device for device, _, _ in self._of)
            if used == len(kept):
                kept.append(StepScalars(1, param.device))
            numbers = {name: float(group[name]) for name in ("lr", "eps", "weight_decay")}
            kept[used].fill([numbers], betas=group["betas"], step=key[2], grad_scale=1.0)
            self._of[key] = kept[used]
        return self._of[key]
