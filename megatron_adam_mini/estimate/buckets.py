"""Parameters of a rank -> the buckets into which Megatron's distributed optimizer will put them.

Imports ``layout``, ``models`` and ``parallel``. Reproduces, for the released 0.19.2,
DistributedOptimizer._compute_per_buffer_param_layout and the bucket sizes of megatron.training;
at run time ``mcore/slices`` reads the same integers from the buffers themselves.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_adam_mini.config import AdamMiniConfig
from megatron_adam_mini.estimate.models import Model
from megatron_adam_mini.estimate.parallel import Parallel
from megatron_adam_mini.estimate.stages import EMBEDDING, stage_parameters
from megatron_adam_mini.plan.layout import BucketLayout, BufferLayout, Placement
from megatron_adam_mini.plan.parameter_info import HEAD_PARTS, ParameterInfo
from megatron_adam_mini.plan.partition import ParameterBlocks, partition_parameter

#: Roles of the weights that Transformer Engine's layers hold in 8 bits with --fp8-param-gather.
_QUANTIZED = frozenset({*HEAD_PARTS, "latent_down", "attention_projection", "mlp"})
#: Parameters start at multiples of this many elements.
_ALIGNMENT = 64


@dataclass(frozen=True)
class StagePlan:
    """Parameters and buckets of one rank of a pipeline stage.

    Attributes:
        parameters: those of all its virtual stages; placements index into them.
        dense: buffers shared by the data-parallel group, one per virtual stage.
        expert: buffers shared by the expert-data-parallel group.
        quantized_numel: elements of those buffers whose weights are FP8, padding included.
    """

    parameters: list[ParameterBlocks]
    dense: list[BufferLayout]
    expert: list[BufferLayout]
    quantized_numel: int = 0

    @property
    def buckets(self) -> list[BucketLayout]:
        """The buckets of all buffers."""
        return [bucket for buffer in self.dense + self.expert for bucket in buffer.buckets]


def stage_blocks(
    model: Model,
    parallel: Parallel,
    options: AdamMiniConfig,
    *,
    pp_rank: int,
    tp_rank: int = 0,
    expert_tp_rank: int = 0,
) -> list[list[ParameterBlocks]]:
    """Return the parameters of each virtual stage of a rank with their blocks."""
    chunks = stage_parameters(
        model, parallel, pp_rank=pp_rank, tp_rank=tp_rank, expert_tp_rank=expert_tp_rank
    )
    return [[partition_parameter(info, options) for info in chunk] for chunk in chunks]


def plan_stage(
    model: Model, parallel: Parallel, chunks: Sequence[Sequence[ParameterBlocks]], *, pp_rank: int
) -> StagePlan:
    """Put the parameters of each virtual stage of a rank into buckets."""
    parameters = [blocks for chunk in chunks for blocks in chunk]
    numel = sum(blocks.info.numel for blocks in parameters)
    tied = parallel.pp > 1 and (
        not model.untie_embeddings_and_output_weights or model.mtp_num_layers is not None
    )
    buffers: dict[bool, list[BufferLayout]] = {False: [], True: []}
    base = quantized_numel = 0
    for number, chunk in enumerate(chunks):
        # Later pipeline stages and later virtual stages have one bucket per buffer.
        size = _bucket_size(parallel, numel) if pp_rank == 0 and number == 0 else None
        # Weights of each type have buffers of their own.
        for expert, quantized in itertools.product(buffers, (False, True)):
            members = [
                base + i
                for i, blocks in enumerate(chunk)
                if blocks.info.expert == expert
                and _is_quantized(blocks.info, parallel) == quantized
            ]
            buckets = _fill(
                [(index, parameters[index]) for index in reversed(members)],
                bucket_size=size,
                num_slices=parallel.expert_shards if expert else parallel.dense_shards,
                pad_for_busbw=parallel.ddp_pad_buckets_for_high_nccl_busbw,
                tied=tied,
            )
            if buckets:
                buffers[expert].append(BufferLayout(tuple(buckets)))
            if quantized:
                quantized_numel += sum(bucket.numel for bucket in buckets)
        base += len(chunk)
    return StagePlan(parameters, buffers[False], buffers[True], quantized_numel)


def _is_quantized(info: ParameterInfo, parallel: Parallel) -> bool:
    return parallel.fp8_param_gather and info.role in _QUANTIZED


def _bucket_size(parallel: Parallel, num_parameters: int) -> int | None:
    """Return the number of elements at which a bucket is closed, ``None`` for a single bucket.

    Source: megatron.training.training.resolve_ddp_bucket_size.
    """
    if not parallel.overlap_grad_reduce:
        return None
    if parallel.ddp_num_buckets is not None:
        return num_parameters // parallel.ddp_num_buckets
    if parallel.ddp_bucket_size is not None:
        return parallel.ddp_bucket_size
    return max(40_000_000, 1_000_000 * parallel.data_parallel_with_context)


def _fill(
    members: Sequence[tuple[int, ParameterBlocks]],
    *,
    bucket_size: int | None,
    num_slices: int,
    pad_for_busbw: bool,
    tied: bool,
) -> list[BucketLayout]:
    """Place parameters one after the other, in reverse order of the model.

    Source: megatron.core.optimizer.distrib_optimizer, _compute_per_buffer_param_layout.
    """
    divisor = math.lcm(num_slices, 128, 2**16 if pad_for_busbw else 1)
    found: list[BucketLayout] = []
    placements: list[Placement] = []
    offset = end = 0

    def close() -> None:
        nonlocal offset, end
        numel = _padded(end, divisor)
        found.append(BucketLayout(numel, num_slices, tuple(placements), offset))
        placements.clear()
        offset, end = offset + numel, 0

    for index, blocks in members:
        # Both copies of an embedding get a bucket of their own.
        alone = tied and blocks.info.name == EMBEDDING
        if alone and placements:
            end = _padded(end, _ALIGNMENT)
            close()
        start = _padded(end, _ALIGNMENT)
        end = start + blocks.info.numel
        placements.append(Placement(index, start, end))
        if alone or (bucket_size is not None and end >= bucket_size):
            close()
    if placements:
        close()
    return found


def _padded(value: int, divisor: int) -> int:
    return -(-value // divisor) * divisor
