"""One Adam-mini step over all slices of a rank: a fixed list of a few calls per bucket.

Imports everything below it (config, partition, layout, reduction, state, kernels) and no
Megatron. Data flow of one gradient shard, see :meth:`Engine.collect` and :meth:`Engine.update`::

    grad slice --block_sum_sq_--> partial sums --DP, TP--> complete sums of squares
                                       |                       |
                                  norm, found_inf         v, step size per block
                                       |                       |
    grad slice ----------------- grad_scale ----update_---> m, main parameter, model weight

Shape suffixes: ``_B`` all segments of the rank (for some vectors: and then its element ranges),
``_S`` the same without element ranges, ``_E`` all elements of its element ranges.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from megatron_adam_mini.collectives import Reduction
from megatron_adam_mini.config import AdamMiniConfig
from megatron_adam_mini.kernels import SegmentTable, StepScalars, select_backend
from megatron_adam_mini.plan.layout import (
    BucketLayout,
    SliceSegments,
    element_numbers,
    segment_slice,
)
from megatron_adam_mini.plan.partition import IntArray, ParameterBlocks
from megatron_adam_mini.plan.reduction import plan_reduction
from megatron_adam_mini.state import Slice, SliceState

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Domain:
    """Buckets whose cut blocks are completed by one pair of process groups.

    Attributes:
        buckets: the same on all ranks of both groups; all have the same number of slices.
        slices: this rank's slice of each bucket.
        dp_group, dp_rank: group that shares the slices of a bucket, and this rank in it.
        tp_group, tp_rank, tp_size: tensor-parallel group of these parameters.
        dp_replicas: ranks in other tensor-parallel groups update the very same slices.
        norm_group: group over which the norm's partial sums are added; ``None``: all ranks.
    """

    name: str
    buckets: Sequence[BucketLayout]
    slices: Sequence[Slice]
    dp_group: distributed.ProcessGroup | None
    dp_rank: int
    tp_group: distributed.ProcessGroup | None
    tp_rank: int
    tp_size: int
    dp_replicas: bool
    norm_group: distributed.ProcessGroup | None

    @classmethod
    def of_one_rank(cls, buckets: Sequence[BucketLayout], slices: Sequence[Slice]) -> Domain:
        """Return the domain of a rank that shares nothing with others."""
        return cls(
            name="dense",
            buckets=buckets,
            slices=slices,
            dp_group=None,
            dp_rank=0,
            tp_group=None,
            tp_rank=0,
            tp_size=1,
            dp_replicas=False,
            norm_group=None,
        )


@dataclass(frozen=True, eq=False)
class _BucketStep:
    """What the step needs of one bucket: its slice, its state, and where its segments are.

    Attributes:
        domain, layout: the process groups and the integers of the whole bucket.
        part: the integers of the slice.
        segments: all segments of the slice.
        whole: those of them whose blocks no other rank holds a part of.
        cut: the others.
        ranges: element ranges.
        blocks_at: where the slice's segments have their entries in the vectors of the rank.
        exp_avg_sq_E: v of the elements of its ranges.
    """

    domain: Domain
    layout: BucketLayout
    state: SliceState
    part: SliceSegments
    segments: SegmentTable
    whole: SegmentTable
    cut: SegmentTable
    ranges: SegmentTable
    blocks_at: slice
    exp_avg_sq_E: Tensor  # noqa: N815 (shape suffix)

    @property
    def source(self) -> Slice:
        """The slice's live tensors."""
        return self.state.source


@dataclass(frozen=True)
class Piece:
    """The elements of one parameter that one slice holds.

    Attributes:
        parameter: index of the parameter.
        begin, end: elements ``[begin, end)`` of the flattened tensor-parallel shard.
        bucket: the slice, its state and segments.
        window: the same elements in the slice's tensors.
        segments: the parameter's segments in ``bucket.segments``.
        ranges: its element range in ``bucket.ranges``, if it has one.
    """

    parameter: int
    begin: int
    end: int
    bucket: _BucketStep
    window: slice
    segments: slice
    ranges: slice


