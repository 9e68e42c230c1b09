"""C++ kernels for the CPU, called through ctypes; signatures and meaning as in ``reference``.

Imports torch, ctypes and the shared library that ``setup.py`` builds from ``cpu.cpp``. The library
depends on neither torch nor Python, so one build serves all of their versions. Pointers are taken
from the live tensors in every call: Megatron may move its buffers between steps.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_adam_mini.kernels.arguments import BufferTensors, SegmentVectors
from megatron_adam_mini.kernels.column_tiles import Cut, rectangles, sums
from megatron_adam_mini.kernels.cpu_tiles import TILE_FIELDS, tiles
from megatron_adam_mini.kernels.reference import decide_, norm_scratch
from megatron_adam_mini.kernels.scalars import StepScalars
from megatron_adam_mini.plan.column_table import ColumnTable
from megatron_adam_mini.plan.ordered_sums import OrderedSums
from megatron_adam_mini.plan.segment_table import SegmentTable

__all__ = ["decide_", "norm_scratch"]  # the reference's: next to nothing to compute

NAME = "cpu"

#: What cpu.cpp's adam_mini_abi returns.
_ABI = 7

#: Elements of one tile: enough to hide its overhead, few enough to balance threads.
_TILE_NUMEL = 65536
_PARTIAL = TILE_FIELDS.index("partial")

#: Rectangles of columns; larger ones where each makes partial sums. Columns: as MOST_COLUMNS.
_CUT = Cut(columns=2048, numel=_TILE_NUMEL, line=256)
_CUT_OF_SUMS = Cut(columns=2048, numel=4 * _TILE_NUMEL, line=256)
#: Segments whose partial sums are added at once: MOST_SEGMENTS.
_SEGMENTS = 64

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int16: 3, torch.uint8: 4}
_LEVELS = ("baseline", "x86-64-v3 (AVX2)", "x86-64-v4 (AVX-512)")


class _Buffer(ctypes.Structure):
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


class _Segments(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in ("exp_avg_sq", "step_size", "sum_sq", "inv_numel", "group", "exp_avg_scale")
    )


_POINTER, _INT64, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "segment_sum_sq": (_POINTER, _POINTER, _INT, _POINTER, _INT64, _POINTER, _INT),
    "column_sum_sq": (
        _POINTER, _POINTER, _INT, _POINTER, _INT64, _POINTER, _INT64, _POINTER, _INT,
    ),
    "ordered_sum": (_POINTER, _POINTER, _POINTER, _POINTER, _INT64, _INT),
    "norm_partials": (_POINTER, _INT64, _POINTER, _POINTER, _INT64),
    "segment_step_size": (_POINTER, _POINTER, _POINTER, _INT64, _INT),
    "update": (_POINTER, _POINTER, _INT64, _POINTER, _POINTER, _INT),
    "update_columns": (_POINTER, _POINTER, _INT64, _POINTER, _POINTER, _INT),
    "update_in_one_pass": (_POINTER, _POINTER, _INT64, _POINTER, _POINTER, _INT),
    "update_elementwise": (
        _POINTER, _POINTER, _POINTER, _INT64, _POINTER, _POINTER, _INT,
    ),
}  # fmt: skip


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """Load the shared library.

    Raises:
        ImportError: it was not built, or was built for another version of the package.
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
    """Return the instruction set and the number of threads that the kernels use."""
    threads = f"{torch.get_num_threads()} threads" if library().adam_mini_has_threads() else (
        "1 thread (built without OpenMP)"
    )  # fmt: skip
    return f"{_LEVELS[library().adam_mini_level()]}, {threads}"


class _Work:
    """Tiles of one table, and scratch for the sums of parts of long segments."""

    def __init__(self, table: SegmentTable) -> None:
        in_parts = tiles(table, _TILE_NUMEL, split=True)
        unsplit = tiles(table, _TILE_NUMEL, split=False)
        partials = np.zeros(int(in_parts[:, _PARTIAL].max(initial=-1)) + 1)
        self._kept = in_parts, unsplit, partials
        self.nbytes = sum(array.nbytes for array in self._kept)
        #: Address and number of the tiles, with long segments split into parts and not split.
        self.in_parts = in_parts.ctypes.data, len(in_parts)
        self.unsplit = unsplit.ctypes.data, len(unsplit)
        self.partials_at = partials.ctypes.data


class _ColumnSums:
    """Rectangles of one table of columns, and scratch for their sums."""

    def __init__(self, table: ColumnTable) -> None:
        found, bounds = rectangles(table, _CUT_OF_SUMS)
        blocks, partials = sums(table, bounds, _SEGMENTS), np.zeros(bounds[-1])
        self._kept = found, blocks, partials
        self.nbytes = sum(array.nbytes for array in self._kept)
        #: Address and number of the rectangles, and of what adds up their sums.
        self.rectangles = found.ctypes.data, len(found)
        self.sums = blocks.ctypes.data, len(blocks)
        self.partials_at = partials.ctypes.data


class _ColumnUpdates:
    """Rectangles of one table of columns, for updates."""

    def __init__(self, table: ColumnTable) -> None:
        self._kept, _ = rectangles(table, _CUT)
        self.rectangles = self._kept.ctypes.data, len(self._kept)
        self.nbytes = self._kept.nbytes


class _Sums:
    """Positions of one table of sums."""

    def __init__(self, table: OrderedSums) -> None:
        self._kept = [
            positions.astype(np.int32) for positions in (table.target, table.bounds, table.source)
        ]
        self.nbytes = sum(positions.nbytes for positions in self._kept)
        #: Addresses of targets, bounds and sources.
        self.addresses = [positions.ctypes.data for positions in self._kept]


