"""Check that a checkpoint is consistent: every byte, every element, every block.

Imports torch. Continues after a problem, so that one run reports all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_adam_mini.adam_rules import MAIN_PARAM, PLAIN_MAIN_PARAM, adam_key
from megatron_adam_mini.checkpoint.chunks import ChunkReader, StoredChunk
from megatron_adam_mini.checkpoint.errors import CorruptError, UnreadableError
from megatron_adam_mini.checkpoint.reader import Checkpoint, StoredTensor, tiling_problem
from megatron_adam_mini.convert.adam_state import count_unsound
from megatron_adam_mini.convert.mini_state import (
    MiniState,
    find_mini_state,
    stored_blocks,
)
from megatron_adam_mini.convert.parameters import (
    StoredParameter,
    name_of,
    parameter_of,
    whole_of,
)
from megatron_adam_mini.convert.progress import bytes_bar
from megatron_adam_mini.plan.manifest import (
    BUCKETS,
    config_of,
    format_of,
    manifest_hash,
    state_key,
)
from megatron_adam_mini.plan.parameter_info import ParameterInfo
from megatron_adam_mini.plan.partition import rule_for
from megatron_adam_mini.plan.roles import role_of

#: Prefixes of the keys of v and of main parameters, for either optimizer.
_V = (
    *(state_key(kind, "") for kind in ("v_row", "v_column", "v_element")),
    adam_key("exp_avg_sq", ""),
)
_MAIN = (
    state_key("param", ""),
    adam_key(MAIN_PARAM, ""),
    adam_key(PLAIN_MAIN_PARAM, ""),
)


@dataclass
class Findings:
    """What was checked and found.

    Attributes:
        problems: each makes the checkpoint unusable.
        notes: what could not be checked, or is unusual without being wrong.
        checked: numbers of checked items.
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    checked: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "ok": not self.problems,
            "problems": self.problems,
            "notes": self.notes,
            "checked": self.checked,
        }


def verify(checkpoint: Checkpoint) -> Findings:
    """Check a checkpoint: coverage, checksums, values, masters, blocks, manifest."""
    findings = Findings()
    chunks = [c for t in checkpoint.tensors.values() for c in t.chunks]
    chunks += checkpoint.objects.values()
    findings.checked = {
        "tensors": len(checkpoint.tensors),
        "chunks": len(chunks),
        "elements": sum(math.prod(t.shape) for t in checkpoint.tensors.values()),
    }
    broken = set()
    with bytes_bar(sum(chunk.length for chunk in chunks), "verify") as progress:
        for tensor in checkpoint.tensors.values():
            before = len(findings.problems)
            problem = tiling_problem(tensor)
            if problem:
                findings.problems.append(problem)
            for chunk in tensor.chunks:
                _check_tensor_chunk(tensor, chunk, findings)
                progress.update(chunk.length)
            if len(findings.problems) > before:
                broken.add(tensor.key)
        for chunk in checkpoint.objects.values():
            try:
                with ChunkReader(chunk) as reader:
                    reader.check_members()
            except CorruptError as error:
                findings.problems.append(str(error))
            progress.update(chunk.length)
    referenced = {chunk.path.name for chunk in chunks}
    for path in sorted(checkpoint.folder.glob("*.distcp")):
        if path.name not in referenced:
            findings.notes.append(f"{path} belongs to nothing in this checkpoint.")
    _check_masters(checkpoint, broken, findings)
    if "adam_mini" in checkpoint.optimizer:
        _check_adam_mini(checkpoint, broken, findings)
    return findings


