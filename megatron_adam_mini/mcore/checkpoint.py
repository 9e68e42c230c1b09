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

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.optimizer.optimizer import param_group_identifier_keys
from torch import Tensor

from megatron_adam_mini.config import AdamMiniConfig
from megatron_adam_mini.engine import Piece
from megatron_adam_mini.mcore.model_space import ModelEntry, entries_by_parameter, put_back
from megatron_adam_mini.partition import (
    ParameterBlocks,
    is_coarsening,
    partition_parameter,
)

if TYPE_CHECKING:
    from megatron_adam_mini.mcore.distributed_optimizer import AdamMiniOptimizer

logger = logging.getLogger(__name__)

#: Raised when older code could not read what newer code writes.
FORMAT_VERSION = 1
PREFIX = "optimizer.adam_mini."
ONLY_TORCH_DIST = (
    "Adam-mini's state is saved in torch_dist checkpoints only, where every rank writes what it "
    "owns; use --ckpt-format torch_dist (the default), or --no-save-optim / --no-load-optim."
)


@dataclass
class PendingLoad:
    """What :func:`state_to_load` asked for, until :func:`take_over` gets it.

    Attributes:
        asked: entries by name, as put in the state dict.
        rows: row values of each piece, by the piece's number.
        elements: element values of each piece whose v is averaged over blocks.
        average: whether v is averaged over blocks rather than taken as it is.
    """

    asked: dict[str, dict[str, ShardedTensor]] = field(default_factory=dict)
    rows: dict[int, Tensor] = field(default_factory=dict)
    elements: dict[int, Tensor] = field(default_factory=dict)
    average: bool = False


def state_to_save(
    optimizer: AdamMiniOptimizer, model_state: Mapping[str, Any], metadata: dict[str, Any] | None
) -> dict[str, Any]:
    """Return this rank's part of the optimizer state, as views wherever that is safe."""
    wanted = (metadata or {}).get("distrib_optim_sharding_type")
    layout = "dp_reshardable" if wanted == "dp_reshardable" else "model_space"
    identity = identity_of(optimizer, layout)
    if metadata is not None:
        metadata["adam_mini"] = identity
        if wanted is not None and layout == "model_space":
            # What Megatron asks before it lets a run with other TP or PP sizes load the state.
            metadata["distrib_optim_sharding_type"] = "fully_reshardable"
    shards: dict[str, dict[str, ShardedTensor]] = {}
    entries = entries_by_parameter(model_state)
    for number, piece in enumerate(optimizer.engine.pieces()):
        entry = _entry(optimizer, piece, entries)
        if layout == "model_space":
            for kind, flat in _flat_state(piece).items():
                data = _unshared(flat[piece.window])
                _put(shards, f"{kind}.{number}", entry.elements(_kind(kind), data, *_run(piece)))
        if piece.ranges.stop:
            values = _elementwise_v(optimizer, piece).clone()
            _put(
                shards,
                f"v_element.{number}",
                entry.elements(_kind("v_element"), values, *_run(piece)),
            )
        else:
            rows = _rows_from_blocks(optimizer, piece)
            _put(
                shards,
                f"v_row.{number}",
                entry.rows(
                    _kind("v_row"),
                    rows,
                    *_run(piece),
                    loading=False,
                    tp_rank=_tp_rank(optimizer, piece),
                ),
            )
    if layout == "dp_reshardable":
        shards |= _bucket_shards(optimizer, loading=False)
    state: dict[str, Any] = {
        "adam_mini": identity,
        "step": optimizer.engine.step_count,
        "param_groups": [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ],
    }
    if shards:  # an empty entry would become part of the common state of all ranks
        state["state"] = shards
    if optimizer.grad_scaler is not None:
        state["grad_scaler"] = optimizer.grad_scaler.state_dict()
    return state


