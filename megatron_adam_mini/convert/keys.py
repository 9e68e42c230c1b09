"""Keys of a checkpoint -> parameters: name, layer, role, heads, blocks.

Imports ``config``, ``partition`` and ``roles``. What Megatron knows from the running model is taken
from the ``args`` that its checkpoints carry.

A *model key* is Megatron's: equal layers are stacked under one key along a leading axis. A *folded
key* has the layer's number in it instead, as all of Adam-mini's keys do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_adam_mini.checkpoint.errors import CorruptError, UnreadableError
from megatron_adam_mini.checkpoint.reader import Checkpoint
from megatron_adam_mini.config import FORMAT_VERSION, STATE_PREFIX, AdamMiniConfig
from megatron_adam_mini.plan.partition import (
    HeadGeometry,
    ParameterBlocks,
    ParameterInfo,
    manifest_of,
    partition_by_rule,
    partition_parameter,
    unmatched_patterns,
)
from megatron_adam_mini.plan.roles import is_expert

PREFIX = STATE_PREFIX
#: Stock Adam: the distributed optimizer's fully_reshardable format, and the plain optimizer's.
ADAM_PREFIX = "optimizer.state."

_STACKED = re.compile(r"\.layers\.(?!\d)")
_NUMBERED = re.compile(r"^(.*?\.layers)\.(\d+)\.(.*)$")
#: Megatron's local layers store their norms under the names that Transformer Engine gives them.
_LOCAL_NAMES = (
    (".self_attention.linear_qkv.layer_norm_", ".input_layernorm."),
    (".mlp.linear_fc1.layer_norm_", ".pre_mlp_layernorm."),
)


@dataclass(frozen=True)
class Parameter:
    """One parameter of one layer, and where a checkpoint has it.

    Attributes:
        key: folded key.
        model_key: Megatron's key.
        layer: place along the leading axis of the model key; ``()`` if it has none.
        shape: shape of the whole parameter.
        model_shape: shape of the model key's tensor.
    """

    key: str
    model_key: str
    layer: tuple[int, ...]
    shape: tuple[int, ...]
    model_shape: tuple[int, ...]


def fold(model_key: str, shape: tuple[int, ...]) -> Iterator[Parameter]:
    """Yield the parameters that a model key holds, in the order of layers."""
    if not _STACKED.search(model_key):
        yield Parameter(model_key, model_key, (), shape, shape)
        return
    for layer in range(shape[0]):
        key = model_key.replace(".layers.", f".layers.{layer}.", 1)
        yield Parameter(key, model_key, (layer,), shape[1:], shape)


def parameter_of(checkpoint: Checkpoint, key: str) -> Parameter:
    """Return the parameter with a folded key.

    Raises:
        CorruptError: the model of the checkpoint has no such parameter.
    """
    match = _NUMBERED.match(key)
    candidates = [(key, ())] if match is None else [(key, ()), _stacked(match)]
    for model_key, layer in candidates:
        if model_key in checkpoint.tensors:
            shape = checkpoint.tensors[model_key].shape
            if not layer or layer[0] < shape[0]:
                return Parameter(key, model_key, layer, shape[len(layer) :], shape)
    raise CorruptError(
        f"{checkpoint.folder} has optimizer state of {key!r}, but no model weight of that name."
    )


def _stacked(match: re.Match[str]) -> tuple[str, tuple[int, ...]]:
    return f"{match[1]}.{match[3]}", (int(match[2]),)


def keys_by_kind(checkpoint: Checkpoint, prefix: str) -> dict[str, list[str]]:
    """Return the keys below ``prefix{kind}.``, by kind, without that prefix, in stored order."""
    found: dict[str, list[str]] = {}
    for key in checkpoint.tensors:
        if key.startswith(prefix):
            kind, _, rest = key.removeprefix(prefix).partition(".")
            found.setdefault(kind, []).append(rest)
    return found


def args_of(checkpoint: Checkpoint) -> Any:
    """Return the ``args`` of the run that saved.

    Raises:
        UnreadableError: the checkpoint has none.
    """
    args = checkpoint.common.get("args")
    if args is None:
        raise UnreadableError(
            f"{checkpoint.folder} holds no 'args', which say how its attention heads lie in "
            "memory; Megatron's training loop stores them. Load it in a run and save it again."
        )
    return args


def heads_of(args: Any) -> HeadGeometry:
    """Return the head geometry as Megatron's ``core_transformer_config_from_args`` takes it.

    Raises:
        UnreadableError: an argument is missing.
    """
    try:
        return HeadGeometry.of(args)
    except AttributeError as error:
        raise UnreadableError(
            f"The checkpoint's args lack {error.name!r}, which says how attention heads lie in "
            "memory. Load it in a run and save it again."
        ) from error


def name_of(key: str, *, local: bool) -> str:
    """Return the parameter's name in the running model, by which rules select it.

    Args:
        key: folded key.
        local: whether the model is made of Megatron's own layers (``--transformer-impl local``).
    """
    if local:
        for stored, name in _LOCAL_NAMES:
            key = key.replace(stored, name)
    return key


def info_of(parameter: Parameter, name: str, args: Any) -> ParameterInfo:
    """Return what the partition must know of a parameter; ``args`` say how heads lie in it."""
    return ParameterInfo.of(
        name,
        parameter.shape,
        lambda: None if args is None else heads_of(args),
        key=parameter.key,
    )


def blocks_of(
    parameters: list[Parameter], args: Any, config: AdamMiniConfig
) -> dict[str, ParameterBlocks]:
    """Cut parameters into blocks, by folded key.

    Raises:
        UnreadableError: experts, or a pattern of the config that matches no parameter.
        ValueError: a rule that does not apply; see ``partition.partition_parameter``.
    """
    local = getattr(args, "transformer_impl", None) == "local"
    found = {}
    for parameter in parameters:
        name = name_of(parameter.key, local=local)
        if is_expert(name):
            raise UnreadableError(
                f"{name!r} belongs to an expert; mixture-of-experts models are not supported yet."
            )
        found[parameter.key] = partition_parameter(info_of(parameter, name, args), config)
    missing = unmatched_patterns([b.info.name for b in found.values()], config)
    if missing:
        raise UnreadableError(
            f"Adam-mini patterns {missing} match no parameter; names are like "
            f"{next(iter(found.values())).info.name!r}."
        )
    return found


def identity_of(
    blocks: dict[str, ParameterBlocks], config: AdamMiniConfig, args: Any, origin: str
) -> dict[str, Any]:
    """Return what a checkpoint says of its Adam-mini state; see ``mcore/checkpoint_identity``."""
    manifest = manifest_of([b.manifest_entry() for b in blocks.values()], config)
    sizes = {
        "tensor": "tensor_model_parallel_size",
        "pipeline": "pipeline_model_parallel_size",
        "context": "context_parallel_size",
        "data": "data_parallel_size",
    }
    saved_from = {key: getattr(args, name, None) for key, name in sizes.items()}
    return {
        "format": FORMAT_VERSION,
        "layout": "model_space",
        "partition": config.partition_fields(),
        "manifest_hash": manifest["hash"],
        "rules": {e["key"]: [e["rule"], e["blocks"]] for e in manifest["parameters"]},
        "saved_from": {**{k: v for k, v in saved_from.items() if v}, "converted_from": origin},
    }


def stored_blocks(
    parameters: Iterable[Parameter], args: Any, identity: dict[str, Any]
) -> dict[str, ParameterBlocks]:
    """Cut parameters into the blocks that a checkpoint's identity names, by folded key.

    Raises:
        CorruptError: a parameter that it does not name.
        ValueError: a rule that does not apply.
    """
    config, found = config_of(identity), {}
    for parameter in parameters:
        key = stored_name(parameter, identity)
        if key is None:
            raise CorruptError(f"{parameter.key!r} has state, but is not in the manifest.")
        info = info_of(parameter, parameter.key, args)
        found[parameter.key] = partition_by_rule(info, identity["rules"][key][0], config)
    return found


def stored_name(parameter: Parameter, identity: dict[str, Any]) -> str | None:
    """Return what a checkpoint's manifest calls a parameter, ``None`` if it lacks it.

    That is its key; in the first checkpoints of this format, its name in the model.
    """
    names = (parameter.key, name_of(parameter.key, local=True))
    return next((name for name in names if name in identity["rules"]), None)


def config_of(identity: dict[str, Any]) -> AdamMiniConfig:
    """Return the config that a checkpoint's identity names."""
    partition = identity["partition"]
    return AdamMiniConfig(
        preset=partition["preset"],
        value_as_block=partition["value_as_block"],
        rules=tuple((pattern, rule) for pattern, rule in partition["overrides"]),
    )
