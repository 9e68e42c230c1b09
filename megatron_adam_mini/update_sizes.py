"""How large the last update was beside the weights, and the range of v, by kind of parameter.

Imports torch, ``plan``, ``state`` and ``optimizer``. Data flow: state that a step has left, step
sizes -> sums and extremes of this rank -> those of the whole model -> ``mcore/metrics``. Plain
torch in bounded memory: it runs between steps, if at all, and a step knows nothing of it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_adam_mini.optimizer import AdamMini
from megatron_adam_mini.piece_values import per_element
from megatron_adam_mini.plan.partition import ROLES
from megatron_adam_mini.plan.step_plan import EXPERT, Piece
from megatron_adam_mini.state import RankState

#: Elements that are squared at once; float64 takes 8 bytes of each.
_CHUNK = 2**20


class UpdateSize(NamedTuple):
    """What was measured of all parameters of one kind, each element counted once.

    Attributes:
        ratio: norm of the last update, without decoupled weight decay, by that of the main
            parameters after it; ``None``: these are all zero.
        v_min, v_max: smallest and largest v, as checkpoints have it (no bias correction).
    """

    ratio: float | None
    v_min: float
    v_max: float


@torch.no_grad()
def measure_updates(inner: AdamMini, state: RankState) -> dict[str, UpdateSize]:
    """Measure the last step; all ranks must call it, and all get the same.

    The update is computed again from m and the sizes of the step, so it must be the last thing
    that changed the state. An m in fewer bits was rounded since.

    Collectives: two all-reduces, of 32 bytes per role and domain.

    Returns:
        By role, ``expert_...`` for those of routed experts; empty if there was no step, or the last
        one was skipped.
    """
    if not inner.updated:
        return {}
    shape = len(inner.plan.domains), len(ROLES), 2
    sums = torch.zeros(shape, dtype=torch.float64, device=inner.device)
    extremes = torch.full(shape, -math.inf, dtype=torch.float64, device=inner.device)
    for piece in inner.plan.pieces:
        info = inner.plan.parameters[piece.parameter].info
        at = inner.plan.buffers[piece.buffer].domain, ROLES.index(info.role)
        v = state.v_of_elements(piece) if piece.is_elementwise else state.v_of_segments(piece)
        largest = torch.stack([v.max(), -v.min()]).to(extremes)
        extremes[at] = torch.maximum(extremes[at], largest)
        if info.in_norm:  # others have it, too
            sums[at] += _squares(inner, state, piece)
    inner.collectives.add_over_model_(sums)
    inner.collectives.max_over_model_(extremes)
    return _by_kind(inner, sums.tolist(), extremes.tolist())


def _squares(inner: AdamMini, state: RankState, piece: Piece) -> Tensor:
    """Return the sums of squares of a piece's update and main parameters, float64, ``(2,)``."""
    held = state.of(piece)
    found = torch.zeros(2, dtype=torch.float64, device=inner.device)
    for begin in range(0, piece.window.numel, _CHUNK):
        end = min(begin + _CHUNK, piece.window.numel)
        window = piece.window.part(begin, end)
        sizes = _last_step_sizes(inner, state, piece, slice(begin, end))
        update = held.as_float32(window, "exp_avg").double() * sizes
        param = held.main_param(window).double()
        found += torch.stack([update.square().sum(), param.square().sum()]).to(found)
    return found


def _last_step_sizes(inner: AdamMini, state: RankState, piece: Piece, part: slice) -> Tensor:
    """Return what the last step multiplied m by to get the update.

    Args:
        inner: whose step was taken.
        state: as the step left it.
        piece: the piece.
        part: elements of its window.

    Returns:
        float32, one number per element, where the piece's state lies.
    """
    sizes: Tensor
    if not piece.is_elementwise:
        step_size = inner.vectors.step_size_S[piece.segments]
        sizes = per_element(inner.plan, piece, step_size, part)
        return sizes.to(state.of(piece).exp_avg.device)
    v = state.v_of_elements(piece)[part]
    group = inner.main_params.group_of_parameter[piece.parameter]
    lr, eps, _ = inner.scalars.hyper_G3[group].to(v.device)
    correction1, correction2 = inner.scalars.bias_corrections.to(v.device)
    sizes = lr / correction1 / ((v / correction2).sqrt() + eps)
    return sizes


def _by_kind(
    inner: AdamMini, sums: list[list[list[float]]], extremes: list[list[list[float]]]
) -> dict[str, UpdateSize]:
    found = {}
    for domain, of_roles, of_v in zip(inner.plan.domains, sums, extremes, strict=True):
        for role, (update, param), (v_max, minus_min) in zip(ROLES, of_roles, of_v, strict=True):
            if v_max >= 0.0:
                kind = f"expert_{role}" if domain.name == EXPERT else role
                ratio = math.sqrt(update / param) if param else None
                found[kind] = UpdateSize(ratio, -minus_min, v_max)
    return found
