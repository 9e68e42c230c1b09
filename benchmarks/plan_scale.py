"""Plan large models on large layouts, without tensors: time, cut blocks, traffic, balance.

    python benchmarks/plan_scale.py                        # the table, about a minute
    python benchmarks/plan_scale.py --output FILE.md       # and as a dated results file

For each layout one rank of the stage with the most elements is planned as the optimizer does at
construction. Columns:

* seconds: parameters -> blocks -> buckets -> segments of the rank -> reduction plan. Of it,
  *segments and reduction* is what Adam-mini adds to Megatron's own start-up.
* segments: of the planned rank (numbers of v of blocks); largest / mean over the stage's
  data-parallel ranks of all numbers of v.
* cut: boundaries between slices of the stage that cut a block.
* DP, TP: bytes of the vectors that this rank receives per step in the data-parallel and in the
  tensor-parallel group (dense and expert together), as ``communication_per_step`` counts them.
* share: their sum over the bytes of the gradients that this rank hands to its reduce-scatters.
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

from megatron_adam_mini.config import AdamMiniConfig
from megatron_adam_mini.layout import BucketLayout, cut_boundaries, segment_slice, slice_size
from megatron_adam_mini.partition import ParameterBlocks
from megatron_adam_mini.planning.buckets import plan_stage, stage_blocks
from megatron_adam_mini.planning.models import MODELS
from megatron_adam_mini.planning.parallel import Parallel
from megatron_adam_mini.reduction import ReductionPlan, plan_reduction

_PIPELINES = {
    # 126 layers: as published, the first and the last stage hold one layer less.
    "llama-3-405b": {
        size: {
            "account_for_embedding_in_pipeline_split": size > 2,
            "account_for_loss_in_pipeline_split": size > 2,
        }
        for size in (1, 2, 4, 8, 16)
    },
    # 61 layers; the first three are dense.
    "deepseek-v3-like": {
        1: {},
        2: {"decoder_first_pipeline_num_layers": 31},
        4: {"decoder_first_pipeline_num_layers": 16},
        8: {"decoder_first_pipeline_num_layers": 7, "decoder_last_pipeline_num_layers": 6},
        16: {"decoder_first_pipeline_num_layers": 3, "decoder_last_pipeline_num_layers": 2},
    },
    "llama-2-7b": {1: {}},
}


@dataclass(frozen=True)
class Domain:
    """Buckets of one pair of process groups, and this rank's places in the groups."""

    buckets: list[BucketLayout]
    shards: int
    shard: int
    tp_size: int


@dataclass(frozen=True)
class Result:
    """What planning one rank took and found."""

    seconds: float
    seconds_added: float
    elements: int
    segments: int
    imbalance: float
    cuts: int
    dp_bytes: int
    tp_bytes: int
    collectives: int
    gradient_bytes: int

    @property
    def share(self) -> float:
        """Added bytes over gradient bytes."""
        return (self.dp_bytes + self.tp_bytes) / self.gradient_bytes


