"""Keys of a checkpoint -> parameters: name, layer, role, heads, blocks.

Imports ``config``, ``partition`` and ``roles``. What Megatron knows from the running model is taken
from the ``args`` that its checkpoints carry.

A *model key* is Megatron's: equal layers are stacked under one key along a leading axis. A *folded
key* has the layer's number in it instead, as all of Adam-mini's keys do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_adam_mini.checkpoint.errors import CorruptError, UnreadableError
from megatron_adam_mini.checkpoint.reader import Checkpoint
from megatron_adam_mini.config import AdamMiniConfig
from megatron_adam_mini.plan.manifest import MODEL_SPACE, STATE_PREFIX, identity_of, manifest_of
from megatron_adam_mini.plan.partition import (
    HeadGeometry,
    ParameterBlocks,
    ParameterInfo,
    partition_parameter,
    unmatched_patterns,
)
from megatron_adam_mini.plan.roles import role_of

PREFIX = STATE_PREFIX

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
        heads = args.num_attention_heads
        groups = args.num_query_groups if getattr(args, "group_query_attention", True) else heads
        dim = getattr(args, "kv_channels", None) or args.hidden_size // heads
    except AttributeError as error:
        raise UnreadableError(
            f"The checkpoint's args lack {error.name!r}, which says how attention heads lie in "
            "memory. Load it in a run and save it again."
        ) from error
    return HeadGeometry(
        num_heads=heads,
        num_query_groups=groups or heads,
        head_dim=dim,
        gated=bool(getattr(args, "attention_output_gate", False)),
    )


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
    role = role_of(name, len(parameter.shape))
    return ParameterInfo(
        name=name,
        key=parameter.key,
        shape=parameter.shape,
        role=role,
        heads=heads_of(args) if role == "qkv" and args is not None else None,
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
        if ".experts." in name:
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


def new_identity(
    blocks: dict[str, ParameterBlocks], config: AdamMiniConfig, args: Any, origin: str
) -> dict[str, Any]:
    """Return what a converted checkpoint says of its Adam-mini state.

    Args:
        blocks: of all parameters.
        config: the options that produced them.
        args: of the run that saved the checkpoint that was converted.
        origin: optimizer of that run.
    """
    sizes = {
        "tensor": "tensor_model_parallel_size",
        "pipeline": "pipeline_model_parallel_size",
        "context": "context_parallel_size",
        "data": "data_parallel_size",
    }
    known = {key: getattr(args, name, None) for key, name in sizes.items()}
    return identity_of(
        manifest_of([b.manifest_entry() for b in blocks.values()], config),
        config,
        checkpoint_format=MODEL_SPACE,
        saved_from={**{key: size for key, size in known.items() if size}, "converted_from": origin},
    )
