"""Where parameters lie in the buckets of a buffer, and which slice of each a rank owns.

Imports ``partition``. Everything here is integers, computed once at construction and never
changed. Words and shape suffixes: see the docstring of ``plan``.

Data flow: offsets of Megatron's buckets -> **BufferLayout** -> ``segments``, ``cut_blocks``.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from megatron_adam_mini.plan.partition import IntArray

#: A number, or numbers.
Numbers = TypeVar("Numbers", int, IntArray)


@dataclass(frozen=True)
class Placement:
    """Where one parameter lies in a bucket: ``[start, end)``, in elements of the bucket."""

    parameter: int
    start: int
    end: int


@dataclass(frozen=True)
class BucketLayout:
    """The integers of one bucket, equal on all ranks that share it.

    Attributes:
        numel: elements, padding included.
        num_slices: equal slices, one per data-parallel rank.
        placements: in ascending order.
        offset: first element of the bucket in its buffer.
    """

    numel: int
    num_slices: int
    placements: tuple[Placement, ...]
    offset: int = 0

    def __post_init__(self) -> None:
        """Check what everything below relies on."""
        if self.numel % self.num_slices:
            raise ValueError(
                f"A bucket of {self.numel} elements cannot be cut into {self.num_slices} equal "
                "slices; Megatron pads buckets so that it can, so this layout is not its own."
            )

    @property
    def slice_numel(self) -> int:
        """Elements of one slice."""
        return self.numel // self.num_slices

    def overlapping(self, begin: int, end: int) -> tuple[Placement, ...]:
        """Return the placements that have elements in ``[begin, end)``."""
        first = bisect_right(self._ends, begin)
        return self.placements[first : max(first, bisect_left(self._starts, end))]

    @cached_property
    def _starts(self) -> list[int]:
        return [placement.start for placement in self.placements]

    @cached_property
    def _ends(self) -> list[int]:
        return [placement.end for placement in self.placements]


@dataclass(frozen=True)
class BufferLayout:
    """The buckets of one buffer, one after the other, all with the same number of slices."""

    buckets: tuple[BucketLayout, ...]

    def __post_init__(self) -> None:
        """Check what everything below relies on."""
        ends = [bucket.offset + bucket.numel for bucket in self.buckets]
        for end, following in zip(ends, self.buckets[1:], strict=False):
            if following.offset < end:
                raise ValueError(
                    f"A bucket starts at element {following.offset} of its buffer, inside of the "
                    f"one that ends at {end}; Megatron's buckets do not overlap."
                )
        if len({bucket.num_slices for bucket in self.buckets}) > 1:
            raise ValueError(
                "The buckets of a buffer are cut into different numbers of slices "
                f"({sorted({bucket.num_slices for bucket in self.buckets})}); one data-parallel "
                "group shares all of them."
            )


#: Positions in state and buffer are equal modulo this (64 bytes of float32), so one vector access
#: suits all tensors of an element, wherever the slice begins.
STATE_ALIGNMENT = 16


def state_starts(buffer: BufferLayout, rank: Numbers) -> tuple[list[Numbers], Numbers]:
    """Return where the state of each slice of a rank starts, and the length of all of it.

    The slices follow one another, each at the next position that equals that of its gradients
    modulo :data:`STATE_ALIGNMENT`; so fewer elements than that are unused per slice.

    Args:
        buffer: the buffer.
        rank: data-parallel rank that owns the slices; or an array of ranks, for an array of starts.
    """
    starts, end = [], rank * 0
    for bucket in buffer.buckets:
        begin = bucket.offset + rank * bucket.slice_numel
        starts.append(end + (begin - end) % STATE_ALIGNMENT)
        end = starts[-1] + bucket.slice_numel
    return starts, end
