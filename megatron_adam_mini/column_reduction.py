"""The collectives that complete the sums of one domain's columns.

Imports ``plan`` and ``exchange``. Data flow: partial sums of this rank -> **ColumnReduction**
-> sums over whole columns. ``plan/column_sums`` describes the exchange; ``collectives`` owns it.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from megatron_adam_mini import exchange
from megatron_adam_mini.plan.column_sums import ColumnPlan


class ColumnReduction:
    """Completes the sums of columns, with preallocated buffers.

    Args:
        plan: this rank's positions.
        dp_group: group whose ranks share the buckets' slices; unused if ``plan.dp_size == 1``.
        tp_group: tensor-parallel group; unused if it splits no rows of a column set.
        device: device of the sums.
    """

    def __init__(
        self,
        plan: ColumnPlan,
        *,
        dp_group: distributed.ProcessGroup | None,
        tp_group: distributed.ProcessGroup | None,
        device: torch.device,
    ) -> None:
        self.plan = plan
        self.dp_group = dp_group
        self.tp_group = tp_group

        def zeros(numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(numel, dtype=dtype, device=device)

        self._segment, self._position, self._crossing = (
            torch.from_numpy(positions).to(device)
            for positions in (plan.segment, plan.position, plan.crossing)
        )
        self._columns = zeros(plan.numel)
        self._received = zeros(plan.numel if plan.dp_size > 1 else 0)
        self._share = zeros(plan.share_numel) if plan.dp_size > 1 else self._columns
        self._total = zeros(plan.numel, torch.float64)
        largest = max([part.stop - part.start for part in plan.rounds], default=0)
        self._picked64 = zeros(largest, torch.float64)
        self._picked = zeros(max(len(plan.segment), len(plan.crossing)))
        self._gathered = zeros(plan.tp_size * len(plan.crossing))

    @property
    def collectives(self) -> list[tuple[str, int]]:
        """Collectives of one step: name and bytes of the vector that this rank receives."""
        found = []
        if self.plan.numel and self.plan.dp_size > 1:
            received = 4 * self.plan.numel
            found += [("dp columns, all-to-all", received), ("dp columns, all-gather", received)]
        if len(self._gathered):
            found.append(("tp columns, all-gather", 4 * len(self._gathered)))
        return found

    def complete_(self, sum_sq_S: Tensor) -> None:
        """Complete the sums of columns (modified in place); all ranks of both groups must call it.

        Collectives: all-to-all in the data-parallel group, all-gather in the tensor-parallel group,
        all-gather in the data-parallel group; each is left out where it would add nothing.

        Args:
            sum_sq_S: this rank's partial sums, float32, shape ``(S,)``.
        """
        if not self.plan.numel:
            return
        self._add_own(sum_sq_S)
        if self.plan.dp_size > 1:
            exchange.all_to_all_single(self._received, self._columns, group=self.dp_group)
            self._add_rows(self._received.view(self.plan.dp_size, -1), self._share)
        if len(self._gathered):
            offered = self._picked[: len(self._crossing)]
            torch.index_select(self._share, 0, self._crossing, out=offered)
            exchange.all_gather_into_tensor(self._gathered, offered, group=self.tp_group)
            self._add_rows(self._gathered.view(self.plan.tp_size, -1), offered)
            self._share.index_copy_(0, self._crossing, offered)
        if self.plan.dp_size > 1:
            exchange.all_gather_into_tensor(self._columns, self._share, group=self.dp_group)
        whole = self._picked[: len(self._segment)]
        torch.index_select(self._columns, 0, self._position, out=whole)
        sum_sq_S.index_copy_(0, self._segment, whole)

    def _add_own(self, sum_sq_S: Tensor) -> None:
        """Add this rank's segments of each column: no place twice at once, so in a fixed order."""
        self._total.zero_()
        for part in self.plan.rounds:
            segment, position = self._segment[part], self._position[part]
            added, total = self._picked[: len(segment)], self._picked64[: len(segment)]
            torch.index_select(sum_sq_S, 0, segment, out=added)
            torch.index_select(self._total, 0, position, out=total)
            self._total.index_copy_(0, position, total.add_(added))
        self._columns.copy_(self._total)

    def _add_rows(self, rows: Tensor, out: Tensor) -> None:
        """Write the sum of rows, added in their order in float64."""
        total = self._total[: rows.shape[1]].zero_()
        for row in rows:
            total.add_(row)
        out.copy_(total)
