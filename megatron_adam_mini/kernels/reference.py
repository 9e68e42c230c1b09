"""Plain-torch kernels: the specification that the fast ones are tested against.

Every function modifies its first arguments in place. Being a specification, they are not frugal:
temporaries take up to 16 bytes per element of the largest run of equal segments, usually one
parameter's rows in the slice; and they read ``grad_scale`` on the host.

Storage, told by dtypes: ``param_L`` float32 holds main parameters; int16 holds remainders, with
which the bfloat16 ``weight_L`` makes up the main parameters (see ``rounding``). ``exp_avg_L`` is
float32 or bfloat16 (to the nearest as weights, or stochastically). ``grad_L`` is float32,
bfloat16 or float16, and only read.

Shape legend: ``L`` elements of one slice, ``S`` segments of a table, ``R`` element ranges,
``E`` elements in all element ranges, ``B`` vectors with one entry per segment of the rank, in
which ``segments.indices`` finds the table's, ``G`` parameter groups, ``D`` domains.

Source: Zhang et al., arXiv:2406.16793, Algorithm 2 (``mean(g * g)`` per block), with AdamW's
decoupled decay, Loshchilov and Hutter, arXiv:1711.05101.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_adam_mini.kernels.scalars import StepScalars
from megatron_adam_mini.kernels.segments import Run, SegmentTable
from megatron_adam_mini.rounding import (
    join,
    noise16,
    split,
    to_bfloat16_stochastic,
    to_weight,
)

NAME = "reference"


def block_sum_sq_(sum_sq_B: Tensor, grad_L: Tensor, segments: SegmentTable) -> None:
    """Write the sum of squares of each segment: ``sum_sq[s] = sum(g * g)``.

    Args:
        sum_sq_B: float32, the segments' entries are overwritten.
        grad_L: shape ``(L,)``; squares are taken and added in at least
            float32 (here: squared in float32, added in float64).
        segments: S segments.
    """
    for run in segments.runs:
        rows = grad_L[run.window].view(run.count, run.length).float()
        sum_sq_B[run.segments] = (rows * rows).double().sum(dim=1)


def norm_partials_(stats_D2: Tensor, sum_sq_B: Tensor, domain_B: Tensor) -> None:
    """Add up the sums of squares that count in the gradient norm, and count non-finite ones.

    Args:
        stats_D2: float64, overwritten: ``[sum of finite or non-finite sums, 0]`` per domain;
            ``stats[0, 1]`` is the number of non-finite sums among all, counted ones or not.
        sum_sq_B: float32.
        domain_B: int8, the domain in whose norm a sum counts, -1 for none.
    """
    stats_D2.zero_()
    for domain in range(len(stats_D2)):
        stats_D2[domain, 0] = sum_sq_B[domain_B == domain].double().sum()
    stats_D2[:1, 1] = (~torch.isfinite(sum_sq_B)).sum()


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
    """Advance v of every block, and turn it into the step size of its elements.

    ``v <- beta2 v + (1 - beta2) grad_scale^2 sum_sq / numel``,
    ``step_size = lr / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)``.

    Args:
        exp_avg_sq_B: v, float32, modified in place.
        step_size_B: float32, overwritten.
        sum_sq_B: complete sums of squares of the gradients as they are in the buffer.
        inv_numel_B: 1 / elements of the whole block.
        group_B: int32, parameter group of each segment.
        scalars: numbers of this step.
        index: int64, entries to treat; default all.
    """
    if not scalars.grad_scale.isfinite():
        return
    at = slice(None) if index is None else index
    lr, eps, _ = scalars.hyper_G3[group_B[at].long()].unbind(dim=1)
    correction1, correction2 = scalars.bias_corrections
    mean_sq = sum_sq_B[at] * inv_numel_B[at] * scalars.grad_scale.square()
    v = exp_avg_sq_B[at] * scalars.beta2 + mean_sq * (1 - scalars.beta2)
    exp_avg_sq_B[at] = v
    step_size_B[at] = lr / correction1 / ((v / correction2).sqrt() + eps)


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
    """Update the elements of all segments.

    ``m <- beta1 m + (1 - beta1) grad_scale g``, ``p <- decay p - step_size m``, ``weight <- p``.
    The step takes m before it is rounded.

    Args:
        param_L: main parameters or remainders, shape ``(L,)``, modified in place.
        exp_avg_L: m, shape ``(L,)``, modified in place.
        weight_L: model weights, bfloat16 or float16, shape ``(L,)``, written (with remainders
            also read); ``None`` when ``param_L`` is the model weight.
        grad_L: shape ``(L,)``.
        segments: S segments; elements outside of them are not touched.
        step_size_B: float32.
        group_B: int32, parameter group of each segment.
        scalars: numbers of this step.
        origin_B: ``None``: a bfloat16 m is rounded to the nearest. Otherwise stochastically; int32,
            whose bits are the number of each segment's first element. Noise depends on an element's
            number, counted on from there, and on the step.
    """
    if not scalars.grad_scale.isfinite():
        return
    decay_B = scalars.hyper_G3[:, 2][group_B.long()]
    for run in segments.runs:
        rows = run.window, (run.count, run.length)
        m = _advanced_m(exp_avg_L, grad_L, *rows, scalars)
        p = _main_param(param_L, weight_L, *rows)
        p = p * decay_B[run.segments, None] - m * step_size_B[run.segments, None]
        noise = None if origin_B is None else _noise(origin_B, run, scalars)
        _store(param_L, exp_avg_L, weight_L, p, m, run.window, noise)


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
    """Do all of a step for segments that are whole blocks, in one pass over memory.

    The three kernels above in one, for steps in which nothing waits for the gradient norm.
    ``sum_sq_B`` and ``step_size_B`` are written as they would write them, so that the norm is
    known afterwards. Non-finite gradients enter v, m and p, as they do without a norm.

    Args: as above.
    """
    if not scalars.grad_scale.isfinite():
        return
    block_sum_sq_(sum_sq_B, grad_L, segments)
    indices = torch.from_numpy(segments.indices).to(sum_sq_B.device)
    block_step_size_(
        exp_avg_sq_B,
        step_size_B,
        sum_sq_B,
        inv_numel_B=inv_numel_B,
        group_B=group_B,
        scalars=scalars,
        index=indices,
    )
    update_(
        param_L,
        exp_avg_L,
        weight_L,
        grad_L,
        segments,
        step_size_B=step_size_B,
        group_B=group_B,
        scalars=scalars,
        origin_B=origin_B,
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
    """Update the elements that keep a second moment of their own: AdamW.

    Args:
        param_L: as for :func:`update_`, as are the next three.
        exp_avg_L: m.
        weight_L: model weights.
        grad_L: gradients.
        exp_avg_sq_E: v of the elements of all ranges, one range after the other, float32,
            modified in place.
        ranges: R element ranges.
        group_B: int32, parameter group of each range, at ``ranges.indices``.
        scalars: numbers of this step.
        origin_B: as for :func:`update_`.
    """
    if not scalars.grad_scale.isfinite():
        return
    hyper_B3 = scalars.hyper_G3[group_B.long()]
    correction1, correction2 = scalars.bias_corrections
    begin = 0
    for run in ranges.runs:
        rows = run.window, (run.count, run.length)
        lr, eps, decay = (column[:, None] for column in hyper_B3[run.segments].unbind(dim=1))
        v = exp_avg_sq_E[begin : begin + run.count * run.length].view(rows[1])
        begin += v.numel()
        g = grad_L[run.window].view(rows[1]).float() * scalars.grad_scale
        v.copy_(v * scalars.beta2 + g * g * (1 - scalars.beta2))
        m = _advanced_m(exp_avg_L, grad_L, *rows, scalars)
        step = m * (lr / correction1) / ((v / correction2).sqrt() + eps)
        p = _main_param(param_L, weight_L, *rows) * decay - step
        noise = None if origin_B is None else _noise(origin_B, run, scalars)
        _store(param_L, exp_avg_L, weight_L, p, m, run.window, noise)


def _advanced_m(
    exp_avg_L: Tensor, grad_L: Tensor, window: slice, shape: tuple[int, int], scalars: StepScalars
) -> Tensor:
    factor = scalars.grad_scale * (1 - scalars.beta1)
    m, g = exp_avg_L[window].view(shape).float(), grad_L[window].view(shape).float()
    return m * scalars.beta1 + g * factor


def _main_param(
    param_L: Tensor, weight_L: Tensor | None, window: slice, shape: tuple[int, int]
) -> Tensor:
    if param_L.dtype == torch.float32:
        return param_L[window].view(shape)
    assert weight_L is not None
    return join(weight_L[window], param_L[window]).view(shape)


def _store(
    param_L: Tensor,
    exp_avg_L: Tensor,
    weight_L: Tensor | None,
    p: Tensor,
    m: Tensor,
    window: slice,
    noise: Tensor | None,
) -> None:
    stored = to_weight(m, exp_avg_L.dtype) if noise is None else to_bfloat16_stochastic(m, noise)
    exp_avg_L[window] = stored.view(-1)
    if param_L.dtype == torch.float32:
        param_L[window] = p.view(-1)
        if weight_L is not None:
            weight_L[window] = to_weight(p, weight_L.dtype).view(-1)
    else:
        assert weight_L is not None
        weight_L[window], param_L[window] = split(p.view(-1))


def _noise(origin_B: Tensor, run: Run, scalars: StepScalars) -> Tensor:
    first = origin_B[run.segments, None].long()
    return noise16(first + torch.arange(run.length, device=first.device), scalars.noise_key)
