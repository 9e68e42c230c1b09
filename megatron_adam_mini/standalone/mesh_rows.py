"""Which rows of a parameter this rank holds, and which ranks hold the rest of their blocks.

Imports torch, numpy and ``blocks``. A plain tensor is whole. A ``DTensor`` is cut along the
dimensions that its placements shard: by ``fully_shard``, tensor parallelism, or both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from megatron_adam_mini.plan.partition import IntArray
from megatron_adam_mini.standalone.blocks import Blocks


@dataclass(frozen=True, eq=False)
class MeshRows:
    """The rows of a parameter on this rank.

    Attributes:
        block_S: int64, the block of each row; where all rows are blocks of their own, these are
            counted on this rank.
        groups: process groups over which the sums of cut blocks are added, one after the other.
        cut: int64, blocks that are cut; ``None``: all rows are blocks of their own, and each of
            them is cut.
    """

    block_S: IntArray
    groups: tuple[Any, ...]
    cut: IntArray | None


def local(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor, as a view."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def check_placements(name: str, param: Tensor) -> None:
    """Check that a parameter is laid out in a way in which blocks can be completed.

    Raises:
        NotImplementedError: it is not.
    """
    if not isinstance(param, DTensor):
        return
    for placement in param.placements:
        if not isinstance(placement, Replicate) and not _is_shard(placement):
            raise NotImplementedError(
                f"Parameter {name!r} has placements {tuple(param.placements)}; AdamMini allows "
                "Replicate and Shard. Remedy: param.redistribute(placements=...) before the "
                "optimizer is made."
            )


def mesh_rows(param: Tensor, blocks: Blocks) -> MeshRows:
    """Find this rank's rows, and the blocks that other ranks hold parts of.

    Raises:
        ValueError: the parameter lies on ranks to which this one does not belong.
        NotImplementedError: rows of heads are cut unevenly by two mesh dimensions.
    """
    own = blocks.rows_are_blocks or blocks.block_of_row is None
    shape = local(param).shape
    num_rows = math.prod(shape[dim] for dim in blocks.row_dims) if shape else 1
    block_S = np.arange(num_rows) if own else blocks.block_of_row
    assert block_S is not None
    no_blocks = np.empty(0, dtype=np.int64)
    if not isinstance(param, DTensor):
        return MeshRows(block_S, (), no_blocks)
    mesh, placements = param.device_mesh, _placements(param)
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(
            f"Parameter {blocks.name!r} lies on {mesh}, to which this rank does not belong. "
            "Remedy: give each rank's optimizer the parameters that it holds."
        )
    sharding = [d for d in range(mesh.ndim) if _is_shard(placements[d]) and mesh.size(d) > 1]
    by_row = [d for d in sharding if placements[d].dim in blocks.row_dims]
    by_width = [d for d in sharding if d not in by_row]
    cut: IntArray | None = no_blocks
    if by_row and not own:
        rows_of_ranks = _rows_of_ranks(blocks, [(mesh.size(d), placements[d]) for d in by_row])
        cut = _cut_blocks(blocks, rows_of_ranks)
        rank = np.ravel_multi_index([coordinate[d] for d in by_row], [mesh.size(d) for d in by_row])
        block_S = block_S[rows_of_ranks[rank]]
    if by_width and blocks.block_of_row is not None:
        cut = None if own else np.arange(blocks.num_blocks)
    dims = by_width if own else [*by_row, *by_width]
    if cut is not None and not len(cut):
        dims = []
    return MeshRows(block_S, tuple(mesh.get_group(dim) for dim in dims), cut)


def row_placements(param: DTensor, row_dims: tuple[int, ...]) -> list[Any]:
    """Return the placements of a tensor with one element per row."""
    found: list[Any] = []
    for placement in _placements(param):
        if not _is_shard(placement) or placement.dim not in row_dims:
            found.append(Replicate())
        else:
            factor = {"split_factor": _split_factor(placement)} if _is_strided(placement) else {}
            found.append(type(placement)(row_dims.index(placement.dim), **factor))
    return found


def zeros_of_rows(param: Tensor, blocks: Blocks) -> Tensor:
    """Return float32 zeros with one element per row, sharded as the parameter's rows are."""
    shape = local(param).shape
    rows = tuple(shape[dim] for dim in blocks.row_dims) if shape else (1,)
    if not isinstance(param, DTensor):
        return torch.zeros(rows, dtype=torch.float32, device=param.device)
    # From a meta tensor, since others would be moved to the mesh's kind of device, and the
    # parameter may lie in host memory (CPUOffloadPolicy).
    layout = DTensor.from_local(
        torch.empty(rows, dtype=torch.float32, device="meta"),
        param.device_mesh,
        row_placements(param, blocks.row_dims),
        run_check=False,
        shape=torch.Size(blocks.row_shape),
        stride=torch.empty(blocks.row_shape, device="meta").stride(),
    )
    return torch.zeros_like(layout, device=param.device)