def _check_tensor_chunk(tensor: StoredTensor, chunk: StoredChunk, findings: Findings) -> None:
    """Check one chunk's checksums and values."""
    bad = negative = 0
    try:
        with ChunkReader(chunk) as reader:
            reader.check_members(skip_tensor=True)
            if reader.dtype() != tensor.dtype:
                findings.problems.append(
                    f"{chunk}: stored as {reader.dtype()}, but .metadata says {tensor.dtype}."
                )
            for _, window in reader.windows():
                if window.is_floating_point():
                    bad += window.numel() - int(torch.isfinite(window).sum())
                    if tensor.key.startswith(_V):
                        negative += int((window < 0).sum())
    except CorruptError as error:
        findings.problems.append(str(error))
        return
    if bad:
        findings.problems.append(f"{chunk}: {bad} values are not finite.")
    if negative:
        findings.problems.append(f"{chunk}: {negative} second moments are negative.")


def _check_masters(checkpoint: Checkpoint, broken: set[str], findings: Findings) -> None:
    """Compare main parameters, rounded to the weights' type, with the weights."""
    for key, stored in checkpoint.tensors.items():
        prefix = next((p for p in _MAIN if key.startswith(p)), None)
        if prefix is None or key in broken:
            continue
        model_key, layer = _weight_of(checkpoint, key.removeprefix(prefix))
        if model_key is None or model_key in broken:
            findings.notes.append(f"{key}: not compared with weights, which are missing or broken.")
            continue
        count = 0
        for offset, window in checkpoint.windows(stored):
            lead = window.reshape((1,) * len(layer) + tuple(window.shape))
            count += count_unsound(checkpoint, model_key, (*layer, *offset), lead)
        if count:
            findings.problems.append(
                f"{key}: rounded to the weights' type, {count} of {math.prod(stored.shape)} main "
                f"parameters differ from {model_key}, so the state is not that of this model."
            )


def _weight_of(checkpoint: Checkpoint, key: str) -> tuple[str | None, tuple[int, ...]]:
    try:
        parameter = parameter_of(checkpoint, key)
    except CorruptError:
        return None, ()
    return parameter.model_key, parameter.layer


def _check_adam_mini(checkpoint: Checkpoint, broken: set[str], findings: Findings) -> None:
    """Check the stored state of Adam-mini against its identity."""
    identity = checkpoint.optimizer["adam_mini"]
    # Absent if it was saved by a function of Megatron's that Adam-mini had not wrapped.
    if checkpoint.content.get("adam_mini", identity) != identity:
        findings.problems.append(
            "The identity of Adam-mini's state in the content metadata is not the one in the "
            "optimizer's common state."
        )
    step = checkpoint.optimizer.get("step")
    if not isinstance(step, int) or step < 0:
        findings.problems.append(f"The optimizer's step is {step!r}; it must be 0 or more.")
    if format_of(identity) == BUCKETS:
        findings.notes.append("State in flat buckets: blocks are not checked.")
        return
    try:
        state = find_mini_state(checkpoint)
    except (CorruptError, UnreadableError) as error:
        findings.problems.append(str(error))
        return
    listed = _parameters_in_manifest(state, findings)
    _check_manifest(state, listed, findings)
    for parameter in listed:
        if parameter.key not in state.elementwise:
            key = state_key("v_row", parameter.key)
            is_sound = key in checkpoint.tensors and key not in broken
            rows = checkpoint.read(key) if is_sound else None
            _check_blocks(checkpoint, state, parameter, rows, findings)


def _parameters_in_manifest(state: MiniState, findings: Findings) -> list[StoredParameter]:
    """Return the parameters that the manifest lists; it must list all of them and no others."""
    for parameter in state.parameters:
        if parameter.key not in state.rules:
            findings.problems.append(f"{parameter.key} has state, but is not in the manifest.")
    keys = {parameter.key for parameter in state.parameters}
    without_state = state.rules.keys() - keys - {whole_of(key) for key in keys}
    for name in sorted(state.rules[key].name for key in without_state):
        findings.problems.append(f"{name} is in the manifest, but has no state.")
    return [parameter for parameter in state.parameters if parameter.key in state.rules]


