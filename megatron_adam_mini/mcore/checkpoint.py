"""Optimizer state in Megatron's ``torch_dist`` checkpoints: what is written, read and refused.

Imports ``entries`` (state as entries of a checkpoint) and ``adam_import``. State takes part in no
collective, neither on save nor on load, except that converting v to other blocks adds block sums.

Format ``model_space``, used unless Megatron asks for ``dp_reshardable``: float32 tensors in the
model's coordinates, keys ``optimizer.adam_mini.{kind}.{parameter}`` with the layer number in the
parameter's name; kind is

* ``param``: main parameters, and ``exp_avg``: m, both shaped like the parameter;
* ``v_row``: one number per row, repeated for the rows of one block;
* ``v_element``: v of parameters that keep one per element, shaped like the parameter.

Format ``dp_reshardable``: ``param`` and ``exp_avg`` as flat buckets, like Megatron's own; v as
above. Such a checkpoint loads under another data-parallel size, but no other change of layout.

The identity of the state is stored twice: in the content metadata, where it is known before
anything is read, and in the common state, for callers that pass no metadata.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megatron_adam_mini.adam_rules import steps_of, steps_problem
from megatron_adam_mini.agreement import on_all_ranks
from megatron_adam_mini.mcore import adam_import
from megatron_adam_mini.mcore.entries import (
    SHARDS,
    PendingLoad,
    Shards,
    StateView,
    add_entries,
    bucket_shards,
    refuse_flat_buckets,
    rows_from_v,
    sums_over_segments,
    to_save,
    tp_rank_of_rows,
    v_from_rows,
)
from megatron_adam_mini.mcore.frozen import note_new_pieces, start_new_pieces
from megatron_adam_mini.mcore.model_space import copy_back, entries_by_parameter
from megatron_adam_mini.mcore.param_groups import load_groups
from megatron_adam_mini.plan.manifest import (
    FLAT_BUCKETS,
    MODEL_SPACE,
    changes_blocks,
    format_of,
    identity_of,
    partition_of_checkpoint,
    state_key,
)
from megatron_adam_mini.plan.partition import ParameterBlocks


def state_to_save(
    view: StateView, model_state: Mapping[str, Any], metadata: dict[str, Any] | None
) -> dict[str, Any]:
    """Return this rank's part of the optimizer state, as views where that is safe."""
    wanted = (metadata or {}).get("distrib_optim_sharding_type")
    checkpoint_format = FLAT_BUCKETS if wanted == FLAT_BUCKETS else MODEL_SPACE
    identity = identity_of(
        view.manifest,
        view.inner.config,
        checkpoint_format=checkpoint_format,
        saved_from=view.sizes(),
    )
    if metadata is not None:
        metadata["adam_mini"] = identity
        if checkpoint_format == MODEL_SPACE:
            # Megatron checks this before it lets a run with other TP or PP sizes load the state.
            metadata["distrib_optim_sharding_type"] = "fully_reshardable"
    shards: Shards = {}
    entries = entries_by_parameter(model_state)
    for number, piece in enumerate(view.inner.plan.pieces):
        entry, span = view.entry_of(piece, entries), (piece.begin, piece.end)
        if checkpoint_format == MODEL_SPACE:
            for kind, flat in to_save(view.state_of(piece), piece.window).items():
                boxes = entry.elements(state_key(kind, ""), flat, *span)
                add_entries(shards, f"{kind}.{number}", boxes)
        if piece.is_elementwise:
            values = view.state.v_of_elements(piece).clone()
            boxes = entry.elements(state_key("v_element", ""), values, *span)
            add_entries(shards, f"v_element.{number}", boxes)
        else:
            boxes = entry.rows(
                state_key("v_row", ""),
                rows_from_v(view, piece),
                *span,
                loading=False,
                tp_rank=tp_rank_of_rows(view, piece),
            )
            add_entries(shards, f"v_row.{number}", boxes)
    if checkpoint_format == FLAT_BUCKETS:
        shards |= bucket_shards(view, None)
    state: dict[str, Any] = {
        "adam_mini": identity,
        "step": view.inner.main_params.step_count,
        "param_groups": [
            {key: value for key, value in group.items() if key != "params"}
            for group in view.param_groups
        ],
    }
    if shards:  # an empty entry would become part of the common state of all ranks
        state[SHARDS] = shards
    if view.grad_scaler is not None:
        state["grad_scaler"] = view.grad_scaler.state_dict()
    return state


def prepare_load(
    view: StateView, model_state: Mapping[str, Any], metadata: Mapping[str, Any] | None
) -> PendingLoad:
    """Return what this rank requests from a checkpoint; it is read into the state in place.

    All ranks must call it: a refusal that concerns the parameters of one pipeline stage is raised
    on all of them, before any rank waits for the others in the load.
    """
    return on_all_ranks(
        lambda: _prepare_load(view, model_state, metadata),
        "Adam-mini's state cannot be loaded",
    )


