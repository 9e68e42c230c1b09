"""The Triton kernels that update parameters, m, and model weights.

Imports triton. Data flow: gradients, step sizes -> **m, main parameters, weights**. Two kernels
compute what they need themselves: ``update_elementwise_kernel`` the second moments of elements, and
``update_rows_kernel`` the sums, v and step sizes of its rows. The arithmetic of elements whose step
size is known, :func:`update_elements`, also serves ``triton_column_kernels``.

A kernel that reads a factor that is not finite writes nothing.
"""

# mypy: ignore-errors
# (Triton's language has no types.)

from __future__ import annotations

import triton
import triton.language as tl

from megatron_adam_mini.kernels.triton_addresses import (
    PACKED,
    ROW,
    WINDOW,
    numbers_in_window,
    rectangle,
    row_tile,
    state_seen_from_buffer,
    vectors,
    window,
    words_of_program,
)
from megatron_adam_mini.kernels.triton_step_size_kernels import step_sizes
from megatron_adam_mini.kernels.triton_storage import (
    fp8_scale,
    is_finite,
    load_float32,
    load_moment,
    load_param,
    load_scales,
    store_moment,
    store_param,
)
from megatron_adam_mini.kernels.triton_sum_kernels import row_sums


@triton.jit
def update_elements(
    param, exp_avg, weight, g, offset, mask, step, decay, factor, beta1, number,
    scale_before, scale_after, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Update elements with the step sizes, and scales of codes of m, of their blocks."""
    m = load_moment(exp_avg, offset, mask, scale_before) * beta1 + g * factor
    p = load_param(param, weight, offset, mask)
    # m first: what it needs then takes no registers any more.
    store_moment(exp_avg, offset, mask, m, number, scale_after, STOCHASTIC)
    p = p * decay - m * step
    store_param(param, weight, offset, mask, p)


@triton.jit(
    do_not_specialize_on_alignment=[
        "step_size", "group", "hyper", "grad_scale", "origin", "noise_key", "exp_avg_scale",
    ]
)  # fmt: skip
def update_kernel(
    param, exp_avg, weight, grad, tiles,
    step_size, exp_avg_scale, group, hyper, grad_scale, origin, noise_key,
    beta1, one_minus_beta1,
    VEC: tl.constexpr, TILE: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Update the elements of a window."""
    scale = tl.load(grad_scale)
    if is_finite(scale):
        tile = words_of_program(tiles, WINDOW)
        start, first_NV, inside_NV, row_NV, place_NV = window(tile, VEC, TILE)
        param, exp_avg = state_seen_from_buffer(param, exp_avg, weight, tile, VEC)
        _, place_V = vectors(TILE // VEC, VEC)
        step_NV = tl.load(step_size + row_NV, mask=inside_NV, other=0)
        group_NV = tl.load(group + row_NV, mask=inside_NV, other=0)
        decay_NV = tl.load(hyper + group_NV * 3 + 2, mask=inside_NV, other=0)
        before_NV, after_NV = load_scales(exp_avg_scale, row_NV, inside_NV)
        number = numbers_in_window(
            origin, noise_key, row_NV, place_NV, inside_NV, place_V, STOCHASTIC
        )

        offset = start + (first_NV + place_V)
        mask = tl.broadcast_to(inside_NV, (TILE // VEC, VEC))
        g = load_float32(grad, offset, mask)
        update_elements(
            param, exp_avg, weight, g, offset, mask, step_NV, decay_NV, scale * one_minus_beta1,
            beta1, number, before_NV, after_NV, STOCHASTIC,
        )  # fmt: skip


@triton.jit(
    do_not_specialize_on_alignment=[
        "group", "hyper", "corrections", "grad_scale", "origin", "noise_key",
    ]
)  # fmt: skip
def update_elementwise_kernel(
    param, exp_avg, exp_avg_sq, weight, grad, tiles,
    group, hyper, corrections, grad_scale, origin, noise_key,
    beta1, one_minus_beta1, beta2, one_minus_beta2,
    VEC: tl.constexpr, TILE: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Update the elements of a window that have their own second moments."""
    scale = tl.load(grad_scale)
    if is_finite(scale):
        tile = words_of_program(tiles, PACKED)
        start, first_NV, inside_NV, row_NV, place_NV = window(tile, VEC, TILE)
        param, exp_avg = state_seen_from_buffer(param, exp_avg, weight, tile, VEC)
        packed = tl.multiple_of(tl.load(tile + 4), VEC)
        _, place_V = vectors(TILE // VEC, VEC)
        group_NV = tl.load(group + row_NV, mask=inside_NV, other=0)
        lr_NV = tl.load(hyper + group_NV * 3, mask=inside_NV, other=0)
        eps_NV = tl.load(hyper + group_NV * 3 + 1, mask=inside_NV, other=1)
        decay_NV = tl.load(hyper + group_NV * 3 + 2, mask=inside_NV, other=0)
        rate_NV = tl.div_rn(lr_NV, tl.load(corrections))
        correction2 = tl.load(corrections + 1)
        number = numbers_in_window(
            origin, noise_key, row_NV, place_NV, inside_NV, place_V, STOCHASTIC
        )

        offset = start + (first_NV + place_V)
        offset_sq = packed + (first_NV + place_V)
        mask = tl.broadcast_to(inside_NV, (TILE // VEC, VEC))
        g = load_float32(grad, offset, mask)
        v = tl.load(exp_avg_sq + offset_sq, mask=mask, other=0)
        m = load_moment(exp_avg, offset, mask, fp8_scale(v)) * beta1
        m += g * (scale * one_minus_beta1)
        p = load_param(param, weight, offset, mask)
        g = g * scale
        v = v * beta2 + g * g * one_minus_beta2
        tl.store(exp_avg_sq + offset_sq, v, mask=mask)
        # m first, as in update_elements.
        store_moment(exp_avg, offset, mask, m, number, fp8_scale(v), STOCHASTIC)
        root = tl.sqrt_rn(tl.div_rn(v, tl.broadcast_to(correction2, v.shape))) + eps_NV
        p = p * decay_NV - tl.div_rn(m * rate_NV, root)
        store_param(param, weight, offset, mask, p)


@triton.jit(
    do_not_specialize_on_alignment=[
        "exp_avg_sq", "step_size", "exp_avg_scale", "sum_sq", "inv_numel", "group", "hyper",
        "corrections", "grad_scale", "origin", "noise_key",
    ]
)  # fmt: skip
def update_rows_kernel(
    param, exp_avg, weight, grad, tiles,
    sum_sq, exp_avg_sq, step_size, exp_avg_scale, inv_numel, group, hyper, corrections, grad_scale,
    origin, noise_key, beta1, one_minus_beta1, beta2, one_minus_beta2,
    VEC: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, ONCE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Do the whole step for uncut blocks; rows of one rectangle keep their g in registers."""
    scale = tl.load(grad_scale)
    if is_finite(scale):
        tile = words_of_program(tiles, ROW)
        start, length, count, index, _ = row_tile(tile, VEC)
        param, exp_avg = state_seen_from_buffer(param, exp_avg, weight, tile, VEC)
        if ONCE:
            offset, place, mask = rectangle(start, length, count, 0, VEC, COLUMNS, ROWS)
            g = load_float32(grad, offset, mask)
            total = tl.sum(tl.sum(g * g, axis=2), axis=1)
        else:
            total = row_sums(grad, start, length, count, VEC, COLUMNS, ROWS)
        row = tl.arange(0, ROWS)
        inside = row < count
        at = index + row
        tl.store(sum_sq + at, total, mask=inside)
        step, group_R, before, after = step_sizes(
            exp_avg_sq, step_size, exp_avg_scale, total, inv_numel, group, hyper, corrections,
            at, inside, scale, beta2, one_minus_beta2,
        )  # fmt: skip
        decay = tl.load(hyper + group_R * 3 + 2, mask=inside, other=0)[:, None, None]
        step = step[:, None, None]
        before, after = before[:, None, None], after[:, None, None]
        factor = scale * one_minus_beta1
        number = tl.zeros((ROWS, 1, 1), tl.uint32)
        if STOCHASTIC:
            number_R = tl.load(origin + at, mask=inside, other=0)
            number = (number_R + tl.load(noise_key)).to(tl.uint32)[:, None, None]
        if ONCE:
            update_elements(
                param, exp_avg, weight, g, offset, mask, step, decay, factor, beta1,
                number + place, before, after, STOCHASTIC,
            )  # fmt: skip
        else:
            for column in range(0, length, COLUMNS):
                offset, place, mask = rectangle(start, length, count, column, VEC, COLUMNS, ROWS)
                g = load_float32(grad, offset, mask)
                update_elements(
                    param, exp_avg, weight, g, offset, mask, step, decay, factor, beta1,
                    number + place, before, after, STOCHASTIC,
                )  # fmt: skip
