"""State as flat buckets: Adam-mini's format ``buckets``, and those of Megatron's Adam.

Imports megatron.core's checkpoint types, ``entries``, ``pending_load`` and ``slices``. Such entries
are bound to the buckets of one layout; other formats are in the model's coordinates, see
``model_space``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from megatron_adam_mini.mcore.entries import Shards, to_save
from megatron_adam_mini.mcore.pending_load import PendingLoad
from megatron_adam_mini.mcore.slices import ShardedBuffer
from megatron_adam_mini.mcore.state_view import StateView
from megatron_adam_mini.plan.manifest import STATE_PREFIX
from megatron_adam_mini.plan.step_plan import Piece

#: Sizes of the layout that must be equal for a checkpoint of flat buckets.
_FIXED_BY_BUCKETS = ("tensor", "pipeline", "virtual_pipeline", "expert", "expert_tensor")


def need_buckets(view: StateView, checkpoint_format: str) -> None:
    """Refuse a checkpoint of flat buckets in a run without buckets.

    Raises:
        ValueError: the run does not use the distributed optimizer.
    """
    if view.replica is None:
        raise ValueError(
            f"The checkpoint's optimizer state has the format {checkpoint_format}: flat buckets of "
            "the distributed optimizer, which this run does not use. Add "
            "--use-distributed-optimizer, or save it in the run that wrote it in a format that "
            "loads anywhere: Adam-mini's model_space, or Adam's fully_reshardable."
        )


def refuse_other_buckets(view: StateView, identity: Mapping[str, Any]) -> None:
    """Refuse flat buckets of another layout than this run's.

    Raises:
        ValueError: names the sizes that differ.
    """
    need_buckets(view, "buckets")
    saved, own = identity["saved_from"], view.sizes()
    # Without experts there are no sizes of theirs.
    other = [name for name in _FIXED_BY_BUCKETS if saved.get(name, 1) != own.get(name, 1)]
    if other:
        raise ValueError(
            "The checkpoint's Adam-mini state consists of flat buckets, which load under another "
            "data-parallel size only, but of the parallel sizes differ "
            + ", ".join(f"{name} ({saved.get(name, 1)}, here {own.get(name, 1)})" for name in other)
            + ". Load it with those sizes and save it again without --adam-mini-checkpoint-format "
            "buckets: model_space loads under any layout."
        )


def bucket_shards(view: StateView, pending: PendingLoad | None) -> Shards:
    """Return ``param`` and ``exp_avg`` of whole slices, without padding at the bucket's end.

    Args:
        view: the optimizer.
        pending: the load that requests them; ``None``: to save them.
    """
    shards: Shards = {}
    first_of, numbers = [], Counter[int]()
    for plan in view.inner.plan.buffers:  # buckets are numbered within their domain
        first_of.append(numbers[plan.domain])
        numbers[plan.domain] += len(plan.slices)
    for state in view.state.everywhere:
        assert isinstance(state.buffer, ShardedBuffer)
        domain = view.domains[state.plan.domain]
        for index, slice_plan, window in state.share.windows:
            begin = window.in_buffer.start - slice_plan.bucket.offset
            numel = state.buffer.unpadded_numel(index)
            length = min(begin + window.numel, numel) - begin
            if length <= 0:
                continue
            number = first_of[state.share.number] + index
            held = window.part(0, length)
            floats = to_save(state, held) if pending is None else pending.floats_of(state, held)
            for kind, values in floats.items():
                flat = values[0:length]
                # A slice that is on device and host has a part for each.
                parts = shards.setdefault(f"{domain.name}_bucket_{kind}.{number}", {})
                parts[str(len(parts))] = _flat(
                    view,
                    f"{STATE_PREFIX}bucket.{kind}.{domain.key}.bucket_{number}",
                    flat,
                    numel,
                    begin,
                )
    return shards


def in_adams_bucket(view: StateView, piece: Piece, kind: str, flat: Tensor) -> ShardedTensor:
    """Request a piece from its flat bucket, where Megatron's ``dp_reshardable`` format has it.

    Args:
        view: the optimizer.
        piece: the piece.
        kind: Megatron's name of what is read.
        flat: what is written, shape ``(elements of the piece,)``.
    """
    state = view.state_of(piece)
    assert isinstance(state.buffer, ShardedBuffer)
    return _flat(
        view,
        view.domain_of(piece).adam_key + state.buffer.bucket_key_suffix(piece.bucket, kind),
        flat,
        state.buffer.unpadded_numel(piece.bucket),
        piece.window.in_buffer.start - state.plan.slices[piece.bucket].bucket.offset,
    )


def _flat(view: StateView, key: str, data: Tensor, numel: int, begin: int) -> ShardedTensor:
    """Describe elements of a flat bucket of ``numel``, from ``begin`` on."""
    return ShardedTensor(
        key=key,
        data=data,
        dtype=data.dtype,
        local_shape=tuple(data.shape),
        global_shape=(numel,),
        global_offset=(begin,),
        axis_fragmentations=None,
        replica_id=(0, 0, view.replica or 0),
    )
