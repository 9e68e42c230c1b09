"""Refuse combinations that Adam-mini does not support, at start-up and with the reason.

Imports ``partition`` and ``manifest``. The same table is applied to command-line arguments,
to ``OptimizerConfig`` and to the DDP config, whichever has the attribute.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_adam_mini.config import LEAN_WITHOUT_REMAINDERS
from megatron_adam_mini.plan.manifest import MAX_UNKNOWN_SHARE
from megatron_adam_mini.plan.partition import ParameterBlocks, has_columns

#: attribute -> (flag, why it is refused, what to do instead)
_REFUSED = {
    "use_megatron_fsdp": (
        "--use-megatron-fsdp",
        "its parameters are DTensors without buckets",
        "use --use-distributed-optimizer",
    ),
    "use_torch_fsdp2": (
        "--use-torch-fsdp2",
        "its parameters are DTensors without buckets",
        "use --use-distributed-optimizer",
    ),
    "use_layer_wise_distributed_optimizer": (
        "--use-layer-wise-distributed-optimizer",
        "it assigns whole parameters to ranks, while Adam-mini shards flat buckets",
        "use --use-distributed-optimizer",
    ),
    "use_torch_optimizer_for_cpu_offload": (
        "--use-torch-optimizer-for-cpu-offload",
        "it selects torch's Adam",
        "drop the flag: --optimizer-cpu-offload updates with Adam-mini's own kernels",
    ),
    "optimizer_cuda_graph": (
        "--optimizer-cuda-graph",
        "Megatron calls step() while it captures it, and never again: what it returned then, the "
        "count of steps and the learning rates would hold for all later steps",
        "drop the flag",
    ),
    "fp4_param_gather": (
        "--fp4-param-gather",
        "its weights lie two to a byte, so that positions of weights and gradients differ",
        "drop the flag",
    ),
    "reuse_grad_buf_for_mxfp8_param_ag": (
        "--reuse-grad-buf-for-mxfp8-param-ag",
        "its weights are gathered in bfloat16 through the memory of the gradients",
        "drop the flag, and use another --fp8-recipe or drop --fp8-param-gather",
    ),
    "param_name_patterns_for_fp32_local_accumulation": (
        "--ddp-param-name-patterns-for-fp32-local-accumulation",
        "its gradients lie outside the bucket",
        "use --accumulate-allreduce-grads-in-fp32",
    ),
    "dump_param_to_param_group_map": (
        "--dump-param-to-param-group-map",
        "it describes Megatron's own optimizers",
        "use --adam-mini-manifest",
    ),
    "mtp_detach_heads": (
        "--mtp-detach-heads",
        "it clips the heads of multi-token prediction by a gradient norm of their own",
        "drop the flag",
    ),
}


def refuse_unsupported(*sources: Any) -> None:
    """Check arguments or configs against the table of unsupported options.

    Args:
        sources: namespaces or dataclasses; missing attributes are skipped.

    Raises:
        NotImplementedError: names the flag, the reason and the remedy.
    """
    for source in sources:
        for attribute, (flag, reason, remedy) in _REFUSED.items():
            # Megatron's arguments prefix some options of its DDP config with "ddp_".
            if getattr(source, attribute, None) or getattr(source, f"ddp_{attribute}", None):
                raise NotImplementedError(
                    f"--optimizer adam_mini does not support {flag}: {reason}. Remedy: {remedy}."
                )


#: attribute -> (flag, why it is refused with --fp8-param-gather)
_REFUSED_WITH_FP8 = {
    "optimizer_cpu_offload": (
        "--optimizer-cpu-offload",
        "a weight is quantized as a whole, from main parameters on the device",
    ),
    "overlap_param_gather_with_optimizer_step": (
        "--overlap-param-gather-with-optimizer-step",
        "all weights are quantized at once, after the step",
    ),
    "qk_clip": ("--qk-clip", "it scales rows of weights, layer by layer"),
}


def refuse_with_fp8_weights(*sources: Any, param_remainders: bool) -> None:
    """Check what cannot be combined with weights that are quantized from main parameters.

    Args:
        sources: of a run with such weights; see :func:`refuse_unsupported`.
        param_remainders: whether 16-bit remainders are to complete the weights.

    Raises:
        NotImplementedError: names the flag, the reason and the remedy.
    """
    found = [
        (*row, "drop one of the two")
        for attribute, row in _REFUSED_WITH_FP8.items()
        if any(getattr(source, attribute, None) for source in sources)
    ]
    if param_remainders:
        flag = "16-bit remainders (--adam-mini-param-remainders, --adam-mini-lean)"
        remedy = f"drop one of the two; {LEAN_WITHOUT_REMAINDERS} saves memory with any weights"
        found.append((flag, "they complete bfloat16 weights", remedy))
    if not all(getattr(source, "use_distributed_optimizer", True) for source in sources):
        flag, remedy = "state that is not distributed", "add --use-distributed-optimizer"
        found.append((flag, "weights are quantized from the main parameters of buckets", remedy))
    for flag, reason, remedy in found:
        raise NotImplementedError(
            f"--optimizer adam_mini does not support --fp8-param-gather with {flag}: {reason}. "
            f"Remedy: {remedy}."
        )


#: What is refused, why, and what to do instead; ``plan.manifest.unknown_problem`` finds it.
UNKNOWN_WEIGHTS = (
    f"weights of unknown names above {100 * MAX_UNKNOWN_SHARE:.0f} % of the trained elements",
    "they would keep one second moment per element, Adam's whole state",
    "a rule for them (--adam-mini-rules), or --adam-mini-full-v with their names to accept it",
)

#: The same for one kind of model.
MIMO = (
    "MIMO models (megatron.core.models.mimo)",
    "each of their modules has an optimizer of its own, on ranks of its own, while Adam-mini's "
    "ranks all agree on one plan and save one state",
    "train a LLaVAModel, or use --optimizer adam",
)


def refuse_mimo() -> None:
    """Refuse a model whose modules have an optimizer each.

    Raises:
        NotImplementedError: always.
    """
    what, reason, remedy = MIMO
    raise NotImplementedError(
        f"--optimizer adam_mini does not support {what}: {reason}. Remedy: {remedy}."
    )


def refuse_qk_clip(config: Any) -> None:
    """Check that a model's Query and Key rows can be clipped where they are.

    Args:
        config: of the model.

    Raises:
        NotImplementedError: a Key row serves heads of several tensor-parallel ranks.
    """
    if not getattr(config, "qk_clip", False) or getattr(config, "multi_latent_attention", False):
        return
    groups, tp_size = config.num_query_groups, config.tensor_model_parallel_size
    if groups < tp_size:
        raise NotImplementedError(
            f"--optimizer adam_mini does not support --qk-clip with --num-query-groups {groups} "
            f"and --tensor-model-parallel-size {tp_size}: several ranks share the rows of a Key, "
            "and would scale them differently. Remedy: a tensor-parallel size of at most "
            f"{groups}, or drop --qk-clip."
        )


def refuse_keywords(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Check keyword arguments that this package does not read.

    Args:
        given: keyword arguments of the caller. ``None`` and Megatron's defaults are accepted.
        defaults: Megatron's defaults, by keyword.

    Raises:
        NotImplementedError: names what would be ignored.
    """
    ignored = [
        f"{name}={value!r}"
        for name, value in given.items()
        if value is not None and (name not in defaults or value != defaults[name])
    ]
    if ignored:
        raise NotImplementedError(
            f"--optimizer adam_mini does not support {', '.join(ignored)}, which it was given and "
            "does not know. Remedy: leave it out, or use a release of Megatron-Core that Adam-mini "
            "was tested with."
        )


