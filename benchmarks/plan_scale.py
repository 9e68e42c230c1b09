"""Plan large models on large layouts, without tensors: time, cut blocks, traffic, balance.

    python -m benchmarks.plan_scale                      # all tables, about two minutes
    python -m benchmarks.plan_scale launches step        # some of plan, launches, step
    python -m benchmarks.plan_scale --output FILE.md     # and as a dated results file

For each layout one rank in the middle of its data-parallel group is planned as the optimizer does
at construction: of pipeline stage 1, or of stage 0 where the pipeline is short or gradient
reduction overlaps (only stage 0 has several buckets then), or of the last, which has the layers of
multi-token prediction. Columns of the first table, ``plan``:

* seconds: parameters -> blocks -> buckets -> segments of the rank -> reduction plan; "added s" is
  the last two, which Adam-mini adds to Megatron's own start-up.
* segments: of the planned rank (numbers of v of blocks); largest / mean over the stage's
  data-parallel ranks of all numbers of v, those of elementwise parameters included.
* cut: boundaries between slices of the stage that cut a block.
* collectives, DP bytes, TP bytes: what Adam-mini adds to a step, without the all-reduce of the
  norm, which Megatron has too: bytes of the vectors that a rank receives in the data-parallel and
  in the tensor-parallel group (dense and expert together), as ``communication_per_step`` counts
  them; of the rank with the largest sum among all, or among 64 evenly spaced ones.
* share: that sum divided by the bytes of the float32 gradients in the rank's reduce-scatters.

The other tables, ``launches`` and ``step``: see ``step_tables``.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks import step_tables
from benchmarks.large_layouts import Case, layout_of, parallel_of
from megatron_adam_mini.config import AdamMiniConfig
from megatron_adam_mini.estimate.buckets import plan_stage, stage_blocks
from megatron_adam_mini.estimate.models import Model
from megatron_adam_mini.estimate.parallel import Parallel
from megatron_adam_mini.plan.cut_blocks import cut_row_segments
from megatron_adam_mini.plan.layout import BucketLayout, BufferLayout
from megatron_adam_mini.plan.partition import ParameterBlocks
from megatron_adam_mini.plan.reduction import plan_reduction
from megatron_adam_mini.plan.segments import segment_slice, slice_size

#: Ranks of a data-parallel group whose traffic is counted.
_RANKS = 64


def cases() -> list[Case]:
    """Return the lines of the table."""
    found = [Case("llama-2-7b", parallel_of("llama-2-7b", 8, 1, 8))]
    large = ("llama-3-405b", "deepseek-v3-like")
    for name in large:
        sizes = [(8, 16, dp) for dp in (1, 8, 64, 256, 1024)]
        sizes += [(1, 16, 64), (2, 16, 64), (4, 16, 64), (8, 1, 64), (8, 4, 64), (8, 1, 1024)]
        found += [Case(name, parallel_of(name, *size)) for size in sizes]
    for name in large:
        for dp in (8, 64, 1024):
            parallel = parallel_of(name, 8, 16, dp, overlap_grad_reduce=True)
            found.append(Case(name, parallel, remark="overlap"))
    name = "llama-3-405b"
    for dp in (8, 1024):
        parallel = parallel_of(name, 8, 16, dp)
        found += [
            Case(name, parallel, AdamMiniConfig(value_as_block=True), "value as block"),
            Case(name, parallel, AdamMiniConfig(preset="tensor"), "preset tensor"),
            Case("llama-3-405b-mqa", parallel, remark="heads cut by TP"),
        ]
    for dp in (8, 64, 1024):
        parallel = parallel_of("deepseek-v3-like", 8, 16, dp)
        found.append(Case("deepseek-v3-like-mtp", parallel, remark="last stage, with MTP"))
    instances = parallel_of(name, 8, 16, 1024, num_distributed_optimizer_instances=128)
    return [*found, Case(name, instances, remark="128 instances, d = 8")]


@dataclass(frozen=True)
class Domain:
    """Buckets of one pair of process groups, and the sizes of the groups."""

    buckets: list[BucketLayout]
    shards: int
    tp_size: int


@dataclass(frozen=True)
class Added:
    """Communication that the plan of one rank adds to a step."""

    segments: int
    collectives: int
    dp_bytes: int
    tp_bytes: int

    @property
    def bytes(self) -> int:
        """All bytes that the rank receives."""
        return self.dp_bytes + self.tp_bytes


@dataclass(frozen=True)
class Result:
    """Time and size of one rank's plan, and the added communication of the sampled ranks."""

    seconds: float
    seconds_added: float
    elements: int
    segments: int
    imbalance: float
    cuts: int
    most: Added

    @property
    def share(self) -> float:
        """Added bytes over gradient bytes, on the rank that adds most."""
        return self.most.bytes / (4 * self.elements)


def plan(case: Case) -> Result:
    """Plan one rank in the middle of its data-parallel group, timed, then others."""
    parallel = case.parallel
    instances = parallel.num_distributed_optimizer_instances
    gc.collect()
    started = time.perf_counter()
    domains, parameters = describe(case.model, parallel, case.options, case.stage)
    described = time.perf_counter()
    middle = plan_rank(domains, parameters, 0.5, instances)
    ended = time.perf_counter()
    places = min(_RANKS, parallel.dense_shards)
    balances = [_second_moments(domain, parameters) for domain in domains]
    buckets = [bucket for domain in domains for bucket in domain.buckets]
    return Result(
        seconds=ended - started,
        seconds_added=ended - described,
        elements=sum(bucket.numel for bucket in buckets),
        segments=middle.segments,
        imbalance=sum(b.max() for b in balances) / sum(b.mean() for b in balances),
        cuts=sum(int((cut_row_segments(b, parameters) >= 0).sum()) for b in buckets),
        most=max(
            (plan_rank(domains, parameters, i / places, instances) for i in range(places)),
            key=lambda added: added.bytes,
        ),
    )