def segment_sum_sq_(sum_sq_SR: Tensor, grad_N: Tensor, table: SegmentTable) -> None:
    """See ``reference.segment_sum_sq_``: squares and lanes in float32, then float64."""
    work = table.derived(_Work)
    library().adam_mini_segment_sum_sq(
        _pointer(sum_sq_SR, table.num_entries),
        _pointer(grad_N, table.reach),
        _KINDS[grad_N.dtype],
        *work.in_parts,
        work.partials_at,
        torch.get_num_threads(),
    )


def column_sum_sq_(sum_sq_SR: Tensor, grad_N: Tensor, table: ColumnTable) -> None:
    """See ``reference.column_sum_sq_``: up to 64 squares in float32, then float64."""
    work = table.derived(_ColumnSums)
    library().adam_mini_column_sum_sq(
        _pointer(sum_sq_SR, table.num_entries),
        _pointer(grad_N, table.reach),
        _KINDS[grad_N.dtype],
        *work.rectangles,
        *work.sums,
        work.partials_at,
        torch.get_num_threads(),
    )


def ordered_sum_(values: Tensor, table: OrderedSums) -> None:
    """See ``reference.ordered_sum_``; added in the same order."""
    library().adam_mini_ordered_sum(
        _pointer(values, table.num_values),
        *table.derived(_Sums).addresses,
        len(table),
        torch.get_num_threads(),
    )


def norm_partials_(
    stats_D2: Tensor, sum_sq_SR: Tensor, domain_SR: Tensor, scratch: Tensor | None = None
) -> None:
    """See ``reference.norm_partials_``."""
    del scratch
    numel = len(sum_sq_SR)
    library().adam_mini_norm_partials(
        _pointer(stats_D2, 2 * len(stats_D2)),
        len(stats_D2),
        _pointer(sum_sq_SR, numel),
        _pointer(domain_SR, numel),
        numel,
    )


def segment_step_size_(
    vectors: SegmentVectors, scalars: StepScalars, index: Tensor | None = None
) -> None:
    """See ``reference.segment_step_size_``."""
    numel = len(vectors.exp_avg_sq_S)
    library().adam_mini_segment_step_size(
        ctypes.byref(_segments(vectors, numel)),
        ctypes.byref(_scalars(scalars)),
        None if index is None else _pointer(index, len(index)),
        numel if index is None else len(index),
        torch.get_num_threads(),
    )


def update_(
    tensors: BufferTensors, table: SegmentTable, vectors: SegmentVectors, scalars: StepScalars
) -> None:
    """See ``reference.update_``."""
    library().adam_mini_update(
        ctypes.byref(_buffer(tensors, table, vectors)),
        *table.derived(_Work).in_parts,
        ctypes.byref(_segments(vectors, table.num_entries)),
        ctypes.byref(_scalars(scalars)),
        torch.get_num_threads(),
    )


def update_columns_(
    tensors: BufferTensors, table: ColumnTable, vectors: SegmentVectors, scalars: StepScalars
) -> None:
    """See ``reference.update_columns_``."""
    library().adam_mini_update_columns(
        ctypes.byref(_buffer(tensors, table, vectors)),
        *table.derived(_ColumnUpdates).rectangles,
        ctypes.byref(_segments(vectors, table.num_entries)),
        ctypes.byref(_scalars(scalars)),
        torch.get_num_threads(),
    )


def update_in_one_pass_(
    tensors: BufferTensors, table: SegmentTable, vectors: SegmentVectors, scalars: StepScalars
) -> None:
    """See ``reference.update_in_one_pass_``. One thread does all of a segment."""
    library().adam_mini_update_in_one_pass(
        ctypes.byref(_buffer(tensors, table, vectors)),
        *table.derived(_Work).unsplit,
        ctypes.byref(_segments(vectors, table.num_entries)),
        ctypes.byref(_scalars(scalars)),
        torch.get_num_threads(),
    )


def update_elementwise_(
    tensors: BufferTensors,
    exp_avg_sq_E: Tensor,
    table: SegmentTable,
    vectors: SegmentVectors,
    scalars: StepScalars,
) -> None:
    """See ``reference.update_elementwise_``."""
    library().adam_mini_update_elementwise(
        ctypes.byref(_buffer(tensors, table, vectors)),
        _pointer(exp_avg_sq_E, table.numel),
        *table.derived(_Work).in_parts,
        _pointer(vectors.group_SR, table.num_entries),
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


def _buffer(
    tensors: BufferTensors, table: SegmentTable | ColumnTable, vectors: SegmentVectors
) -> _Buffer:
    param, exp_avg, weight, grad = tensors
    origin = vectors.origin_SR
    return _Buffer(
        _pointer(param, table.reach if weight is None else table.state_reach),
        _pointer(exp_avg, table.state_reach),
        None if weight is None else _pointer(weight, table.reach),
        _pointer(grad, table.reach),
        _KINDS[param.dtype],
        _KINDS[exp_avg.dtype],
        -1 if weight is None else _KINDS[weight.dtype],
        _KINDS[grad.dtype],
        None if origin is None else _pointer(origin, table.num_entries),
    )


def _segments(vectors: SegmentVectors, num_entries: int) -> _Segments:
    scale = vectors.exp_avg_scale_S2
    return _Segments(
        *(_pointer(vector, num_entries) for vector in vectors[:5]),
        None if scale is None else _pointer(scale, 2 * num_entries),
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
