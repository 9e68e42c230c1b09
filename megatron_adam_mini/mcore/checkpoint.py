"""Optimizer state in Megatron's ``torch_dist`` checkpoints: what is written, read and refused.

Imports megatron.core's checkpoint types, ``model_space`` and ``adam_import``. No collective over
state, neither on save nor on load; only the conversion of v to other blocks adds block sums.

Format ``model_space``, used unless Megatron asks for ``dp_reshardable``: float32 tensors in the
model's coordinates, keys ``optimizer.adam_mini.{kind}.{parameter}`` with the layer number in the
parameter's name; kind is

* ``param``: main parameters, and ``exp_avg``: m, both shaped like the parameter;
* ``v_row``: one number per row, rows of one block repeat it;
* ``v_element``: v of parameters that keep one per element, shaped like the parameter.

Format ``dp_reshardable``: ``param`` and ``exp_avg`` as flat buckets instead, as Megatron's own; v
as above. Such a checkpoint loads under another data-parallel size only.

The identity of the state travels twice: in the content metadata, so that it is known before
anything is read, and in the common state, for callers that pass no metadata.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.optimizer.optimizer import param_group_identifier_keys

from megatron_adam_mini.agreement import on_all_ranks
from megatron_adam_mini.mcore import adam_import
from megatron_adam_mini.mcore.model_space import entries_by_parameter, put_back
from megatron_adam_mini.mcore.state_entries import (
    SHARDS,
    PendingLoad,
    blocks_from_rows,
    bucket_shards,
    elementwise_v,
    entry_of,
    float_states,
    kind_key,
    put,
    refuse_buckets,
    remember,
    rows_from_blocks,
    sums_over_segments,
    tp_rank_of_rows,
    unshared,
)
from megatron_adam_mini.plan.manifest import identity_of, partition_of_checkpoint
from megatron_adam_mini.plan.partition import ParameterBlocks

if TYPE_CHECKING:
    from megatron_adam_mini.mcore.distributed_optimizer import AdamMiniOptimizer

ONLY_TORCH_DIST = (
    "Adam-mini's state is saved in torch_dist checkpoints only, where every rank writes what it "
    "owns; use --ckpt-format torch_dist (the default), or --no-save-optim / --no-load-optim."
)


def state_to_save(
    optimizer: AdamMiniOptimizer, model_state: Mapping[str, Any], metadata: dict[str, Any] | None
) -> dict[str, Any]:
    """Return this rank's part of the optimizer state, as views wherever that is safe."""
    wanted = (metadata or {}).get("distrib_optim_sharding_type")
    layout = "dp_reshardable" if wanted == "dp_reshardable" else "model_space"
    identity = identity_of(
        optimizer.manifest,
        optimizer.engine.config,
        checkpoint_format=layout,
        saved_from=optimizer.layout_sizes,
    )
    if metadata is not None:
        metadata["adam_mini"] = identity
        if layout == "model_space":
            # What Megatron asks before it lets a run with other TP or PP sizes load the state.
            metadata["distrib_optim_sharding_type"] = "fully_reshardable"
    shards: dict[str, dict[str, ShardedTensor]] = {}
    states = float_states(optimizer)
    entries = entries_by_parameter(model_state)
    for number, piece in enumerate(optimizer.engine.pieces()):
        entry = entry_of(optimizer, piece, entries)
        if layout == "model_space":
            for kind, flat in states[id(piece.bucket)].items():
                data = unshared(flat[piece.window])
                put(
                    shards,
                    f"{kind}.{number}",
                    entry.elements(kind_key(kind), data, piece.begin, piece.end),
                )
        if piece.ranges.stop:
            values = elementwise_v(piece).clone()
            put(
                shards,
                f"v_element.{number}",
                entry.elements(kind_key("v_element"), values, piece.begin, piece.end),
            )
        else:
            rows = rows_from_blocks(optimizer, piece)
            put(
                shards,
                f"v_row.{number}",
                entry.rows(
                    kind_key("v_row"),
                    rows,
                    piece.begin,
                    piece.end,
                    loading=False,
                    tp_rank=tp_rank_of_rows(optimizer, piece),
                ),
            )
    if layout == "dp_reshardable":
        shards |= bucket_shards(optimizer, states, loading=False)
    state: dict[str, Any] = {
        "adam_mini": identity,
        "step": optimizer.engine.step_count,
        "param_groups": [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ],
    }
    if shards:  # an empty entry would become part of the common state of all ranks
        state[SHARDS] = shards
    if optimizer.grad_scaler is not None:
        state["grad_scaler"] = optimizer.grad_scaler.state_dict()
    return state


