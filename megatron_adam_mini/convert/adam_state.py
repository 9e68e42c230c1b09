"""State of Megatron's own Adam in a checkpoint: where it is, and whether it is sound.

Imports torch. Two formats hold it in the model's coordinates: the distributed optimizer's
``fully_reshardable`` (``optimizer.state.{param,exp_avg,exp_avg_sq}.{model key}``) and the plain
optimizer's (``fp32_param`` instead of ``param``, none for float32 weights).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_adam_mini.adam_rules import (
    ADAM_PREFIX,
    MAIN_PARAM,
    PLAIN_MAIN_PARAM,
    UNSOUND_CAUSE,
    adam_key,
    members_of,
    steps_of,
    steps_problem,
)
from megatron_adam_mini.checkpoint.errors import CorruptError, UnreadableError
from megatron_adam_mini.checkpoint.reader import Checkpoint, tiling_problem
from megatron_adam_mini.convert.parameters import keys_by_kind
from megatron_adam_mini.plan.manifest import STATE_PREFIX
from megatron_adam_mini.rounding import is_rounded

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class AdamState:
    """Where a checkpoint has the state of Adam.

    Attributes:
        model_keys: parameters, by Megatron's keys.
        main_keys: model key -> key of its main parameters.
        step: steps taken.
        param_groups: options of the parameter groups, without parameters.
        grad_scaler: state of the loss scaler, ``None`` if there is none.
    """

    model_keys: tuple[str, ...]
    main_keys: dict[str, str]
    step: int
    param_groups: list[dict[str, Any]]
    grad_scaler: dict[str, Any] | None

    def keys(self, model_key: str) -> tuple[str, str, str]:
        """Return the keys of main parameter, m and v."""
        return (
            self.main_keys[model_key],
            adam_key("exp_avg", model_key),
            adam_key("exp_avg_sq", model_key),
        )


def find_adam_state(checkpoint: Checkpoint) -> AdamState:
    """Return the state of Adam in a checkpoint.

    Raises:
        UnreadableError: there is none, or its format cannot be converted; names the remedy.
        CorruptError: parts of it are missing.
    """
    _refuse_other_formats(checkpoint)
    kinds = keys_by_kind(checkpoint, ADAM_PREFIX)
    model_keys = kinds.get("exp_avg", [])
    if not model_keys:
        raise UnreadableError(
            f"{checkpoint.folder} holds no state of Adam that can be converted; its optimizer "
            f"state is {sorted(kinds) or 'missing'}. Save it without --no-save-optim, with "
            "--optimizer adam."
        )
    main = {
        key: adam_key(kind, key)
        for kind in (MAIN_PARAM, PLAIN_MAIN_PARAM)
        for key in kinds.get(kind, [])
    }
    unknown = set(kinds) - {MAIN_PARAM, PLAIN_MAIN_PARAM, "exp_avg", "exp_avg_sq"}
    if unknown:
        raise UnreadableError(
            f"{checkpoint.folder} holds optimizer state {sorted(unknown)}, which Adam does not "
            "have."
        )
    for key in model_keys:
        weight = checkpoint.tensors.get(key)
        if key not in main and weight is not None and weight.dtype == torch.float32:
            main[key] = key  # a float32 weight is its own main parameter
    found = {"exp_avg_sq": set(kinds.get("exp_avg_sq", [])), "param": set(main)}
    for kind, keys in found.items():
        if keys != set(model_keys):
            odd = sorted(keys ^ set(model_keys))[0]
            raise CorruptError(
                f"{checkpoint.folder}: {kind} and exp_avg do not agree about {odd!r}."
            )
    members = members_of(checkpoint.optimizer)
    inners = [member.get("optimizer", {}) for member in members]
    steps = sorted({step for inner in inners for step in steps_of(inner)})
    problem = steps_problem(steps)
    if problem:
        raise CorruptError(f"{checkpoint.folder} {problem}")
    groups = [group for inner in inners for group in inner.get("param_groups", [])]
    scaler = members[0].get("grad_scaler")
    state = AdamState(tuple(model_keys), main, steps[0], groups, scaler)
    for key in model_keys:
        for stored in state.keys(key):
            _check_entry(checkpoint, key, stored)
    return state


def count_unsound(
    checkpoint: Checkpoint, model_key: str, offset: tuple[int, ...], main: Tensor
) -> int:
    """Return the number of elements whose rounded main parameters differ from the stored weights.

    Args:
        checkpoint: checkpoint with the weights.
        model_key: key of the weight.
        offset: position of the box.
        main: float32 box of main parameters.
    """
    weight = checkpoint.box(model_key, offset, tuple(main.shape))
    return int((~is_rounded(weight, main)).sum())


def refuse_unsound(checkpoint: Checkpoint, key: str, count: int, numel: int) -> None:
    """Refuse state that does not belong to the model it was saved with.

    Raises:
        CorruptError: always, if ``count`` is not zero.
    """
    if count:
        raise CorruptError(
            f"{checkpoint.folder}: {key} is not the state of the stored model: rounded to the "
            f"weight's type, {count} of {numel} main parameters in one box differ from the weights."
            f" {UNSOUND_CAUSE}"
        )


def _refuse_other_formats(checkpoint: Checkpoint) -> None:
    optimizer = members_of(checkpoint.optimizer)[0]
    if "adam_mini" in optimizer or any(key.startswith(STATE_PREFIX) for key in checkpoint.tensors):
        raise UnreadableError(f"{checkpoint.folder} holds the state of Adam-mini already.")
    # Not what the content metadata say: callers of Megatron make them from constants.
    sharding = optimizer.get("param_state_sharding_type")
    flat = any(
        ".dp_group_idx_" in k or k.startswith("optimizer.distributed.") for k in checkpoint.tensors
    )
    if flat or sharding not in (None, "fully_reshardable"):
        raise UnreadableError(
            f"{checkpoint.folder} holds Adam's state as {sharding or 'flat buckets'!r}, buckets "
            "whose contents depend on the layout. Load it in its own run and save it again with "
            "--dist-ckpt-optim-fully-reshardable, or load it in an Adam-mini run directly."
        )
    if any(key.startswith(("optimizer.chained_", "chained_")) for key in checkpoint.tensors):
        raise UnreadableError(
            f"{checkpoint.folder} holds the state of a chain of optimizers under keys with their "
            "numbers, as releases before 0.14 wrote it. Load it with --optimizer adam and save it "
            "again."
        )


def _check_entry(checkpoint: Checkpoint, model_key: str, key: str) -> None:
    weight, tensor = checkpoint.tensors.get(model_key), checkpoint.tensors[key]
    if weight is None or weight.shape != tensor.shape:
        shape = None if weight is None else list(weight.shape)
        raise CorruptError(
            f"{checkpoint.folder}: {key} has shape {list(tensor.shape)}, its weight {shape}."
        )
    if tensor.dtype not in _FLOATS or (".exp_avg" not in key and tensor.dtype != torch.float32):
        raise UnreadableError(
            f"{checkpoint.folder}: {key} is {tensor.dtype}; main parameters must be float32 and "
            "moments float32, bfloat16 or float16. Save without --use-precision-aware-optimizer."
        )
    problem = tiling_problem(tensor)
    if problem:
        raise CorruptError(f"{checkpoint.folder}: {problem}")
