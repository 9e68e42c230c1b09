"""Megatron's configs and model chunks -> an optimizer, or one clear error on all ranks.

Imports megatron.core and everything below it. Steps: collect parameters, plan, agree, allocate,
prepare the first step.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import distributed
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from megatron_adam_mini.agreement import PlanRecord, agree_on_plan, gather, on_all_ranks
from megatron_adam_mini.collectives import DomainGroups
from megatron_adam_mini.config import AdamMiniConfig, check_adam_values
from megatron_adam_mini.kernels import select_backend
from megatron_adam_mini.mcore import compat
from megatron_adam_mini.mcore.arguments import offload_config
from megatron_adam_mini.mcore.chained_optimizer import AdamMiniChainedOptimizer
from megatron_adam_mini.mcore.distributed_optimizer import AdamMiniOptimizer
from megatron_adam_mini.mcore.first_step import prepare_first_step
from megatron_adam_mini.mcore.grad_sync import overlap_sums
from megatron_adam_mini.mcore.low_precision import (
    plain_config,
    report_ignored_dtype,
    storage_options,
)
from megatron_adam_mini.mcore.metrics import observe
from megatron_adam_mini.mcore.noise_report import refuse_unmeasurable
from megatron_adam_mini.mcore.param_info import collect_parameters, frozen_keys
from megatron_adam_mini.mcore.preflight import (
    refuse_buckets,
    refuse_columns,
    refuse_coupled_decay,
    refuse_measuring,
    refuse_missing_groups,
    refuse_overlapped_sums,
    refuse_qk_clip,
    refuse_single_phase,
    refuse_unsupported,
    refuse_with_fp8_weights,
)
from megatron_adam_mini.mcore.qk_clip import follow
from megatron_adam_mini.mcore.quantized import drop_initial_values, is_quantized
from megatron_adam_mini.mcore.slices import buffers_of, sharded_buffers, whole_parameters
from megatron_adam_mini.mcore.unattached import options_of_process
from megatron_adam_mini.optimizer import AdamMini
from megatron_adam_mini.plan.candidates import candidates_of
from megatron_adam_mini.plan.manifest import (
    BUCKETS,
    manifest_of,
    partition_fields,
    unknown_problem,
)
from megatron_adam_mini.plan.partition import partition_parameter, unmatched_patterns
from megatron_adam_mini.plan.step_plan import DENSE, EXPERT, DomainLayout, StepPlan, plan_step
from megatron_adam_mini.state import Buffer, check_remainders

logger = logging.getLogger(__name__)


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
        lambda: getattr(config, "adam_mini", None) or options_of_process(),
        "Adam-mini could not read its options",
    )
    planned = agree_on_plan(
        lambda: _plan(config, given, model_chunks, pg_collection),
        patterns=[pattern for pattern, _ in given.overrides()],
    )
    options = planned.options
    # Megatron's own grouping gathers from all ranks, so it comes after the check.
    param_groups = _param_groups(model_chunks, config, config_overrides)
    group_of = {p: i for i, group in enumerate(param_groups) for p in group["params"]}
    manifest = _gather_manifest(planned, options, frozen_keys(model_chunks))
    if problem := unknown_problem(manifest):  # the same on all ranks
        raise ValueError(problem)
    if options.log_heterogeneity:
        refuse_unmeasurable(manifest)

    def make() -> AdamMiniOptimizer:
        inner = AdamMini(
            planned.plan,
            options,
            planned.buffers,
            planned.domain_groups,
            param_groups,
            [group_of[param] for param in planned.parameters],
            device=planned.device,
            offload=offload_config(config),
            decoupled_weight_decay=config.decoupled_weight_decay,
        )
        if options.overlap_block_sums:
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
        return optimizer

    optimizer = on_all_ranks(make, "Adam-mini could not allocate its state or prepare a step")
    observe(optimizer)
    follow(optimizer)
    report_ignored_dtype(config)
    _report(optimizer, options)
    return AdamMiniChainedOptimizer(optimizer)


@dataclass(frozen=True)
class _Planned:
    """What one rank has planned before the first collective.

    Attributes:
        options: Adam-mini's, with what Megatron's config asks for.
        plan: all integers of the step.
        parameters: the model's parameters, in the plan's numbering.
        buffers: live tensors of the plan's buffers.
        groups: Megatron's process groups.
        domain_groups: process groups of each of the plan's domains.
        device: where the buffers are.
    """

    options: AdamMiniConfig
    plan: StepPlan
    parameters: list[Parameter]
    buffers: list[Buffer]
    groups: ProcessGroupCollection
    domain_groups: list[DomainGroups]
    device: torch.device


def _plan(
    config: OptimizerConfig,
    options: AdamMiniConfig,
    model_chunks: Sequence[Any],
    pg_collection: ProcessGroupCollection | None,
) -> tuple[_Planned, PlanRecord]:
    """Plan this rank's step, without communication; see :func:`build_optimizer` for errors."""
    _check_chunks(model_chunks)
    trained = (p for chunk in model_chunks for p in chunk.parameters() if p.requires_grad)
    fp8_weights = any(map(is_quantized, trained))
    # On all ranks alike: the weights of a stage may be all bfloat16, or frozen.
    gathers_fp8 = any(chunk.ddp_config.fp8_param_gather for chunk in model_chunks)
    options = storage_options(config, options, fp8_weights=fp8_weights or gathers_fp8)
    _check_options(config, options, model_chunks)
    device = torch.device(torch.cuda.current_device())
    backend = select_backend(options.backend, device).NAME

    groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
    _check_groups(groups, config, options, model_chunks)
    expert_tp = compat.expert_tp_group(groups)
    infos = collect_parameters(model_chunks, tp_group=groups.tp, expert_tp_group=expert_tp)
    _check_devices({info.name: param for param, info in infos.items()}, device)
    if fp8_weights:
        refuse_with_fp8_weights(
            config, model_chunks[0].config, param_remainders=options.param_remainders
        )
    if options.param_remainders:
        check_remainders((param.dtype for param in infos), bf16=config.bf16)
    blocks = [partition_parameter(info, options) for info in infos.values()]
    refuse_columns(blocks, model_chunks[0].config, select_backend(options.backend, device))
    if options.log_heterogeneity:  # what cannot be measured is an error now, not in the run
        refuse_measuring(blocks, model_chunks[0].config)
        for entry in blocks:
            if entry.pattern is None:
                candidates_of(entry.info, options)
    domains = [
        _domain(name, config, model_chunks, list(infos), groups)
        for name in _domain_names(model_chunks)
    ]
    plan = plan_step(blocks, [layout for layout, _, _ in domains])

    names = [info.name for info in infos.values()]
    patterns = frozenset(pattern for pattern, _ in options.overrides())
    record = PlanRecord(
        # The partition, and options on which ranks must agree or they diverge or hang.
        rules={
            **partition_fields(options),
            "backend": backend,
            **options.step_fields(),
            "decoupled_weight_decay": config.decoupled_weight_decay,
            "domains": [domain.name for domain in plan.domains],
        },
        layouts={
            _sharing_ranks(domain.name, groups): plan.shared_part(domain) for domain in plan.domains
        },
        matched=patterns.difference(unmatched_patterns(names, options)),
    )
    buffers = [buffer for _, live, _ in domains for buffer in live]
    if not config.decoupled_weight_decay:
        refuse_coupled_decay(
            float32_gradients=all(buffer.grad.dtype == torch.float32 for buffer in buffers),
            single_phase=options.single_phase,
        )
    domain_groups = [of_domain for _, _, of_domain in domains]
    return _Planned(options, plan, list(infos), buffers, groups, domain_groups, device), record


