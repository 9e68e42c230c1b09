"""Megatron's save and load of checkpoints, wrapped: Adam-mini's part is fitted to the folder.

Imports ``state_part`` and ``load_guard``. State dicts without a part of Adam-mini are passed on as
they are. The metadata that callers pass are not changed; neither are their state dicts, beyond what
Megatron itself does to them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing

from megatron_adam_mini.agreement import on_all_ranks
from megatron_adam_mini.checkpoint.reader import Checkpoint
from megatron_adam_mini.mcore.adam_import import FULLY_RESHARDABLE, is_plain
from megatron_adam_mini.mcore.arguments import OPTIMIZER
from megatron_adam_mini.mcore.compat import bind, training_arguments
from megatron_adam_mini.mcore.load_guard import check_request, check_share
from megatron_adam_mini.mcore.state_part import (
    IDENTITY,
    StatePart,
    at,
    content_metadata,
    parts_in,
    replaced,
)


def wrap_save(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``dist_checkpointing.save``: the content metadata say what the state is.

    A part that was made before the optimizer's last step, or for loading, is made anew: some of it
    would be of another step, or nothing at all.
    """

    @functools.wraps(original)
    def save(*args: Any, **kwargs: Any) -> Any:
        call = bind(original, *args, **kwargs)
        state_dict = call.arguments["sharded_state_dict"]
        found = list(parts_in(state_dict))
        if not found:
            return original(*args, **kwargs)
        (path, part), *others = found
        if others:
            raise ValueError(
                f"The state dict holds Adam-mini's state {len(found)} times, at "
                f"{[list(path) for path, _ in found]}, and a checkpoint can hold it once. Save "
                "each optimizer in a folder of its own."
            )
        if part.saved_step != part.steps:
            state_dict = replaced(state_dict, path, part.to_save())
        call.arguments["sharded_state_dict"] = state_dict
        call.arguments["content_metadata"] = content_metadata(
            call.arguments["content_metadata"], at(state_dict, path)[IDENTITY]
        )
        return original(*call.args, **call.kwargs)

    return save


def wrap_load_content(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``load_content_metadata``: what it returns agrees with the optimizer's state.

    The identity is missing if the checkpoint was saved by a function that was not wrapped. And
    Megatron asks metadata for the format of the distributed optimizer even where the checkpoint was
    saved without it, before it lets a run with other TP or PP sizes load the state.
    """

    @functools.wraps(original)
    def load_content_metadata(*args: Any, **kwargs: Any) -> Any:
        call = bind(original, *args, **kwargs)
        common = call.arguments["preloaded_state_dict"]
        if common is None and call.arguments["checkpoint_dir"] is not None:
            common = dist_checkpointing.load_common_state_dict(call.arguments["checkpoint_dir"])
            call.arguments["preloaded_state_dict"] = common
        found = original(*call.args, **call.kwargs)
        optimizer = at(common, ("optimizer",)) or {}
        if IDENTITY in optimizer:
            return content_metadata(found, optimizer[IDENTITY])
        args_of_run = training_arguments()
        if getattr(args_of_run, "optimizer", None) == OPTIMIZER and is_plain(optimizer):
            return {"distrib_optim_sharding_type": FULLY_RESHARDABLE, **(found or {})}
        return found

    return load_content_metadata


def wrap_load(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``dist_checkpointing.load``: check files, ask for what they hold, fail on all ranks."""

    @functools.wraps(original)
    def load(*args: Any, **kwargs: Any) -> Any:
        call = bind(original, *args, **kwargs)
        found = list(parts_in(call.arguments["sharded_state_dict"]))
        if not found:
            return original(*args, **kwargs)
        folder, group = call.arguments["checkpoint_dir"], call.arguments.get("process_group")
        failure = (
            f"Checkpoint {str(folder)!r} was not loaded. Load an earlier one (--ckpt-step) or "
            "restore the file"
        )
        checked = None
        if any(part.owner.inner.config.check_files for _, part in found):
            checked = on_all_ranks(lambda: check_share(Path(folder), group), failure, group)
        call.arguments["sharded_state_dict"] = on_all_ranks(
            lambda: _fitted(call.arguments["sharded_state_dict"], found, folder, checked),
            f"Adam-mini's state was not loaded from {str(folder)!r}",
            group,
        )
        return on_all_ranks(lambda: original(*call.args, **call.kwargs), failure, group)

    return load


def _fitted(
    state_dict: dict[str, Any],
    found: Sequence[tuple[tuple[Any, ...], StatePart]],
    folder: Any,
    checkpoint: Checkpoint | None,
) -> dict[str, Any]:
    """Return a state dict in which all parts ask for what the checkpoint holds.

    Args:
        state_dict: the caller's.
        found: its parts of Adam-mini.
        folder: the checkpoint's.
        checkpoint: the same, ``None``: do not compare the requests with it.

    Raises:
        ValueError: it holds nothing that an optimizer can load.
    """
    common = dist_checkpointing.load_common_state_dict(folder)
    for path, part in found:
        request = part.to_load_from(at(common, path))
        if request is not None:
            state_dict = replaced(state_dict, path, request)
        if checkpoint is not None:
            check_request(checkpoint, at(state_dict, path))
    return state_dict
