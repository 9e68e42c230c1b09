"""One rank's plan of its step, made of Megatron's objects without communication.

Imports megatron.core, ``start_checks``, ``param_info`` and ``plan``. Data flow: configs, model
chunks and process groups -> **RankPlan**, and the record by which ranks compare their plans.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from megatron_adam_mini.agreement import PlanRecord
from megatron_adam_mini.collectives import DomainGroups
from megatron_adam_mini.config import AdamMiniConfig
from megatron_adam_mini.kernels import select_backend
from megatron_adam_mini.mcore import compat
from megatron_adam_mini.mcore.low_precision import storage_options
from megatron_adam_mini.mcore.param_info import collect_parameters, frozen_keys
from megatron_adam_mini.mcore.preflight import refuse_with_fp8_weights
from megatron_adam_mini.mcore.preflight_model import refuse_columns, refuse_measuring
from megatron_adam_mini.mcore.preflight_step import refuse_coupled_decay
from megatron_adam_mini.mcore.quantized import is_quantized
from megatron_adam_mini.mcore.slices import buffers_of, sharded_buffers, whole_parameters
from megatron_adam_mini.mcore.start_checks import (
    check_chunks,
    check_configs,
    check_devices,
    check_groups,
    check_overrides,
    has_experts,
)
from megatron_adam_mini.plan.candidates import candidates_of
from megatron_adam_mini.plan.manifest import partition_fields
from megatron_adam_mini.plan.parameter_info import ParameterInfo
from megatron_adam_mini.plan.partition import (
    ParameterBlocks,
    partition_parameter,
    unmatched_patterns,
)
from megatron_adam_mini.plan.step_plan import DENSE, EXPERT, DomainLayout, StepPlan, plan_step
from megatron_adam_mini.state import Buffer, check_remainders


@dataclass(frozen=True)
class RankPlan:
    """What one rank has planned before the first collective.

    Attributes:
        options: Adam-mini's, with what Megatron's config asks for.
        plan: all integers of the step.
        parameters: the model's parameters, in the plan's numbering.
        frozen: checkpoint keys of those that are not trained.
        buffers: live tensors of the plan's buffers.
        groups: Megatron's process groups.
        domain_groups: process groups of each of the plan's domains.
        device: where the buffers are.
    """

    options: AdamMiniConfig
    plan: StepPlan
    parameters: list[Parameter]
    frozen: list[str]
    buffers: list[Buffer]
    groups: ProcessGroupCollection
    domain_groups: list[DomainGroups]
    device: torch.device


def plan_rank(
    config: OptimizerConfig,
    options: AdamMiniConfig,
    model_chunks: Sequence[Any],
    config_overrides: dict[Any, Any] | None,
    pg_collection: ProcessGroupCollection | None,
) -> tuple[RankPlan, PlanRecord]:
    """Check and plan this rank's step; arguments and errors are those of ``build_optimizer``."""
    check_chunks(model_chunks)
    trained = (p for chunk in model_chunks for p in chunk.parameters() if p.requires_grad)
    fp8_weights = any(map(is_quantized, trained))
    # On all ranks alike: the weights of a stage may be all bfloat16, or frozen.
    gathers_fp8 = any(chunk.ddp_config.fp8_param_gather for chunk in model_chunks)
    options = storage_options(config, options, fp8_weights=fp8_weights or gathers_fp8)
    check_configs(config, options, model_chunks)
    device = torch.device(torch.cuda.current_device())
    kernels = select_backend(options.backend, device)

    groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
    check_groups(groups, config, options, model_chunks)
    expert_tp = compat.expert_tp_group(groups)
    infos = collect_parameters(model_chunks, tp_group=groups.tp, expert_tp_group=expert_tp)
    check_devices({info.name: param for param, info in infos.items()}, device)
    check_overrides(model_chunks, config_overrides)
    model_config = model_chunks[0].config
    if fp8_weights:
        refuse_with_fp8_weights(config, model_config, param_remainders=options.param_remainders)
    if options.param_remainders:
        check_remainders((param.dtype for param in infos), bf16=config.bf16)
    blocks = _partition(infos, options, model_config, kernels)
    domains = [
        _domain(name, config, model_chunks, list(infos), groups)
        for name in ([DENSE, EXPERT] if has_experts(model_chunks) else [DENSE])
    ]
    plan = plan_step(blocks, [layout for layout, _, _ in domains])
    buffers = [buffer for _, live, _ in domains for buffer in live]
    if not config.decoupled_weight_decay:
        refuse_coupled_decay(
            float32_gradients=all(buffer.grad.dtype == torch.float32 for buffer in buffers),
            single_phase=options.single_phase,
        )
    planned = RankPlan(
        options=options,
        plan=plan,
        parameters=list(infos),
        frozen=frozen_keys(model_chunks),
        buffers=buffers,
        groups=groups,
        domain_groups=[of_domain for _, _, of_domain in domains],
        device=device,
    )
    return planned, _record(planned, config, kernels)


def _partition(
    infos: Mapping[Parameter, ParameterInfo],
    options: AdamMiniConfig,
    model_config: Any,
    kernels: Any,
) -> list[ParameterBlocks]:
    """Return the blocks of each parameter; refuse those that kernels or reports cannot treat."""
    blocks = [partition_parameter(info, options) for info in infos.values()]
    refuse_columns(blocks, model_config, kernels)
    if options.log_heterogeneity:  # what cannot be measured is an error now, not in the run
        refuse_measuring(blocks, model_config)
        for entry in blocks:
            if entry.pattern is None:
                candidates_of(entry.info, options)
    return blocks


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


def _record(planned: RankPlan, config: OptimizerConfig, kernels: Any) -> PlanRecord:
    """Return layouts, and the options on which ranks must agree or they diverge or hang."""
    options, plan = planned.options, planned.plan
    names = [blocks.info.name for blocks in plan.parameters]
    patterns = frozenset(pattern for pattern, _ in options.overrides())
    return PlanRecord(
        rules={
            **partition_fields(options),
            "backend": kernels.NAME,
            **options.step_fields(),
            "decoupled_weight_decay": config.decoupled_weight_decay,
            "domains": [domain.name for domain in plan.domains],
        },
        layouts={
            _sharing_ranks(domain.name, planned.groups): plan.shared_part(domain)
            for domain in plan.domains
        },
        matched=patterns.difference(unmatched_patterns(names, options)),
    )


def _sharing_ranks(domain: str, groups: ProcessGroupCollection) -> str:
    """Return which ranks hold the same parameters and buckets of a domain as this one."""
    stage = f"pipeline stage {groups.pp.rank()}"
    if domain == DENSE:
        return stage
    return f"{stage}, experts of expert-parallel rank {groups.ep.rank()}"