def _domain_names(model_chunks: Sequence[Any]) -> list[str]:
    """Return the domains of the model: the same on all ranks, also where a stage has no expert."""
    return [DENSE, EXPERT] if _has_experts(model_chunks) else [DENSE]


def _has_experts(model_chunks: Sequence[Any]) -> bool:
    return any(
        getattr(getattr(chunk, "config", None), "num_moe_experts", None)
        or chunk.expert_parallel_buffers
        for chunk in model_chunks
    )


def _sharing_ranks(domain: str, groups: ProcessGroupCollection) -> str:
    """Return which ranks hold the same parameters and buckets of a domain as this one."""
    stage = f"pipeline stage {groups.pp.rank()}"
    if domain == DENSE:
        return stage
    return f"{stage}, experts of expert-parallel rank {groups.ep.rank()}"


def _check_chunks(model_chunks: Sequence[Any]) -> None:
    for chunk in model_chunks:
        if not isinstance(chunk, DistributedDataParallel):
            raise TypeError(
                f"Adam-mini needs model chunks wrapped in megatron.core's DistributedDataParallel, "
                f"got {type(chunk).__name__}; wrap them as megatron.training.get_model does."
            )


def _check_devices(params: dict[str, Parameter], device: torch.device) -> None:
    """Check that weights and gradients are on the current device, as kernels and NCCL use it."""
    for name, param in params.items():
        for kind, tensor in (("weight", param), ("gradient", getattr(param, "main_grad", None))):
            if tensor is not None and tensor.device != device:
                raise ValueError(
                    f"Adam-mini found the {kind} of {name!r} on {tensor.device}, while the current "
                    f"device is {device}. Remedy: call torch.cuda.set_device on this rank before "
                    "the model is made, and leave the model there."
                )