def state_to_load(
    optimizer: AdamMiniOptimizer, model_state: Mapping[str, Any], metadata: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return what this rank asks a checkpoint for; it is read into the state in place."""
    saved = (metadata or {}).get("adam_mini")
    if saved is None and metadata is not None and "distrib_optim_sharding_type" in metadata:
        raise ValueError(
            "The checkpoint holds the state of another optimizer than Adam-mini. Load the model "
            "alone with --no-load-optim (--finetune also restarts the schedule)."
        )
    pending = PendingLoad()
    layout = "model_space"
    sources: list[ParameterBlocks] = list(optimizer.engine.parameters)
    if saved is not None:
        layout = saved["layout"]
        sources = _partition_of_checkpoint(optimizer, saved)
        pending.average = sources != list(optimizer.engine.parameters)
    entries = entries_by_parameter(model_state)
    for number, piece in enumerate(optimizer.engine.pieces()):
        entry = _entry(optimizer, piece, entries)
        if layout == "model_space":
            for kind, flat in _flat_state(piece).items():
                found = entry.elements(_kind(kind), flat[piece.window], *_run(piece))
                _put(pending.asked, f"{kind}.{number}", found)
        if sources[piece.parameter].pattern is None:
            values = _elementwise_v(optimizer, piece)
            if not piece.ranges.stop:
                values = pending.elements[number] = torch.empty(
                    piece.end - piece.begin, device=optimizer.engine.device
                )
            found = entry.elements(_kind("v_element"), values, *_run(piece))
            _put(pending.asked, f"v_element.{number}", found)
        else:
            width = optimizer.engine.parameters[piece.parameter].info.row_numel
            touched = -(-piece.end // width) - piece.begin // width
            rows = pending.rows[number] = torch.empty(touched, device=optimizer.engine.device)
            found = entry.rows(
                _kind("v_row"), rows, *_run(piece), loading=True, tp_rank=_tp_rank(optimizer, piece)
            )
            _put(pending.asked, f"v_row.{number}", found)
    if layout == "dp_reshardable":
        pending.asked |= _bucket_shards(optimizer, loading=True)
    optimizer._pending_load = pending
    return {"state": dict(pending.asked)} if pending.asked else {}


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
    _partition_of_checkpoint(optimizer, loaded["adam_mini"])
    for name, asked in pending.asked.items():
        put_back(asked, loaded["state"][name])
    if pending.average:
        engine.average_into_v(_sums_over_segments(optimizer, pending))
    else:
        for number, piece in enumerate(engine.pieces()):
            if number in pending.rows:
                _blocks_from_rows(optimizer, piece, pending.rows[number])
    engine.step_count = int(loaded["step"])
    _load_groups(optimizer, loaded["param_groups"])
    if optimizer.grad_scaler is not None and "grad_scaler" in loaded:
        optimizer.grad_scaler.load_state_dict(loaded["grad_scaler"])
    optimizer.write_model_weights()


def identity_of(optimizer: AdamMiniOptimizer, layout: str) -> dict[str, Any]:
    """Return what says whose state it is; plain values only, equal on all ranks."""
    manifest = optimizer.manifest
    return {
        "format": FORMAT_VERSION,
        "layout": layout,
        "partition": optimizer.engine.config.partition_fields(),
        "manifest_hash": manifest["hash"],
        "rules": {e["name"]: [e["rule"], e["blocks"]] for e in manifest["parameters"]},
        "saved_from": optimizer.layout_sizes,
    }


def _partition_of_checkpoint(
    optimizer: AdamMiniOptimizer, saved: Mapping[str, Any]
) -> list[ParameterBlocks]:
    """Return the blocks that the checkpoint's v belongs to, or refuse.

    Raises:
        ValueError: another format, or another partition that is not to be, or cannot be, converted.
    """
    if saved["format"] > FORMAT_VERSION:
        raise ValueError(
            f"The checkpoint has Adam-mini format {saved['format']}, this release reads up to "
            f"{FORMAT_VERSION}. Install a newer megatron-adam-mini."
        )
    engine = optimizer.engine
    own = engine.config.partition_fields()
    if saved["partition"] == own and saved["manifest_hash"] == optimizer.manifest["hash"]:
        return list(engine.parameters)
    ours = {e["name"]: [e["rule"], e["blocks"]] for e in optimizer.manifest["parameters"]}
    theirs = {name: list(rule) for name, rule in saved["rules"].items()}
    changed = [
        f"{name}: checkpoint {_words(theirs.get(name))}, run {_words(ours.get(name))}"
        for name in sorted(ours.keys() | theirs.keys())
        if _rule(ours.get(name)) != _rule(theirs.get(name))
    ]
    difference = (
        f"partition {_options(saved['partition'])} (manifest {saved['manifest_hash']}) in the "
        f"checkpoint, {_options(own)} (manifest {optimizer.manifest['hash']}) in this run; "
        f"{len(changed)} parameters differ" + (": " + "; ".join(changed[:5]) if changed else "")
    )
    if ours.keys() != theirs.keys() or saved["partition"]["rule_version"] != own["rule_version"]:
        raise ValueError(
            f"The checkpoint's Adam-mini state does not fit this model: {difference}. Load it with "
            "the model and release that wrote it, or start fresh with --no-load-optim."
        )
    saved_config = AdamMiniConfig(
        preset=saved["partition"]["preset"],
        value_as_block=saved["partition"]["value_as_block"],
        rules=tuple((pattern, rule) for pattern, rule in saved["partition"]["overrides"]),
    )
    sources = [partition_parameter(blocks.info, saved_config) for blocks in engine.parameters]
    finer = [
        blocks.info.name
        for source, blocks in zip(sources, engine.parameters, strict=True)
        if not is_coarsening(source, blocks)
    ]
    if finer:
        raise ValueError(
            f"The checkpoint's Adam-mini state has another partition: {difference}. It cannot be "
            f"converted, because this run's blocks are finer or cut otherwise ({finer[0]}, and "
            f"{len(finer) - 1} more on this rank). Use the checkpoint's options or --no-load-optim."
        )
    if sources != list(engine.parameters) and not engine.config.convert_partition:
        raise ValueError(
            f"The checkpoint's Adam-mini state has another partition: {difference}. Use the "
            "checkpoint's options; or, as this run's blocks are unions of the checkpoint's, add "
            "--adam-mini-convert-partition to average v over them, which is exact."
        )
    return sources


def _rule(entry: list[Any] | None) -> Any:
    # Block counts of vocabulary matrices depend on padding, which is not a difference.
    return None if entry is None else entry[0]


def _words(entry: list[Any] | None) -> str:
    return "lacks it" if entry is None else f"{entry[0]} ({entry[1]} blocks)"


def _options(partition: Mapping[str, Any]) -> str:
    words = [repr(partition["preset"])]
    if partition["value_as_block"]:
        words.append("value as block")
    if partition["overrides"]:
        words.append(f"rules {partition['overrides']}")
    return " ".join(words)


# Pieces of parameters to entries of the checkpoint.


def _kind(name: str) -> str:
    return f"{PREFIX}{name}."


def _run(piece: Piece) -> tuple[int, int]:
    return piece.begin, piece.end


def _flat_state(piece: Piece) -> dict[str, Tensor]:
    return {"param": piece.bucket.state.main_param, "exp_avg": piece.bucket.state.exp_avg}


def _entry(
    optimizer: AdamMiniOptimizer, piece: Piece, entries: Mapping[int, ShardedBase]
) -> ModelEntry:
    found = entries.get(id(optimizer.get_parameters()[piece.parameter]))
    if found is None:
        name = optimizer.engine.parameters[piece.parameter].info.name
        raise ValueError(
            f"Parameter {name!r} is not in the model's sharded state dict, so Adam-mini cannot "
            "tell where its state belongs; build that dict with keep_vars=True."
        )
    return ModelEntry(found, optimizer.replica_number)


def _put(
    shards: dict[str, dict[str, ShardedTensor]], name: str, found: list[ShardedTensor]
) -> None:
    if found:
        shards[name] = {str(index): shard for index, shard in enumerate(found)}


def _tp_rank(optimizer: AdamMiniOptimizer, piece: Piece) -> int | None:
    info = optimizer.engine.parameters[piece.parameter].info
    return info.tp_rank if (info.tp_dim or 0) > 0 else None


def _unshared(data: Tensor) -> Tensor:
    """Copy what an asynchronous writer process would share with training.

    On the CPU, Megatron's writer clones views but hands over tensors that fill their storage, and
    the next step would write into the checkpoint. On a GPU everything is copied to the host.
    """
    fills = data.nbytes == data.untyped_storage().nbytes()
    return data.clone() if data.device.type == "cpu" and fills else data


def _elementwise_v(optimizer: AdamMiniOptimizer, piece: Piece) -> Tensor:
    """Return the view of v of a piece that keeps one per element (else an empty one)."""
    if not piece.ranges.stop:
        return optimizer.engine.exp_avg_sq_E[:0]
    lengths = piece.bucket.part.end_R - piece.bucket.part.start_R
    begin = piece.bucket.elements_at.start + int(lengths[: piece.ranges.start].sum())
    return optimizer.engine.exp_avg_sq_E[begin : begin + piece.end - piece.begin]


def _segments(optimizer: AdamMiniOptimizer, piece: Piece) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return v, first and last element of a piece's segments, and the parameter's row width."""
    device = optimizer.engine.device
    at = piece.bucket.blocks_at.start
    v = optimizer.engine.exp_avg_sq_B[at + piece.segments.start : at + piece.segments.stop]
    shift = piece.begin - piece.window.start
    first = torch.from_numpy(piece.bucket.part.start_S[piece.segments] + shift).to(device)
    last = torch.from_numpy(piece.bucket.part.end_S[piece.segments] + shift).to(device)
    return v, first, last, optimizer.engine.parameters[piece.parameter].info.row_numel


def _rows_from_blocks(optimizer: AdamMiniOptimizer, piece: Piece) -> Tensor:
    """Return v of every row that the piece touches, from row ``begin // width`` on."""
    v, first, last, width = _segments(optimizer, piece)
    counts = -(-last // width) - first // width
    # Two segments in one row are one block: the second one's count of new rows is smaller.
    shared = first % width != 0
    shared[0] = False
    return torch.repeat_interleave(v, counts - shared.long())


def _blocks_from_rows(optimizer: AdamMiniOptimizer, piece: Piece, rows: Tensor) -> None:
    v, first, _, width = _segments(optimizer, piece)
    v.copy_(rows[first // width - piece.begin // width])


def _sums_over_segments(optimizer: AdamMiniOptimizer, pending: PendingLoad) -> Tensor:
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


def _bucket_shards(
    optimizer: AdamMiniOptimizer, *, loading: bool
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
        flats = {"param": bucket.state.main_param, "exp_avg": bucket.state.exp_avg}
        for kind, flat in flats.items():
            data = flat[:length] if loading else _unshared(flat[:length])
            shards[f"bucket_{kind}.{number}"] = {
                "0": ShardedTensor(
                    key=f"{PREFIX}bucket.{kind}.model_parallel_{stage}.bucket_{number}",
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
        values = by_identifier[identifier(group)]
        group.update({key: value for key, value in values.items() if key != "params"})
