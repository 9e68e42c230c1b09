"""The only collectives of a step: data parallel, tensor parallel, norm.

Imports ``plan`` and ``exchange``. Data flow: partial sums of this rank
-> **Collectives** -> sums over whole blocks, and the squared norm of the whole gradient.

Every rank calls, in this order, :meth:`Collectives.start_`, :meth:`Collectives.add_over_model_`
(not in a single-phase step) and :meth:`Collectives.finish_`. The plan alone determines what is
sent, so a collective is left out on all ranks of its group or on none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from megatron_adam_mini import exchange
from megatron_adam_mini.plan.ordered_sums import OrderedSums, numel_of
from megatron_adam_mini.plan.step_plan import StepPlan

T = TypeVar("T")


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
        kernels: backend, of which ``ordered_sum_`` is called.
        device: device of the sums.

    Attributes:
        sum_sq_SR: sums of squares of this rank's segments and element ranges, float32, shape
            ``(SR,)``; :meth:`start_` and :meth:`finish_` complete those of cut blocks in place.
    """

    def __init__(
        self,
        plan: StepPlan,
        groups: Sequence[DomainGroups],
        kernels: ModuleType,
        *,
        device: torch.device,
    ) -> None:
        self._plan = plan
        self._groups = groups
        self._kernels = kernels
        self._values = torch.zeros(plan.num_values, dtype=torch.float32, device=device)
        self.sum_sq_SR = self._values[: len(plan.parameter_SR)]
        rows, columns = plan.reductions, plan.columns
        # One table for all domains, so each is one launch.
        self._own_columns = OrderedSums.joined([plan.own for plan in columns])
        self._columns_over_dp = OrderedSums.joined([plan.over_dp for plan in columns])
        self._columns_over_tp = OrderedSums.joined([plan.over_tp for plan in columns])
        self._before_dp = OrderedSums.joined(
            [plan.result for plan in columns] + [plan.before_dp for plan in rows]
        )
        self._between = OrderedSums.joined([plan.between for plan in rows])
        self._after_tp = OrderedSums.joined([plan.after_tp for plan in rows])
        self._in_flight: list[exchange.Work] = []

    @property
    def nbytes(self) -> int:
        """Bytes of the sums, of what is exchanged, and of the tables made so far for both."""
        tables = (
            self._own_columns,
            self._columns_over_dp,
            self._columns_over_tp,
            self._before_dp,
            self._between,
            self._after_tp,
        )
        return self._values.nbytes + sum(table.derived_bytes for table in tables)

    def start_(self) -> None:
        """Complete sums over data parallelism (in place) and start those over tensor parallelism.

        Collectives: all-reduce in the dense and the expert data-parallel group; all-reduce in the
        dense and the expert tensor-parallel group, which stay in flight. If blocks are columns,
        theirs come first, each of both domains: all-to-all in the data-parallel groups, all-gather
        in the tensor-parallel groups, all-gather in the data-parallel groups. Each is left out
        where it would add nothing.
        """
        self._exchange_columns_()
        self._sum_(self._before_dp)
        for plan, groups in self._domains(self._plan.reductions):
            if plan.dp_numel:
                exchange.all_reduce(self._values[plan.dp_vector], group=groups.dp)
        self._wait()  # for what was left by a step that was skipped
        self._sum_(self._between)
        for plan, groups in self._domains(self._plan.reductions):
            if plan.tp_numel:
                vector = self._values[plan.tp_vector]
                work = exchange.all_reduce(vector, group=groups.tp, async_op=True)
                assert work is not None
                self._in_flight.append(work)

    def finish_(self) -> None:
        """Wait for the all-reduces of :meth:`start_`, and put the sums in their places."""
        if self._in_flight:
            self._wait()
            self._sum_(self._after_tp)

    def _exchange_columns_(self) -> None:
        values = self._values
        self._sum_(self._own_columns)
        for plan, groups in self._domains(self._plan.columns):
            if numel_of(plan.received):
                exchange.all_to_all_single(
                    values[plan.received], values[plan.columns], group=groups.dp
                )
        self._sum_(self._columns_over_dp)
        for plan, groups in self._domains(self._plan.columns):
            if numel_of(plan.gathered):
                exchange.all_gather_into_tensor(
                    values[plan.gathered], values[plan.crossing], group=groups.tp
                )
        self._sum_(self._columns_over_tp)
        for plan, groups in self._domains(self._plan.columns):
            if numel_of(plan.received):
                exchange.all_gather_into_tensor(
                    values[plan.columns], values[plan.share], group=groups.dp
                )

    def _sum_(self, table: OrderedSums) -> None:
        if len(table):
            self._kernels.ordered_sum_(self._values, table)

    def _wait(self) -> None:
        for work in self._in_flight:
            work.wait()
        self._in_flight = []

    def _domains(self, plans: Sequence[T]) -> Iterator[tuple[T, DomainGroups]]:
        return zip(plans, self._groups, strict=True)

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
        plan = self._plan
        found: dict[str, int] = {}
        for domain, rows, columns in zip(plan.domains, plan.reductions, plan.columns, strict=True):
            received = numel_of(columns.received)
            sent = {
                "dp": rows.dp_numel,
                "tp": rows.tp_numel,
                "dp columns, all-to-all": received,
                "dp columns, all-gather": received,
                "tp columns, all-gather": numel_of(columns.gathered),
            }
            found |= {f"{domain.name} {name}": 4 * n for name, n in sent.items() if n}
        return {"collectives": len(found), "bytes": sum(found.values()), "by_group": found}