def _prepare_load(
    view: StateView, model_state: Mapping[str, Any], metadata: Mapping[str, Any] | None
) -> PendingLoad:
    saved = (metadata or {}).get("adam_mini")
    if metadata is not None and saved is None:
        return adam_import.prepare_load(view, model_state, metadata)
    pending = PendingLoad(checked=saved is not None)
    checkpoint_format = MODEL_SPACE
    sources: list[ParameterBlocks | None] = list(view.inner.plan.parameters)
    if saved is not None:
        checkpoint_format = format_of(saved)
        refuse_flat_buckets(view, checkpoint_format)
        sources = _blocks_of_checkpoint(view, saved)
        pending.average = changes_blocks(sources, view.inner.plan.parameters)
        note_new_pieces(view, saved, sources, pending)
    entries = entries_by_parameter(model_state)
    for number, piece in enumerate(view.inner.plan.pieces):
        source = sources[piece.parameter]
        if source is None:
            continue
        entry, span = view.entry_of(piece, entries), (piece.begin, piece.end)
        if checkpoint_format == MODEL_SPACE:
            for kind, flat in pending.floats_of(view.state_of(piece), piece.window).items():
                add_entries(
                    pending.asked,
                    f"{kind}.{number}",
                    entry.elements(state_key(kind, ""), flat, *span),
                )
        if source.pattern is None:
            values = view.state.v_of_elements(piece)
            if not piece.is_elementwise:
                values = pending.elements[number] = torch.empty(
                    piece.end - piece.begin, device=view.inner.device
                )
            boxes = entry.elements(state_key("v_element", ""), values, *span)
            add_entries(pending.asked, f"v_element.{number}", boxes)
        else:
            width = view.blocks_of(piece).info.row_numel
            touched = -(-piece.end // width) - piece.begin // width
            rows = pending.rows[number] = torch.empty(touched, device=view.inner.device)
            boxes = entry.rows(
                state_key("v_row", ""),
                rows,
                *span,
                loading=True,
                tp_rank=tp_rank_of_rows(view, piece),
            )
            add_entries(pending.asked, f"v_row.{number}", boxes)
    if checkpoint_format == FLAT_BUCKETS:
        pending.asked |= bucket_shards(view, pending)
    return pending


def finish_load(view: StateView, pending: PendingLoad, loaded: Mapping[str, Any]) -> None:
    """Finish a load: set v of all blocks, step, groups, loss scale, this rank's model weights.

    All ranks must call it, after the load that :func:`prepare_load` prepared.

    Raises:
        ValueError: the identity does not match this run.
    """
    if not pending.checked:
        _refuse_surprise(view, loaded["adam_mini"])
    for name, asked in pending.asked.items():
        copy_back(asked, loaded[SHARDS][name])
    if pending.adam_format is not None:
        loaded = adam_import.common_from_adam(view, loaded, pending)
    start_new_pieces(view, pending)
    if pending.average:
        view.inner.average_into_v(view.state, sums_over_segments(view, pending))
    else:
        for number, piece in enumerate(view.inner.plan.pieces):
            if number in pending.rows:
                v_from_rows(view, piece, pending.rows[number])
    view.saved_groups[:] = load_groups(view.param_groups, loaded["param_groups"])
    view.inner.main_params.step_count = int(loaded["step"])
    if view.grad_scaler is not None and "grad_scaler" in loaded:
        view.grad_scaler.load_state_dict(loaded["grad_scaler"])
    for state, window, values in pending.floats:
        state.store(window, values)


def load_common(view: StateView, state_dict: Mapping[str, Any]) -> int:
    """Set groups and loss scale from a ``state_dict()``, ours or of Megatron's Adam.

    Returns:
        The steps taken.

    Raises:
        ValueError: the steps of parameter groups differ.
    """
    groups = state_dict["optimizer"]["param_groups"]
    steps = steps_of(state_dict["optimizer"])
    problem = steps_problem(steps)
    if problem:
        raise ValueError(f"The checkpoint {problem}")
    view.saved_groups[:] = load_groups(view.param_groups, groups)
    if view.grad_scaler is not None and "grad_scaler" in state_dict:
        view.grad_scaler.load_state_dict(state_dict["grad_scaler"])
    return steps[0]


def _blocks_of_checkpoint(
    view: StateView, saved: Mapping[str, Any]
) -> list[ParameterBlocks | None]:
    blocks = view.inner.plan.parameters
    return partition_of_checkpoint(saved, view.manifest, view.inner.config, blocks)


def _refuse_surprise(view: StateView, saved: Mapping[str, Any]) -> None:
    """Refuse state that was requested without metadata and turns out to be of another kind.

    Raises:
        ValueError: partition or format differ, even if a load with metadata would convert them.
    """
    if _blocks_of_checkpoint(view, saved) != list(view.inner.plan.parameters):
        raise ValueError(
            "The checkpoint's Adam-mini state has another partition, and can be converted only if "
            "sharded_state_dict gets the checkpoint's content metadata: pass "
            "metadata=load_content_metadata(folder)."
        )
