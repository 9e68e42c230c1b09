"""Refuse ways of taking a step that exclude each other, at start-up and with the reason.

Imports the standard library only. Values come from command-line arguments, or from Megatron's
configs.
"""

from __future__ import annotations

import math
from typing import Any


def refuse_overlapped_sums(
    *,
    distributed_optimizer: bool,
    overlap_grad_reduce: bool,
    per_token_loss: bool,
    fp32_accumulation: bool,
    single_phase: bool,
) -> None:
    """Check that sums of squares can be taken behind the backward pass, and will be of use.

    Args:
        distributed_optimizer: whether gradients are reduced in buckets of which this rank owns a
            slice.
        overlap_grad_reduce: whether that overlaps the backward pass.
        per_token_loss: whether gradients are divided by a number of tokens after that.
        fp32_accumulation: whether they are added up where their reduction is waited for.
        single_phase: whether sums are taken by the pass that updates.

    Raises:
        ValueError: not; names all reasons.
    """
    reasons = {
        "without --use-distributed-optimizer no rank owns a slice of a bucket": (
            not distributed_optimizer
        ),
        "without --overlap-grad-reduce nothing is reduced during the backward pass": (
            not overlap_grad_reduce
        ),
        "--calculate-per-token-loss divides gradients after all are reduced, so that all sums "
        "would be taken again": per_token_loss,
        "--ddp-reduce-scatter-with-fp32-accumulation adds gradients up where they are waited for, "
        "after the backward pass": fp32_accumulation,
        "--adam-mini-single-phase takes sums in the pass that updates": single_phase,
    }
    found = [reason for reason, applies in reasons.items() if applies]
    if found:
        raise ValueError(
            f"--adam-mini-overlap-block-sums is not possible: {'; '.join(found)}. Remedy: drop "
            "--adam-mini-overlap-block-sums, or change that."
        )


def refuse_single_phase(
    clip_grad: float,
    *,
    loss_scaled: bool,
    skip_threshold: float = math.inf,
    cpu_offload: bool = False,
) -> None:
    """Check that nothing in the step needs sums or the gradient norm first.

    Args:
        clip_grad: norm to clip to; 0 or less: none.
        loss_scaled: whether gradients are scaled, and non-finite ones expected.
        skip_threshold: norm above which steps are skipped; only configs have it.
        cpu_offload: whether state lies in host memory.

    Raises:
        ValueError: something does; names it.
    """
    if cpu_offload:
        raise ValueError(
            "--adam-mini-single-phase takes sums and updates in one pass over the gradients, but "
            "with --optimizer-cpu-offload the device takes the sums and the host updates. Remedy: "
            "drop one of them."
        )
    waits = {
        f"--clip-grad {clip_grad}": clip_grad > 0.0,
        "a loss scale (--fp16 or --loss-scale)": loss_scaled,
        f"grad_norm_skip_threshold {skip_threshold}": skip_threshold < math.inf,
    }
    found = [name for name, applies in waits.items() if applies]
    if found:
        raise ValueError(
            "--adam-mini-single-phase updates blocks before the gradient norm is known, but "
            f"{' and '.join(found)} needs it first. Remedy: drop --adam-mini-single-phase, or "
            "train with --clip-grad 0 in float32 or bfloat16 without a loss scale."
        )


def refuse_early_gather(ddp_config: Any) -> None:
    """Check that somebody waits for a gather that starts within the step.

    Args:
        ddp_config: of the model chunks.

    Raises:
        ValueError: nobody does; names the setting.
    """
    for name in ("use_distributed_optimizer", "overlap_param_gather"):
        if not getattr(ddp_config, name):
            raise ValueError(
                f"--overlap-param-gather-with-optimizer-step needs {name}=True in "
                "DistributedDataParallelConfig, got False. Remedy: --use-distributed-optimizer "
                "and --overlap-param-gather, or drop the flag."
            )


def refuse_coupled_decay(*, float32_gradients: bool, single_phase: bool) -> None:
    """Check that weight decay can be added to gradients.

    Args:
        float32_gradients: whether all gradients of the rank are float32.
        single_phase: whether each is read once.

    Raises:
        ValueError: it cannot.
    """
    if single_phase:
        raise ValueError(
            "--adam-mini-single-phase reads each gradient once, but decoupled_weight_decay=False "
            "changes it, and sums its squares again. Remedy: drop one of them."
        )
    if not float32_gradients:
        raise ValueError(
            "decoupled_weight_decay=False adds the decay to gradients in their buffer, where 16 "
            "bits would lose it. Remedy: --accumulate-allreduce-grads-in-fp32, or keep it True."
        )
