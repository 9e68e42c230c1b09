"""Pieces of this rank's state as entries of a checkpoint, and back.

Imports megatron.core's checkpoint types, ``engine`` and ``model_space``. Used by ``checkpoint``
(Adam-mini's own formats) and ``adam_import`` (those of Megatron's Adam).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedBase,
    ShardedObject,
)
from torch import Tensor

from megatron_adam_mini.engine import Piece
from megatron_adam_mini.mcore.model_space import ModelEntry
from megatron_adam_mini.plan.layout import row_parallel
from megatron_adam_mini.plan.manifest import STATE_PREFIX

if TYPE_CHECKING:
    from megatron_adam_mini.mcore.distributed_optimizer import AdamMiniOptimizer

#: Names within the optimizer's state dict; Megatron's own optimizers use neither.
SHARDS, OBJECTS = "adam_mini_shards", "adam_mini_objects"
#: Tells ``load_guard`` that a load is Adam-mini's, and whether it is to check the files.
MARK = "adam_mini_check_files"


#: By identity of the bucket: tensors that are shaped like its slice, by kind.
FloatStates = dict[int, dict[str, Tensor]]


@dataclass
class PendingLoad:
    """What :func:`state_to_load` asked for, until :func:`take_over` gets it.

    Attributes:
        states: what the entries of ``param`` and ``exp_avg`` are views of.
        asked: entries by name, as put in the state dict.
        rows: row values of each piece, by the piece's number.
        elements: element values of each piece whose v is averaged over blocks.
        objects: entries that are not tensors.
        average: whether v is averaged over blocks rather than taken as it is.
        adam: format of Megatron's Adam that is read, ``None`` for Adam-mini's own.
        checked: whether the identity of the state was known and checked before it was asked for.
    """

    states: FloatStates
    asked: dict[str, dict[str, ShardedTensor]] = field(default_factory=dict)
    rows: dict[int, Tensor] = field(default_factory=dict)
    elements: dict[int, Tensor] = field(default_factory=dict)
    average: bool = False
    adam: str | None = None
    checked: bool = True
    objects: dict[str, ShardedObject] = field(default_factory=dict)


def remember(optimizer: AdamMiniOptimizer, pending: PendingLoad) -> dict[str, Any]:
    """Keep what was asked for until the data is there; return it as a state dict."""
    optimizer._pending_load = pending
    check_files = LocalNonpersistentObject(optimizer.engine.config.check_files)
    return {MARK: check_files} | {
        key: dict(value)
        for key, value in ((SHARDS, pending.asked), (OBJECTS, pending.objects))
        if value
    }


def kind_key(name: str) -> str:
    """Return the prefix of a kind's keys in Adam-mini's own formats."""
    return f"{STATE_PREFIX}{name}."


def float_states(optimizer: AdamMiniOptimizer) -> FloatStates:
    """Return ``param`` and ``exp_avg`` of every slice as checkpoints have them: float32.

    The state itself where it is stored so; else copies, which whoever writes to them must hand to
    ``SliceState.store``.
    """
    return {id(bucket): bucket.state.as_float32() for bucket in optimizer.engine.buckets}


def entry_of(
    optimizer: AdamMiniOptimizer, piece: Piece, entries: Mapping[int, ShardedBase]
) -> ModelEntry:
    """Return where a piece's parameter lies in the whole model.

    Raises:
        ValueError: the model's sharded state dict lacks the parameter.
    """
    found = entries.get(id(optimizer.get_parameters()[piece.parameter]))
    if found is None:
        name = optimizer.engine.parameters[piece.parameter].info.name
        raise ValueError(
            f"Parameter {name!r} is not in the model's sharded state dict, so Adam-mini cannot "
            "tell where its state belongs; build that dict with keep_vars=True."
        )
    return ModelEntry(found, optimizer.replica_number)


def put(shards: dict[str, dict[str, ShardedTensor]], name: str, found: list[ShardedTensor]) -> None:
    """Add entries under a name, unless there are none: an empty dict would become common state."""
    if found:
        shards[name] = {str(index): shard for index, shard in enumerate(found)}


def tp_rank_of_rows(optimizer: AdamMiniOptimizer, piece: Piece) -> int | None:
    """Return the tensor-parallel rank if each of its ranks holds a part of every row."""
    blocks = optimizer.engine.parameters[piece.parameter]
    return blocks.info.tp_rank if row_parallel(blocks) else None


def unshared(data: Tensor) -> Tensor:
    """Copy what an asynchronous writer process would share with training.

    On the CPU, Megatron's writer clones views but hands over tensors that fill their storage, and
    the next step would write into the checkpoint. On a GPU everything is copied to the host.
    """
    fills = data.nbytes == data.untyped_storage().nbytes()
    return data.clone() if data.device.type == "cpu" and fills else data


def elementwise_v(piece: Piece) -> Tensor:
    """Return the view of v of a piece that keeps one per element (else an empty one)."""
    if not piece.ranges.stop:
        return piece.bucket.exp_avg_sq_E[:0]
    lengths = piece.bucket.part.end_R - piece.bucket.part.start_R
    begin = int(lengths[: piece.ranges.start].sum())
    return piece.bucket.exp_avg_sq_E[begin : begin + piece.end - piece.begin]


def _segments(optimizer: AdamMiniOptimizer, piece: Piece) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return v, first and last element of a piece's segments, and the parameter's row width."""
    device = optimizer.engine.device
    at = piece.bucket.blocks_at.start
    v = optimizer.engine.exp_avg_sq_B[at + piece.segments.start : at + piece.segments.stop]
    shift = piece.begin - piece.window.start
    first = torch.from_numpy(piece.bucket.part.start_S[piece.segments] + shift).to(device)
    last = torch.from_numpy(piece.bucket.part.end_S[piece.segments] + shift).to(device)
    return v, first, last, optimizer.engine.parameters[piece.parameter].info.row_numel


