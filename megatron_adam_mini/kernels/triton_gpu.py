"""The kernels on a GPU, in Triton; same functions as ``reference``, which specifies them.

Imports triton. Launches: one per buffer and function, and

* one more if segments do not start at a vector, which is rare: Megatron aligns parameters;
* ``segment_sum_sq_`` and ``update_in_one_pass_``: one per width of short rows (powers of two below
  2048; all longer rows have one width), and one that adds up the parts of segments above 16,384
  elements; ``update_in_one_pass_`` updates these in one more: their g is too large to keep;
* ``column_sum_sq_``: one more, which adds up partial sums;
* ``norm_partials_``: two; ``decide_``: one.

Nothing waits for the device. The first call for a table makes its launch tables and scratch,
later ones allocate nothing, and numbers that change from step to step are read on the device, so
that the same launches with the same arguments do another step (``tests/triton_replay.py``; never
captured in a CUDA graph). Only one stream at a time may use the scratch of a table.

Deterministic: no atomics; the order of additions depends on the table alone.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from megatron_adam_mini.kernels import reference, triton_column_kernels, triton_kernels
from megatron_adam_mini.kernels.arguments import BufferTensors, SegmentVectors
from megatron_adam_mini.kernels.column_tiles import RECTANGLE_FIELDS, Cut, rectangles, sums
from megatron_adam_mini.kernels.scalars import StepScalars
from megatron_adam_mini.kernels.tile_words import (
    COLUMN_WORDS,
    PACKED_WORDS,
    ROW_WORDS,
    WINDOW_WORDS,
    words,
)
from megatron_adam_mini.kernels.triton_tiles import (
    COLUMN_WINDOW_FIELDS,
    ROW_FIELDS,
    TILE_NUMEL,
    WINDOW_FIELDS,
    RowKind,
    by_vec,
    column_windows,
    is_long,
    parts,
    row_tiles,
    windows,
)
from megatron_adam_mini.plan.column_table import ColumnTable
from megatron_adam_mini.plan.ordered_sums import OrderedSums
from megatron_adam_mini.plan.partition import IntArray
from megatron_adam_mini.plan.segment_table import SegmentTable

NAME = "triton"

#: Eight warps: 8 elements per thread and stream, two 16-byte vectors of float32. No contraction
#: to fused multiply-add: results equal the reference bit for bit, and memory-bound kernels lose
#: nothing.
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
#: Entries per program, in kernels over vectors with one entry per segment.
ENTRIES = 256
NORM_ENTRIES = 2048
#: Parts of a long segment that are added at once.
PARTS = 1024
#: Columns side by side in a program, and elements that it adds up.
COLUMNS, COLUMN_NUMEL = 256, 32768
#: Rows of a table of sums per program, and sources of each that are added at once.
ROWS, SOURCES = 64, 16
#: Segments whose partial sums a program adds up, so many at once.
SEGMENTS, TERMS = 32, 32


def segment_sum_sq_(sum_sq_SR: Tensor, grad_N: Tensor, table: SegmentTable) -> None:
    """Write the sum of squares of each segment; see ``reference.segment_sum_sq_``.

    Squares are added in float32 within 16,384 elements, beyond that in float64.
    """
    if not len(table):
        return
    plan, vec = _plan_of(table, grad_N), _vec(grad_N)
    with _on(sum_sq_SR):
        _sum(plan, vec, sum_sq_SR, grad_N)
        owners, partials = plan.parts(vec)
        _launch(
            triton_kernels.combine_kernel, len(owners),
            sum_sq_SR, partials, owners, *[None] * 8, 0.0, 0.0, BLOCK=PARTS,
        )  # fmt: skip


def column_sum_sq_(sum_sq_SR: Tensor, grad_N: Tensor, table: ColumnTable) -> None:
    """Write the sum of squares of each column; see ``reference.column_sum_sq_``.

    Up to 200 squares of a column are added in float32, beyond that in float64.
    """
    if not len(table):
        return
    work = table.derived(_ColumnSums, _vec(grad_N), grad_N.device)
    with _on(sum_sq_SR):
        for vec, tiles in work.tiles:
            _launch(
                triton_column_kernels.column_sum_kernel, len(tiles),
                work.partials, _bits(grad_N), tiles,
                VEC=vec, COLUMNS=COLUMNS, LINES=TILE_NUMEL // COLUMNS,
            )  # fmt: skip
        _launch(
            triton_column_kernels.combine_columns_kernel, len(work.blocks),
            sum_sq_SR, work.partials, work.blocks, TERMS=TERMS, SEGMENTS=SEGMENTS,
        )  # fmt: skip


def ordered_sum_(values: Tensor, table: OrderedSums) -> None:
    """Add up positions of a vector; see ``reference.ordered_sum_``.

    In float64; the order depends on the number of sources alone.
    """
    if not len(table):
        return
    positions = table.derived(_sum_positions, values.device)
    with _on(values):
        _launch(
            triton_kernels.ordered_sum_kernel, -(-len(table) // ROWS),
            values, *positions, len(table), ROWS=ROWS, SOURCES=SOURCES,
        )  # fmt: skip


def norm_scratch(num_sums: int, num_domains: int, device: torch.device) -> Tensor | None:
    """Return partial sums of :func:`norm_partials_`; see ``reference.norm_scratch``."""
    programs = -(-num_sums // NORM_ENTRIES)
    return torch.zeros(programs, _norm_stride(num_domains), dtype=torch.float64, device=device)


def norm_partials_(
    stats_D2: Tensor, sum_sq_SR: Tensor, domain_SR: Tensor, scratch: Tensor | None = None
) -> None:
    """Add up the sums of squares that count in the norm; see ``reference.norm_partials_``."""
    domains = len(stats_D2)
    if not domains:
        return
    partials = scratch
    if partials is None:
        partials = norm_scratch(len(sum_sq_SR), domains, sum_sq_SR.device)
    assert partials is not None
    programs = len(partials)
    sizes = {"DOMAINS": domains, "STRIDE": _norm_stride(domains)}
    with _on(sum_sq_SR):
        _launch(
            triton_kernels.norm_kernel, programs,
            partials, sum_sq_SR, domain_SR, len(sum_sq_SR), BLOCK=NORM_ENTRIES, **sizes,
        )  # fmt: skip
        _launch(
            triton_kernels.combine_norm_kernel, 1,
            stats_D2, partials, programs, BLOCK=ENTRIES, **sizes,
        )  # fmt: skip


def decide_(
    values_3: Tensor,
    grad_scale: Tensor,
    stats_D2: Tensor,
    inv_scale: Tensor | None,
    *,
    clip_grad: float,
    skip_threshold: float,
    largest_sq: float,
) -> None:
    """Compute the factor of the gradients; see ``reference.decide_``."""
    with _on(stats_D2):
        _launch(
            triton_kernels.decide_kernel, 1,
            values_3, grad_scale, stats_D2, inv_scale, clip_grad, skip_threshold, largest_sq,
            reference.CLIP_EPS, DOMAINS=len(stats_D2),
        )  # fmt: skip


def segment_step_size_(
    vectors: SegmentVectors, scalars: StepScalars, index: Tensor | None = None
) -> None:
    """Advance v and write the step sizes; see ``reference.segment_step_size_``."""
    v_S, step_size_S, sum_sq_SR, inv_numel_S, group_SR, _, scale_S2 = vectors
    num = len(v_S) if index is None else len(index)
    with _on(sum_sq_SR):
        _launch(
            triton_kernels.step_size_kernel, -(-num // ENTRIES),
            v_S, step_size_S, scale_S2, sum_sq_SR, inv_numel_S, group_SR, index,
            scalars.hyper_G3, scalars.bias_corrections, scalars.grad_scale, num,
            scalars.beta2, 1 - scalars.beta2, BLOCK=ENTRIES,
        )  # fmt: skip


def update_(
    tensors: BufferTensors, table: SegmentTable, vectors: SegmentVectors, scalars: StepScalars
) -> None:
    """Update the elements of all segments; see ``reference.update_``."""
    if not len(table):
        return
    with _on(tensors.grad):
        _update(_plan_of(table, tensors.grad), tensors, vectors, scalars)


def update_columns_(
    tensors: BufferTensors, table: ColumnTable, vectors: SegmentVectors, scalars: StepScalars
) -> None:
    """Update the elements of runs of rows; see ``reference.update_columns_``."""
    if not len(table):
        return
    work = table.derived(_ColumnUpdates, _vec(*tensors), tensors.grad.device)
    with _on(tensors.grad):
        _update_windows(
            triton_column_kernels.update_columns_kernel, work.tiles, tensors, vectors, scalars
        )


def update_in_one_pass_(
    tensors: BufferTensors, table: SegmentTable, vectors: SegmentVectors, scalars: StepScalars
) -> None:
    """Do the whole step for segments of uncut blocks; see the reference.

    One pass over memory for segments of up to 16,384 elements; longer ones are summed first. If
    ``grad_scale`` is not finite, sums of parts stay in scratch, and nothing else is written.
    """
    if not len(table):
        return
    plan, decays = _plan_of(table, tensors.grad), _decays(scalars)
    vec = _vec(tensors.grad)
    v_S, step_size_S, sum_sq_SR, inv_numel_S, group_SR, origin_SR, scale_S2 = vectors
    per_segment = v_S, step_size_S, scale_S2, inv_numel_S, group_SR
    per_step = scalars.hyper_G3, scalars.bias_corrections, scalars.grad_scale
    with _on(tensors.grad):
        for kind, tiles in plan.short.rows(_vec(*tensors)):
            _launch(
                triton_kernels.update_rows_kernel, len(tiles),
                *map(_bits, tensors), tiles, sum_sq_SR, *per_segment, *per_step,
                origin_SR, scalars.noise_key, *decays,
                VEC=kind.vec, COLUMNS=kind.columns, ROWS=kind.rows,
                ONCE=kind.columns < TILE_NUMEL, STOCHASTIC=origin_SR is not None,
            )  # fmt: skip
        _sum(plan.long, vec, sum_sq_SR, tensors.grad)
        owners, partials = plan.long.parts(vec)
        _launch(
            triton_kernels.combine_kernel, len(owners),
            sum_sq_SR, partials, owners, *per_segment, *per_step, *decays[2:], BLOCK=PARTS,
        )  # fmt: skip
        _update(plan.long, tensors, vectors, scalars)


def update_elementwise_(
    tensors: BufferTensors,
    exp_avg_sq_E: Tensor,
    table: SegmentTable,
    vectors: SegmentVectors,
    scalars: StepScalars,
) -> None:
    """Update the elements that have their own second moments; see the reference."""
    if not len(table):
        return
    param, exp_avg, weight, grad = tensors
    streams = param, exp_avg, exp_avg_sq_E, weight, grad
    origin_SR = vectors.origin_SR
    with _on(grad):
        for vec, tiles in _plan_of(table, grad).windows(_vec(*streams), packed=True):
            _launch(
                triton_kernels.update_elementwise_kernel, len(tiles),
                *map(_bits, streams), tiles, vectors.group_SR,
                scalars.hyper_G3, scalars.bias_corrections, scalars.grad_scale,
                origin_SR, scalars.noise_key,
                *_decays(scalars), VEC=vec, TILE=TILE_NUMEL, STOCHASTIC=origin_SR is not None,
            )  # fmt: skip


class _Plan:
    """Launch tables and scratch of one table of segments, made on first use."""

    def __init__(self, segments: SegmentTable, device: torch.device) -> None:
        self.segments = segments
        self.device = device
        self._windows: dict[tuple[int, bool], list[tuple[int, Tensor]]] = {}
        self._rows: dict[int, list[tuple[RowKind, Tensor]]] = {}
        self._parts: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all tables and scratch made so far."""
        tables = [tiles for launches in self._windows.values() for _, tiles in launches]
        tables += [tiles for launches in self._rows.values() for _, tiles in launches]
        tables += [tensor for kept in self._parts.values() for tensor in kept]
        halves: list[_Plan] = [vars(self)[name] for name in ("short", "long") if name in vars(self)]
        return sum(tensor.nbytes for tensor in tables) + sum(half.nbytes for half in halves)

    @cached_property
    def short(self) -> _Plan:
        """Plan of the segments that are summed whole."""
        return _Plan(self.segments.subset(~is_long(self.segments)), self.device)

    @cached_property
    def long(self) -> _Plan:
        """Plan of the segments that are summed in parts."""
        return _Plan(self.segments.subset(is_long(self.segments)), self.device)

    def windows(self, vec: int, *, packed: bool = False) -> list[tuple[int, Tensor]]:
        """Return, for each launch, elements per access and windows."""
        if (vec, packed) not in self._windows:
            found = windows(self.segments, vec, packed=packed)
            layout = PACKED_WORDS if packed else WINDOW_WORDS
            self._windows[vec, packed] = [
                (size, self._to(words(tiles, WINDOW_FIELDS, layout)))
                for size, tiles in found.items()
            ]
        return self._windows[vec, packed]

    def rows(self, vec: int) -> list[tuple[RowKind, Tensor]]:
        """Return, for each launch, its kind of row tiles, and the tiles on the device."""
        if vec not in self._rows:
            found = row_tiles(self.segments, vec)
            self._rows[vec] = [
                (kind, self._to(words(tiles, ROW_FIELDS, ROW_WORDS))) for kind, tiles in found
            ]
        return self._rows[vec]

    def parts(self, vec: int) -> tuple[Tensor, Tensor]:
        """Return entry, first part and number of parts of long segments, and their scratch."""
        if vec not in self._parts:
            start, _, index_S, segment_T = parts(self.segments, vec)
            first_S = np.searchsorted(segment_T, np.arange(len(index_S)))
            count_S = np.bincount(segment_T, minlength=len(index_S))
            owners = self._to(np.stack([index_S, first_S, count_S], axis=1))
            self._parts[vec] = (
                owners,
                torch.zeros(len(start), dtype=torch.float32, device=self.device),
            )
        return self._parts[vec]

    def _to(self, table: IntArray) -> Tensor:
        return _on_device(table, self.device)


