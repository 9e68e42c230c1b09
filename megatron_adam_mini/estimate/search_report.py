"""Layouts of a search -> one JSON-like dict, and that dict as text.

Imports ``search`` and the modules before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_adam_mini.config import AdamMiniConfig
from megatron_adam_mini.estimate.flags import vars_of
from megatron_adam_mini.estimate.memory import FORMATS, Planner
from megatron_adam_mini.estimate.models import Model
from megatron_adam_mini.estimate.parallel import Cluster, Parallel, flag
from megatron_adam_mini.estimate.search import Candidate

_GB = 10**9
#: Forms of Adam-mini's state that save most; FP8 weights leave no remainders.
_SMALLEST = ("adam_mini_remainders_bf16_m", "adam_mini_bf16_m")
_SIZES = {
    "TP": "tensor_model_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "CP": "context_parallel_size",
    "EP": "expert_model_parallel_size",
    "DP": "data_parallel_size",
}
#: The table ends after this many layouts; JSON has them all.
_ROWS = 30


def search_report(
    model: Model, cluster: Cluster, candidates: Sequence[Candidate]
) -> dict[str, Any]:
    """Return for each layout what it needs, and with which optimizers it fits."""
    memory, totals = cluster.gpu_memory, candidates[0].totals
    smallest = next(name for name in _SMALLEST if name in totals)
    return {
        "model": vars_of(model),
        "cluster": vars(cluster),
        "parameters": Planner(model, Parallel(), AdamMiniConfig()).num_parameters(),
        "activations": "Megatron's estimate" if candidates[0].activations else None,
        # What is compared, with its name in the table.
        "shown": {"adam": "Adam", "adam_mini": "Adam-mini", smallest: "16 bit"},
        "layouts": [
            {
                "layout": vars_of(candidate.parallel),
                "bytes": dict(candidate.totals),
                "activations": dict(candidate.activations),
                "fits": [name for name in totals if candidate.fits(name, memory)],
                "largest_micro_batch": {
                    name: candidate.largest_micro_batch(name, memory) for name in totals
                },
            }
            for candidate in candidates
        ],
    }


def fitting(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the layouts that fit with one of the optimizers shown."""
    return [entry for entry in report["layouts"] if set(report["shown"]) & set(entry["fits"])]


def name_of(entry: dict[str, Any], *, experts: bool) -> str:
    """Return a layout in short, such as ``TP 2 PP 4 CP 1 DP 8``."""
    sizes = [key for key in _SIZES if key != "EP" or experts]
    return " ".join(f"{key} {entry['layout'][_SIZES[key]]}" for key in sizes)


def search_in_words(report: dict[str, Any]) -> str:
    """Return the layouts that fit as a table."""
    cluster, rows = report["cluster"], fitting(report)
    only_mini = [entry for entry in rows if "adam" not in entry["fits"]]
    lines = [
        f"{report['parameters']:,} parameters on {cluster['world_size']:,} GPUs of "
        f"{cluster['gpu_memory'] / _GB:g} GB, {cluster['seq_length']:,} tokens per sequence, "
        f"{cluster['global_batch_size']:,} sequences per step.",
        f"Layouts: {len(report['layouts'])} are possible, {len(rows)} fit, {len(only_mini)} of "
        "these only with Adam-mini (*).",
    ]
    if rows:
        lines += ["", *_table(report, rows[:_ROWS])]
    if len(rows) > _ROWS:
        lines.append(f"... and {len(rows) - _ROWS} more with more model-parallel ranks: --json.")
    return "\n".join([*lines, "", *_notes(report)])


def _table(report: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[str]:
    experts = report["model"]["num_experts"] is not None
    sizes = [key for key in _SIZES if key != "EP" or experts]
    estimated = report["activations"] is not None
    width = 5 * len(sizes) + 2
    over = f"{'':<{width}}{'weights, gradients, state':>33}"
    heads = "  " + "".join(f"{key:>5}" for key in sizes)
    heads += "".join(f"{label:>11}" for label in report["shown"].values())
    if estimated:
        over += f"{'activations':>14}   largest micro-batch with"
        heads += f"{'of one':>14}" + "".join(f"{label:>11}" for label in report["shown"].values())
    return [over.rstrip(), heads, *(_row(entry, sizes, report) for entry in rows)]


def _row(entry: dict[str, Any], sizes: Sequence[str], report: dict[str, Any]) -> str:
    fits, layout, shown = entry["fits"], entry["layout"], report["shown"]
    cells = ["  " if "adam" in fits else "* "]
    cells += [f"{layout[_SIZES[key]]:>5}" for key in sizes]
    if report["activations"] is not None:
        cells += [f"{entry['bytes'][name] / _GB:>11.2f}" for name in shown]
        cells.append(f"{entry['activations'][1] / _GB:>14.2f}")
        cells += [f"{entry['largest_micro_batch'][name] or '-':>11}" for name in shown]
    else:
        # Without activations, a number that does not fit is put in brackets.
        for name in shown:
            text = f"{entry['bytes'][name] / _GB:.2f}"
            cells.append(f"{text if name in fits else f'({text})':>11}")
    # What was chosen beside the sizes: how layers are cut where the stages do not divide them.
    cut = "decoder_last_pipeline_num_layers"
    return "".join(cells) + (f"  {flag(cut)} {layout[cut]}" if layout[cut] else "")


def _notes(report: dict[str, Any]) -> list[str]:
    smallest = FORMATS[list(report["shown"])[-1]].label
    lines = [
        f"GB (10^9 bytes) of the largest rank. 16 bit: {smallest}.",
        "Adam: with float32 state; Megatron's precision-aware Adam is in --json.",
        "Exact: weights, gradients and state. Not counted: CUDA, NCCL, fragmentation.",
    ]
    if report["activations"] is not None:
        lines += [
            "Megatron's estimate: activations, of the first pipeline stage, with sequence",
            "parallelism and without full recomputation.",
        ]
    else:
        lines += [
            "Not counted either: activations. Numbers in brackets do not fit, and others may not.",
            "Megatron has an estimate, but is not installed here: pip install megatron-core.",
        ]
    etp = report["layouts"][0]["layout"]["expert_tensor_parallel_size"]
    if etp is not None:
        lines.append(f"All layouts have --expert-tensor-parallel-size {etp}.")
    return lines
