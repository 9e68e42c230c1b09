"""Adam-mini on the slices of one rank: the state, and the step next to its equations.

Imports everything below it (config, plan, collectives, main_params, kernels, and what a step needs
besides its equations) and no Megatron. One gradient shard goes through a step like this::

    gradients --sum_squares--> partial sums --data, tensor parallel--> sums over whole blocks
                                    |                                          |
                            norm, non-finite?                         v, step size per block
                                    | decide                                   |
    gradients ------------------ grad_scale -------- update ----> m, main parameter, model weight

Where the squares of gradients overflow float32, ``wide_sums`` and ``wide_means`` take the place of
the first row; ``coupled_decay`` is an addition to it, ``host_update`` the last row for state in
host memory.

Shape suffixes: see the docstring of ``plan``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_adam_mini.collectives import Collectives, DomainGroups
from megatron_adam_mini.config import AdamMiniConfig, OffloadConfig
from megatron_adam_mini.coupled_decay import add_decay_
from megatron_adam_mini.decision import Decision, Decisions, Outcome
from megatron_adam_mini.early_buffers import NO_EARLY_BUFFERS, EarlyBuffers
from megatron_adam_mini.exchange import alone
from megatron_adam_mini.host_update import HostUpdate
from megatron_adam_mini.hyper_parameters import HyperParameters
from megatron_adam_mini.kernels import (
    BufferTensors,
    SegmentVectors,
    StepScalars,
    select_backend,
    sum_squares_,
)
from megatron_adam_mini.main_params import MainParams
from megatron_adam_mini.overlapped_sums import OverlappedSums
from megatron_adam_mini.plan.bucket_tables import BucketTables
from megatron_adam_mini.plan.buffer_plan import BufferPlan
from megatron_adam_mini.plan.column_table import ColumnTable
from megatron_adam_mini.plan.segment_table import SegmentTable
from megatron_adam_mini.plan.shares import plan_shares
from megatron_adam_mini.plan.step_plan import Piece, StepPlan
from megatron_adam_mini.state import Buffer, BufferState, RankState
from megatron_adam_mini.step_vectors import StepVectors
from megatron_adam_mini.wide_means import write_means_
from megatron_adam_mini.wide_sums import WideSums

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.uint8}


class AdamMini:
    """State and step of Adam-mini for the slices of one rank.

    A step is :meth:`sum_squares`, :meth:`decide`, :meth:`update`, :meth:`finish`, on all ranks; if
    the decision is in doubt, the first three again with :meth:`sum_squares_in_float64`.

    Args:
        plan: all integers.
        config: options of Adam-mini.
        buffers: live tensors of the plan's buffers.
        groups: process groups of the plan's domains.
        param_groups: torch-style groups. Those of ``main_params`` take their place: ``lr``,
            ``weight_decay``, ``eps``, ``betas`` are read there in every step.
        group_of_parameter: index of the group of each parameter of the plan.
        device: where the buffers are.
        offload: what state lies in host memory.
        decoupled_weight_decay: ``False``: the decay is added to gradients, which must be float32.

    Raises:
        ValueError: a group's value is out of range.
        NotImplementedError: groups have different betas.

    Attributes:
        buffers: live tensors of the plan's buffers.
        main_params: all state, and the parameter groups; :meth:`finish` counts the steps there.
        collectives, kernels, vectors, hyper, scalars: what a step calls and uses.
        updated: whether there was a step, and the last one was taken.
        overlapped_sums: what takes sums before the step; ``None``: nothing does.

    Source: Zhang et al., arXiv:2406.16793, Algorithm 2; decoupled weight decay of Loshchilov and
    Hutter, arXiv:1711.05101.
    """

    def __init__(
        self,
        plan: StepPlan,
        config: AdamMiniConfig,
        buffers: Sequence[Buffer],
        groups: Sequence[DomainGroups],
        param_groups: Sequence[dict[str, Any]],
        group_of_parameter: Sequence[int],
        *,
        device: torch.device,
        offload: OffloadConfig | None = None,
        decoupled_weight_decay: bool = True,
    ) -> None:
        self.plan = plan
        self.config = config
        self.buffers = tuple(buffers)
        self.device = device
        self.updated = False
        self.overlapped_sums: OverlappedSums | None = None
        self.kernels = select_backend(config.backend, device)
        self.collectives = Collectives(plan, groups, self.kernels, device=device)
        offload = offload or OffloadConfig()
        shares = plan_shares(plan, offload.fraction)
        allocated = RankState.allocate(
            plan,
            buffers,
            shares,
            device=device,
            exp_avg_dtype=_DTYPES[config.exp_avg_dtype],
            param_remainders=config.param_remainders,
        )
        self.main_params = MainParams(
            plan, allocated, param_groups, group_of_parameter, device=device
        )
        self._decoupled = decoupled_weight_decay
        self.hyper = HyperParameters(self.main_params, decoupled_weight_decay=self._decoupled)
        self.vectors = StepVectors(
            plan,
            self.collectives.sum_sq_SR,
            group_of_parameter,
            stochastic_rounding=config.stochastic_rounding,
            has_codes=config.exp_avg_dtype == "fp8",
            device=device,
        )
        num_domains = len(plan.domains)
        self._stats_D2 = torch.zeros(num_domains, 2, dtype=torch.float64, device=device)
        self._norm_scratch = self.kernels.norm_scratch(len(plan.parameter_SR), num_domains, device)
        #: See :meth:`Decisions.decide`.
        self.decide = Decisions(self.kernels, device).decide
        self.scalars = StepScalars(len(param_groups), device)
        self._host: HostUpdate | None = None
        if shares[1]:
            self._host = HostUpdate(
                plan,
                shares[1],
                self.buffers,
                offload,
                config.backend,
                vectors=self.vectors,
                device=device,
                num_groups=len(param_groups),
            )
        plans = (*plan.buffers, *(share.plan for share in shares[0]))
        tables = {id(table): table for held in plans for table in held.tables}
        self._tables = tuple(tables.values())
        self._allocated_bytes = allocated.bytes_by_kind()

    @property
    def on_host(self) -> bool:
        """Whether state of this rank lies in host memory."""
        return self._host is not None

    # The step.

    @torch.no_grad()
    def warm_up(self, *, clip_grad: float = 0.0, inv_scale: Tensor | None = None) -> bool:
        """Compile the kernels of a step and make their tables, so that no step has to.

        This rank does what it does in a step, on the live tensors, but without collectives and with
        a factor of the gradients that is NaN, so nothing that lasts is written. Other ranks may
        do something else meanwhile.

        Args:
            clip_grad: of the steps, see :meth:`Decisions.decide`.
            inv_scale: likewise.

        Returns:
            Whether it was done: not without memory of gradients and weights, which callers may have
            freed until they train.
        """
        live = [tensor for buffer in self.buffers for tensor in (buffer.grad, buffer.weight)]
        if any(tensor.numel() and not tensor.untyped_storage().nbytes() for tensor in live):
            return False
        state, betas = self.main_params.attach(), self.hyper.betas()
        with alone():
            decision = Decision()
            grad_scale: float | Tensor = math.nan
            if self.config.single_phase:
                self.sum_squares_of_cut_blocks()
            else:
                stats = self.sum_squares()
                decision = self.decide(  # every norm is above the threshold
                    stats, clip_grad=clip_grad, inv_scale=inv_scale, skip_threshold=-1.0
                )
                grad_scale = decision.grad_scale
            # Without groups: their learning rates may not be set yet.
            self.scalars.write([], betas=betas, step=1, grad_scale=grad_scale)
            self._advance(state, decision, NO_EARLY_BUFFERS)
            if self._host is not None:
                self._host.warm_up(state, betas=betas)
        return True

    def sum_squares(self) -> Tensor:
        """Read every gradient once, and compute all sums that the step needs.

        All ranks must call it. Collectives, in this order: all-reduce in the dense and the expert
        data-parallel group; all-reduce in the dense and the expert tensor-parallel group (these
        stay in flight until :meth:`update` needs them); one all-reduce for the norm. All but the
        last are left out where no block is cut. Columns have more, see ``Collectives.start_``.

        Returns:
            float64 tensor on the device, for each domain ``[squared gradient norm, number of
            non-finite sums]``, for the gradients as they are in the buffers (loss scale included),
            equal on all ranks. The next call overwrites it.
        """
        # s <- sum(g * g), for each segment
        for buffer, parts in zip(self.buffers, self._left_to_sum(), strict=True):
            for part in parts:
                self._sum(buffer, part.segments, part.columns, part.ranges)
        # norm^2 <- sum(s) over partial sums: complete ones would count a cut block once per rank
        self.kernels.norm_partials_(
            self._stats_D2, self.vectors.sum_sq_SR, self.vectors.norm_domain_SR, self._norm_scratch
        )
        # s <- sum(s over the ranks that hold segments of the block)
        self.collectives.start_()
        # norm^2 <- sum(norm^2 over the ranks that hold a part of the model)
        self.collectives.add_over_model_(self._stats_D2)
        return self._stats_D2

    def sum_squares_in_float64(self) -> tuple[Tensor, WideSums]:
        """Read every gradient again, with squares and sums in float64; all ranks must call it.

        Collectives: the one for the norm.

        Returns:
            The tensor that :meth:`sum_squares` returns, and the sums, both for :meth:`decide`.
        """
        wide = WideSums(self.plan, self.buffers, self.device)
        stats_D2 = torch.zeros_like(self._stats_D2)
        wide.norm_partials_(stats_D2, self.vectors.norm_domain_SR)
        self.collectives.add_over_model_(stats_D2)
        return stats_D2, wide

    def sum_squares_of_cut_blocks(self) -> None:
        """Sum the squares of cut blocks only; all ranks must call it.

        For single-phase steps: :meth:`update` then reads the other gradients itself. Collectives
        are those of :meth:`sum_squares` without the norm.
        """
        for buffer, plan in zip(self.buffers, self.plan.buffers, strict=True):
            self._sum(buffer, plan.cut, plan.columns)
        self.collectives.start_()

    def update(self, decision: Decision, early: EarlyBuffers = NO_EARLY_BUFFERS) -> None:
        """Advance v, m, main parameters and model weights by one step; local to the rank.

        Cut blocks come last: their sums may still be in flight. :meth:`finish` counts the step.

        Args:
            decision: if its scale is not finite, nothing changes; a GPU checks this itself, so
                the host does not wait for it, unless there are early buffers.
            early: buffers to update before all others, and what to call in between.

        Equations, with g the scaled gradient and b its block::

            v_b <- beta2 v_b + (1 - beta2) mean(g_b * g_b)
            m   <- beta1 m + (1 - beta1) g
            p   <- p - lr * weight_decay * p
            p   <- p - lr / (1 - beta1^t) * m / (sqrt(v_b / (1 - beta2^t)) + eps)

        With weight decay that is not decoupled, ``g <- g + weight_decay * p`` comes first, and the
        third line is left out; the host then waits for the decision, and all ranks must call it.
        """
        if decision.wide is not None and self._decoupled:
            self._update_from_means(decision, early)
            return
        grad_scale = decision.grad_scale
        if not self._decoupled:
            if not self._add_decay(decision):
                return
            grad_scale = 1.0
        self.hyper.write(self.scalars, grad_scale)
        self._advance(self.main_params.attach(), decision, early)

    def _advance(self, state: RankState, decision: Decision, early: EarlyBuffers) -> None:
        """Do the four lines of :meth:`update` with the numbers that the scalars hold.

        Without early buffers and state on the host it only launches, and the same in each step:
        started again with other numbers in the scalars, the launches do another step.
        """
        self.scalars.send()
        vectors = self.vectors.of(state)
        if not self.config.single_phase:
            # v <- beta2 v + (1 - beta2) grad_scale^2 s / numel;  step <- lr' / (sqrt(v') + eps)
            self.kernels.segment_step_size_(vectors, self.scalars, self.vectors.uncut)
        if self._host is not None:
            # The host updates cut blocks with the others, so their sums are waited for first.
            self._advance_cut(vectors)
            self._update_all(state, vectors)
            early.call(decision)  # the host may own a part of the early buffers
            return
        first, rest = early.split(state.on_device)
        self._update_uncut(first, vectors)
        # the same for cut blocks, once their sums are complete
        self._advance_cut(vectors)
        self._update_cut(first, vectors)
        early.call(decision)
        self._update_uncut(rest, vectors)
        self._update_cut(rest, vectors)

    def _advance_cut(self, vectors: SegmentVectors) -> None:
        self.collectives.finish_()
        if self.vectors.cut is not None:
            self.kernels.segment_step_size_(vectors, self.scalars, self.vectors.cut)

    def _update_all(self, state: RankState, vectors: SegmentVectors) -> None:
        """Advance m and all that follows, on device and host, once all step sizes are known."""
        if self._host is not None:
            self._host.begin(state, vectors, self.scalars.grad_scale)
        self._update_uncut(state.on_device, vectors)
        self._update_cut(state.on_device, vectors)
        if self._host is not None:
            self._host.finish(state, self.hyper)

    def _update_uncut(self, buffers: Sequence[BufferState], vectors: SegmentVectors) -> None:
        # m <- beta1 m + (1 - beta1) grad_scale g;  p <- (1 - lr weight_decay) p - step m
        # (in one pass: s, v and step of each segment before it)
        kernels, scalars = self.kernels, self.scalars
        update_ = kernels.update_in_one_pass_ if self.config.single_phase else kernels.update_
        for held in buffers:
            tensors, plan = _tensors(held), held.plan
            if len(plan.uncut):
                update_(tensors, plan.uncut, vectors, scalars)
            if len(plan.ranges):  # the same, with v per element
                kernels.update_elementwise_(
                    tensors, held.exp_avg_sq_E, plan.ranges, vectors, scalars
                )

    def _update_cut(self, buffers: Sequence[BufferState], vectors: SegmentVectors) -> None:
        for held in buffers:
            tensors, plan = _tensors(held), held.plan
            if len(plan.cut):
                self.kernels.update_(tensors, plan.cut, vectors, self.scalars)
            if len(plan.columns):
                self.kernels.update_columns_(tensors, plan.columns, vectors, self.scalars)

    def _update_from_means(self, decision: Decision, early: EarlyBuffers) -> None:
        """Take the same step from float64 sums, unless something would not fit into float32."""
        taken = write_means_(
            decision, self.vectors.sum_sq_S, self.collectives, len(self.plan.domains)
        )
        if not taken:
            return
        state = self.main_params.attach()
        vectors = self.vectors.of(state)
        # v <- beta2 v + (1 - beta2) s;  step <- lr' / (sqrt(v') + eps)
        self.hyper.write(self.scalars, 1.0)
        self.scalars.send()
        means = vectors._replace(inv_numel_S=torch.ones_like(vectors.inv_numel_S))
        self.kernels.segment_step_size_(means, self.scalars, None)
        self.hyper.write(self.scalars, decision.grad_scale)
        self.scalars.send()
        self._update_all(state, vectors)
        early.call(decision)

    def _add_decay(self, decision: Decision) -> bool:
        """Scale gradients and add the decay to them (in place), and sum their squares again.

        All ranks must call it. Collectives: those of :meth:`sum_squares` without the norm.

        Returns:
            Whether the step is taken.
        """
        self.collectives.finish_()  # sums without the decay, still in flight
        if not decision.read().updated:
            return False
        if decision.wide is not None:
            decision.skip("with weight decay in gradients, their squares must fit into float32", [])
            return False
        add_decay_(self.plan, self.buffers, self.main_params, decision.grad_scale)
        for buffer, plan in zip(self.buffers, self.plan.buffers, strict=True):
            self._sum(buffer, plan.segments, plan.columns)
        self.collectives.start_()
        return True

    def finish(self, decision: Decision) -> Outcome:
        """Wait for the decision, and count the step unless it was skipped."""
        outcome = decision.read()
        self.updated = outcome.updated
        if outcome.updated:
            self.main_params.step_count += 1
        return outcome

    def _left_to_sum(self) -> Sequence[Sequence[BufferPlan | BucketTables]]:
        """Fill in sums that were taken behind the backward pass; return what has none yet."""
        if self.overlapped_sums is None:
            return [[plan] for plan in self.plan.buffers]
        return self.overlapped_sums.use_(self.vectors.sum_sq_SR)

    def _sum(self, buffer: Buffer, *tables: SegmentTable | ColumnTable) -> None:
        sum_squares_(self.kernels, self.vectors.sum_sq_SR, buffer.grad, *tables)

    # Piece by piece.

    def grad(self, piece: Piece) -> Tensor:
        """Return the gradient of a piece as it is in the buffer, a view."""
        return self.buffers[piece.buffer].grad[piece.window.in_buffer]

    def weight(self, piece: Piece) -> Tensor:
        """Return the model weights of a piece, a view."""
        return self.buffers[piece.buffer].weight[piece.window.in_buffer]

    @torch.no_grad()
    def average_into_v(self, state: RankState, sum_S: Tensor) -> None:
        """Set v of every block to the mean of its elements' values; all ranks must call it.

        Cut blocks are averaged over all their ranks, by the collectives of :meth:`sum_squares`
        without the norm.

        Args:
            state: where v is written.
            sum_S: sum of the values over each segment, float32.
        """
        self.vectors.sum_sq_S.copy_(sum_S)
        self.collectives.start_()
        self.collectives.finish_()
        torch.mul(self.vectors.sum_sq_S, self.vectors.inv_numel_S, out=state.exp_avg_sq_S)

    @torch.no_grad()
    def count_zeros(self) -> int:
        """Return the number of zeros in the model's gradients, each parameter counted once.

        All ranks must call it.
        """
        count_D = torch.zeros(len(self.plan.domains), dtype=torch.int64, device=self.device)
        for piece in self.plan.pieces:
            if self.plan.parameters[piece.parameter].info.in_norm:
                domain = self.plan.buffers[piece.buffer].domain
                count_D[domain] += (self.grad(piece) == 0).sum()
        self.collectives.add_over_model_(count_D)
        return int(count_D.sum())

    def state_bytes(self) -> dict[str, int]:
        """Return the allocated bytes of this rank's optimizer state by kind.

        ``host_...`` are in host memory, all others on the device. ``step_vectors``: vectors with
        one entry per segment, and what completes sums over ranks. ``launch_tables``: what kernels
        walk. Tables are made by :meth:`warm_up` or the first step.
        """
        overlapped, host = self.overlapped_sums, self._host
        others = {
            "step_vectors": self.vectors.nbytes + self.collectives.nbytes,
            "launch_tables": sum(table.derived_bytes for table in self._tables)
            + (0 if overlapped is None else overlapped.table_bytes),
            "host_launch_tables": 0 if host is None else host.table_bytes,
            "host_staging": 0 if host is None else host.staging_bytes,
        }
        return self._allocated_bytes | {kind: num for kind, num in others.items() if num}


def _tensors(held: BufferState) -> BufferTensors:
    return BufferTensors.of(held.param, held.exp_avg, held.buffer.weight, held.buffer.grad)
