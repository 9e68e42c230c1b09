"""Megatron model chunks -> facts about every trainable parameter.

Imports megatron.core, ``compat``, ``quantized`` and ``partition``. Data flow: model chunks ->
**ParameterInfo** -> partition.

The role of a parameter follows from its name, its number of dimensions and the config of its
module, never from its shape. Names that ``plan/roles`` does not list have the role ``unknown``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.module import param_is_not_shared
from torch.distributed import ProcessGroup
from torch.nn import Module, Parameter

from megatron_adam_mini.mcore import compat
from megatron_adam_mini.mcore.quantized import is_quantized, refusal
from megatron_adam_mini.plan.parameter_info import HeadGeometry, ParameterInfo, num_stacked

_WORD_EMBEDDINGS = "embedding.word_embeddings.weight"
_SOFTMAX_OFFSET = ".core_attention.softmax_offset"
_LAYER = re.compile(r"layers\.\d+$")
#: A local expert's number in the name of its parameter: SequentialMLP, grouped GEMM.
_SEQUENTIAL = re.compile(r"(?<=\.experts\.local_experts\.)(\d+)(?=\.)")
_GROUPED = re.compile(r"(?<=\.experts\.)(\w+)\.(weight|bias)(\d+)$")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def collect_parameters(
    model_chunks: Sequence[Module], *, tp_group: ProcessGroup, expert_tp_group: ProcessGroup
) -> dict[Parameter, ParameterInfo]:
    """Describe every trainable parameter of a rank's model chunks.

    The key is the parameter itself: with virtual pipeline stages, chunks use the same names.

    Args:
        model_chunks: DDP-wrapped chunks.
        tp_group: tensor-parallel group of dense parameters.
        expert_tp_group: that of experts.

    Raises:
        NotImplementedError: a parameter is not supported; names it.
    """
    found: dict[Parameter, ParameterInfo] = {}
    for chunk in model_chunks:
        renamed, stored = _global_prefixes(chunk), _stored_prefixes(chunk)
        modules = dict(chunk.named_modules())
        for local_name, param in _names_in_checkpoints(chunk):
            if not param.requires_grad or param in found:
                continue
            name, key = _names(local_name, param, modules, renamed, stored)
            config = _nearest_config(local_name, modules)
            found[param] = _describe(name, key, param, config, tp_group, expert_tp_group)
    return found


def frozen_keys(model_chunks: Sequence[Module]) -> list[str]:
    """Return the checkpoint keys of a rank's parameters that are not trained."""
    found = []
    for chunk in model_chunks:
        renamed, stored = _global_prefixes(chunk), _stored_prefixes(chunk)
        modules = dict(chunk.named_modules())
        found += [
            _names(local_name, param, modules, renamed, stored)[1]
            for local_name, param in _names_in_checkpoints(chunk)
            if not param.requires_grad
        ]
    return found


def _names_in_checkpoints(chunk: Module) -> Iterable[tuple[str, Parameter]]:
    """Return parameters with the last of their names: T5 knows some of its modules under two.

    Megatron stores such weights under both, and all optimizer state under the last.
    """
    last = {param: name for name, param in chunk.named_parameters(remove_duplicate=False)}
    return [(name, param) for param, name in last.items()]


def _describe(
    name: str,
    key: str,
    param: Parameter,
    config: Any,
    tp_group: ProcessGroup,
    expert_tp_group: ProcessGroup,
) -> ParameterInfo:
    _refuse_unsupported(name, param)
    expert = not getattr(param, "allreduce", True)
    group = expert_tp_group if expert else tp_group
    split_dim: int | None = None
    if getattr(param, "tensor_model_parallel", False):
        split_dim = int(param.partition_dim)  # type: ignore[attr-defined]
    # Megatron splits these by heads and does not mark them, so that its norm misses those of all
    # tensor-parallel ranks but the first. Ours must not depend on the layout.
    unmarked = split_dim is None and name.endswith(_SOFTMAX_OFFSET)
    return ParameterInfo.of(
        name,
        tuple(param.shape),
        lambda role: HeadGeometry.of(config, role),
        key=key,
        num_stacked=num_stacked(name, gated=bool(getattr(config, "gated_linear_unit", False))),
        tp_dim=0 if unmarked else split_dim,
        tp_size=group.size(),
        tp_rank=group.rank(),
        expert=expert,
        in_norm=param_is_not_shared(param)
        and (unmarked or compat.is_not_tp_duplicate(param, tp_group, expert_tp_group)),
    )


