"""The vectors of a rank with one entry per segment, which last from step to step.

Imports torch, numpy, ``plan``, ``state`` and ``kernels``. Data flow: step plan, sums of squares of
``collectives`` -> **StepVectors** -> kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_adam_mini.kernels import SegmentVectors
from megatron_adam_mini.plan.step_plan import StepPlan
from megatron_adam_mini.state import RankState


class StepVectors:
    """Vectors of one rank: made once, and filled anew in each step.

    Args:
        plan: all integers.
        sum_sq_SR: sums of squares, kept.
        group_of_parameter: index of the parameter group of each parameter of the plan.
        stochastic_rounding: whether the noise of an m in fewer bits needs numbers of elements.
        has_codes: whether m has 8 bits.
        device: where the buffers are.

    Attributes:
        sum_sq_SR, sum_sq_S: as above, and without the element ranges.
        step_size_S: what the last step multiplied m of each segment by.
        inv_numel_S, group_SR, origin_SR, exp_avg_scale_S2: see ``SegmentVectors``.
        norm_domain_SR: domain whose gradient norm includes the entry; -1: none.
        uncut, cut: segments of uncut and of cut blocks; ``None``: all segments, and none.
    """

    def __init__(
        self,
        plan: StepPlan,
        sum_sq_SR: Tensor,
        group_of_parameter: Sequence[int],
        *,
        stochastic_rounding: bool,
        has_codes: bool,
        device: torch.device,
    ) -> None:
        def to_device(array: np.ndarray[Any, Any]) -> Tensor:
            return torch.from_numpy(array).to(device)

        def floats(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        num = plan.num_segments
        self.sum_sq_SR, self.sum_sq_S = sum_sq_SR, sum_sq_SR[:num]
        self.step_size_S = floats(num)
        self.exp_avg_scale_S2 = floats(num, 2) if has_codes else None
        inv_numel_S = (1.0 / plan.block_numel_S.astype(np.float64)).astype(np.float32)
        self.inv_numel_S = to_device(inv_numel_S)
        group_P = np.asarray(group_of_parameter, dtype=np.int32)
        self.group_SR = to_device(group_P[plan.parameter_SR])
        self.origin_SR: Tensor | None = None
        if stochastic_rounding:
            self.origin_SR = to_device(plan.first_element_numbers())
        self.norm_domain_SR = to_device(plan.norm_domain_SR)
        self.uncut: Tensor | None = None
        self.cut: Tensor | None = None
        if plan.is_cut_S.any():
            self.uncut = to_device(np.flatnonzero(~plan.is_cut_S))
            self.cut = to_device(np.flatnonzero(plan.is_cut_S))

    @property
    def nbytes(self) -> int:
        """Bytes of all but the sums, which ``collectives`` hold."""
        own = (
            self.step_size_S,
            self.exp_avg_scale_S2,
            self.inv_numel_S,
            self.group_SR,
            self.origin_SR,
            self.norm_domain_SR,
            self.uncut,
            self.cut,
        )
        return sum(tensor.nbytes for tensor in own if tensor is not None)

    def of(self, state: RankState) -> SegmentVectors:
        """Return what kernels take: these vectors, and v of the state."""
        return SegmentVectors(
            exp_avg_sq_S=state.exp_avg_sq_S,
            step_size_S=self.step_size_S,
            sum_sq_SR=self.sum_sq_SR,
            inv_numel_S=self.inv_numel_S,
            group_SR=self.group_SR,
            origin_SR=self.origin_SR,
            exp_avg_scale_S2=self.exp_avg_scale_S2,
        )
