"""Time and bandwidth of a step on a GPU, beside copies of memory and torch's fused pipeline.

    python -m benchmarks.gpu.bench [--only NAME ...] [--launch num_warps=4 maxnreg=32]

Each case is the optimizer of one rank, from gradients in Megatron's buffer layout to bfloat16
weights, clipping active, without Megatron and without communication (data-parallel groups are
torch's fake ones). Times are described in ``measure.Time``. ``of_copy``: bytes that the step must
move, divided by time and by the bandwidth that a copy reaches on this GPU. ``ratio``: time divided
by that of norm, clip, ``AdamW(fused=True)`` and bfloat16 copy on the same shapes, in the same run.
``graph_ms`` and ``graph_host_ms``: ``idle_ms`` and ``host_ms`` of the same step as a CUDA graph.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import distributed

from benchmarks.gpu import measure
from benchmarks.gpu.measure import milliseconds
from benchmarks.gpu.model import Llama, Rank, Rig, TorchPipeline
from megatron_adam_mini.config import AdamMiniConfig
from megatron_adam_mini.estimate.models import MODELS, Model

#: Llama-3-8B's layers, four of them, with 32,000 tokens: 1.13e9 parameters.
DENSE = Llama(hidden=4096, layers=4, ffn=14336, heads=32, groups=8, vocab=32000)
#: One of eight tensor-parallel ranks, 32 layers.
TP8 = Llama(hidden=4096, layers=32, ffn=14336, heads=32, groups=8, vocab=32000, tp=8)
#: Rows of 512 elements in half of the experts' matrices: 1.02e9 parameters.
EXPERTS = Llama(
    hidden=2048, layers=1, ffn=512, heads=16, groups=4, vocab=1024, experts=320, expert_ffn=512
)
LLAMA_2_7B = MODELS["llama-2-7b"]
TINY = Llama(hidden=256, layers=2, ffn=512, heads=8, groups=8, vocab=512, experts=2, expert_ffn=64)

_TINY_SIZES = {
    "num_layers": 2,
    "hidden_size": 256,
    "ffn_hidden_size": 512,
    "vocab_size": 512,
    "num_attention_heads": 8,
}


@dataclass(frozen=True)
class Case:
    """One row: shapes, storage, buckets.

    Attributes:
        model: shapes of one rank, or a whole model of which ``dp`` ranks share the buckets.
        options: of Adam-mini.
        rig: other arguments of ``Rig``.
        bucket_size: elements at which a bucket is closed.
        pipeline: whether torch's pipeline is timed on these shapes; later cases compare with it.
    """

    model: Llama | Model = DENSE
    options: dict[str, Any] = field(default_factory=dict)
    rig: dict[str, Any] = field(default_factory=dict)
    bucket_size: int | None = None
    dp: int = 1
    pipeline: bool = False

    def rank(self, config: AdamMiniConfig, *, tiny: bool) -> Rank:
        """Return the rank to time."""
        if isinstance(self.model, Model):
            model = replace(self.model, **_TINY_SIZES) if tiny else self.model
            return Rank.one_of(self.dp, model, config)
        return Rank.alone(TINY if tiny else self.model, config, self.bucket_size)


SMALL_STATE: dict[str, Any] = {"param_remainders": True, "exp_avg_dtype": "bf16"}
CASES = {
    "one bucket": Case(pipeline=True),
    "remainders, bf16 m": Case(options=SMALL_STATE),
    "remainders, bf16 m, bf16 gradients": Case(
        options=SMALL_STATE, rig={"grad_dtype": torch.bfloat16}
    ),
    "bf16 gradients": Case(rig={"grad_dtype": torch.bfloat16}),
    "single phase": Case(options={"single_phase": True}),
    "buckets of 5M": Case(bucket_size=5_000_000),
    "weights 8 bytes off": Case(rig={"shift": 4}),
    "weights 2 bytes off": Case(rig={"shift": 1}),
    "preset first": Case(options={"preset": "first"}),
    "AdamW by these kernels": Case(options={"full_v": ("*",)}),
    "TP8 shapes": Case(TP8, pipeline=True),
    "TP8 shapes, single phase": Case(TP8, {"single_phase": True}),
    "small experts": Case(EXPERTS, pipeline=True),
    "small experts, single phase": Case(EXPERTS, {"single_phase": True}),
    "Llama-2-7B, 1 of 8 ranks": Case(LLAMA_2_7B, dp=8, pipeline=True),
    "Llama-2-7B, 1 of 64 ranks": Case(LLAMA_2_7B, dp=64, pipeline=True),
}


def fake_group(size: int) -> Any:
    """Return a data-parallel group of which only this rank exists: collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", store=FakeStore(), rank=size // 2, world_size=size)
    return distributed.group.WORLD