def _check_groups(
    groups: ProcessGroupCollection,
    config: OptimizerConfig,
    options: AdamMiniConfig,
    model_chunks: Sequence[Any],
) -> None:
    of_model = getattr(model_chunks[0], "config", None)
    expert_tp_size = getattr(of_model, "expert_tensor_parallel_size", None)
    tp_size = getattr(of_model, "tensor_model_parallel_size", None)
    refuse_missing_groups(
        groups,
        experts=_has_experts(model_chunks),
        expert_tp=expert_tp_size is not None and expert_tp_size != tp_size,
        distributed_optimizer=config.use_distributed_optimizer,
        instances=model_chunks[0].ddp_config.num_distributed_optimizer_instances,
        buckets=options.checkpoint_format == BUCKETS,
    )


def _check_options(
    config: OptimizerConfig, options: AdamMiniConfig, model_chunks: Sequence[Any]
) -> None:
    refuse_unsupported(config, model_chunks[0].ddp_config)
    check_adam_values(
        lr=config.lr,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
    )
    _check_distributed_optimizer(config, model_chunks)
    refuse_qk_clip(model_chunks[0].config)
    if config.overlap_param_gather_with_optimizer_step:
        _check_early_gather(model_chunks)
    if options.checkpoint_format == BUCKETS:
        refuse_buckets(distributed_optimizer=config.use_distributed_optimizer)
    if options.single_phase:
        refuse_single_phase(
            config.clip_grad,
            loss_scaled=bool(config.loss_scale or config.fp16),
            skip_threshold=compat.grad_norm_skip_threshold(config),
            cpu_offload=config.optimizer_cpu_offload,
        )
    if options.overlap_block_sums:
        ddp_config = model_chunks[0].ddp_config
        refuse_overlapped_sums(
            distributed_optimizer=ddp_config.use_distributed_optimizer,
            overlap_grad_reduce=ddp_config.overlap_grad_reduce,
            per_token_loss=getattr(model_chunks[0].config, "calculate_per_token_loss", False),
            fp32_accumulation=ddp_config.reduce_scatter_with_fp32_accumulation,
            single_phase=options.single_phase,
        )
    offload_config(config)
    if options.manifest and distributed.get_rank() == 0:
        _check_writable(options.manifest)


