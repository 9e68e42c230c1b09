"""Which rows of a parameter this rank holds, and which ranks hold the rest of their blocks.

Imports torch, numpy and ``blocks``. A plain tensor is whole. A ``DTensor`` is cut along the
dimensions that its placements shard: by ``fully_shard``, tensor parallelism, or both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import (
    _compute_local_shape_and_global_offset as shape_and_offset,
)
from torch.distributed.tensor.placement_types import _StridedShard

from megatron_adam_mini.plan.partition import IntArray
from megatron_adam_mini.standalone.blocks import Blocks


@dataclass(frozen=True, eq=False)
class MeshRows:
    """The rows of a parameter on this rank.

    Attributes:
        first: row of the whole parameter at which this rank's rows start.
        count: rows of this rank.
        groups: process groups over which the sums of cut blocks are added, one after the other.
        cut: int64, blocks that are cut; ``None``: all rows are blocks of their own, and each of
            them is cut.
    """

    first: int
    count: int
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
        if not isinstance(placement, Replicate | Shard | _StridedShard):
            raise NotImplementedError(
                f"Parameter {name!r} has placements {tuple(param.placements)}; AdamMini allows "
                "Replicate and Shard. Remedy: param.redistribute(placements=...) before the "
                "optimizer is made."
            )


def mesh_rows(param: Tensor, blocks: Blocks) -> MeshRows:
    """Find this rank's rows, and the blocks that other ranks hold parts of.

    Raises:
        NotImplementedError: rows of heads are cut unevenly by two mesh dimensions.
    """
    no_blocks = np.empty(0, dtype=np.int64)
    if not isinstance(param, DTensor):
        return MeshRows(0, blocks.num_rows, (), no_blocks)
    mesh, placements = param.device_mesh, row_placements(param, blocks.row_dim)
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(
            f"Parameter {blocks.name!r} lies on {mesh}, to which this rank does not belong. "
            "Remedy: give each rank's optimizer the parameters that it holds."
        )
    by_row = [dim for dim, placement in enumerate(placements) if not _is_replicate(placement)]
    by_width = [
        dim
        for dim, placement in enumerate(param.placements)
        if not _is_replicate(placement) and dim not in by_row
    ]
    sizes = tuple(mesh.shape)
    by_row, by_width = ([d for d in dims if sizes[d] > 1] for dims in (by_row, by_width))
    (count,), (first,) = shape_and_offset((blocks.num_rows,), sizes, list(coordinate), placements)
    own = blocks.rows_are_blocks or blocks.block_of_row is None
    cut: IntArray | None = no_blocks
    if by_width and blocks.block_of_row is not None:
        cut = None if own else np.arange(blocks.num_blocks)
    elif by_row and not own:
        cut = _cut_blocks(blocks, _ranges(blocks, sizes, tuple(placements)))
    dims: Sequence[int] = by_width if own else [*by_row, *by_width]
    if cut is not None and not len(cut):
        dims = ()
    return MeshRows(first, count, tuple(mesh.get_group(dim) for dim in dims), cut)


def row_placements(param: DTensor, row_dim: int) -> list[Any]:
    """Return the placements of a tensor with one element per row."""
    found: list[Any] = []
    for placement in param.placements:
        if not isinstance(placement, Shard | _StridedShard) or placement.dim != row_dim:
            found.append(Replicate())
        elif isinstance(placement, _StridedShard):
            found.append(_StridedShard(0, split_factor=placement.split_factor))
        else:
            found.append(Shard(0))
    return found


def zeros_of_rows(param: Tensor, rows: MeshRows, blocks: Blocks) -> Tensor:
    """Return float32 zeros with one element per row, sharded as the parameter's rows are."""
    if not isinstance(param, DTensor):
        return torch.zeros(rows.count, device=param.device)
    # From a meta tensor, since others would be moved to the mesh's kind of device, and the
    # parameter may lie in host memory (CPUOffloadPolicy).
    layout = DTensor.from_local(
        torch.empty(rows.count, device="meta"),
        param.device_mesh,
        row_placements(param, blocks.row_dim),
        run_check=False,
        shape=torch.Size((blocks.num_rows,)),
        stride=(1,),
    )
    return torch.zeros_like(layout, device=param.device)


def _is_replicate(placement: Any) -> bool:
    return isinstance(placement, Replicate)


def _ranges(
    blocks: Blocks, sizes: tuple[int, ...], placements: tuple[Any, ...]
) -> tuple[tuple[int, int], ...]:
    strided = any(isinstance(placement, _StridedShard) for placement in placements)
    parts = [size for size, p in zip(sizes, placements, strict=True) if not _is_replicate(p)]
    if strided and blocks.num_rows % int(np.prod(parts)):
        raise NotImplementedError(
            f"Parameter {blocks.name!r}: {blocks.num_rows} rows are cut by two mesh dimensions of "
            f"{' x '.join(map(str, parts))} ranks, which do not divide them. Remedy: sizes that "
            f"do, or rules={{{blocks.name!r}: 'row'}}, whose blocks need no row numbers."
        )
    return _ranges_of_ranks(blocks.num_rows, sizes, placements)


@lru_cache(maxsize=256)
def _ranges_of_ranks(
    num_rows: int, sizes: tuple[int, ...], placements: tuple[Any, ...]
) -> tuple[tuple[int, int], ...]:
    """Return first and one-past-last row of each rank of the mesh dimensions that cut rows."""
    found = []
    steps = [
        range(1) if _is_replicate(p) else range(n) for n, p in zip(sizes, placements, strict=True)
    ]
    for coordinate in product(*steps):
        (count,), (first,) = shape_and_offset((num_rows,), sizes, list(coordinate), placements)
        found.append((first, first + count))
    return tuple(found)


def _cut_blocks(blocks: Blocks, ranges: Sequence[tuple[int, int]]) -> IntArray:
    """Return the blocks with rows on several ranks."""
    assert blocks.block_of_row is not None
    owner = np.zeros(blocks.num_rows, dtype=np.int64)
    for rank, (begin, end) in enumerate(ranges):
        owner[begin:end] = rank
    lowest = np.full(blocks.num_blocks, len(ranges), dtype=np.int64)
    highest = np.full(blocks.num_blocks, -1, dtype=np.int64)
    np.minimum.at(lowest, blocks.block_of_row, owner)
    np.maximum.at(highest, blocks.block_of_row, owner)
    return np.flatnonzero(lowest != highest)
