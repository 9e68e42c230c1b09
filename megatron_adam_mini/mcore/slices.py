"""Megatron's parameter and gradient buffers -> slices: offsets as integers, tensors kept live.

Imports ``layout`` and reads objects of megatron.core. Megatron's own words (*bucket*, *buffer*,
*main_grad*) stay inside this file. Data flow: DDP buffers -> **BucketLayout** (integers) and
**Slice** (live tensors) -> layout, engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from megatron_adam_mini.plan.layout import BucketLayout, Placement
from megatron_adam_mini.state import Slice


@dataclass(frozen=True)
class BucketSlice:
    """The part of one bucket that this data-parallel rank owns (distributed optimizer)."""

    bucket: Any
    begin: int
    end: int
    #: What Megatron's own checkpoints call the bucket: buffer, dtypes, bucket within the buffer.
    number: tuple[int, str, int]

    @property
    def grad(self) -> Tensor:
        """Reduced gradients, as the reduce-scatter left them in the bucket."""
        grad: Tensor = self.bucket.grad_data[self.begin : self.end]
        return grad

    @property
    def weight(self) -> Tensor:
        """Model weights; Megatron's parameter all-gather sends them on from here."""
        weight: Tensor = self.bucket.param_data[self.begin : self.end]
        return weight


@dataclass(frozen=True)
class WholeParameter:
    """One whole parameter (no distributed optimizer: every data-parallel rank has all of it)."""

    param: Parameter

    @property
    def grad(self) -> Tensor:
        """Reduced gradient."""
        main_grad: Tensor = self.param.main_grad  # type: ignore[attr-defined]
        return main_grad.view(-1)

    @property
    def weight(self) -> Tensor:
        """Model weight."""
        return self.param.data.view(-1)


def dense_buffers(model_chunks: Sequence[Any]) -> list[Any]:
    """Return the buffers of dense parameters in Megatron's order, equal on all ranks of a stage."""
    return [buffer for chunk in model_chunks for buffer in chunk.buffers]


def bucket_slices(
    buffers: Sequence[Any], index_of: Mapping[Parameter, int], dp_rank: int, dp_size: int
) -> tuple[list[BucketLayout], list[Slice]]:
    """List buckets and this rank's slices of them, for the distributed optimizer.

    Args:
        buffers: Megatron's parameter and gradient buffers.
        index_of: number of each parameter.
        dp_rank: this rank in the group that shares the buckets.
        dp_size: size of that group.
    """
    layouts: list[BucketLayout] = []
    slices: list[Slice] = []
    for buffer_number, buffer in enumerate(buffers):
        dtypes = str((buffer.param_dtype, buffer.grad_dtype))
        placements: dict[int, list[Placement]] = {}
        for param, (start, end, bucket_id, *_) in buffer.param_index_map.items():
            offset = buffer.buckets[bucket_id].offset
            placements.setdefault(bucket_id, []).append(
                Placement(index_of[param], start - offset, end - offset)
            )
        for bucket_id, bucket in enumerate(buffer.buckets):
            ordered = sorted(placements.get(bucket_id, []), key=lambda p: p.start)
            layout = BucketLayout(bucket.grad_data.numel(), dp_size, tuple(ordered))
            layouts.append(layout)
            begin = dp_rank * layout.slice_numel
            number = (buffer_number, dtypes, bucket_id)
            slices.append(BucketSlice(bucket, begin, begin + layout.slice_numel, number))
    return layouts, slices


def whole_parameters(
    buffers: Sequence[Any], index_of: Mapping[Parameter, int]
) -> tuple[list[BucketLayout], list[Slice]]:
    """List every parameter as a bucket of its own, for replicated optimizer state."""
    layouts: list[BucketLayout] = []
    slices: list[Slice] = []
    for buffer in buffers:
        for param in buffer.param_index_map:
            numel = param.numel()
            layouts.append(BucketLayout(numel, 1, (Placement(index_of[param], 0, numel),)))
            slices.append(WholeParameter(param))
    return layouts, slices
