"""Start Adam-mini from a checkpoint of Megatron's own Adam.

Imports megatron.core's checkpoint types; used by ``checkpoint`` when a checkpoint carries no
identity of Adam-mini. Main parameters and m are copied unchanged; v of a block becomes the mean
of Adam's v over it, which is what Adam-mini would have accumulated from the same gradients, since
v is linear in their squares.

Three formats are read: ``fully_reshardable`` and ``dp_reshardable`` of the distributed optimizer,
and that of the plain optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import Tensor, distributed

from megatron_adam_mini.adam_rules import (
    MAIN_PARAM,
    PLAIN_MAIN_PARAM,
    UNSOUND_CAUSE,
    adam_key,
    steps_of,
    steps_problem,
)
from megatron_adam_mini.mcore.entries import (
    OBJECTS,
    PendingLoad,
    StateView,
    add_entries,
    refuse_flat_buckets,
)
from megatron_adam_mini.mcore.model_space import entries_by_parameter
from megatron_adam_mini.mcore.slices import ShardedBuffer
from megatron_adam_mini.plan.manifest import FLAT_BUCKETS
from megatron_adam_mini.plan.step_plan import Piece
from megatron_adam_mini.rounding import is_rounded

FORMATS = ("fully_reshardable", FLAT_BUCKETS, "plain")


def prepare_load(
    view: StateView, model_state: Mapping[str, Any], metadata: Mapping[str, Any]
) -> PendingLoad:
    """Request this rank's slices from a checkpoint of Adam.

    Raises:
        ValueError: the format cannot be read.
    """
    adam_format = metadata.get("distrib_optim_sharding_type") or "plain"
    if adam_format not in FORMATS:
        raise ValueError(
            f"The checkpoint's optimizer state has Megatron's format {adam_format!r}; Adam-mini "
            f"can start from {', '.join(FORMATS)}. Save it again in one of them, or load the model "
            "alone with --no-load-optim."
        )
    refuse_flat_buckets(view, adam_format)
    pending = PendingLoad(average=True, adam_format=adam_format)
    entries = entries_by_parameter(model_state)
    for number, piece in enumerate(view.inner.plan.pieces):
        state = view.state_of(piece)
        flats = dict(pending.floats_of(state, piece.window))
        if not state.owns_main_param:
            del flats["param"]  # the model's weights are the main parameters
        flats["exp_avg_sq"] = view.state.v_of_elements(piece)
        if not piece.is_elementwise:
            flats["exp_avg_sq"] = pending.elements[number] = torch.empty(
                piece.end - piece.begin, device=view.inner.device
            )
        for kind, flat in flats.items():
            if adam_format == FLAT_BUCKETS:
                found = [_in_bucket(view, piece, kind, flat)]
            else:
                is_plain_param = (adam_format, kind) == ("plain", MAIN_PARAM)
                prefix = adam_key(PLAIN_MAIN_PARAM if is_plain_param else kind, "")
                entry = view.entry_of(piece, entries)
                found = entry.elements(prefix, flat, piece.begin, piece.end, fold=False)
            add_entries(pending.asked, f"{kind}.{number}", found)
    if adam_format == FLAT_BUCKETS:
        # Groups and loss scale are objects of each model-parallel part there.
        keys = ["optimizer", "per_bucket_numel", "per_bucket_numel_unpadded"]
        for key in keys + (["grad_scaler"] if view.grad_scaler is not None else []):
            pending.objects[key] = ShardedObject(
                f"optimizer.distributed.dp_group_idx_{view.model_parallel_rank()}.{key}",
                None,
                (1,),
                (0,),
                replica_id=(0, 0, 0),
            )
    return pending


def common_from_adam(
    view: StateView, loaded: Mapping[str, Any], pending: PendingLoad
) -> dict[str, Any]:
    """Return step, groups and loss scale in Adam-mini's own form; all ranks must call it.

    Raises:
        ValueError: the main parameters do not belong to the model's weights. Megatron-Core 0.16.1
            to 0.19.2 write such ``fully_reshardable`` checkpoints if a bucket other than the last
            is padded at its end (fixed upstream in #5077).
    """
    pieces = zip(view.inner.plan.pieces, pending.floats, strict=True)
    wrong = [
        view.blocks_of(piece).info.name
        for piece, (state, _, values) in pieces
        if state.owns_main_param and not is_rounded(view.inner.weight(piece), values["param"]).all()
    ]
    count = torch.tensor([len(wrong)], dtype=torch.int64, device=view.inner.device)
    distributed.all_reduce(count)
    if int(count):
        example = f" ({wrong[0]!r} on this rank)" if wrong else ""
        raise ValueError(
            f"The checkpoint's Adam state is unsound: main parameters in {int(count)} pieces"
            f"{example} do not round to the model's weights. {UNSOUND_CAUSE}"
        )
    source = loaded if pending.adam_format != FLAT_BUCKETS else loaded[OBJECTS]
    inner = source.get("optimizer", source)
    groups = [dict(group) for group in inner["param_groups"]]
    steps = steps_of(inner)
    problem = steps_problem(steps)
    if problem:
        raise ValueError(f"The checkpoint {problem}")
    found = {"step": steps[0], "param_groups": groups}
    return found | ({"grad_scaler": source["grad_scaler"]} if "grad_scaler" in source else {})


def _in_bucket(view: StateView, piece: Piece, kind: str, flat: Tensor) -> ShardedTensor:
    """Request a piece from its flat bucket, where Megatron's ``dp_reshardable`` format has it."""
    state = view.state_of(piece)
    assert isinstance(state.buffer, ShardedBuffer)
    bucket = state.plan.slices[piece.bucket].bucket
    return ShardedTensor(
        key=f"optimizer.distributed.dp_group_idx_{view.model_parallel_rank()}."
        + state.buffer.bucket_key_suffix(piece.bucket, kind),
        data=flat,
        dtype=flat.dtype,
        local_shape=tuple(flat.shape),
        global_shape=(state.buffer.unpadded_numel(piece.bucket),),
        global_offset=(piece.window.in_buffer.start - bucket.offset,),
        axis_fragmentations=None,
        replica_id=(0, 0, 0),
    )
