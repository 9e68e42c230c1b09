"""Start Adam-mini from a checkpoint of Megatron's own Adam.

Imports megatron.core's checkpoint types; used by ``state_part`` and ``checkpoint`` when a
checkpoint holds no state of Adam-mini. Main parameters and m are copied unchanged; v of a block
becomes the mean of Adam's v over it, which is what Adam-mini would have accumulated from the same
gradients, since v is linear in their squares.

Formats: ``fully_reshardable``, ``dp_reshardable`` and ``dp_zero_gather_scatter`` of the distributed
optimizer, and that of the plain optimizer. The second has a tensor per bucket, the third one object
per model-parallel part, with whole buffers in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import Tensor, distributed

from megatron_adam_mini.adam_rules import (
    MAIN_PARAM,
    MEMBER,
    PLAIN_MAIN_PARAM,
    UNSOUND_CAUSE,
    adam_key,
    members_of,
    steps_of,
    steps_problem,
)
from megatron_adam_mini.mcore import parameter_state
from megatron_adam_mini.mcore.entries import OBJECTS, add_entries
from megatron_adam_mini.mcore.flat_buckets import in_adams_bucket, need_buckets
from megatron_adam_mini.mcore.model_space import ModelEntries
from megatron_adam_mini.mcore.pending_load import PendingLoad
from megatron_adam_mini.mcore.state_view import StateView
from megatron_adam_mini.mcore.stored_buckets import MEMBERS
from megatron_adam_mini.plan.buffer_plan import Window
from megatron_adam_mini.rounding import is_rounded
from megatron_adam_mini.state import HOST, BufferState

PLAIN, FULLY_RESHARDABLE = "plain", "fully_reshardable"
#: Formats whose keys and contents depend on the buckets of one layout.
DP_RESHARDABLE, GATHERED = "dp_reshardable", "dp_zero_gather_scatter"
OF_BUCKETS = (DP_RESHARDABLE, GATHERED)
#: Object of the format ``GATHERED`` with whole buffers in it.
PARAM_STATE = "param_state"
FORMATS = (FULLY_RESHARDABLE, PLAIN, *OF_BUCKETS)


def format_of_adam(common: Mapping[Any, Any] | None) -> str:
    """Return the format of an optimizer's state in a checkpoint that is not Adam-mini's.

    Args:
        common: what the checkpoint's common state holds of the optimizer.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    load_no_optimizer = "load the model alone with --no-load-optim"
    if not common:
        raise ValueError(
            "The checkpoint holds no optimizer state there (was it saved with --no-save-optim, or "
            f"apart from the model?). Load the folder that holds it, or {load_no_optimizer}."
        )
    common = members_of(common)[0]
    found = common.get("param_state_sharding_type")
    if is_plain(common):
        return PLAIN
    if found not in FORMATS:
        raise ValueError(
            f"The checkpoint's optimizer state has Megatron's format {found!r}; Adam-mini can "
            f"start from {', '.join(FORMATS)}. Save it again in one of them, with the release that "
            f"wrote it, or {load_no_optimizer}."
        )
    return str(found)


def is_plain(common: Mapping[Any, Any]) -> bool:
    """Return whether an optimizer's common state is that of the plain optimizer."""
    of_state = "param_groups" in common or "optimizer" in common
    return of_state and "param_state_sharding_type" not in common


def prepare_load(view: StateView, entries: ModelEntries, adam_format: str) -> PendingLoad:
    """Request this rank's slices from a checkpoint of Adam.

    Args:
        view: the optimizer.
        entries: of the model's sharded state dict.
        adam_format: one of ``FORMATS``.

    Raises:
        ValueError: the format needs the distributed optimizer, which this run does not use.
    """
    if adam_format in OF_BUCKETS:
        need_buckets(view, adam_format)
    pending = PendingLoad(view.state, average=True, adam_format=adam_format)
    if adam_format == GATHERED:
        # The first rank reads it all, and sends each rank its part.
        pending.objects = _objects(view, ["optimizer", "grad_scaler"])
        pending.objects |= _objects(view, [PARAM_STATE], first_only=True)
        return pending
    for number, piece in enumerate(view.inner.plan.pieces):
        state = view.state_of(piece)
        # Where the model's weights are the main parameters, Adam need not have stored them.
        flats = dict(pending.floats_of(state, piece.window, weights=False))
        flats["exp_avg_sq"] = view.state.v_of_elements(piece)
        if not piece.is_elementwise:
            flats["exp_avg_sq"] = pending.elements[number] = torch.empty(
                piece.end - piece.begin, dtype=torch.float32, device=HOST
            )
        for kind, flat in flats.items():
            if adam_format == DP_RESHARDABLE:
                found = [in_adams_bucket(view, piece, kind, flat)]
            else:
                is_plain_param = (adam_format, kind) == (PLAIN, MAIN_PARAM)
                prefix = adam_key(PLAIN_MAIN_PARAM if is_plain_param else kind, "")
                entry = view.entry_of(piece, entries)
                found = entry.elements(prefix, flat, piece.begin, piece.end, fold=False)
            add_entries(pending.asked, f"{kind}.{number}", found)
    if adam_format == DP_RESHARDABLE:
        keys = ["optimizer", "grad_scaler", "per_bucket_numel", "per_bucket_numel_unpadded"]
        pending.objects = _objects(view, keys)
    return pending


