"""A damaged checkpoint is found before anything is loaded, and every rank says so.

Imports ``offline`` (the reader that checks checksums) and torch.distributed. Wrapped around
``megatron.core.dist_checkpointing.load``; acts only on loads that Adam-mini asked for.

Without it, torch reads a flipped bit without noticing, reports a truncated file without its name,
and raises on one rank only, while the others wait for it in their next collective.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import distributed

from megatron_adam_mini.agreement import on_all_ranks
from megatron_adam_mini.config import STATE_PREFIX
from megatron_adam_mini.mcore.state_entries import MARK
from megatron_adam_mini.offline.chunks import ChunkReader
from megatron_adam_mini.offline.reader import Checkpoint, tiling_problem


def wrap_load(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``dist_checkpointing.load`` with the check before it and its errors on all ranks."""

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
        return on_all_ranks(
            lambda: original(sharded_state_dict, checkpoint_dir, *args, **kwargs), failure
        )

    return load


def check_share(folder: Path, rank: int, size: int) -> None:
    """Check every ``size``-th chunk of a checkpoint from number ``rank`` on.

    All ranks together read the checkpoint once: sizes, checksums of all bytes, and that the boxes
    of Adam-mini's state cover their tensors.

    Raises:
        ValueError: names file and entry of what is missing, truncated, damaged or not covered.
    """
    checkpoint = Checkpoint(folder)
    chunks = [chunk for tensor in checkpoint.tensors.values() for chunk in tensor.chunks]
    for chunk in [*chunks, *checkpoint.objects.values()][rank::size]:
        with ChunkReader(chunk) as reader:
            reader.check_members()
    own = sorted(key for key in checkpoint.tensors if key.startswith(STATE_PREFIX))
    for key in own[rank::size]:
        problem = tiling_problem(checkpoint.tensors[key])
        if problem is not None:
            raise ValueError(f"{key}: {problem}")


def _rank_and_size() -> tuple[int, int]:
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()
