"""Weights of a model in a state dict that a checkpoint load returned, by parameter.

Imports torch only. With ``--load-main-params-from-ckpt``, main parameters start from these, which
may have more bits than the model's weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import Module, Parameter


def weights_by_parameter(
    model_chunks: Sequence[Module], state_dict: Mapping[str, Any]
) -> dict[Parameter, Tensor]:
    """Return the tensor in a state dict for every trainable parameter of the chunks.

    Args:
        model_chunks: chunks of this rank.
        state_dict: the model's state dict, or one that has it as ``model``; with several chunks,
            one as ``model0`` (Megatron) or ``model_0`` (NeMo) and so on.

    Raises:
        ValueError: a parameter is not there, or has another shape.
    """
    found: dict[Parameter, Tensor] = {}
    for number, chunk in enumerate(model_chunks):
        keys = [f"model{number}", f"model_{number}"] + ["model"] * (len(model_chunks) == 1)
        part = next((state_dict[key] for key in keys if key in state_dict), None)
        if part is None and len(model_chunks) > 1:
            raise ValueError(
                f"The state dict has no {keys[0]!r} or {keys[1]!r}, the weights of model chunk "
                f"{number}; it has {sorted(map(str, state_dict))[:8]}."
            )
        weights = {_bare(name): value for name, value in (part or state_dict).items()}
        for name, param in chunk.named_parameters():
            if param.requires_grad:
                found[param] = _weight_of(_bare(name), param, weights)
    return found


def _weight_of(name: str, param: Parameter, weights: Mapping[str, Any]) -> Tensor:
    value = weights.get(name)
    if not isinstance(value, Tensor):
        raise ValueError(
            f"The state dict has no tensor for parameter {name!r}, from which its main parameter "
            "was to start. Drop --load-main-params-from-ckpt to start from the model's weights."
        )
    if value.shape != param.shape:
        raise ValueError(
            f"Parameter {name!r} has shape {tuple(param.shape)} in the model, "
            f"{tuple(value.shape)} in the state dict. Load the model under the same tensor "
            "parallel size, or drop --load-main-params-from-ckpt."
        )
    return value


def _bare(name: str) -> str:
    while name.startswith("module."):  # DDP, Float16Module and the like
        name = name.removeprefix("module.")
    return name