def describe(
    model: Model, parallel: Parallel, options: AdamMiniConfig, stage: int
) -> tuple[list[Domain], list[ParameterBlocks]]:
    """Return the buckets of a stage's first tensor-parallel rank, and its parameters."""
    chunks = stage_blocks(model, parallel, options, pp_rank=stage)
    found = plan_stage(model, parallel, chunks, pp_rank=stage)
    domains = [
        Domain(_buckets(found.dense), parallel.dense_shards, parallel.tp),
        Domain(_buckets(found.expert), parallel.expert_shards, parallel.etp),
    ]
    return domains, found.parameters


def _buckets(buffers: list[BufferLayout]) -> list[BucketLayout]:
    return [bucket for buffer in buffers for bucket in buffer.buckets]


def plan_rank(
    domains: list[Domain], parameters: list[ParameterBlocks], place: float, instances: int
) -> Added:
    """Plan the rank that lies at ``place``, from 0 to 1, in its data-parallel groups."""
    plans, segments = [], 0
    for domain in domains:
        shard = int(place * domain.shards)
        parts = [segment_slice(bucket, parameters, shard) for bucket in domain.buckets]
        segments += sum(part.num_segments for part in parts)
        plans.append(
            plan_reduction(
                domain.buckets,
                parts,
                parameters,
                dp_rank=shard,
                tp_rank=0,
                tp_size=domain.tp_size,
                dp_replicas=instances > 1,
            )
        )
    return Added(
        segments=segments,
        collectives=sum((p.dp_numel > 0) + (p.tp_numel > 0) for p in plans),
        dp_bytes=sum(4 * p.dp_numel for p in plans),
        tp_bytes=sum(4 * p.tp_numel for p in plans),
    )


def _second_moments(domain: Domain, parameters: list[ParameterBlocks]) -> np.ndarray:
    found = np.zeros(domain.shards)
    for bucket in domain.buckets:
        for rank in range(domain.shards):
            size = slice_size(bucket, parameters, rank)
            found[rank] += size.num_segments + size.num_elementwise
    return found


_HEAD = [
    *("model", "TP x PP x DP (EP)", "remark", "elements", "seconds", "added s", "segments"),
    *("largest / mean", "cut", "collectives", "DP bytes", "TP bytes", "share"),
]


def row(case: Case, result: Result) -> list[str]:
    """Return one line of the table."""
    return [
        case.name,
        layout_of(case.parallel),
        case.remark,
        f"{result.elements:,}",
        f"{result.seconds:.2f}",
        f"{result.seconds_added:.2f}",
        f"{result.segments:,}",
        f"{result.imbalance:.2f}",
        f"{result.cuts:,}",
        f"{result.most.collectives}",
        f"{result.most.dp_bytes:,}",
        f"{result.most.tp_bytes:,}",
        f"{100 * result.share:.4f} %",
    ]


def main() -> None:
    """Print the tables, line by line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", help="plan, launches, step; default all")
    parser.add_argument("--output", type=Path, help="write a results file")
    parser.add_argument("--machine", default=platform.machine(), help="named in the results file")
    args = parser.parse_args()
    chosen = args.tables or ["plan", "launches", "step"]
    if not {"plan", "launches", "step"}.issuperset(chosen):
        parser.error(f"tables {chosen} are not known; allowed: plan, launches, step.")
    lines: list[str] = []

    def show(*more: str) -> None:
        lines.extend(more)
        print("\n".join(more), flush=True)

    if "plan" in chosen:
        show(*_head(_HEAD))
        for case in cases():
            show(_line(row(case, plan(case))))
    if "launches" in chosen:
        show("", "Launches of a step, counted without a GPU:", "")
        show(*_head(step_tables.LAUNCHES_HEAD))
        for case in step_tables.launch_cases():
            show(_line(step_tables.launch_row(case)))
    if "step" in chosen:
        show(
            "",
            "**A model, not a measurement**; assumptions and sources: `benchmarks/step_time.py`.",
            "",
        )
        show(*_head(step_tables.STEP_HEAD))
        for case in step_tables.step_cases():
            show(*map(_line, step_tables.step_rows(case)))
        show("", "The same model for what was measured:", "", *step_tables.errors())
    if args.output:
        title = "Planning at scale" if "plan" in chosen else "A step on paper"
        args.output.write_text(
            f"# {title}, {datetime.date.today().isoformat()}\n\n"
            f"Command: `python -m benchmarks.plan_scale {' '.join(args.tables)}`. Machine: "
            f"{args.machine}, one process, load average {os.getloadavg()[0]:.1f}. Python "
            f"{platform.python_version()}, numpy {np.__version__}, torch "
            f"{torch.__version__.partition('+')[0]}. One run each. Columns: see the script.\n\n"
            + "\n".join(lines).strip("\n")
            + "\n",
            encoding="utf-8",
        )


def _head(names: list[str]) -> list[str]:
    return [_line(names), "|" + "---|" * len(names)]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
