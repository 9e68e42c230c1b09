"""Megatron's parameter and gradient buffers: offsets as integers, tensors kept live.

Imports ``plan`` and ``quantized``, and reads objects of megatron.core. Megatron's own names
(``grad_data``, ``param_index_map``, ``main_grad``) are used in this file only. Data flow: DDP
buffers -> **BufferLayout** (integers) -> step plan, and **Buffer** (live tensors) -> state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_adam_mini.mcore.quantized import values_in_buffer
from megatron_adam_mini.plan.layout import BucketLayout, BufferLayout, Placement
from megatron_adam_mini.state import Buffer


@dataclass(frozen=True)
class ShardedBuffer:
    """One of Megatron's buffers, whose buckets data-parallel ranks share (distributed optimizer).

    Attributes:
        buffer: Megatron's object.
        number: its number among those of all chunks, dense ones and experts' apart, which
            Megatron's own checkpoints use.
    """

    buffer: Any
    number: int

    @property
    def grad(self) -> Tensor:
        """Gradients; after the reduce-scatter, reduced in this rank's slice of each bucket."""
        grad: Tensor = self.buffer.grad_data
        return grad

    @property
    def weight(self) -> Tensor:
        """Model weights; Megatron's parameter all-gather sends this rank's slices from here."""
        weight: Tensor = self.buffer.param_data
        return weight

    def values(self, where: slice) -> Tensor:
        """Return what the weights of a part of the buffer stand for; FP8 ones: float32."""
        weight = self.weight
        if weight.dtype != torch.uint8:
            return weight[where]
        return values_in_buffer(self.buffer.param_index_map, where, weight.device)

    @property
    def buckets(self) -> Sequence[Any]:
        """Megatron's objects, in the order of the plan."""
        buckets: Sequence[Any] = self.buffer.buckets
        return buckets

    def unpadded_numel(self, bucket: int) -> int:
        """Return the number of elements of a bucket without the padding at its end."""
        return int(self.buffer.buckets[bucket].numel_unpadded)

    def bucket_key_suffix(self, bucket: int, kind: str) -> str:
        """Return how the keys of Megatron's ``dp_reshardable`` format end for a bucket."""
        return f"gbuf_idx_{self.number}.dtype_{self._dtypes}.bucket_idx_{bucket}.{kind}"

    def of_megatrons_state(self, stored: Mapping[Any, Any]) -> dict[str, Any] | None:
        """Return the buffer's entry of what ``get_parameter_state_dp_zero`` of Megatron returns."""
        found: dict[str, Any] | None = stored.get(self.number, {}).get(self._dtypes)
        return found

    @property
    def _dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        return self.buffer.param_dtype, self.buffer.grad_dtype


@dataclass(frozen=True)
class WholeParameter:
    """One parameter as a buffer of its own; used without the distributed optimizer."""

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

    def values(self, where: slice) -> Tensor:
        """Return a part of the weight."""
        return self.weight[where]


def buffers_of(model_chunks: Sequence[Any], *, expert: bool) -> list[Any]:
    """Return the buffers of dense parameters, or of experts, in Megatron's order.

    It is the same on all ranks that share their parameters.
    """
    return [
        buffer
        for chunk in model_chunks
        for buffer in (chunk.expert_parallel_buffers if expert else chunk.buffers)
    ]


def numbers_of_chunk(buffers: Sequence[Buffer], chunk: Any) -> frozenset[int]:
    """Return which of some sharded buffers belong to a model chunk, experts' included."""
    of_chunk = {id(buffer) for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)}
    return frozenset(
        number
        for number, buffer in enumerate(buffers)
        if isinstance(buffer, ShardedBuffer) and id(buffer.buffer) in of_chunk
    )


def sharded_buffers(
    buffers: Sequence[Any], index_of: Mapping[Parameter, int], dp_size: int
) -> tuple[list[BufferLayout], list[Buffer]]:
    """Return layouts and live tensors of buffers that data-parallel ranks share.

    Args:
        buffers: Megatron's parameter and gradient buffers.
        index_of: number of each parameter.
        dp_size: number of ranks that share the buckets.
    """
    layouts: list[BufferLayout] = []
    live: list[Buffer] = []
    for number, buffer in enumerate(buffers):
        placements: dict[int, list[Placement]] = {}
        for param, (start, end, bucket_id, *_) in buffer.param_index_map.items():
            offset = buffer.buckets[bucket_id].offset
            placements.setdefault(bucket_id, []).append(
                Placement(index_of[param], start - offset, end - offset)
            )
        layouts.append(
            BufferLayout(
                tuple(
                    BucketLayout(
                        bucket.grad_data.numel(),
                        dp_size,
                        tuple(sorted(placements.get(bucket_id, []), key=lambda p: p.start)),
                        bucket.offset,
                    )
                    for bucket_id, bucket in enumerate(buffer.buckets)
                )
            )
        )
        live.append(ShardedBuffer(buffer, number))
    return layouts, live


def whole_parameters(
    buffers: Sequence[Any], index_of: Mapping[Parameter, int]
) -> tuple[list[BufferLayout], list[Buffer]]:
    """Return every parameter as a buffer of its own, for replicated optimizer state."""
    layouts: list[BufferLayout] = []
    live: list[Buffer] = []
    for buffer in buffers:
        for param in buffer.param_index_map:
            numel = param.numel()
            bucket = BucketLayout(numel, 1, (Placement(index_of[param], 0, numel),))
            layouts.append(BufferLayout((bucket,)))
            live.append(WholeParameter(param))
    return layouts, live
