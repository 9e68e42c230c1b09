"""Adam-mini -> Megatron's Adam, in the distributed optimizer's ``fully_reshardable`` format.

Main parameters and m are copied bit for bit. Every element gets the v of its block: the history
from which the next step of Adam-mini would have started.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from tqdm import tqdm

from megatron_adam_mini.adam_rules import ADAM_ONLY, adam_key
from megatron_adam_mini.checkpoint.errors import CorruptError
from megatron_adam_mini.checkpoint.reader import Checkpoint, tiling_problem
from megatron_adam_mini.checkpoint.writer import CheckpointWriter
from megatron_adam_mini.convert.mini_state import MiniState, find_mini_state
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
    rows = source.read(state_key("v_row", parameter.key))
    narrow = (1,) * (len(parameter.shape) - 1)
    # The boxes of m, so that the three tensors of a parameter have the same boxes.
    for chunk_offset, window in source.windows(source.tensors[state_key("exp_avg", parameter.key)]):
        first, count = chunk_offset[0], len(window)
        values = rows[first : first + count].reshape(count, *narrow).expand(window.shape)
        add("exp_avg_sq", chunk_offset, values.contiguous())


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
