"""Optimizer state in Megatron's ``torch_dist`` checkpoints: what is written, read and refused.

Imports what describes the state as entries (``entries``, ``model_space``, ``flat_buckets``,
``stored_v``) and ``adam_import``. Used by ``state_part``, which decides which checkpoint is meant.
State takes part in no collective, neither on save nor on load, except that converting v to other
blocks adds block sums.

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
from torch import Tensor

from megatron_adam_mini.mcore import adam_import
from megatron_adam_mini.mcore.entries import (
    SHARDS,
    Shards,
    add_entries,
    to_save,
    view_to_save,
)
from megatron_adam_mini.mcore.flat_buckets import bucket_shards, refuse_other_buckets
from megatron_adam_mini.mcore.frozen import note_new_pieces, start_new_pieces
from megatron_adam_mini.mcore.low_precision import report_other_storage
from megatron_adam_mini.mcore.model_space import ModelEntries, ModelEntry, Values, copy_back
from megatron_adam_mini.mcore.param_groups import load_groups
from megatron_adam_mini.mcore.pending_load import PendingLoad
from megatron_adam_mini.mcore.state_view import StateView
from megatron_adam_mini.mcore.stored_v import (
    columns_from_v,
    rows_from_v,
    sums_over_segments,
    v_from_columns,
    v_from_rows,
)
from megatron_adam_mini.plan.manifest import (
    BUCKETS,
    MODEL_SPACE,
    changes_blocks,
    format_of,
    identity_of,
    partition_of_checkpoint,
    state_key,
)
from megatron_adam_mini.plan.partition import ParameterBlocks
from megatron_adam_mini.plan.step_plan import Piece
from megatron_adam_mini.state import HOST


def state_to_save(view: StateView, entries: ModelEntries) -> dict[str, Any]:
    """Return this rank's part of the optimizer state: views where that is safe, or on the host."""
    checkpoint_format = view.inner.config.checkpoint_format
    shards: Shards = {}
    v_S = view.state.exp_avg_sq_S.to(HOST)
    for number, piece in enumerate(view.inner.plan.pieces):
        entry = view.entry_of(piece, entries)
        if checkpoint_format == MODEL_SPACE:
            _add_floats(shards, number, piece, entry, to_save(view.state_of(piece), piece.window))
        _add_v(shards, number, piece, entry, view, v_S[piece.segments])
    if checkpoint_format == BUCKETS:
        shards |= bucket_shards(view, None)
    state: dict[str, Any] = {
        "adam_mini": identity_of(
            view.manifest,
            view.inner.config,
            checkpoint_format=checkpoint_format,
            saved_from=view.sizes(),
        ),
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


def _add_floats(
    shards: Shards, number: int, piece: Piece, entry: ModelEntry, floats: Mapping[str, Values]
) -> None:
    """Add ``param`` and ``exp_avg`` of a piece, to be saved or to be read."""
    for kind, flat in floats.items():
        boxes = entry.elements(state_key(kind, ""), flat, piece.begin, piece.end)
        add_entries(shards, f"{kind}.{number}", boxes)


def _add_v(
    shards: Shards, number: int, piece: Piece, entry: ModelEntry, view: StateView, v_S: Tensor
) -> None:
    """Add v of a piece, to be saved.

    Args:
        shards: modified in place.
        number: of the piece.
        piece: the piece.
        entry: where its parameter lies in the whole model.
        view: the optimizer.
        v_S: of the piece's segments, in host memory.
    """
    if piece.is_elementwise:
        values = view_to_save(view.state.v_of_elements(piece))
        boxes = entry.elements(state_key("v_element", ""), values, piece.begin, piece.end)
        add_entries(shards, f"v_element.{number}", boxes)
        return
    pattern = view.blocks_of(piece).pattern
    assert pattern is not None
    if pattern.num_row_blocks:
        boxes = entry.rows(
            state_key("v_row", ""),
            rows_from_v(view, piece, v_S),
            piece.begin,
            piece.end,
            loading=False,
            tp_rank=view.tp_rank_of_rows(piece),
        )
        add_entries(shards, f"v_row.{number}", boxes)
    for column_set, first, values in columns_from_v(view, piece, v_S):
        boxes = entry.columns(
            state_key("v_column", ""), values[None], pattern.num_column_sets, column_set, first
        )
        add_entries(shards, f"v_column.{number}.{column_set}", boxes)


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
        refuse_other_buckets(view, identity)
    pending = PendingLoad(view.state, average=changes_blocks(sources, blocks), sources=sources)
    note_new_pieces(view, identity, sources, pending)
    for number, piece in enumerate(view.inner.plan.pieces):
        source = sources[piece.parameter]
        if source is None:
            continue
        entry = view.entry_of(piece, entries)
        if checkpoint_format == MODEL_SPACE:
            floats = pending.floats_of(view.state_of(piece), piece.window)
            _add_floats(pending.asked, number, piece, entry, floats)
        _ask_for_v(pending, number, piece, entry, view, source)
    if checkpoint_format == BUCKETS:
        pending.asked |= bucket_shards(view, pending)
    return pending


def _ask_for_v(
    pending: PendingLoad,
    number: int,
    piece: Piece,
    entry: ModelEntry,
    view: StateView,
    source: ParameterBlocks,
) -> None:
    """Request v of a piece: into the state if it keeps one per element, else into host memory.

    Args:
        pending: modified in place.
        number: of the piece.
        piece: the piece.
        entry: where its parameter lies in the whole model.
        view: the optimizer.
        source: the parameter's blocks in the checkpoint.
    """
    if source.pattern is None:
        values = view.state.v_of_elements(piece)
        if not piece.is_elementwise:
            values = pending.elements[number] = torch.empty(
                piece.end - piece.begin, dtype=torch.float32, device=HOST
            )
        boxes = entry.elements(state_key("v_element", ""), values, piece.begin, piece.end)
        add_entries(pending.asked, f"v_element.{number}", boxes)
        return
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
            piece.begin,
            piece.end,
            loading=True,
            tp_rank=view.tp_rank_of_rows(piece),
        )
        add_entries(pending.asked, f"v_row.{number}", boxes)


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
