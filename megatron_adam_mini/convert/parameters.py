"""Keys of a checkpoint -> parameters: which layer of which tensor, and its name in a model.

Imports the reader. A *model key* is Megatron's: equal layers are stacked under one key along a
leading axis. A *folded key* contains the layer's number instead, as all of Adam-mini's keys do.
Data flow: reader -> **parameters** -> ``blocks`` (blocks), ``adam_state``, ``mini_state``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_adam_mini.checkpoint.errors import CorruptError
from megatron_adam_mini.checkpoint.reader import Checkpoint

_STACKED = re.compile(r"\.layers\.(?!\d)")
_NUMBERED = re.compile(r"^(.*?\.layers)\.(\d+)\.(.*)$")
#: Megatron's local layers store their norms under Transformer Engine's names.
_LOCAL_NAMES = (
    (".self_attention.linear_qkv.layer_norm_", ".input_layernorm."),
    (".mlp.linear_fc1.layer_norm_", ".pre_mlp_layernorm."),
)


@dataclass(frozen=True)
class StoredParameter:
    """One parameter of one layer, and its place in a checkpoint.

    Attributes:
        key: folded key.
        model_key: Megatron's key.
        layer: index along the leading axis of the model key; ``()`` if it has none.
        shape: shape of the whole parameter.
        model_shape: shape of the model key's tensor.
    """

    key: str
    model_key: str
    layer: tuple[int, ...]
    shape: tuple[int, ...]
    model_shape: tuple[int, ...]


def fold(model_key: str, shape: tuple[int, ...]) -> Iterator[StoredParameter]:
    """Yield the parameters that a model key holds, in the order of layers."""
    if not _STACKED.search(model_key):
        yield StoredParameter(model_key, model_key, (), shape, shape)
        return
    for layer in range(shape[0]):
        key = model_key.replace(".layers.", f".layers.{layer}.", 1)
        yield StoredParameter(key, model_key, (layer,), shape[1:], shape)


def parameter_of(checkpoint: Checkpoint, key: str) -> StoredParameter:
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
                return StoredParameter(key, model_key, layer, shape[len(layer) :], shape)
    raise CorruptError(
        f"{checkpoint.folder} has optimizer state of {key!r}, but no model weight of that name."
    )


def _stacked(match: re.Match[str]) -> tuple[str, tuple[int, ...]]:
    return f"{match[1]}.{match[3]}", (int(match[2]),)


def keys_by_kind(checkpoint: Checkpoint, prefix: str) -> dict[str, list[str]]:
    """Return the keys that start with ``prefix{kind}.``, by kind and without it, as ordered."""
    found: dict[str, list[str]] = {}
    for key in checkpoint.tensors:
        if key.startswith(prefix):
            kind, _, rest = key.removeprefix(prefix).partition(".")
            found.setdefault(kind, []).append(rest)
    return found


def name_of(key: str, *, local: bool) -> str:
    """Return the parameter's name in the running model, which rules match.

    Args:
        key: folded key.
        local: whether the model consists of Megatron's own layers (``--transformer-impl local``).
    """
    if local:
        for stored, name in _LOCAL_NAMES:
            key = key.replace(stored, name)
    return key
