"""Launches of a step, and its time on paper, as tables; ``plan_scale`` prints them.

``launches``: what a step launches by kind, counted without a GPU (see ``benchmarks.launches``), and
the milliseconds that the host needs for it (see ``host_time``), for the plans by which the goals of
20 and 0.5 ms are judged, and three further ones.

``step``, made by a model (see ``step_time``), not by measurement:

* launches: of Adam-mini, counted; stock's: of Megatron's Adam, by its source.
* memory, launching, exchange, norm: milliseconds of the parts of Adam-mini's step; ms: their sum.
  Exchange: the collectives that complete cut blocks, which stock Adam does not have.
* stock ms: the sum for stock Adam; of stock: ours divided by it.
* weights: milliseconds of the all-gather of weights, equal on both sides; with it: the ratio if it
  is added to both, as where it does not overlap the next forward pass.
* host: milliseconds that the host needs to launch Adam-mini's step; the device waits for what of it
  does not fit into the end of the backward pass.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks import step_time
from benchmarks.host_time import host_seconds
from benchmarks.large_layouts import Case, layout_of, parallel_of
from benchmarks.launches import count_launches, rank_plan
from megatron_adam_mini.config import AdamMiniConfig

#: TP, PP and DP whose steps are timed on paper, up to 4,096 ranks.
_STEPS = {
    "llama-2-7b": [(1, 1, 8), (1, 1, 64), (1, 1, 512), (8, 1, 8), (8, 1, 64), (8, 1, 512)],
    "llama-3-8b": [(1, 1, dp) for dp in (8, 64, 128, 256, 512, 4096)],
    "llama-3-405b": [(8, 16, 1), (8, 16, 8), (8, 16, 32)],
    "deepseek-v3-like": [(8, 16, 1), (8, 16, 8), (8, 16, 32), (1, 16, 256)],
}
_RESULTS = Path(__file__).parent / "results" / "2026-11-28-gpu.md"

LAUNCHES_HEAD = [
    *("model", "TP x PP x DP (EP)", "remark"),
    *("Triton", "torch", "collectives", "all", "host ms"),
]


def launch_cases() -> list[Case]:
    """Return the ranks whose launches are counted."""
    large = parallel_of("llama-3-405b", 8, 16, 1024)
    return [
        Case("llama-2-7b", parallel_of("llama-2-7b", 1, 1, 8, overlap_grad_reduce=True)),
        Case("llama-3-8b", parallel_of("llama-3-8b", 1, 1, 64, overlap_grad_reduce=True)),
        Case("llama-3-405b", large),
        Case("deepseek-v3-like", parallel_of("deepseek-v3-like", 8, 16, 64)),
        Case("llama-3-405b", large, AdamMiniConfig(single_phase=True), "single phase"),
        Case("llama-3-405b", large, AdamMiniConfig(value_as_block=True), "value as block"),
        Case(
            "llama-2-7b",
            parallel_of("llama-2-7b", 8, 1, 8),
            remark="without distributed optimizer",
            distributed_optimizer=False,
        ),
    ]


def launch_row(case: Case) -> list[str]:
    """Return one line of the table of launches."""
    plan = rank_plan(
        case.model,
        case.parallel,
        case.options,
        stage=case.stage,
        distributed_optimizer=case.distributed_optimizer,
    )
    found = count_launches(plan, case.options)
    numbers = (found.triton, found.torch, found.collectives, found.total)
    host = f"{1e3 * host_seconds(plan, case.options):.2f}"
    return [case.name, layout_of(case.parallel), case.remark, *map(str, numbers), host]


STEP_HEAD = [
    *("model", "TP x PP x DP (EP)", "ranks", "elements", "launches", "stock's", "GPU"),
    *("memory", "launching", "exchange", "norm", "ms", "stock ms", "of stock"),
    *("weights", "with it", "host"),
]


def step_cases() -> list[Case]:
    """Return the ranks whose steps are timed on paper; buckets overlap where there is one stage."""
    return [
        Case(name, parallel_of(name, *size, overlap_grad_reduce=size[1] == 1))
        for name, sizes in _STEPS.items()
        for size in sizes
    ]


def step_rows(case: Case) -> list[list[str]]:
    """Return the lines of one rank, one for each GPU."""
    parallel = case.parallel
    plan = rank_plan(case.model, parallel, case.options, stage=case.stage)
    rank = step_time.rank_of(plan, parallel, count_launches(plan, case.options))
    rows = []
    for name, gpu in step_time.GPUS.items():
        ours, stock, gather = rank.our_path(gpu), rank.stock_path(gpu), rank.gather(gpu)
        numbers = [*ours, ours.total, stock.total, ours.total / stock.total / 1e3]
        with_gather = (ours.total + gather) / (stock.total + gather) / 1e3
        after = gather, with_gather
        rows.append(
            [
                case.name,
                layout_of(parallel),
                f"{parallel.world_size:,}",
                f"{rank.elements:,}",
                f"{rank.launches.total}",
                f"{rank.stock_launches}",
                name,
                *(f"{1e3 * number:.3f}" for number in (*numbers, *after, rank.host)),
            ]
        )
    return rows


def errors() -> list[str]:
    """Return the model's errors on the measured cases, as a table."""
    lines = ["| measured on one H100 | ms | model | error |", "|---|---|---|---|"]
    for found in step_time.compare(_RESULTS):
        error = f"{100 * found.error:+.1f} %"
        lines.append(f"| {found.case} | {found.measured:.3f} | {found.model:.3f} | {error} |")
    return lines
