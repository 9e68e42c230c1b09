"""Memory of a planned run -> one JSON-like dict, and that dict as text.

Imports the modules of this package before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_adam_mini.config import AdamMiniConfig
from megatron_adam_mini.estimate.flags import vars_of
from megatron_adam_mini.estimate.memory import (
    HOST_KINDS,
    KINDS,
    MAX_SHARING,
    Planner,
    Sharing,
    StageMemory,
    StateFormat,
    formats_of,
    largest_rank,
)
from megatron_adam_mini.estimate.models import Model
from megatron_adam_mini.estimate.parallel import Parallel
from megatron_adam_mini.plan.manifest import partition_fields

_GB = 10**9
_SHARES = {"1%": 0.01, "5%": 0.05}
_HEADS = {
    "rank": "rank",
    "weights": "weights",
    "gradients": "gradients",
    "main_param": "master",
    "exp_avg": "m",
    "exp_avg_sq": "v",
    "total": "total",
}


def memory_report(
    model: Model,
    parallel: Parallel,
    options: AdamMiniConfig,
    *,
    offload_fraction: float = 0.0,
    every_rank: bool = False,
) -> dict[str, Any]:
    """Return bytes per rank for every kind of state, and the number of ranks each saving reaches.

    Args:
        model: the model.
        parallel: the layout.
        options: of Adam-mini.
        offload_fraction: of Adam-mini's state, in host memory.
        every_rank: whether to list all ranks.

    Raises:
        ValueError: the layout does not fit the model, or options do not apply.
    """
    planner = Planner(model, parallel, options)
    stages = planner.stages(parallel, offload_fraction=offload_fraction)
    sharing = Sharing(planner)
    optimizers: dict[str, Any] = {}
    for name, form in formats_of(parallel).items():
        entry: dict[str, Any] = {"label": form.label, "largest_rank": largest_rank(stages, form)}
        if name != "adam":
            adam = optimizers["adam"]["largest_rank"]["total"]
            entry["saved_share"] = 1 - entry["largest_rank"]["total"] / adam
            entry["largest_sharing"] = {
                text: sharing.largest(name, share) for text, share in _SHARES.items()
            }
        optimizers[name] = entry
    report = {
        "model": vars_of(model),
        "layout": vars_of(parallel),
        "partition": partition_fields(options),
        "offload_fraction": offload_fraction,
        "parameters": planner.num_parameters(),
        "ranks": parallel.world_size,
        "state_shared_by": {"dense": parallel.dense_shards, "expert": parallel.expert_shards},
        "optimizers": optimizers,
        "stages": [_stage(planner, number, stage) for number, stage in enumerate(stages)],
    }
    if every_rank:
        kinds = (*KINDS, *HOST_KINDS) if offload_fraction else KINDS
        report["every_rank"] = {
            name: _every_rank(stages, form, kinds) for name, form in formats_of(parallel).items()
        }
    return report


def in_words(report: dict[str, Any]) -> str:
    """Return the report as text."""
    layout, shared = report["layout"], report["state_shared_by"]
    sizes = [
        ("TP", layout["tensor_model_parallel_size"]),
        ("PP", layout["pipeline_model_parallel_size"]),
        ("CP", layout["context_parallel_size"]),
        ("DP", layout["data_parallel_size"]),
    ]
    experts = report["model"]["num_experts"] is not None
    if experts:
        etp = layout["expert_tensor_parallel_size"] or layout["tensor_model_parallel_size"]
        sizes += [("EP", layout["expert_model_parallel_size"]), ("ETP", etp)]
    ranks = report["ranks"]
    lines = [
        f"{report['parameters']:,} parameters, {ranks:,} rank{'s' if ranks > 1 else ''}: "
        + ", ".join(f"{name} {size}" for name, size in sizes)
        + f". Ranks that share the state: d = {shared['dense']}"
        + (f", for experts {shared['expert']}." if experts else "."),
        "The rank that holds most, in GB (10^9 bytes):",
        "",
    ]
    label = max(len(entry["label"]) for entry in report["optimizers"].values())
    heads = "".join(f"{text:>10}" for text in _HEADS.values())
    offloaded = report["offload_fraction"] > 0.0
    heads += f"{'m + v':>10}" + (f"{'host':>10}" if offloaded else "")
    lines.append(f"{'':<{label}}{heads}{'saved':>9}{'1 %':>7}{'5 %':>7}")
    for entry in report["optimizers"].values():
        rank = entry["largest_rank"]
        cells = [f"{rank['rank']:>10}"]
        numbers = [rank[kind] for kind in _HEADS if kind != "rank"]
        numbers.append(rank["exp_avg"] + rank["exp_avg_sq"])
        if offloaded:
            numbers.append(sum(rank[kind] for kind in HOST_KINDS))
        cells += [f"{_in_gb(value):>10}" for value in numbers]
        if "saved_share" in entry:
            cells.append(f"{100 * entry['saved_share']:>7.1f} %")
            cells += [f"{_reach(entry['largest_sharing'][text]):>7}" for text in _SHARES]
        lines.append(f"{entry['label']:<{label}}" + "".join(cells))
    lines += [
        "",
        "saved: of this rank's bytes. 1 %, 5 %: the largest d at which that much of the bytes of "
        "all",
        "ranks is still saved, with the other sizes as they are (CP 1, one optimizer instance).",
        "Not in total: launch tables of the GPU kernels, at most "
        f"{_in_gb(report['optimizers']['adam_mini']['largest_rank']['launch_tables'])} here.",
    ]
    if offloaded:
        lines += [
            "host: Adam-mini's state in host memory, which no other column counts; Adam's stays on",
            "the device. 1 %, 5 %: without offload. Copies take up to 50 MB more, and 4 bytes per "
            "block.",
        ]
    return "\n".join(lines).rstrip()


def _in_gb(value: int) -> str:
    return f"{value / _GB:.{3 if value >= _GB // 100 else 6}f}"


def _reach(ranks: int | None) -> str:
    if ranks is None:
        return "never"
    return f">={ranks}" if ranks == MAX_SHARING else str(ranks)


def _stage(planner: Planner, number: int, stage: StageMemory) -> dict[str, Any]:
    ranks = planner.parallel.world_size // planner.parallel.pp
    optimizers = {}
    for name, form in formats_of(planner.parallel).items():
        found = largest_rank([stage], form)
        optimizers[name] = {**found, "stage": number, "rank": number * ranks + found["rank"]}
    return {
        "stage": number,
        "layers": [layer for chunk in planner.layers[number] for layer in chunk],
        "parameters_per_rank": stage.num_parameters,
        "buffer_elements_per_rank": stage.buffer_numel,
        "optimizers": optimizers,
    }


def _every_rank(
    stages: list[StageMemory], form: StateFormat, kinds: Sequence[str]
) -> list[dict[str, int]]:
    found = []
    for stage in stages:
        num_bytes = stage.bytes_of(form)
        columns = [num_bytes[kind].tolist() for kind in kinds]
        found += [dict(zip(kinds, row, strict=True)) for row in zip(*columns, strict=True)]
    return found
