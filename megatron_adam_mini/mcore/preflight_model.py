"""Refuse models that Adam-mini does not support, at start-up and with the reason.

Imports ``partition`` and ``manifest``. ``param_info`` refuses single parameters by what they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_adam_mini.plan.manifest import MAX_UNKNOWN_SHARE
from megatron_adam_mini.plan.partition import ParameterBlocks, has_columns

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


def refuse_columns(parameters: Sequence[ParameterBlocks], config: Any, backend: Any) -> None:
    """Refuse one v per column where it has no meaning, or where kernels or layers cannot have it.

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


def refuse_unmeasurable(manifest: Mapping[str, Any]) -> None:
    """Check that there is a parameter whose second moments can be compared.

    Args:
        manifest: partition of the whole model.

    Raises:
        ValueError: all parameters have blocks.
    """
    if all(entry["rule"] != "element" for entry in manifest["parameters"]):
        raise ValueError(
            "--adam-mini-log-heterogeneity compares second moments within blocks, but no parameter "
            "of the model keeps one per element. Remedy: add --adam-mini-full-v '*', which trains "
            "as AdamW does, or a pattern for the parameters to compare."
        )


def _is_interleaved(config: Any) -> bool:
    """Return whether rows of gate and up alternate in the weights of experts."""
    return bool(
        getattr(config, "moe_mlp_glu_interleave_size", None)
        or getattr(config, "moe_shared_expert_glu_interleave_size", None)
    )