def _refuse_unsupported(name: str, param: Parameter) -> None:
    if is_quantized(param):
        if reason := refusal(param):
            raise NotImplementedError(f"Parameter {name!r} {reason}")
    elif type(param.data) is not torch.Tensor or param.dtype not in _FLOATS:
        raise NotImplementedError(
            f"Parameter {name!r} is a {type(param.data).__name__} of {param.dtype}; Adam-mini "
            "updates plain float32, bfloat16 and float16 parameters, and quantized ones that "
            "Megatron-Core knows as Transformer Engine's. Train without quantized parameters."
        )
    if compat.has_norm_of_its_own(param):
        raise NotImplementedError(
            f"Parameter {name!r} has a gradient norm of its own ({param.grad_norm_group!r}), as "  # type: ignore[attr-defined]
            "--mtp-detach-heads makes it, while Adam-mini has one norm for all parameters. Train "
            "without --mtp-detach-heads."
        )
    if compat.is_sharded_by_gtp(param):
        raise NotImplementedError(
            f"Parameter {name!r} is sharded by generalized tensor parallelism, which is not "
            "supported. Set its weight-remat sizes to 1."
        )


def _global_prefixes(chunk: Module) -> dict[str, str]:
    """Map each layer's local prefix to the one with the global layer number."""
    renamed = {}
    for name, module in chunk.named_modules():
        number = getattr(module, "layer_number", None)
        if isinstance(number, int) and _LAYER.search(name):
            renamed[name + "."] = _LAYER.sub(f"layers.{number - 1}", name) + "."
    return renamed


def _stored_prefixes(chunk: Module) -> dict[str, str]:
    """Map prefixes of parameter names to the prefixes in checkpoints.

    Megatron's layers declare this, so its own implementation and Transformer Engine's, whose
    linear layers include the preceding norm, write the same keys.
    """
    return {
        f"{name}.{old}": f"{name}.{new}"
        for name, module in chunk.named_modules()
        for old, new in compat.stored_prefixes(module).items()
    }


def _replace_prefix(name: str, replacements: dict[str, str]) -> str:
    for prefix, replacement in replacements.items():
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return name


def _global_name(name: str, renamed: dict[str, str]) -> str:
    name = _replace_prefix(name, renamed)
    while name.startswith("module."):  # DDP and Float16Module
        name = name.removeprefix("module.")
    return name


def _names(
    local_name: str,
    param: Parameter,
    modules: dict[str, Module],
    renamed: dict[str, str],
    stored: dict[str, str],
) -> tuple[str, str]:
    """Return a parameter's name in the whole model, and its key in checkpoints.

    Copies of an embedding that pipeline stages share have the name of the embedding: with another
    rule they would drift apart. Numbers of experts count over all expert-parallel ranks. Keys are
    those that Megatron gives experts whatever their implementation,
    ``...mlp.experts.experts.<number>.linear_fc1.weight``.
    """
    if getattr(param, "shared_embedding", False):
        local_name = _embedding_of(local_name, modules)
    name = _global_name(local_name, renamed)
    key = local_name
    for prefix in sorted(stored, key=len, reverse=True):  # inner modules first
        key = _replace_prefix(key, {prefix: stored[prefix]})
    key = _global_name(key, renamed)
    path, experts, _ = local_name.rpartition(".experts.")
    if not experts:
        return name, key
    module: Any = modules[path + ".experts"]
    first = 0
    if hasattr(module, "ep_group"):
        first = module.ep_group.rank() * module.num_local_experts

    def number(local: str) -> int:
        return first + int(local)

    name = _SEQUENTIAL.sub(lambda m: f"{number(m[1])}", name)
    name = _GROUPED.sub(lambda m: f"{m[1]}.{m[2]}{number(m[3])}", name)
    key = re.sub(r"(?<=\.experts\.)local_(?=experts\.\d)", "", key)
    key = re.sub(r"(?<=\.experts\.experts\.)\d+", lambda m: f"{number(m[0])}", key)
    key = _GROUPED.sub(lambda m: f"experts.{number(m[3])}.{m[1]}.{m[2]}", key)
    return name, key


def _embedding_of(local_name: str, modules: dict[str, Module]) -> str:
    """Return the name of the embedding of the language model that has a parameter."""
    path = local_name
    while path:
        path = path.rpartition(".")[0]
        if isinstance(modules[path], LanguageModule):
            break
    return f"{path}.{_WORD_EMBEDDINGS}".lstrip(".")


def _nearest_config(name: str, modules: dict[str, Module]) -> Any:
    """Return the config of the innermost module around a parameter that has attention heads."""
    path = name.rpartition(".")[0]
    while path:
        config = getattr(modules.get(path), "config", None)
        if getattr(config, "num_attention_heads", None) is not None:
            return config
        path = path.rpartition(".")[0]
    return None