def refuse_columns(parameters: Sequence[ParameterBlocks], config: Any, backend: Any) -> None:
    """Refuse one v per column where it has no meaning, or where this release cannot have it.

    Args:
        parameters: of the rank.
        config: of the model.
        backend: module of the kernels.

    Raises:
        NotImplementedError: names the parameter, or the setting.
    """
    found = [blocks for blocks in parameters if blocks.num_column_sets]
    if not found:
        return
    if not hasattr(backend, "update_columns_"):
        raise NotImplementedError(
            f"Parameter {found[0].info.name!r} has one v per column, which the kernels "
            f"{backend.NAME!r} do not have. Remedy: --adam-mini-backend reference (plain torch), "
            "or --adam-mini-preset row."
        )
    for blocks in found:
        info = blocks.info
        if not has_columns(info):
            raise NotImplementedError(
                f"Parameter {info.name!r} of shape {info.global_shape} (role {info.role!r}) cannot "
                "have one v per column: columns are those of one matrix of two dimensions. Give it "
                "the rule 'row'."
            )
        if info.num_stacked > 1 and _is_interleaved(config):
            raise NotImplementedError(
                f"Parameter {info.name!r} cannot have one v per column: with "
                "--moe-mlp-glu-interleave-size, rows of gate and up alternate in it. Drop that "
                "flag, or give the parameter the rule 'row'."
            )


