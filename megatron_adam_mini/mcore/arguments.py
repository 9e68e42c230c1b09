"""Adam-mini's launch flags, next to Megatron's own.

Imports ``config``, ``partition_flags``, ``low_precision``, ``preflight`` and ``preflight_step``;
Megatron's parser is passed in.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from megatron_adam_mini.config import (
    BACKENDS,
    CHECKPOINT_FORMATS,
    LEAN_WITHOUT_REMAINDERS,
    AdamMiniConfig,
    OffloadConfig,
    check_adam_values,
)
from megatron_adam_mini.mcore.low_precision import dtype_name, storage_options
from megatron_adam_mini.mcore.preflight import (
    refuse_buckets,
    refuse_experts_in_format_torch,
    refuse_unsupported,
    refuse_with_fp8_weights,
)
from megatron_adam_mini.mcore.preflight_step import refuse_overlapped_sums, refuse_single_phase
from megatron_adam_mini.partition_flags import RUN_PREFIX, add_partition_flags, partition_config

OPTIMIZER = "adam_mini"


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add ``--optimizer adam_mini`` and ``--adam-mini-*`` to Megatron's parser.

    Raises:
        RuntimeError: the parser has no ``--optimizer`` with choices.
    """
    for action in parser._actions:
        if "--optimizer" in action.option_strings and action.choices is not None:
            action.choices = [*action.choices, OPTIMIZER]
            break
    else:
        raise RuntimeError(
            "Megatron's parser has no --optimizer with choices; this Megatron-Core release is not "
            "supported by megatron-adam-mini."
        )
    group = parser.add_argument_group(
        "Adam-mini", "options of --optimizer adam_mini (arXiv:2406.16793)"
    )
    add_partition_flags(group, prefix=RUN_PREFIX)
    group.add_argument(
        "--adam-mini-backend", choices=BACKENDS, default=AdamMiniConfig.backend, help="kernels"
    )
    group.add_argument(
        "--adam-mini-param-remainders",
        action="store_true",
        help="store 16 bits per parameter that complete the bf16 weight to the fp32 main "
        "parameter, instead of 32: the same training bit for bit, 2 bytes less",
    )
    group.add_argument(
        "--adam-mini-stochastic-rounding",
        action="store_true",
        help="with --exp-avg-dtype bf16 (Megatron's flag): round m stochastically",
    )
    group.add_argument(
        "--adam-mini-lean",
        action="store_true",
        help="the smallest state that is recommended: --adam-mini-param-remainders "
        "--exp-avg-dtype bf16 --adam-mini-stochastic-rounding; needs --bf16",
    )
    group.add_argument(
        "--adam-mini-single-phase",
        action="store_true",
        help="with --clip-grad 0 and without a loss scale: read each gradient once per step; the "
        "gradient norm is then logged as 0, as Megatron does without clipping, and non-finite "
        "gradients do not skip the step",
    )
    group.add_argument(
        "--adam-mini-overlap-block-sums",
        action="store_true",
        help="with --overlap-grad-reduce: take the sums of squares of each bucket on a stream of "
        "their own as soon as it is reduced, while the backward pass runs on; the same training "
        "bit for bit; never timed on a GPU",
    )
    group.add_argument(
        "--adam-mini-manifest", metavar="FILE", help="write the partition of the model as JSON"
    )
    group.add_argument(
        "--adam-mini-convert-partition",
        action="store_true",
        help="load a checkpoint with finer blocks by averaging v over this run's, which is exact",
    )
    group.add_argument(
        "--adam-mini-checkpoint-format",
        choices=CHECKPOINT_FORMATS,
        default=AdamMiniConfig.checkpoint_format,
        help="how checkpoints store the state: model_space loads under any parallel layout, "
        "buckets (of the distributed optimizer) under another data-parallel size only; what is "
        "loaded can have either format",
    )
    group.add_argument(
        "--adam-mini-no-file-check",
        dest="adam_mini_check_files",
        action="store_false",
        help="load a checkpoint without reading it once before to check its checksums",
    )
    group.add_argument(
        "--adam-mini-log-updates-interval",
        type=int,
        default=AdamMiniConfig.log_updates_interval,
        metavar="ITERATIONS",
        help="write to TensorBoard and Weights & Biases, every so many iterations, how large "
        "updates are beside weights and the range of v, by kind of parameter; 0: never",
    )
    group.add_argument(
        "--adam-mini-log-heterogeneity",
        type=int,
        default=AdamMiniConfig.log_heterogeneity,
        metavar="ITERATIONS",
        help="with --adam-mini-full-v '*': print and log, every so many iterations, how unlike v "
        "is within the blocks that each rule would make of each parameter; 0: never",
    )
    return parser


