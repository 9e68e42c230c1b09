"""Find a damaged or hostile checkpoint before anything is loaded.

Imports ``checkpoint`` (readers that check checksums and run no code) and torch.distributed. The
checks are called by ``checkpoint_calls`` before a load that Adam-mini requested; the function of
``megatron.core.dist_checkpointing`` that reads the common state before it is wrapped here.

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
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import distributed

from megatron_adam_mini.checkpoint.chunks import ChunkReader, StoredChunk
from megatron_adam_mini.checkpoint.errors import UnreadableError
from megatron_adam_mini.checkpoint.reader import COMMON_KEY, Checkpoint, tiling_problem
from megatron_adam_mini.mcore.arguments import OPTIMIZER
from megatron_adam_mini.mcore.compat import training_arguments
from megatron_adam_mini.plan.manifest import STATE_PREFIX


def wrap_load_common(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``load_common_state_dict``: check the classes of the common state first.

    Every rank reads the same two entries and raises the same error, so nothing is communicated:
    Megatron's tools call it without a process group.
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


def check_share(folder: Path, group: distributed.ProcessGroup | None) -> Checkpoint:
    """Check this rank's share of a checkpoint's chunks.

    All ranks together read the checkpoint once. Checked are sizes, checksums of all bytes, classes
    of non-tensor entries, and that the boxes of Adam-mini's state cover their tensors.

    Args:
        folder: of the checkpoint.
        group: the ranks that load it, ``None``: all.

    Raises:
        ValueError: something is missing, truncated, damaged, not covered, or more than data; names
            file and entry.
    """
    rank, size = _rank_and_size(group)
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
    return checkpoint


def check_request(checkpoint: Checkpoint, request: Any) -> None:
    """Check that a checkpoint holds what is requested from it.

    Megatron would name all keys that are missing and no reason, or the first shape that differs on
    one rank only.

    Args:
        checkpoint: the checkpoint.
        request: sharded state dict.

    Raises:
        ValueError: entries are missing, or tensors have another shape.
    """
    problems = []
    for entry in nested_values(request):
        if isinstance(entry, ShardedObject) and entry.unique_key not in checkpoint.objects:
            problems.append(f"{entry.key} is missing")
        elif isinstance(entry, ShardedTensor):
            stored = checkpoint.tensors.get(entry.key)
            if stored is None:
                problems.append(f"{entry.key} is missing")
            elif stored.shape != tuple(entry.global_shape) and not entry.allow_shape_mismatch:
                problems.append(
                    f"{entry.key} has shape {list(stored.shape)}, this run needs "
                    f"{list(entry.global_shape)}"
                )
    if problems:
        raise ValueError(
            f"The optimizer state in {checkpoint.folder} does not fit this run: {problems[0]} "
            f"({len(problems)} such entries on this rank). Formats with flat buckets "
            "(dp_reshardable, dp_zero_gather_scatter) need the tensor- and pipeline-parallel sizes "
            "and the bucket size (--ddp-bucket-size) that they were saved with, all formats the "
            "model, with no more trained parameters. Load it with those, or start without it: "
            "--no-load-optim."
        )


def _checks_files() -> bool:
    """Return whether this run checks files, according to Megatron's arguments."""
    args = training_arguments()  # others than Megatron's parser may have made them, with less
    is_ours = getattr(args, "optimizer", OPTIMIZER) == OPTIMIZER
    return is_ours and bool(getattr(args, "adam_mini_check_files", True))


def _rank_and_size(group: distributed.ProcessGroup | None) -> tuple[int, int]:
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(group), distributed.get_world_size(group)