def ceilings(device: torch.device) -> dict[str, float]:
    """Return TB/s of copies, of adding two tensors into a third, and of reading."""
    numel = 2**28 if device.type == "cuda" else 2**16
    x, y, z = torch.empty(3, numel, device=device).normal_()
    calls = {
        "copy": (8, lambda: y.copy_(x)),
        "add": (12, lambda: torch.add(x, y, out=z)),
        "read": (4, lambda: torch.linalg.vector_norm(x)),
    }
    return {
        name: size * numel / milliseconds(call, device).ms / 1e9
        for name, (size, call) in calls.items()
    }


def time_case(
    name: str, case: Case, device: torch.device, *, tiny: bool, samples: int
) -> tuple[dict[str, Any], list[tuple[int, ...]]]:
    """Time Adam-mini; return the row, and the shapes for torch."""
    config = AdamMiniConfig(**case.options)
    group = fake_group(case.dp) if case.dp > 1 else None
    rank = case.rank(config, tiny=tiny)
    rig = Rig(rank, config, device, group=group, **case.rig)
    measure.peak_gigabytes(device)
    held = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    started = time.perf_counter()
    rig.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    first = 1e3 * (time.perf_counter() - started)
    kept = torch.cuda.memory_allocated() - held if device.type == "cuda" else 0
    peak = measure.peak_gigabytes(device) - held / 1e9
    found = milliseconds(rig.step, device, samples=samples)
    size = rig.bytes_per_parameter()
    row: dict[str, Any] = {
        "case": name,
        "elements": rig.numel,
        "buckets": rig.buckets,
        **found._asdict(),
        "first_ms": first,
        "bytes": size,
        "TB/s": size * rig.numel / found.ms / 1e9,
        "kept_MB": kept / 1e6,
        "peak_MB": 1e3 * peak,
    }
    if device.type == "cuda":
        row["kernels"], row["launches"] = measure.kernels(rig.step)
        try:
            graphed = milliseconds(rig.graphed(), device, samples=samples)
            row |= {"graph_ms": graphed.idle_ms, "graph_host_ms": graphed.host_ms}
        except Exception as error:  # the other numbers are worth having
            row["why"] = f"no graph: {type(error).__name__}: {error}"
    if case.dp == 1:  # sums of cut blocks are not added up in fake groups
        check(rig)
    return row, rig.shapes(rank)


def check(rig: Rig) -> None:
    """Check that steps were taken, and that nothing became infinite."""
    sums = rig.optimizer.sum_squares()
    outcome = rig.optimizer.decide(sums, clip_grad=1.0).read()
    state = rig.optimizer.main_params.attach()
    assert outcome.updated, outcome
    assert outcome.grad_norm is not None, outcome
    assert outcome.grad_norm > 1.0, outcome
    v = torch.cat([state.exp_avg_sq_S, *(s.exp_avg_sq_E[: 2**24] for s in state.on_device)])
    assert bool(v.isfinite().all())
    assert bool((v >= 0).all())
    assert float((v > 0).double().mean()) > 0.999  # a few random gradients are zero
    assert bool(state.on_device[0].exp_avg.isfinite().all())


def time_torch(
    shapes: list[tuple[int, ...]], device: torch.device, samples: int, make: Any = None
) -> dict[str, Any]:
    """Time a pipeline of torch."""
    pipeline = TorchPipeline(shapes, device, make)
    found = milliseconds(pipeline.step, device, samples=samples)
    return {
        "elements": pipeline.numel,
        "buckets": len(shapes),
        **found._asdict(),
        "bytes": TorchPipeline.BYTES,
        "TB/s": TorchPipeline.BYTES * pipeline.numel / found.ms / 1e9,
    }