def config_from_args(args: argparse.Namespace) -> AdamMiniConfig:
    """Return the options that the flags select.

    Raises:
        ValueError: a value is not allowed.
        NotImplementedError: state cannot be stored as asked.
    """
    options = replace(
        partition_config(args, prefix=RUN_PREFIX),
        backend=args.adam_mini_backend,
        exp_avg_dtype=dtype_name(args.exp_avg_dtype),
        stochastic_rounding=args.adam_mini_stochastic_rounding,
        param_remainders=args.adam_mini_param_remainders,
        lean=args.adam_mini_lean,
        single_phase=args.adam_mini_single_phase,
        overlap_block_sums=args.adam_mini_overlap_block_sums,
        manifest=args.adam_mini_manifest,
        convert_partition=args.adam_mini_convert_partition,
        checkpoint_format=args.adam_mini_checkpoint_format,
        check_files=args.adam_mini_check_files,
        log_updates_interval=args.adam_mini_log_updates_interval,
        log_heterogeneity=args.adam_mini_log_heterogeneity,
    )
    # The variable of ``unattached`` has no flags of weights.
    return storage_options(args, options, fp8_weights=getattr(args, "fp8_param_gather", False))


def offload_config(source: Any) -> OffloadConfig:
    """Return what Megatron's arguments, or its ``OptimizerConfig``, say of CPU offload.

    Raises:
        ValueError: the fraction is not allowed.
    """
    if not source.optimizer_cpu_offload:
        return OffloadConfig()
    return OffloadConfig(
        fraction=source.optimizer_offload_fraction,
        overlap=source.overlap_cpu_optimizer_d2h_h2d,
        pin_grads=source.pin_cpu_grads,
        pin_weights=source.pin_cpu_params,
    )


def check_arguments(args: argparse.Namespace) -> None:
    """Check what ``--optimizer adam_mini`` cannot be combined with, before Megatron's own checks.

    Raises:
        ValueError: a value is not allowed.
        NotImplementedError: a combination is not supported.
    """
    refuse_unsupported(args)
    options = config_from_args(args)
    if args.fp8_param_gather:
        refuse_with_fp8_weights(args, param_remainders=options.param_remainders)
    if options.param_remainders and not args.bf16:
        flag = "--adam-mini-lean" if args.adam_mini_lean else "--adam-mini-param-remainders"
        raise ValueError(
            f"{flag} needs --bf16: 16 bits complete a bfloat16 weight to its float32 main "
            "parameter, and no other type. Train in bfloat16, or drop it; "
            f"{LEAN_WITHOUT_REMAINDERS} saves memory with any weights."
        )
    if args.adam_mini_checkpoint_format == "buckets":
        refuse_buckets(
            distributed_optimizer=args.use_distributed_optimizer,
            fully_reshardable=args.dist_ckpt_optim_fully_reshardable,
        )
    if args.adam_mini_single_phase:
        refuse_single_phase(
            args.clip_grad,
            loss_scaled=bool(args.fp16 or args.loss_scale),
            cpu_offload=args.optimizer_cpu_offload,
        )
    if args.adam_mini_overlap_block_sums:
        refuse_overlapped_sums(
            distributed_optimizer=args.use_distributed_optimizer,
            overlap_grad_reduce=args.overlap_grad_reduce,
            per_token_loss=args.calculate_per_token_loss,
            fp32_accumulation=args.ddp_reduce_scatter_with_fp32_accumulation,
            single_phase=args.adam_mini_single_phase,
        )
    offload_config(args)
    check_adam_values(
        lr=args.lr,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_eps,
        weight_decay=args.weight_decay,
    )
    _check_checkpoints(args)


def _check_checkpoints(args: argparse.Namespace) -> None:
    """Check that the run can save and load the state as asked; errors as above."""
    saves = args.save and not args.no_save_optim
    loads = args.load and not (args.no_load_optim or args.finetune)
    if (saves or loads) and args.ckpt_format not in ("torch_dist", "torch"):
        raise NotImplementedError(
            f"--optimizer adam_mini does not support --ckpt-format {args.ckpt_format}: its state "
            "is saved by every rank in torch_dist checkpoints, or per model-parallel part in "
            "format torch. Remedy: --ckpt-format torch_dist, or --no-save-optim and "
            "--no-load-optim."
        )
    experts = bool(args.num_experts and args.use_distributed_optimizer)
    if (saves or loads) and args.ckpt_format == "torch" and experts:
        tp_size = args.tensor_model_parallel_size
        refuse_experts_in_format_torch(
            tp_size=tp_size, expert_tp_size=args.expert_tensor_parallel_size or tp_size
        )
    if saves and args.non_persistent_ckpt_type is not None:
        raise NotImplementedError(
            "--optimizer adam_mini does not support --non-persistent-ckpt-type yet. Remedy: drop "
            "the flag."
        )


def refuse_stray_options(args: argparse.Namespace, options: dict[str, tuple[str, Any]]) -> None:
    """Refuse ``--adam-mini-*`` flags that another optimizer would silently ignore.

    Args:
        args: parsed arguments.
        options: flag and default of each of Adam-mini's arguments, by name.

    Raises:
        ValueError: names the flags.
    """
    stray = [
        flag for name, (flag, default) in options.items() if getattr(args, name, default) != default
    ]
    if stray:
        raise ValueError(
            f"{', '.join(stray)} need --optimizer adam_mini, but --optimizer is {args.optimizer!r}."
        )
