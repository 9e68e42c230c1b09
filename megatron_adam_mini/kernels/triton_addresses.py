"""Which elements a program of the Triton kernels treats, and where they are.

Imports triton. Data flow: words of tiles (``tile_words``) -> **positions, masks, entries** -> the
update and sum kernels.

There are two kinds of tiles, see ``triton_tiles``: *windows*, whose elements are independent of
each other, and *row tiles*, which hold whole segments. Both are treated as vectors of ``VEC``
elements that one thread moves in one access: masks are per vector, because a mask per element would
split the access.

Shape suffixes: ``_NV`` one entry per vector of a window, shape ``(vectors, 1)``; ``_V`` one per
element of a vector, ``(1, VEC)``; ``_R`` one per row of a row tile. Elements of a row tile have the
shape ``(rows, vectors of a row, VEC)``.
"""

# mypy: ignore-errors
# (Triton's language has no types.)

from __future__ import annotations

import triton
import triton.language as tl

from megatron_adam_mini.kernels.tile_words import (
    COLUMN_WORDS,
    PACKED_WORDS,
    ROW_WORDS,
    WINDOW_WORDS,
)

#: Words of each kind of tile.
WINDOW = tl.constexpr(len(WINDOW_WORDS))
PACKED = tl.constexpr(len(PACKED_WORDS))
COLUMN_WINDOW = tl.constexpr(len(COLUMN_WORDS))
ROW = tl.constexpr(len(ROW_WORDS))


@triton.jit
def vectors(COUNT: tl.constexpr, VEC: tl.constexpr):
    """Return the first element of each vector, and each element's place in its vector."""
    return (tl.arange(0, COUNT) * VEC)[:, None], tl.arange(0, VEC)[None, :]


@triton.jit
def words_of_program(table, WORDS: tl.constexpr):
    """Return the address of what a table with so many words per program has for this one."""
    return table + tl.program_id(0).to(tl.int64) * WORDS


@triton.jit
def place_in(word, VEC: tl.constexpr, OF_NUMBER: tl.constexpr = 1):
    """Return the position and the number in a word of a tile; see ``tile_words``.

    They are multiples of ``VEC`` and of ``OF_NUMBER``. The compiler hears of it here: what is said
    of the result of a call is lost.
    """
    value = tl.load(word)
    number = tl.multiple_of((value & 0xFFFF).to(tl.int32), OF_NUMBER)
    return tl.multiple_of(value >> 16, VEC), number


@triton.jit
def pair_in(word):
    """Return the two numbers in a word of a tile, of which the lower 32 bits count."""
    value = tl.load(word)
    return value >> 32, value.to(tl.int32)


@triton.jit
def state_seen_from_buffer(param, exp_avg, weight, tile, VEC: tl.constexpr):
    """Return pointers to the state, such that positions in the buffer address it.

    float32 weights, which are their own main parameters, lie in the buffer.
    """
    shift, _ = place_in(tile + 1, VEC)
    if weight is not None:
        param = param + shift
    return param, exp_avg + shift


@triton.jit
def window(tile, VEC: tl.constexpr, TILE: tl.constexpr):
    """Return a window's start, and its vectors ``(NV, 1)`` with mask, row and place in the row.

    Of places, the lower 32 bits count.
    """
    start, low = place_in(tile, VEC)
    _, high = place_in(tile + 1, VEC)
    index, skip = pair_in(tile + 2)
    shift, length = pair_in(tile + 3)
    shift = shift.to(tl.int32)
    first, _ = vectors(TILE // VEC, VEC)
    inside = (first >= low) & (first < high)
    row = ((shift + first).to(tl.uint32) // length.to(tl.uint32)).to(tl.int32)
    place = shift + first - row * length + tl.where(row == 0, skip, 0)
    return start, first, inside, index + row, place


@triton.jit
def numbers_in_window(
    origin, noise_key, row_NV, place_NV, inside_NV, place_V, STOCHASTIC: tl.constexpr
):  # fmt: skip
    """Return the numbers of a window's elements, for stochastic rounding; else something."""
    number = place_V
    if STOCHASTIC:
        number_NV = place_NV + tl.load(origin + row_NV, mask=inside_NV, other=0)
        number = (number_NV + tl.load(noise_key)).to(tl.uint32) + place_V.to(tl.uint32)
    return number


@triton.jit
def row_tile(tile, VEC: tl.constexpr):
    """Return a row tile's start, row length, number of rows, first entry, and part number."""
    start, length = place_in(tile, VEC, VEC)
    _, count = place_in(tile + 1, VEC)
    index, partial = pair_in(tile + 2)
    return start, length, count, index, partial


@triton.jit
def rectangle(
    start, length, count, column,
    VEC: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Return offset, place in the row, and mask of a row tile's elements from ``column`` on."""
    row = tl.arange(0, ROWS)[:, None, None]
    first = column + (tl.arange(0, COLUMNS // VEC) * VEC)[None, :, None]
    inside = (row < count) & (first < length)
    place = first + tl.arange(0, VEC)[None, None, :]
    offset = start + (row * length + place)
    return offset, place.to(tl.uint32), tl.broadcast_to(inside, (ROWS, COLUMNS // VEC, VEC))
