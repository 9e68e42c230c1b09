"""Parameter groups -> the blocks of each parameter, checked.

Imports torch, ``config``, ``plan`` and the modules before it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

from megatron_adam_mini.config import AdamMiniConfig
from megatron_adam_mini.plan.partition import unmatched_patterns
from megatron_adam_mini.standalone.blocks import Blocks, Heads, check_head_dims, partition
from megatron_adam_mini.standalone.mesh_rows import check_placements
from megatron_adam_mini.standalone.names import bare, weights_of

logger = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: FSDP1's flat parameters, or views of them, have lost their shape.
_FLAT = ("_fsdp_wrapped_module", "_flat_param")


def partition_groups(
    param_groups: Sequence[Mapping[str, Any]], config: AdamMiniConfig
) -> dict[Tensor, Blocks]:
    """Partition all parameters of an optimizer.

    Args:
        param_groups: torch's, with ``param_names``, and ``num_heads``, ``num_query_groups`` and
            ``head_dim`` for each group.
        config: rules.

    Raises:
        ValueError: names are missing or not unique, heads do not fit.
        TypeError: a dtype that kernels do not have.
        NotImplementedError: a layout in which blocks cannot be completed.
    """
    named = dict(_named(param_groups))
    shapes = {name: tuple(param.shape) for name, (param, _) in named.items()}
    weights = weights_of(shapes)
    blocks = {
        name: partition(name, shapes[name], weights[name], heads, config)
        for name, (_, heads) in named.items()
    }
    check_head_dims(blocks, weights, {name: heads for name, (_, heads) in named.items()})
    return {param: blocks[name] for name, (param, _) in named.items()}


def _named(
    param_groups: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[str, tuple[Tensor, Heads]]]:
    seen = set()
    for group in param_groups:
        names = group.get("param_names", ())
        if len(names) != len(group["params"]):
            raise ValueError(
                f"AdamMini got {len(group['params'])} parameters and {len(names)} names in a "
                "group; it must know the names of all. Remedy: AdamMini(model.named_parameters(), "
                "...), or groups with 'params': [(name, parameter), ...]."
            )
        heads = Heads(*(group[key] for key in ("num_heads", "num_query_groups", "head_dim")))
        for name, param in zip(map(bare, names), group["params"], strict=True):
            if name in seen:
                raise ValueError(
                    f"Two parameters are called {name!r}; names must be unique. Remedy: one "
                    "optimizer for each model, or a prefix to the names."
                )
            seen.add(name)
            if param.is_floating_point() or param.is_complex():
                _check(name, param)
                yield name, (param, heads)


def is_trained(param: Tensor) -> bool:
    """Return whether a step may update a parameter; as in AdamW, a frozen one with a gradient."""
    return param.requires_grad or param.grad is not None


def _check(name: str, param: Tensor) -> None:
    if any(part in name for part in _FLAT):
        raise NotImplementedError(
            f"Parameter {name!r} is flattened by FullyShardedDataParallel, so its rows are not "
            "known. Remedy: torch.distributed.fsdp.fully_shard (FSDP2)."
        )
    if param.dtype not in _DTYPES and is_trained(param):
        raise TypeError(
            f"Parameter {name!r} has dtype {param.dtype}; AdamMini allows "
            f"{', '.join(map(str, _DTYPES))}. Remedy: param.float(), or another optimizer for it."
        )
    check_placements(name, param)


def matched_patterns(blocks: Mapping[Tensor, Blocks], config: AdamMiniConfig) -> frozenset[str]:
    """Return the patterns of the config that match a parameter."""
    unmatched = unmatched_patterns([made.name for made in blocks.values()], config)
    return frozenset(pattern for pattern, _ in config.overrides()) - frozenset(unmatched)


def refuse_unmatched(blocks: Mapping[Tensor, Blocks], config: AdamMiniConfig) -> None:
    """Refuse rules that match nothing; if other ranks may hold other parameters, list them.

    Another pipeline stage may have what a rule is for, and an error on one rank alone would leave
    the others waiting.

    Raises:
        ValueError: on all ranks.
    """
    names = [made.name for made in blocks.values()]
    if not (unmatched := unmatched_patterns(names, config)):
        return
    text = (
        f"Adam-mini rules for {', '.join(map(repr, unmatched))} match no parameter; there are "
        f"{', '.join(names[:8])}, ..."
    )
    world = distributed.get_world_size() if distributed.is_initialized() else 1
    if all(world == (p.device_mesh.size() if isinstance(p, DTensor) else 1) for p in blocks):
        raise ValueError(f"{text} Remedy: patterns that match, one of them for each.")
    logger.warning(
        f"{text} That is right if they are for another pipeline stage; "
        "AdamMini(..., process_group=torch.distributed.group.WORLD) finds out."
    )


def warn_of_unknown(blocks: Mapping[Tensor, Blocks], config: AdamMiniConfig) -> None:
    """List the trained parameters that have a full v only because nothing else is known of them."""
    chosen = [pattern for pattern, rule in config.overrides() if rule == "element"]
    names = [
        made.name
        for param, made in blocks.items()
        if param.requires_grad
        and not made.known
        and not any(fnmatchcase(made.name, pattern) for pattern in chosen)
    ]
    if names and all(_is_first(param) for param in blocks):
        logger.warning(
            f"Adam-mini keeps one second moment per element, as AdamW does, for {len(names)} "
            f"parameters that it does not know: {', '.join(names)}. Give rules={{pattern: rule}} "
            "to change that; rules={'*': 'tensor'} is the paper's choice for models that are no "
            "Transformers."
        )


def _is_first(param: Tensor) -> bool:
    """Return whether no other rank holds a parameter, as far as is known, that would say the same.

    Plain tensors may be replicas, or stages of a pipeline.
    """
    return not isinstance(param, DTensor) or not any(param.device_mesh.get_coordinate() or ())