def rows_from_blocks(optimizer: AdamMiniOptimizer, piece: Piece) -> Tensor:
    """Return v of every row that the piece touches, from row ``begin // width`` on."""
    v, first, last, width = _segments(optimizer, piece)
    # Segments end at row ends, except where the slice does: only the first can start within a row.
    return torch.repeat_interleave(v, -(-last // width) - first // width)


def blocks_from_rows(optimizer: AdamMiniOptimizer, piece: Piece, rows: Tensor) -> None:
    """Set v of the piece's segments from row values, see :func:`rows_from_blocks`."""
    v, first, _, width = _segments(optimizer, piece)
    v.copy_(rows[first // width - piece.begin // width])


def sums_over_segments(optimizer: AdamMiniOptimizer, pending: PendingLoad) -> Tensor:
    """Return, for each segment, the sum over its elements of the v that they had."""
    engine = optimizer.engine
    sums = torch.zeros(engine.num_blocks, dtype=torch.float32, device=engine.device)
    for number, piece in enumerate(engine.pieces()):
        at = piece.bucket.blocks_at.start
        out = sums[at + piece.segments.start : at + piece.segments.stop]
        if not len(out):
            continue
        _, first, last, width = _segments(optimizer, piece)
        if number in pending.elements:
            elements = pending.elements[number].double()
        else:
            elements = pending.rows[number].double().repeat_interleave(width)
            skipped = piece.begin % width
            elements = elements[skipped : skipped + piece.end - piece.begin]
        # Prefix sums in float64: one pass whatever the number of segments.
        prefix = torch.cat([elements.new_zeros(1), elements.cumsum(0)])
        out.copy_(prefix[last - piece.begin] - prefix[first - piece.begin])
    return sums


def refuse_buckets(optimizer: AdamMiniOptimizer, layout: str) -> None:
    """Refuse a checkpoint of flat buckets in a run that has none of its own.

    Raises:
        ValueError: ``dp_reshardable`` without the distributed optimizer.
    """
    if layout == "dp_reshardable" and optimizer.replica_number is None:
        raise ValueError(
            "The checkpoint's optimizer state is dp_reshardable: flat buckets of the distributed "
            "optimizer, which this run does not use. Add --use-distributed-optimizer, or save with "
            "--dist-ckpt-optim-fully-reshardable."
        )


def bucket_shards(
    optimizer: AdamMiniOptimizer, states: FloatStates, *, loading: bool
) -> dict[str, dict[str, ShardedTensor]]:
    """Return ``param`` and ``exp_avg`` of whole bucket slices, padding at the end left out."""
    shards: dict[str, dict[str, ShardedTensor]] = {}
    stage = optimizer.model_parallel_rank
    for number, bucket in enumerate(optimizer.engine.buckets):
        source: Any = bucket.source
        numel = source.bucket.numel_unpadded
        length = min(source.end, numel) - source.begin
        if length <= 0:
            continue
        for kind, flat in states[id(bucket)].items():
            data = flat[:length] if loading else unshared(flat[:length])
            shards[f"bucket_{kind}.{number}"] = {
                "0": ShardedTensor(
                    key=f"{STATE_PREFIX}bucket.{kind}.model_parallel_{stage}.bucket_{number}",
                    data=data,
                    dtype=data.dtype,
                    local_shape=(length,),
                    global_shape=(numel,),
                    global_offset=(source.begin,),
                    axis_fragmentations=None,
                    replica_id=(0, 0, optimizer.replica_number or 0),
                )
            }
    return shards
