"""The scales of an m of 8 bits, which follow from v; see ``rounding``.

Imports torch, ``plan``, ``piece_values`` and ``rounding``. Used between steps: saves, loads,
reports. Kernels know the scales by themselves.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megatron_adam_mini.piece_values import per_element
from megatron_adam_mini.plan.buffer_plan import Window
from megatron_adam_mini.plan.shares import Share
from megatron_adam_mini.plan.step_plan import Piece, StepPlan
from megatron_adam_mini.rounding import fp8_scale


@dataclass(frozen=True, eq=False)
class CodeScales:
    """Scales of the codes of one share.

    Codes mean something else once v has changed: who writes v and m writes v first.

    Attributes:
        plan: all integers.
        share: whose codes.
        exp_avg_sq_S: v of each segment's block.
        exp_avg_sq_E: v of the share's elements that have one each.
    """

    plan: StepPlan
    share: Share
    exp_avg_sq_S: Tensor
    exp_avg_sq_E: Tensor

    @cached_property
    def _pieces(self) -> tuple[list[int], list[Piece]]:
        """Return where the share's pieces begin in the state, and these, in ascending order."""
        held = [piece for piece in self.plan.pieces if self.share.holds(piece)]
        held.sort(key=lambda piece: piece.window.in_state.start)
        return [piece.window.in_state.start for piece in held], held

    def of(self, window: Window) -> Tensor:
        """Return the scale of each element of a window, float32, 1 in gaps between parameters."""
        found = torch.ones(window.numel, dtype=torch.float32, device=self.exp_avg_sq_E.device)
        starts, pieces = self._pieces
        begin, end = window.in_state.start, window.in_state.stop
        for piece in pieces[max(bisect_right(starts, begin) - 1, 0) :]:
            here = piece.window.in_state
            if here.start >= end:
                break
            first, last = max(here.start, begin), min(here.stop, end)
            if first < last:
                part = slice(first - here.start, last - here.start)
                found[first - begin : last - begin] = fp8_scale(self._v(piece, part))
        return found

    def _v(self, piece: Piece, part: slice) -> Tensor:
        if piece.is_elementwise:
            return self.exp_avg_sq_E[self.share.own_elements(piece.elements)][part]
        return per_element(self.plan, piece, self.exp_avg_sq_S[piece.segments], part)
