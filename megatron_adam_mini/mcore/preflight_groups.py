"""Refuse process groups that lack what Adam-mini needs, at start-up and with the reason.

Imports the standard library only.
"""

from __future__ import annotations

from typing import Any


def refuse_missing_groups(
    groups: Any,
    *,
    experts: bool,
    expert_tp: bool,
    distributed_optimizer: bool,
    instances: int,
    buckets: bool,
) -> None:
    """Check that a caller's process groups have those that the optimizer needs.

    Args:
        groups: Megatron's ``ProcessGroupCollection``; its fields may be missing or ``None``.
        experts: whether the model has experts.
        expert_tp: whether experts have another tensor-parallel size than other layers.
        distributed_optimizer: whether data-parallel ranks share the state.
        instances: number of distributed-optimizer instances.
        buckets: whether checkpoints are to hold flat buckets, which have numbers of their own.

    Raises:
        ValueError: names all that are missing.
    """
    needed = ["tp", "pp"]
    by_model_rank = buckets or not distributed_optimizer
    needed += ["mp"] if by_model_rank else []
    if experts:
        # Without its group, DDP would not reduce the gradients of experts.
        needed += ["ep", "expt_dp", *(["expt_tp"] if expert_tp else [])]
        needed += ["tp_ep_pp"] if by_model_rank else []
    if instances > 1:
        # Over all ranks, every gradient would count once per instance in the norm.
        needed += ["intra_dist_opt", "inter_dist_opt"]
    missing = [name for name in needed if getattr(groups, name, None) is None]
    if missing:
        raise ValueError(
            f"pg_collection lacks the process groups {', '.join(missing)}, of which Adam-mini "
            f"needs {', '.join(needed)} here. Remedy: set these fields of the "
            "ProcessGroupCollection that the optimizer and DistributedDataParallel get, or pass "
            "None for Megatron's own groups."
        )
