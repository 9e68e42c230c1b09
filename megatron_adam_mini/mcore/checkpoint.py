"""Optimizer state in Megatron's ``torch_dist`` checkpoints: what is written, read and refused.

Imports ``entries`` (state as entries of a checkpoint) and ``adam_import``. Used by ``state_part``,
which decides which checkpoint is meant. State takes part in no collective, neither on save nor on
load, except that converting v to other blocks adds block sums.

Format ``model_space``, used unless the options ask for ``buckets``: float32 tensors in the
model's coordinates, keys ``optimizer.adam_mini.{kind}.{parameter}`` with the layer number in the
parameter's name; kind is

* ``param``: main parameters, and ``exp_avg``: m, both shaped like the parameter;
* ``v_row``: one number per row, repeated for the rows of one block, 0 for rows of a column set;
* ``v_column``: one number per column, shape ``(column sets, columns)``, of parameters that have
  such sets; those without other rows have no ``v_row``;
* ``v_element``: v of parameters that keep one per element, shaped like the parameter.

Format ``buckets``: ``param`` and ``exp_avg`` as flat buckets, like Megatron's ``dp_reshardable``; v
as above. Such a checkpoint loads under another data-parallel size, but no other change of layout.

The identity of the state is stored twice: in the common state beside it, and in the content
metadata, where Megatron and its callers look first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megatron_adam_mini.mcore import adam_import
from megatron_adam_mini.mcore.entries import (
    SHARDS,
    PendingLoad,
    Shards,
    StateView,
    add_entries,
    bucket_shards,
    columns_from_v,
    need_buckets,
    rows_from_v,
    sums_over_segments,
    to_save,
    tp_rank_of_rows,
    v_from_columns,
    v_from_rows,
    view_to_save,
)
from megatron_adam_mini.mcore.frozen import note_new_pieces, start_new_pieces
from megatron_adam_mini.mcore.low_precision import report_other_storage
from megatron_adam_mini.mcore.model_space import ModelEntries, copy_back
from megatron_adam_mini.mcore.param_groups import load_groups
from megatron_adam_mini.plan.manifest import (
    BUCKETS,
    MODEL_SPACE,
    changes_blocks,
    format_of,
    identity_of,
    partition_of_checkpoint,
    state_key,
)
from megatron_adam_mini.state import HOST

#: Sizes of the layout that must be equal for a checkpoint of flat buckets.
_FIXED_BY_BUCKETS = ("tensor", "pipeline", "virtual_pipeline", "expert", "expert_tensor")


def state_to_save(view: StateView, entries: ModelEntries) -> dict[str, Any]:
    """Return this rank's part of the optimizer state: views where that is safe, or on the host."""
    checkpoint_format = view.inner.config.checkpoint_format
    identity = identity_of(
        view.manifest,
        view.inner.config,
        checkpoint_format=checkpoint_format,
        saved_from=view.sizes(),
    )
    shards: Shards = {}
    v_S = view.state.exp_avg_sq_S.to(HOST)
    for number, piece in enumerate(view.inner.plan.pieces):
        entry, span = view.entry_of(piece, entries), (piece.begin, piece.end)
        if checkpoint_format == MODEL_SPACE:
            for kind, flat in to_save(view.state_of(piece), piece.window).items():
                boxes = entry.elements(state_key(kind, ""), flat, *span)
                add_entries(shards, f"{kind}.{number}", boxes)
        if piece.is_elementwise:
            values = view_to_save(view.state.v_of_elements(piece))
            boxes = entry.elements(state_key("v_element", ""), values, *span)
            add_entries(shards, f"v_element.{number}", boxes)
            continue
        pattern = view.blocks_of(piece).pattern
        assert pattern is not None
        if pattern.num_row_blocks:
            boxes = entry.rows(
                state_key("v_row", ""),
                rows_from_v(view, piece, v_S[piece.segments]),
                *span,
                loading=False,
                tp_rank=tp_rank_of_rows(view, piece),
            )
            add_entries(shards, f"v_row.{number}", boxes)
        for column_set, first, values in columns_from_v(view, piece, v_S[piece.segments]):
            boxes = entry.columns(
                state_key("v_column", ""),
                values[None],
                pattern.num_column_sets,
                column_set,
                first,
            )
            add_entries(shards, f"v_column.{number}.{column_set}", boxes)
    if checkpoint_format == BUCKETS:
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
    view: StateView, entries: ModelEntries, identity: Mapping[str, Any]
) -> PendingLoad:
    """Return what this rank requests from a checkpoint; it is read into the state in place.

    Args:
        view: the optimizer.
        entries: of the model's sharded state dict.
        identity: of the state in the checkpoint.

    Raises:
        ValueError: the state is of another partition, or its buckets are those of another layout.
    """
    blocks = view.inner.plan.parameters
    sources = partition_of_checkpoint(identity, view.manifest, view.inner.config, blocks)
    checkpoint_format = format_of(identity)
    if checkpoint_format == BUCKETS:
        _refuse_other_buckets(view, identity)
    pending = PendingLoad(view.state, average=changes_blocks(sources, blocks), sources=sources)
    note_new_pieces(view, identity, sources, pending)
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
                    piece.end - piece.begin, dtype=torch.float32, device=HOST
                )
            boxes = entry.elements(state_key("v_element", ""), values, *span)
            add_entries(pending.asked, f"v_element.{number}", boxes)
            continue
        if source.pattern.num_column_sets:
            shape = source.pattern.num_column_sets, source.info.row_numel
            columns = pending.columns[number] = torch.zeros(shape, dtype=torch.float32, device=HOST)
            boxes = entry.columns(state_key("v_column", ""), columns, shape[0], 0, 0)
            add_entries(pending.asked, f"v_column.{number}", boxes)
        if source.pattern.num_row_blocks:
            width = view.blocks_of(piece).info.row_numel
            touched = -(-piece.end // width) - piece.begin // width
            rows = pending.rows[number] = torch.empty(touched, dtype=torch.float32, device=HOST)
            boxes = entry.rows(
                state_key("v_row", ""),
                rows,
                *span,
                loading=True,
                tp_rank=tp_rank_of_rows(view, piece),
            )
            add_entries(pending.asked, f"v_row.{number}", boxes)
    if checkpoint_format == BUCKETS:
        pending.asked |= bucket_shards(view, pending)
    return pending


def finish_load(view: StateView, pending: PendingLoad, loaded: Mapping[str, Any]) -> None:
    """Finish a load: set v of all blocks, step, groups, loss scale, this rank's model weights.

    All ranks must call it, after the load that :func:`prepare_load` prepared.

    Raises:
        ValueError: state of Adam is unsound.
    """
    _report_storage(view, loaded)
    for name, asked in pending.asked.items():
        copy_back(asked, loaded[SHARDS][name])
    if pending.adam_format is not None:
        loaded = adam_import.take_from_adam(view, loaded, pending)
    start_new_pieces(view, pending)
    if pending.average and pending.adam_format != adam_import.GATHERED:
        view.inner.average_into_v(view.state, sums_over_segments(view, pending))
    else:
        for number, piece in enumerate(view.inner.plan.pieces):
            if number in pending.rows:
                v_from_rows(view, piece, pending.rows[number])
            if number in pending.columns:
                v_from_columns(view, piece, pending.columns[number])
    _take_common(view, loaded)
    for state, window, values in pending.floats:
        state.store(window, values)


def load_common(view: StateView, state_dict: Mapping[str, Any]) -> None:
    """Set groups, step and loss scale from a ``state_dict()``, ours or of Megatron's Adam.

    Raises:
        ValueError: the steps of parameter groups differ.
    """
    _report_storage(view, state_dict)
    _take_common(view, adam_import.common_of(state_dict))


def _report_storage(view: StateView, loaded: Mapping[str, Any]) -> None:
    # Neither Adam's checkpoints nor the first of Adam-mini's say it.
    identity = loaded.get("adam_mini") or {}
    report_other_storage(identity.get("storage"), view.inner.config)


def _take_common(view: StateView, common: Mapping[str, Any]) -> None:
    view.saved_groups[:] = load_groups(view.param_groups, common["param_groups"])
    view.inner.main_params.step_count = int(common["step"])
    if view.grad_scaler is not None and "grad_scaler" in common:
        view.grad_scaler.load_state_dict(common["grad_scaler"])


def _refuse_other_buckets(view: StateView, identity: Mapping[str, Any]) -> None:
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