class _ColumnSums:
    """Launch tables and scratch of one table of columns, made on first use."""

    def __init__(self, table: ColumnTable, vec: int, device: torch.device) -> None:
        cut = Cut(columns=COLUMNS, numel=COLUMN_NUMEL, line=1024, multiple=vec)
        found, bounds = rectangles(table, cut)
        found = found[:, : RECTANGLE_FIELDS.index("partial") + 1]
        suits = (found[:, :3] % vec == 0).all(axis=1)  # start, stride and columns
        #: Elements per access and rectangles of each launch.
        self.tiles = [
            (size, _on_device(tiles, device)) for size, tiles in by_vec(found, suits, vec).items()
        ]
        self.blocks = _on_device(sums(table, bounds, SEGMENTS), device)
        self.partials = torch.zeros(int(bounds[-1]), dtype=torch.float32, device=device)
        tables = [tiles for _, tiles in self.tiles]
        self.nbytes = sum(tensor.nbytes for tensor in (*tables, self.blocks, self.partials))


class _ColumnUpdates:
    """Launch tables of one table of columns, for updates."""

    def __init__(self, table: ColumnTable, vec: int, device: torch.device) -> None:
        #: Elements per access and windows of each launch.
        self.tiles = [
            (size, _on_device(words(tiles, COLUMN_WINDOW_FIELDS, COLUMN_WORDS), device))
            for size, tiles in column_windows(table, vec).items()
        ]
        self.nbytes = sum(tiles.nbytes for _, tiles in self.tiles)


