"""Start Adam-mini from a checkpoint of Megatron's own Adam.

Imports megatron.core's checkpoint types; used by ``checkpoint`` when a checkpoint carries no
identity of Adam-mini. Main parameters and m are taken as they are; v of a block becomes the mean
of Adam's v over it, which is what Adam-mini would have accumulated from the same gradients, since
the mean of a mean is linear.

Three formats are read: ``fully_reshardable`` and ``dp_reshardable`` of the distributed optimizer,
and the plain one without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import distributed

from megatron_adam_mini.engine import Piece
from megatron_adam_mini.mcore.model_space import entries_by_parameter
from megatron_adam_mini.mcore.state_entries import (
    OBJECTS,
    FloatStates,
    PendingLoad,
    elementwise_v,
    entry_of,
    float_states,
    put,
    refuse_buckets,
    remember,
)
from megatron_adam_mini.rounding import is_rounded

if TYPE_CHECKING:
    from megatron_adam_mini.mcore.distributed_optimizer import AdamMiniOptimizer

FORMATS = ("fully_reshardable", "dp_reshardable", "plain")


def state_to_load(
    optimizer: AdamMiniOptimizer, model_state: Mapping[str, Any], metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """Ask a checkpoint of Adam for this rank's slices.

    Raises:
        ValueError: a format that cannot be read.
    """
    layout = metadata.get("distrib_optim_sharding_type") or "plain"
    if layout not in FORMATS:
        raise ValueError(
            f"The checkpoint's optimizer state has Megatron's format {layout!r}; Adam-mini can "
            f"start from {', '.join(FORMATS)}. Save it again in one of them, or load the model "
            "alone with --no-load-optim."
        )
    refuse_buckets(optimizer, layout)
    states = float_states(optimizer)
    pending = PendingLoad(states, average=True, adam=layout)
    entries = entries_by_parameter(model_state)
    for number, piece in enumerate(optimizer.engine.pieces()):
        values = elementwise_v(piece)
        if not piece.ranges.stop:
            values = pending.elements[number] = torch.empty(
                piece.end - piece.begin, device=optimizer.engine.device
            )
        flats = {key: flat[piece.window] for key, flat in states[id(piece.bucket)].items()}
        if not piece.bucket.state.owns_main_param:
            del flats["param"]  # the model's weights are the main parameters
        for kind, flat in {**flats, "exp_avg_sq": values}.items():
            if layout == "dp_reshardable":
                found = [_in_bucket(optimizer, piece, kind, flat)]
            else:
                name = "fp32_param" if (layout, kind) == ("plain", "param") else kind
                entry = entry_of(optimizer, piece, entries)
                found = entry.elements(
                    f"optimizer.state.{name}.", flat, piece.begin, piece.end, fold=False
                )
            put(pending.asked, f"{kind}.{number}", found)
    if layout == "dp_reshardable":
        # Groups and loss scale are objects of each model-parallel part there.
        keys = ["optimizer", "per_bucket_numel", "per_bucket_numel_unpadded"]
        for key in keys + (["grad_scaler"] if optimizer.grad_scaler is not None else []):
            pending.objects[key] = ShardedObject(
                f"optimizer.distributed.dp_group_idx_{optimizer.model_parallel_rank}.{key}",
                None,
                (1,),
                (0,),
                replica_id=(0, 0, 0),
            )
    return remember(optimizer, pending)


def checked(
    optimizer: AdamMiniOptimizer, loaded: Mapping[str, Any], pending: PendingLoad
) -> dict[str, Any]:
    """Return step, groups and loss scale in Adam-mini's own form; all ranks must call it.

    Raises:
        ValueError: the main parameters are not those of the model's weights. Megatron-Core 0.16.1
            to 0.19.2 write such ``fully_reshardable`` checkpoints when the end of a bucket other
            than the last is padded (fixed upstream in #5077).
    """
    wrong = [
        optimizer.engine.parameters[piece.parameter].info.name
        for piece in optimizer.engine.pieces()
        if piece.bucket.state.owns_main_param and not _rounds_to_weight(piece, pending.states)
    ]
    count = torch.tensor([len(wrong)], dtype=torch.int64, device=optimizer.engine.device)
    distributed.all_reduce(count)
    if int(count):
        example = f" ({wrong[0]!r} on this rank)" if wrong else ""
        raise ValueError(
            f"The checkpoint's Adam state is unsound: main parameters in {int(count)} pieces"
            f"{example} do not round to the model's weights. Megatron-Core 0.16.1 to "
            "0.19.2 write such fully_reshardable checkpoints when buckets are padded (upstream "
            "#5077). Save again from the original run as dp_reshardable (without "
            "--dist-ckpt-optim-fully-reshardable), or use --no-load-optim."
        )
    source = loaded if pending.adam != "dp_reshardable" else loaded[OBJECTS]
    inner = source.get("optimizer", source)
    groups = [dict(group) for group in inner["param_groups"]]
    steps = {int(group["step"]) for group in groups if group.get("step") is not None}
    if not steps and "common_step" in inner.get("state", {}):
        steps = {int(inner["state"]["common_step"])}
    if len(steps) != 1:
        raise ValueError(
            f"The checkpoint's Adam state has the steps {sorted(steps)}; Adam-mini needs exactly "
            "one, shared by all parameters. Use --no-load-optim."
        )
    found = {"step": steps.pop(), "param_groups": groups}
    return found | ({"grad_scaler": source["grad_scaler"]} if "grad_scaler" in source else {})


def _rounds_to_weight(piece: Piece, states: FloatStates) -> bool:
    weight = piece.bucket.source.weight[piece.window]
    main_param = states[id(piece.bucket)]["param"][piece.window]
    return bool(is_rounded(weight, main_param).all())


def _in_bucket(
    optimizer: AdamMiniOptimizer, piece: Piece, kind: str, flat: torch.Tensor
) -> ShardedTensor:
    """Ask for a piece where Megatron's ``dp_reshardable`` format has it: in its flat bucket."""
    source: Any = piece.bucket.source
    buffer, dtypes, bucket = source.number
    return ShardedTensor(
        key=f"optimizer.distributed.dp_group_idx_{optimizer.model_parallel_rank}"
        f".gbuf_idx_{buffer}.dtype_{dtypes}.bucket_idx_{bucket}.{kind}",
        data=flat,
        dtype=flat.dtype,
        local_shape=tuple(flat.shape),
        global_shape=(source.bucket.numel_unpadded,),
        global_offset=(source.begin + piece.window.start,),
        axis_fragmentations=None,
        replica_id=(0, 0, 0),
    )
