"""Adam-mini on the slices of one rank: the state, and the step next to its equations.

Imports everything below it (config, plan, collectives, main_params, kernels) and no Megatron. One
gradient shard goes through a step like this::

    gradients --sum_squares--> partial sums --data, tensor parallel--> sums over whole blocks
                                    |                                          |
                            norm, non-finite?                         v, step size per block
                                    | decide                                   |
    gradients ------------------ grad_scale -------- update ----> m, main parameter, model weight

Where the squares of gradients overflow float32, ``wide_sums`` takes the place of the first row.

Shape suffixes: see the docstring of ``plan``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_adam_mini.collectives import Collectives, DomainGroups
from megatron_adam_mini.config import AdamMiniConfig, OffloadConfig, check_adam_values
from megatron_adam_mini.decision import Decision, Decisions, Outcome
from megatron_adam_mini.exchange import alone
from megatron_adam_mini.host_update import HostUpdate
from megatron_adam_mini.kernels import (
    BufferTensors,
    SegmentVectors,
    StepScalars,
    select_backend,
    sum_squares_,
)
from megatron_adam_mini.main_params import MainParams
from megatron_adam_mini.overlapped_sums import OverlappedSums
from megatron_adam_mini.piece_values import per_element
from megatron_adam_mini.plan.bucket_tables import BucketTables
from megatron_adam_mini.plan.buffer_plan import BufferPlan
from megatron_adam_mini.plan.column_table import ColumnTable
from megatron_adam_mini.plan.segment_table import SegmentTable
from megatron_adam_mini.plan.shares import plan_shares
from megatron_adam_mini.plan.step_plan import Piece, StepPlan
from megatron_adam_mini.state import Buffer, BufferState, RankState
from megatron_adam_mini.wide_sums import WideSums

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.uint8}

#: The smallest normal number of float32.
_MIN_SCALE = 2.0**-126


class EarlyBuffers(NamedTuple):
    """Buffers whose weights are wanted before those of all others.

    Attributes:
        numbers: of the buffers in the plan.
        then: called once these are updated.
    """

    numbers: frozenset[int]
    then: Callable[[], None]


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
        self._decoupled = decoupled_weight_decay
        self._group_of_parameter = tuple(group_of_parameter)
        self.buffers = tuple(buffers)
        self.device = device
        self.updated = False
        self.overlapped_sums: OverlappedSums | None = None
        self.kernels = select_backend(config.backend, device)
        self.collectives = Collectives(plan, groups, self.kernels, device=device)

        def to_device(array: np.ndarray[Any, Any]) -> Tensor:
            return torch.from_numpy(array).to(device)

        def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

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
        self._state_bytes = allocated.bytes_by_kind()
        plans = (*plan.buffers, *(share.plan for share in shares[0]))
        tables = {id(table): table for held in plans for table in held.tables}
        self._tables = tuple(tables.values())
        groups_P = np.asarray(group_of_parameter, dtype=np.int32)
        self._sum_sq_SR = self.collectives.sum_sq_SR
        self._sum_sq_S = self._sum_sq_SR[: plan.num_segments]
        self._step_size_S = floats(plan.num_segments)
        has_codes = config.exp_avg_dtype == "fp8"
        self._exp_avg_scale_S2 = floats(plan.num_segments, 2) if has_codes else None
        inv_numel_S = (1.0 / plan.block_numel_S.astype(np.float64)).astype(np.float32)
        self._inv_numel_S = to_device(inv_numel_S)
        self._group_SR = to_device(groups_P[plan.parameter_SR])
        origin_SR = plan.first_element_numbers() if config.stochastic_rounding else None
        self._origin_SR = None if origin_SR is None else to_device(origin_SR)
        # Segments of uncut and of cut blocks; ``None``: all segments and none.
        self._uncut: Tensor | None = None
        self._cut: Tensor | None = None
        if plan.is_cut_S.any():
            self._uncut = to_device(np.flatnonzero(~plan.is_cut_S))
            self._cut = to_device(np.flatnonzero(plan.is_cut_S))
        self._norm_domain_SR = to_device(plan.norm_domain_SR)
        num_domains = len(plan.domains)
        self._stats_D2 = floats(num_domains, 2, dtype=torch.float64)
        self._norm_scratch = self.kernels.norm_scratch(len(plan.parameter_SR), num_domains, device)
        #: See :meth:`Decisions.decide`.
        self.decide = Decisions(self.kernels, device).decide
        self._scalars = StepScalars(len(param_groups), device)
        for group in self.main_params.param_groups:  # overrides may have values of their own
            check_adam_values(**{key: group[key] for key in ("lr", "betas", "eps", "weight_decay")})
        self._betas()
        self._host: HostUpdate | None = None
        if shares[1]:
            self._host = HostUpdate(
                plan,
                shares[1],
                self.buffers,
                offload,
                config.backend,
                group_SR=groups_P[plan.parameter_SR],
                origin_SR=origin_SR,
                has_codes=has_codes,
                device=device,
                num_groups=len(param_groups),
            )
            self._state_bytes["host_staging"] = self._host.staging_bytes

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
        state, betas = self.main_params.attach(), self._betas()
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
            self._scalars.write([], betas=betas, step=1, grad_scale=grad_scale)
            self._advance(state, decision, None)
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
            self._stats_D2, self._sum_sq_SR, self._norm_domain_SR, self._norm_scratch
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
        wide.norm_partials_(stats_D2, self._norm_domain_SR)
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

    def update(self, decision: Decision, early: EarlyBuffers | None = None) -> None:
        """Advance v, m, main parameters and model weights by one step; local to the rank.

        Cut blocks come last: their sums may still be in flight. :meth:`finish` counts the step.

        Args:
            decision: if its scale is not finite, nothing changes; a GPU checks this itself, so
                the host does not wait for it, unless there are early buffers.
            early: buffers to update before all others, and what to call in between. It is called
                only if the step is taken.

        Equations, with g the scaled gradient and b its block::

            v_b <- beta2 v_b + (1 - beta2) mean(g_b * g_b)
            m   <- beta1 m + (1 - beta1) g
            p   <- p - lr * weight_decay * p
            p   <- p - lr / (1 - beta1^t) * m / (sqrt(v_b / (1 - beta2^t)) + eps)

        With weight decay that is not decoupled, ``g <- g + weight_decay * p`` comes first, and the
        third line is left out; the host then waits for the decision, and all ranks must call it.
        """
        grad_scale = decision.grad_scale
        if not self._decoupled:
            if not self._add_decay(decision):
                return
            grad_scale = 1.0
        elif decision.wide is not None:
            self._update_with(decision.wide, decision)
            self._call(early, decision)
            return
        self._write_scalars(grad_scale)
        self._advance(self.main_params.attach(), decision, early)

    def _advance(self, state: RankState, decision: Decision, early: EarlyBuffers | None) -> None:
        """Do the four lines of :meth:`update` with the numbers that the scalars hold.

        Without early buffers and state on the host it only launches, and the same in each step:
        started again with other numbers in the scalars, the launches do another step.
        """
        scalars, kernels = self._scalars, self.kernels
        scalars.send()
        vectors = self._vectors(state)
        single_phase = self.config.single_phase
        if not single_phase:
            # v <- beta2 v + (1 - beta2) grad_scale^2 s / numel;  step <- lr' / (sqrt(v') + eps)
            kernels.segment_step_size_(vectors, scalars, self._uncut)
        if self._host is not None:
            # The host updates cut blocks with the others, so their sums are waited for first.
            self._advance_cut(vectors)
            self._host.begin(state, vectors, scalars.grad_scale)
        first, rest = _split(state.on_device, early)
        self._update_uncut(first, vectors)
        # the same for cut blocks, once their sums are complete
        if self._host is None:
            self._advance_cut(vectors)
        self._update_cut(first, vectors)
        if self._host is None:
            self._call(early, decision)
        self._update_uncut(rest, vectors)
        self._update_cut(rest, vectors)
        if self._host is not None:
            self._finish_on_host(state)
            self._call(early, decision)  # the host may own a part of the early buffers

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
        groups, state = self.main_params.param_groups, self.main_params.attach()
        for piece in self.plan.pieces:
            # g <- grad_scale g + weight_decay p
            grad = self.grad(piece).mul_(decision.grad_scale)
            decay = groups[self._group_of_parameter[piece.parameter]]["weight_decay"]
            if decay:
                param = state.of(piece).main_param(piece.window)
                grad.add_(param.to(grad.device), alpha=decay)
        for buffer, plan in zip(self.buffers, self.plan.buffers, strict=True):
            self._sum(buffer, plan.segments, plan.columns)
        self.collectives.start_()
        return True

    def _groups_for_kernels(self) -> list[dict[str, Any]]:
        groups = self.main_params.param_groups
        return groups if self._decoupled else [{**group, "weight_decay": 0.0} for group in groups]

    def _advance_cut(self, vectors: SegmentVectors) -> None:
        self.collectives.finish_()
        if self._cut is not None:
            self.kernels.segment_step_size_(vectors, self._scalars, self._cut)

    def _finish_on_host(self, state: RankState) -> None:
        if self._host is not None:
            groups, step = self._groups_for_kernels(), self.main_params.step_count + 1
            self._host.finish(state, groups, betas=self._betas(), step=step)

    @staticmethod
    def _call(early: EarlyBuffers | None, decision: Decision) -> None:
        if early is not None and decision.read().updated:
            early.then()

    def _update_with(self, wide: WideSums, decision: Decision) -> None:
        """Take the same step from float64 sums, unless v or the gradients' factor would not fit.

        All ranks must call it. Collectives: those of :meth:`sum_squares`, the last for a count.
        """
        if not decision.read().updated:
            return
        grad_scale = decision.grad_scale_in_float64
        if grad_scale < _MIN_SCALE:
            decision.skip("the factor that clips them does not fit into float32", [])
            return
        # s <- mean(grad_scale^2 g * g): float32 holds each rank's part of it if it holds v
        self._sum_sq_S.copy_(wide.shares_of_mean(grad_scale))
        self.collectives.start_()
        self.collectives.finish_()
        too_large = wide.too_large(self._sum_sq_S, grad_scale)
        count_D = torch.zeros(len(self.plan.domains), dtype=torch.int64, device=self.device)
        count_D.fill_(too_large.sum())  # of experts and dense ones: their norm groups may differ
        self.collectives.add_over_model_(count_D)
        if count_D.sum() > 0:
            decision.skip(
                "v, a mean of their squares, does not fit into float32 (--clip-grad would help)",
                wide.names(too_large),
            )
            return
        state = self.main_params.attach()
        vectors, scalars, kernels = self._vectors(state), self._scalars, self.kernels
        # v <- beta2 v + (1 - beta2) s;  step <- lr' / (sqrt(v') + eps)
        self._write_scalars(1.0)
        scalars.send()
        means = vectors._replace(inv_numel_S=torch.ones_like(self._inv_numel_S))
        kernels.segment_step_size_(means, scalars, self._uncut)
        if self._cut is not None:
            kernels.segment_step_size_(means, scalars, self._cut)
        self._write_scalars(decision.grad_scale)
        scalars.send()
        if self._host is not None:
            self._host.begin(state, vectors, scalars.grad_scale)
        for held in state.on_device:
            tensors, plan = self._tensors(held), held.plan
            if len(plan.uncut):
                kernels.update_(tensors, plan.uncut, vectors, scalars)
            self._update_ranges(held, vectors)
        self._update_cut(state.on_device, vectors)
        self._finish_on_host(state)

    def finish(self, decision: Decision) -> Outcome:
        """Wait for the decision, and count the step unless it was skipped."""
        outcome = decision.read()
        self.updated = outcome.updated
        if outcome.updated:
            self.main_params.step_count += 1
        return outcome

    def _update_uncut(self, buffers: Sequence[BufferState], vectors: SegmentVectors) -> None:
        # m <- beta1 m + (1 - beta1) grad_scale g;  p <- (1 - lr weight_decay) p - step m
        # (in one pass: s, v and step of each segment before it)
        in_one_pass = self.config.single_phase
        update_ = self.kernels.update_in_one_pass_ if in_one_pass else self.kernels.update_
        for held in buffers:
            if len(held.plan.uncut):
                update_(self._tensors(held), held.plan.uncut, vectors, self._scalars)
            # the same, with v per element
            self._update_ranges(held, vectors)

    def _update_cut(self, buffers: Sequence[BufferState], vectors: SegmentVectors) -> None:
        for held in buffers:
            if len(held.plan.cut):
                self.kernels.update_(self._tensors(held), held.plan.cut, vectors, self._scalars)
            if len(held.plan.columns):
                columns = held.plan.columns
                self.kernels.update_columns_(self._tensors(held), columns, vectors, self._scalars)

    def _update_ranges(self, held: BufferState, vectors: SegmentVectors) -> None:
        if len(held.plan.ranges):
            self.kernels.update_elementwise_(
                self._tensors(held), held.exp_avg_sq_E, held.plan.ranges, vectors, self._scalars
            )

    def _write_scalars(self, grad_scale: float | Tensor) -> None:
        self._scalars.write(
            self._groups_for_kernels(),
            betas=self._betas(),
            step=self.main_params.step_count + 1,
            grad_scale=grad_scale,
        )

    def _left_to_sum(self) -> Sequence[Sequence[BufferPlan | BucketTables]]:
        """Fill in sums that were taken behind the backward pass; return what has none yet."""
        if self.overlapped_sums is None:
            return [[plan] for plan in self.plan.buffers]
        return self.overlapped_sums.use_(self._sum_sq_SR)

    def _sum(self, buffer: Buffer, *tables: SegmentTable | ColumnTable) -> None:
        sum_squares_(self.kernels, self._sum_sq_SR, buffer.grad, *tables)

    def _vectors(self, state: RankState) -> SegmentVectors:
        return SegmentVectors(
            exp_avg_sq_S=state.exp_avg_sq_S,
            step_size_S=self._step_size_S,
            sum_sq_SR=self._sum_sq_SR,
            inv_numel_S=self._inv_numel_S,
            group_SR=self._group_SR,
            origin_SR=self._origin_SR,
            exp_avg_scale_S2=self._exp_avg_scale_S2,
        )

    @staticmethod
    def _tensors(held: BufferState) -> BufferTensors:
        buffer = held.buffer
        if held.param is None:
            return BufferTensors(buffer.weight, held.exp_avg, None, buffer.grad)
        return BufferTensors(held.param, held.exp_avg, buffer.weight, buffer.grad)

    def _betas(self) -> tuple[float, float]:
        groups = self.main_params.param_groups
        betas = {tuple(group["betas"]) for group in groups} or {(0.0, 0.0)}  # nothing to train
        if len(betas) != 1:
            raise NotImplementedError(
                f"Adam-mini got parameter groups with different betas {sorted(betas)}; all groups "
                "must share one pair. Give the groups different lr or weight_decay instead."
            )
        return betas.pop()

    # Piece by piece.

    def grad(self, piece: Piece) -> Tensor:
        """Return the gradient of a piece as it is in the buffer, a view."""
        return self.buffers[piece.buffer].grad[piece.window.in_buffer]

    def weight(self, piece: Piece) -> Tensor:
        """Return the model weights of a piece, a view."""
        return self.buffers[piece.buffer].weight[piece.window.in_buffer]

    def last_step_sizes(self, state: RankState, piece: Piece, part: slice) -> Tensor:
        """Return what the last step, if it was taken, multiplied m by to get the update.

        Args:
            state: as the step left it.
            piece: the piece.
            part: elements of its window.

        Returns:
            float32, one number per element, where the piece's state lies.
        """
        sizes: Tensor
        if not piece.is_elementwise:
            sizes = per_element(self.plan, piece, self._step_size_S[piece.segments], part)
            return sizes.to(state.of(piece).exp_avg.device)
        v = state.v_of_elements(piece)[part]
        lr, eps, _ = self._scalars.hyper_G3[self._group_of_parameter[piece.parameter]].to(v.device)
        correction1, correction2 = self._scalars.bias_corrections.to(v.device)
        sizes = lr / correction1 / ((v / correction2).sqrt() + eps)
        return sizes

    @torch.no_grad()
    def average_into_v(self, state: RankState, sum_S: Tensor) -> None:
        """Set v of every block to the mean of its elements' values; all ranks must call it.

        Cut blocks are averaged over all their ranks, by the collectives of :meth:`sum_squares`
        without the norm.

        Args:
            state: where v is written.
            sum_S: sum of the values over each segment, float32.
        """
        self._sum_sq_S.copy_(sum_S)
        self.collectives.start_()
        self.collectives.finish_()
        torch.mul(self._sum_sq_S, self._inv_numel_S, out=state.exp_avg_sq_S)

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

        ``host_...`` are in host memory, all others on the device. ``launch_tables``: what kernels
        walk, made by :meth:`warm_up` or the first step.
        """
        overlapped = self.overlapped_sums
        tables = {
            "launch_tables": sum(table.derived_bytes for table in self._tables)
            + (0 if overlapped is None else overlapped.table_bytes),
            "host_launch_tables": 0 if self._host is None else self._host.table_bytes,
        }
        return self._state_bytes | {kind: num for kind, num in tables.items() if num}


def _split(
    buffers: Sequence[BufferState], early: EarlyBuffers | None
) -> tuple[list[BufferState], list[BufferState]]:
    """Return the early buffers and the others; without early ones, all come first."""
    if early is None:
        return list(buffers), []
    parts: tuple[list[BufferState], list[BufferState]] = ([], [])
    for number, held in enumerate(buffers):
        parts[number not in early.numbers].append(held)
    return parts
