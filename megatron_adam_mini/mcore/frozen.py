"""Parameters that are frozen in one of two runs: the one that saved a checkpoint, or this one.

Imports ``state_view``, ``pending_load`` and ``plan``. A parameter that was frozen has no state in
the checkpoint. If it is trained now, its main parameter starts from the weight, and m and v from
zero. State of one that is frozen now is not read.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import distributed

from megatron_adam_mini.mcore.pending_load import PendingLoad
from megatron_adam_mini.mcore.state_view import StateView
from megatron_adam_mini.plan.manifest import BUCKETS, format_of, trained_otherwise
from megatron_adam_mini.plan.partition import ParameterBlocks

logger = logging.getLogger(__name__)


def note_new_pieces(
    view: StateView,
    saved: Mapping[str, Any],
    sources: Sequence[ParameterBlocks | None],
    pending: PendingLoad,
) -> None:
    """Note the pieces without state in a checkpoint; the first rank logs what changed.

    Args:
        view: the optimizer.
        saved: identity of the checkpoint's state.
        sources: see ``manifest.partition_of_checkpoint``.
        pending: the load, modified in place.

    Raises:
        ValueError: the state is stored in flat buckets, which a change shifts.
    """
    new, gone = trained_otherwise(saved, view.manifest)
    if not new and not gone:
        return
    if format_of(saved) == BUCKETS:
        raise ValueError(
            "The checkpoint's optimizer state consists of flat buckets of all trained parameters, "
            f"and this run trains others: {_some(new)} were frozen, {_some(gone)} are frozen now. "
            "Train the same parameters, save without --adam-mini-checkpoint-format buckets, or "
            "start with new state (--no-load-optim)."
        )
    pieces = enumerate(view.inner.plan.pieces)
    pending.new = {number for number, piece in pieces if sources[piece.parameter] is None}
    if distributed.get_rank() != 0:
        return
    if gone:
        logger.warning("State in the checkpoint that is not read: %s, frozen now.", _some(gone))
    if new:
        beta1, beta2 = view.param_groups[0]["betas"]
        logger.warning(
            "No state in the checkpoint: %s, frozen when it was saved. Main parameters start from "
            "the weights, m and v from zero. Bias correction counts the steps of the run, so the "
            "first updates of these parameters are up to %.1f times as large as at a run's start "
            "(beta1 %g, beta2 %g); warm the learning rate up again if that is too much.",
            _some(new),
            _first_updates(beta1, beta2),
            beta1,
            beta2,
        )


def start_new_pieces(view: StateView, pending: PendingLoad) -> None:
    """Start the state of pieces that have none: main parameters from weights, m and v zero."""
    for number in sorted(pending.new):
        piece = view.inner.plan.pieces[number]
        held = view.state_of(piece)
        held.take_weights([piece.window])
        held.exp_avg_of(piece.window).zero_()
        view.state.v_of_segments(piece).zero_()
        view.state.v_of_elements(piece).zero_()


def _first_updates(beta1: float, beta2: float) -> float:
    """Return the largest update for equal gradients and no bias correction, of rate 1."""
    if beta2 >= 1.0:
        return math.inf
    steps = range(1, 1 + math.ceil(4 / (1 - beta1)))
    return max((1 - beta1**k) / math.sqrt(1 - beta2**k) for k in steps)


def _some(keys: set[str]) -> str:
    names = sorted(keys)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} parameters" + (f" ({', '.join(names[:3])}{more})" if names else "")
