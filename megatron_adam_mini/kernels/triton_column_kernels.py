"""The Triton kernels over columns, for blocks that consist of columns.

Imports triton. Data flow: gradients -> **sums of squares of columns** ->
``triton_step_size_kernels`` -> **m, main parameters, weights**.

Sums are over *rectangles* of ``column_tiles``: columns lie side by side in a program, and its lines
are added up. Updates are of *windows* of ``triton_tiles``, whose elements have the step size of
their column each.
"""

# mypy: ignore-errors
# (Triton's language has no types.)

from __future__ import annotations

import triton
import triton.language as tl

from megatron_adam_mini.kernels.triton_addresses import (
    COLUMN_WINDOW,
    pair_in,
    place_in,
    state_seen_from_buffer,
    vectors,
    words_of_program,
)
from megatron_adam_mini.kernels.triton_storage import is_finite, load_float32, load_scales
from megatron_adam_mini.kernels.triton_update_kernels import update_elements


@triton.jit(do_not_specialize_on_alignment=["partials"])
def column_sum_kernel(
    partials, grad, tiles,
    VEC: tl.constexpr, COLUMNS: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """Sum the squares of the columns of a rectangle into ``partials``."""
    tile = words_of_program(tiles, 5)
    start = tl.multiple_of(tl.load(tile), VEC)
    stride = tl.multiple_of(tl.load(tile + 1), VEC)
    columns, lines = tl.load(tile + 2).to(tl.int32), tl.load(tile + 3).to(tl.int32)
    line = tl.arange(0, LINES)[:, None, None]
    first = (tl.arange(0, COLUMNS // VEC) * VEC)[None, :, None]
    place = first + tl.arange(0, VEC)[None, None, :]
    total = tl.zeros((LINES, COLUMNS // VEC, VEC), tl.float32)
    for begin in range(0, lines, LINES):
        inside = (begin + line < lines) & (first < columns)
        mask = tl.broadcast_to(inside, (LINES, COLUMNS // VEC, VEC))
        g = load_float32(grad, start + ((begin + line) * stride + place), mask)
        total += g * g
    first, place = vectors(COLUMNS // VEC, VEC)
    mask = tl.broadcast_to(first < columns, (COLUMNS // VEC, VEC))
    tl.store(partials + tl.load(tile + 4) + (first + place), tl.sum(total, axis=0), mask=mask)


@triton.jit(do_not_specialize_on_alignment=["sum_sq", "partials"])
def combine_columns_kernel(
    sum_sq, partials, blocks, TERMS: tl.constexpr, SEGMENTS: tl.constexpr
):  # fmt: skip
    """Add up the partial sums of a block of segments."""
    block = words_of_program(blocks, 5)
    index, segments = tl.load(block), tl.load(block + 1).to(tl.int32)
    partial, end, width = tl.load(block + 2), tl.load(block + 3), tl.load(block + 4)
    segment = tl.arange(0, SEGMENTS)[None, :]
    terms = ((end - partial + width - 1) // width).to(tl.int32)
    total = tl.zeros((TERMS, SEGMENTS), tl.float64)
    for begin in range(0, terms, TERMS):
        at = partial + ((begin + tl.arange(0, TERMS)[:, None]) * width + segment)
        mask = (segment < segments) & (at < end)
        total += tl.load(partials + at, mask=mask, other=0).to(tl.float64)
    segment = tl.arange(0, SEGMENTS)
    sums = tl.sum(total, axis=0).to(tl.float32)
    tl.store(sum_sq + index + segment, sums, mask=segment < segments)


@triton.jit(
    do_not_specialize_on_alignment=[
        "step_size", "exp_avg_scale", "group", "hyper", "grad_scale", "origin", "noise_key",
    ]
)  # fmt: skip
def update_columns_kernel(
    param, exp_avg, weight, grad, tiles,
    step_size, exp_avg_scale, group, hyper, grad_scale, origin, noise_key,
    beta1, one_minus_beta1,
    VEC: tl.constexpr, TILE: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Update the elements of a window, each with the step size of its column."""
    scale = tl.load(grad_scale)
    if is_finite(scale):
        tile = words_of_program(tiles, COLUMN_WINDOW)
        start, low = place_in(tile, VEC)
        _, high = place_in(tile + 1, VEC)
        index = tl.load(tile + 2)
        place, width = pair_in(tile + 3)
        place = place.to(tl.int32)
        param, exp_avg = state_seen_from_buffer(param, exp_avg, weight, tile, VEC)
        first_NV, place_V = vectors(TILE // VEC, VEC)
        inside_NV = (first_NV >= low) & (first_NV < high)
        mask = tl.broadcast_to(inside_NV, (TILE // VEC, VEC))

        row_NV = ((place + first_NV).to(tl.uint32) // width.to(tl.uint32)).to(tl.int32)
        column = (place + first_NV - row_NV * width) + place_V
        past_end = (column >= width).to(tl.int32)  # a vector may go on in the next row
        column = column - past_end * width
        step = tl.load(step_size + index + column, mask=mask, other=0)
        group_at = tl.load(group + index + column, mask=mask, other=0)
        decay = tl.load(hyper + group_at * 3 + 2, mask=mask, other=0)
        before, after = load_scales(exp_avg_scale, index + column, mask)
        number = place_V
        if STOCHASTIC:
            row_stride, row_number = pair_in(tile + 4)
            row_number = (row_number + tl.load(noise_key)).to(tl.uint32)
            row_number += (row_NV + past_end).to(tl.uint32) * row_stride.to(tl.uint32)
            first = tl.load(origin + index + column, mask=mask, other=0)
            number = row_number + first.to(tl.uint32)

        offset = start + (first_NV + place_V)
        g = load_float32(grad, offset, mask)
        update_elements(
            param, exp_avg, weight, g, offset, mask, step, decay, scale * one_minus_beta1,
            beta1, number, before, after, STOCHASTIC,
        )  # fmt: skip