def state_to_load(
    optimizer: AdamMiniOptimizer, model_state: Mapping[str, Any], metadata: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return what this rank asks a checkpoint for; it is read into the state in place.

    All ranks must call it: a refusal that concerns the parameters of one pipeline stage is raised
    on all of them, before any waits for the others in the load.
    """
    return on_all_ranks(
        lambda: _state_to_load(optimizer, model_state, metadata),
        "Adam-mini's state cannot be loaded",
    )


def _state_to_load(
    optimizer: AdamMiniOptimizer, model_state: Mapping[str, Any], metadata: Mapping[str, Any] | None
) -> dict[str, Any]:
    saved = (metadata or {}).get("adam_mini")
    if metadata is not None and saved is None:
        return adam_import.state_to_load(optimizer, model_state, metadata)
    states = float_states(optimizer)
    pending = PendingLoad(states, checked=saved is not None)
    layout = "model_space"
    sources: list[ParameterBlocks] = list(optimizer.engine.parameters)
    if saved is not None:
        layout = saved["layout"]
        refuse_buckets(optimizer, layout)
        sources = _partition_of(optimizer, saved)
        pending.average = sources != list(optimizer.engine.parameters)
    entries = entries_by_parameter(model_state)
    for number, piece in enumerate(optimizer.engine.pieces()):
        entry = entry_of(optimizer, piece, entries)
        if layout == "model_space":
            for kind, flat in states[id(piece.bucket)].items():
                found = entry.elements(kind_key(kind), flat[piece.window], piece.begin, piece.end)
                put(pending.asked, f"{kind}.{number}", found)
        if sources[piece.parameter].pattern is None:
            values = elementwise_v(piece)
            if not piece.ranges.stop:
                values = pending.elements[number] = torch.empty(
                    piece.end - piece.begin, device=optimizer.engine.device
                )
            found = entry.elements(kind_key("v_element"), values, piece.begin, piece.end)
            put(pending.asked, f"v_element.{number}", found)
        else:
            width = optimizer.engine.parameters[piece.parameter].info.row_numel
            touched = -(-piece.end // width) - piece.begin // width
            rows = pending.rows[number] = torch.empty(touched, device=optimizer.engine.device)
            found = entry.rows(
                kind_key("v_row"),
                rows,
                piece.begin,
                piece.end,
                loading=True,
                tp_rank=tp_rank_of_rows(optimizer, piece),
            )
            put(pending.asked, f"v_row.{number}", found)
    if layout == "dp_reshardable":
        pending.asked |= bucket_shards(optimizer, states, loading=True)
    return remember(optimizer, pending)


@torch.no_grad()
def take_over(optimizer: AdamMiniOptimizer, loaded: Mapping[str, Any]) -> None:
    """Finish a load: v of all blocks, step, groups, loss scale, model weights.

    All ranks must call it, after the load that :func:`state_to_load` prepared.

    Raises:
        RuntimeError: no load was prepared.
        ValueError: parameter groups or identity do not fit this run.
    """
    pending: PendingLoad | None = optimizer._pending_load
    if pending is None:
        raise RuntimeError(
            "Adam-mini's load_state_dict needs sharded_state_dict(..., is_loading=True) first: "
            + ONLY_TORCH_DIST
        )
    optimizer._pending_load = None
    engine = optimizer.engine
    if not pending.checked:
        _refuse_surprise(optimizer, loaded["adam_mini"])
    for name, asked in pending.asked.items():
        put_back(asked, loaded[SHARDS][name])
    if pending.adam is not None:
        loaded = adam_import.checked(optimizer, loaded, pending)
    if pending.average:
        engine.average_into_v(sums_over_segments(optimizer, pending))
    else:
        for number, piece in enumerate(engine.pieces()):
            if number in pending.rows:
                blocks_from_rows(optimizer, piece, pending.rows[number])
    engine.step_count = int(loaded["step"])
    _load_groups(optimizer, loaded["param_groups"])
    if optimizer.grad_scaler is not None and "grad_scaler" in loaded:
        optimizer.grad_scaler.load_state_dict(loaded["grad_scaler"])
    optimizer.store(pending.states)


def _partition_of(optimizer: AdamMiniOptimizer, saved: Mapping[str, Any]) -> list[ParameterBlocks]:
    engine = optimizer.engine
    return partition_of_checkpoint(saved, optimizer.manifest, engine.config, engine.parameters)


def _refuse_surprise(optimizer: AdamMiniOptimizer, saved: Mapping[str, Any]) -> None:
    """Refuse state that was asked for without the metadata that says what it is, and is otherwise.

    Raises:
        ValueError: another partition or format, also one that a load with metadata would convert.
    """
    if _partition_of(optimizer, saved) != list(optimizer.engine.parameters):
        raise ValueError(
            "The checkpoint's Adam-mini state has another partition, and can be converted only if "
            "sharded_state_dict gets the checkpoint's content metadata: pass "
            "metadata=load_content_metadata(folder)."
        )


def _load_groups(optimizer: AdamMiniOptimizer, saved: list[dict[str, Any]]) -> None:
    """Copy the saved values of each parameter group to the group that it describes."""

    def identifier(group: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(group.get(key) for key in param_group_identifier_keys)

    by_identifier = {identifier(group): group for group in saved}
    for group in optimizer.param_groups:
        if identifier(group) not in by_identifier:
            raise ValueError(
                f"The checkpoint has no parameter group {identifier(group)} (keys "
                f"{param_group_identifier_keys}); it has {list(by_identifier)}. Use the learning "
                "rate and weight decay overrides that it was saved with, or --no-load-optim."
            )
        saved_values = by_identifier[identifier(group)]
        group.update(
            {key: saved_values[key] for key in group.keys() & saved_values.keys() - {"params"}}
        )