def refuse_measuring(parameters: Sequence[ParameterBlocks], config: Any) -> None:
    """Refuse to compare second moments within parts of a weight that are not where they should be.

    Args:
        parameters: of the rank.
        config: of the model.

    Raises:
        NotImplementedError: names the parameter.
    """
    for blocks in parameters:
        if blocks.pattern is None and blocks.info.num_stacked > 1 and _is_interleaved(config):
            raise NotImplementedError(
                "--adam-mini-log-heterogeneity compares gate and up apart, but with "
                "--moe-mlp-glu-interleave-size their rows alternate in parameter "
                f"{blocks.info.name!r}. Drop one of the two flags, or measure other parameters "
                "only (--adam-mini-full-v)."
            )


def _is_interleaved(config: Any) -> bool:
    """Return whether rows of gate and up alternate in the weights of experts."""
    return bool(
        getattr(config, "moe_mlp_glu_interleave_size", None)
        or getattr(config, "moe_shared_expert_glu_interleave_size", None)
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


def refuse_buckets(*, distributed_optimizer: bool, fully_reshardable: bool = False) -> None:
    """Check that a run can save flat buckets, and was not asked for the opposite.

    Args:
        distributed_optimizer: whether the run has buckets.
        fully_reshardable: whether Megatron's flag asks for a format that loads anywhere.

    Raises:
        ValueError: it cannot, or was.
    """
    if not distributed_optimizer:
        raise ValueError(
            "--adam-mini-checkpoint-format buckets needs --use-distributed-optimizer, whose "
            "buckets it saves. Remedy: add that flag, or save as model_space (the default)."
        )
    if fully_reshardable:
        raise ValueError(
            "--adam-mini-checkpoint-format buckets and --dist-ckpt-optim-fully-reshardable "
            "contradict each other: buckets load under another data-parallel size only. Remedy: "
            "drop one of them; model_space (the default) loads under any layout."
        )


def refuse_experts_in_format_torch(*, tp_size: int, expert_tp_size: int) -> None:
    """Check that checkpoints of format ``torch`` can hold experts.

    Args:
        tp_size: tensor-parallel ranks.
        expert_tp_size: those of experts.

    Raises:
        NotImplementedError: they cannot.
    """
    if expert_tp_size != tp_size:
        raise NotImplementedError(
            "Checkpoints of format torch have a file for each tensor-parallel rank, but this "
            f"run has {tp_size} of them and {expert_tp_size} for experts. Remedy: --ckpt-format "
            f"torch_dist, or --expert-tensor-parallel-size {tp_size}."
        )


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
