"""One Adam-mini step over all slices of a rank: a fixed list of a few calls per bucket.

Imports everything below it (config, partition, layout, reduction, state, kernels) and no
Megatron. Data flow of one gradient shard, see :meth:`Engine.collect` and :meth:`Engine.update`::

    grad slice --block_sum_sq_--> partial sums --DP, TP--> complete sums of squares
                                       |                       |
                                  norm, found_inf         v, step size per block
                                       |                       |
    grad slice ----------------- grad_scale ----update_---> m, main parameter, model weight

Shape suffixes: ``_B`` all segments of the rank, ``_R`` all its element ranges, ``_E`` all
elements in them; ``_G`` parameter groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from megatron_adam_mini.config import AdamMiniConfig
from megatron_adam_mini.kernels import SegmentTable, select_backend
from megatron_adam_mini.layout import BucketLayout, SliceSegments, segment_slice
from megatron_adam_mini.partition import ParameterBlocks
from megatron_adam_mini.reduction import Reduction, plan_reduction
from megatron_adam_mini.state import Slice, SliceState


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


class _BucketStep:
    """What the step needs of one bucket: its slice, its state, and where its segments are."""

    def __init__(
        self, source: Slice, part: SliceSegments, blocks: slice, ranges: slice, elements: slice
    ) -> None:
        self.source = source
        self.part = part
        self.state = SliceState.allocate(source)
        device = self.state.main_param.device
        self.segments = SegmentTable(part.start_S, part.end_S, device)
        self.ranges = SegmentTable(part.start_R, part.end_R, device)
        self.blocks_at, self.ranges_at, self.elements_at = blocks, ranges, elements


@dataclass(frozen=True)
class Piece:
    """The elements of one parameter that one slice holds.

    Attributes:
        parameter: index of the parameter.
        begin, end: elements ``[begin, end)`` of the flattened tensor-parallel shard.
        bucket: the slice, its state and segments.
        domain: the bucket's process groups.
        window: the same elements in the slice's tensors.
        segments: the parameter's segments in ``bucket.segments``.
        ranges: its element range in ``bucket.ranges``, if it has one.
    """

    parameter: int
    begin: int
    end: int
    bucket: _BucketStep
    domain: Domain
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
        self.kernels = select_backend(config.backend)
        self.step_count = 0

        parts = [
            [segment_slice(bucket, parameters, domain.dp_rank) for bucket in domain.buckets]
            for domain in domains
        ]
        self.num_blocks = sum(p.num_segments for ps in parts for p in ps)
        self.buckets: list[_BucketStep] = []
        self.reductions: list[tuple[Reduction, slice]] = []
        segment = ranges = elements = 0
        for domain, domain_parts in zip(domains, parts, strict=True):
            begin = segment
            for source, part in zip(domain.slices, domain_parts, strict=True):
                ends = (
                    segment + part.num_segments,
                    ranges + part.num_ranges,
                    elements + part.num_elementwise,
                )
                self.buckets.append(
                    _BucketStep(
                        source,
                        part,
                        slice(segment, ends[0]),
                        slice(ranges, ends[1]),
                        slice(elements, ends[2]),
                    )
                )
                segment, ranges, elements = ends
            plan = plan_reduction(
                domain.buckets,
                domain_parts,
                parameters,
                dp_rank=domain.dp_rank,
                tp_rank=domain.tp_rank,
                tp_size=domain.tp_size,
                dp_replicas=domain.dp_replicas,
            )
            reduction = Reduction(
                plan, segment - begin, dp_group=domain.dp_group, tp_group=domain.tp_group,
                device=device,
            )  # fmt: skip
            self.reductions.append((reduction, slice(begin, segment)))

        def floats(numel: int) -> Tensor:
            return torch.zeros(numel, dtype=torch.float32, device=device)

        def joined(name: str, dtype: type) -> np.ndarray[Any, Any]:
            arrays = [getattr(bucket.part, name) for bucket in self.buckets]
            return np.concatenate([np.empty(0, dtype=dtype), *arrays])

        # One entry per segment, then one per element range.
        self._sum_sq = floats(self.num_blocks + ranges)
        self.exp_avg_sq_B = floats(self.num_blocks)
        self.exp_avg_sq_E = floats(elements)
        self._step_size_B = floats(self.num_blocks)
        inv_numel = 1.0 / joined("block_numel_S", np.int64).astype(np.float64)
        self._inv_numel_B = torch.from_numpy(inv_numel.astype(np.float32)).to(device)

        owner = np.concatenate([joined("parameter_S", np.int64), joined("parameter_R", np.int64)])
        groups = np.asarray(group_of_parameter, dtype=np.int64)
        self._group_of = torch.from_numpy(groups[owner]).to(device)
        self._norm_index = self._plan_norm(owner)
        self._grad_scale = torch.ones((), dtype=torch.float32, device=device)

    def collect(self) -> Tensor:
        """Read every gradient once, and complete the sums of squares of all blocks.

        All ranks must call it. Collectives, in this order: all-gather in the dense
        data-parallel group, in the expert's; all-reduce in the dense tensor-parallel group, in
        the expert's; one all-reduce for the norm. All but the last are left out where nothing is
        cut.

        Returns:
            float64 tensor ``[squared gradient norm, number of non-finite sums]``, of the
            gradients as they are in the buffers (loss scale included), equal on all ranks.
        """
        for bucket in self.buckets:
            grad = bucket.source.grad
            self.kernels.block_sum_sq_(self._sum_sq[bucket.blocks_at], grad, bucket.segments)
            if len(bucket.ranges):
                shifted = slice(
                    self.num_blocks + bucket.ranges_at.start,
                    self.num_blocks + bucket.ranges_at.stop,
                )
                self.kernels.block_sum_sq_(self._sum_sq[shifted], grad, bucket.ranges)
        # The norm adds partial sums: complete ones would count a cut block once per rank.
        stats = self._norm_partials()
        for reduction, segments in self.reductions:
            reduction.complete_over_dp_(self._sum_sq[segments])
        for reduction, segments in self.reductions:
            reduction.complete_over_tp_(self._sum_sq[segments])
        return self._reduce_norm(stats)

    def update(self, grad_scale: float | Tensor) -> None:
        """Advance v, m, main parameters and model weights by one step; local to the rank.

        Args:
            grad_scale: what the gradients are multiplied with before anything else: inverse of
                the loss scale times the clipping coefficient.

        Equations, with g the scaled gradient and b its block::

            v_b <- beta2 v_b + (1 - beta2) mean(g_b * g_b)
            m   <- beta1 m + (1 - beta1) g
            p   <- p - lr * weight_decay * p
            p   <- p - lr / (1 - beta1^t) * m / (sqrt(v_b / (1 - beta2^t)) + eps)
        """
        beta1, beta2 = self._betas()
        self.step_count += 1
        self._grad_scale.copy_(torch.as_tensor(grad_scale, dtype=torch.float32))
        lr_B, eps_B, decay_B, lr_R, eps_R, decay_R = self._hyper_parameters()
        scalars = {
            "grad_scale": self._grad_scale,
            "bias_correction1": self._scalar(1 - beta1**self.step_count),
            "bias_correction2": self._scalar(1 - beta2**self.step_count),
        }
        self.kernels.block_step_size_(
            self.exp_avg_sq_B,
            self._step_size_B,
            self._sum_sq[: self.num_blocks],
            inv_numel_B=self._inv_numel_B,
            lr_B=lr_B,
            eps_B=eps_B,
            beta2=beta2,
            **scalars,
        )
        for bucket in self.buckets:
            state, grad = bucket.state, bucket.source.grad
            weight = bucket.source.weight if state.owns_main_param else None
            self.kernels.update_(
                state.main_param,
                state.exp_avg,
                weight,
                grad,
                bucket.segments,
                step_size_S=self._step_size_B[bucket.blocks_at],
                decay_S=decay_B[bucket.blocks_at],
                grad_scale=self._grad_scale,
                beta1=beta1,
            )
            if len(bucket.ranges):
                self.kernels.update_elementwise_(
                    state.main_param,
                    state.exp_avg,
                    self.exp_avg_sq_E[bucket.elements_at],
                    weight,
                    grad,
                    bucket.ranges,
                    lr_R=lr_R[bucket.ranges_at],
                    eps_R=eps_R[bucket.ranges_at],
                    decay_R=decay_R[bucket.ranges_at],
                    beta1=beta1,
                    beta2=beta2,
                    **scalars,
                )

    @torch.no_grad()
    def average_into_v(self, sum_B: Tensor) -> None:
        """Set v of every block to the mean of values that its elements had; all ranks call it.

        Takes the collectives of :meth:`collect`, so blocks that are cut are averaged whole.

        Args:
            sum_B: sum of the values over each segment, float32, shape ``(B,)``.
        """
        self._sum_sq[: self.num_blocks].copy_(sum_B)
        for reduction, segments in self.reductions:
            reduction.complete_over_dp_(self._sum_sq[segments])
        for reduction, segments in self.reductions:
            reduction.complete_over_tp_(self._sum_sq[segments])
        torch.mul(self._sum_sq[: self.num_blocks], self._inv_numel_B, out=self.exp_avg_sq_B)

    def pieces(self) -> Iterator[Piece]:
        """Yield the pieces of parameters that this rank owns, in the order of its buckets."""
        buckets = iter(self.buckets)
        for domain in self.domains:
            for layout, bucket in zip(domain.buckets, buckets, strict=False):
                offset = domain.dp_rank * layout.slice_numel
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
                            domain,
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

    def _plan_norm(self, owner: np.ndarray[Any, Any]) -> list[Tensor]:
        """Return, per domain, the positions in the sums that count in the gradient norm."""
        counts = np.asarray([blocks.info.in_norm for blocks in self.parameters], dtype=np.bool_)
        expert = np.asarray([blocks.info.expert for blocks in self.parameters], dtype=np.bool_)
        return [
            torch.from_numpy(
                np.flatnonzero(counts[owner] & (expert[owner] == (domain.name == "expert")))
            ).to(self.device)
            for domain in self.domains
        ]

    def _norm_partials(self) -> Tensor:
        """Return ``(domains, 2)`` float64: this rank's share of norm^2 and non-finite sums."""
        stats = torch.zeros(len(self.domains), 2, dtype=torch.float64, device=self.device)
        for row, index in enumerate(self._norm_index):
            stats[row, 0] = self._sum_sq[index].double().sum()
        if len(stats):
            # Every sum is looked at, also those that the norm leaves out.
            stats[0, 1] = (~torch.isfinite(self._sum_sq)).sum()
        return stats

    def _reduce_norm(self, stats: Tensor) -> Tensor:
        if distributed.is_initialized():
            groups = [domain.norm_group for domain in self.domains]
            if all(group == groups[0] for group in groups):
                distributed.all_reduce(stats, group=groups[0])
            else:
                for row, group in enumerate(groups):
                    distributed.all_reduce(stats[row], group=group)
        return stats.sum(dim=0)

    def _betas(self) -> tuple[float, float]:
        betas = {tuple(group["betas"]) for group in self.param_groups}
        if len(betas) != 1:
            raise NotImplementedError(
                f"Adam-mini got parameter groups with different betas {sorted(betas)}; all groups "
                "must share one pair. Give the groups different lr or weight_decay instead."
            )
        return betas.pop()

    def _scalar(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float32, device=self.device)

    def _hyper_parameters(self) -> tuple[Tensor, ...]:
        """Return lr, eps and decay of every segment, then of every element range."""
        table = torch.tensor(
            [
                [group["lr"], group["eps"], 1.0 - group["lr"] * group["weight_decay"]]
                for group in self.param_groups
            ],
            dtype=torch.float32,
        ).to(self.device)
        lr, eps, decay = table[self._group_of].unbind(dim=1)
        middle = self.num_blocks
        return lr[:middle], eps[:middle], decay[:middle], lr[middle:], eps[middle:], decay[middle:]


def _extent(owners: np.ndarray[Any, Any], number: int) -> slice:
    """Return the run of equal entries ``number``; a bucket lists each parameter's in one run."""
    found = np.flatnonzero(owners == number)
    return slice(int(found[0]), int(found[-1]) + 1) if len(found) else slice(0, 0)
