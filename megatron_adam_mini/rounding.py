"""How float32 becomes 16 or 8 bits: model weights, exact remainders, a low-precision ``exp_avg``.

Imports torch. These functions specify, bit for bit, what every backend does.

A float32 value is rounded to the nearest bfloat16 weight, **ties away from zero**. Ties to even,
torch's rule, would make remainders impossible: an even weight would stand for 65,537 float32 values
(both ties round to it), one more than 16 bits can tell apart. With ties away from zero every weight
stands for 65,536, so weight and remainder make up the float32 value, and all modes train with the
same weights. The rules differ at exact ties only. Transformer Engine's remainders use the same one.

**m in 8 bits** is a code of E4M3, torch's ``float8_e4m3fn`` (Micikevicius et al., arXiv:2209.05433:
3 bits of mantissa, from 2**-9 to 448), times a scale: the largest power of two not above sqrt(v) of
the element's block. So a scale needs neither memory nor a pass over m, is the same under every
parallel layout, and ``code * scale`` is exact in float32. ``|m| <= C sqrt(v)`` with
``C^2 = n (1 - beta1)^2 / ((1 - beta2) (1 - beta1^2 / beta2))`` for an element of a block of ``n``
(Cauchy-Schwarz), and a block of elements that are alike reaches a few units; what exceeds 448
scales becomes 448 scales. Codes are rounded stochastically, because a decay of m by less than half
of its last bit, such as 0.95, would otherwise never happen. 8-bit optimizers that scale by the
largest ``|m|`` of a block of elements: Dettmers et al., arXiv:2110.02861.
``benchmarks/moment_codes.py`` compares the two (result of 2026-11-28: no loss told apart).
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

#: A number, or numbers.
Numbers = TypeVar("Numbers", int, Tensor)


def to_weight(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32: to bfloat16 with ties away from zero, to float16 with ties to even."""
    return split(value)[0] if dtype == torch.bfloat16 else value.to(dtype)


def split(value: Tensor) -> tuple[Tensor, Tensor]:
    """Return bfloat16 weight and int16 remainder of float32 values; :func:`join` is the inverse.

    NaNs lose their payload; every other value, infinities included, comes back bit for bit.
    """
    bits = torch.where(value.isnan(), torch.nan, value).view(torch.int32)
    weight = (bits + 0x8000) >> 16
    return weight.to(torch.int16).view(torch.bfloat16), (bits - (weight << 16)).to(torch.int16)


def is_rounded(weight: Tensor, value: Tensor) -> Tensor:
    """Return where float32 ``value`` rounds to ``weight`` under either rule for ties.

    For state of any origin: torch breaks ties to even, Transformer Engine's remainders away from
    zero.
    """
    to_even, away = value.to(weight.dtype), to_weight(value, weight.dtype)
    return (to_even == weight) | (away == weight) | (value.isnan() & weight.isnan())


def join(weight: Tensor, remainder: Tensor) -> Tensor:
    """Return the float32 values that :func:`split` was given."""
    bits = (weight.view(torch.int16).to(torch.int32) << 16) + remainder.to(torch.int32)
    return bits.view(torch.float32)


def mix32(value: Numbers) -> Numbers:
    """Return a 32-bit hash of numbers (the finaliser of MurmurHash3, public domain).

    Args:
        value: a number, or int64 numbers; only their lower 32 bits count.
    """
    value = value & 0xFFFFFFFF
    value = (value ^ (value >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    value = (value ^ (value >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return value ^ (value >> 16)


def noise16(number: Tensor, key: Tensor) -> Tensor:
    """Return 16 random bits per element, int64 in ``[0, 65536)``.

    Args:
        number: int64 element numbers; only their lower 32 bits count.
        key: int64 scalar, different in each step.
    """
    return mix32(number + key) >> 16


def to_bfloat16_stochastic(value: Tensor, noise: Tensor) -> Tensor:
    """Round float32 up or down to bfloat16, so that the mean over the noise is the value.

    Args:
        value: float32.
        noise: 16 bits per element, see :func:`noise16`.
    """
    bits = torch.where(value.isnan(), torch.nan, value).view(torch.int32)
    return ((bits + noise.to(torch.int32)) >> 16).to(torch.int16).view(torch.bfloat16)


#: Largest code of E4M3, and the code of NaN.
FP8_MAX, _FP8_NAN = 448.0, 0x7F


def fp8_scale(v: Tensor) -> Tensor:
    """Return the scale of the codes of m: the largest power of two not above sqrt(v).

    Args:
        v: float32, not negative; subnormal numbers count as ``2**-127``.

    Returns:
        float32, from ``2**-64`` to ``2**64``.
    """
    exponent = (v.view(torch.int32) >> 23) & 0xFF
    return (((exponent + 127) >> 1) << 23).view(torch.float32)


def from_fp8(code: Tensor, scale: Tensor) -> Tensor:
    """Return what codes (uint8) stand for, float32."""
    return code.view(torch.float8_e4m3fn).float() * scale


def to_fp8(value: Tensor, scale: Tensor) -> Tensor:
    """Return the nearest codes of float32 values, ties to even; inverse of :func:`from_fp8`."""
    ratio = torch.where(value.isinf(), torch.nan, value / scale).clamp(-FP8_MAX, FP8_MAX)
    return ratio.to(torch.float8_e4m3fn).view(torch.uint8)


def to_fp8_stochastic(value: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
    """Return the codes next to float32 values, so that the mean over the noise is the value.

    The values must not exceed 448 scales for that; where they do, the result is 448 scales. It is
    NaN, without a sign, where they are not finite.

    Args:
        value: float32.
        scale: of the codes, see :func:`fp8_scale`.
        noise: 16 bits per element, see :func:`noise16`.
    """
    ratio = (value.abs() / scale).clamp(max=FP8_MAX)
    # A code is the upper bits of a float32, and a carry leads to the next. Subnormal codes, below
    # 2**-6, lie as close as those above: 2**-6 is added, and what it stands for taken off.
    subnormal = ratio < 2.0**-6
    bits = torch.where(subnormal, ratio + 2.0**-6, ratio).view(torch.int32)
    code = ((bits + (noise.to(torch.int32) << 4)) >> 20) - torch.where(subnormal, 968, 960)
    code = code | ((value.view(torch.int32) >> 24) & 0x80)
    return torch.where(value.isfinite(), code, _FP8_NAN).to(torch.uint8)
