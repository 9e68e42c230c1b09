"""Adam-mini -> Megatron's Adam, in the distributed optimizer's ``fully_reshardable`` format.

Main parameters and m are copied bit for bit. Every element gets the v of its block: the history
from which the next step of Adam-mini would have started.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_adam_mini.adam_rules import ADAM_ONLY, adam_key
from megatron_adam_mini.checkpoint.errors import CorruptError
from megatron_adam_mini.checkpoint.reader import Checkpoint, tiling_problem
from megatron_adam_mini.checkpoint.writer import CheckpointWriter
from megatron_adam_mini.convert.mini_state import MiniState, find_mini_state, stored_blocks
from megatron_adam_mini.convert.parameters import StoredParameter
from megatron_adam_mini.convert.progress import bytes_bar
from megatron_adam_mini.plan.manifest import STATE_PREFIX, state_key


def convert_to_adam(source: Checkpoint, writer: CheckpointWriter) -> None:
    """Write ``source`` with the state of Adam instead of Adam-mini's.

    Raises:
        UnreadableError: there is no state of Adam-mini, or it consists of flat buckets.
        CorruptError: damaged or incomplete state.
    """
    state = find_mini_state(source)
    total = sum(
        source.tensors[state_key(kind, p.key)].num_bytes
        for p in state.parameters
        for kind in ("param", "exp_avg", "exp_avg")
    )
    with bytes_bar(total, "Adam-mini -> Adam") as progress:
        for parameter in state.parameters:
            _convert_parameter(source, writer, state, parameter, progress)
        writer.copy([key for key in source.tensors if not key.startswith(STATE_PREFIX)])
        writer.copy(list(source.objects))
    writer.finish(_common(source, state))


def _convert_parameter(
    source: Checkpoint,
    writer: CheckpointWriter,
    state: MiniState,
    parameter: StoredParameter,
    progress: tqdm,
) -> None:
    def add(kind: str, offset: tuple[int, ...], values: Tensor) -> None:
        lead = (1,) * len(parameter.layer)
        writer.add(
            adam_key(kind, parameter.model_key),
            parameter.model_shape,
            (*parameter.layer, *offset),
            values.reshape(lead + tuple(values.shape)),
        )
        progress.update(values.nbytes)

    for kind in ("param", "exp_avg"):
        stored = source.tensors[state_key(kind, parameter.key)]
        problem = tiling_problem(stored)
        if problem:
            raise CorruptError(f"{source.folder}: {problem}")
        for offset, window in source.windows(stored):
            add(kind, offset, window)
    if parameter.key in state.elementwise:
        for offset, window in source.windows(source.tensors[state_key("v_element", parameter.key)]):
            add("exp_avg_sq", offset, window)
        return
    v_of = _V(source, state, parameter)
    # The boxes of m, so that the three tensors of a parameter have the same boxes.
    for chunk_offset, window in source.windows(source.tensors[state_key("exp_avg", parameter.key)]):
        add("exp_avg_sq", chunk_offset, v_of.box(chunk_offset, window.shape))


class _V:
    """v of the rows and columns of one parameter.

    Raises:
        CorruptError, UnreadableError: as of :func:`stored_blocks`.
    """

    def __init__(self, source: Checkpoint, state: MiniState, parameter: StoredParameter) -> None:
        self._rows: Tensor | None = None
        self._columns: Tensor | None = None
        if parameter.key in state.by_row:
            self._rows = source.read(state_key("v_row", parameter.key))
        if parameter.key in state.by_column:
            self._columns = source.read(state_key("v_column", parameter.key))
            blocks = stored_blocks(state, parameter, source.common.get("args"))
            if blocks.pattern is None or blocks.pattern.num_column_sets != len(self._columns):
                raise CorruptError(
                    f"{source.folder}: {parameter.key!r} has v of {len(self._columns)} column "
                    "sets, which are not those of its rule."
                )
            self._set_of_row = torch.from_numpy(blocks.pattern.column_set_of_rows())

    def box(self, offset: tuple[int, ...], shape: torch.Size) -> Tensor:
        """Return v of the elements of a box."""
        here = slice(offset[0], offset[0] + shape[0])
        if self._columns is None:
            assert self._rows is not None
            narrow = (1,) * (len(shape) - 1)
            return self._rows[here].reshape(-1, *narrow).expand(shape).contiguous()
        of_set = self._set_of_row[here]
        columns = self._columns[:, offset[1] : offset[1] + shape[1]]
        found = columns[of_set.clamp(min=0)]
        if self._rows is not None:
            found = torch.where(of_set[:, None] < 0, self._rows[here, None], found)
        return found.contiguous()


def _common(source: Checkpoint, state: MiniState) -> dict[str, Any]:
    groups = [{**ADAM_ONLY, **group, "step": state.step} for group in state.param_groups]
    experts = [group for group in groups if group.get("is_expert_parallel")]
    dense = [group for group in groups if not group.get("is_expert_parallel")]
    scaler = {key: source.optimizer[key] for key in ("grad_scaler",) if key in source.optimizer}
    members = [
        {
            "optimizer": {"param_groups": of_member},
            "param_state_sharding_type": "fully_reshardable",
            **scaler,
        }
        for of_member in ([dense, experts] if experts else [dense])
    ]
    # Megatron's chain of an optimizer for dense parameters and one for experts.
    optimizer: dict[Any, Any] = dict(enumerate(members)) if experts else members[0]
    content = {key: value for key, value in source.content.items() if key != "adam_mini"}
    content["distrib_optim_sharding_type"] = "fully_reshardable"
    return {**source.common, "optimizer": optimizer, "content_metadata": content}