def _check_manifest(
    state: MiniState, parameters: list[StoredParameter], findings: Findings
) -> None:
    """Check that the options yield the rules; and names, shapes and rules, the hash."""
    config = config_of(state.identity)
    hashed: dict[str, tuple[str, tuple[int, ...], str, str]] = {}
    for parameter in parameters:
        name, rule, _ = state.rules[parameter.key]
        role = role_of(name, len(parameter.shape))
        # Patterns match the names of the run that saved, which depend on its implementation.
        made = [
            rule_for(ParameterInfo(name=called, shape=parameter.shape, role=role), config)
            for called in (name, name_of(parameter.key, local=True))
        ]
        if rule not in made and rule == "element":
            # The role may be younger than the checkpoint.
            findings.notes.append(
                f"{name}: full v; a run that loads it now averages to rule {made[0]!r}, if given "
                "--adam-mini-convert-partition."
            )
        elif rule not in made:
            findings.problems.append(
                f"{name}: the manifest says rule {rule!r}, its options make {made[0]!r}."
            )
        if (rule == "element") != (parameter.key in state.elementwise):
            findings.problems.append(f"{name}: rule {rule!r}, but v is stored otherwise.")
        # Parts of one parameter share its name; together they have its rows.
        rows = hashed[name][1][0] if name in hashed else 0
        shape = (rows + parameter.shape[0], *parameter.shape[1:])
        hashed[name] = (name, shape, role, rule)
    own = manifest_hash(state.identity["partition"], hashed.values())
    if own != state.identity["manifest_hash"]:
        findings.problems.append(
            f"The manifest hash is {state.identity['manifest_hash']}, but names, shapes and rules "
            f"that are stored make {own}."
        )


def _check_blocks(
    checkpoint: Checkpoint,
    state: MiniState,
    parameter: StoredParameter,
    rows: Tensor | None,
    findings: Findings,
) -> None:
    """Check that rows of one block hold one value, and that the number of blocks is right.

    Rows of column sets hold 0.
    """
    name, rule, promised = state.rules[parameter.key]
    args = checkpoint.common.get("args")
    told = parameter.key in state.identity.get("heads", {})
    if args is None and not told and rule in ("qkv", "head"):
        findings.notes.append(f"{name}: heads not checked, the checkpoint holds no args.")
        return
    try:
        blocks = stored_blocks(state, parameter, args)
    except ValueError as error:
        findings.problems.append(str(error))
        return
    if blocks.num_blocks != promised:
        findings.problems.append(
            f"{name}: the manifest says {promised} blocks, its shape makes {blocks.num_blocks}."
        )
    if blocks.pattern is None:
        return
    key = state_key("v_column", parameter.key)
    sets = checkpoint.tensors[key].shape[0] if parameter.key in state.by_column else 0
    if sets != blocks.pattern.num_column_sets:
        findings.problems.append(
            f"{key}: {sets} column sets, its rule makes {blocks.pattern.num_column_sets}."
        )
    if (parameter.key in state.by_row) != bool(blocks.pattern.num_row_blocks):
        findings.problems.append(f"{name}: rule {rule!r}, but v of rows is stored otherwise.")
    if rows is None:
        return
    if rows.numpy()[blocks.pattern.column_set_of_rows() >= 0].any():
        findings.problems.append(
            f"{state_key('v_row', parameter.key)}: rows whose columns have v hold others than 0."
        )
    labels, values = blocks.pattern.block_of_rows(), rows.numpy()
    first = np.zeros(blocks.num_blocks, dtype=values.dtype)
    first[labels[::-1]] = values[::-1]
    odd = np.flatnonzero(first[labels].view(np.int32) != values.view(np.int32))
    if len(odd):
        findings.problems.append(
            f"{state_key('v_row', parameter.key)}: row {odd[0]} holds {values[odd[0]]}, other rows "
            f"of its block {first[labels[odd[0]]]}; {len(odd)} rows differ from their block."
        )
