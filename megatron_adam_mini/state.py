"""The optimizer state of one rank: what is allocated, and how large it is.

Imports torch. Everything is allocated at construction, on every rank alike, so
that memory does not grow at the first step and a checkpoint can be loaded before it.

Data flow: layout -> **SliceState** -> kernels (modified in place) -> checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Slice(Protocol):
    """The live tensors of one slice; they are asked for anew in each step.

    Megatron may move a buffer between steps (offloading), so the step does not keep what these
    return.
    """

    @property
    def grad(self) -> Tensor:
        """Reduced gradients of the slice, float32 or bfloat16, shape ``(L,)``."""
        ...

    @property
    def weight(self) -> Tensor:
        """Model weights of the slice, shape ``(L,)``; float32 weights are their own masters."""
        ...


@dataclass
class SliceState:
    """State that mirrors one slice: element ``i`` of every tensor belongs together.

    Attributes:
        main_param: float32 main parameters, shape ``(L,)``; the model weights themselves when
            ``owns_main_param`` is false.
        exp_avg: m, float32, shape ``(L,)``.
    """

    main_param: Tensor
    exp_avg: Tensor
    owns_main_param: bool

    @classmethod
    def allocate(cls, source: Slice) -> SliceState:
        """Allocate the state of a slice, main parameters copied from the model weights."""
        weight = source.weight
        owns = weight.dtype != torch.float32
        main_param = weight.detach().float() if owns else weight.detach()
        return cls(main_param, torch.zeros_like(main_param, dtype=torch.float32), owns)

    def bytes_by_kind(self) -> dict[str, int]:
        """Return allocated bytes of ``main_param`` and ``exp_avg``."""
        main_param = self.main_param.nbytes if self.owns_main_param else 0
        return {"main_param": main_param, "exp_avg": self.exp_avg.nbytes}
