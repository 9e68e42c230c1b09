"""Parameter groups of a checkpoint, and what the groups of this run take from them.

Imports megatron.core's list of what tells groups apart. A run's configuration is its own: bounds of
the learning rate, weight decay, betas, eps and overrides come from its flags. From a checkpoint, a
group that is configured as it was then takes ``lr`` and ``weight_decay``, which are in force until
a scheduler writes others; and any group the bounds of its schedule, if the scheduler is told to
take the checkpoint's.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from megatron.core.optimizer.optimizer import param_group_identifier_keys
from torch import distributed

logger = logging.getLogger(__name__)

Group = Mapping[str, Any]

#: What a scheduler reads in a group, and what it writes there.
BOUNDS = ("max_lr", "min_lr", "start_wd", "end_wd")
SCHEDULED = ("lr", "weight_decay")
#: What tells groups apart besides. Not the optimizer, which is another one in Adam's checkpoints,
#: nor whether they are of experts, which depends on the layout: without expert parallelism, experts
#: are in the groups of dense parameters.
EXPERT = "is_expert_parallel"
KIND = tuple(
    key for key in param_group_identifier_keys if key not in (*BOUNDS, "optimizer", EXPERT)
)
#: What is reported where it differs.
CONFIGURATION = (*BOUNDS, *KIND, "betas", "eps")


def load_groups(groups: Sequence[dict[str, Any]], saved: Sequence[Group]) -> list[Group | None]:
    """Take ``lr`` and ``weight_decay`` of groups that did not change (modified in place).

    All else stays as this run's flags have set it; the first rank logs what differs.

    Args:
        groups: of this run, the same on all ranks.
        saved: of the checkpoint.

    Returns:
        For each of ``groups`` the one in the checkpoint: of equal configuration, or else the only
        one of its kind that has other bounds; ``None`` if there is none, or several.
    """
    equal = [
        _only(_of_same_parameters(group, [other for other in saved if _is_equal(group, other)]))
        for group in groups
    ]
    taken = [other for other in equal if other is not None]
    left = [other for other in saved if not any(_is_equal(other, one) for one in taken)]
    changed = [group for group, match in zip(groups, equal, strict=True) if match is None]
    found = []
    for group, match in zip(groups, equal, strict=True):
        if match is not None:
            group.update({key: match[key] for key in SCHEDULED if key in match})
        elif _only([other for other in changed if _is_of_kind(group, other)]) is not None:
            match = _only([other for other in left if _is_of_kind(group, other)])
        found.append(match)
    _report(groups, found)
    return found


def take_bounds(groups: Sequence[dict[str, Any]], saved: Sequence[Group | None]) -> None:
    """Take the bounds of the checkpoint's schedule (modified in place).

    Args:
        groups: of this run.
        saved: what :func:`load_groups` returned for them.
    """
    for number, (group, other) in enumerate(zip(groups, saved, strict=True)):
        if other is not None:
            group.update({key: other[key] for key in BOUNDS if key in other})
        elif _is_first_rank():
            logger.warning(
                "The scheduler uses the checkpoint's values, but parameter group %d has none "
                "there, and keeps this run's: %s",
                number,
                _described(group),
            )


def _of_same_parameters(group: Group, found: Sequence[Group]) -> Sequence[Group]:
    """Return those of dense parameters, or of experts, as the group is; all if there are none."""
    return [other for other in found if other.get(EXPERT) == group.get(EXPERT)] or found


def _only(found: Sequence[Group]) -> Group | None:
    """Return the only group, also if it stands there several times; else ``None``."""
    if not found or not all(_is_equal(found[0], other) for other in found):
        return None
    return found[0]


def _is_equal(group: Group, other: Group) -> bool:
    return _is_of_kind(group, other) and all(group.get(key) == other.get(key) for key in BOUNDS)


def _is_of_kind(group: Group, other: Group) -> bool:
    # Whether a group has a rate of its own, where Megatron notes it.
    default = {one["default_config"] for one in (group, other) if "default_config" in one}
    return (
        len(default) < 2
        and all(_value(group, key) == _value(other, key) for key in KIND)
        and all((key in group) == (key in other) for key in BOUNDS)
    )


def _value(group: Group, key: str) -> Any:
    value = group.get(key, group.get(f"pre_{key}"))  # pre_lr_mult, pre_wd_mult: NeMo's names
    return tuple(value) if isinstance(value, list) else value


def _report(groups: Sequence[Group], found: Sequence[Group | None]) -> None:
    lines = []
    for number, (group, other) in enumerate(zip(groups, found, strict=True)):
        if other is None:
            lines.append(f"group {number} has no match in the checkpoint: {_described(group)}")
            continue
        changes = [
            f"{key} {_value(group, key)} (checkpoint: {_value(other, key)})"
            for key in CONFIGURATION
            if _value(group, key) != _value(other, key)
        ]
        if changes:
            lines.append(f"group {number}: {', '.join(changes)}")
    if lines and _is_first_rank():
        logger.warning(
            "Parameter groups differ from the checkpoint's. This run's values are used, unless its "
            "scheduler is told to use the checkpoint's:\n%s",
            "\n".join(lines),
        )


def _described(group: Group) -> str:
    return ", ".join(f"{key} {_value(group, key)}" for key in CONFIGURATION if key in group)


def _is_first_rank() -> bool:
    return not distributed.is_initialized() or distributed.get_rank() == 0
