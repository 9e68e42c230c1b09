"""Sums of squares in float64, for the rare gradients whose squares overflow float32.

Imports torch, ``plan``, ``state`` and the reference kernels. Data flow: gradients -> **WideSums**
-> norm, non-finite? -> mean squares of blocks -> v. Plain torch in bounded memory: it runs only
after float32 sums were too large, which no sound training sees. Squares of float32 numbers and
their sums always fit into float64, so if a sum is not finite, one of its gradients is not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_adam_mini.kernels import reference
from megatron_adam_mini.plan.column_table import ColumnTable
from megatron_adam_mini.plan.step_plan import StepPlan
from megatron_adam_mini.state import Buffer

#: Elements that are squared at once; float64 takes 8 bytes of each.
_CHUNK = 2**22

#: Largest v: the largest float32 number, 3.403e38, less what roundings may add.
LARGEST_V = 3.4e38


class WideSums:
    """Sums of squares of this rank's gradients as they are in the buffers; local to the rank.

    Args:
        plan: all integers.
        buffers: live tensors of the plan's buffers.
        device: where the buffers are.

    Attributes:
        sum_sq_SR: float64.
        largest_SR: the largest square in each segment or range, float64.
    """

    def __init__(self, plan: StepPlan, buffers: Sequence[Buffer], device: torch.device) -> None:
        self._plan = plan
        self.sum_sq_SR = torch.zeros(len(plan.parameter_SR), dtype=torch.float64, device=device)
        self.largest_SR = torch.zeros_like(self.sum_sq_SR)
        for buffer, of_buffer in zip(buffers, plan.buffers, strict=True):
            for table in (of_buffer.segments, of_buffer.ranges):
                for run in table.runs:
                    rows = buffer.grad[run.in_buffer].view(run.count, run.length)
                    self._add(rows, self.sum_sq_SR[run.entries], self.largest_SR[run.entries])
            self._add_columns(buffer.grad, of_buffer.columns)

    def _add_columns(self, grad: Tensor, table: ColumnTable) -> None:
        runs = zip(table.start_C, table.end_C, table.width_C, table.index_C, strict=True)
        for start, end, width, index in runs:
            height = max(1, _CHUNK // int(width)) * int(width)  # elements of whole rows
            for begin in range(int(start), int(end), height):
                squares = grad[begin : min(begin + height, int(end))].double().square_()
                count = min(len(squares), int(width))
                here = slice(int(index), int(index) + count)
                rows = torch.nn.functional.pad(squares, (0, -len(squares) % count))
                rows = rows.view(-1, count)
                self.sum_sq_SR[here] += rows.sum(dim=0)
                self.largest_SR[here] = torch.maximum(self.largest_SR[here], rows.amax(dim=0))

    @staticmethod
    def _add(rows: Tensor, sums: Tensor, largest: Tensor) -> None:
        count, length = rows.shape
        height = max(1, _CHUNK // length)
        for first in range(0, count, height):
            here = slice(first, first + height)
            for begin in range(0, length, _CHUNK):
                squares = rows[here, begin : begin + _CHUNK].double().square_()
                sums[here] += squares.sum(dim=1)
                largest[here] = torch.maximum(largest[here], squares.amax(dim=1))

    def norm_partials_(self, stats_D2: Tensor, domain_SR: Tensor) -> None:
        """Add up what counts in the norm, and count non-finite sums; see ``reference``."""
        reference.norm_partials_(stats_D2, self.sum_sq_SR, domain_SR)

    def shares_of_mean(self, grad_scale: Tensor) -> Tensor:
        """Return what each segment adds to the mean square of its block, float32, ``(S,)``.

        Args:
            grad_scale: factor of the gradients, float64.
        """
        numel_S = torch.from_numpy(self._plan.block_numel_S).to(self.sum_sq_SR)
        return (self.sum_sq_SR[: len(numel_S)] * (grad_scale.square() / numel_S)).float()

    def too_large(self, mean_sq_S: Tensor, grad_scale: Tensor) -> Tensor:
        """Return which segments and ranges have gradients whose v does not fit, bool, ``(SR,)``.

        Args:
            mean_sq_S: complete mean squares of the blocks of all segments.
            grad_scale: as above.
        """
        own_v = self.largest_SR[len(mean_sq_S) :] * grad_scale.square()
        return ~(torch.cat([mean_sq_S.double(), own_v]) <= LARGEST_V)

    def non_finite_names(self) -> list[str]:
        """Return the names of this rank's parameters with gradients that are not finite."""
        return self.names(~self.sum_sq_SR.isfinite())

    def names(self, chosen_SR: Tensor) -> list[str]:
        """Return the names of the parameters that chosen segments and ranges belong to."""
        owners = set(self._plan.parameter_SR[chosen_SR.cpu().numpy()].tolist())
        return [self._plan.parameters[owner].info.name for owner in sorted(owners)]