def plan(name: str, parallel: Parallel, options: AdamMiniConfig) -> Result:
    """Plan one rank in the middle of the data-parallel group."""
    model = MODELS[name]
    stage = 0 if parallel.pp <= 2 else 1
    gc.collect()
    started = time.perf_counter()
    chunks = stage_blocks(model, parallel, options, pp_rank=stage)
    described = plan_stage(model, parallel, chunks, pp_rank=stage)
    domains = [
        Domain(described.dense, parallel.dense_shards, parallel.dense_shards // 2, parallel.tp),
        Domain(described.expert, parallel.expert_shards, parallel.expert_shards // 2, parallel.etp),
    ]
    added = time.perf_counter()
    plans: list[ReductionPlan] = []
    segments = 0
    for domain in domains:
        parts = [segment_slice(b, described.parameters, domain.shard) for b in domain.buckets]
        segments += sum(part.num_segments for part in parts)
        plans.append(
            plan_reduction(
                domain.buckets,
                parts,
                described.parameters,
                dp_rank=domain.shard,
                tp_rank=0,
                tp_size=domain.tp_size,
                dp_replicas=parallel.num_distributed_optimizer_instances > 1,
            )
        )
    ended = time.perf_counter()
    balances = [_second_moments(domain, described.parameters) for domain in domains]
    gathers = [p for p in plans if p.gathers]
    sums = [p for p in plans if p.tp_numel]
    buckets = described.dense + described.expert
    return Result(
        seconds=ended - started,
        seconds_added=ended - added,
        elements=sum(bucket.numel for bucket in buckets),
        segments=segments,
        imbalance=sum(b.max() for b in balances) / max(1.0, sum(b.mean() for b in balances)),
        cuts=sum(int(cut_boundaries(b, described.parameters).sum()) for b in buckets),
        dp_bytes=sum(4 * p.dp_size * p.num_contributions for p in gathers),
        tp_bytes=sum(4 * p.tp_numel for p in sums),
        collectives=len(gathers) + len(sums),
        gradient_bytes=sum(4 * bucket.numel for bucket in buckets),
    )


def _second_moments(domain: Domain, parameters: list[ParameterBlocks]) -> np.ndarray:
    found = np.zeros(domain.shards)
    for bucket in domain.buckets:
        for rank in range(domain.shards):
            size = slice_size(bucket, parameters, rank)
            found[rank] += size.num_segments + size.num_elementwise
    return found


def layouts(quick: bool) -> list[tuple[str, Parallel]]:
    """Return the layouts of the table."""
    found = [("llama-2-7b", Parallel(tensor_model_parallel_size=8, data_parallel_size=8))]
    for overlap in (False, True):
        for name in ("llama-3-405b", "deepseek-v3-like"):
            sizes = [(8, 16, dp) for dp in (1, 8, 64, 256, 1024)]
            if not overlap:
                sizes += [(1, 16, 64), (2, 16, 64), (8, 1, 64), (8, 4, 64)]
            for tp, pp, dp in sizes[:2] if quick else sizes:
                ranks = tp * dp
                experts = name.startswith("deepseek")
                found.append(
                    (
                        name,
                        Parallel(
                            tensor_model_parallel_size=tp,
                            pipeline_model_parallel_size=pp,
                            data_parallel_size=dp,
                            expert_tensor_parallel_size=1 if experts else None,
                            expert_model_parallel_size=min(64, ranks) if experts else 1,
                            overlap_grad_reduce=overlap,
                            **_PIPELINES[name][pp],
                        ),
                    )
                )
    return found


_HEAD = [
    *("model", "TP x PP x DP (EP)", "overlap", "elements", "seconds", "added s", "segments"),
    *("largest / mean", "cut", "collectives", "DP bytes", "TP bytes", "share"),
]


def row(name: str, parallel: Parallel, result: Result) -> list[str]:
    """Return one line of the table."""
    ep = parallel.expert_model_parallel_size
    return [
        name,
        f"{parallel.tp} x {parallel.pp} x {parallel.data_parallel_size}"
        + (f" ({ep})" if ep > 1 else ""),
        "yes" if parallel.overlap_grad_reduce else "no",
        f"{result.elements:,}",
        f"{result.seconds:.2f}",
        f"{result.seconds_added:.2f}",
        f"{result.segments:,}",
        f"{result.imbalance:.2f}",
        f"{result.cuts:,}",
        f"{result.collectives}",
        f"{result.dp_bytes:,}",
        f"{result.tp_bytes:,}",
        f"{100 * result.share:.4f} %",
    ]


def main() -> None:
    """Print the table, line by line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, help="write a results file")
    parser.add_argument("--machine", default=platform.machine(), help="named in the results file")
    parser.add_argument("--quick", action="store_true", help="a few small layouts")
    args = parser.parse_args()
    lines = [f"| {' | '.join(_HEAD)} |", "|" + "---|" * len(_HEAD)]
    print("\n".join(lines), flush=True)
    for name, parallel in layouts(args.quick):
        line = f"| {' | '.join(row(name, parallel, plan(name, parallel, AdamMiniConfig())))} |"
        print(line, flush=True)
        lines.append(line)
    if args.output:
        args.output.write_text(
            f"# Planning at scale, {datetime.date.today().isoformat()}\n\n"
            f"Command: `python benchmarks/plan_scale.py`. Machine: {args.machine}, one process, "
            f"load average {os.getloadavg()[0]:.1f}. Python {platform.python_version()}, numpy "
            f"{np.__version__}, torch {torch.__version__.partition('+')[0]}. One run each. "
            "Columns: see the script.\n\n" + "\n".join(lines) + "\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