def _sum_positions(table: OrderedSums, device: torch.device) -> list[Tensor]:
    """Return targets, bounds and sources, int32."""
    found = (table.target, table.bounds, table.source)
    return [torch.from_numpy(positions.astype(np.int32)).to(device) for positions in found]


def _on_device(table: IntArray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(table)).to(device)


def _sum(plan: _Plan, vec: int, sum_sq_SR: Tensor, grad_N: Tensor) -> None:
    """Sum squares of whole segments into ``sum_sq_SR``, of parts into the plan's scratch."""
    _, partials = plan.parts(vec)
    for kind, tiles in plan.rows(vec):
        _launch(
            triton_kernels.sum_kernel, len(tiles),
            sum_sq_SR, partials, _bits(grad_N), tiles,
            VEC=kind.vec, COLUMNS=kind.columns, ROWS=kind.rows,
        )  # fmt: skip


def _update(
    plan: _Plan, tensors: BufferTensors, vectors: SegmentVectors, scalars: StepScalars
) -> None:
    """Update all segments."""
    launches = plan.windows(_vec(*tensors))
    _update_windows(triton_kernels.update_kernel, launches, tensors, vectors, scalars)


def _update_windows(
    kernel: Any,
    launches: list[tuple[int, Tensor]],
    tensors: BufferTensors,
    vectors: SegmentVectors,
    scalars: StepScalars,
) -> None:
    """Launch an update for windows, given elements per access and windows of each launch."""
    origin_SR = vectors.origin_SR
    for vec, tiles in launches:
        _launch(
            kernel, len(tiles),
            *map(_bits, tensors), tiles, vectors.step_size_S, vectors.exp_avg_scale_S2,
            vectors.group_SR,
            scalars.hyper_G3, scalars.grad_scale,
            origin_SR, scalars.noise_key,
            *_decays(scalars)[:2], VEC=vec, TILE=TILE_NUMEL, STOCHASTIC=origin_SR is not None,
        )  # fmt: skip


