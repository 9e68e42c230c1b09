"""From float64 sums of squares to mean squares that float32 holds, or to no step.

Imports torch, ``collectives``, ``decision`` and ``wide_sums``. Data flow: ``WideSums`` -> **mean
squares of scaled gradients, complete** -> v.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_adam_mini.collectives import Collectives
from megatron_adam_mini.decision import Decision

#: The smallest normal number of float32.
_MIN_SCALE = 2.0**-126


def write_means_(
    decision: Decision, sum_sq_S: Tensor, collectives: Collectives, num_domains: int
) -> bool:
    """Write mean squares in the places of sums, unless v or the gradients' factor would not fit.

    All ranks must call it. Collectives: those that complete cut blocks, and one for a count.

    Args:
        decision: made from float64 sums. Modified in place: the step is skipped if a number does
            not fit into float32.
        sum_sq_S: sums of squares of ``collectives``, modified in place: the mean square of each
            segment's block, of scaled gradients.
        collectives: of the rank.
        num_domains: of its plan.

    Returns:
        Whether the step is taken.
    """
    wide = decision.wide
    assert wide is not None
    if not decision.read().updated:
        return False
    grad_scale = decision.grad_scale_in_float64
    if grad_scale < _MIN_SCALE:
        decision.skip("the factor that clips them does not fit into float32", [])
        return False
    # s <- mean(grad_scale^2 g * g): float32 holds each rank's part of it if it holds v
    sum_sq_S.copy_(wide.shares_of_mean(grad_scale))
    collectives.start_()
    collectives.finish_()
    too_large = wide.too_large(sum_sq_S, grad_scale)
    count_D = torch.zeros(num_domains, dtype=torch.int64, device=sum_sq_S.device)
    count_D.fill_(too_large.sum())  # of experts and dense ones: their norm groups may differ
    collectives.add_over_model_(count_D)
    if count_D.sum() > 0:
        decision.skip(
            "v, a mean of their squares, does not fit into float32 (--clip-grad would help)",
            wide.names(too_large),
        )
        return False
    return True
