"""The optimizer state of one rank: what is allocated, and how large it is.

Imports torch and ``rounding``. Everything is allocated at construction, on every rank
alike, so that memory does not grow at the first step and a checkpoint can be loaded before it.

Data flow: layout -> **SliceState** -> kernels (modified in place) -> checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_adam_mini.rounding import join, split, to_weight

#: Elements that are rounded at a time when state is loaded.
_STORE_NUMEL = 2**22


class Slice(Protocol):
    """The live tensors of one slice; they are asked for anew in each step.

    Megatron may move a buffer between steps (offloading), so the step does not keep what these
    return.
    """

    @property
    def grad(self) -> Tensor:
        """Reduced gradients of the slice, float32, bfloat16 or float16, shape ``(L,)``."""
        ...

    @property
    def weight(self) -> Tensor:
        """Model weights of the slice, shape ``(L,)``; float32 weights are their own masters."""
        ...


def check_remainders(dtypes: Iterable[torch.dtype]) -> None:
    """Check that remainders have bfloat16 weights to complete.

    Args:
        dtypes: of the weights; some may be float32, which are their own main parameters.

    Raises:
        ValueError: no weight is bfloat16, or one is float16.
    """
    found = set(dtypes)
    if torch.bfloat16 not in found or torch.float16 in found:
        raise ValueError(
            "Adam-mini param_remainders=True needs bfloat16 weights, got "
            f"{', '.join(sorted(map(str, found)))}: 16 bits complete a bfloat16 to a float32, and "
            "no other type. Remedy: --bf16, or drop --adam-mini-param-remainders."
        )


@dataclass
class SliceState:
    """State that mirrors one slice: element ``i`` of every tensor belongs together.

    Attributes:
        source: the slice.
        param: float32 main parameters, shape ``(L,)``; the model weights themselves when
            ``owns_main_param`` is false. Or int16: what bfloat16 weights lack of their float32 main
            parameters.
        exp_avg: m, float32 or bfloat16, shape ``(L,)``.
        owns_main_param: whether ``param`` is memory of the optimizer.
    """

    source: Slice
    param: Tensor
    exp_avg: Tensor
    owns_main_param: bool

    @classmethod
    def allocate(
        cls, source: Slice, *, exp_avg_dtype: torch.dtype, param_remainders: bool
    ) -> SliceState:
        """Allocate the state of a slice, main parameters copied from the model weights.

        Raises:
            ValueError: remainders were asked for weights that are neither bfloat16 nor float32.
        """
        weight = source.weight.detach()
        exp_avg = torch.zeros_like(weight, dtype=exp_avg_dtype)
        if weight.dtype == torch.float32:
            return cls(source, weight, exp_avg, owns_main_param=False)
        if not param_remainders:
            return cls(source, weight.float(), exp_avg, owns_main_param=True)
        check_remainders([weight.dtype])
        return cls(
            source, torch.zeros_like(weight, dtype=torch.int16), exp_avg, owns_main_param=True
        )

    @property
    def main_param(self) -> Tensor:
        """Main parameters, float32, shape ``(L,)``: the state itself, or made from remainders."""
        if self.param.dtype == torch.float32:
            return self.param
        return join(self.source.weight, self.param)

    def as_float32(self) -> dict[str, Tensor]:
        """Return ``param`` and ``exp_avg`` as float32: the state itself where it is stored so."""
        return {"param": self.main_param, "exp_avg": self.exp_avg.float()}

    def store(self, values: dict[str, Tensor]) -> None:
        """Take over what :meth:`as_float32` returned, after somebody wrote to it.

        Model weights follow the main parameters. Values that the state's type does not hold are
        rounded to the nearest.
        """
        if self.exp_avg.dtype != torch.float32:
            for begin in range(0, len(self.exp_avg), _STORE_NUMEL):
                part = slice(begin, begin + _STORE_NUMEL)
                self.exp_avg[part] = to_weight(values["exp_avg"][part], self.exp_avg.dtype)
        if not self.owns_main_param:
            return
        weight = self.source.weight
        # In parts: rounding takes several temporaries of the length of what it rounds.
        for begin in range(0, len(weight), _STORE_NUMEL):
            part = slice(begin, begin + _STORE_NUMEL)
            if self.param.dtype == torch.float32:
                weight[part] = to_weight(values["param"][part], weight.dtype)
            else:
                weight[part], self.param[part] = split(values["param"][part])

    def take_weights(self) -> None:
        """Set the main parameters to the model's weights, after somebody changed those."""
        if self.param.dtype == torch.int16:
            self.param.zero_()
        elif self.owns_main_param:
            self.param.copy_(self.source.weight)

    def bytes_by_kind(self) -> dict[str, int]:
        """Return allocated bytes of ``main_param`` and ``exp_avg``."""
        return {
            "main_param": self.param.nbytes if self.owns_main_param else 0,
            "exp_avg": self.exp_avg.nbytes,
        }