class Engine:
    """State and step of Adam-mini for the slices of one rank.

    Args:
        config: options of Adam-mini.
        parameters: all parameters of the rank with their blocks, experts included.
        param_groups: torch-style groups; ``lr``, ``weight_decay``, ``eps``, ``betas`` are read in
            every step, so schedulers may write them.
        group_of_parameter: for each of ``parameters`` the index of its group.
        domains: dense, then experts if there are any.
        device: where the slices are.

    Attributes:
        step_count: steps taken; whoever calls :meth:`update` adds one if it was not skipped.
    """

    def __init__(
        self,
        config: AdamMiniConfig,
        parameters: Sequence[ParameterBlocks],
        param_groups: Sequence[dict[str, Any]],
        group_of_parameter: Sequence[int],
        domains: Sequence[Domain],
        *,
        device: torch.device,
    ) -> None:
        self.config = config
        self.parameters = parameters
        self.param_groups = param_groups
        self.domains = domains
        self.device = device
        self.kernels = select_backend(config.backend, device)
        self.step_count = 0

        parts = [
            [segment_slice(bucket, parameters, domain.dp_rank) for bucket in domain.buckets]
            for domain in domains
        ]

        def floats(numel: int) -> Tensor:
            return torch.zeros(numel, dtype=torch.float32, device=device)

        # Sums, groups and numbers (suffix _B) go on with one entry per element range; where those
        # are left out, the suffix is _S.
        self.num_blocks = sum(p.num_segments for ps in parts for p in ps)
        self._sum_sq_B = floats(self.num_blocks + sum(p.num_ranges for ps in parts for p in ps))
        self._sum_sq_S = self._sum_sq_B[: self.num_blocks]
        self.exp_avg_sq_B = floats(self.num_blocks)
        self.exp_avg_sq_E = floats(sum(p.num_elementwise for ps in parts for p in ps))
        self._step_size_B = floats(self.num_blocks)

        is_cut = np.zeros(self.num_blocks, dtype=np.bool_)
        self.reductions: list[tuple[Reduction, Tensor]] = []
        begin = 0
        for domain, domain_parts in zip(domains, parts, strict=True):
            end = begin + sum(part.num_segments for part in domain_parts)
            plan = plan_reduction(
                domain.buckets,
                domain_parts,
                parameters,
                dp_rank=domain.dp_rank,
                tp_rank=domain.tp_rank,
                tp_size=domain.tp_size,
                dp_replicas=domain.dp_replicas,
            )
            is_cut[begin + plan.completed] = True
            reduction = Reduction(
                plan, end - begin, dp_group=domain.dp_group, tp_group=domain.tp_group,
                device=device,
            )  # fmt: skip
            self.reductions.append((reduction, self._sum_sq_B[begin:end]))
            begin = end

        self.buckets: list[_BucketStep] = []
        segment, in_ranges, elements = 0, self.num_blocks, 0
        for domain, domain_parts in zip(domains, parts, strict=True):
            members = zip(domain.buckets, domain.slices, domain_parts, strict=True)
            for layout, source, part in members:
                segments = self._table(part.start_S, part.end_S, segment)
                blocks_at = slice(segment, segment + part.num_segments)
                cut = is_cut[blocks_at]
                bucket = _BucketStep(
                    domain=domain,
                    layout=layout,
                    state=SliceState.allocate(
                        source,
                        exp_avg_dtype=_DTYPES[config.exp_avg_dtype],
                        param_remainders=config.param_remainders,
                    ),
                    part=part,
                    segments=segments,
                    whole=segments.subset(~cut) if cut.any() else segments,
                    cut=segments.subset(cut),
                    ranges=self._table(part.start_R, part.end_R, in_ranges),
                    blocks_at=blocks_at,
                    exp_avg_sq_E=self.exp_avg_sq_E[elements : elements + part.num_elementwise],
                )
                self.buckets.append(bucket)
                segment = blocks_at.stop
                in_ranges += part.num_ranges
                elements += part.num_elementwise

        def joined(name: str, dtype: type) -> np.ndarray[Any, Any]:
            arrays = [getattr(bucket.part, name) for bucket in self.buckets]
            return np.concatenate([np.empty(0, dtype=dtype), *arrays])

        inv_numel = 1.0 / joined("block_numel_S", np.int64).astype(np.float64)
        self._inv_numel_B = torch.from_numpy(inv_numel.astype(np.float32)).to(device)

        # Segments whose blocks are cut, and the others; None: no segments, and all of them.
        self._cut_index: Tensor | None = None
        self._whole_index: Tensor | None = None
        if is_cut.any():
            self._cut_index, self._whole_index = (
                torch.from_numpy(np.flatnonzero(chosen)).to(device) for chosen in (is_cut, ~is_cut)
            )

        owner = np.concatenate([joined("parameter_S", np.int64), joined("parameter_R", np.int64)])
        groups = np.asarray(group_of_parameter, dtype=np.int32)
        self._group_B = torch.from_numpy(groups[owner]).to(device)
        self._group_S = self._group_B[: self.num_blocks]
        self._origin_B = self._number_elements() if config.stochastic_rounding else None
        self._norm_domain_B = torch.from_numpy(self._plan_norm(owner)).to(device)
        self._norm_stats = torch.zeros(len(domains), 2, dtype=torch.float64, device=device)
        several = len(domains) > 1
        self._norm_total = torch.zeros_like(self._norm_stats[0]) if several else self._norm_stats[0]
        self._scalars = StepScalars(len(param_groups), device)

    def _table(self, starts: IntArray, ends: IntArray, at: int) -> SegmentTable:
        """Return the table of segments, or of element ranges, whose entries begin at ``at``."""
        return SegmentTable(starts, ends, self.device, np.arange(at, at + len(starts)))

    def _number_elements(self) -> Tensor:
        """Return the number of the first element of each segment and range, int32 bits.

        It follows from the parameter's name and the place in it, not from the rank, so replicas
        round alike.
        """
        found = [zlib.crc32(blocks.info.name.encode()) for blocks in self.parameters]
        names = np.asarray(found, dtype=np.int64)
        segments: list[IntArray] = []
        ranges: list[IntArray] = []
        for bucket in self.buckets:
            part, rank = bucket.part, bucket.domain.dp_rank
            for into, starts, owners in (
                (segments, part.start_S, part.parameter_S),
                (ranges, part.start_R, part.parameter_R),
            ):
                numbers = element_numbers(bucket.layout, self.parameters, rank, starts, owners)
                into.append(names[owners] + numbers)
        numbers_B = np.concatenate([np.empty(0, dtype=np.int64), *segments, *ranges])
        bits = (numbers_B & 0xFFFFFFFF).astype(np.uint32).view(np.int32)
        return torch.from_numpy(bits).to(self.device)

    def collect(self) -> Tensor:
        """Read every gradient once, and sum up what the step needs to know of all of them.

        All ranks must call it. Collectives, in this order: all-gather in the dense
        data-parallel group, in the expert's; all-reduce in the dense tensor-parallel group, in
        the expert's (these stay in flight until :meth:`update` needs them); one all-reduce for
        the norm. All but the last are left out where nothing is cut.

        Returns:
            float64 tensor ``[squared gradient norm, number of non-finite sums]`` on the device,
            of the gradients as they are in the buffers (loss scale included), equal on all
            ranks. It is overwritten by the next call.
        """
        for bucket in self.buckets:
            grad = bucket.source.grad
            self.kernels.block_sum_sq_(self._sum_sq_B, grad, bucket.segments)
            if len(bucket.ranges):
                self.kernels.block_sum_sq_(self._sum_sq_B, grad, bucket.ranges)
        # The norm adds partial sums: complete ones would count a cut block once per rank.
        self.kernels.norm_partials_(self._norm_stats, self._sum_sq_B, self._norm_domain_B)
        self._start_reductions()
        self._reduce_norm()
        if len(self.domains) > 1:
            torch.sum(self._norm_stats, dim=0, out=self._norm_total)
        return self._norm_total

    def collect_cut(self) -> None:
        """Sum up blocks that other ranks hold parts of, and no others; all ranks must call it.

        For single-phase steps: :meth:`update` then reads the other gradients itself. Collectives
        as in :meth:`collect`, without the norm.
        """
        for bucket in self.buckets:
            if len(bucket.cut):
                self.kernels.block_sum_sq_(self._sum_sq_B, bucket.source.grad, bucket.cut)
        self._start_reductions()

    def update(self, grad_scale: float | Tensor) -> None:
        """Advance v, m, main parameters and model weights by one step; local to the rank.

        Blocks that other ranks hold parts of come last: their sums may still be on the way. The
        step is not counted here, see :attr:`step_count`: a caller may learn later that it was
        skipped.

        Args:
            grad_scale: what the gradients are multiplied with before anything else: inverse of
                the loss scale times the clipping coefficient. If it is not finite, nothing
                changes; on a GPU that is decided there, without waiting for it.

        Equations, with g the scaled gradient and b its block::

            v_b <- beta2 v_b + (1 - beta2) mean(g_b * g_b)
            m   <- beta1 m + (1 - beta1) g
            p   <- p - lr * weight_decay * p
            p   <- p - lr / (1 - beta1^t) * m / (sqrt(v_b / (1 - beta2^t)) + eps)
        """
        self._scalars.fill(
            self.param_groups, betas=self._betas(), step=self.step_count + 1, grad_scale=grad_scale
        )
        if not self.config.single_phase:
            self._block_step_size(self._whole_index)
        for bucket in self.buckets:
            if self.config.single_phase:
                self._update_whole(bucket)
            else:
                self._update_segments(bucket, bucket.whole)
            if len(bucket.ranges):
                self.kernels.update_elementwise_(
                    *self._storage(bucket, bucket.exp_avg_sq_E),
                    bucket.ranges,
                    group_B=self._group_B,
                    scalars=self._scalars,
                    origin_B=self._origin_B,
                )
        self._finish_reductions()
        if self._cut_index is not None:
            self._block_step_size(self._cut_index)
            for bucket in self.buckets:
                self._update_segments(bucket, bucket.cut)

    def _storage(self, bucket: _BucketStep, *exp_avg_sq: Tensor) -> tuple[Tensor | None, ...]:
        state = bucket.state
        weight = bucket.source.weight if state.owns_main_param else None
        return state.param, state.exp_avg, *exp_avg_sq, weight, bucket.source.grad

    def _block_step_size(self, index: Tensor | None) -> None:
        self.kernels.block_step_size_(
            self.exp_avg_sq_B,
            self._step_size_B,
            self._sum_sq_S,
            inv_numel_B=self._inv_numel_B,
            group_B=self._group_S,
            scalars=self._scalars,
            index=index,
        )

    def _update_segments(self, bucket: _BucketStep, segments: SegmentTable) -> None:
        if len(segments):
            self.kernels.update_(
                *self._storage(bucket),
                segments,
                step_size_B=self._step_size_B,
                group_B=self._group_B,
                scalars=self._scalars,
                origin_B=self._origin_B,
            )

    def _update_whole(self, bucket: _BucketStep) -> None:
        if len(bucket.whole):
            self.kernels.update_whole_(
                *self._storage(bucket),
                bucket.whole,
                exp_avg_sq_B=self.exp_avg_sq_B,
                step_size_B=self._step_size_B,
                sum_sq_B=self._sum_sq_B,
                inv_numel_B=self._inv_numel_B,
                group_B=self._group_B,
                scalars=self._scalars,
                origin_B=self._origin_B,
            )

    def _start_reductions(self) -> None:
        for reduction, sums_S in self.reductions:
            reduction.complete_over_dp_(sums_S)
        for reduction, sums_S in self.reductions:
            reduction.start_tp(sums_S)

    def _finish_reductions(self) -> None:
        for reduction, sums_S in self.reductions:
            reduction.finish_tp_(sums_S)

    @torch.no_grad()
    def average_into_v(self, sum_B: Tensor) -> None:
        """Set v of every block to the mean of values that its elements had; all ranks call it.

        Takes the collectives of :meth:`collect`, so blocks that are cut are averaged whole.

        Args:
            sum_B: sum of the values over each segment, float32, shape ``(B,)``.
        """
        self._sum_sq_S.copy_(sum_B)
        self._start_reductions()
        self._finish_reductions()
        torch.mul(self._sum_sq_S, self._inv_numel_B, out=self.exp_avg_sq_B)

    def pieces(self) -> Iterator[Piece]:
        """Yield the pieces of parameters that this rank owns, in the order of its buckets."""
        for bucket in self.buckets:
            layout = bucket.layout
            offset = bucket.domain.dp_rank * layout.slice_numel
            for placement in layout.placements:
                first = max(placement.start, offset)
                last = min(placement.end, offset + layout.slice_numel)
                if first < last:
                    number = placement.parameter
                    yield Piece(
                        number,
                        first - placement.start,
                        last - placement.start,
                        bucket,
                        slice(first - offset, last - offset),
                        _extent(bucket.part.parameter_S, number),
                        _extent(bucket.part.parameter_R, number),
                    )

    def state_bytes(self) -> dict[str, int]:
        """Return bytes of this rank's optimizer state by kind, as allocated."""
        kinds = [bucket.state.bytes_by_kind() for bucket in self.buckets]
        return {
            "main_param": sum(kind["main_param"] for kind in kinds),
            "exp_avg": sum(kind["exp_avg"] for kind in kinds),
            "exp_avg_sq": self.exp_avg_sq_B.nbytes + self.exp_avg_sq_E.nbytes,
        }

    def communication_per_step(self) -> dict[str, Any]:
        """Return the collectives that complete blocks, and the bytes that this rank receives.

        The norm's all-reduce is left out: every optimizer that clips has it.
        """
        found = {
            f"{domain.name} {group}": numel
            for domain, (reduction, _) in zip(self.domains, self.reductions, strict=True)
            for group, numel in reduction.collectives
        }
        return {"collectives": len(found), "bytes": sum(found.values()), "by_group": found}

    def _plan_norm(self, owner: IntArray) -> np.ndarray[Any, np.dtype[np.int8]]:
        """Return, for each sum, the domain in whose norm it counts, -1 for none."""
        number = {domain.name: index for index, domain in enumerate(self.domains)}
        domain = [
            number["expert" if blocks.info.expert else "dense"] if blocks.info.in_norm else -1
            for blocks in self.parameters
        ]
        return np.asarray(domain, dtype=np.int8)[owner]

    def _reduce_norm(self) -> None:
        if distributed.is_initialized():
            groups = [domain.norm_group for domain in self.domains]
            if all(group == groups[0] for group in groups):
                distributed.all_reduce(self._norm_stats, group=groups[0])
            else:
                for row, group in enumerate(groups):
                    distributed.all_reduce(self._norm_stats[row], group=group)

    def _betas(self) -> tuple[float, float]:
        betas = {tuple(group["betas"]) for group in self.param_groups}
        if len(betas) != 1:
            raise NotImplementedError(
                f"Adam-mini got parameter groups with different betas {sorted(betas)}; all groups "
                "must share one pair. Give the groups different lr or weight_decay instead."
            )
        return betas.pop()


def _extent(owners: np.ndarray[Any, Any], number: int) -> slice:
    """Return the run of equal entries ``number``; a bucket lists each parameter's in one run."""
    found = np.flatnonzero(owners == number)
    return slice(int(found[0]), int(found[-1]) + 1) if len(found) else slice(0, 0)
