"""Plain-torch kernels: the specification against which the fast ones are tested.

Every function modifies its first arguments in place. As a specification, they are not economical:
temporaries take up to 16 bytes per element of the largest run of equal segments, usually one
parameter's rows in the slice; and they read ``grad_scale`` on the host.

Tensors and their storage: see ``arguments``. Shape suffixes: see the docstring of ``plan``.

Source: Zhang et al., arXiv:2406.16793, Algorithm 2 (``mean(g * g)`` per block), with AdamW's
decoupled decay, Loshchilov and Hutter, arXiv:1711.05101.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megatron_adam_mini.kernels.arguments import BufferTensors, SegmentVectors
from megatron_adam_mini.kernels.scalars import StepScalars
from megatron_adam_mini.plan.column_table import ColumnTable
from megatron_adam_mini.plan.ordered_sums import OrderedSums
from megatron_adam_mini.plan.segment_table import Run, SegmentTable
from megatron_adam_mini.rounding import (
    fp8_scale,
    from_fp8,
    join,
    noise16,
    split,
    to_bfloat16_stochastic,
    to_fp8_stochastic,
    to_weight,
)

NAME = "reference"

#: As in megatron.core.optimizer.clip_grads.clip_grad_by_total_norm_fp32.
CLIP_EPS = 1.0e-6


def segment_sum_sq_(sum_sq_SR: Tensor, grad_N: Tensor, table: SegmentTable) -> None:
    """Write the sum of squares of each segment: ``sum_sq[s] = sum(g * g)``.

    Args:
        sum_sq_SR: float32, the table's entries are overwritten.
        grad_N: gradients of the buffer; squared and added in at least float32 (here: squared in
            float32, added in float64).
        table: segments, or element ranges.
    """
    for run in table.runs:
        rows = _rows(grad_N[run.in_buffer], run).float()
        sum_sq_SR[run.entries] = (rows * rows).double().sum(dim=1)


def column_sum_sq_(sum_sq_SR: Tensor, grad_N: Tensor, table: ColumnTable) -> None:
    """Write the sum of squares of each segment of runs of rows.

    Args:
        sum_sq_SR: float32, the table's entries are overwritten.
        grad_N: gradients of the buffer; squared and added as by :func:`segment_sum_sq_`.
        table: runs; none is a part of a longer one (``skip`` is 0).
    """
    for run in range(len(table)):
        entries, in_buffer, _ = _column_run(table, run)
        first, count = int(table.index_C[run]), int(table.counts[run])
        grad = grad_N[in_buffer].float()
        total = torch.zeros(count, dtype=torch.float64, device=grad.device)
        total.index_add_(0, entries.to(grad.device) - first, (grad * grad).double())
        sum_sq_SR[first : first + count] = total


def ordered_sum_(values: Tensor, table: OrderedSums) -> None:
    """Add up positions of a vector: ``values[target] = values[source] + values[source] + ...``.

    Each row of the table is added from left to right in float64, and rounded once, so the same
    numbers give the same bits on every rank and device, wherever the row stands. (A backend may add
    in another order, if it is the same for all rows with as many sources.)

    Args:
        values: float32, modified in place.
        table: no position is both read and written.
    """
    target, bounds, source = (
        torch.from_numpy(positions).to(values.device)
        for positions in (table.target, table.bounds, table.source)
    )
    total = torch.zeros(len(table), dtype=torch.float64, device=values.device)
    for number in range(int(table.counts.max(initial=0))):
        rows = (bounds[:-1] + number < bounds[1:]).nonzero().flatten()
        total[rows] += values[source[bounds[rows] + number]]
    values[target] = total.float()


def norm_scratch(num_sums: int, num_domains: int, device: torch.device) -> Tensor | None:
    """Return what :func:`norm_partials_` needs beside its arguments, which is nothing here.

    Args:
        num_sums: length of ``sum_sq_SR``.
        num_domains: length of ``stats_D2``.
        device: of both.
    """
    del num_sums, num_domains, device
    return None


def norm_partials_(
    stats_D2: Tensor, sum_sq_SR: Tensor, domain_SR: Tensor, scratch: Tensor | None = None
) -> None:
    """Add up the sums of squares that count in the gradient norm, and count non-finite ones.

    Args:
        stats_D2: float64, overwritten: ``[sum of the sums, 0]`` per domain; ``stats[0, 1]`` is the
            number of all non-finite sums, whether or not they count in the norm.
        sum_sq_SR: float32; here also float64, for ``wide_sums``.
        domain_SR: int8, the domain whose norm includes the sum, -1 for none.
        scratch: what :func:`norm_scratch` returned, for one call at a time; ``None``: the call
            allocates its own.
    """
    del scratch
    stats_D2.zero_()
    for domain in range(len(stats_D2)):
        stats_D2[domain, 0] = sum_sq_SR[domain_SR == domain].double().sum()
    stats_D2[:1, 1] = (~torch.isfinite(sum_sq_SR)).sum()


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
    """Compute the factor of the gradients, and whether the step is taken, in float64.

    Args:
        values_3: float64, overwritten: the factor (NaN: the step is skipped), the squared norm
            without the loss scale, and 1 if a gradient is not finite, else 0.
        grad_scale: float32 scalar, overwritten: the factor once more, for kernels.
        stats_D2: float64, ``[squared norm, number of non-finite sums]`` of each domain.
        inv_scale: inverse of the loss scale, one float32 number; ``None``: 1.
        clip_grad: largest norm; infinity: no clipping.
        skip_threshold: steps with a larger norm are skipped.
        largest_sq: a larger squared norm, loss scale included, counts as not finite.
    """
    scaled_sq, num_non_finite = stats_D2.sum(dim=0)
    # grad_scale <- 1 / loss_scale
    scale = torch.ones_like(scaled_sq)
    if inv_scale is not None:
        scale *= inv_scale.squeeze()
    # |g| <- sqrt(norm^2 / loss_scale^2)
    norm_sq = scaled_sq * scale**2
    grad_norm = norm_sq.sqrt()
    # grad_scale <- grad_scale * min(1, clip_grad / |g|)
    scale = scale * ((grad_norm + CLIP_EPS).reciprocal() * clip_grad).clamp(max=1.0)
    found_inf = (num_non_finite > 0) | ~(scaled_sq <= largest_sq)
    scale = scale.masked_fill(found_inf | (grad_norm > skip_threshold), math.nan)
    torch.stack([scale, norm_sq, found_inf.double()], out=values_3)
    # Not above the float32 number 1 / loss_scale, so finite here if it is finite in float64: steps
    # that kernels skip are not counted.
    grad_scale.copy_(scale)


def segment_step_size_(
    vectors: SegmentVectors, scalars: StepScalars, index: Tensor | None = None
) -> None:
    """Advance v of every segment's block, and compute the step size of its elements.

    ``v <- beta2 v + (1 - beta2) grad_scale^2 sum_sq / numel``,
    ``step_size = lr / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)``.

    Args:
        vectors: ``exp_avg_sq_S``, ``step_size_S`` and ``exp_avg_scale_S2`` are modified in place;
            ``sum_sq_SR`` holds complete sums of squares of the gradients as they are in the buffer.
        scalars: numbers of this step.
        index: int64, entries to update; default all segments.
    """
    if not scalars.grad_scale.isfinite():
        return
    at = slice(len(vectors.exp_avg_sq_S)) if index is None else index
    lr, eps, _ = scalars.hyper_G3[vectors.group_SR[at].long()].unbind(dim=1)
    correction1, correction2 = scalars.bias_corrections
    mean_sq = vectors.sum_sq_SR[at] * vectors.inv_numel_S[at] * scalars.grad_scale.square()
    before = vectors.exp_avg_sq_S[at]
    v = before * scalars.beta2 + mean_sq * (1 - scalars.beta2)
    if vectors.exp_avg_scale_S2 is not None:
        vectors.exp_avg_scale_S2[at] = torch.stack([fp8_scale(before), fp8_scale(v)], dim=1)
    vectors.exp_avg_sq_S[at] = v
    vectors.step_size_S[at] = lr / correction1 / ((v / correction2).sqrt() + eps)


def update_(
    tensors: BufferTensors, table: SegmentTable, vectors: SegmentVectors, scalars: StepScalars
) -> None:
    """Update the elements of all segments.

    ``m <- beta1 m + (1 - beta1) grad_scale g``, ``p <- decay p - step_size m``, ``weight <- p``.
    The step uses m before it is rounded.

    Args:
        tensors: ``param``, ``exp_avg`` and ``weight`` are modified in place.
        table: segments; elements outside of them are not touched.
        vectors: ``step_size_S``, ``group_SR``, ``origin_SR`` and ``exp_avg_scale_S2`` are read.
        scalars: numbers of this step.
    """
    if not scalars.grad_scale.isfinite():
        return
    decay_SR = scalars.hyper_G3[:, 2][vectors.group_SR.long()]
    for run in table.runs:
        before, after = _scales(vectors, (run.entries, None))
        m = _advanced_m(tensors, run, scalars, before)
        p = _main_param(tensors, run)
        p = p * decay_SR[run.entries, None] - m * vectors.step_size_S[run.entries, None]
        _store(tensors, run, p, m, _noise(vectors, run, scalars), after)


def update_columns_(
    tensors: BufferTensors, table: ColumnTable, vectors: SegmentVectors, scalars: StepScalars
) -> None:
    """Update the elements of runs of rows, each with the step size of its column.

    Args: as of :func:`update_`.
    """
    if not scalars.grad_scale.isfinite():
        return
    decay_SR = scalars.hyper_G3[:, 2][vectors.group_SR.long()]
    for number in range(len(table)):
        entries, in_buffer, row = _column_run(table, number)
        entries, row = entries.to(decay_SR.device), row.to(decay_SR.device)
        run = Run(0, 1, in_buffer.start, len(entries), int(table.shift_C[number]))
        before, after = _scales(vectors, (entries,))
        m = _advanced_m(tensors, run, scalars, before)
        p = _main_param(tensors, run) * decay_SR[entries] - m * vectors.step_size_S[entries]
        noise = None
        if vectors.origin_SR is not None:
            numbers = vectors.origin_SR[entries].long() + row * int(table.row_stride_C[number])
            noise = noise16(numbers, scalars.noise_key)
        _store(tensors, run, p, m, noise, after)


def update_in_one_pass_(
    tensors: BufferTensors, table: SegmentTable, vectors: SegmentVectors, scalars: StepScalars
) -> None:
    """Do the whole step for segments of uncut blocks, in one pass over memory.

    The three kernels above in one, for steps in which nothing needs the gradient norm first.
    ``sum_sq_SR`` and ``step_size_S`` are written as by these kernels, so the norm is known
    afterwards. Non-finite gradients enter v, m and p, as they do without a norm.

    Args: as above.
    """
    if not scalars.grad_scale.isfinite():
        return
    segment_sum_sq_(vectors.sum_sq_SR, tensors.grad, table)
    index = torch.from_numpy(table.indices).to(vectors.sum_sq_SR.device)
    segment_step_size_(vectors, scalars, index)
    update_(tensors, table, vectors, scalars)


def update_elementwise_(
    tensors: BufferTensors,
    exp_avg_sq_E: Tensor,
    table: SegmentTable,
    vectors: SegmentVectors,
    scalars: StepScalars,
) -> None:
    """Update the elements that have their own second moments: AdamW.

    Args:
        tensors: as for :func:`update_`.
        exp_avg_sq_E: v of the elements of all ranges of the table, one range after the other,
            float32, modified in place.
        table: element ranges.
        vectors: ``group_SR`` and ``origin_SR`` are read.
        scalars: numbers of this step.
    """
    if not scalars.grad_scale.isfinite():
        return
    hyper_SR3 = scalars.hyper_G3[vectors.group_SR.long()]
    correction1, correction2 = scalars.bias_corrections
    scale_of = fp8_scale if tensors.exp_avg.dtype == torch.uint8 else lambda _: None
    begin = 0
    for run in table.runs:
        lr, eps, decay = (column[:, None] for column in hyper_SR3[run.entries].unbind(dim=1))
        v = _rows(exp_avg_sq_E[begin : begin + run.count * run.length], run)
        begin += v.numel()
        g = _rows(tensors.grad[run.in_buffer], run).float() * scalars.grad_scale
        m = _advanced_m(tensors, run, scalars, scale_of(v))
        v.copy_(v * scalars.beta2 + g * g * (1 - scalars.beta2))
        step = m * (lr / correction1) / ((v / correction2).sqrt() + eps)
        p = _main_param(tensors, run) * decay - step
        _store(tensors, run, p, m, _noise(vectors, run, scalars), scale_of(v))


def _rows(flat: Tensor, run: Run) -> Tensor:
    return flat.view(run.count, run.length)


def _column_run(table: ColumnTable, run: int) -> tuple[Tensor, slice, Tensor]:
    """Return entry of each element of a run, its place in the buffer, and number in its segment."""
    start, end = int(table.start_C[run]), int(table.end_C[run])
    position = torch.arange(end - start) + int(table.skip_C[run])
    width = int(table.width_C[run])
    return int(table.index_C[run]) + position % width, slice(start, end), position // width


def _scales(vectors: SegmentVectors, at: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return the scales of m before and after the step, if it has any."""
    scale_S2 = vectors.exp_avg_scale_S2
    return (None, None) if scale_S2 is None else (scale_S2[:, 0][at], scale_S2[:, 1][at])


