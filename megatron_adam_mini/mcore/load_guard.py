"""Find a damaged or hostile checkpoint before anything is loaded, and raise on every rank.

Imports ``checkpoint`` (readers that check checksums and run no code) and torch.distributed. Wraps
three functions of ``megatron.core.dist_checkpointing``: ``load``, for loads that Adam-mini
requested, and the two that read the common state before it, ``load_common_state_dict`` and
``load_content_metadata``.

Without it, torch reads a flipped bit without notice, reports a truncated file without its name,
and raises on one rank only, while the others wait for it in their next collective. And it
unpickles ``.metadata`` and every entry that is not a tensor, which can run any code.
"""

from __future__ import annotations

import functools
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from torch import distributed

from megatron_adam_mini.agreement import on_all_ranks
from megatron_adam_mini.checkpoint.chunks import ChunkReader, StoredChunk
from megatron_adam_mini.checkpoint.errors import UnreadableError
from megatron_adam_mini.checkpoint.reader import COMMON_KEY, Checkpoint, tiling_problem
from megatron_adam_mini.mcore.arguments import OPTIMIZER
from megatron_adam_mini.mcore.compat import training_arguments
from megatron_adam_mini.mcore.entries import MARK
from megatron_adam_mini.plan.manifest import STATE_PREFIX


def wrap_load(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``dist_checkpointing.load``: check files first, and raise its errors on all ranks."""

    @functools.wraps(original)
    def load(
        sharded_state_dict: dict[str, Any], checkpoint_dir: Any, *args: Any, **kwargs: Any
    ) -> Any:
        optimizer = sharded_state_dict.get("optimizer")
        if not isinstance(optimizer, dict) or MARK not in optimizer:
            return original(sharded_state_dict, checkpoint_dir, *args, **kwargs)
        check_checkpoint = optimizer[MARK].unwrap()
        failure = (
            f"Checkpoint {str(checkpoint_dir)!r} was not loaded. Load an earlier one (--ckpt-step) "
            "or restore the file"
        )
        if check_checkpoint:
            on_all_ranks(lambda: check_share(Path(checkpoint_dir), *_rank_and_size()), failure)
            on_all_ranks(
                lambda: refuse_missing(optimizer, Path(checkpoint_dir)),
                "The optimizer's state was not loaded",
            )
        return on_all_ranks(
            lambda: original(sharded_state_dict, checkpoint_dir, *args, **kwargs), failure
        )

    return load


def wrap_load_common(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function that reads the common state: check its classes first.

    Every rank reads the same two entries and raises the same error, so nothing is communicated:
    Megatron's tools call these functions without a process group.
    """

    @functools.wraps(original)
    def load(checkpoint_dir: Any = None, *args: Any, **kwargs: Any) -> Any:
        if checkpoint_dir is not None and _checks_files():
            entry = Checkpoint(Path(checkpoint_dir)).objects.get(COMMON_KEY)
            if entry is not None:  # else a file of its own, which Megatron reads safely
                refuse_foreign_classes(entry)
        return original(checkpoint_dir, *args, **kwargs)

    return load


def refuse_foreign_classes(chunk: StoredChunk) -> None:
    """Refuse a non-tensor entry if it holds more than data and Megatron's safe classes.

    Raises:
        UnreadableError: names the entry and the class.
    """
    with ChunkReader(chunk) as reader:
        data = reader.object_bytes()
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data))
        if names:
            raise pickle.UnpicklingError(f"it names {', '.join(names)}")
        torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile pickle can fail in any way
        raise UnreadableError(
            f"{chunk} is not plain data: {error}. Allowed are the classes that Megatron registers "
            "as safe. If you trust the checkpoint, allow others with "
            "torch.serialization.add_safe_globals, or pass --adam-mini-no-file-check, with which "
            "loading may run any code that it holds."
        ) from error


def check_share(folder: Path, rank: int, size: int) -> None:
    """Check every ``size``-th chunk of a checkpoint from number ``rank`` on.

    All ranks together read the checkpoint once. Checked are sizes, checksums of all bytes, classes
    of non-tensor entries, and that the boxes of Adam-mini's state cover their tensors.

    Raises:
        ValueError: something is missing, truncated, damaged, not covered, or more than data; names
            file and entry.
    """
    checkpoint = Checkpoint(folder)
    chunks = [chunk for tensor in checkpoint.tensors.values() for chunk in tensor.chunks]
    for chunk in chunks[rank::size]:
        with ChunkReader(chunk) as reader:
            reader.check_members()
    for chunk in list(checkpoint.objects.values())[rank::size]:
        refuse_foreign_classes(chunk)
    own = sorted(key for key in checkpoint.tensors if key.startswith(STATE_PREFIX))
    for key in own[rank::size]:
        problem = tiling_problem(checkpoint.tensors[key])
        if problem is not None:
            raise ValueError(f"{key}: {problem}")


def refuse_missing(optimizer: dict[str, Any], folder: Path) -> None:
    """Refuse a checkpoint that lacks tensors of the optimizer's state.

    Raises:
        ValueError: names them.
    """
    asked = {entry.key for entry in nested_values(optimizer) if isinstance(entry, ShardedTensor)}
    missing = sorted(asked - Checkpoint(folder).tensors.keys())
    if missing:
        raise ValueError(
            f"Checkpoint {str(folder)!r} lacks {len(missing)} tensors of the optimizer's state on "
            f"this rank: {', '.join(missing[:4])}. Their parameters were frozen, or did not exist, "
            "in the run that saved it. Freeze them, or start with new state (--no-load-optim)."
        )


def _checks_files() -> bool:
    """Return whether this run checks files, according to Megatron's arguments."""
    args = training_arguments()
    if args is None or args.optimizer != OPTIMIZER:
        return args is None
    return bool(getattr(args, "adam_mini_check_files", True))


def _rank_and_size() -> tuple[int, int]:
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()
