"""Megatron's Adam -> Adam-mini.

Main parameters and m are copied bit for bit. v of a block is the mean of Adam's v over the block::

    v_b = sum(exp_avg_sq over b) / |b|                     summed in float64

which is what Adam-mini would have accumulated from the same gradients: an average of averages.
"""

from __future__ import annotations

import itertools
import logging
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from megatron_adam_mini.adam_rules import ADAM_ONLY, ADAM_PREFIX
from megatron_adam_mini.checkpoint.errors import UnreadableError
from megatron_adam_mini.checkpoint.reader import Checkpoint, StoredTensor
from megatron_adam_mini.checkpoint.writer import CheckpointWriter
from megatron_adam_mini.config import AdamMiniConfig
from megatron_adam_mini.convert.adam_state import (
    AdamState,
    count_unsound,
    find_adam_state,
    refuse_unsound,
)
from megatron_adam_mini.convert.blocks import args_of, blocks_of
from megatron_adam_mini.convert.parameters import (
    StoredParameter,
    fold,
    number_of,
    whole_of,
    wholes_of,
)
from megatron_adam_mini.convert.progress import bytes_bar
from megatron_adam_mini.plan.manifest import (
    MODEL_SPACE,
    identity_of,
    manifest_of,
    state_key,
    unknown_problem,
)
from megatron_adam_mini.plan.partition import ParameterBlocks, RowPattern

logger = logging.getLogger(__name__)


def convert_from_adam(source: Checkpoint, writer: CheckpointWriter, config: AdamMiniConfig) -> None:
    """Write ``source`` with the state of Adam-mini instead of Adam's.

    Raises:
        UnreadableError: there is no state of Adam, or it cannot be converted.
        CorruptError: damaged, incomplete or unsound state.
    """
    state = find_adam_state(source)
    args = args_of(source)
    parameters = {key: list(fold(key, source.tensors[key].shape)) for key in state.model_keys}
    wholes = wholes_of(p for ps in parameters.values() for p in ps)
    blocks = blocks_of(list(wholes.values()), args, config)
    identity = _identity(blocks, config, args)
    total = sum(source.tensors[k].num_bytes for key in state.model_keys for k in state.keys(key))
    with bytes_bar(total, "Adam -> Adam-mini") as progress:
        parts: dict[str, list[tuple[StoredParameter, Sums]]] = {}
        for layers in parameters.values():
            for parameter, sums in _convert_key(source, writer, state, layers, blocks, progress):
                parts.setdefault(whole_of(parameter.key), []).append((parameter, sums))
        for whole, found in parts.items():
            _write_v(writer, found, blocks[whole])
        writer.copy([k for k in source.tensors if not k.startswith(ADAM_PREFIX)])
        writer.copy(list(source.objects))
    writer.finish(_common(source, state, identity))


def _convert_key(
    source: Checkpoint,
    writer: CheckpointWriter,
    state: AdamState,
    layers: list[StoredParameter],
    blocks: dict[str, ParameterBlocks],
    progress: tqdm,
) -> list[tuple[StoredParameter, Sums]]:
    """Write what a model key holds; return the parts of parameters, with sums of v."""
    model_key = layers[0].model_key
    main_key, m_key, v_key = (source.tensors[key] for key in state.keys(model_key))
    for kind, stored in (("param", main_key), ("exp_avg", m_key)):
        for offset, window in source.windows(stored):
            if kind == "param":
                count = count_unsound(source, model_key, offset, window)
                refuse_unsound(source, stored.key, count, window.numel())
            for layer, rest, values in by_layer(layers, offset, window):
                writer.add(state_key(kind, layer.key), layer.shape, rest, values.float())
            progress.update(window.nbytes)
    found = _convert_v(source, writer, v_key, layers, blocks, progress)
    sums_of = [(layers[number], sums) for number, sums in found.items()]
    if whole_of(model_key) != model_key:
        return sums_of
    for parameter, sums in sums_of:
        _write_v(writer, [(parameter, sums)], blocks[parameter.key])
    return []


class Sums(NamedTuple):
    """Sums of v of one parameter, float64.

    Attributes:
        rows: over each row.
        columns: over the rows of each column set, shape ``(sets, columns)``.
    """

    rows: Tensor
    columns: Tensor


def _write_v(
    writer: CheckpointWriter,
    parts: list[tuple[StoredParameter, Sums]],
    blocks: ParameterBlocks,
) -> None:
    """Write v of every row of a parameter, and of its columns, given sums of its parts."""
    assert blocks.pattern is not None
    if blocks.pattern.num_row_blocks:
        rows = means_of_blocks(blocks, torch.cat([sums.rows for _, sums in parts]))
        first = 0
        for parameter, sums in parts:
            of_part = rows[first : first + len(sums.rows)]
            writer.add(state_key("v_row", parameter.key), parameter.shape[:1], (0,), of_part)
            first += len(sums.rows)
    if blocks.num_column_sets:
        ((parameter, sums),) = parts
        height = np.bincount(blocks.pattern.column_set_of_rows() + 1)[1:]
        means = (sums.columns / torch.from_numpy(height)[:, None]).float()
        writer.add(state_key("v_column", parameter.key), tuple(means.shape), (0, 0), means)


