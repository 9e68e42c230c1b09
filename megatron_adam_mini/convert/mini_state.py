"""State of Adam-mini in a checkpoint: what there is, by parameter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_adam_mini.checkpoint.errors import CorruptError, UnreadableError
from megatron_adam_mini.checkpoint.reader import Checkpoint
from megatron_adam_mini.config import FORMAT_VERSION
from megatron_adam_mini.convert.keys import PREFIX, Parameter, keys_by_kind, parameter_of


@dataclass(frozen=True)
class MiniState:
    """Where a checkpoint has the state of Adam-mini.

    Attributes:
        identity: what it says of itself.
        parameters: in stored order.
        elementwise: folded keys of parameters with one second moment per element.
        step: steps taken.
        param_groups: their options, without parameters.
    """

    identity: dict[str, Any]
    parameters: tuple[Parameter, ...]
    elementwise: frozenset[str]
    step: int
    param_groups: list[dict[str, Any]]


def find_mini_state(checkpoint: Checkpoint) -> MiniState:
    """Return the state of Adam-mini in a checkpoint.

    Raises:
        UnreadableError: none, of a newer format, or flat buckets.
        CorruptError: parts of it are missing, or are of no parameter of the model.
    """
    identity = checkpoint.optimizer.get("adam_mini")
    if not isinstance(identity, dict):
        raise UnreadableError(
            f"{checkpoint.folder} holds no state of Adam-mini; it was saved by another optimizer, "
            "or with --no-save-optim."
        )
    if identity["format"] > FORMAT_VERSION:
        raise UnreadableError(
            f"{checkpoint.folder} has Adam-mini format {identity['format']}, this release reads up "
            f"to {FORMAT_VERSION}. Install a newer megatron-adam-mini."
        )
    if identity["layout"] != "model_space":
        raise UnreadableError(
            f"{checkpoint.folder} holds Adam-mini's state as {identity['layout']!r}, flat buckets "
            "whose contents depend on the layout. Load it in its own run and save it again with "
            "--dist-ckpt-optim-fully-reshardable."
        )
    kinds = {kind: set(keys) for kind, keys in keys_by_kind(checkpoint, PREFIX).items()}
    ordered = keys_by_kind(checkpoint, PREFIX).get("param", [])
    rows, elements = kinds.get("v_row", set()), kinds.get("v_element", set())
    for kind, keys in (("exp_avg", kinds.get("exp_avg", set())), ("v", rows | elements)):
        if keys != set(ordered):
            odd = sorted(keys ^ set(ordered))[0]
            raise CorruptError(f"{checkpoint.folder}: {kind} and param do not agree about {odd!r}.")
    if rows & elements:
        raise CorruptError(
            f"{checkpoint.folder}: {sorted(rows & elements)[0]!r} has v per row and per element."
        )
    parameters = tuple(parameter_of(checkpoint, key) for key in ordered)
    for parameter in parameters:
        _check_shapes(checkpoint, parameter, parameter.key in rows)
    return MiniState(
        identity=identity,
        parameters=parameters,
        elementwise=frozenset(elements),
        step=int(checkpoint.optimizer["step"]),
        param_groups=list(checkpoint.optimizer["param_groups"]),
    )


def _check_shapes(checkpoint: Checkpoint, parameter: Parameter, by_row: bool) -> None:
    v = ("v_row", parameter.shape[:1]) if by_row else ("v_element", parameter.shape)
    for kind, shape in (("param", parameter.shape), ("exp_avg", parameter.shape), v):
        found = checkpoint.tensors[f"{PREFIX}{kind}.{parameter.key}"].shape
        if found != shape:
            raise CorruptError(
                f"{checkpoint.folder}: {kind} of {parameter.key!r} has shape {list(found)}, the "
                f"model says {list(shape)}."
            )
