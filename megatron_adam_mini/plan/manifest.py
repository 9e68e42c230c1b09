"""The partition as users and checkpoints see it: the manifest, its hash, the state's identity.

Imports numpy, ``config`` and ``partition``. Data flow: partition -> **manifest** -> mcore (saves,
loads) and convert (the same without Megatron).

The *manifest* lists every parameter of the model with its rule and its number of blocks. The
*identity* describes Adam-mini's state in a checkpoint; from it a run decides whether it may load
the state, and into which blocks.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import numpy as np

from megatron_adam_mini.config import CHECKPOINT_FORMATS, AdamMiniConfig
from megatron_adam_mini.plan.partition import (
    RULE_VERSION,
    IntArray,
    ParameterBlocks,
    partition_by_rule,
)

#: Increment when newer code writes checkpoints that older code cannot read.
FORMAT_VERSION = 3

#: What is written where no parameter has v of columns: older code reads that.
_WITHOUT_COLUMNS = 2

#: Largest part of the trained elements that unknown weights may have. They keep Adam's state.
MAX_UNKNOWN_SHARE = 0.01

#: So many names stand in a message.
_SHOWN = 5

#: Prefix of the keys of Adam-mini's state in checkpoints.
STATE_PREFIX = "optimizer.adam_mini."

#: Formats of the state: tensors in the model's coordinates; flat buckets, bound to one layout.
MODEL_SPACE, BUCKETS = CHECKPOINT_FORMATS

#: What identities call them. Checkpoints have always called buckets by Megatron's word for its own.
_STORED_FORMATS = {MODEL_SPACE: "model_space", BUCKETS: "dp_reshardable"}

#: Where the leading axes of Megatron's tensors, equal layers and the experts of each, belong in
#: their keys, outermost first. Keys of Adam-mini's state have numbers there.
LEADING_AXES = (re.compile(r"\.layers\.(?!\d)"), re.compile(r"\.experts\.experts\.(?!\d)"))

#: Weights with a row per token, which Megatron pads by an amount that depends on the layout.
VOCABULARY_ROLES = ("embedding", "output")


class StoredRule(NamedTuple):
    """Entry of one parameter in a checkpoint's manifest.

    Attributes:
        name: name in the manifest.
        rule: how the parameter is partitioned into blocks.
        num_blocks: blocks of the whole parameter.
    """

    name: str
    rule: str
    num_blocks: int


def state_key(kind: str, key: str) -> str:
    """Return the key of one tensor of Adam-mini's state in a checkpoint.

    Args:
        kind: ``param``, ``exp_avg``, ``v_row``, ``v_column`` or ``v_element``.
        key: key of the parameter, layer number included.
    """
    return f"{STATE_PREFIX}{kind}.{key}"


# The manifest.


def manifest_of(
    entries: Sequence[dict[str, Any]], config: AdamMiniConfig, frozen: Iterable[str] = ()
) -> dict[str, Any]:
    """Return the manifest of a whole model: its parameters, rules and numbers of second moments.

    Args:
        entries: :meth:`ParameterBlocks.manifest_entry` of every parameter, once each.
        config: the options that produced them.
        frozen: checkpoint keys of the parameters that are not trained.

    Returns:
        A JSON-serialisable dict; for ``hash`` see :func:`manifest_hash`. ``elementwise_unknown``
        are names of unknown role that no pattern of the config matches.
    """
    chosen = [pattern for pattern, _ in config.overrides()]
    ordered = sorted(entries, key=lambda entry: str(entry["key"]))
    partition = partition_fields(config)
    return {
        **partition,
        "parameters": ordered,
        "elements": sum(entry["elements"] for entry in ordered),
        "blocks": sum(entry["blocks"] for entry in ordered),
        "v_bytes": sum(entry["v_bytes"] for entry in ordered),
        "elementwise_unknown": [
            entry["name"]
            for entry in ordered
            if entry["role"] == "unknown"
            and not any(fnmatchcase(entry["name"], pattern) for pattern in chosen)
        ],
        "frozen": sorted(set(frozen)),
        "hash": manifest_hash(
            partition, ((e["key"], e["shape"], e["role"], e["rule"]) for e in ordered)
        ),
    }


def unknown_problem(manifest: Mapping[str, Any]) -> str | None:
    """Describe the problem if too much of a model is unknown; else return ``None``.

    Parameters of one dimension do not count: each of their elements is a row.
    """
    names = {*manifest["elementwise_unknown"]}
    found = [e for e in manifest["parameters"] if e["name"] in names and len(e["shape"]) > 1]
    share = sum(entry["elements"] for entry in found) / max(1, manifest["elements"])
    if share <= MAX_UNKNOWN_SHARE:
        return None
    # One pattern for the same weight of all layers and experts, with its number of dimensions.
    patterns = {re.sub(r"(?<=\.)\d+(?=\.)", "*", e["name"]): len(e["shape"]) for e in found}
    shown = [repr(pattern) for pattern in list(patterns)[:_SHOWN]]
    more = f" and {len(patterns) - _SHOWN} more" if len(patterns) > _SHOWN else ""
    accept = f"accept it, with --adam-mini-full-v {' '.join(shown)}{more}"
    matrix = next((pattern for pattern, dimensions in patterns.items() if dimensions == 2), None)
    if matrix is not None:
        rule = f'a JSON object such as {{{json.dumps(matrix)}: "row"}}'
        remedy = f"give them a rule, with --adam-mini-rules FILE, {rule}; or {accept}"
    else:  # such as those of several experts in one
        remedy = (
            f"{accept}; or, only if each index of dimension 0 is one output neuron, give them the "
            'rule "row", with --adam-mini-rules FILE'
        )
    return (
        f"Weights that Adam-mini does not know have {100 * share:.1f} % of the trained elements "
        f"(allowed: {100 * MAX_UNKNOWN_SHARE:.0f} %) and would keep Adam's whole state: "
        f"{', '.join(shown)}{more}. Remedy: {remedy} (AdamMiniConfig: rules, full_v)."
    )


def manifest_hash(
    partition: Mapping[str, Any], parameters: Iterable[tuple[str, Sequence[int], str, str]]
) -> str:
    """Return a short hash of a manifest.

    It depends on checkpoint keys, shapes and rules only, not on the layout over ranks (so not on
    the vocabulary's padding either, which Megatron chooses by tensor-parallel size), nor on the
    names of parameters in the model's modules.

    Args:
        partition: :func:`partition_fields`.
        parameters: key, shape of the whole parameter, role and rule of each.
    """
    hashed = [
        [key, list(shape)[role in VOCABULARY_ROLES :], rule]
        for key, shape, role, rule in sorted(parameters, key=lambda parameter: parameter[0])
    ]
    return short_hash([partition, hashed])


def short_hash(value: Any) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of a JSON-serialisable value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# The identity of Adam-mini's state in a checkpoint.


def partition_fields(config: AdamMiniConfig) -> dict[str, Any]:
    """Return the options that determine which elements share a second moment."""
    return {
        "rule_version": RULE_VERSION,
        "preset": config.preset,
        "value_as_block": config.value_as_block,
        "overrides": [list(pair) for pair in config.overrides()],
    }


def identity_of(
    manifest: Mapping[str, Any],
    config: AdamMiniConfig,
    *,
    checkpoint_format: str,
    saved_from: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the identity of Adam-mini's state for a checkpoint; plain values only.

    Args:
        manifest: manifest of the whole model.
        config: the options that produced it.
        checkpoint_format: ``MODEL_SPACE`` or ``BUCKETS``.
        saved_from: sizes of the parallel layout, for information only.
    """
    return {
        "format": FORMAT_VERSION if has_columns(manifest) else _WITHOUT_COLUMNS,
        "layout": _STORED_FORMATS.get(checkpoint_format, checkpoint_format),
        "partition": partition_fields(config),
        "manifest_hash": manifest["hash"],
        "rules": {e["key"]: [e["rule"], e["blocks"]] for e in manifest["parameters"]},
        "heads": {e["key"]: e["heads"] for e in manifest["parameters"] if e["heads"]},
        **(_stacked(manifest) if has_columns(manifest) else {}),
        "frozen": manifest["frozen"],
        "storage": config.storage_fields(),
        "saved_from": saved_from,
    }


def has_columns(manifest: Mapping[str, Any]) -> bool:
    """Return whether any parameter of a model has v of columns."""
    return any("column_sets" in entry for entry in manifest["parameters"])


def _stacked(manifest: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Return which weights hold several matrices, by checkpoint key."""
    entries = manifest["parameters"]
    return {"stacked": {e["key"]: e["stacked"] for e in entries if e.get("stacked", 1) > 1}}


def config_of(identity: Mapping[str, Any]) -> AdamMiniConfig:
    """Return a config with the partition that a checkpoint's identity names."""
    partition = identity["partition"]
    return AdamMiniConfig(
        preset=partition["preset"],
        value_as_block=partition["value_as_block"],
        rules=tuple((pattern, rule) for pattern, rule in partition["overrides"]),
    )


def format_of(identity: Mapping[str, Any]) -> str:
    """Return a checkpoint's format: ``MODEL_SPACE`` or ``BUCKETS``."""
    stored: str = identity["layout"]
    return next((name for name, known in _STORED_FORMATS.items() if known == stored), stored)


def format_problem(identity: Mapping[str, Any]) -> str | None:
    """Describe the problem if newer code wrote a checkpoint; else return ``None``."""
    if identity["format"] <= FORMAT_VERSION:
        return None
    return (
        f"has Adam-mini format {identity['format']}, this release reads up to {FORMAT_VERSION}. "
        "Install a newer megatron-adam-mini."
    )


def stored_rules(identity: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, StoredRule]:
    """Return the manifest entries of a checkpoint's parameters, by checkpoint key.

    Args:
        identity: the checkpoint's.
        keys: name in the running model -> checkpoint key. The first checkpoints stored names
            instead of keys, and implementations of a model name their parameters differently.
    """
    return {
        keys.get(name, name): StoredRule(name, rule, num_blocks)
        for name, (rule, num_blocks) in identity["rules"].items()
    }


# Another run's partition.


def are_unions(coarse: IntArray, fine: IntArray) -> bool:
    """Return whether every block of ``coarse`` is a union of blocks of ``fine``.

    Args:
        coarse: block of each row.
        fine: block of each of the same rows.
    """
    pairs = np.unique(np.stack([fine, coarse]), axis=1)
    return bool(pairs.shape[1] == len(np.unique(fine)))


def is_coarsening(fine: ParameterBlocks, coarse: ParameterBlocks) -> bool:
    """Return whether every block of ``coarse`` is a union of blocks of ``fine``.

    Then v of ``coarse`` is exactly the mean of v of ``fine``, weighted by elements, because v is
    linear in the squared gradients.
    """
    if fine.pattern is None:
        return True
    if coarse.pattern is None:
        return False
    # A row is no union of parts of columns.
    of_rows = fine.pattern.column_set_of_rows() < 0
    if (coarse.pattern.column_set_of_rows()[of_rows] >= 0).any():
        return False
    return are_unions(coarse.pattern.block_of_rows(), fine.pattern.block_of_rows())


def trained_otherwise(
    identity: Mapping[str, Any], manifest: Mapping[str, Any]
) -> tuple[set[str], set[str]]:
    """Return the keys of parameters that only this run, and only the checkpoint's run, trains."""
    keys = {entry["name"]: entry["key"] for entry in manifest["parameters"]}
    ours, theirs = {*keys.values()}, {*stored_rules(identity, keys)}
    return ours - theirs, theirs - ours


def partition_of_checkpoint(
    identity: Mapping[str, Any],
    manifest: Mapping[str, Any],
    config: AdamMiniConfig,
    parameters: Sequence[ParameterBlocks],
) -> list[ParameterBlocks | None]:
    """Return the partition of a checkpoint's v, or refuse it.

    Parameters may have been frozen in either run, and trained in the other.

    Args:
        identity: the checkpoint's.
        manifest: this run's, of the whole model.
        config: this run's.
        parameters: this rank's, with this run's blocks.

    Returns:
        The same parameters in the same order, with the checkpoint's blocks; ``None`` for those that
        have no state there, because they were frozen.

    Raises:
        ValueError: the format differs, or the partition differs and must not or cannot be
            converted.
    """
    problem = format_problem(identity)
    if problem:
        raise ValueError(f"The checkpoint {problem}")
    if (
        identity["partition"] == partition_fields(config)
        and identity.get("manifest_hash") == manifest["hash"]
    ):
        return list(parameters)
    ours = {
        entry["key"]: StoredRule(entry["name"], entry["rule"], entry["blocks"])
        for entry in manifest["parameters"]
    }
    theirs = stored_rules(identity, {rule.name: key for key, rule in ours.items()})
    difference = _difference(identity, manifest, config, theirs, ours)
    new, gone = trained_otherwise(identity, manifest)
    # The first checkpoints did not say what was frozen.
    explained = new <= {*identity.get("frozen", ())} and gone <= {*manifest["frozen"]}
    if not explained or identity["partition"]["rule_version"] != RULE_VERSION:
        raise ValueError(
            f"The checkpoint's Adam-mini state does not fit this model: {difference}. Load it with "
            "the model and release that wrote it, or start fresh with --no-load-optim."
        )
    # The stored rules, not the stored patterns: patterns match the names of the run that saved.
    saved_config = config_of(identity)
    sources = [
        None
        if blocks.info.checkpoint_key in new
        else partition_by_rule(blocks.info, theirs[blocks.info.checkpoint_key].rule, saved_config)
        for blocks in parameters
    ]
    finer = [
        blocks.info.name
        for source, blocks in zip(sources, parameters, strict=True)
        if source is not None and not is_coarsening(source, blocks)
    ]
    if finer:
        raise ValueError(
            f"The checkpoint's Adam-mini state has another partition: {difference}. It cannot be "
            f"converted, because this run's blocks are finer or cut otherwise ({finer[0]}, and "
            f"{len(finer) - 1} more on this rank). Use the checkpoint's options or --no-load-optim."
        )
    if changes_blocks(sources, parameters) and not config.convert_partition:
        raise ValueError(
            f"The checkpoint's Adam-mini state has another partition: {difference}. Use the "
            "checkpoint's options; or, as this run's blocks are unions of the checkpoint's, add "
            "--adam-mini-convert-partition to average v over them, which is exact."
        )
    return sources


def changes_blocks(
    sources: Sequence[ParameterBlocks | None], parameters: Sequence[ParameterBlocks]
) -> bool:
    """Return whether the blocks of any parameter with state in a checkpoint are others there."""
    pairs = zip(sources, parameters, strict=True)
    return any(source is not None and source != blocks for source, blocks in pairs)


def _difference(
    identity: Mapping[str, Any],
    manifest: Mapping[str, Any],
    config: AdamMiniConfig,
    theirs: Mapping[str, StoredRule],
    ours: Mapping[str, StoredRule],
) -> str:
    """Say how a checkpoint's partition differs from this run's."""

    def rule(found: StoredRule | None) -> str | None:
        # Not the numbers of blocks: padding may change those of vocabulary matrices.
        return None if found is None else found.rule

    def described(found: StoredRule | None) -> str:
        return "lacks it" if found is None else f"{found.rule} ({found.num_blocks} blocks)"

    changed = [
        f"{key}: checkpoint {described(theirs.get(key))}, run {described(ours.get(key))}"
        for key in sorted(ours.keys() | theirs.keys())
        if rule(ours.get(key)) != rule(theirs.get(key))
    ]
    stored = identity.get("manifest_hash", "not stored")
    return (
        f"partition {_options(identity['partition'])} (manifest {stored}) in the checkpoint, "
        f"{_options(partition_fields(config))} (manifest {manifest['hash']}) in "
        f"this run; {len(changed)} parameters differ"
        + (": " + "; ".join(changed[:5]) if changed else "")
    )


def _options(partition: Mapping[str, Any]) -> str:
    words = [repr(partition["preset"])]
    if partition["value_as_block"]:
        words.append("value as block")
    if partition["overrides"]:
        words.append(f"rules {partition['overrides']}")
    return " ".join(words)
