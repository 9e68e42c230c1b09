"""Sums of squared gradients over whole blocks, also of blocks that several ranks hold.

Imports torch, numpy, ``plan``, ``blocks`` and ``mesh_rows``. :func:`complete_` has the collectives.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from megatron_adam_mini.plan.partition import IntArray
from megatron_adam_mini.plan.segment_table import SegmentTable
from megatron_adam_mini.standalone.blocks import Blocks
from megatron_adam_mini.standalone.mesh_rows import MeshRows


class BlockSums:
    """The sums of one parameter's blocks, for each of its rows on this rank.

    Kernels sum over *runs*, adjacent rows of one block; runs are added up to blocks by gathering,
    not by scattering, whose order of additions a GPU does not fix.

    Args:
        rows: what this rank holds.
        blocks: of the whole parameter.
        row_numel: elements of a row on this rank.
        device: where the parameter is.

    Attributes:
        sum_sq_S: float32, one sum per row of this rank.
        cut_C: float32, the sums of blocks that other ranks hold parts of; empty if nothing is cut.
        groups: process groups that add them up, one after the other.
        in_one_pass: each row is a block that this rank holds all of, so that the update itself can
            sum up, and nothing here is used.
    """

    def __init__(
        self, rows: MeshRows, blocks: Blocks, *, row_numel: int, device: torch.device
    ) -> None:
        def to_device(values: IntArray) -> Tensor:
            return torch.from_numpy(values).to(device)

        block_S, num_rows = rows.block_S, len(rows.block_S)
        self.groups = rows.groups
        self.sum_sq_S = torch.zeros(num_rows, dtype=torch.float32, device=device)
        self.cut_C = torch.zeros(0, dtype=torch.float32, device=device)
        first_S = np.flatnonzero(np.diff(block_S, prepend=-1))
        self._table = SegmentTable(
            first_S * row_numel, np.append(first_S[1:], num_rows) * row_numel
        )
        self._rows_are_blocks = blocks.rows_are_blocks
        self.in_one_pass = self._rows_are_blocks and rows.cut is not None
        if self._rows_are_blocks:
            if rows.cut is None:
                self.cut_C = self.sum_sq_S
            return
        # The last entry stays zero: blocks without rows here, and blocks of fewer runs, read it.
        self._runs = torch.zeros(len(first_S) + 1, dtype=torch.float32, device=device)
        self._block_sums = torch.zeros(blocks.num_blocks, dtype=torch.float32, device=device)
        self._runs_of_block = to_device(_runs_of_blocks(block_S[first_S], blocks.num_blocks))
        self._block_S = to_device(block_S)
        if rows.cut is not None and len(rows.cut):
            self._cut = to_device(rows.cut)
            self.cut_C = torch.zeros(len(rows.cut), dtype=torch.float32, device=device)

    def sum_squares_(self, grad_N: Tensor | None, kernels: ModuleType) -> None:
        """Sum up what this rank holds; a gradient that is missing counts as zero.

        Args:
            grad_N: gradient on this rank, row after row.
            kernels: a backend.
        """
        self.cut_C.zero_()
        if grad_N is None or not grad_N.numel():
            return
        if self._rows_are_blocks:
            kernels.segment_sum_sq_(self.sum_sq_S, grad_N, self._table)
            return
        kernels.segment_sum_sq_(self._runs, grad_N, self._table)
        torch.sum(self._runs[self._runs_of_block], dim=1, out=self._block_sums)
        if len(self.cut_C):
            self.cut_C.copy_(self._block_sums[self._cut])

    def spread_(self) -> None:
        """Give every row the complete sum of its block: fill ``sum_sq_S``."""
        if self._rows_are_blocks:
            return
        if len(self.cut_C):
            self._block_sums[self._cut] = self.cut_C
        torch.index_select(self._block_sums, 0, self._block_S, out=self.sum_sq_S)


def complete_(sums: Iterable[BlockSums]) -> None:
    """Add up the sums of cut blocks over the ranks that hold them; all of these must call it.

    Collectives: one all-reduce per process group that cuts a block, none if nothing is cut.

    Args:
        sums: of all parameters, in the same order on every rank; ``cut_C`` is modified in place.
    """
    exchanged: dict[Any, list[Tensor]] = {}
    for one in sums:
        for group in one.groups:
            exchanged.setdefault(group, []).append(one.cut_C)
    for group, parts in exchanged.items():
        total = torch.cat(parts)
        distributed.all_reduce(total, group=group)
        for part, values in zip(parts, torch.split(total, [*map(len, parts)]), strict=True):
            part.copy_(values)


def _runs_of_blocks(block_of_run: IntArray, num_blocks: int) -> IntArray:
    """Return the runs of each block, shape ``(num_blocks, most)``, filled up with one past all."""
    counts = np.bincount(block_of_run, minlength=num_blocks)
    found = np.full((num_blocks, int(counts.max(initial=1))), len(block_of_run), dtype=np.int64)
    order = np.argsort(block_of_run, kind="stable")
    first = np.cumsum(counts) - counts
    found[block_of_run[order], np.arange(len(order)) - first[block_of_run[order]]] = order
    return found
