"""Megatron's own estimate of activations, for the plan of a run. Imports Megatron when asked."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any


def activation_estimate() -> Callable[[Mapping[str, Any]], int]:
    """Return the bytes of activations of one rank as a function of Megatron's arguments by name.

    ``num_microbatches`` is among them. It is the estimate that Megatron logs with
    ``--sequence-parallel --recompute-granularity selective``: of the first pipeline stage, one
    dense MLP for each layer, no context parallelism (give a rank's part of ``seq_length``).

    Raises:
        ImportError: Megatron is not installed.

    Source: megatron.training.theoretical_memory_usage.compute_activation_memory.
    """
    disabled = logging.root.manager.disable
    with warnings.catch_warnings():
        # Of what is not installed, or no GPU, and not needed here.
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            from megatron.training.theoretical_memory_usage import compute_activation_memory
        finally:
            logging.disable(disabled)

    def estimate(arguments: Mapping[str, Any]) -> int:
        args = SimpleNamespace(**arguments)
        return int(compute_activation_memory(args, arguments["num_microbatches"]))

    return estimate
