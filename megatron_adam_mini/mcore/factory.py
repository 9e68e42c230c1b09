"""Megatron's configs and model chunks -> an optimizer, or one clear error on all ranks.

Imports megatron.core and everything below it. Steps: plan on every rank (``rank_plan``), agree,
sort parameters into groups, join the manifest, allocate, prepare the first step, report.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_adam_mini.agreement import agree_on_plan, gather, on_all_ranks
from megatron_adam_mini.config import AdamMiniConfig
from megatron_adam_mini.mcore import compat
from megatron_adam_mini.mcore.arguments import offload_config
from megatron_adam_mini.mcore.chained_optimizer import AdamMiniChainedOptimizer
from megatron_adam_mini.mcore.distributed_optimizer import AdamMiniOptimizer
from megatron_adam_mini.mcore.first_step import prepare_first_step
from megatron_adam_mini.mcore.grad_sync import overlap_sums
from megatron_adam_mini.mcore.low_precision import plain_config, report_ignored_dtype
from megatron_adam_mini.mcore.metrics import observe
from megatron_adam_mini.mcore.preflight_model import refuse_unmeasurable
from megatron_adam_mini.mcore.qk_clip import follow
from megatron_adam_mini.mcore.quantized import drop_initial_values
from megatron_adam_mini.mcore.rank_plan import RankPlan, plan_rank
from megatron_adam_mini.mcore.start_report import report, write_manifest
from megatron_adam_mini.mcore.unattached import options_of
from megatron_adam_mini.optimizer import AdamMini
from megatron_adam_mini.plan.manifest import manifest_of, unknown_problem


def build_optimizer(
    config: OptimizerConfig,
    model_chunks: Sequence[Any],
    config_overrides: dict[Any, Any] | None = None,
    pg_collection: ProcessGroupCollection | None = None,
) -> AdamMiniChainedOptimizer:
    """Build Adam-mini for DDP-wrapped model chunks; all ranks of the job must call it.

    Args:
        config: ``optimizer="adam_mini"``; its attribute ``adam_mini``, an
            :class:`AdamMiniConfig`, holds Adam-mini's options (see ``unattached`` if missing).
        model_chunks: chunks wrapped in megatron.core's ``DistributedDataParallel``.
        config_overrides: per-parameter overrides of learning rate and weight decay.
        pg_collection: process groups; default Megatron's global ones.

    Raises:
        NotImplementedError: a combination is not supported.
        ValueError: a value or name pattern is not allowed.
        TypeError: a chunk is not wrapped in ``DistributedDataParallel``.
        RuntimeError: ranks disagree on the plan, or another rank failed.
    """
    given: AdamMiniConfig = on_all_ranks(
        lambda: options_of(config), "Adam-mini could not read its options"
    )
    planned = agree_on_plan(
        lambda: plan_rank(config, given, model_chunks, config_overrides, pg_collection),
        patterns=[pattern for pattern, _ in given.overrides()],
    )
    # Megatron's own grouping gathers from all ranks, so it comes after the check.
    param_groups = _param_groups(model_chunks, config, config_overrides)
    manifest = _joined_manifest(planned)
    if problem := unknown_problem(manifest):  # the same on all ranks
        raise ValueError(problem)
    if planned.options.log_heterogeneity:
        refuse_unmeasurable(manifest)  # likewise
    optimizer = on_all_ranks(
        lambda: _make(planned, config, model_chunks, param_groups, manifest),
        "Adam-mini could not allocate its state, prepare a step or write its manifest",
    )
    observe(optimizer)
    follow(optimizer)
    report_ignored_dtype(config)
    report(optimizer)
    return AdamMiniChainedOptimizer(optimizer)


def _param_groups(
    model_chunks: Sequence[Any], config: OptimizerConfig, overrides: dict[Any, Any] | None
) -> list[dict[str, Any]]:
    """Return Megatron's groups, with the fields that Adam's own constructor would add."""
    groups = compat.param_groups_of(model_chunks, config, overrides)
    for group in groups:
        group.setdefault("lr", config.lr)
        group.setdefault("weight_decay", config.weight_decay)
        group.setdefault("betas", (config.adam_beta1, config.adam_beta2))
        group.setdefault("eps", config.adam_eps)
    return groups


def _joined_manifest(planned: RankPlan) -> dict[str, Any]:
    """Join the manifests of all parts of the model; every rank gets the result."""
    own = [
        entry.manifest_entry()
        for param, entry in zip(planned.parameters, planned.plan.parameters, strict=True)
        if not getattr(param, "shared", False)  # the second copy of tied embeddings
    ]
    entries, frozen = {entry["key"]: entry for entry in own}, set(planned.frozen)
    if len(planned.domain_groups) > 1:  # ranks of a stage hold different experts
        for others, of_others in gather((list(entries.values()), frozen), planned.groups.ep):
            entries |= {entry["key"]: entry for entry in others}
            frozen |= of_others
    stages = gather((list(entries.values()), frozen), planned.groups.pp)
    return manifest_of(
        [entry for of_stage, _ in stages for entry in of_stage],
        planned.options,
        frozen=[key for _, of_stage in stages for key in of_stage],
    )


def _make(
    planned: RankPlan,
    config: OptimizerConfig,
    model_chunks: Sequence[Any],
    param_groups: list[dict[str, Any]],
    manifest: dict[str, Any],
) -> AdamMiniOptimizer:
    """Allocate this rank's state, and do all that can fail on one rank alone; no communication."""
    group_of = {p: i for i, group in enumerate(param_groups) for p in group["params"]}
    inner = AdamMini(
        planned.plan,
        planned.options,
        planned.buffers,
        planned.domain_groups,
        param_groups,
        [group_of[param] for param in planned.parameters],
        device=planned.device,
        offload=offload_config(config),
        decoupled_weight_decay=config.decoupled_weight_decay,
    )
    if planned.options.overlap_block_sums:
        overlap_sums(
            inner,
            model_chunks,
            planned.parameters,
            tp_size=planned.groups.tp.size(),
            pp_size=planned.groups.pp.size(),
        )
    drop_initial_values(planned.parameters)
    optimizer = AdamMiniOptimizer(
        inner,
        plain_config(config),
        model_chunks,
        planned.parameters,
        manifest,
        planned.groups,
        planned.domain_groups,
    )
    prepare_first_step(optimizer)
    write_manifest(planned.options.manifest, manifest)
    return optimizer
