"""How Megatron's own Adam stores its state, and which conditions it must meet to be used.

Standard library only. Used by mcore/adam_import (when a run loads such a checkpoint) and by
convert (which reads and writes them without Megatron).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Prefix of the keys of state in the model's coordinates.
ADAM_PREFIX = "optimizer.state."

#: Kinds of main parameters: of the distributed optimizer, and of the plain one, which stores
#: none for float32 weights.
MAIN_PARAM, PLAIN_MAIN_PARAM = "param", "fp32_param"

#: Options of torch's and Transformer Engine's Adam that Adam-mini does not have.
ADAM_ONLY: dict[str, Any] = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
    "bias_correction": True,
}

#: Why main parameters, once rounded, can differ from the weights; and what to do.
UNSOUND_CAUSE = (
    "Megatron-Core 0.16.1 to 0.19.2 write such fully_reshardable checkpoints when a bucket other "
    "than the last is padded at its end (upstream #5077, fixed for 0.20). Save again from the "
    "original run as dp_reshardable (without --dist-ckpt-optim-fully-reshardable) and load that in "
    "an Adam-mini run, or start from the weights alone with --no-load-optim."
)


def adam_key(kind: str, model_key: str) -> str:
    """Return the key of one tensor of Adam's state, in the model's coordinates.

    Args:
        kind: ``exp_avg``, ``exp_avg_sq`` or one of the two above.
        model_key: Megatron's key of the parameter.
    """
    return f"{ADAM_PREFIX}{kind}.{model_key}"


#: Stands before the number of an optimizer in a chain.
MEMBER = "@"


def members_of(common: Mapping[Any, Any]) -> list[Mapping[Any, Any]]:
    """Return what a checkpoint holds of each optimizer in Megatron's chain: dense, experts.

    Args:
        common: common state of a checkpoint, where a chain is a dict by number; or objects, where
            the name of another than the first ends with ``MEMBER`` and its number.
    """
    numbered = sorted(key for key in common if isinstance(key, int))
    if numbered:
        return [common[number] for number in numbered]
    members: dict[str, dict[Any, Any]] = {"": {}}
    for key, value in common.items():
        name, _, number = key.partition(MEMBER) if isinstance(key, str) else (key, "", "")
        members.setdefault(number, {})[name] = value
    return list(members.values())


def steps_of(state: Mapping[str, Any]) -> list[int]:
    """Return the distinct step counts in Adam's state; sound state has one.

    Args:
        state: an optimizer's ``state_dict``. Transformer Engine's Adam and the distributed
            optimizer keep the count in the parameter groups, the plain one in the state.
    """
    found = [group.get("step") for group in state.get("param_groups", [])]
    found.append(state.get("state", {}).get("common_step"))
    return sorted({int(step) for step in found if step is not None})


def steps_problem(steps: list[int]) -> str | None:
    """Describe the problem if there is not exactly one step count; else return ``None``."""
    if len(steps) == 1:
        return None
    return (
        f"has Adam's state of the steps {steps}; Adam-mini needs exactly one, shared by all "
        "parameters. Start from the weights alone with --no-load-optim."
    )
