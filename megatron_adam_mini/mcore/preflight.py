"""Refuse flags and configs that Adam-mini does not support, at start-up and with the reason.

Imports ``config``. The same tables are applied to command-line arguments, to ``OptimizerConfig``
and to the DDP config, whichever has the attribute. ``preflight_step`` refuses ways of taking a step
that exclude each other, ``preflight_model`` models, ``preflight_groups`` process groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_adam_mini.config import LEAN_WITHOUT_REMAINDERS

#: attribute -> (flag, why it is refused, what to do instead)
_REFUSED = {
    "use_megatron_fsdp": (
        "--use-megatron-fsdp",
        "its parameters are DTensors without buckets",
        "drop the flag and --ckpt-format fsdp_dtensor, and use --use-distributed-optimizer",
    ),
    "use_torch_fsdp2": (
        "--use-torch-fsdp2",
        "its parameters are DTensors without buckets",
        "drop the flag, and use --use-distributed-optimizer",
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
    if found:
        flag, reason, remedy = found[0]
        raise NotImplementedError(
            f"--optimizer adam_mini does not support --fp8-param-gather with {flag}: {reason}. "
            f"Remedy: {remedy}."
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
