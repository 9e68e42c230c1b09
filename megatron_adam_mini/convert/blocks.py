"""Parameters of a checkpoint -> blocks, by their names, roles and heads.

Imports ``parameters`` and ``plan``. Facts that a run takes from its model come from the ``args`` in
Megatron's checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from megatron_adam_mini.checkpoint.errors import CorruptError, UnreadableError
from megatron_adam_mini.checkpoint.reader import Checkpoint
from megatron_adam_mini.config import AdamMiniConfig
from megatron_adam_mini.convert.parameters import StoredParameter, name_in_run
from megatron_adam_mini.plan.parameter_info import HeadGeometry, ParameterInfo, num_stacked
from megatron_adam_mini.plan.partition import (
    ParameterBlocks,
    has_columns,
    partition_parameter,
    unmatched_patterns,
)

#: Start of the keys whose heads are those that ``args`` describe: not a vision model's.
_TOLD_BY_ARGS = re.compile(r"(language_model\.)?(decoder|encoder|mtp)\.")


def args_of(checkpoint: Checkpoint) -> Any:
    """Return the ``args`` of the run that saved.

    Raises:
        UnreadableError: the checkpoint has no ``args``.
    """
    args = checkpoint.common.get("args")
    if args is None:
        raise UnreadableError(
            f"{checkpoint.folder} holds no 'args', which say how its attention heads lie in "
            "memory; Megatron's training loop stores them. Load it in a run and save it again."
        )
    return args


def heads_of(args: Any, role: str = "qkv") -> HeadGeometry:
    """Return the head geometry as Megatron's ``core_transformer_config_from_args`` reads it.

    Args:
        args: the checkpoint's.
        role: see :meth:`HeadGeometry.of`.

    Raises:
        UnreadableError: an argument is missing.
    """
    try:
        return HeadGeometry.of(args, role)
    except AttributeError as error:
        raise UnreadableError(
            f"The checkpoint's args lack {error.name!r}, which says how attention heads lie in "
            "memory. Load it in a run and save it again."
        ) from error


def info_of(
    parameter: StoredParameter,
    name: str,
    args: Any,
    stored: Mapping[str, Mapping[str, Any]] | None = None,
    stacked: Mapping[str, int] | None = None,
) -> ParameterInfo:
    """Return what the partition must know of a parameter.

    Args:
        parameter: where the checkpoint has it.
        name: its name in a model.
        args: the checkpoint's, ``None`` if it has none.
        stored: head geometries that the checkpoint stores with Adam-mini's state, by folded key;
            ``args`` tell those that are missing.
        stacked: weights that hold several matrices, as it stores them; ``None``: ``args`` tell.

    Raises:
        CorruptError: a stored geometry is none.
        UnreadableError: ``args`` do not tell the heads.
    """

    def heads(role: str) -> HeadGeometry | None:
        numbers = (stored or {}).get(parameter.key)
        if numbers is not None:
            try:
                return HeadGeometry.stored(numbers, role)
            except TypeError as error:
                raise CorruptError(
                    f"The checkpoint stores heads of {parameter.key!r} as {numbers!r}."
                ) from error
        if args is None:
            return None
        if not _TOLD_BY_ARGS.match(parameter.key):
            raise UnreadableError(
                f"The checkpoint's args describe the heads of its language model, not those of "
                f"{parameter.key!r}. Load it in a run (--load), which reads them from the model, "
                "and save it again."
            )
        return heads_of(args, role)

    # Checkpoints have the rows of gate above those of up, whatever the layout.
    gated = bool(getattr(args, "swiglu", False) or getattr(args, "quick_geglu", False))
    count = num_stacked(name, gated=gated) if stacked is None else stacked.get(parameter.key, 1)
    return ParameterInfo.of(name, parameter.shape, heads, key=parameter.key, num_stacked=count)


def blocks_of(
    parameters: list[StoredParameter], args: Any, config: AdamMiniConfig
) -> dict[str, ParameterBlocks]:
    """Partition parameters into blocks, by folded key.

    Raises:
        UnreadableError: a pattern of the config matches no parameter.
        ValueError: a rule does not apply; see ``partition.partition_parameter``.
    """
    found = {}
    for parameter in parameters:
        name = name_in_run(parameter.key, args)
        found[parameter.key] = partition_parameter(info_of(parameter, name, args), config)
    for blocks in found.values():
        if blocks.num_column_sets and not has_columns(blocks.info):
            raise UnreadableError(
                f"{blocks.info.name!r} cannot have one v per column: columns are those of one "
                "matrix of two dimensions. Give it the rule 'row'."
            )
    missing = unmatched_patterns([b.info.name for b in found.values()], config)
    if missing:
        raise UnreadableError(
            f"Adam-mini patterns {missing} match no parameter; names are like "
            f"{next(iter(found.values())).info.name!r}."
        )
    return found
