"""What a rank checks before it plans: configs, model chunks, process groups, devices.

Imports megatron.core's DDP, ``preflight`` and those beside it. Nothing here communicates:
``factory`` lets all ranks agree on what each of them has found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.nn import Parameter

from megatron_adam_mini.config import AdamMiniConfig, check_adam_values
from megatron_adam_mini.mcore import compat
from megatron_adam_mini.mcore.arguments import offload_config
from megatron_adam_mini.mcore.preflight import refuse_buckets, refuse_unsupported
from megatron_adam_mini.mcore.preflight_groups import refuse_missing_groups
from megatron_adam_mini.mcore.preflight_model import refuse_qk_clip
from megatron_adam_mini.mcore.preflight_step import (
    refuse_early_gather,
    refuse_overlapped_sums,
    refuse_single_phase,
)
from megatron_adam_mini.mcore.start_report import check_writable
from megatron_adam_mini.plan.manifest import BUCKETS


def check_chunks(model_chunks: Sequence[Any]) -> None:
    """Check that model chunks have DDP's buffers.

    Raises:
        TypeError: one is not wrapped in ``DistributedDataParallel``.
    """
    for chunk in model_chunks:
        if not isinstance(chunk, DistributedDataParallel):
            raise TypeError(
                f"Adam-mini needs model chunks wrapped in megatron.core's DistributedDataParallel, "
                f"got {type(chunk).__name__}; wrap them as megatron.training.get_model does."
            )


def check_configs(
    config: OptimizerConfig, options: AdamMiniConfig, model_chunks: Sequence[Any]
) -> None:
    """Check values and combinations in the configs of optimizer, DDP and model.

    Args:
        config: Megatron's.
        options: Adam-mini's, with what ``config`` asks for.
        model_chunks: wrapped in DDP.

    Raises:
        NotImplementedError: a combination is not supported.
        ValueError: a value is not allowed.
    """
    ddp_config, model_config = model_chunks[0].ddp_config, model_chunks[0].config
    refuse_unsupported(config, ddp_config)
    check_adam_values(
        lr=config.lr,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
    )
    _check_distributed_optimizer(config, model_chunks)
    refuse_qk_clip(model_config)
    if config.overlap_param_gather_with_optimizer_step:
        refuse_early_gather(ddp_config)
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
        refuse_overlapped_sums(
            distributed_optimizer=ddp_config.use_distributed_optimizer,
            overlap_grad_reduce=ddp_config.overlap_grad_reduce,
            per_token_loss=getattr(model_config, "calculate_per_token_loss", False),
            fp32_accumulation=ddp_config.reduce_scatter_with_fp32_accumulation,
            single_phase=options.single_phase,
        )
    offload_config(config)
    check_writable(options.manifest)


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


def check_groups(
    groups: ProcessGroupCollection,
    config: OptimizerConfig,
    options: AdamMiniConfig,
    model_chunks: Sequence[Any],
) -> None:
    """Check that a caller's process groups have those that this run needs.

    Raises:
        ValueError: names all that are missing.
    """
    of_model = getattr(model_chunks[0], "config", None)
    expert_tp_size = getattr(of_model, "expert_tensor_parallel_size", None)
    tp_size = getattr(of_model, "tensor_model_parallel_size", None)
    refuse_missing_groups(
        groups,
        experts=has_experts(model_chunks),
        expert_tp=expert_tp_size is not None and expert_tp_size != tp_size,
        distributed_optimizer=config.use_distributed_optimizer,
        instances=model_chunks[0].ddp_config.num_distributed_optimizer_instances,
        buckets=options.checkpoint_format == BUCKETS,
    )


def has_experts(model_chunks: Sequence[Any]) -> bool:
    """Return whether the model has experts: the same on all ranks, also where a stage has none."""
    return any(
        getattr(getattr(chunk, "config", None), "num_moe_experts", None)
        or chunk.expert_parallel_buffers
        for chunk in model_chunks
    )


def check_overrides(model_chunks: Sequence[Any], overrides: Mapping[Any, Any] | None) -> None:
    """Check that the overrides of each parameter fit together, before all ranks exchange groups.

    Args:
        model_chunks: of the rank; others may have none of the parameters.
        overrides: what matches parameters -> values of their groups.

    Raises:
        ValueError: they do not; names the parameter and the reason.
    """
    for chunk in model_chunks:
        for name, param in chunk.named_parameters():
            if param.requires_grad:
                try:
                    compat.check_overrides(name, param, overrides or {})
                except (TypeError, ValueError) as error:
                    raise ValueError(
                        f"config_overrides of parameter {name!r} cannot be used: {error}. Remedy: "
                        "give all that match a parameter the same value of each field, a number, "
                        "text or tuple."
                    ) from error


def check_devices(params: Mapping[str, Parameter], device: torch.device) -> None:
    """Check that weights and gradients are on the current device, as kernels and NCCL use it.

    Args:
        params: of the rank, by name.
        device: the current one.

    Raises:
        ValueError: names the parameter and both devices.
    """
    for name, param in params.items():
        for kind, tensor in (("weight", param), ("gradient", getattr(param, "main_grad", None))):
            if tensor is not None and tensor.device != device:
                raise ValueError(
                    f"Adam-mini found the {kind} of {name!r} on {tensor.device}, while the current "
                    f"device is {device}. Remedy: call torch.cuda.set_device on this rank before "
                    "the model is made, and leave the model there."
                )
