"""C++ kernels for the CPU, called through ctypes; signatures and meaning as in ``reference``.

Imports torch, ctypes and the shared library that ``setup.py`` builds from ``cpu.cpp``. The library
knows neither torch nor Python, so one build serves all of their versions. Pointers are taken from
the live tensors in every call: Megatron may move its buffers between steps.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_adam_mini.kernels.cpu_tiles import tiles
from megatron_adam_mini.kernels.scalars import StepScalars
from megatron_adam_mini.kernels.segments import SegmentTable

NAME = "cpu"

#: What cpu.cpp's adam_mini_abi returns.
_ABI = 2

#: Elements of one piece of work: enough to hide its overhead, few enough to share among threads.
_TILE_NUMEL = 65536

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int16: 3}
_LEVELS = ("baseline", "x86-64-v3 (AVX2)", "x86-64-v4 (AVX-512)")


class _Slice(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("param", "exp_avg", "weight", "grad")),
        *((f"{name}_kind", ctypes.c_int32) for name in ("param", "exp_avg", "weight", "grad")),
        ("origin", ctypes.c_void_p),
    )


class _Scalars(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("grad_scale", "bias", "hyper", "noise_key")),
        *((name, ctypes.c_float) for name in ("beta1", "rest1", "beta2", "rest2")),
    )


class _Blocks(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in ("exp_avg_sq", "step_size", "sum_sq", "inv_numel", "group")
    )


_POINTER, _INT64, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "block_sum_sq": (_POINTER, _POINTER, _INT, _POINTER, _INT64, _POINTER, _INT),
    "norm_partials": (_POINTER, _INT64, _POINTER, _POINTER, _INT64),
    "block_step_size": (_POINTER, _POINTER, _POINTER, _INT64, _INT),
    "update": (_POINTER, _POINTER, _INT64, _POINTER, _POINTER, _INT),
    "update_whole": (_POINTER, _POINTER, _INT64, _POINTER, _POINTER, _INT),
    "update_elementwise": (
        _POINTER, _POINTER, _POINTER, _INT64, _POINTER, _POINTER, _INT,
    ),
}  # fmt: skip


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """Load the shared library.

    Raises:
        ImportError: it was not built, or is of another version of the package.
    """
    found = sorted(Path(__file__).parent.glob("_cpu*.so"))
    if not found:
        raise ImportError(
            "the C++ kernels of megatron-adam-mini were not built (no C++ compiler was found when "
            "it was installed). Remedy: install g++ and run pip install again, with "
            "--no-binary megatron-adam-mini --force-reinstall."
        )
    try:
        loaded = ctypes.CDLL(str(found[0]))
    except OSError as error:
        raise ImportError(
            f"the C++ kernels of megatron-adam-mini cannot be loaded: {error}. Remedy: install "
            "what is missing (libgomp comes with gcc), or pip install again on this machine."
        ) from error
    if loaded.adam_mini_abi() != _ABI:
        raise ImportError(
            f"{found[0]} was built from another version of megatron-adam-mini (ABI "
            f"{loaded.adam_mini_abi()}, needed {_ABI}). Remedy: run pip install again."
        )
    for name, argtypes in _SIGNATURES.items():
        function = getattr(loaded, f"adam_mini_{name}")
        function.argtypes, function.restype = argtypes, None
    return loaded


def describe() -> str:
    """Return what the kernels run with: instruction set and threads."""
    threads = f"{torch.get_num_threads()} threads" if library().adam_mini_has_threads() else (
        "1 thread (built without OpenMP)"
    )  # fmt: skip
    return f"{_LEVELS[library().adam_mini_level()]}, {threads}"


class _Work:
    """Tiles of one table, and where the parts of long segments leave their sums."""

    def __init__(self, table: SegmentTable) -> None:
        split = tiles(table, _TILE_NUMEL, split=True)
        whole = tiles(table, _TILE_NUMEL, split=False)
        partials = np.zeros(int(split[:, -1].max(initial=-1)) + 1)
        self._kept = split, whole, partials
        #: Address and number of the tiles.
        self.split = split.ctypes.data, len(split)
        self.whole = whole.ctypes.data, len(whole)
        self.partials_at = partials.ctypes.data
        self.reach = int(table.end_S.max(initial=0))
        self.entries = int(table.indices.max(initial=-1)) + 1


def block_sum_sq_(sum_sq_B: Tensor, grad_L: Tensor, segments: SegmentTable) -> None:
    """See ``reference.block_sum_sq_``: squares in float32, added in float32 lanes, then float64."""
    work = segments.derived(_Work)
    library().adam_mini_block_sum_sq(
        _pointer(sum_sq_B, work.entries),
        _pointer(grad_L, work.reach),
        _KINDS[grad_L.dtype],
        *work.split,
        work.partials_at,
        torch.get_num_threads(),
    )


def norm_partials_(stats_D2: Tensor, sum_sq_B: Tensor, domain_B: Tensor) -> None:
    """See ``reference.norm_partials_``."""
    numel = len(sum_sq_B)
    library().adam_mini_norm_partials(
        _pointer(stats_D2, 2 * len(stats_D2)),
        len(stats_D2),
        _pointer(sum_sq_B, numel),
        _pointer(domain_B, numel),
        numel,
    )


def block_step_size_(
    exp_avg_sq_B: Tensor,
    step_size_B: Tensor,
    sum_sq_B: Tensor,
    *,
    inv_numel_B: Tensor,
    group_B: Tensor,
    scalars: StepScalars,
    index: Tensor | None = None,
) -> None:
    """See ``reference.block_step_size_``."""
    numel = len(exp_avg_sq_B)
    blocks = _blocks(exp_avg_sq_B, step_size_B, sum_sq_B, inv_numel_B, group_B, entries=numel)
    library().adam_mini_block_step_size(
        ctypes.byref(blocks),
        ctypes.byref(_scalars(scalars)),
        None if index is None else _pointer(index, len(index)),
        numel if index is None else len(index),
        torch.get_num_threads(),
    )


def update_(
    param_L: Tensor,
    exp_avg_L: Tensor,
    weight_L: Tensor | None,
    grad_L: Tensor,
    segments: SegmentTable,
    *,
    step_size_B: Tensor,
    group_B: Tensor,
    scalars: StepScalars,
    origin_B: Tensor | None = None,
) -> None:
    """See ``reference.update_``."""
    work = segments.derived(_Work)
    library().adam_mini_update(
        ctypes.byref(_slice(param_L, exp_avg_L, weight_L, grad_L, work, origin_B)),
        *work.split,
        ctypes.byref(_blocks(None, step_size_B, None, None, group_B, entries=work.entries)),
        ctypes.byref(_scalars(scalars)),
        torch.get_num_threads(),
    )


def update_whole_(
    param_L: Tensor,
    exp_avg_L: Tensor,
    weight_L: Tensor | None,
    grad_L: Tensor,
    segments: SegmentTable,
    *,
    exp_avg_sq_B: Tensor,
    step_size_B: Tensor,
    sum_sq_B: Tensor,
    inv_numel_B: Tensor,
    group_B: Tensor,
    scalars: StepScalars,
    origin_B: Tensor | None = None,
) -> None:
    """See ``reference.update_whole_``. One thread does all of a block."""
    work = segments.derived(_Work)
    blocks = _blocks(
        exp_avg_sq_B, step_size_B, sum_sq_B, inv_numel_B, group_B, entries=work.entries
    )
    library().adam_mini_update_whole(
        ctypes.byref(_slice(param_L, exp_avg_L, weight_L, grad_L, work, origin_B)),
        *work.whole,
        ctypes.byref(blocks),
        ctypes.byref(_scalars(scalars)),
        torch.get_num_threads(),
    )


def update_elementwise_(
    param_L: Tensor,
    exp_avg_L: Tensor,
    exp_avg_sq_E: Tensor,
    weight_L: Tensor | None,
    grad_L: Tensor,
    ranges: SegmentTable,
    *,
    group_B: Tensor,
    scalars: StepScalars,
    origin_B: Tensor | None = None,
) -> None:
    """See ``reference.update_elementwise_``."""
    work = ranges.derived(_Work)
    library().adam_mini_update_elementwise(
        ctypes.byref(_slice(param_L, exp_avg_L, weight_L, grad_L, work, origin_B)),
        _pointer(exp_avg_sq_E, ranges.numel),
        *work.split,
        _pointer(group_B, work.entries),
        ctypes.byref(_scalars(scalars)),
        torch.get_num_threads(),
    )


def _pointer(tensor: Tensor, numel: int) -> int:
    """Return the address of a tensor that must have at least ``numel`` adjacent elements."""
    if not tensor.is_cpu or not tensor.is_contiguous() or tensor.numel() < numel:
        raise ValueError(
            f"the C++ kernels got a tensor of shape {tuple(tensor.shape)} and strides "
            f"{tensor.stride()} on {tensor.device}; needed are {numel} adjacent elements on the "
            "CPU. Remedy: backend='auto' or 'triton' for tensors on a GPU."
        )
    return tensor.data_ptr()


def _slice(
    param_L: Tensor,
    exp_avg_L: Tensor,
    weight_L: Tensor | None,
    grad_L: Tensor,
    work: _Work,
    origin_B: Tensor | None,
) -> _Slice:
    reach = work.reach
    return _Slice(
        _pointer(param_L, reach),
        _pointer(exp_avg_L, reach),
        None if weight_L is None else _pointer(weight_L, reach),
        _pointer(grad_L, reach),
        _KINDS[param_L.dtype],
        _KINDS[exp_avg_L.dtype],
        -1 if weight_L is None else _KINDS[weight_L.dtype],
        _KINDS[grad_L.dtype],
        None if origin_B is None else _pointer(origin_B, work.entries),
    )


def _scalars(scalars: StepScalars) -> _Scalars:
    return _Scalars(
        scalars.grad_scale.data_ptr(),
        scalars.bias_corrections.data_ptr(),
        scalars.hyper_G3.data_ptr(),
        scalars.noise_key.data_ptr(),
        scalars.beta1,
        1 - scalars.beta1,
        scalars.beta2,
        1 - scalars.beta2,
    )


def _blocks(
    exp_avg_sq: Tensor | None,
    step_size: Tensor | None,
    sum_sq: Tensor | None,
    inv_numel: Tensor | None,
    group: Tensor | None,
    *,
    entries: int,
) -> _Blocks:
    vectors = (exp_avg_sq, step_size, sum_sq, inv_numel, group)
    return _Blocks(*(None if v is None else _pointer(v, entries) for v in vectors))
