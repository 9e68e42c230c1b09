"""State of Adam-mini in a checkpoint, by parameter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megatron_adam_mini.checkpoint.errors import CorruptError, UnreadableError
from megatron_adam_mini.checkpoint.reader import Checkpoint
from megatron_adam_mini.convert.blocks import info_of
from megatron_adam_mini.convert.parameters import (
    StoredParameter,
    keys_by_kind,
    name_of,
    parameter_of,
    whole_of,
)
from megatron_adam_mini.plan.manifest import (
    MODEL_SPACE,
    STATE_PREFIX,
    StoredRule,
    config_of,
    format_of,
    format_problem,
    state_key,
    stored_rules,
)
from megatron_adam_mini.plan.partition import ParameterBlocks, partition_by_rule


@dataclass(frozen=True)
class MiniState:
    """Where a checkpoint has the state of Adam-mini.

    Attributes:
        identity: identity of the state.
        rules: manifest entries of its parameters, by folded key.
        parameters: in stored order.
        by_row, by_column: folded keys of parameters with v of rows, of columns, or of both.
        elementwise: folded keys of parameters with one second moment per element.
        step: steps taken.
        param_groups: options of the parameter groups, without parameters.
    """

    identity: dict[str, Any]
    rules: dict[str, StoredRule]
    parameters: tuple[StoredParameter, ...]
    by_row: frozenset[str]
    by_column: frozenset[str]
    elementwise: frozenset[str]
    step: int
    param_groups: list[dict[str, Any]]


def find_mini_state(checkpoint: Checkpoint) -> MiniState:
    """Return the state of Adam-mini in a checkpoint.

    Raises:
        UnreadableError: there is none, its format is newer, or it consists of flat buckets.
        CorruptError: parts of it are missing, or belong to no parameter of the model.
    """
    identity = checkpoint.optimizer.get("adam_mini")
    if not isinstance(identity, dict):
        raise UnreadableError(
            f"{checkpoint.folder} holds no state of Adam-mini; it was saved by another optimizer, "
            "or with --no-save-optim."
        )
    problem = format_problem(identity)
    if problem:
        raise UnreadableError(f"{checkpoint.folder} {problem}")
    if format_of(identity) != MODEL_SPACE:
        raise UnreadableError(
            f"{checkpoint.folder} holds Adam-mini's state as {format_of(identity)!r}, flat buckets "
            "whose contents depend on the layout. Load it in its own run and save it again with "
            f"--adam-mini-checkpoint-format {MODEL_SPACE} (the default)."
        )
    kinds = {kind: set(keys) for kind, keys in keys_by_kind(checkpoint, STATE_PREFIX).items()}
    ordered = keys_by_kind(checkpoint, STATE_PREFIX).get("param", [])
    rows, columns, elements = (
        kinds.get(kind, set()) for kind in ("v_row", "v_column", "v_element")
    )
    of_blocks = rows | columns
    for kind, keys in (("exp_avg", kinds.get("exp_avg", set())), ("v", of_blocks | elements)):
        if keys != set(ordered):
            odd = sorted(keys ^ set(ordered))[0]
            raise CorruptError(f"{checkpoint.folder}: {kind} and param do not agree about {odd!r}.")
    if of_blocks & elements:
        raise CorruptError(
            f"{checkpoint.folder}: {sorted(of_blocks & elements)[0]!r} has v per row or column, "
            "and per element."
        )
    parameters = tuple(parameter_of(checkpoint, key) for key in ordered)
    for parameter in parameters:
        kinds_of_v = [
            k for k, keys in kinds.items() if k.startswith("v_") and parameter.key in keys
        ]
        _check_shapes(checkpoint, parameter, kinds_of_v)
    rules = stored_rules(identity, {name_of(key, local=True): key for key in ordered})
    return MiniState(
        identity=identity,
        rules=rules | _rules_of_parts(rules, parameters),
        parameters=parameters,
        by_row=frozenset(rows),
        by_column=frozenset(columns),
        elementwise=frozenset(elements),
        step=int(checkpoint.optimizer["step"]),
        param_groups=list(checkpoint.optimizer["param_groups"]),
    )


def _rules_of_parts(
    rules: dict[str, StoredRule], parameters: tuple[StoredParameter, ...]
) -> dict[str, StoredRule]:
    """Return the rules of parts that Megatron stores apart, such as the projections of Mamba."""
    found = {}
    for parameter in parameters:
        rule = None if parameter.key in rules else rules.get(whole_of(parameter.key))
        sizes = {"tensor": (), "row": parameter.shape[:1], "element": parameter.shape}
        if rule is not None and rule.rule in sizes:
            found[parameter.key] = rule._replace(num_blocks=math.prod(sizes[rule.rule]))
    return found


def stored_blocks(state: MiniState, parameter: StoredParameter, args: Any) -> ParameterBlocks:
    """Partition a parameter into the blocks of its v in the checkpoint.

    Raises:
        CorruptError: the checkpoint's manifest lacks it, or describes its heads wrongly.
        UnreadableError: the checkpoint does not tell its heads.
        ValueError: its rule does not apply.
    """
    if parameter.key not in state.rules:
        raise CorruptError(f"{parameter.key!r} has state, but is not in the manifest.")
    stored = state.identity.get("heads")
    stacked = state.identity.get("stacked")
    info = info_of(parameter, name_of(parameter.key, local=False), args, stored, stacked)
    return partition_by_rule(info, state.rules[parameter.key].rule, config_of(state.identity))


def _check_shapes(
    checkpoint: Checkpoint, parameter: StoredParameter, kinds_of_v: list[str]
) -> None:
    shapes = {"v_row": parameter.shape[:1], "v_column": parameter.shape[1:]}
    for kind in ("param", "exp_avg", *kinds_of_v):
        shape = shapes.get(kind, parameter.shape)
        found = checkpoint.tensors[state_key(kind, parameter.key)].shape
        if kind == "v_column":
            found = found[1:]  # a row for each column set
        if found != shape:
            raise CorruptError(
                f"{checkpoint.folder}: {kind} of {parameter.key!r} has shape {list(found)}, the "
                f"model says {list(shape)}."
            )
