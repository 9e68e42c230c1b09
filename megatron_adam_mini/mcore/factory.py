"""Megatron's configs and model chunks -> a planned optimizer, or one clear error on all ranks.

Imports megatron.core and everything below it. This is the only place where the plan is put
together.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import optimizer as mcore_optimizer
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import distributed
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from megatron_adam_mini.agreement import PlanRecord, check_agreement
from megatron_adam_mini.config import AdamMiniConfig, check_adam_values
from megatron_adam_mini.engine import Domain, Engine
from megatron_adam_mini.kernels import select_backend
from megatron_adam_mini.mcore.distributed_optimizer import AdamMiniOptimizer
from megatron_adam_mini.mcore.metrics import observe
from megatron_adam_mini.mcore.param_info import collect_parameters
from megatron_adam_mini.mcore.preflight import refuse_single_phase, refuse_unsupported
from megatron_adam_mini.mcore.slices import bucket_slices, dense_buffers, whole_parameters
from megatron_adam_mini.plan.manifest import manifest_of, partition_fields
from megatron_adam_mini.plan.partition import (
    ParameterBlocks,
    partition_parameter,
    unmatched_patterns,
)
from megatron_adam_mini.state import check_remainders

logger = logging.getLogger(__name__)


def build_optimizer(
    config: OptimizerConfig,
    model_chunks: Sequence[Any],
    config_overrides: dict[Any, Any] | None = None,
    pg_collection: ProcessGroupCollection | None = None,
) -> AdamMiniOptimizer:
    """Build Adam-mini for DDP-wrapped model chunks; all ranks of the job must call it.

    Args:
        config: ``optimizer="adam_mini"``; options of Adam-mini travel as its attribute
            ``adam_mini``, an :class:`AdamMiniConfig` (default options without it).
        model_chunks: chunks wrapped in megatron.core's ``DistributedDataParallel``.
        config_overrides: per-parameter overrides of learning rate and weight decay.
        pg_collection: process groups; default Megatron's global ones.

    Raises:
        NotImplementedError: a combination that is not supported.
        ValueError: a value or name pattern that is not allowed.
        TypeError: chunks that are not wrapped in ``DistributedDataParallel``.
        RuntimeError: ranks disagree on the plan, or another rank failed.
    """
    options: AdamMiniConfig = getattr(config, "adam_mini", None) or AdamMiniConfig()

    # Whatever goes wrong on one rank must reach all of them before the first collective, also
    # what nobody foresaw.
    params: dict[Parameter, Any] = {}
    blocks: list[ParameterBlocks] = []
    error: Exception | None = None
    backend = ""
    try:
        _check_chunks(model_chunks)
        refuse_unsupported(config, model_chunks[0].ddp_config)
        check_adam_values(
            lr=config.lr,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
        )
        _check_distributed_optimizer(config, model_chunks)
        device = torch.device(torch.cuda.current_device())
        backend = select_backend(options.backend, device).NAME
        if options.single_phase:
            refuse_single_phase(
                config.clip_grad,
                loss_scaled=bool(config.loss_scale or config.fp16),
                skip_threshold=config.grad_norm_skip_threshold,
            )
        if options.manifest and distributed.get_rank() == 0:
            _check_writable(options.manifest)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        expert_tp = getattr(groups, "expt_tp", None) or groups.tp
        params = collect_parameters(model_chunks, tp_group=groups.tp, expert_tp_group=expert_tp)
        if options.param_remainders:
            check_remainders(param.dtype for param in params)
        blocks = [partition_parameter(info, options) for info in params.values()]
        domain = _dense_domain(model_chunks, list(params), groups, config)
    except Exception as caught:
        error = caught
    patterns = [pattern for pattern, _ in options.overrides()]
    check_agreement(
        PlanRecord(
            stage=f"pipeline stage {groups.pp.rank()}" if error is None else "",
            # The partition, and what would let ranks drift apart or wait for each other.
            rules={**partition_fields(options), "backend": backend, **options.step_fields()},
            layout=_layout_record(blocks, domain) if error is None else (),
            matched=frozenset(patterns).difference(
                unmatched_patterns([info.name for info in params.values()], options)
            ),
            error=error,
        ),
        patterns=patterns,
    )

    # Megatron's own grouping gathers from all ranks, so it comes after the check.
    param_groups = _param_groups(model_chunks, config, config_overrides)
    group_of = {p: i for i, group in enumerate(param_groups) for p in group["params"]}
    engine = Engine(
        options,
        blocks,
        param_groups,
        [group_of[param] for param in params],
        [domain],
        device=device,
    )
    manifest = _gather_manifest(model_chunks, list(params), blocks, options, groups.pp)
    optimizer = AdamMiniOptimizer(
        engine, config, model_chunks, param_groups, list(params), manifest, groups
    )
    observe(optimizer)
    _report(optimizer, options)
    return optimizer


def _check_chunks(model_chunks: Sequence[Any]) -> None:
    for chunk in model_chunks:
        if not isinstance(chunk, DistributedDataParallel):
            raise TypeError(
                f"Adam-mini needs model chunks wrapped in megatron.core's DistributedDataParallel, "
                f"got {type(chunk).__name__}; wrap them as megatron.training.get_model does."
            )


def _check_distributed_optimizer(config: OptimizerConfig, model_chunks: Sequence[Any]) -> None:
    """Refuse configs that disagree on who owns which gradients: sums would be wrong in silence."""
    for chunk in model_chunks:
        wrapped = bool(chunk.ddp_config.use_distributed_optimizer)
        if wrapped != bool(config.use_distributed_optimizer):
            raise ValueError(
                f"use_distributed_optimizer is {config.use_distributed_optimizer} in "
                f"OptimizerConfig but {wrapped} in DistributedDataParallelConfig; give both the "
                "same value."
            )


def _check_writable(manifest: str) -> None:
    try:
        with Path(manifest).open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise ValueError(
            f"Adam-mini manifest={manifest!r} cannot be written: {error.strerror}. Name a file in "
            "a folder that exists and is writable on rank 0's machine."
        ) from error


def _param_groups(
    model_chunks: Sequence[Any], config: OptimizerConfig, overrides: dict[Any, Any] | None
) -> list[dict[str, Any]]:
    """Let Megatron make its groups, and add what Adam's own constructor would add."""
    groups: list[dict[str, Any]] = mcore_optimizer._get_param_groups(
        list(model_chunks), config, overrides
    )
    for group in groups:
        group.setdefault("lr", config.lr)
        group.setdefault("weight_decay", config.weight_decay)
        group.setdefault("betas", (config.adam_beta1, config.adam_beta2))
        group.setdefault("eps", config.adam_eps)
    return groups