def _advanced_m(
    tensors: BufferTensors, run: Run, scalars: StepScalars, scale: Tensor | None
) -> Tensor:
    factor = scalars.grad_scale * (1 - scalars.beta1)
    stored = _rows(tensors.exp_avg[run.in_state], run)
    if stored.dtype == torch.uint8:
        assert scale is not None
        m = from_fp8(stored, scale)
    else:
        m = stored.float()
    g = _rows(tensors.grad[run.in_buffer], run).float()
    return m * scalars.beta1 + g * factor


def _main_param(tensors: BufferTensors, run: Run) -> Tensor:
    if tensors.weight is None:
        return _rows(tensors.param[run.in_buffer], run)
    if tensors.param.dtype == torch.float32:
        return _rows(tensors.param[run.in_state], run)
    return _rows(join(tensors.weight[run.in_buffer], tensors.param[run.in_state]), run)


def _store(
    tensors: BufferTensors,
    run: Run,
    p_rows: Tensor,
    m_rows: Tensor,
    noise: Tensor | None,
    scale: Tensor | None,
) -> None:
    param, exp_avg, weight, _ = tensors
    if exp_avg.dtype == torch.uint8:
        assert noise is not None
        assert scale is not None
        stored = to_fp8_stochastic(m_rows, scale, noise)
    elif noise is not None:
        stored = to_bfloat16_stochastic(m_rows, noise)
    else:
        stored = to_weight(m_rows, exp_avg.dtype)
    exp_avg[run.in_state] = stored.view(-1)
    p = p_rows.view(-1)
    if weight is None:
        param[run.in_buffer] = p
    elif param.dtype == torch.float32:
        param[run.in_state] = p
        if weight.dtype != torch.uint8:
            weight[run.in_buffer] = to_weight(p, weight.dtype)
    else:
        weight[run.in_buffer], param[run.in_state] = split(p)


def _noise(vectors: SegmentVectors, run: Run, scalars: StepScalars) -> Tensor | None:
    if vectors.origin_SR is None:
        return None
    first = vectors.origin_SR[run.entries, None].long()
    return noise16(first + torch.arange(run.length, device=first.device), scalars.noise_key)
