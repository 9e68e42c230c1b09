"""Plain-torch kernels: the specification that the fast ones are tested against.

Every function modifies its first arguments in place and never synchronises with the host. Being a
specification, they are not frugal: temporaries take up to 16 bytes per element of the largest run
of equal segments, usually one parameter's rows in the slice. All scalars that depend on the step
are tensors.

Shape legend: ``L`` elements of one slice, ``S`` segments of it, ``R`` element ranges of it,
``E`` elements in all element ranges, ``B`` any vector with one entry per segment.

Source: Zhang et al., arXiv:2406.16793, Algorithm 2 (``mean(g * g)`` per block), with AdamW's
decoupled decay, Loshchilov and Hutter, arXiv:1711.05101.
"""

from __future__ import annotations

from torch import Tensor

from megatron_adam_mini.kernels.segments import SegmentTable


def block_sum_sq_(sum_sq_S: Tensor, grad_L: Tensor, segments: SegmentTable) -> None:
    """Write the sum of squares of each segment: ``sum_sq[s] = sum(g * g)``.

    Args:
        sum_sq_S: float32, shape ``(S,)``, overwritten.
        grad_L: float32 or bfloat16, shape ``(L,)``; squares are taken and added in at least
            float32 (here: squared in float32, added in float64).
        segments: S segments.
    """
    for run in segments.runs:
        rows = grad_L[run.window].view(run.count, run.length).float()
        sum_sq_S[run.segments] = (rows * rows).double().sum(dim=1)


def block_step_size_(
    exp_avg_sq_B: Tensor,
    step_size_B: Tensor,
    sum_sq_B: Tensor,
    *,
    inv_numel_B: Tensor,
    lr_B: Tensor,
    eps_B: Tensor,
    grad_scale: Tensor,
    bias_correction1: Tensor,
    bias_correction2: Tensor,
    beta2: float,
) -> None:
    """Advance v of every block, and turn it into the step size of its elements.

    ``v <- beta2 v + (1 - beta2) grad_scale^2 sum_sq / numel``,
    ``step_size = lr / bias_correction1 / (sqrt(v / bias_correction2) + eps)``.

    Args:
        exp_avg_sq_B: v, float32, modified in place.
        step_size_B: float32, overwritten.
        sum_sq_B: complete sums of squares of the gradients as they are in the buffer.
        inv_numel_B: 1 / elements of the whole block.
        lr_B: learning rate of each segment's parameter group.
        eps_B: epsilon of each segment's parameter group.
        grad_scale: scalar, what the gradients are multiplied with (loss scale and clipping).
        bias_correction1: scalar ``1 - beta1 ** step``.
        bias_correction2: scalar ``1 - beta2 ** step``; ``step`` counts from 1.
        beta2: decay of v.
    """
    mean_sq = sum_sq_B * inv_numel_B * grad_scale.square()
    exp_avg_sq_B.mul_(beta2).add_(mean_sq, alpha=1 - beta2)
    denominator = (exp_avg_sq_B / bias_correction2).sqrt_().add_(eps_B)
    step_size_B.copy_(lr_B / bias_correction1 / denominator)


def update_(
    param_L: Tensor,
    exp_avg_L: Tensor,
    weight_L: Tensor | None,
    grad_L: Tensor,
    segments: SegmentTable,
    *,
    step_size_S: Tensor,
    decay_S: Tensor,
    grad_scale: Tensor,
    beta1: float,
) -> None:
    """Update the elements of all segments.

    ``m <- beta1 m + (1 - beta1) grad_scale g``, ``p <- decay p - step_size m``, ``weight <- p``.

    Args:
        param_L: float32 main parameters, shape ``(L,)``, modified in place.
        exp_avg_L: m, float32, shape ``(L,)``, modified in place.
        weight_L: model weights to write (bfloat16 or float16), shape ``(L,)``; ``None`` when
            ``param_L`` is the model weight.
        grad_L: float32 or bfloat16, shape ``(L,)``, only read.
        segments: S segments; elements outside of them are not touched.
        step_size_S: float32, shape ``(S,)``.
        decay_S: ``1 - lr * weight_decay``, float32, shape ``(S,)``.
        grad_scale: scalar tensor.
        beta1: decay of m.
    """
    factor = grad_scale * (1 - beta1)
    for run in segments.runs:
        shape = (run.count, run.length)
        param = param_L[run.window].view(shape)
        exp_avg = exp_avg_L[run.window].view(shape)
        exp_avg.mul_(beta1).addcmul_(grad_L[run.window].view(shape).float(), factor)
        param.mul_(decay_S[run.segments, None])
        param.addcmul_(exp_avg, step_size_S[run.segments, None], value=-1)
        if weight_L is not None:
            weight_L[run.window].view(shape).copy_(param)


def update_elementwise_(
    param_L: Tensor,
    exp_avg_L: Tensor,
    exp_avg_sq_E: Tensor,
    weight_L: Tensor | None,
    grad_L: Tensor,
    ranges: SegmentTable,
    *,
    lr_R: Tensor,
    eps_R: Tensor,
    decay_R: Tensor,
    grad_scale: Tensor,
    bias_correction1: Tensor,
    bias_correction2: Tensor,
    beta1: float,
    beta2: float,
) -> None:
    """Update the elements that keep a second moment of their own: AdamW.

    Args:
        param_L: float32 main parameters, modified in place.
        exp_avg_L: m, float32, modified in place.
        exp_avg_sq_E: v of the elements of all ranges, one range after the other, float32,
            modified in place.
        weight_L: model weights to write, or ``None``.
        grad_L: float32 or bfloat16, only read.
        ranges: R element ranges.
        lr_R: learning rate of each range.
        eps_R: epsilon of each range.
        decay_R: ``1 - lr * weight_decay`` of each range.
        grad_scale: scalar tensor.
        bias_correction1: scalar ``1 - beta1 ** step``.
        bias_correction2: scalar ``1 - beta2 ** step``.
        beta1: decay of m.
        beta2: decay of v.
    """
    factor = grad_scale * (1 - beta1)
    begin = 0
    for index, (first, last) in enumerate(zip(ranges.start_S, ranges.end_S, strict=True)):
        window = slice(int(first), int(last))
        exp_avg_sq = exp_avg_sq_E[begin : begin + int(last - first)]
        begin += int(last - first)
        grad = grad_L[window].float()
        exp_avg_L[window].mul_(beta1).addcmul_(grad, factor)
        scaled = grad * grad_scale
        exp_avg_sq.mul_(beta2).addcmul_(scaled, scaled, value=1 - beta2)
        denominator = (exp_avg_sq / bias_correction2).sqrt_().add_(eps_R[index])
        step = exp_avg_L[window] * (lr_R[index] / bias_correction1)
        param_L[window].mul_(decay_R[index]).sub_(step.div_(denominator))
        if weight_L is not None:
            weight_L[window].copy_(param_L[window])
