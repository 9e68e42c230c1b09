"""How the gradients of a step are used: factor, clipping, skip; computed on the device.

Imports torch and ``wide_sums``. Data flow: sums of squares -> **Decision** -> update, and
:class:`Outcome` for the caller.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_adam_mini.wide_sums import WideSums

#: As in megatron.core.optimizer.clip_grads.clip_grad_by_total_norm_fp32.
_CLIP_EPS = 1.0e-6

#: Up to this squared norm, no block's sum of squares overflows float32: it is a part of the norm.
_MAX_NORM_SQ = 2.0**126


class Outcome(NamedTuple):
    """Result of a step, on the host.

    Attributes:
        updated: whether the step was taken.
        grad_norm: norm of the model's gradient without the loss scale, before clipping; ``None``
            if it was not computed.
        found_inf: whether a gradient of any rank is not finite; if decided by float32 sums, these
            may also just be too large, see :attr:`Decision.in_doubt`.
    """

    updated: bool
    grad_norm: float | None
    found_inf: bool


class Decision:
    """How the gradients of one step are used: decided on the device, read back at most once.

    Args:
        values: float64, ``[grad_scale, squared grad_norm, found_inf]``; ``None``: the step is taken
            unscaled, and its norm is unknown.
        wide: float64 sums, if they were taken.

    Attributes:
        wide: as above.
        problem: why the step is skipped though all gradients are finite; ``None``: it is not.
        names: this rank's parameters that are the reason.
    """

    def __init__(self, values: Tensor | None = None, wide: WideSums | None = None) -> None:
        self._values = values
        self._outcome: Outcome | None = Outcome(True, None, False) if values is None else None
        self.wide = wide
        self.problem: str | None = None
        self.names: list[str] = []

    @property
    def grad_scale(self) -> float | Tensor:
        """Factor of the gradients; NaN: nothing is updated."""
        return 1.0 if self._values is None else self._values[0]

    def read(self) -> Outcome:
        """Wait for the device, and return what was decided."""
        if self._outcome is None:
            assert self._values is not None
            grad_scale, norm_sq, found_inf = self._values.tolist()
            # torch's square root on a CPU is not always correctly rounded; this one is.
            grad_norm = math.sqrt(norm_sq) if norm_sq >= 0.0 else math.nan
            self._outcome = Outcome(math.isfinite(grad_scale), grad_norm, found_inf > 0)
        return self._outcome

    @property
    def in_doubt(self) -> bool:
        """Whether float32 sums are too large to decide; waits for the device.

        The step is not taken then: :meth:`AdamMini.sum_squares_in_float64`, and decide again.
        """
        return self.read().found_inf and self.wide is None

    def skip(self, problem: str, names: list[str]) -> None:
        """Skip the step because something finite does not fit into float32."""
        self._outcome = self.read()._replace(updated=False)
        self.problem, self.names = problem, names


def decide(
    stats: Tensor,
    wide: WideSums | None = None,
    *,
    clip_grad: float = 0.0,
    inv_scale: Tensor | None = None,
    skip_threshold: float = math.inf,
) -> Decision:
    """Compute on the device the factor of the gradients, and whether to take the step.

    Args:
        stats: what :meth:`sum_squares` returned.
        wide: what :meth:`sum_squares_in_float64` returned, too.
        clip_grad: largest norm; 0: no clipping.
        inv_scale: inverse of the loss scale, one float32 number.
        skip_threshold: steps with a larger norm are skipped.
    """
    scaled_sq, num_non_finite = stats
    # grad_scale <- 1 / loss_scale
    grad_scale = torch.ones_like(scaled_sq)
    if inv_scale is not None:
        grad_scale *= inv_scale.squeeze()
    # |g| <- sqrt(norm^2 / loss_scale^2)
    norm_sq = scaled_sq * grad_scale**2
    grad_norm = norm_sq.sqrt()
    # grad_scale <- grad_scale * min(1, clip_grad / |g|)
    if clip_grad > 0.0:
        grad_scale = grad_scale * (clip_grad / (grad_norm + _CLIP_EPS)).clamp(max=1.0)
    found_inf = num_non_finite > 0
    if wide is None:
        # Or sums may overflow once they are complete; or grad_scale may be below 2^-63, whose
        # square (for v) has few bits in float32.
        smallest = min(1.0, clip_grad) if clip_grad > 0.0 else 1.0
        found_inf |= ~(scaled_sq <= _MAX_NORM_SQ * smallest**2)
    skip = found_inf | (grad_norm > skip_threshold)
    # Kernels read it as float32. It does not exceed the float32 number 1 / loss_scale, so it
    # is finite there if it is finite here: steps that kernels skip are not counted.
    grad_scale = grad_scale.masked_fill(skip, math.nan)
    return Decision(torch.stack([grad_scale, norm_sq, found_inf.double()]), wide)
