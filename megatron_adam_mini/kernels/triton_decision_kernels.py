"""The Triton kernels between sums of squares and the factor of the gradients.

Imports triton. Data flow: sums of squares -> **sums by domain, number of those not finite** ->
collectives -> **factor of the gradients**, which all kernels of the update read. All sums are in
float64.
"""

# mypy: ignore-errors
# (Triton's language has no types.)

from __future__ import annotations

import triton
import triton.language as tl

from megatron_adam_mini.kernels.triton_storage import is_finite


@triton.jit(do_not_specialize=["num"], do_not_specialize_on_alignment=["sum_sq", "domain"])
def norm_kernel(
    partials, sum_sq, domain, num,
    DOMAINS: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write, per program, a row of sums by domain, followed by the number of non-finite sums."""
    total_D = tl.zeros((STRIDE,), tl.float64)
    column = tl.arange(0, STRIDE)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < num
    value = tl.load(sum_sq + at, mask=mask, other=0)
    where = tl.load(domain + at, mask=mask, other=-1)
    for number in tl.static_range(DOMAINS):
        share = tl.sum(tl.where(where == number, value, 0).to(tl.float64), axis=0)
        total_D = tl.where(column == number, share, total_D)
    bad = tl.sum(tl.where(is_finite(value), 0, 1), axis=0).to(tl.float64)
    total_D = tl.where(column == DOMAINS, bad, total_D)
    tl.store(partials + tl.program_id(0) * STRIDE + column, total_D)


@triton.jit(do_not_specialize=["programs"], do_not_specialize_on_alignment=["stats"])
def combine_norm_kernel(
    stats, partials, programs,
    DOMAINS: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up the rows of all programs and write ``[sum, non-finite]`` of every domain."""
    column = tl.arange(0, STRIDE)[None, :]
    total = tl.zeros((BLOCK, STRIDE), tl.float64)
    for begin in range(0, programs, BLOCK):
        row = begin + tl.arange(0, BLOCK)[:, None]
        total += tl.load(partials + row * STRIDE + column, mask=row < programs, other=0)
    total_D = tl.sum(total, axis=0)
    column = tl.arange(0, STRIDE)
    zero = tl.zeros((STRIDE,), tl.float64)
    tl.store(stats + column * 2, total_D, mask=column < DOMAINS)
    tl.store(stats + column * 2 + 1, zero, mask=(column > 0) & (column < DOMAINS))
    tl.store(stats + 1 + column * 0, total_D, mask=column == DOMAINS)


@triton.jit(do_not_specialize_on_alignment=["values", "grad_scale", "stats", "inv_scale"])
def decide_kernel(
    values, grad_scale, stats, inv_scale,
    clip_grad: tl.float64, skip_threshold: tl.float64, largest_sq: tl.float64, clip_eps: tl.float64,
    DOMAINS: tl.constexpr,
):  # fmt: skip
    """Compute the factor of the gradients from the sums of all domains, in one program."""
    scaled_sq, num_non_finite = tl.load(stats), tl.load(stats + 1)
    for domain in tl.static_range(1, DOMAINS):
        scaled_sq += tl.load(stats + 2 * domain)
        num_non_finite += tl.load(stats + 2 * domain + 1)
    scale = tl.full((), 1, tl.float64)
    if inv_scale is not None:
        scale = tl.load(inv_scale).to(tl.float64)
    norm_sq = scaled_sq * (scale * scale)
    grad_norm = tl.sqrt(norm_sq)  # float64: correctly rounded, as the division
    clip = (1.0 / (grad_norm + clip_eps)) * clip_grad
    scale = scale * tl.where(clip > 1.0, 1.0, clip)
    found_inf = tl.where(scaled_sq <= largest_sq, 0, 1) | tl.where(num_non_finite > 0, 1, 0)
    skip = found_inf | tl.where(grad_norm > skip_threshold, 1, 0)
    scale = tl.where(skip > 0, float("nan"), scale)
    tl.store(values, scale)
    tl.store(values + 1, norm_sq)
    tl.store(values + 2, found_inf.to(tl.float64))
    tl.store(grad_scale, scale.to(tl.float32))
