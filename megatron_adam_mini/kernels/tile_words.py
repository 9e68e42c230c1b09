"""How tiles of the Triton kernels lie in device memory: several fields in each 64-bit word.

Imports numpy. Data flow: tiles of ``triton_tiles`` -> **words** -> ``triton_launch_tables``.
The kernels take the words apart again in ``triton_addresses``.

A word is a number, or one of two kinds. A *place* has a position in its upper 48 bits, which stand
for positions up to 1.4e14 of either sign, and a number below 65,536 in the others. A *pair* has two
numbers, of which the kernels use 32 bits each. The first two words of every tile are places: its
start in the buffer, and the shift from there to the state.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_adam_mini.plan.partition import IntArray

#: Fields of each word; upper part first.
WINDOW_WORDS = (("start", "low"), ("shift_state", "high"), ("index", "skip"), ("shift", "length"))
#: The same, and a position in a packed stream, for elements with a second moment each.
PACKED_WORDS = (*WINDOW_WORDS, ("packed", None))
COLUMN_WORDS = (
    ("start", "low"),
    ("shift_state", "high"),
    ("index", None),
    ("place", "width"),
    ("row_stride", "number"),
)
ROW_WORDS = (("start", "length"), ("shift_state", "count"), ("index", "partial"))

Words = Sequence[tuple[str, str | None]]


def words(tiles: IntArray, fields: Sequence[str], layout: Words) -> IntArray:
    """Pack tiles into words.

    Args:
        tiles: int64, shape ``(T, fields)``.
        fields: names of its columns.
        layout: fields of each word.

    Returns:
        int64, shape ``(T, words)``.
    """
    column = dict(zip(fields, tiles.T, strict=True))
    found = []
    for number, (upper, lower) in enumerate(layout):
        if lower is None:
            found.append(column[upper])
        elif number < 2:
            found.append(_place(column[upper], column[lower]))
        else:
            found.append(column[upper] << 32 | column[lower] & 0xFFFFFFFF)
    return np.stack(found, axis=1)


def _place(position: IntArray, number: IntArray) -> IntArray:
    """Return places.

    Raises:
        ValueError: a position has more than 48 bits.
    """
    found: IntArray = position << 16 | number
    if (found >> 16 != position).any():
        raise ValueError(
            f"Adam-mini's Triton kernels reach positions below 2**47 = {2**47:,} in a buffer, got "
            f"{int(np.abs(position).max()):,}. Remedy: more data- or model-parallel ranks."
        )
    return found