def _plan_of(table: SegmentTable, tensor: Tensor) -> _Plan:
    return table.derived(_Plan, tensor.device)


def _launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    if programs:
        kernel[(programs,)](*arguments, **constants, **OPTIONS)


def _vec(*streams: Tensor | None) -> int:
    """Return elements per access: 16 bytes of the widest stream; 1 if one is not aligned."""
    found = [stream for stream in streams if stream is not None]
    if any(stream.data_ptr() % 16 for stream in found):
        return 1
    return 16 // max(stream.element_size() for stream in found)


def _bits(stream: Tensor | None) -> Tensor | None:
    """Return a bfloat16 stream as int16; see ``triton_kernels``."""
    if stream is None or stream.dtype != torch.bfloat16:
        return stream
    return stream.view(torch.int16)


def _decays(scalars: StepScalars) -> tuple[float, float, float, float]:
    """Return the betas and their complements, computed in double as by the reference."""
    return scalars.beta1, 1 - scalars.beta1, scalars.beta2, 1 - scalars.beta2


def _norm_stride(num_domains: int) -> int:
    """Return a power of two above the number of domains."""
    return 1 << num_domains.bit_length()


def _on(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's GPU the current one, as Triton launches there."""
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    if isinstance(triton_kernels.sum_kernel, triton.JITFunction):
        raise ValueError(
            f"Adam-mini backend='triton' got tensors on {str(tensor.device)!r}; allowed: 'cuda'. "
            "Choose another backend, or set TRITON_INTERPRET=1 to interpret the kernels."
        )
    return nullcontext()
