"""How the gradients of a step are used: factor, clipping, skip; computed on the device.

Imports torch and ``wide_sums``. Data flow: sums of squares -> **Decisions** -> update, and
:class:`Outcome` for the caller.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_adam_mini.wide_sums import WideSums

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
        made_by: what computed it, as the last of its decisions; ``None``: the step is taken
            unscaled, and its norm is unknown.
        wide: float64 sums, if they were taken.

    Attributes:
        wide: as above.
        problem: why the step is skipped though all gradients are finite; ``None``: it is not.
        names: this rank's parameters that are the reason.
    """

    def __init__(self, made_by: Decisions | None = None, wide: WideSums | None = None) -> None:
        self._made_by = made_by
        self._outcome: Outcome | None = Outcome(True, None, False) if made_by is None else None
        self.wide = wide
        self.problem: str | None = None
        self.names: list[str] = []

    @property
    def grad_scale(self) -> float | Tensor:
        """Factor of the gradients, a float32 scalar on the device; NaN: nothing is updated."""
        return 1.0 if self._made_by is None else self._made_by.grad_scale

    @property
    def grad_scale_in_float64(self) -> Tensor:
        """The same, not rounded, of a decision that was made from sums."""
        assert self._made_by is not None
        return self._made_by.values_3[0]

    def read(self) -> Outcome:
        """Wait until the device has decided, and return what; later work may still be under way.

        Raises:
            RuntimeError: another decision was made before this one was read.
        """
        if self._outcome is None:
            assert self._made_by is not None
            grad_scale, norm_sq, found_inf = self._made_by.read(self)
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


class Decisions:
    """Makes the decisions of one optimizer, one after the other in the same memory.

    A GPU copies each one to pinned memory as soon as it is made, so whoever reads it waits for this
    copy, not for the updates that were started since.

    Args:
        kernels: the backend.
        device: where sums of squares are.

    Attributes:
        values_3: of the last decision, see ``reference.decide_``.
        grad_scale: likewise.
    """

    def __init__(self, kernels: ModuleType, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._kernels = kernels
        self.values_3 = torch.zeros(3, dtype=torch.float64, device=device)
        self.grad_scale = torch.zeros((), dtype=torch.float32, device=device)
        self._on_host: Tensor | None = None
        if on_gpu:
            self._on_host = torch.zeros(3, dtype=torch.float64, device="cpu", pin_memory=True)
        # External: in a CUDA graph, too, it comes before the updates.
        self._copied: Any = torch.cuda.Event(external=True) if on_gpu else None  # type: ignore[no-untyped-call]
        self._last: Decision | None = None

    def decide(
        self,
        stats_D2: Tensor,
        wide: WideSums | None = None,
        *,
        clip_grad: float = 0.0,
        inv_scale: Tensor | None = None,
        skip_threshold: float = math.inf,
    ) -> Decision:
        """Compute on the device the factor of the gradients, and whether to take the step.

        The decision before it can no longer be read, unless it was.

        Args:
            stats_D2: what :meth:`AdamMini.sum_squares` returned.
            wide: what :meth:`AdamMini.sum_squares_in_float64` returned, too.
            clip_grad: largest norm; 0: no clipping.
            inv_scale: inverse of the loss scale, one float32 number.
            skip_threshold: steps with a larger norm are skipped.
        """
        largest_sq = math.inf
        if wide is None:
            # Or sums may overflow once they are complete; or grad_scale may be below 2^-63, whose
            # square (for v) has few bits in float32.
            smallest = min(1.0, clip_grad) if clip_grad > 0.0 else 1.0
            largest_sq = _MAX_NORM_SQ * smallest**2
        self._kernels.decide_(
            self.values_3,
            self.grad_scale,
            stats_D2,
            inv_scale,
            clip_grad=clip_grad if clip_grad > 0.0 else math.inf,
            skip_threshold=skip_threshold,
            largest_sq=largest_sq,
        )
        if self._on_host is not None:
            self._on_host.copy_(self.values_3, non_blocking=True)
            self._copied.record(torch.cuda.current_stream(self.values_3.device))
        self._last = Decision(self, wide)
        return self._last

    def read(self, decision: Decision) -> list[float]:
        """Return the values of the last decision, once the device has them."""
        if decision is not self._last:
            raise RuntimeError(
                "Adam-mini made another decision before this one was read, in the same memory. "
                "Remedy: call read() or finish() of a step before the next step decides."
            )
        if self._on_host is None:
            return self.values_3.tolist()
        self._copied.synchronize()
        return self._on_host.tolist()
