"""Sums of squares that are taken while the backward pass runs on, bucket by bucket.

Imports torch, ``plan``, ``state`` and ``kernels``. Data flow: reduced gradients of a bucket ->
**OverlappedSums** -> the partial sums of ``optimizer``. Who knows when a bucket is reduced, and
which parameters are changed after that, is ``mcore/grad_sync``.

A step uses sums only if they are those of the gradients that it finds:

* What is known to change after the reduction is never summed here.
* torch counts in-place operations on a tensor and all its views. The count is kept when all
  reductions are over; if it is another one in the step, the step takes the sums of that buffer.
* Operations on ``tensor.data``, collectives, and kernels that know addresses only are not counted.
  So a few gradients of each parameter are kept with the sums and compared on the device; if one
  differs, the sums become NaN, and the step, which is in doubt then, takes all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_adam_mini.gradient_samples import GradientSamples
from megatron_adam_mini.kernels import sum_squares_
from megatron_adam_mini.plan.bucket_tables import BucketTables, tables_by_bucket, tables_of
from megatron_adam_mini.plan.buffer_plan import Window
from megatron_adam_mini.plan.partition import BoolArray
from megatron_adam_mini.plan.step_plan import StepPlan
from megatron_adam_mini.state import Buffer

logger = logging.getLogger(__name__)


class Bucket(NamedTuple):
    """Number of a buffer in the plan, and of a bucket in it."""

    buffer: int
    number: int


class OverlappedSums:
    """Sums of squares of this rank's gradients, on a stream of their own; local to the rank.

    Args:
        plan: all integers.
        buffers: live tensors of the plan's buffers.
        kernels: module with the kernels.
        late_P: which parameters are left to the step.
        device: where the buffers are.

    Attributes:
        used: buckets whose sums the last step did not have to take.
    """

    def __init__(
        self,
        plan: StepPlan,
        buffers: Sequence[Buffer],
        kernels: Any,
        late_P: Sequence[bool],
        *,
        device: torch.device,
    ) -> None:
        early_P = ~np.asarray(late_P, dtype=np.bool_)
        early_SR = early_P[plan.parameter_SR]
        self._buffers = tuple(buffers)
        self._kernels = kernels
        self._early = [tables_by_bucket(buffer, early_SR) for buffer in plan.buffers]
        self._late = [tables_of(buffer, ~early_SR) for buffer in plan.buffers]
        self._samples = [
            GradientSamples(buffer, windows, device)
            for buffer, windows in zip(buffers, _windows(plan, early_P), strict=True)
        ]
        # Not those of the optimizer: its own still change while the next backward pass runs.
        self._sum_sq_SR = torch.zeros(len(early_SR), dtype=torch.float32, device=device)
        self._changed = torch.zeros((), dtype=torch.bool, device=device)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._taken: set[Bucket] = set()
        self._complete: dict[int, tuple[int, int]] = {}
        self._is_off = self._warned = False
        self.used = 0

    @property
    def table_bytes(self) -> int:
        """Bytes of the tables that kernels walk, made so far."""
        sums = [*self._late, *(tables for buckets in self._early for tables in buckets)]
        return sum(table.derived_bytes for tables in sums for table in tables)

    def take(self, buckets: Iterable[Bucket], wait: Callable[[], None]) -> None:
        """Start to sum the gradients of buckets whose reduction is on the way.

        Args:
            buckets: of one reduction.
            wait: lets the current stream, ours, wait for it.
        """
        if self._is_off:
            return
        # Also: the last step reads sums until it has copied them.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(self._stream):
            wait()
            for bucket in buckets:
                grad = self._buffers[bucket.buffer].grad
                tables = self._early[bucket.buffer][bucket.number]
                sum_squares_(self._kernels, self._sum_sq_SR, grad, *tables)
                self._samples[bucket.buffer].keep(bucket.number)
                self._taken.add(bucket)
                self._complete.pop(bucket.buffer, None)

    def complete(self, numbers: Iterable[int]) -> None:
        """Note that the backward pass and all reductions of some buffers are over."""
        for number in numbers:
            buckets = {Bucket(number, index) for index in range(len(self._early[number]))}
            self._complete.pop(number, None)
            if buckets <= self._taken:
                self._complete[number] = _version(self._buffers[number])
            self._taken -= buckets

    @torch.no_grad()
    def use_(self, sum_sq_SR: Tensor) -> list[list[BucketTables]]:
        """Fill in the sums that have been taken and are still right, once.

        Args:
            sum_sq_SR: modified in place: all its entries. Those of sums that were taken become NaN
                if a sample has changed.

        Returns:
            for each buffer, the tables of the sums that are left to the caller.
        """
        complete, self._complete = self._complete, {}
        right = {n for n, version in complete.items() if version == _version(self._buffers[n])}
        self._note_changes(len(complete) - len(right))
        self.used = sum(len(self._early[number]) for number in right)
        torch.cuda.current_stream().wait_stream(self._stream)  # also for the scratch of tables
        if right:
            sum_sq_SR.copy_(self._sum_sq_SR)
            differ = torch.stack([self._samples[number].differ() for number in sorted(right)])
            torch.any(differ, dim=0, out=self._changed)
            sum_sq_SR.masked_fill_(self._changed, torch.nan)
        # Not the table of the whole buffer: its launch tables would be as large as these in all.
        return [
            [late] if number in right else [*early, late]
            for number, (early, late) in enumerate(zip(self._early, self._late, strict=True))
        ]

    def look_for_changes(self) -> None:
        """Take no more sums if a sample had changed; waits for the device."""
        if self._changed:
            self._is_off = True
            logger.warning(
                "Gradients were changed between their reduction and the step where torch does not "
                "count it (tensor.data, collectives, kernels of others). The step has taken their "
                "sums of squares again; --adam-mini-overlap-block-sums is off from now on on this "
                "rank."
            )

    def _note_changes(self, buffers: int) -> None:
        if not buffers or self._warned:
            return
        self._warned = True
        logger.warning(
            "Gradients of %d buffers were changed between their reduction and the step, which "
            "takes their sums of squares again (further such steps are not logged). If each step "
            "does, --adam-mini-overlap-block-sums costs more than it saves: drop it.",
            buffers,
        )


def _windows(plan: StepPlan, chosen_P: BoolArray) -> list[list[list[Window]]]:
    """Return where chosen parameters lie, for each buffer and bucket."""
    found: list[list[list[Window]]] = [[[] for _ in buffer.slices] for buffer in plan.buffers]
    for piece in plan.pieces:
        if chosen_P[piece.parameter]:
            found[piece.buffer][piece.bucket].append(piece.window)
    return found


def _version(buffer: Buffer) -> tuple[int, int]:
    """Return what differs after most changes of a buffer's gradients."""
    grad = buffer.grad
    return grad.data_ptr(), grad._version