def _placements(param: DTensor) -> tuple[Any, ...]:
    return tuple(param.placements)


def _is_shard(placement: Any) -> bool:
    return isinstance(placement, Shard) or _is_strided(placement)


def _is_strided(placement: Any) -> bool:
    """Return whether a placement is one that ``fully_shard`` gives to tensor-parallel weights.

    It cuts what a later dimension of the mesh has cut before. torch has no public name for it.
    """
    return hasattr(placement, "split_factor")


def _split_factor(placement: Any) -> int:
    """Return into how many parts others have cut a dimension before this placement does."""
    return placement.split_factor if _is_strided(placement) else 1


def _rows_of_ranks(blocks: Blocks, cuts: Sequence[tuple[int, Any]]) -> list[IntArray]:
    sizes = [size for size, _ in cuts]
    if any(_is_strided(placement) for _, placement in cuts) and blocks.num_rows % math.prod(sizes):
        # What torch then says a rank holds is not always what fully_shard gave it.
        raise NotImplementedError(
            f"Parameter {blocks.name!r}: {blocks.num_rows} rows are cut by two mesh dimensions of "
            f"{' x '.join(map(str, sizes))} ranks, which do not divide them. Remedy: sizes that "
            f"do, or rules={{{blocks.name!r}: 'row'}}, whose blocks need no row numbers."
        )
    return rows_of_ranks(
        blocks.num_rows, tuple((size, _split_factor(placement)) for size, placement in cuts)
    )


@lru_cache(maxsize=256)
def rows_of_ranks(num_rows: int, cuts: tuple[tuple[int, int], ...]) -> list[IntArray]:
    """Return the rows of each rank of the mesh dimensions that cut them, the last one fastest.

    Args:
        num_rows: of the whole parameter.
        cuts: ranks and split factor of each of these dimensions. Ranks get equal parts, rounded
            up, as by ``torch.chunk``; what is left for the last ones is less, or nothing. With a
            split factor each rank gets such a part of each of that many parts.
    """
    found = [np.arange(num_rows, dtype=np.int64)]
    for ranks, factor in cuts:
        found = [
            np.concatenate([_part(piece, ranks, rank) for piece in pieces])
            for rows in found
            for pieces in [[_part(rows, factor, number) for number in range(factor)]]
            for rank in range(ranks)
        ]
    return found


def _part(rows: IntArray, parts: int, number: int) -> IntArray:
    size = -(-len(rows) // parts)
    return rows[number * size : (number + 1) * size]


def _cut_blocks(blocks: Blocks, rows_of_ranks: Sequence[IntArray]) -> IntArray:
    """Return the blocks with rows on several ranks."""
    assert blocks.block_of_row is not None
    owner = np.zeros(blocks.num_rows, dtype=np.int64)
    for rank, rows in enumerate(rows_of_ranks):
        owner[rows] = rank
    lowest = np.full(blocks.num_blocks, len(rows_of_ranks), dtype=np.int64)
    highest = np.full(blocks.num_blocks, -1, dtype=np.int64)
    np.minimum.at(lowest, blocks.block_of_row, owner)
    np.maximum.at(highest, blocks.block_of_row, owner)
    return np.flatnonzero(lowest != highest)
