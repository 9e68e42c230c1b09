"""The Triton kernel of second moments and step sizes, one of each per block.

Imports triton. Data flow: sums of squares -> **v, step sizes** -> ``triton_update_kernels``.
``step_sizes`` is also a part of kernels that have the sums in registers.
"""

# mypy: ignore-errors
# (Triton's language has no types.)

from __future__ import annotations

import triton
import triton.language as tl

from megatron_adam_mini.kernels.triton_storage import fp8_scale, is_finite


@triton.jit
def _advanced_v(v, sum_sq, inv_numel, lr, eps, corrections, scale, beta2, one_minus_beta2):
    """Return v after the step, and the step size of its block."""
    mean_sq = sum_sq * inv_numel * (scale * scale)
    v = v * beta2 + mean_sq * one_minus_beta2
    correction1 = tl.broadcast_to(tl.load(corrections), v.shape)
    correction2 = tl.broadcast_to(tl.load(corrections + 1), v.shape)
    return v, tl.div_rn(tl.div_rn(lr, correction1), tl.sqrt_rn(tl.div_rn(v, correction2)) + eps)


@triton.jit
def step_sizes(
    exp_avg_sq, step_size, exp_avg_scale, total, inv_numel, group, hyper, corrections,
    at, mask, scale, beta2, one_minus_beta2,
):  # fmt: skip
    """Advance v of the entries ``at`` under ``mask``.

    Returns their step sizes, groups, and scales of codes of m before and after the step.

    Several warps may hold an entry, and one of them writes it; all must have read v by then.
    """
    group_at = tl.load(group + at, mask=mask, other=0)
    v_before = tl.load(exp_avg_sq + at, mask=mask, other=0)
    v, step = _advanced_v(
        v_before,
        total,
        tl.load(inv_numel + at, mask=mask, other=0),
        tl.load(hyper + group_at * 3, mask=mask, other=0),
        tl.load(hyper + group_at * 3 + 1, mask=mask, other=1),
        corrections,
        scale,
        beta2,
        one_minus_beta2,
    )
    tl.debug_barrier()
    tl.store(exp_avg_sq + at, v, mask=mask)
    tl.store(step_size + at, step, mask=mask)
    before, after = fp8_scale(v_before), fp8_scale(v)
    if exp_avg_scale is not None:
        tl.store(exp_avg_scale + at * 2, before, mask=mask)
        tl.store(exp_avg_scale + at * 2 + 1, after, mask=mask)
    return step, group_at, before, after


@triton.jit(
    do_not_specialize=["num"],
    do_not_specialize_on_alignment=[
        "exp_avg_sq", "step_size", "exp_avg_scale", "sum_sq", "inv_numel", "group", "index",
        "hyper", "corrections", "grad_scale",
    ],
)  # fmt: skip
def step_size_kernel(
    exp_avg_sq, step_size, exp_avg_scale, sum_sq, inv_numel, group, index,
    hyper, corrections, grad_scale, num, beta2, one_minus_beta2, BLOCK: tl.constexpr,
):  # fmt: skip
    """Advance v and write the step size of all blocks, or of those that ``index`` lists."""
    scale = tl.load(grad_scale)
    if is_finite(scale):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = at < num
        if index is not None:
            at = tl.load(index + at, mask=mask, other=0)
        total = tl.load(sum_sq + at, mask=mask, other=0)
        step_sizes(
            exp_avg_sq, step_size, exp_avg_scale, total, inv_numel, group, hyper, corrections,
            at, mask, scale, beta2, one_minus_beta2,
        )  # fmt: skip
