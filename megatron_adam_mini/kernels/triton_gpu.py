"""The kernels on a GPU, in Triton; same functions as ``reference``, which specifies them.

Imports torch, and through the modules below triton. Data flow: tables of the plan -> launch tables
(``triton_launch_tables``) -> **launches** (``triton_launch``) -> kernels: ``triton_sum_kernels``,
``triton_decision_kernels``, ``triton_step_size_kernels``, ``triton_update_kernels``, and
``triton_column_kernels``. These share ``triton_addresses`` and ``triton_storage``.

Kernels compute what ``reference`` computes, in its order, operation by operation: they are launched
without contraction to fused multiply-add, divisions and square roots are correctly rounded, and
rounding to bfloat16 is integer arithmetic. So results equal the reference bit for bit, except for
sums of many elements, which are added in another (fixed) order.

Launches: one per buffer and function, and

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

from typing import Any

import torch
from torch import Tensor

from megatron_adam_mini.kernels import (
    reference,
    triton_column_kernels,
    triton_decision_kernels,
    triton_step_size_kernels,
    triton_sum_kernels,
    triton_update_kernels,
)
from megatron_adam_mini.kernels.arguments import BufferTensors, SegmentVectors
from megatron_adam_mini.kernels.scalars import StepScalars
from megatron_adam_mini.kernels.triton_launch import (
    as_bits,
    elements_per_access,
    launch,
    on_device_of,
)
from megatron_adam_mini.kernels.triton_launch_tables import (
    COLUMNS,
    SEGMENTS,
    ColumnSumLaunches,
    ColumnUpdateLaunches,
    SegmentLaunches,
    sum_positions,
)
from megatron_adam_mini.kernels.triton_tiles import TILE_NUMEL
from megatron_adam_mini.plan.column_table import ColumnTable
from megatron_adam_mini.plan.ordered_sums import OrderedSums
from megatron_adam_mini.plan.segment_table import SegmentTable

NAME = "triton"

#: Entries per program, in kernels over vectors with one entry per segment.
ENTRIES = 256
NORM_ENTRIES = 2048
#: Parts of a long segment that are added at once.
PARTS = 1024
#: Rows of a table of sums per program, and sources of each that are added at once.
ROWS, SOURCES = 64, 16
#: Partial sums of a column that are added at once.
TERMS = 32


def segment_sum_sq_(sum_sq_SR: Tensor, grad_N: Tensor, table: SegmentTable) -> None:
    """Write the sum of squares of each segment; see ``reference.segment_sum_sq_``.

    Squares are added in float32 within 16,384 elements, beyond that in float64.
    """
    if not len(table):
        return
    segments, vec = _launches_of(table, grad_N), elements_per_access(grad_N)
    with on_device_of(sum_sq_SR):
        _sum(segments, vec, sum_sq_SR, grad_N)
        owners, partials = segments.parts(vec)
        launch(
            triton_sum_kernels.combine_kernel, len(owners),
            sum_sq_SR, partials, owners, *[None] * 8, 0.0, 0.0, BLOCK=PARTS,
        )  # fmt: skip


def column_sum_sq_(sum_sq_SR: Tensor, grad_N: Tensor, table: ColumnTable) -> None:
    """Write the sum of squares of each column; see ``reference.column_sum_sq_``.

    Up to 200 squares of a column are added in float32, beyond that in float64.
    """
    if not len(table):
        return
    work = table.derived(ColumnSumLaunches, elements_per_access(grad_N), grad_N.device)
    with on_device_of(sum_sq_SR):
        for vec, tiles in work.tiles:
            launch(
                triton_column_kernels.column_sum_kernel, len(tiles),
                work.partials, as_bits(grad_N), tiles,
                VEC=vec, COLUMNS=COLUMNS, LINES=TILE_NUMEL // COLUMNS,
            )  # fmt: skip
        launch(
            triton_column_kernels.combine_columns_kernel, len(work.blocks),
            sum_sq_SR, work.partials, work.blocks, TERMS=TERMS, SEGMENTS=SEGMENTS,
        )  # fmt: skip


def ordered_sum_(values: Tensor, table: OrderedSums) -> None:
    """Add up positions of a vector; see ``reference.ordered_sum_``.

    In float64; the order depends on the number of sources alone.
    """
    if not len(table):
        return
    positions = table.derived(sum_positions, values.device)
    with on_device_of(values):
        launch(
            triton_sum_kernels.ordered_sum_kernel, -(-len(table) // ROWS),
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
    with on_device_of(sum_sq_SR):
        launch(
            triton_decision_kernels.norm_kernel, programs,
            partials, sum_sq_SR, domain_SR, len(sum_sq_SR), BLOCK=NORM_ENTRIES, **sizes,
        )  # fmt: skip
        launch(
            triton_decision_kernels.combine_norm_kernel, 1,
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
    with on_device_of(stats_D2):
        launch(
            triton_decision_kernels.decide_kernel, 1,
            values_3, grad_scale, stats_D2, inv_scale, clip_grad, skip_threshold, largest_sq,
            reference.CLIP_EPS, DOMAINS=len(stats_D2),
        )  # fmt: skip


def segment_step_size_(
    vectors: SegmentVectors, scalars: StepScalars, index: Tensor | None = None
) -> None:
    """Advance v and write the step sizes; see ``reference.segment_step_size_``."""
    v_S, step_size_S, sum_sq_SR, inv_numel_S, group_SR, _, scale_S2 = vectors
    num = len(v_S) if index is None else len(index)
    with on_device_of(sum_sq_SR):
        launch(
            triton_step_size_kernels.step_size_kernel, -(-num // ENTRIES),
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
    with on_device_of(tensors.grad):
        _update(_launches_of(table, tensors.grad), tensors, vectors, scalars)


def update_columns_(
    tensors: BufferTensors, table: ColumnTable, vectors: SegmentVectors, scalars: StepScalars
) -> None:
    """Update the elements of runs of rows; see ``reference.update_columns_``."""
    if not len(table):
        return
    work = table.derived(ColumnUpdateLaunches, elements_per_access(*tensors), tensors.grad.device)
    with on_device_of(tensors.grad):
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
    segments, decays = _launches_of(table, tensors.grad), _decays(scalars)
    vec = elements_per_access(tensors.grad)
    v_S, step_size_S, sum_sq_SR, inv_numel_S, group_SR, origin_SR, scale_S2 = vectors
    per_segment = v_S, step_size_S, scale_S2, inv_numel_S, group_SR
    per_step = scalars.hyper_G3, scalars.bias_corrections, scalars.grad_scale
    with on_device_of(tensors.grad):
        for kind, tiles in segments.short.rows(elements_per_access(*tensors)):
            launch(
                triton_update_kernels.update_rows_kernel, len(tiles),
                *map(as_bits, tensors), tiles, sum_sq_SR, *per_segment, *per_step,
                origin_SR, scalars.noise_key, *decays,
                VEC=kind.vec, COLUMNS=kind.columns, ROWS=kind.rows,
                ONCE=kind.columns < TILE_NUMEL, STOCHASTIC=origin_SR is not None,
            )  # fmt: skip
        _sum(segments.long, vec, sum_sq_SR, tensors.grad)
        owners, partials = segments.long.parts(vec)
        launch(
            triton_sum_kernels.combine_kernel, len(owners),
            sum_sq_SR, partials, owners, *per_segment, *per_step, *decays[2:], BLOCK=PARTS,
        )  # fmt: skip
        _update(segments.long, tensors, vectors, scalars)


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
    with on_device_of(grad):
        for vec, tiles in _launches_of(table, grad).windows(
            elements_per_access(*streams), packed=True
        ):
            launch(
                triton_update_kernels.update_elementwise_kernel, len(tiles),
                *map(as_bits, streams), tiles, vectors.group_SR,
                scalars.hyper_G3, scalars.bias_corrections, scalars.grad_scale,
                origin_SR, scalars.noise_key,
                *_decays(scalars), VEC=vec, TILE=TILE_NUMEL, STOCHASTIC=origin_SR is not None,
            )  # fmt: skip


def _sum(segments: SegmentLaunches, vec: int, sum_sq_SR: Tensor, grad_N: Tensor) -> None:
    """Sum squares of whole segments into ``sum_sq_SR``, of parts into scratch."""
    _, partials = segments.parts(vec)
    for kind, tiles in segments.rows(vec):
        launch(
            triton_sum_kernels.sum_kernel, len(tiles),
            sum_sq_SR, partials, as_bits(grad_N), tiles,
            VEC=kind.vec, COLUMNS=kind.columns, ROWS=kind.rows,
        )  # fmt: skip


def _update(
    segments: SegmentLaunches, tensors: BufferTensors, vectors: SegmentVectors, scalars: StepScalars
) -> None:
    """Update all segments."""
    launches = segments.windows(elements_per_access(*tensors))
    _update_windows(triton_update_kernels.update_kernel, launches, tensors, vectors, scalars)


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
        launch(
            kernel, len(tiles),
            *map(as_bits, tensors), tiles, vectors.step_size_S, vectors.exp_avg_scale_S2,
            vectors.group_SR,
            scalars.hyper_G3, scalars.grad_scale,
            origin_SR, scalars.noise_key,
            *_decays(scalars)[:2], VEC=vec, TILE=TILE_NUMEL, STOCHASTIC=origin_SR is not None,
        )  # fmt: skip


def _launches_of(table: SegmentTable, tensor: Tensor) -> SegmentLaunches:
    return table.derived(SegmentLaunches, tensor.device)


def _decays(scalars: StepScalars) -> tuple[float, float, float, float]:
    """Return the betas and their complements, computed in double as by the reference."""
    return scalars.beta1, 1 - scalars.beta1, scalars.beta2, 1 - scalars.beta2


def _norm_stride(num_domains: int) -> int:
    """Return a power of two above the number of domains."""
    return 1 << num_domains.bit_length()
