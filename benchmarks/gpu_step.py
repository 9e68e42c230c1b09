"""Time one optimizer step on a GPU: Adam-mini's Triton kernels against torch's fused AdamW.

Needs a CUDA device. Timed, from gradients in a float32 buffer to bfloat16 model weights, are:

* ``adam_mini two phases``: sums, norm, step sizes, update (gradient clipping is on);
* ``adam_mini one phase``: ``update_in_one_pass_`` (nothing needs the norm first);
* ``fused adamw``: norm, clip, ``AdamW(fused=True)``, cast to bfloat16;
* ``copy``: a float32 copy of the same length, for the bandwidth that this GPU reaches.

They take turns; each sample is the time between two CUDA events, and medians are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from megatron_adam_mini.kernels import BufferTensors, SegmentVectors, StepScalars
from megatron_adam_mini.plan.segment_table import SegmentTable

#: Bytes per element that a step must move: read g twice (one phase: once), read and write m and p,
#: write the weight.
BYTES = {"adam_mini two phases": 26, "adam_mini one phase": 22, "copy": 8}


def make_steps(rows: int, columns: int) -> dict[str, Callable[[], object]]:
    """Return the functions to time, over ``rows * columns`` elements with one block per row."""
    from megatron_adam_mini.kernels import triton_gpu

    device = torch.device("cuda", torch.cuda.current_device())
    numel = rows * columns
    start_S = np.arange(rows, dtype=np.int64) * columns
    table = SegmentTable(start_S, start_S + columns)
    grad = torch.randn(numel, device=device)
    param, other_param = (torch.randn(numel, device=device) for _ in range(2))
    exp_avg, copied = (torch.zeros(numel, device=device) for _ in range(2))
    weight, other_weight = (param.bfloat16() for _ in range(2))
    tensors = BufferTensors(param, exp_avg, weight, grad)
    v, step_size, sum_sq = (torch.zeros(rows, device=device) for _ in range(3))
    inv_numel = torch.full((rows,), 1 / columns, device=device)
    group = torch.zeros(rows, dtype=torch.int32, device=device)
    vectors = SegmentVectors(v, step_size, sum_sq, inv_numel, group)
    domain = torch.zeros(rows, dtype=torch.int8, device=device)
    stats = torch.zeros(1, 2, dtype=torch.float64, device=device)
    scalars = StepScalars(1, device)
    hyper = {"lr": 1e-4, "eps": 1e-8, "weight_decay": 0.1}
    scalars.fill([hyper], betas=(0.9, 0.95), step=1, grad_scale=1.0)

    def two_phases() -> None:
        triton_gpu.segment_sum_sq_(sum_sq, grad, table)
        triton_gpu.norm_partials_(stats, sum_sq, domain)
        scalars.grad_scale.copy_((1.0 / (stats[0, 0].sqrt() + 1e-6)).clamp(max=1.0))
        triton_gpu.segment_step_size_(vectors, scalars)
        triton_gpu.update_(tensors, table, vectors, scalars)

    def one_phase() -> None:
        triton_gpu.update_in_one_pass_(tensors, table, vectors, scalars)

    other_param.requires_grad_()
    other_param.grad = grad.clone()
    adamw = torch.optim.AdamW([other_param], fused=True, betas=(0.9, 0.95), **hyper)

    def fused_adamw() -> None:
        torch.nn.utils.clip_grad_norm_([other_param], 1.0)
        adamw.step()
        other_weight.copy_(other_param.detach())

    return {
        "adam_mini two phases": two_phases,
        "adam_mini one phase": one_phase,
        "fused adamw": fused_adamw,
        "copy": lambda: copied.copy_(grad),
    }


def milliseconds(step: Callable[[], object]) -> float:
    """Return the GPU time of one call."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def main() -> int:
    """Time, print and save the result; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=65536, help="blocks (default %(default)s)")
    parser.add_argument("--columns", type=int, default=4096, help="elements of a block")
    parser.add_argument("--samples", type=int, default=50, help="samples of each")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "benchmarks/gpu_step.py found no CUDA device, and times nothing else: run it on a "
            "machine with an NVIDIA GPU of compute capability 8.0 or later.",
            file=sys.stderr,
        )
        return 2

    import triton

    steps = make_steps(options.rows, options.columns)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for sample in range(options.samples + 5):
        for name, step in steps.items():
            time = milliseconds(step)
            if sample >= 5:  # the first ones compile and fill caches
                times[name].append(time)
    numel = options.rows * options.columns
    medians = {name: statistics.median(values) for name, values in times.items()}
    now = datetime.now(UTC)
    result = {
        "date": now.date().isoformat(),
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "rows": options.rows,
        "columns": options.columns,
        "dtypes": "gradient, main parameter and exp_avg float32, weight bfloat16",
        "samples": options.samples,
        "median_ms": medians,
        "terabytes_per_s": {name: BYTES[name] * numel / medians[name] / 1e9 for name in BYTES},
        "times_fused_adamw": {name: medians[name] / medians["fused adamw"] for name in medians},
    }
    text = json.dumps(result, indent=2)
    print(text)
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / f"{result['date']}-gpu-step.json").write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
