"""Whose state a checkpoint holds, and whether this run may take it over.

Imports ``partition``. Used by ``checkpoint`` before anything is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_adam_mini.config import FORMAT_VERSION, AdamMiniConfig
from megatron_adam_mini.mcore.entries import StateView
from megatron_adam_mini.plan.partition import ParameterBlocks, is_coarsening, partition_by_rule


def identity_of(view: StateView, layout: str) -> dict[str, Any]:
    """Return what says whose state it is; plain values only, equal on all ranks."""
    return {
        "format": FORMAT_VERSION,
        "layout": layout,
        "partition": view.inner.config.partition_fields(),
        "manifest_hash": view.manifest["hash"],
        "rules": _rules(view),
        "saved_from": view.sizes,
    }


def partition_of_checkpoint(view: StateView, saved: Mapping[str, Any]) -> list[ParameterBlocks]:
    """Return the blocks that the checkpoint's v belongs to, or refuse.

    Raises:
        ValueError: another format, or another partition that is not to be, or cannot be, converted.
    """
    if saved["format"] > FORMAT_VERSION:
        raise ValueError(
            f"The checkpoint has Adam-mini format {saved['format']}, this release reads up to "
            f"{FORMAT_VERSION}. Install a newer megatron-adam-mini."
        )
    own = view.inner.config.partition_fields()
    if saved["partition"] == own and saved["manifest_hash"] == view.manifest["hash"]:
        return view.blocks
    # By checkpoint keys: implementations of a model name their parameters differently. The first
    # checkpoints of this format had the names.
    keys = {entry["name"]: entry["key"] for entry in view.manifest["parameters"]}
    ours = _rules(view)
    theirs = {keys.get(key, key): rule for key, rule in saved["rules"].items()}
    changed = [
        f"{key}: checkpoint {_words(theirs.get(key))}, run {_words(ours.get(key))}"
        for key in sorted(ours.keys() | theirs.keys())
        if _rule(ours.get(key)) != _rule(theirs.get(key))
    ]
    difference = (
        f"partition {_options(saved['partition'])} (manifest {saved['manifest_hash']}) in the "
        f"checkpoint, {_options(own)} (manifest {view.manifest['hash']}) in this run; "
        f"{len(changed)} parameters differ" + (": " + "; ".join(changed[:5]) if changed else "")
    )
    if ours.keys() != theirs.keys() or saved["partition"]["rule_version"] != own["rule_version"]:
        raise ValueError(
            f"The checkpoint's Adam-mini state does not fit this model: {difference}. Load it with "
            "the model and release that wrote it, or start fresh with --no-load-optim."
        )
    saved_config = AdamMiniConfig(
        preset=saved["partition"]["preset"],
        value_as_block=saved["partition"]["value_as_block"],
        rules=tuple((pattern, rule) for pattern, rule in saved["partition"]["overrides"]),
    )
    # The stored rules, not the stored patterns: those select by the names of the run that saved.
    sources = [
        partition_by_rule(info, theirs[info.key][0], saved_config)
        for info in (blocks.info for blocks in view.blocks)
    ]
    finer = [
        blocks.info.name
        for source, blocks in zip(sources, view.blocks, strict=True)
        if not is_coarsening(source, blocks)
    ]
    if finer:
        raise ValueError(
            f"The checkpoint's Adam-mini state has another partition: {difference}. It cannot be "
            f"converted, because this run's blocks are finer or cut otherwise ({finer[0]}, and "
            f"{len(finer) - 1} more on this rank). Use the checkpoint's options or --no-load-optim."
        )
    if sources != view.blocks and not view.inner.config.convert_partition:
        raise ValueError(
            f"The checkpoint's Adam-mini state has another partition: {difference}. Use the "
            "checkpoint's options; or, as this run's blocks are unions of the checkpoint's, add "
            "--adam-mini-convert-partition to average v over them, which is exact."
        )
    return sources


def _rules(view: StateView) -> dict[str, list[Any]]:
    return {e["key"]: [e["rule"], e["blocks"]] for e in view.manifest["parameters"]}


def _rule(entry: list[Any] | None) -> Any:
    # Block counts of vocabulary matrices depend on padding, which is not a difference.
    return None if entry is None else entry[0]


def _words(entry: list[Any] | None) -> str:
    return "lacks it" if entry is None else f"{entry[0]} ({entry[1]} blocks)"


def _options(partition: Mapping[str, Any]) -> str:
    words = [repr(partition["preset"])]
    if partition["value_as_block"]:
        words.append("value as block")
    if partition["overrides"]:
        words.append(f"rules {partition['overrides']}")
    return " ".join(words)
