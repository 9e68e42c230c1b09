"""Replacements of ``torch.cuda`` functions on a host where every tensor is in CPU memory.

Megatron-Core calls ``torch.cuda`` for streams, events, random state and memory numbers. Functions
that have a correct result on a CPU return it (a CPU operation is complete when its call returns, so
a stream is always idle and every event has passed). Every other public function of ``torch.cuda``
raises an error with its own name: an unexpected call must not return a result that merely looks
right.

Imports torch only. ``install`` is called once, by ``enable``.
"""

import contextlib
import functools
import inspect
import os
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from megatron_adam_mini.cpu_host import streams

__all__ = ["install"]

_CPU = torch.device("cpu")


class _DeviceContext:
    """``with torch.cuda.device(i)``: there is one device, so entering it changes nothing."""

    def __init__(self, device: Any = None) -> None:
        del device

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


@dataclass(frozen=True)
class _DeviceProperties:
    """What ``get_device_properties`` returns: this machine's memory and cores."""

    name: str
    major: int
    minor: int
    total_memory: int
    multi_processor_count: int


class _DefaultGenerators(Sequence[torch.Generator]):
    """Generators of the one device: that of CPU operations."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: Any) -> Any:
        if index not in (0, -1, _CPU):  # the last is what current_device() returns
            raise IndexError(
                f"the CPU host has one device; there is no generator for device {index!r}"
            )
        return torch.default_generator


# Megatron only compares the compute capability with thresholds, to refuse bf16 below 8 and to
# choose kernels for 10 and above. Ampere's allows bf16 and selects none of the special kernels.
_CAPABILITY = (8, 0)
_NAME = "CPU host"


def _nothing(*_: Any, **__: Any) -> None:
    """Do nothing: for calls that have no effect when every operation is synchronous."""


def _total_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _peak_memory(device: Any = None) -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _memory(device: Any = None) -> int:
    try:
        with open("/proc/self/statm", encoding="ascii") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:  # no procfs: the peak is the closest number available
        return _peak_memory()


def _memory_stats(device: Any = None) -> dict[str, int]:
    current, peak = _memory(), _peak_memory()
    return {
        "allocated_bytes.all.current": current,
        "allocated_bytes.all.peak": peak,
        "reserved_bytes.all.current": current,
        "reserved_bytes.all.peak": peak,
        "allocation.all.current": 0,  # malloc does not count
    }


def _call_now(function: Callable[[], object], **_: Any) -> None:
    function()


def _set_rng_state(new_state: torch.Tensor, device: Any = "cuda") -> None:
    torch.default_generator.set_state(new_state)


def _set_rng_state_all(new_states: Sequence[torch.Tensor]) -> None:
    (new_state,) = new_states
    torch.default_generator.set_state(new_state)


def _manual_seed(seed: int) -> None:
    # Not torch.manual_seed, which itself calls torch.cuda.manual_seed_all.
    torch.default_generator.manual_seed(int(seed))


def _seed() -> None:
    torch.default_generator.seed()


_ANSWERS: dict[str, Any] = {
    # Devices: one, which is this machine.
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "init": _nothing,
    "_lazy_init": _nothing,
    "_lazy_call": _call_now,
    "device_count": lambda: 1,
    # Not the index 0: torch redirects nothing in a backward pass, and Megatron allocates there.
    "current_device": lambda: _CPU,
    "set_device": _nothing,
    "device": _DeviceContext,
    "device_of": _DeviceContext,
    "get_device_name": lambda device=None: _NAME,
    "get_device_capability": lambda device=None: _CAPABILITY,
    "get_device_properties": lambda device=None: _DeviceProperties(
        _NAME, *_CAPABILITY, total_memory=_total_memory(), multi_processor_count=os.cpu_count() or 1
    ),
    "is_bf16_supported": lambda including_emulation=True: True,
    "is_tf32_supported": lambda: False,
    # Streams: always empty.
    "Stream": streams.Stream,
    "Event": streams.Event,
    "stream": streams.use_stream,
    "current_stream": streams.current_stream,
    "default_stream": streams.default_stream,
    "set_stream": streams.set_stream,
    "synchronize": _nothing,
    "is_current_stream_capturing": lambda: False,
    # Random numbers: CPU operations draw from torch.default_generator.
    "default_generators": _DefaultGenerators(),
    "get_rng_state": lambda device="cuda": torch.default_generator.get_state(),
    "get_rng_state_all": lambda: [torch.default_generator.get_state()],
    "set_rng_state": _set_rng_state,
    "set_rng_state_all": _set_rng_state_all,
    "manual_seed": _manual_seed,
    "manual_seed_all": _manual_seed,
    "seed": _seed,
    "seed_all": _seed,
    "initial_seed": lambda: torch.default_generator.initial_seed(),
    # Memory: the process's own.
    "empty_cache": _nothing,
    "ipc_collect": _nothing,
    "memory_allocated": _memory,
    "memory_reserved": _memory,
    "max_memory_allocated": _peak_memory,
    "max_memory_reserved": _peak_memory,
    "device_memory_used": _memory,
    "memory_stats": _memory_stats,
}
"""Replacements by their names in ``torch.cuda`` or one of its submodules."""

_NVTX_ANSWERS: dict[str, Any] = {
    # Marks for a CUDA profiler, which cannot be attached here.
    "mark": _nothing,
    "range": lambda *_, **__: contextlib.nullcontext(),
    "range_push": _nothing,
    "range_pop": _nothing,
    "range_start": _nothing,
    "range_end": _nothing,
}

_REFUSED_CLASSES = frozenset(
    {
        "CUDAGraph",
        "CUDAPluggableAllocator",
        "ExternalStream",
        "GreenContext",
        "MemPool",
        "StreamContext",
        "graph",
    }
)
"""Classes for features that only a GPU has. (Exceptions and tensor types are kept.)"""


def _answer(original: Callable[..., Any], answer: Callable[..., Any]) -> Callable[..., Any]:
    # A separate function for every name: torch._dynamo, which torch.optim imports, lists these
    # functions by identity.
    @functools.wraps(original)
    def give_answer(*args: Any, **kwargs: Any) -> Any:
        return answer(*args, **kwargs)

    return give_answer


def _refusal(name: str, original: Callable[..., Any]) -> Callable[..., NoReturn]:
    @functools.wraps(original)
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(
            f"{name} has no answer on the CPU host; "
            "switch off the feature that calls it (the traceback shows which), or run on a GPU"
        )

    return refuse


def _refused_class(name: str, original: type) -> type:
    return type(
        original.__name__,
        (),
        {"__new__": _refusal(name, original.__new__), "__doc__": original.__doc__},
    )


def _replacement(name: str, original: Any, answers: dict[str, Any]) -> Any:
    """Return the replacement of ``original``, which may be ``original`` itself."""
    qualified_name = f"torch.cuda.{name}"
    if name in answers:
        return _answer(original, answers[name]) if inspect.isfunction(original) else answers[name]
    defined_in = str(getattr(original, "__module__", ""))
    if name.startswith("_") or not defined_in.startswith("torch.cuda"):
        return original  # internals of torch, and imports of its modules
    if name in _REFUSED_CLASSES:
        return _refused_class(qualified_name, original)
    return _refusal(qualified_name, original) if inspect.isfunction(original) else original


def install() -> None:
    """Replace the public functions of ``torch.cuda`` (in place)."""
    cuda = torch.cuda
    replaced: dict[Any, Any] = {}
    for module, answers in (
        (cuda, _ANSWERS),
        (cuda.memory, _ANSWERS),
        (cuda.random, _ANSWERS),
        (cuda.streams, _ANSWERS),
        (cuda.graphs, _ANSWERS),
        (cuda.nvtx, _NVTX_ANSWERS),
    ):
        for name, original in list(vars(module).items()):
            if not callable(original) and name not in answers:
                continue
            # A name of torch.cuda is one object in the submodule that defines it, and must stay so.
            if original not in replaced:
                replaced[original] = _replacement(name, original, answers)
            setattr(module, name, replaced[original])
    # Data loaders call it to find out whether pinned memory is useful.
    torch.accelerator.is_available = lambda: False