def _convert_v(
    source: Checkpoint,
    writer: CheckpointWriter,
    stored: StoredTensor,
    layers: list[StoredParameter],
    blocks: dict[str, ParameterBlocks],
    progress: tqdm,
) -> dict[int, Sums]:
    """Write v of elementwise parameters; return sums, by layer, for the others."""
    sums = {
        index: _zeros(layer, blocks[whole_of(layer.key)])
        for index, layer in enumerate(layers)
        if blocks[whole_of(layer.key)].pattern is not None
    }
    for offset, window in source.windows(stored):
        for layer, rest, values in by_layer(layers, offset, window):
            of_layer = blocks[whole_of(layer.key)]
            if of_layer.pattern is None:
                writer.add(state_key("v_element", layer.key), layer.shape, rest, values.float())
            else:
                found = sums[number_of(layer.layer, layer.model_shape)]
                _add(found, of_layer.pattern, rest, values.double())
        progress.update(window.nbytes)
    return sums


def _zeros(layer: StoredParameter, blocks: ParameterBlocks) -> Sums:
    columns = blocks.num_column_sets
    shape = (columns, layer.shape[1] if columns else 0)
    return Sums(
        torch.zeros(layer.shape[0], dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    )


def _add(sums: Sums, pattern: RowPattern, at: tuple[int, ...], values: Tensor) -> None:
    """Add a box of v, float64, that begins at ``at``."""
    here = slice(at[0], at[0] + len(values))
    sums.rows[here] += values.reshape(len(values), -1).sum(dim=1)
    if len(sums.columns):
        of_set = torch.from_numpy(pattern.column_set_of_rows()[here])
        for column_set in sorted({*of_set[of_set >= 0].tolist()}):
            of_box = values[of_set == column_set].sum(dim=0)
            sums.columns[column_set, at[1] : at[1] + len(of_box)] += of_box


def means_of_blocks(blocks: ParameterBlocks, sums: Tensor) -> Tensor:
    """Return, for every row, the mean over its block.

    Args:
        blocks: partition of the parameter.
        sums: float64 sum over each row, shape ``(rows,)``.

    Returns:
        float32, shape ``(rows,)``; rows of one block have equal values, those of column sets 0.
    """
    assert blocks.pattern is not None
    labels = blocks.pattern.block_of_rows()
    width = math.prod(blocks.info.shape[1:])
    counts = np.bincount(labels, minlength=blocks.num_blocks) * width
    totals = np.bincount(labels, weights=sums.numpy(), minlength=blocks.num_blocks)
    with np.errstate(invalid="ignore"):  # blocks of columns have no rows of their own
        means = (totals / counts).astype(np.float32)[labels]
    return torch.from_numpy(np.where(blocks.pattern.column_set_of_rows() < 0, means, np.float32(0)))


def by_layer(
    layers: list[StoredParameter], offset: tuple[int, ...], window: Tensor
) -> list[tuple[StoredParameter, tuple[int, ...], Tensor]]:
    """Cut a box of a model key's tensor into boxes of its layers: layer, offset, values."""
    lead, shape = len(layers[0].layer), layers[0].model_shape
    found = []
    for within in itertools.product(*(range(size) for size in window.shape[:lead])):
        at = tuple(first + index for first, index in zip(offset[:lead], within, strict=True))
        found.append((layers[number_of(at, shape)], offset[lead:], window[within]))
    return found


def _identity(
    blocks: dict[str, ParameterBlocks], config: AdamMiniConfig, args: Any
) -> dict[str, Any]:
    """Return the identity of the new checkpoint's state; ``args`` are those of the saving run."""
    sizes = {
        "tensor": "tensor_model_parallel_size",
        "pipeline": "pipeline_model_parallel_size",
        "context": "context_parallel_size",
        "expert": "expert_model_parallel_size",
        "expert_tensor": "expert_tensor_parallel_size",
        "data": "data_parallel_size",
    }
    known = {key: getattr(args, name, None) for key, name in sizes.items()}
    manifest = manifest_of([b.manifest_entry() for b in blocks.values()], config)
    if problem := unknown_problem(manifest):
        logger.warning("A run that loads this would refuse to start: %s", problem)
    return identity_of(
        manifest,
        config,
        checkpoint_format=MODEL_SPACE,
        saved_from={**{key: size for key, size in known.items() if size}, "converted_from": "adam"},
    )


def _common(source: Checkpoint, state: AdamState, identity: dict[str, Any]) -> dict[str, Any]:
    dropped = {*ADAM_ONLY, "step", "params"}
    if any(group.get("amsgrad") for group in state.param_groups):
        raise UnreadableError("amsgrad=True has no counterpart in Adam-mini.")
    optimizer: dict[str, Any] = {
        "adam_mini": identity,
        "step": state.step,
        "param_groups": [
            {key: value for key, value in group.items() if key not in dropped}
            for group in state.param_groups
        ],
    }
    if state.grad_scaler is not None:
        optimizer["grad_scaler"] = state.grad_scaler
    content = {**source.content, "adam_mini": identity}
    content["distrib_optim_sharding_type"] = "fully_reshardable"
    return {**source.common, "optimizer": optimizer, "content_metadata": content}
