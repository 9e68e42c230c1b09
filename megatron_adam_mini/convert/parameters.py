"""Keys of a checkpoint -> parameters: which layer of which tensor, and its name in a model.

Imports the reader and ``plan``. A *model key* is Megatron's: equal layers are stacked under one key
along a leading axis, and so are the experts of a layer along the next. A *folded key* contains the
numbers of layer and expert instead, as all of Adam-mini's keys do. Data flow: reader ->
**parameters** -> ``blocks`` (blocks), ``adam_state``, ``mini_state``.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron_adam_mini.checkpoint.errors import CorruptError
from megatron_adam_mini.checkpoint.reader import Checkpoint
from megatron_adam_mini.plan.manifest import LEADING_AXES

#: Numbers of ``LEADING_AXES`` in a folded key.
_NUMBERS = (re.compile(r"(?<=\.layers)\.(\d+)(?=\.)"), re.compile(r"(?<=\.experts)\.(\d+)(?=\.)"))
#: Megatron's local layers store their norms under Transformer Engine's names.
_LOCAL_NAMES = (
    (".self_attention.linear_qkv.layer_norm_", ".input_layernorm."),
    (".mlp.linear_fc1.layer_norm_", ".pre_mlp_layernorm."),
)
#: And GPT stores the layer of multi-token prediction under the name of older releases.
_MTP = re.compile(r"^(mtp\.layers\.\d+)\.transformer_layer\.")
#: Mamba's mixer keeps its convolution as two parameters of its own.
_MAMBA = re.compile(r"\.mixer\.conv1d\.(weight|bias)$")
#: End of the key of a part: Megatron stores the projections of a fused weight apart.
_PART = re.compile(r"((?<=\.weight)|(?<=\.bias))\.\w+$")
_EXPERT = re.compile(r"\.experts\.experts\.(\d+)\.(.*)$")


@dataclass(frozen=True)
class StoredParameter:
    """One parameter of one layer, or of one expert in it, and its place in a checkpoint.

    Attributes:
        key: folded key.
        model_key: Megatron's key.
        layer: indices along the leading axes of the model key, layer and expert; ``()`` if it has
            none.
        shape: shape of the whole parameter.
        model_shape: shape of the model key's tensor.
    """

    key: str
    model_key: str
    layer: tuple[int, ...]
    shape: tuple[int, ...]
    model_shape: tuple[int, ...]


def fold(model_key: str, shape: tuple[int, ...]) -> Iterator[StoredParameter]:
    """Yield the parameters that a model key holds, in the order of layers, then experts."""
    axes = [axis for axis in LEADING_AXES if axis.search(model_key)]
    for at in itertools.product(*(range(size) for size in shape[: len(axes)])):
        key = model_key
        for axis, number in zip(axes, at, strict=True):
            key = axis.sub(rf"\g<0>{number}.", key, count=1)
        yield StoredParameter(key, model_key, at, shape[len(axes) :], shape)


def parameter_of(checkpoint: Checkpoint, key: str) -> StoredParameter:
    """Return the parameter with a folded key.

    Raises:
        CorruptError: the model of the checkpoint has no such parameter.
    """
    for model_key, at in _candidates(key):
        if model_key in checkpoint.tensors:
            shape = checkpoint.tensors[model_key].shape
            if all(number < size for number, size in zip(at, shape, strict=False)):
                return StoredParameter(key, model_key, at, shape[len(at) :], shape)
    raise CorruptError(
        f"{checkpoint.folder} has optimizer state of {key!r}, but no model weight of that name."
    )


def _candidates(key: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield model keys that may hold a folded key: each of its numbers in the key, or stacked."""
    for stacked in itertools.product((False, True), repeat=len(_NUMBERS)):
        model_key = key
        at: tuple[int, ...] = ()
        for pattern, is_stacked in zip(_NUMBERS, stacked, strict=True):
            found = pattern.search(model_key)
            if is_stacked and found is None:
                break
            if is_stacked and found is not None:
                model_key = model_key[: found.start()] + model_key[found.end() :]
                at = (*at, int(found[1]))
        else:
            yield model_key, at


def number_of(layer: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """Return the place of a parameter among those of its model key, as :func:`fold` yields them.

    Args:
        layer: its indices along the leading axes.
        shape: shape of the model key's tensor.
    """
    return sum(at * math.prod(shape[axis + 1 : len(layer)]) for axis, at in enumerate(layer))


def whole_of(key: str) -> str:
    """Return the key of the parameter that a stored part belongs to, ``in_proj.weight.z``."""
    return _PART.sub("", key)


def wholes_of(parameters: Iterable[StoredParameter]) -> dict[str, StoredParameter]:
    """Join parts that are stored apart; return parameters by their keys.

    Parts are joined along rows, in the order given, whatever the order of the model is.
    """
    found: dict[str, StoredParameter] = {}
    for part in parameters:
        key = whole_of(part.key)
        rows = found[key].shape[0] if key in found else 0
        shape = (rows + part.shape[0], *part.shape[1:]) if key != part.key else part.shape
        found[key] = replace(part, key=key, shape=shape)
    return found


def keys_by_kind(checkpoint: Checkpoint, prefix: str) -> dict[str, list[str]]:
    """Return the keys that start with ``prefix{kind}.``, by kind and without it, as ordered."""
    found: dict[str, list[str]] = {}
    for key in checkpoint.tensors:
        if key.startswith(prefix):
            kind, _, rest = key.removeprefix(prefix).partition(".")
            found.setdefault(kind, []).append(rest)
    return found


def name_of(key: str, *, local: bool, grouped: bool = False) -> str:
    """Return the parameter's name in the running model, which rules match.

    Args:
        key: folded key.
        local: whether the model consists of Megatron's own layers (``--transformer-impl local``).
        grouped: whether a grouped GEMM computes all experts of a rank.
    """
    if local:
        for stored, name in _LOCAL_NAMES:
            key = key.replace(stored, name)
    key = _MTP.sub(r"\1.mtp_model_layer.", key)
    key = _MAMBA.sub(r".mixer.conv1d_\1", key)
    if grouped:
        return _EXPERT.sub(r".experts.\2\1", key)
    return _EXPERT.sub(r".experts.local_experts.\1.\2", key)


def name_in_run(key: str, args: Any) -> str:
    """Return the parameter's name in the model of the run whose ``args`` are given."""
    local = getattr(args, "transformer_impl", None) == "local"
    grouped = bool(getattr(args, "moe_grouped_gemm", False)) and not local
    return name_of(key, local=local, grouped=grouped)
