"""Mend gloo's coalesced all-gather, which returns wrong values for tensors of several dtypes.

Imports torch. Megatron gathers the weights of all buckets at once if parameter gathers do not
overlap the forward pass. If a bfloat16 tensor comes before a float32 one, gloo (torch 2.14) takes
all of them for bfloat16, and raises nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed

#: Names of the method in releases of torch.
_NAMES = ("all_gather_single_coalesced", "allgather_into_tensor_coalesced")


def install() -> None:
    """Let coalesced all-gathers be one for each dtype."""
    for name in _NAMES:
        original = getattr(distributed.ProcessGroup, name, None)
        if original is not None:
            setattr(distributed.ProcessGroup, name, _by_dtype(original))


def _by_dtype(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def gather(group: Any, outputs: list[Tensor], inputs: list[Tensor], *rest: Any) -> Any:
        numbers: dict[torch.dtype, list[int]] = {}
        for number, tensor in enumerate(inputs):
            numbers.setdefault(tensor.dtype, []).append(number)
        last: Any = None
        for of_dtype in numbers.values():
            if last is not None:
                last.wait()  # gloo works on several at once, and the last one stands for all
            last = original(
                group, [outputs[i] for i in of_dtype], [inputs[i] for i in of_dtype], *rest
            )
        return last

    return gather
