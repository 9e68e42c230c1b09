"""What a step launches, written down, so that it can be compared, and launched again.

As a CUDA graph does: the same functions with the same arguments, without the Python between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from megatron_adam_mini.decision import Decision
from megatron_adam_mini.exchange import alone
from megatron_adam_mini.kernels import triton_gpu, triton_launch
from megatron_adam_mini.optimizer import AdamMini

#: What reads the device's memory on the host.
READS = {"_local_scalar_dense", "is_nonzero", "equal"}


class Recording(TorchDispatchMode):
    """Launches of Triton and torch: done, and written down.

    Attributes:
        calls: of functions, with their arguments.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Sequence[Any], dict[str, Any]]] = []
        self._interpreting = False

    def launch(self, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        """Take the place of ``triton_gpu.launch``."""
        if programs:
            run, constants = kernel[(programs,)], constants | triton_launch.OPTIONS
            self._interpreting = True
            run(*arguments, **constants)
            self._interpreting = False
            self.calls.append((run, arguments, constants))

    def __torch_dispatch__(
        self, func: Any, _: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if self._interpreting or func.is_view or name == "detach":
            return result
        assert name not in READS, f"{name} reads on the host"
        if not any(t.numel() for t in tree_leaves(result) if isinstance(t, Tensor)):
            return result
        assert _memory(result) <= _memory([args, kwargs]), f"{name} allocates"
        self.calls.append((func, args, kwargs))
        return result

    def described(self) -> list[Any]:
        """Return all calls with addresses in the places of tensors."""

        def place(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return repr(value)
            return value.data_ptr(), tuple(value.shape), value.stride(), value.dtype

        return [
            (getattr(function, "__name__", repr(function)), *tree_map(place, (args, kwargs)))
            for function, args, kwargs in self.calls
        ]

    @torch.no_grad()
    def launch_again(self) -> None:
        """Do all calls with the same arguments."""
        for function, args, kwargs in self.calls:
            function(*args, **kwargs)


@torch.no_grad()
def record(optimizer: AdamMini, **options: Any) -> Recording:
    """Take a step without other ranks, and return what it launched; does not count the step."""
    recording = Recording()
    with alone(), patch.object(triton_gpu, "launch", recording.launch), recording:
        _launch(optimizer, **options)
    return recording


def _memory(found: Any) -> set[int]:
    """Return the addresses of the storages of all tensors."""
    tensors = [value for value in tree_leaves(found) if isinstance(value, Tensor)]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def _launch(optimizer: AdamMini, **options: Any) -> None:
    """Do what a step does before its decision is read."""
    if optimizer.config.single_phase:
        optimizer.sum_squares_of_cut_blocks()
        optimizer.update(Decision())
    else:
        optimizer.update(optimizer.decide(optimizer.sum_squares(), **options))