def _objects(
    view: StateView, keys: Sequence[str], *, first_only: bool = False
) -> dict[str, ShardedObject]:
    """Request objects of this rank's model-parallel parts, where formats of buckets have groups.

    Args:
        view: the optimizer.
        keys: names of the objects.
        first_only: whether only the first data-parallel rank requests them.

    Returns:
        By name; those of a chain's second optimizer by name and its number, see ``members_of``.
    """
    found = {}
    held = {plan.domain for plan in view.inner.plan.buffers}
    for number, domain in enumerate(view.domains):
        group = domain.data_parallel_group
        rank = 0 if group is None else group.rank()
        if (number and number not in held) or (first_only and rank):
            continue
        for key in keys:
            if key == "grad_scaler" and view.grad_scaler is None:
                continue
            found[f"{key}{MEMBER}{number}" if number else key] = ShardedObject(
                domain.adam_key + key,
                None,
                (1,),
                (0,),
                # Of the ranks that read it, one has 0 throughout, or Megatron would call it read
                # twice.
                replica_id=(view.replica or 0, 0, rank),
            )
    return found


def take_from_adam(
    view: StateView, loaded: Mapping[str, Any], pending: PendingLoad
) -> dict[str, Any]:
    """Return step, groups and loss scale in Adam-mini's own form; all ranks must call it.

    Raises:
        ValueError: the main parameters do not belong to the model's weights. Megatron-Core 0.16.1
            to 0.19.2 write such ``fully_reshardable`` checkpoints if a bucket other than the last
            is padded at its end (fixed upstream in #5077).
    """
    if pending.adam_format == GATHERED:
        members = members_of(loaded[OBJECTS])
        parameter_state.scatter(
            view,
            [domain.data_parallel_group for domain in view.domains],
            lambda: {MEMBERS: [member.get(PARAM_STATE) for member in members]},
        )
        return common_of(loaded[OBJECTS])
    pieces = zip(view.inner.plan.pieces, pending.floats, strict=True)
    wrong = [
        view.blocks_of(piece).info.name
        for piece, (state, window, values) in pieces
        if state.owns_main_param
        and not state.is_quantized
        and _unrounded(state, window, values["param"])
    ]
    count = torch.tensor([len(wrong)], dtype=torch.int64, device=view.inner.device)
    distributed.all_reduce(count)
    if int(count):
        example = f" ({wrong[0]!r} on this rank)" if wrong else ""
        raise ValueError(
            f"The checkpoint's Adam state is unsound: main parameters in {int(count)} pieces"
            f"{example} do not round to the model's weights. {UNSOUND_CAUSE}"
        )
    return common_of(loaded[OBJECTS] if pending.adam_format in OF_BUCKETS else loaded)


def _unrounded(state: BufferState, window: Window, param: Tensor) -> bool:
    """Return whether the model's weights are other than rounded main parameters."""
    return not all(
        is_rounded(state.buffer.weight[part.in_buffer].to(param.device), param[where]).all()
        for where, part in window.parts()
    )


def common_of(source: Mapping[str, Any]) -> dict[str, Any]:
    """Return step, groups and loss scale of a state dict in Adam-mini's own form.

    Raises:
        ValueError: the steps of parameter groups differ.
    """
    members = members_of(source)
    inners = [member.get("optimizer", member) for member in members]
    groups = [dict(group) for inner in inners for group in inner["param_groups"]]
    steps = sorted({step for inner in inners for step in steps_of(inner)})
    problem = steps_problem(steps)
    if problem:
        raise ValueError(f"The checkpoint {problem}")
    found = {"step": steps[0], "param_groups": groups}
    scalers = [member["grad_scaler"] for member in members if "grad_scaler" in member]
    return found | ({"grad_scaler": scalers[0]} if scalers else {})
