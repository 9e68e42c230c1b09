"""Redirection of tensors: those requested on a CUDA device are made, or stay, in CPU memory.

Also returns a tensor's type under its CUDA name, which Megatron's optimizers compare as text.
Imports torch only.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["install"]

_CPU = torch.device("cpu")


def _is_cuda(device: object) -> bool:
    # A bare integer is the index of an accelerator in every torch function that takes a device.
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device == "cuda" or device.startswith("cuda:")
    return isinstance(device, int) and not isinstance(device, bool)


def _to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if args and _is_cuda(args[0]):
        args = (_CPU, *args[1:])
    return tensor.to(*args, **kwargs)


def _cuda(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return tensor


def _type(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if not args and not kwargs:
        return str(tensor.type()).replace("torch.", "torch.cuda.", 1)
    if args and isinstance(args[0], str):
        args = (args[0].replace("torch.cuda.", "torch.", 1), *args[1:])
    return tensor.type(*args, **kwargs)


def _pin_memory(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Return a copy, as CUDA does; only a GPU could tell that its memory is not pinned."""
    return tensor.clone()


def _record_stream(tensor: torch.Tensor, *_: Any) -> None:
    """Return at once: memory is never reused while an operation on it is under way."""


_TENSOR_METHODS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.Tensor.to: _to,
    torch.Tensor.cuda: _cuda,
    torch.Tensor.type: _type,
    torch.Tensor.pin_memory: _pin_memory,
}


class _CpuTensors(TorchFunctionMode):
    """While active, replaces every CUDA device in arguments of torch functions by the CPU.

    It also asks for no pinned memory, which only CUDA can give. No other argument and no result is
    changed, so computations stay the same.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call ``func`` with CPU in place of CUDA devices, in memory that is not pinned."""
        method = _TENSOR_METHODS.get(func)
        if method is not None:
            func = method
        if kwargs is None:
            return func(*args)
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": _CPU}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)


def install() -> None:
    """Redirect tensors in the calling thread, for the life of the process."""
    # Not by the mode: torch checks the type of the stream before it calls the mode.
    torch.Tensor.record_stream = _record_stream  # type: ignore[assignment]
    # A mode is not active within the functions that it intercepts. torch.autograd.backward is one,
    # and it runs Megatron's own backward passes.
    run_backward = torch.autograd._engine_run_backward  # type: ignore[attr-defined]

    @functools.wraps(run_backward)
    def run_redirected_backward(*args: Any, **kwargs: Any) -> Any:
        with _CpuTensors():
            return run_backward(*args, **kwargs)

    torch.autograd._engine_run_backward = run_redirected_backward  # type: ignore[attr-defined]
    # Never left: partial redirection would be useless.
    _CpuTensors().__enter__()  # type: ignore[no-untyped-call]
