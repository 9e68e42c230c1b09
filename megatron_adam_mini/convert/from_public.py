"""State of the public package -> a Megatron checkpoint of Adam-mini.

The file holds weights and optimizer state only. Everything else (arguments, parameter groups,
padding of the vocabulary, data types, partition) comes from a template: an Adam-mini checkpoint of
the same model in Megatron, for example of its first step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_adam_mini.checkpoint.chunks import boxes_of
from megatron_adam_mini.checkpoint.errors import CorruptError, UnreadableError
from megatron_adam_mini.checkpoint.reader import Checkpoint
from megatron_adam_mini.checkpoint.writer import CheckpointWriter
from megatron_adam_mini.convert.from_adam import means_of_blocks
from megatron_adam_mini.convert.llama import HuggingFaceParameter, parts_of, read_llama
from megatron_adam_mini.convert.mini_state import MiniState
from megatron_adam_mini.convert.parameters import StoredParameter
from megatron_adam_mini.convert.progress import bytes_bar
from megatron_adam_mini.convert.public_state import PublicFile, PublicParameter
from megatron_adam_mini.plan.manifest import STATE_PREFIX, VOCABULARY_ROLES, are_unions, state_key
from megatron_adam_mini.plan.partition import ParameterBlocks


def read_public_file(path: Path) -> PublicFile:
    """Open a file of the public package, with ``weights_only=True``.

    Raises:
        UnreadableError: it cannot be read.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged file can fail in any way
        raise UnreadableError(f"{path} cannot be read: {error}") from error
    return PublicFile(content, str(path))


def convert_from_public(file: PublicFile, template: Checkpoint, writer: CheckpointWriter) -> None:
    """Write ``template`` with the weights and state of ``file``.

    Raises:
        UnreadableError: another model, or a partition finer than the file's v.
        CorruptError: a value is not finite.
    """
    llama = read_llama(template)
    state, heads, blocks = llama.state, llama.heads, llama.blocks
    written = {p.model_key for p in state.parameters}
    used: set[str] = set()
    steps = set()
    total = sum(template.tensors[state_key("param", p.key)].num_bytes for p in state.parameters)
    with bytes_bar(total, "public -> Adam-mini") as progress:
        for parameter in state.parameters:
            parts = parts_of(parameter.key, parameter.shape[0], heads)
            used |= {part.name for part in parts}
            found = [file.parameter(part.name, heads.head_dim) for part in parts]
            steps |= {part.step for part in found}
            _write(template, writer, parameter, blocks[parameter.key], parts, found)
            progress.update(4 * int(np.prod(parameter.shape)))
        unused = sorted(set(file.names) - {name.lower() for name in used})
        if unused:
            raise UnreadableError(f"The file has parameters that the template lacks: {unused[:5]}.")
        if len(steps) != 1:
            raise CorruptError(f"The file's parameters took different steps: {sorted(steps)}.")
        writer.copy(
            [k for k in template.tensors if not k.startswith(STATE_PREFIX) and k not in written]
        )
        writer.copy(list(template.objects))
    writer.finish(_common(template, state, file, steps.pop()))


def _write(
    template: Checkpoint,
    writer: CheckpointWriter,
    parameter: StoredParameter,
    blocks: ParameterBlocks,
    parts: tuple[HuggingFaceParameter, ...],
    found: list[PublicParameter],
) -> None:
    """Write weights, main parameters, m and v of one parameter."""
    tensors = {
        "param": torch.zeros(parameter.shape, dtype=torch.float32),
        "exp_avg": torch.zeros(parameter.shape, dtype=torch.float32),
    }
    v = torch.zeros(parameter.shape[0], dtype=torch.float64)
    labels = np.full(parameter.shape[0], -1, dtype=np.int64)
    first = 0
    for part, values in zip(parts, found, strict=True):
        rows = part.rows
        if blocks.info.role in VOCABULARY_ROLES and len(values.weight) <= len(rows):
            rows = rows[: len(values.weight)]  # the rest is Megatron's padding
        if len(values.weight) != len(rows) or values.weight.shape[1:] != parameter.shape[1:]:
            raise UnreadableError(
                f"{part.name!r} has shape {list(values.weight.shape)} in the file, but the "
                f"template has {[len(rows), *parameter.shape[1:]]} for it."
            )
        place = torch.from_numpy(rows)
        tensors["param"][place] = values.weight.float()
        tensors["exp_avg"][place] = values.exp_avg.float()
        v[place] = values.v_of_rows
        labels[rows] = values.labels + first
        first += int(values.labels.max()) + 1
    _refuse_finer(parameter, parts, blocks, labels)
    width = int(np.prod(parameter.shape[1:]))
    rows_v = means_of_blocks(blocks, v * width)
    writer.add(state_key("v_row", parameter.key), parameter.shape[:1], (0,), rows_v)
    weight = tensors["param"].to(template.tensors[parameter.model_key].dtype)
    lead = (1,) * len(parameter.layer)
    for offset, size in boxes_of(parameter.shape):
        box = tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))
        for kind, tensor in tensors.items():
            writer.add(state_key(kind, parameter.key), parameter.shape, offset, tensor[box])
        writer.add(
            parameter.model_key,
            parameter.model_shape,
            (*parameter.layer, *offset),
            weight[box].reshape(lead + size),
        )


def _refuse_finer(
    parameter: StoredParameter,
    parts: tuple[HuggingFaceParameter, ...],
    blocks: ParameterBlocks,
    labels: Any,
) -> None:
    """Refuse a partition that needs more numbers than the file has.

    Raises:
        UnreadableError: names the parameter and the remedy.
    """
    if blocks.pattern is not None:
        stored = labels >= 0  # without the vocabulary's padding
        if are_unions(blocks.pattern.block_of_rows()[stored], labels[stored]):
            return
    raise UnreadableError(
        f"{parameter.key!r}: the file has {int(labels.max()) + 1} second moments for "
        f"{', '.join(part.name for part in parts)}, the template's partition has "
        f"{blocks.num_blocks} blocks, and they are no unions of the file's. Make the template with "
        "the preset 'paper' without --adam-mini-full-v, and with --adam-mini-value-as-block if the "
        "file was written with wv_names emptied."
    )


def _common(template: Checkpoint, state: MiniState, file: PublicFile, step: int) -> dict[str, Any]:
    options = file.options()
    groups = [
        {**group, **options, "weight_decay": options["weight_decay"] * group.get("wd_mult", 1.0)}
        for group in state.param_groups
    ]
    optimizer = {**template.optimizer, "step": step, "param_groups": groups}
    return {**template.common, "optimizer": optimizer}
