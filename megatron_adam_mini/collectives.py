"""The only collectives of a step: data parallel, tensor parallel, norm.

Imports ``plan``, ``column_reduction`` and ``exchange``. Data flow: partial sums of this rank
-> **Collectives** -> sums over whole blocks, and the squared norm of the whole gradient.

Every rank calls, in this order, :meth:`Collectives.start_`, :meth:`Collectives.add_over_model_`
(not in a single-phase step) and :meth:`Collectives.finish_`. The plan alone determines what is
sent, so a collective is left out on all ranks of its group or on none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from megatron_adam_mini import exchange
from megatron_adam_mini.column_reduction import ColumnReduction
from megatron_adam_mini.plan.partition import IntArray
from megatron_adam_mini.plan.reduction import ReductionPlan
from megatron_adam_mini.plan.step_plan import StepPlan


@dataclass(frozen=True)
class DomainGroups:
    """Process groups of one domain.

    Attributes:
        dp: its ranks share the slices of each bucket; unused if buckets have one slice.
        tp: its ranks split the parameters; unused if it has one rank.
        norm: its ranks add up their parts of the gradient norm; ``None``: all ranks.
    """

    dp: ProcessGroup | None = None
    tp: ProcessGroup | None = None
    norm: ProcessGroup | None = None


class Collectives:
    """Completes the sums of all domains of a rank, and adds up the norm.

    Args:
        plan: this rank's plan.
        groups: process groups of each of its domains.
        device: device of the sums.
    """

    def __init__(
        self, plan: StepPlan, groups: Sequence[DomainGroups], *, device: torch.device
    ) -> None:
        self._plan = plan
        self._groups = groups
        self._columns = [
            (
                ColumnReduction(columns, dp_group=group.dp, tp_group=group.tp, device=device),
                of_domain,
            )
            for columns, of_domain, group in zip(
                plan.columns, plan.domain_segments, groups, strict=True
            )
        ]
        self._domains = [
            (
                Reduction(
                    reduction,
                    of_domain.stop - of_domain.start,
                    dp_group=group.dp,
                    tp_group=group.tp,
                    device=device,
                ),
                of_domain,
            )
            for reduction, of_domain, group in zip(
                plan.reductions, plan.domain_segments, groups, strict=True
            )
        ]

    def start_(self, sum_sq_S: Tensor) -> None:
        """Complete sums over data parallelism (in place) and start those over tensor parallelism.

        Collectives: all-gather in the dense and the expert data-parallel group; all-reduce in the
        dense and the expert tensor-parallel group. The all-reduces stay in flight. If blocks are
        columns, those of ``ColumnReduction`` come first.

        Args:
            sum_sq_S: this rank's partial sums, float32, shape ``(S,)``.
        """
        for columns, of_domain in self._columns:
            columns.complete_(sum_sq_S[of_domain])
        for reduction, of_domain in self._domains:
            reduction.complete_over_dp_(sum_sq_S[of_domain])
        for reduction, of_domain in self._domains:
            reduction.start_tp(sum_sq_S[of_domain])

    def finish_(self, sum_sq_S: Tensor) -> None:
        """Wait for the all-reduces of :meth:`start_`, and put the sums in their places."""
        for reduction, of_domain in self._domains:
            reduction.finish_tp_(sum_sq_S[of_domain])

    def add_over_model_(self, values_D: Tensor) -> None:
        """Add up numbers of each domain over all ranks of the model: squared norms, or counts.

        Collectives: one all-reduce, or one per domain where their norm groups differ.

        Args:
            values_D: one number or row per domain, modified in place.
        """
        self._reduce_over_model_(values_D, distributed.ReduceOp.SUM)

    def max_over_model_(self, values_D: Tensor) -> None:
        """Take the largest of each number over all ranks; else as :meth:`add_over_model_`."""
        self._reduce_over_model_(values_D, distributed.ReduceOp.MAX)

    def add_over_shards_(self, values: Tensor, domain: int, *, over_tp: bool) -> None:
        """Add up numbers of one parameter over the ranks that hold parts of it.

        Collectives: an all-reduce in the data-parallel group, one in the tensor-parallel group,
        each left out if its ranks hold the same.

        Args:
            values: modified in place.
            domain: index of the parameter's domain.
            over_tp: whether tensor parallelism splits it.
        """
        layout, group = self._plan.domains[domain], self._groups[domain]
        if layout.num_slices > 1:
            exchange.all_reduce(values, group=group.dp)
        if over_tp and layout.tp_size > 1:
            exchange.all_reduce(values, group=group.tp)

    def _reduce_over_model_(self, values_D: Tensor, op: Any) -> None:
        if not distributed.is_initialized():
            return
        if all(group.norm == self.norm_group for group in self._groups):
            exchange.all_reduce(values_D, op, group=self.norm_group)
        else:
            for row, group in zip(values_D, self._groups, strict=True):
                exchange.all_reduce(row, op, group=group.norm)

    @property
    def norm_group(self) -> ProcessGroup | None:
        """Group over which the dense norm is added up; ``None``: all ranks."""
        return self._groups[0].norm

    def per_step(self) -> dict[str, Any]:
        """Return the collectives that complete cut blocks, and the bytes that this rank receives.

        The norm's all-reduce is left out: every optimizer that clips has it.
        """
        found = {
            f"{domain.name} {group}": num_bytes
            for domain, (reduction, _), (columns, _) in zip(
                self._plan.domains, self._domains, self._columns, strict=True
            )
            for group, num_bytes in [*reduction.collectives, *columns.collectives]
        }
        return {"collectives": len(found), "bytes": sum(found.values()), "by_group": found}


class Reduction:
    """Completes the sums of one domain, with preallocated buffers.

    A step calls, on all ranks of both groups and in this order, :meth:`complete_over_dp_`,
    :meth:`start_tp`, :meth:`finish_tp_`; work that does not depend on blocks cut by tensor
    parallelism may run between the last two.

    Args:
        plan: this rank's positions.
        num_segments: S of the domain.
        dp_group: group whose ranks share the buckets' slices; unused if ``plan.dp_size == 1``.
        tp_group: tensor-parallel group; unused if ``plan.tp_size == 1``.
        device: device of the sums.
    """

    def __init__(
        self,
        plan: ReductionPlan,
        num_segments: int,
        *,
        dp_group: distributed.ProcessGroup | None,
        tp_group: distributed.ProcessGroup | None,
        device: torch.device,
    ) -> None:
        self.plan = plan
        self.dp_group = dp_group
        self.tp_group = tp_group

        def zeros(numel: int) -> Tensor:
            return torch.zeros(numel, dtype=torch.float32, device=device)

        # Parts of the vector that the tensor-parallel group adds up: plain sums, then places that
        # belong to one rank each, for sums of segments and for sums of slots.
        self._tp_vector = zeros(plan.tp_numel)
        self._plain, places = self._tp_vector.tensor_split([len(plan.tp_plain)])
        begin = plan.tp_rank * plan.num_exact
        own = places[begin : begin + plan.num_exact]
        self._exact, self._slots = own.tensor_split([len(plan.tp_exact)])

        gathered = plan.dp_size * plan.num_contributions
        self._gathered = zeros(gathered)
        self._offered = zeros(plan.num_contributions) if plan.gathers else self._gathered
        self._offer = OrderedSum(plan.contribution, num_segments, device)
        self._sum_dp = OrderedSum(plan.dp_table, gathered, device)
        self._sum_slots = OrderedSum(plan.tp_slot_table, gathered, device)
        self._sum_tp = OrderedSum(plan.tp_table, len(places), device)
        self._places = places
        self._tp_plain, self._tp_exact, self._dp_target, self._tp_target = (
            torch.from_numpy(positions).to(device)
            for positions in (plan.tp_plain, plan.tp_exact, plan.dp_target, plan.tp_target)
        )
        self._dp_sums = zeros(len(plan.dp_target))
        self._tp_sums = zeros(len(plan.tp_target))
        self._in_flight: exchange.Work | None = None

    @property
    def collectives(self) -> list[tuple[str, int]]:
        """Collectives of one step: group and bytes of the vector that this rank receives."""
        found = []
        if self.plan.gathers:
            found.append(("dp", 4 * self._gathered.numel()))
        if self.plan.tp_numel:
            found.append(("tp", 4 * self._tp_vector.numel()))
        return found

    def complete_over_dp_(self, sum_sq_S: Tensor) -> None:
        """Complete the sums of blocks that data parallelism cuts (modified in place).

        Args:
            sum_sq_S: this rank's partial sums, float32, shape ``(S,)``.
        """
        if self.plan.num_contributions == 0:
            return
        self._offer(sum_sq_S, out=self._offered)
        if self.plan.gathers:
            exchange.all_gather_into_tensor(self._gathered, self._offered, group=self.dp_group)
        if len(self._dp_target):
            self._sum_dp(self._gathered, out=self._dp_sums)
            sum_sq_S.index_copy_(0, self._dp_target, self._dp_sums)

    def start_tp(self, sum_sq_S: Tensor) -> None:
        """Start the all-reduce of the sums of blocks that tensor parallelism cuts.

        Args:
            sum_sq_S: sums that are complete over data parallelism, float32, shape ``(S,)``.
        """
        if self.plan.tp_numel == 0:
            return
        if self._in_flight is not None:  # left by a step that was skipped
            self._in_flight.wait()
        self._tp_vector.zero_()
        torch.index_select(sum_sq_S, 0, self._tp_plain, out=self._plain)
        torch.index_select(sum_sq_S, 0, self._tp_exact, out=self._exact)
        if len(self._slots):
            self._sum_slots(self._gathered, out=self._slots)
        self._in_flight = exchange.all_reduce(self._tp_vector, group=self.tp_group, async_op=True)

    def finish_tp_(self, sum_sq_S: Tensor) -> None:
        """Wait for the all-reduce of :meth:`start_tp`, and put the sums in their places."""
        if self._in_flight is None:
            return
        self._in_flight.wait()
        self._in_flight = None
        sum_sq_S.index_copy_(0, self._tp_plain, self._plain)
        if len(self._tp_target):
            self._sum_tp(self._places, out=self._tp_sums)
            sum_sq_S.index_copy_(0, self._tp_target, self._tp_sums)


class OrderedSum:
    """``out[i] = sum_j source[table[i, j]]``, added from left to right; -1 stands for zero.

    The order of additions depends on the table alone, so equal inputs give equal bits on every
    rank and device. Adding zero is exact, so wider tables change nothing. Allocates at construction
    only.

    Args:
        table: int64 positions, shape ``(rows, k)``.
        num_source: entries of the source.
        device: of source and result.
    """

    def __init__(self, table: IntArray, num_source: int, device: torch.device) -> None:
        rows = len(table)
        positions = np.where(table < 0, num_source, table)  # -1 reads the zero at the end
        self._columns = torch.from_numpy(np.ascontiguousarray(positions.T)).to(device)
        self._padded = torch.zeros(num_source + 1 if rows else 1, device=device)
        self._column = torch.zeros(rows, device=device)
        self._total = torch.zeros(rows, dtype=torch.float64, device=device)

    def __call__(self, source: Tensor, *, out: Tensor) -> None:
        """Write the sums to ``out``, float32, shape ``(rows,)``."""
        if not len(out):
            return
        self._padded[:-1].copy_(source)
        self._total.zero_()
        for positions in self._columns:
            torch.index_select(self._padded, 0, positions, out=self._column)
            self._total.add_(self._column)
        out.copy_(self._total)
