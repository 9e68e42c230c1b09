"""Report of a checkpoint's content, from metadata and common state alone; no tensor is read."""

from __future__ import annotations

import math
from typing import Any

from megatron_adam_mini.adam_rules import ADAM_PREFIX, members_of, steps_of
from megatron_adam_mini.checkpoint.reader import COMMON_KEY, Checkpoint
from megatron_adam_mini.plan.manifest import STATE_PREFIX, format_of


def inspect(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return a report of plain values: step, format, rules, blocks, bytes by kind and more."""
    common, optimizer = checkpoint.common, checkpoint.optimizer
    identity = optimizer.get("adam_mini")
    chunks = [chunk for tensor in checkpoint.tensors.values() for chunk in tensor.chunks]
    report: dict[str, Any] = {
        "checkpoint": str(checkpoint.folder),
        "iteration": common.get("iteration"),
        "optimizer": _optimizer_kind(checkpoint, identity),
        "step": _step(optimizer),
        "bytes": _bytes_by_kind(checkpoint),
        "tensors": len(checkpoint.tensors),
        "chunks": len(chunks),
        "files": len({chunk.path for chunk in chunks}),
        "objects": len(checkpoint.objects),
        "other_content": sorted(k for k in common if k not in ("optimizer", "content_metadata")),
        "versions": {
            "torch_dist": checkpoint.config.get("sharded_backend_version"),
            "metadata": getattr(checkpoint.metadata, "version", None),
            "megatron_checkpoint": common.get("checkpoint_version"),
        },
    }
    if identity is not None:
        rules = identity["rules"]
        report["versions"]["adam_mini_format"] = identity["format"]
        report["versions"]["adam_mini_rules"] = identity["partition"]["rule_version"]
        report["adam_mini"] = {
            "layout": format_of(identity),
            "saved_from": identity["saved_from"],
            "storage": identity.get("storage"),
            "preset": identity["partition"]["preset"],
            "value_as_block": identity["partition"]["value_as_block"],
            "overrides": identity["partition"]["overrides"],
            "manifest_hash": identity["manifest_hash"],
            "parameters": len(rules),
            "blocks": sum(blocks for _, blocks in rules.values()),
            "elements": sum(
                math.prod(t.shape)
                for key, t in checkpoint.tensors.items()
                if key.startswith((f"{STATE_PREFIX}param.", f"{STATE_PREFIX}bucket.param."))
            ),
            "rules": rules,
        }
    return report


def as_text(report: dict[str, Any]) -> str:
    """Return the report as text."""
    lines = [
        report["checkpoint"],
        f"  iteration     {_or_dash(report['iteration'])}",
        f"  optimizer     {report['optimizer']}, step {_or_dash(report['step'])}",
    ]
    mini = report.get("adam_mini")
    if mini:
        sizes = ", ".join(f"{key} {value}" for key, value in mini["saved_from"].items())
        options = " value-as-block" if mini["value_as_block"] else ""
        options += "".join(f" {pattern}={rule}" for pattern, rule in mini["overrides"])
        storage = ", ".join(f"{key} {value}" for key, value in (mini["storage"] or {}).items())
        lines += [
            f"  layout        {mini['layout']}, saved from {sizes}",
            f"  partition     {mini['preset']}{options}, manifest {mini['manifest_hash']}",
            f"  in memory     {storage or 'not stored'}",
            f"  blocks        {mini['blocks']:,} for {mini['elements']:,} elements of "
            f"{mini['parameters']} parameters",
        ]
    for kind, count in report["bytes"].items():
        lines.append(f"  {kind:<13} {_size(count)} ({count:,} bytes)")
    lines.append(
        f"  stored as     {report['tensors']} tensors in {report['chunks']} chunks, "
        f"{report['objects']} objects, {report['files']} files"
    )
    lines.append(f"  also          {', '.join(report['other_content']) or '-'}")
    lines.append("  versions      " + ", ".join(f"{k} {v}" for k, v in report["versions"].items()))
    return "\n".join(lines)


def _optimizer_kind(checkpoint: Checkpoint, identity: Any) -> str:
    if identity is not None:
        return "adam_mini"
    if any(key.startswith(f"{ADAM_PREFIX}exp_avg_sq.") for key in checkpoint.tensors):
        return "adam"
    return "other" if checkpoint.optimizer else "none"


def _step(optimizer: dict[str, Any]) -> int | None:
    if "step" in optimizer:
        return int(optimizer["step"])
    inner = members_of(optimizer)[0].get("optimizer")
    steps = steps_of(inner) if isinstance(inner, dict) else []
    return steps[0] if len(steps) == 1 else None


def _bytes_by_kind(checkpoint: Checkpoint) -> dict[str, int]:
    found: dict[str, int] = {}
    for key, tensor in checkpoint.tensors.items():
        kind = "model"
        for prefix in (f"{STATE_PREFIX}bucket.", STATE_PREFIX, ADAM_PREFIX):
            if key.startswith(prefix):
                kind = key.removeprefix(prefix).partition(".")[0]
                break
        else:
            if key.startswith("optimizer."):
                kind = "optimizer"
        found[kind] = found.get(kind, 0) + tensor.num_bytes
    found["objects"] = sum(
        chunk.length for key, chunk in checkpoint.objects.items() if key != COMMON_KEY
    )
    return {kind: count for kind, count in found.items() if count}


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def _or_dash(value: Any) -> Any:
    return "-" if value is None else value
