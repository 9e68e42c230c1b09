"""The Triton kernels that sum: squares of segments, and given positions of a vector.

Imports triton. Data flow: gradients -> **sums of squares**, and of parts of long segments ->
**their sums** -> ``triton_step_size_kernels``; sums -> **ordered sums** around collectives.

Squares of a row tile are added in float32, all else in float64. The order depends on the tiles
alone.
"""

# mypy: ignore-errors
# (Triton's language has no types.)

from __future__ import annotations

import triton
import triton.language as tl

from megatron_adam_mini.kernels.triton_addresses import ROW, rectangle, row_tile, words_of_program
from megatron_adam_mini.kernels.triton_step_size_kernels import step_sizes
from megatron_adam_mini.kernels.triton_storage import is_finite, load_float32


@triton.jit
def row_sums(
    grad, start, length, count,
    VEC: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Return the sums of squares of the rows of a tile."""
    total = tl.zeros((ROWS, COLUMNS // VEC, VEC), tl.float32)
    for column in range(0, length, COLUMNS):
        offset, _, mask = rectangle(start, length, count, column, VEC, COLUMNS, ROWS)
        g = load_float32(grad, offset, mask)
        total += g * g
    return tl.sum(tl.sum(total, axis=2), axis=1)


@triton.jit(do_not_specialize_on_alignment=["sum_sq", "partials"])
def sum_kernel(
    sum_sq, partials, grad, tiles,
    VEC: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sum the squares of whole segments into ``sum_sq``, of parts into ``partials``."""
    start, length, count, index, partial = row_tile(words_of_program(tiles, ROW), VEC)
    row = tl.arange(0, ROWS)
    total = row_sums(grad, start, length, count, VEC, COLUMNS, ROWS)
    tl.store(sum_sq + index + row, total, mask=(row < count) & (partial < 0))
    tl.store(partials + partial + row, total, mask=(row < count) & (partial >= 0))


@triton.jit(
    do_not_specialize_on_alignment=[
        "sum_sq", "exp_avg_sq", "step_size", "exp_avg_scale", "inv_numel", "group", "hyper",
        "corrections", "grad_scale",
    ],
)  # fmt: skip
def combine_kernel(
    sum_sq, partials, owners, exp_avg_sq, step_size, exp_avg_scale, inv_numel, group, hyper,
    corrections, grad_scale, beta2, one_minus_beta2, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up the parts of one long segment; with ``exp_avg_sq``, also advance v from the sum.

    If ``exp_avg_sq`` is given and ``grad_scale`` is not finite, not even the sum is written.
    """
    owner = words_of_program(owners, 3)
    at, first, count = tl.load(owner), tl.load(owner + 1), tl.load(owner + 2).to(tl.int32)
    sums = tl.zeros((BLOCK,), tl.float64)
    for begin in range(0, count, BLOCK):
        part = begin + tl.arange(0, BLOCK)
        sums += tl.load(partials + first + part, mask=part < count, other=0).to(tl.float64)
    total = tl.sum(sums, axis=0).to(tl.float32)
    if exp_avg_sq is None:
        tl.store(sum_sq + at, total)
    else:
        scale = tl.load(grad_scale)
        if is_finite(scale):
            tl.store(sum_sq + at, total)
            total_1 = tl.broadcast_to(total, (1,))
            step_sizes(
                exp_avg_sq, step_size, exp_avg_scale, total_1, inv_numel, group, hyper, corrections,
                at + tl.arange(0, 1), tl.full((1,), 1, tl.int1), scale, beta2, one_minus_beta2,
            )  # fmt: skip


@triton.jit(do_not_specialize=["num"], do_not_specialize_on_alignment=["values"])
def ordered_sum_kernel(
    values, target, bounds, source, num, ROWS: tl.constexpr, SOURCES: tl.constexpr
):  # fmt: skip
    """Write the sums of rows of a table; one without sources is zero.

    Source ``i`` of a row is added by lane ``i % SOURCES``, and lanes by a tree.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < num
    first = tl.load(bounds + row, mask=inside, other=0)
    count = tl.load(bounds + row + 1, mask=inside, other=0) - first
    lane = tl.arange(0, SOURCES)[None, :]
    total = tl.zeros((ROWS, SOURCES), tl.float64)
    for begin in range(0, tl.max(count, axis=0), SOURCES):
        mask = begin + lane < count[:, None]
        at = tl.load(source + (first[:, None] + begin + lane), mask=mask, other=0)
        total += tl.load(values + at, mask=mask, other=0).to(tl.float64)
    sums = tl.sum(total, axis=1).to(tl.float32)
    tl.store(values + tl.load(target + row, mask=inside, other=0), sums, mask=inside)
