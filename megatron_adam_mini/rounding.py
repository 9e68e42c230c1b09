"""How float32 becomes 16 bits: model weights, exact remainders, and a low-precision ``exp_avg``.

Imports torch. These functions specify, bit for bit, what every backend does.

A float32 value is rounded to the nearest bfloat16 weight, **ties away from zero**. Ties to even,
torch's rule, would make remainders impossible: an even weight would stand for 65,537 float32 values
(both ties round to it), one more than 16 bits can tell apart. With ties away from zero every weight
stands for 65,536, so weight and remainder make up the float32 value, and all modes train with the
same weights. The rules differ at exact ties only. Transformer Engine's remainders use the same one.
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
    return mix32(number + key) & 0xFFFF


def to_bfloat16_stochastic(value: Tensor, noise: Tensor) -> Tensor:
    """Round float32 up or down to bfloat16, so that the mean over the noise is the value.

    Args:
        value: float32.
        noise: 16 bits per element, see :func:`noise16`.
    """
    bits = torch.where(value.isnan(), torch.nan, value).view(torch.int32)
    return ((bits + noise.to(torch.int32)) >> 16).to(torch.int16).view(torch.bfloat16)
