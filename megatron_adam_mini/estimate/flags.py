"""Command line -> model and layout: Megatron's own flags, derived from the two dataclasses.

Imports ``config``, ``models`` and ``parallel``.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from megatron_adam_mini.config import OffloadConfig
from megatron_adam_mini.estimate.models import MODELS, Model
from megatron_adam_mini.estimate.parallel import Cluster, Parallel, flag

#: Flags of attributes that are true by default.
_NEGATED = {"add_bias_linear": "--disable-bias-linear"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of model and layout; only flags that are given become attributes."""
    group = parser.add_argument_group("model (flags of Megatron; they override those of --model)")
    group.add_argument("--model", choices=tuple(MODELS), help="a public model")
    _add_fields(group, Model)
    group = parser.add_argument_group("layout (flags of Megatron)")
    group.add_argument(
        "--world-size",
        type=int,
        default=argparse.SUPPRESS,
        metavar="N",
        help="all ranks, instead of --data-parallel-size",
    )
    _add_fields(group, Parallel)
    group = parser.add_argument_group("state in host memory (flags of Megatron)")
    group.add_argument("--optimizer-cpu-offload", action="store_true")
    group.add_argument("--optimizer-offload-fraction", type=float, default=1.0, metavar="PART")


def model_of(args: argparse.Namespace) -> Model:
    """Return the model that the flags describe.

    Raises:
        ValueError: flags are missing or inconsistent.
    """
    given = _given(args, Model)
    if args.model is not None:
        values = {**vars_of(MODELS[args.model]), **given}
        if "padded_vocab_size" in given and "vocab_size" not in given:
            values["vocab_size"] = None
    else:
        needed = ("num_layers", "hidden_size", "num_attention_heads")
        missing = [flag(name) for name in needed if name not in given]
        if missing:
            raise ValueError(
                f"The model is not described: {', '.join(missing)} missing. Give them, or --model "
                f"with one of {', '.join(MODELS)}."
            )
        values = given
    return Model(**values)


def parallel_of(args: argparse.Namespace) -> Parallel:
    """Return the layout that the flags describe.

    Raises:
        ValueError: sizes are inconsistent.
    """
    given = _given(args, Parallel)
    world_size: int | None = getattr(args, "world_size", None)
    if world_size is not None:
        if "data_parallel_size" in given:
            raise ValueError(
                "--world-size and --data-parallel-size say the same thing; give one of them."
            )
        rest = Parallel(
            tensor_model_parallel_size=given.get("tensor_model_parallel_size", 1),
            pipeline_model_parallel_size=given.get("pipeline_model_parallel_size", 1),
            context_parallel_size=given.get("context_parallel_size", 1),
        ).world_size
        if world_size < 1 or world_size % rest:
            raise ValueError(
                f"--world-size={world_size} is not a multiple of tensor x pipeline x context "
                f"parallel sizes = {rest}; choose one that is."
            )
        given["data_parallel_size"] = world_size // rest
    return Parallel(**given)


def offload_fraction_of(args: argparse.Namespace) -> float:
    """Return which part of the state the flags keep in host memory.

    Raises:
        ValueError: it is not in [0, 1].
    """
    if not args.optimizer_cpu_offload:
        return 0.0
    return OffloadConfig(fraction=args.optimizer_offload_fraction).fraction


def add_search_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the search of layouts."""
    group = parser.add_argument_group(
        "search of layouts (sizes that are given above stay; the others are tried)"
    )
    group.add_argument(
        "--gpu-memory",
        type=float,
        metavar="GB",
        help="list the layouts of --world-size GPUs with so much memory (80: 80 * 10^9 bytes) that "
        "fit with Adam and with Adam-mini; needs --seq-length and --global-batch-size",
    )
    group.add_argument("--gpus-per-node", type=int, default=8, metavar="N")
    group.add_argument("--seq-length", type=int, metavar="N")
    group.add_argument("--global-batch-size", type=int, metavar="N")
    group.add_argument("--plot", type=Path, metavar="FILE", help="draw the table as a PNG")


def cluster_of(args: argparse.Namespace) -> Cluster | None:
    """Return the cluster whose layouts the flags want to be searched, if they do.

    Raises:
        ValueError: flags are missing, or are given without a search.
    """
    needed = {
        "--world-size": getattr(args, "world_size", None),
        "--seq-length": args.seq_length,
        "--global-batch-size": args.global_batch_size,
    }
    if args.gpu_memory is None:
        given = [name for name in needed if name != "--world-size" and needed[name] is not None]
        given += ["--plot"] if args.plot is not None else []
        if given:
            raise ValueError(f"{', '.join(given)} belong to a search; add --gpu-memory GB.")
        return None
    missing = [name for name, value in needed.items() if value is None]
    if missing or hasattr(args, "data_parallel_size"):
        wrong = missing or ["--world-size instead of --data-parallel-size"]
        raise ValueError(f"--gpu-memory searches layouts of a cluster; give {', '.join(wrong)}.")
    return Cluster(
        gpu_memory=int(args.gpu_memory * 10**9),
        world_size=args.world_size,
        gpus_per_node=args.gpus_per_node,
        seq_length=args.seq_length,
        global_batch_size=args.global_batch_size,
    )


def fixed_sizes(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the flags say of the layout, by the fields of ``Parallel``."""
    return _given(args, Parallel)


def vars_of(description: Model | Parallel) -> dict[str, Any]:
    """Return the fields of a description, without cached values."""
    return {field.name: getattr(description, field.name) for field in fields(description)}


def _given(args: argparse.Namespace, kind: type[Model] | type[Parallel]) -> dict[str, Any]:
    present: Mapping[str, Any] = vars(args)
    return {f.name: present[f.name] for f in fields(kind) if f.name in present}


def _add_fields(group: Any, kind: type[Model] | type[Parallel]) -> None:
    hints = get_type_hints(kind)
    for field in fields(kind):
        name, hint = field.name, hints[field.name]
        (value_type,) = set(get_args(hint) or (hint,)) - {type(None)}
        if name in _NEGATED:
            group.add_argument(
                _NEGATED[name], dest=name, action="store_false", default=argparse.SUPPRESS
            )
        elif value_type is bool:
            group.add_argument(flag(name), action="store_true", default=argparse.SUPPRESS)
        else:
            group.add_argument(
                flag(name),
                type=value_type,
                default=argparse.SUPPRESS,
                metavar="N" if value_type is int else "NAME",
            )