def _dense_domain(
    model_chunks: Sequence[Any],
    params: Sequence[Parameter],
    groups: ProcessGroupCollection,
    config: OptimizerConfig,
) -> Domain:
    buffers = dense_buffers(model_chunks)
    index_of = {param: index for index, param in enumerate(params)}
    if config.use_distributed_optimizer:
        # With several optimizer instances this is the group inside one of them: Megatron has
        # already added the gradients of the others.
        dp_group: ProcessGroup | None = buffers[0].data_parallel_group if buffers else None
        dp_rank = dp_group.rank() if dp_group else 0
        dp_size = dp_group.size() if dp_group else 1
        layouts, slices = bucket_slices(buffers, index_of, dp_rank, dp_size)
        instances = model_chunks[0].ddp_config.num_distributed_optimizer_instances
        replicas = instances > 1
        norm_group = getattr(groups, "intra_dist_opt", None)
        if norm_group is None and instances > 1:
            raise ValueError(
                f"{instances} distributed-optimizer instances need pg_collection.intra_dist_opt: "
                "over all ranks every gradient would count once per instance in the norm."
            )
    else:
        dp_group, dp_rank = None, 0
        layouts, slices = whole_parameters(buffers, index_of)
        replicas = True
        norm_group = groups.mp
    return Domain(
        name="dense",
        buckets=layouts,
        slices=slices,
        dp_group=dp_group,
        dp_rank=dp_rank,
        tp_group=groups.tp,
        tp_rank=groups.tp.rank(),
        tp_size=groups.tp.size(),
        dp_replicas=replicas,
        norm_group=norm_group,
    )


def _layout_record(blocks: Sequence[ParameterBlocks], domain: Domain) -> list[dict[str, Any]]:
    """Return what all ranks of a pipeline stage must have in common, one entry per parameter."""
    return [
        {
            "bucket": index,
            "bucket_numel": bucket.numel,
            "slices": bucket.num_slices,
            "at": [placement.start, placement.end],
            **blocks[placement.parameter].identity(),
        }
        for index, bucket in enumerate(domain.buckets)
        for placement in bucket.placements
    ]


def _gather_manifest(
    model_chunks: Sequence[Any],
    params: Sequence[Parameter],
    blocks: Sequence[ParameterBlocks],
    options: AdamMiniConfig,
    pp_group: ProcessGroup,
) -> dict[str, Any]:
    """Join the manifests of all pipeline stages; every rank gets the whole."""
    own = [
        entry.manifest_entry()
        for param, entry in zip(params, blocks, strict=True)
        if not getattr(param, "shared", False)  # the second copy of tied embeddings
    ]
    stages: list[Any] = [None] * pp_group.size()
    distributed.all_gather_object(stages, own, group=pp_group)
    return manifest_of([entry for stage in stages for entry in stage], options)


def _report(optimizer: AdamMiniOptimizer, options: AdamMiniConfig) -> None:
    if distributed.get_rank() != 0:
        return
    manifest = optimizer.manifest
    by_rule: dict[tuple[str, str], list[int]] = {}
    for entry in manifest["parameters"]:
        row = by_rule.setdefault((entry["role"], entry["rule"]), [0, 0, 0])
        row[0] += 1
        row[1] += entry["elements"]
        row[2] += entry["blocks"]
    lines = [f"{'role':<22}{'rule':<10}{'tensors':>8}{'elements':>16}{'blocks':>14}"]
    lines += [
        f"{role:<22}{rule:<10}{row[0]:>8}{row[1]:>16,}{row[2]:>14,}"
        for (role, rule), row in sorted(by_rule.items())
    ]
    added = optimizer.communication_per_step()
    print(  # noqa: T201 (where Megatron prints its own start-up report)
        f"Adam-mini partition {manifest['preset']!r} (manifest {manifest['hash']}): "
        f"{manifest['elements']:,} elements share {manifest['blocks']:,} second moments\n"
        + "\n".join(lines)
        + f"\nthis rank: kernels {optimizer.engine.kernels.NAME!r}, state bytes "
        f"{optimizer.state_bytes()}, added per step {added}",
        flush=True,
    )
    unknown = manifest["elementwise_unknown"]
    if unknown:
        logger.warning(
            "Adam-mini does not know %d parameters and keeps one second moment per element of "
            "them: %s",
            len(unknown),
            ", ".join(unknown),
        )
    if options.manifest:
        Path(options.manifest).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