def against_public_package(record: measure.Record, device: torch.device, samples: int) -> None:
    """Compare a small model with the public package, whose step is many small launches."""
    from benchmarks.cpu_step import SHAPES, public, public_shapes

    shape = SHAPES["10M" if device.type == "cpu" else "110M"]
    shapes = [found for _, found in public_shapes(shape)]
    for name, make in (("torch", None), ("public Adam-mini", public(shape))):
        with record.guard(name):
            row = time_torch(shapes, device, samples, make)
            record.add(case=f"{name}, 110M", **{k: v for k, v in row.items() if k[0] != "T"})
    llama = Llama(shape.hidden, shape.layers, shape.ffn, shape.heads, shape.heads, shape.vocab)
    with record.guard("Adam-mini, 110M"):
        rig = Rig(Rank.alone(llama, AdamMiniConfig()), AdamMiniConfig(), device)
        found = milliseconds(rig.step, device, samples=samples)
        record.add(case="Adam-mini, 110M", elements=rig.numel, **found._asdict())


def check_graphs(device: torch.device) -> None:
    """Check that steps launched by a CUDA graph are the ordinary ones, bit by bit."""
    for name in ("one bucket", "remainders, bf16 m", "single phase", "preset first"):
        config = AdamMiniConfig(**CASES[name].options)
        rigs = [Rig(Rank.alone(TINY, config), config, device) for _ in range(2)]
        rigs[0].step()
        steps = rigs[0].step, rigs[1].graphed()
        for number in range(3):
            for rig, step in zip(rigs, steps, strict=True):
                rig.optimizer.main_params.param_groups[0]["lr"] = 1e-3 * (number + 1)
                step()
            for found, expected in zip(rigs[1].bits(), rigs[0].bits(), strict=True):
                assert torch.equal(found, expected), f"{name}, step {number}"


def free(device: torch.device) -> None:
    """Return memory to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main() -> int:
    """Time the cases, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of names of cases")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the script")
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--launch", nargs="+", default=[], metavar="OPTION=NUMBER")
    parser.add_argument("--name", default="bench", help="of the record")
    options = parser.parse_args()
    device = measure.device(options.device)
    if options.launch:
        from megatron_adam_mini.kernels import triton_launch

        triton_launch.OPTIONS.update({k: int(v) for k, v in (o.split("=") for o in options.launch)})
    record = measure.Record(options.name, device, launch=options.launch, samples=options.samples)
    peak = 0.0
    with record.guard("ceilings"):
        found = ceilings(device)
        record.note(**{f"{name} TB/s": value for name, value in found.items()})
        peak = found["copy"]
    free(device)
    if device.type == "cuda":
        with record.guard("CUDA graphs"):
            check_graphs(device)
    base: dict[str, Any] = {}
    small = partial(time_case, device=device, tiny=options.tiny, samples=options.samples)
    for name, case in CASES.items():
        if not name.startswith(tuple(options.only)):
            continue
        with record.guard(name):
            row, shapes = small(name, case)
            free(device)
            torch_row: dict[str, Any] = {}
            if case.pipeline:
                with record.guard(f"torch, {name}"):
                    torch_row = base = time_torch(shapes, device, options.samples)
                free(device)
            if base and peak:
                row["ratio"] = row["ms"] / row["elements"] / (base["ms"] / base["elements"])
            for entry in (row, {"case": f"torch, {name}", **torch_row} if torch_row else {}):
                if entry:
                    if "TB/s" in entry and peak:
                        entry["of_copy"] = entry["TB/s"] / peak
                    record.add(**entry)
        if distributed.is_initialized():
            distributed.destroy_process_group()
        free(device)
    if options.only == [""]:
        with record.guard("public package"):
            against_public_package(record, device, options.samples)
    return record.close()


if __name__ == "__main__":
    sys.exit(main())
