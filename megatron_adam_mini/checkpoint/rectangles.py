"""A flat run of a row-major tensor as a few boxes, so that it can be stored without a copy.

Standard library only. Data flow: layout (which elements a rank owns) -> **rectangles**
-> mcore/model_space (checkpoint entries).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple


class Rectangle(NamedTuple):
    """A box of a tensor whose elements are the run ``[begin, end)`` of the flattened tensor."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    begin: int
    end: int


def rectangles(shape: tuple[int, ...], begin: int, end: int) -> list[Rectangle]:
    """Cut the elements ``[begin, end)`` of a flattened tensor into boxes, in flat order.

    For a matrix they are the end of a row, whole rows, the start of a row. In general there are at
    most ``2 * ndim - 1``; none is empty (a checkpoint identifies a box by its offset alone, so an
    empty one would collide with its neighbour).

    Raises:
        ValueError: the run is not within the tensor.
    """
    numel = math.prod(shape)
    if not 0 <= begin <= end <= numel:
        raise ValueError(f"[{begin}, {end}) is not a run of the {numel} elements of shape {shape}.")
    return list(_boxes(shape, begin, end, (), 0)) if begin < end else []


def _boxes(
    shape: tuple[int, ...], begin: int, end: int, index: tuple[int, ...], origin: int
) -> Iterator[Rectangle]:
    """Yield the boxes of ``[begin, end)`` of the sub-tensor at ``index``; it starts at origin."""
    ones = (1,) * len(index)
    if not shape:
        yield Rectangle(index, ones, origin + begin, origin + end)
        return
    row = math.prod(shape[1:])
    first, last = -(-begin // row), end // row  # whole rows
    if first > last:  # within one row, touching neither of its ends
        yield from _boxes(
            shape[1:], begin - last * row, end - last * row, (*index, last), origin + last * row
        )
        return
    if begin < first * row:
        above = first - 1
        yield from _boxes(
            shape[1:], begin - above * row, row, (*index, above), origin + above * row
        )
    if first < last:
        offset = (*index, first, *(0,) * (len(shape) - 1))
        box = (*ones, last - first, *shape[1:])
        yield Rectangle(offset, box, origin + first * row, origin + last * row)
    if last * row < end:
        yield from _boxes(shape[1:], 0, end - last * row, (*index, last), origin + last * row)
