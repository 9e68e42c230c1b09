"""How the Triton kernels read and write numbers: conversions from and to float32.

Imports triton. Data flow: memory -> **float32** -> the kernels' arithmetic -> **memory**.

bfloat16 tensors are passed as int16, their bits, and rounded in integer arithmetic. Main parameters
in int16 are remainders, which weights in bfloat16 complete; m in uint8 consists of codes, whose
scales follow from v. What is rounded how: ``rounding``.
"""

# mypy: ignore-errors
# (Triton's language has no types.)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_float32(stream, offset, mask):
    """Load as float32; int16 holds the bits of bfloat16."""
    value = tl.load(stream + offset, mask=mask, other=0)
    if stream.dtype.element_ty == tl.int16:
        result = (value.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        result = value.to(tl.float32)
    return result


@triton.jit
def bits_of(value):
    """Return the bits of float32 values, the same for all NaNs."""
    return tl.where(value != value, 0x7FC00000, value.to(tl.int32, bitcast=True))


@triton.jit
def is_finite(value):
    """Return whether float32 values are neither infinite nor NaN."""
    return tl.abs(value) < float("inf")


@triton.jit
def noise16(number):
    """Return 16 random bits per uint32 number; see ``rounding.noise16``."""
    bits = (number ^ (number >> 16)) * tl.full((), 0x85EBCA6B, tl.uint32)
    bits = (bits ^ (bits >> 13)) * tl.full((), 0xC2B2AE35, tl.uint32)
    return (bits >> 16).to(tl.int32)  # the hash's last step leaves this half as it is


@triton.jit
def load_param(param, weight, offset, mask):
    """Load main parameters, or join them from weight and remainder."""
    if param.dtype.element_ty == tl.int16:
        high = tl.load(weight + offset, mask=mask, other=0).to(tl.int32) << 16
        low = tl.load(param + offset, mask=mask, other=0).to(tl.int32)
        p = (high + low).to(tl.float32, bitcast=True)
    else:
        p = tl.load(param + offset, mask=mask, other=0)
    return p


@triton.jit
def store_param(param, weight, offset, mask, p):
    """Store main parameters and model weights, or weights and remainders."""
    if weight is not None:
        if weight.dtype.element_ty == tl.int16:
            bits = bits_of(p)
            high = (bits + 0x8000) >> 16
            tl.store(weight + offset, high.to(tl.int16), mask=mask)
            if param.dtype.element_ty == tl.int16:
                tl.store(param + offset, (bits - (high << 16)).to(tl.int16), mask=mask)
        elif weight.dtype.element_ty == tl.float16:
            tl.store(weight + offset, p.to(tl.float16), mask=mask)
    if param.dtype.element_ty == tl.float32:
        tl.store(param + offset, p, mask=mask)


@triton.jit
def load_moment(exp_avg, offset, mask, scale):
    """Load m as float32; ``scale`` is that of its codes, if it consists of these."""
    if exp_avg.dtype.element_ty == tl.uint8:
        m = from_fp8(tl.load(exp_avg + offset, mask=mask, other=0).to(tl.int32), scale)
    else:
        m = load_float32(exp_avg, offset, mask)
    return m


@triton.jit
def store_moment(exp_avg, offset, mask, m, number, scale, STOCHASTIC: tl.constexpr):
    """Store m; if it is stored as bfloat16, round it to the nearest or with noise."""
    if exp_avg.dtype.element_ty == tl.uint8:
        tl.store(exp_avg + offset, to_fp8_stochastic(m, scale, number), mask=mask)
    elif exp_avg.dtype.element_ty == tl.int16:
        bits = bits_of(m) + (noise16(number) if STOCHASTIC else 0x8000)
        tl.store(exp_avg + offset, (bits >> 16).to(tl.int16), mask=mask)
    else:
        tl.store(exp_avg + offset, m, mask=mask)


@triton.jit
def fp8_scale(v):
    """Return the scale of codes of m; see ``rounding.fp8_scale``."""
    exponent = (v.to(tl.int32, bitcast=True) >> 23) & 0xFF
    return (((exponent + 127) >> 1) << 23).to(tl.float32, bitcast=True)


@triton.jit
def load_scales(exp_avg_scale, at, mask):
    """Return the scales of codes of m before and after the step, if m consists of codes."""
    if exp_avg_scale is not None:
        before = tl.load(exp_avg_scale + at * 2, mask=mask, other=1)
        after = tl.load(exp_avg_scale + at * 2 + 1, mask=mask, other=1)
    else:
        before, after = 1.0, 1.0
    return before, after


@triton.jit
def from_fp8(code, scale):
    """Return what codes stand for, see ``rounding.from_fp8``: their exponents are 120 apart."""
    size = code & 0x7F
    value = (size << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2**120
    bits = tl.where(size == 0x7F, 0x7FC00000, value.to(tl.int32, bitcast=True))
    return (bits | ((code & 0x80) << 24)).to(tl.float32, bitcast=True) * scale


@triton.jit
def to_fp8_stochastic(m, scale, number):
    """Return a code next to m, see ``rounding.to_fp8_stochastic``."""
    bits = m.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # Scales are powers of two, and so are their inverses.
    inverse = (0x7F000000 - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    ratio = size.to(tl.float32, bitcast=True) * inverse
    ratio = tl.where(ratio < 448.0, ratio, 448.0)
    subnormal = ratio < 0.015625  # 2**-6
    moved = tl.where(subnormal, ratio + 0.015625, ratio).to(tl.int32, bitcast=True)
    code = ((moved + (noise16(number) << 4)) >> 20) - tl.where(subnormal, 968, 960)
    code = code | ((bits >> 24) & 0x80)
    return tl.where(size >= 0x7F800000, 0x7F, code).to(tl.uint8)
