"""Buckets -> state that a rank keeps in host memory with ``--optimizer-cpu-offload``.

Imports ``plan``. The rule is that of a run, ``plan.shares``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from megatron_adam_mini.plan.layout import BufferLayout, state_starts
from megatron_adam_mini.plan.partition import ParameterBlocks
from megatron_adam_mini.plan.shares import host_start


class _Piece(NamedTuple):
    """What a slice holds of a parameter: number of the buffer, position in its state, elements."""

    buffer: int
    start: int
    numel: int
    is_elementwise: bool


def host_size(
    buffers: Sequence[BufferLayout],
    parameters: Sequence[ParameterBlocks],
    rank: int,
    fraction: float,
) -> tuple[int, int]:
    """Return how many elements of m, and of v per element, a rank has in host memory.

    Args:
        buffers: of one domain.
        parameters: placements index into them.
        rank: data-parallel rank.
        fraction: ``--optimizer-offload-fraction``.
    """
    pieces = [
        piece
        for number, buffer in enumerate(buffers)
        for piece in _pieces(number, buffer, parameters, rank)
    ]
    chosen = pieces[host_start([piece.numel for piece in pieces], fraction) :]
    state = 0
    for number, buffer in enumerate(buffers):
        here = [piece for piece in chosen if piece.buffer == number]
        if here:
            is_whole = len(here) == sum(piece.buffer == number for piece in pieces)
            state += state_starts(buffer, rank)[1] - (0 if is_whole else here[0].start)
    return state, sum(piece.numel for piece in chosen if piece.is_elementwise)


def _pieces(
    number: int, buffer: BufferLayout, parameters: Sequence[ParameterBlocks], rank: int
) -> list[_Piece]:
    found = []
    for bucket, start in zip(buffer.buckets, state_starts(buffer, rank)[0], strict=True):
        begin = rank * bucket.slice_numel
        for placement in bucket.overlapping(begin, begin + bucket.slice_numel):
            first = max(placement.start - begin, 0)
            last = min(placement.end - begin, bucket.slice_numel)
            is_elementwise = parameters[placement.parameter].pattern is None
            found.append(_Piece(number, start + first, last - first, is_elementwise))
    return found
