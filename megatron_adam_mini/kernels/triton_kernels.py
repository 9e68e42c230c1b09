"""The kernels in Triton's language; ``triton_gpu`` launches them.

Imports triton. They compute what ``reference`` computes, in its order, operation by operation:
they are launched without contraction to fused multiply-add, divisions and square roots are
correctly rounded, and rounding to bfloat16 is integer arithmetic. So results equal the reference
bit for bit, except for sums of many elements, which are added in another (fixed) order.

bfloat16 tensors are passed as int16, their bits. There are two kinds of tiles, see
``triton_tiles``: *windows*, whose elements are independent of each other, and *row tiles*, which
hold whole segments. Both are treated as vectors of ``VEC`` elements that one thread moves in one
access: masks are per vector, because a mask per element would split the access.

Shape legend: ``NV`` vectors and ``V`` elements in each; ``RCV`` rows, vectors of a row, elements.
"""

# mypy: ignore-errors
# (Triton's language has no types.)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load(stream, offset, mask):
    """Load as float32; int16 holds the bits of bfloat16."""
    value = tl.load(stream + offset, mask=mask, other=0)
    if stream.dtype.element_ty == tl.int16:
        result = (value.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        result = value.to(tl.float32)
    return result


@triton.jit
def _bits(value):
    """Return the bits of float32 values, the same for all NaNs."""
    return tl.where(value != value, 0x7FC00000, value.to(tl.int32, bitcast=True))


@triton.jit
def _finite(value):
    return tl.abs(value) < float("inf")


@triton.jit
def _noise16(number):
    """Return 16 random bits per uint32 number; see ``rounding.noise16``."""
    bits = (number ^ (number >> 16)) * tl.full((), 0x85EBCA6B, tl.uint32)
    bits = (bits ^ (bits >> 13)) * tl.full((), 0xC2B2AE35, tl.uint32)
    return (bits >> 16).to(tl.int32)  # the hash's last step leaves this half as it is


@triton.jit
def _load_param(param, weight, offset, mask):
    """Load main parameters, or join them from weight and remainder."""
    if param.dtype.element_ty == tl.int16:
        high = tl.load(weight + offset, mask=mask, other=0).to(tl.int32) << 16
        low = tl.load(param + offset, mask=mask, other=0).to(tl.int32)
        p = (high + low).to(tl.float32, bitcast=True)
    else:
        p = tl.load(param + offset, mask=mask, other=0)
    return p


@triton.jit
def _store_param(param, weight, offset, mask, p):
    """Store main parameters and model weights, or weights and remainders."""
    if weight is not None:
        if weight.dtype.element_ty == tl.int16:
            bits = _bits(p)
            high = (bits + 0x8000) >> 16
            tl.store(weight + offset, high.to(tl.int16), mask=mask)
            if param.dtype.element_ty == tl.int16:
                tl.store(param + offset, (bits - (high << 16)).to(tl.int16), mask=mask)
        elif weight.dtype.element_ty == tl.float16:
            tl.store(weight + offset, p.to(tl.float16), mask=mask)
    if param.dtype.element_ty == tl.float32:
        tl.store(param + offset, p, mask=mask)


@triton.jit
def _scale(v):
    """Return the scale of codes of m; see ``rounding.fp8_scale``."""
    exponent = (v.to(tl.int32, bitcast=True) >> 23) & 0xFF
    return (((exponent + 127) >> 1) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _load_scales(exp_avg_scale, at, mask):
    """Return the scales of codes of m before and after the step, if m consists of codes."""
    if exp_avg_scale is not None:
        before = tl.load(exp_avg_scale + at * 2, mask=mask, other=1)
        after = tl.load(exp_avg_scale + at * 2 + 1, mask=mask, other=1)
    else:
        before, after = 1.0, 1.0
    return before, after


@triton.jit
def _from_code(code, scale):
    """Return what codes stand for, see ``rounding.from_fp8``: their exponents are 120 apart."""
    size = code & 0x7F
    value = (size << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2**120
    bits = tl.where(size == 0x7F, 0x7FC00000, value.to(tl.int32, bitcast=True))
    return (bits | ((code & 0x80) << 24)).to(tl.float32, bitcast=True) * scale


@triton.jit
def _to_code(m, scale, number):
    """Return a code next to m, see ``rounding.to_fp8_stochastic``."""
    bits = m.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # Scales are powers of two, and so are their inverses.
    inverse = (0x7F000000 - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    ratio = size.to(tl.float32, bitcast=True) * inverse
    ratio = tl.where(ratio < 448.0, ratio, 448.0)
    subnormal = ratio < 0.015625  # 2**-6
    moved = tl.where(subnormal, ratio + 0.015625, ratio).to(tl.int32, bitcast=True)
    code = ((moved + (_noise16(number) << 4)) >> 20) - tl.where(subnormal, 968, 960)
    code = code | ((bits >> 24) & 0x80)
    return tl.where(size >= 0x7F800000, 0x7F, code).to(tl.uint8)


@triton.jit
def _load_moment(exp_avg, offset, mask, scale):
    """Load m as float32; ``scale`` is that of its codes, if it consists of these."""
    if exp_avg.dtype.element_ty == tl.uint8:
        m = _from_code(tl.load(exp_avg + offset, mask=mask, other=0).to(tl.int32), scale)
    else:
        m = _load(exp_avg, offset, mask)
    return m


@triton.jit
def _store_moment(exp_avg, offset, mask, m, number, scale, STOCHASTIC: tl.constexpr):
    """Store m; if it is stored as bfloat16, round it to the nearest or with noise."""
    if exp_avg.dtype.element_ty == tl.uint8:
        tl.store(exp_avg + offset, _to_code(m, scale, number), mask=mask)
    elif exp_avg.dtype.element_ty == tl.int16:
        bits = _bits(m) + (_noise16(number) if STOCHASTIC else 0x8000)
        tl.store(exp_avg + offset, (bits >> 16).to(tl.int16), mask=mask)
    else:
        tl.store(exp_avg + offset, m, mask=mask)


@triton.jit
def _update(
    param, exp_avg, weight, g, offset, mask, step, decay, factor, beta1, number,
    scale_before, scale_after, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Update elements with the step sizes, and scales of codes of m, of their blocks."""
    m = _load_moment(exp_avg, offset, mask, scale_before) * beta1 + g * factor
    p = _load_param(param, weight, offset, mask)
    # m first: what it needs then takes no registers any more.
    _store_moment(exp_avg, offset, mask, m, number, scale_after, STOCHASTIC)
    p = p * decay - m * step
    _store_param(param, weight, offset, mask, p)


@triton.jit
def _vectors(COUNT: tl.constexpr, VEC: tl.constexpr):
    """Return the first element of each vector, and each element's place in its vector."""
    return (tl.arange(0, COUNT) * VEC)[:, None], tl.arange(0, VEC)[None, :]


@triton.jit
def _place(word, VEC: tl.constexpr, OF_NUMBER: tl.constexpr = 1):
    """Return the position and the number in a word of a tile; see ``tile_words``.

    They are multiples of ``VEC`` and of ``OF_NUMBER``. The compiler hears of it here: what is said
    of the result of a call is lost.
    """
    value = tl.load(word)
    number = tl.multiple_of((value & 0xFFFF).to(tl.int32), OF_NUMBER)
    return tl.multiple_of(value >> 16, VEC), number


@triton.jit
def _pair(word):
    """Return the two numbers in a word of a tile, int32."""
    value = tl.load(word)
    return value >> 32, value.to(tl.int32)


@triton.jit
def _state(param, exp_avg, weight, tiles, WORDS: tl.constexpr, VEC: tl.constexpr):
    """Return pointers to the state, such that positions in the buffer address it.

    float32 weights, which are their own main parameters, lie in the buffer.
    """
    shift, _ = _place(tiles + tl.program_id(0).to(tl.int64) * WORDS + 1, VEC)
    if weight is not None:
        param = param + shift
    return param, exp_avg + shift


@triton.jit
def _window(tiles, WORDS: tl.constexpr, VEC: tl.constexpr, TILE: tl.constexpr):
    """Return a window's start, and its vectors ``(NV, 1)`` with mask, row and place in the row.

    Of places, the lower 32 bits count.
    """
    tile = tiles + tl.program_id(0).to(tl.int64) * WORDS
    start, low = _place(tile, VEC)
    _, high = _place(tile + 1, VEC)
    index, skip = _pair(tile + 2)
    shift, length = _pair(tile + 3)
    shift = shift.to(tl.int32)
    first, _ = _vectors(TILE // VEC, VEC)
    inside = (first >= low) & (first < high)
    row = ((shift + first).to(tl.uint32) // length.to(tl.uint32)).to(tl.int32)
    place = shift + first - row * length + tl.where(row == 0, skip, 0)
    return start, first, inside, index + row, place


@triton.jit(
    do_not_specialize_on_alignment=[
        "step_size", "group", "sum_sq", "hyper", "grad_scale", "origin", "noise_key",
        "exp_avg_scale",
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
    if _finite(scale):
        start, first_NV, inside_NV, row_NV, place_NV = _window(tiles, 4, VEC, TILE)
        param, exp_avg = _state(param, exp_avg, weight, tiles, 4, VEC)
        _, place_V = _vectors(TILE // VEC, VEC)
        step_NV = tl.load(step_size + row_NV, mask=inside_NV, other=0)
        group_NV = tl.load(group + row_NV, mask=inside_NV, other=0)
        decay_NV = tl.load(hyper + group_NV * 3 + 2, mask=inside_NV, other=0)
        before_NV, after_NV = _load_scales(exp_avg_scale, row_NV, inside_NV)
        number = place_V
        if STOCHASTIC:
            number_NV = place_NV + tl.load(origin + row_NV, mask=inside_NV, other=0)
            number = (number_NV + tl.load(noise_key)).to(tl.uint32) + place_V.to(tl.uint32)

        offset = start + (first_NV + place_V)
        mask = tl.broadcast_to(inside_NV, (TILE // VEC, VEC))
        g = _load(grad, offset, mask)
        _update(
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
    if _finite(scale):
        start, first_NV, inside_NV, row_NV, place_NV = _window(tiles, 5, VEC, TILE)
        param, exp_avg = _state(param, exp_avg, weight, tiles, 5, VEC)
        packed = tl.multiple_of(tl.load(tiles + tl.program_id(0).to(tl.int64) * 5 + 4), VEC)
        _, place_V = _vectors(TILE // VEC, VEC)
        group_NV = tl.load(group + row_NV, mask=inside_NV, other=0)
        lr_NV = tl.load(hyper + group_NV * 3, mask=inside_NV, other=0)
        eps_NV = tl.load(hyper + group_NV * 3 + 1, mask=inside_NV, other=1)
        decay_NV = tl.load(hyper + group_NV * 3 + 2, mask=inside_NV, other=0)
        rate_NV = tl.div_rn(lr_NV, tl.load(corrections))
        correction2 = tl.load(corrections + 1)
        number = place_V
        if STOCHASTIC:
            number_NV = place_NV + tl.load(origin + row_NV, mask=inside_NV, other=0)
            number = (number_NV + tl.load(noise_key)).to(tl.uint32) + place_V.to(tl.uint32)

        offset = start + (first_NV + place_V)
        offset_sq = packed + (first_NV + place_V)
        mask = tl.broadcast_to(inside_NV, (TILE // VEC, VEC))
        g = _load(grad, offset, mask)
        v = tl.load(exp_avg_sq + offset_sq, mask=mask, other=0)
        m = _load_moment(exp_avg, offset, mask, _scale(v)) * beta1 + g * (scale * one_minus_beta1)
        p = _load_param(param, weight, offset, mask)
        g = g * scale
        v = v * beta2 + g * g * one_minus_beta2
        tl.store(exp_avg_sq + offset_sq, v, mask=mask)
        # m first, as in _update.
        _store_moment(exp_avg, offset, mask, m, number, _scale(v), STOCHASTIC)
        root = tl.sqrt_rn(tl.div_rn(v, tl.broadcast_to(correction2, v.shape))) + eps_NV
        p = p * decay_NV - tl.div_rn(m * rate_NV, root)
        _store_param(param, weight, offset, mask, p)


@triton.jit
def _row_tile(tiles, VEC: tl.constexpr):
    """Return a row tile's start, row length, number of rows, first entry, and part number."""
    tile = tiles + tl.program_id(0).to(tl.int64) * 3
    start, length = _place(tile, VEC, VEC)
    _, count = _place(tile + 1, VEC)
    index, partial = _pair(tile + 2)
    return start, length, count, index, partial


@triton.jit
def _rectangle(
    start, length, count, column,
    VEC: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Return offset, place in the row, and mask of a tile's elements from ``column`` on."""
    row = tl.arange(0, ROWS)[:, None, None]
    first = column + (tl.arange(0, COLUMNS // VEC) * VEC)[None, :, None]
    inside = (row < count) & (first < length)
    place = first + tl.arange(0, VEC)[None, None, :]
    offset = start + (row * length + place)
    return offset, place.to(tl.uint32), tl.broadcast_to(inside, (ROWS, COLUMNS // VEC, VEC))


@triton.jit
def _row_sums(
    grad, start, length, count,
    VEC: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Return the sums of squares of the rows of a tile."""
    total = tl.zeros((ROWS, COLUMNS // VEC, VEC), tl.float32)
    for column in range(0, length, COLUMNS):
        offset, _, mask = _rectangle(start, length, count, column, VEC, COLUMNS, ROWS)
        g = _load(grad, offset, mask)
        total += g * g
    return tl.sum(tl.sum(total, axis=2), axis=1)


@triton.jit(do_not_specialize_on_alignment=["sum_sq", "partials"])
def sum_kernel(
    sum_sq, partials, grad, tiles,
    VEC: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sum the squares of whole segments into ``sum_sq``, of parts into ``partials``."""
    start, length, count, index, partial = _row_tile(tiles, VEC)
    row = tl.arange(0, ROWS)
    total = _row_sums(grad, start, length, count, VEC, COLUMNS, ROWS)
    tl.store(sum_sq + index + row, total, mask=(row < count) & (partial < 0))
    tl.store(partials + partial + row, total, mask=(row < count) & (partial >= 0))


@triton.jit
def _advanced_v(v, sum_sq, inv_numel, lr, eps, corrections, scale, beta2, one_minus_beta2):
    """Return v after the step, and the step size of its block."""
    mean_sq = sum_sq * inv_numel * (scale * scale)
    v = v * beta2 + mean_sq * one_minus_beta2
    correction1 = tl.broadcast_to(tl.load(corrections), v.shape)
    correction2 = tl.broadcast_to(tl.load(corrections + 1), v.shape)
    return v, tl.div_rn(tl.div_rn(lr, correction1), tl.sqrt_rn(tl.div_rn(v, correction2)) + eps)


@triton.jit
def _step_sizes(
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
    before, after = _scale(v_before), _scale(v)
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
    if _finite(scale):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = at < num
        if index is not None:
            at = tl.load(index + at, mask=mask, other=0)
        total = tl.load(sum_sq + at, mask=mask, other=0)
        _step_sizes(
            exp_avg_sq, step_size, exp_avg_scale, total, inv_numel, group, hyper, corrections,
            at, mask, scale, beta2, one_minus_beta2,
        )  # fmt: skip


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
    owner = owners + tl.program_id(0).to(tl.int64) * 3
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
        if _finite(scale):
            tl.store(sum_sq + at, total)
            total_1 = tl.broadcast_to(total, (1,))
            _step_sizes(
                exp_avg_sq, step_size, exp_avg_scale, total_1, inv_numel, group, hyper, corrections,
                at + tl.arange(0, 1), tl.full((1,), 1, tl.int1), scale, beta2, one_minus_beta2,
            )  # fmt: skip


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
    if _finite(scale):
        start, length, count, index, _ = _row_tile(tiles, VEC)
        param, exp_avg = _state(param, exp_avg, weight, tiles, 3, VEC)
        if ONCE:
            offset, place, mask = _rectangle(start, length, count, 0, VEC, COLUMNS, ROWS)
            g = _load(grad, offset, mask)
            total = tl.sum(tl.sum(g * g, axis=2), axis=1)
        else:
            total = _row_sums(grad, start, length, count, VEC, COLUMNS, ROWS)
        row = tl.arange(0, ROWS)
        tl.store(sum_sq + index + row, total, mask=row < count)
        inside = row < count
        step, group_R, before, after = _step_sizes(
            exp_avg_sq, step_size, exp_avg_scale, total, inv_numel, group, hyper, corrections,
            index + row, inside, scale, beta2, one_minus_beta2,
        )  # fmt: skip
        decay = tl.load(hyper + group_R * 3 + 2, mask=inside, other=0)[:, None, None]
        step = step[:, None, None]
        before, after = before[:, None, None], after[:, None, None]
        inside = inside[:, None, None]
        factor = scale * one_minus_beta1
        number = tl.zeros((ROWS, 1, 1), tl.uint32)
        if STOCHASTIC:
            number_R = tl.load(origin + index + row, mask=row < count, other=0)
            number = (number_R + tl.load(noise_key)).to(tl.uint32)[:, None, None]
        if ONCE:
            _update(
                param, exp_avg, weight, g, offset, mask & inside, step, decay, factor, beta1,
                number + place, before, after, STOCHASTIC,
            )  # fmt: skip
        else:
            for column in range(0, length, COLUMNS):
                offset, place, mask = _rectangle(start, length, count, column, VEC, COLUMNS, ROWS)
                g = _load(grad, offset, mask)
                _update(
                    param, exp_avg, weight, g, offset, mask & inside, step, decay, factor, beta1,
                    number + place, before, after, STOCHASTIC,
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
    bad = tl.sum(tl.where(_finite(value), 0, 1), axis=0).to(tl.float64)
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