def _check_distributed_optimizer(config: OptimizerConfig, model_chunks: Sequence[Any]) -> None:
    """Refuse configs that disagree on which rank owns which gradients: sums would be wrong."""
    for chunk in model_chunks:
        wrapped = bool(chunk.ddp_config.use_distributed_optimizer)
        if wrapped != bool(config.use_distributed_optimizer):
            raise ValueError(
                f"use_distributed_optimizer is {config.use_distributed_optimizer} in "
                f"OptimizerConfig but {wrapped} in DistributedDataParallelConfig; give both the "
                "same value."
            )


def _check_early_gather(model_chunks: Sequence[Any]) -> None:
    """Refuse to start the gather of the first chunk within the step if nobody waits for it."""
    config = model_chunks[0].ddp_config
    for name in ("use_distributed_optimizer", "overlap_param_gather"):
        if not getattr(config, name):
            raise ValueError(
                f"--overlap-param-gather-with-optimizer-step needs {name}=True in "
                "DistributedDataParallelConfig, got False. Remedy: --use-distributed-optimizer "
                "and --overlap-param-gather, or drop the flag."
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


def _domain(
    name: str,
    config: OptimizerConfig,
    model_chunks: Sequence[Any],
    params: Sequence[Parameter],
    groups: ProcessGroupCollection,
) -> tuple[DomainLayout, list[Buffer], DomainGroups]:
    """Return layout, live tensors and process groups of dense parameters, or of experts."""
    expert = name == EXPERT
    buffers = buffers_of(model_chunks, expert=expert)
    tp_group = compat.expert_tp_group(groups) if expert else groups.tp
    index_of = {param: index for index, param in enumerate(params)}
    dp_group: ProcessGroup | None = None
    if config.use_distributed_optimizer:
        # Also where all parameters of the stage are frozen: one of its ranks writes for all.
        dp_group = compat.sharing_group(model_chunks[0], expert=expert)
        layouts, live = sharded_buffers(buffers, index_of, dp_group.size())
        replicas = model_chunks[0].ddp_config.num_distributed_optimizer_instances > 1
        norm_group = compat.norm_group(groups)
    else:
        layouts, live = whole_parameters(buffers, index_of)
        replicas = True
        norm_group = groups.tp_ep_pp if expert else groups.mp
    domain = DomainLayout(
        name=name,
        buffers=tuple(layouts),
        dp_rank=dp_group.rank() if dp_group else 0,
        tp_rank=tp_group.rank(),
        tp_size=tp_group.size(),
        dp_replicas=replicas,
    )
    return domain, live, DomainGroups(dp=dp_group, tp=tp_group, norm=norm_group)


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


def _gather_manifest(
    planned: _Planned, options: AdamMiniConfig, frozen: list[str]
) -> dict[str, Any]:
    """Join the manifests of all parts of the model; every rank gets the result."""
    own = [
        entry.manifest_entry()
        for param, entry in zip(planned.parameters, planned.plan.parameters, strict=True)
        if not getattr(param, "shared", False)  # the second copy of tied embeddings
    ]
    entries, keys = {entry["key"]: entry for entry in own}, set(frozen)
    if len(planned.domain_groups) > 1:  # ranks of a stage hold different experts
        for others, of_others in gather((list(entries.values()), keys), planned.groups.ep):
            entries |= {entry["key"]: entry for entry in others}
            keys |= of_others
    stages = gather((list(entries.values()), keys), planned.groups.pp)
    return manifest_of(
        [entry for of_stage, _ in stages for entry in of_stage],
        options,
        frozen=[key for _, of_stage in stages for key in of_stage],
    )


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
        + f"\ncheckpoint format {options.checkpoint_format!r}; this rank: kernels "
        f"{optimizer.inner.kernels.NAME!r}, state bytes {optimizer.state_bytes()}, added per step "
        f"{added}",
        flush=True,
    )
    unknown = manifest["elementwise_unknown"]
    if unknown:
        logger.warning(
            "Adam-mini does not know %d parameters and keeps one second moment per element of "
            "them: %s. --adam-mini-full-v with their names says that this is meant.",
            len(unknown),
            ", ".join(unknown),
        )
    if options.manifest:
        Path(options.manifest).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
