"""Time of the optimizer step on a CPU, compared with the alternatives of a user.

Three comparisons, each interleaved within one process:

* ``megatron``: the whole ``optimizer.step()`` of a real Megatron model on one rank (bfloat16
  weights, float32 gradients and main parameters, clipping active, about 80M parameters; the
  parameter all-gather overlaps the forward pass, so it is in neither time), compared with
  Megatron's own optimizer and torch's AdamW, default and fused;
* ``pipeline``: norm, finiteness, clipping, update and bfloat16 weights, on one flat tensor or a
  list of tensors with a Llama's shapes, compared with the best pipeline that torch allows,
  DeepSpeed's CPUAdam (if installed), the public Adam-mini, and an AdamW of this project's kernels;
* ``update``: the update alone, compared with torch's fused AdamW, and with the time that its
  memory traffic takes at the bandwidth of plain loops with the same mix of reads and writes.

Run from the project's root: ``python -m benchmarks.cpu_step [--threads N] [--only NAME ...]``.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import io
import math
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.model import Flat
from benchmarks.report import heading, write
from benchmarks.timing import Timing, interleave, table
from megatron_adam_mini.collectives import DomainGroups
from megatron_adam_mini.config import AdamMiniConfig
from megatron_adam_mini.kernels import BufferTensors, SegmentVectors, StepScalars, cpu
from megatron_adam_mini.optimizer import AdamMini
from megatron_adam_mini.plan.layout import BucketLayout, BufferLayout, Placement
from megatron_adam_mini.plan.parameter_info import HeadGeometry, ParameterInfo
from megatron_adam_mini.plan.partition import partition_parameter
from megatron_adam_mini.plan.segment_table import SegmentTable
from megatron_adam_mini.plan.step_plan import DomainLayout, plan_step

LR, BETAS, EPS, DECAY, CLIP = 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0

#: Further ways to store the state.
STORAGE: dict[str, dict[str, Any]] = {
    "bf16 m, stochastic": {"exp_avg_dtype": "bf16", "stochastic_rounding": True},
    "8-bit m": {"exp_avg_dtype": "fp8"},
    "lean": {"lean": True},
    "remainders, 8-bit m": {"param_remainders": True, "exp_avg_dtype": "fp8"},
}


@dataclass(frozen=True)
class Shape:
    """A Llama: untied embeddings, SwiGLU, as many key as query heads."""

    hidden: int
    layers: int
    ffn: int
    heads: int
    vocab: int

    def parameters(self) -> list[ParameterInfo]:
        """List the parameters as Megatron has them."""
        h, found = self.hidden, []
        heads = HeadGeometry(
            num_heads=self.heads, num_query_groups=self.heads, head_dim=h // self.heads
        )
        found.append(ParameterInfo(name="embed", shape=(self.vocab, h), role="embedding"))
        for i in range(self.layers):
            name = f"layers.{i}."
            found += [
                ParameterInfo(name=f"{name}norm1", shape=(h,), role="norm"),
                ParameterInfo(name=f"{name}qkv", shape=(3 * h, h), role="qkv", heads=heads),
                ParameterInfo(name=f"{name}proj", shape=(h, h), role="attention_projection"),
                ParameterInfo(name=f"{name}norm2", shape=(h,), role="norm"),
                ParameterInfo(name=f"{name}fc1", shape=(2 * self.ffn, h), role="mlp"),
                ParameterInfo(name=f"{name}fc2", shape=(h, self.ffn), role="mlp"),
            ]
        found.append(ParameterInfo(name="norm", shape=(h,), role="norm"))
        found.append(ParameterInfo(name="lm_head", shape=(self.vocab, h), role="output"))
        return found


SHAPES = {
    "110M": Shape(hidden=640, layers=14, ffn=1792, heads=10, vocab=32000),
    "10M": Shape(hidden=256, layers=8, ffn=704, heads=4, vocab=8192),
}


def optimizer_of(shape: Shape, grad: Tensor, options: dict[str, Any]) -> AdamMini:
    """Build the optimizer of one rank without Megatron."""
    infos = shape.parameters()
    config = AdamMiniConfig(backend="cpu", **options)
    blocks = [partition_parameter(info, config) for info in infos]
    at, placements = 0, []
    for index, info in enumerate(infos):
        placements.append(Placement(index, at, at + info.numel))
        at += info.numel
    weight = torch.randn(at, generator=torch.Generator().manual_seed(1)).mul_(0.02).bfloat16()
    buffer = BufferLayout((BucketLayout(at, 1, tuple(placements)),))
    return AdamMini(
        plan_step(blocks, [DomainLayout("dense", (buffer,))]),
        config,
        [Flat(grad, weight)],
        [DomainGroups()],
        [{"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}],
        [0] * len(blocks),
        device=torch.device("cpu"),
    )


def ours(shape: Shape, grad: Tensor, **options: Any) -> Callable[[], None]:
    """Return the whole pipeline on this project's kernels."""
    optimizer = optimizer_of(shape, grad, options)

    def step() -> None:
        decision = optimizer.decide(optimizer.sum_squares(), clip_grad=CLIP)
        optimizer.update(decision)
        assert optimizer.finish(decision).updated

    return step


class Peer:
    """Norm, finiteness, clipping, torch optimizer on float32 main parameters, bfloat16 weights."""

    def __init__(self, grads: list[Tensor], make: Callable[[list[Any]], Any]) -> None:
        generator = torch.Generator().manual_seed(1)
        self.masters = [
            torch.nn.Parameter(torch.randn(g.shape, generator=generator) * 0.02) for g in grads
        ]
        self.weights = [m.detach().bfloat16() for m in self.masters]
        self.grads = grads
        for master, grad in zip(self.masters, grads, strict=True):
            master.grad = grad
        self.optimizer = make(self.masters)

    @torch.no_grad()
    def step(self) -> None:
        """Take one step."""
        norms = torch._foreach_norm(self.grads)
        norm = float(torch.linalg.vector_norm(torch.stack(norms)))
        assert math.isfinite(norm)
        torch._foreach_mul_(self.grads, min(1.0, CLIP / (norm + 1e-6)))
        self.optimizer.step()
        torch._foreach_copy_(self.weights, [m.detach() for m in self.masters])


def public_shapes(shape: Shape) -> list[tuple[str, tuple[int, ...]]]:
    """List the public package's parameters: it has no rule for a fused QKV, so that is split."""
    found: list[tuple[str, tuple[int, ...]]] = []
    for info in shape.parameters():
        stem, _, last = info.name.rpartition(".")
        if last == "qkv":
            rows, columns = info.shape
            found += [(f"{stem}.{part}_proj", (rows // 3, columns)) for part in "qkv"]
        else:
            found.append((info.name, info.shape))
    return found


def public(shape: Shape) -> Callable[[list[Any]], Any]:
    """Return a constructor of the public package's optimizer, which needs names."""
    from adam_mini import Adam_mini

    names = {"fc1": "mlp.up", "fc2": "mlp.down", "proj": "attn.proj"}

    def make(masters: list[Any]) -> Any:
        named = []
        for (name, _), master in zip(public_shapes(shape), masters, strict=True):
            stem, _, last = name.rpartition(".")
            full_name = ".".join(filter(None, (stem, names.get(last, last), "weight")))
            named.append((full_name, master))
        with contextlib.redirect_stdout(io.StringIO()):
            return Adam_mini(
                named_parameters=named,
                lr=LR,
                betas=BETAS,
                eps=EPS,
                weight_decay=DECAY,
                dim=shape.hidden,
                n_heads=shape.heads,
                verbose=False,
            )

    return make


def fused(masters: list[Any]) -> Any:
    """Return torch's fastest AdamW."""
    return torch.optim.AdamW(masters, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True)


def deepspeed_adam(masters: list[Any]) -> Any:
    """Return DeepSpeed's AdamW for CPUs."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(
        masters, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, adamw_mode=True
    )


def shaped(shapes: list[tuple[int, ...]], flat: Tensor) -> list[Tensor]:
    """Cut a flat tensor into parameters."""
    parts = flat.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def pipeline(shape: Shape, rounds: int) -> tuple[dict[str, Timing], list[str]]:
    """Time the whole pipelines; also return notes on those that could not run."""
    numel = sum(info.numel for info in shape.parameters())
    fresh = torch.randn(numel, generator=torch.Generator().manual_seed(2)) * 1e-2
    remarks = [f"{numel:,} parameters."]
    grads: list[Tensor] = []

    def gradient() -> Tensor:
        grads.append(fresh.clone())
        return grads[-1]

    ours_shaped = [info.shape for info in shape.parameters()]
    public_shaped = [found for _, found in public_shapes(shape)]
    contenders: dict[str, Callable[[], Any]] = {
        "Adam-mini": ours(shape, gradient()),
        "Adam-mini, remainders, bf16 m": ours(
            shape, gradient(), param_remainders=True, exp_avg_dtype="bf16"
        ),
        **{
            f"Adam-mini, {name}": ours(shape, gradient(), **options)
            for name, options in STORAGE.items()
        },
        "AdamW, these kernels": ours(shape, gradient(), full_v=("*",)),
        "torch fused AdamW, one flat tensor": Peer([gradient()], fused).step,
        "torch fused AdamW, one tensor per parameter": Peer(
            shaped(ours_shaped, gradient()), fused
        ).step,
        "public Adam-mini 1.1.1": Peer(shaped(public_shaped, gradient()), public(shape)).step,
    }
    try:
        contenders["DeepSpeed CPUAdam, one flat tensor"] = Peer([gradient()], deepspeed_adam).step
    except Exception as error:
        remarks.append(f"DeepSpeed CPUAdam did not run ({type(error).__name__}: {error}).")

    def refill() -> None:
        # Pipelines that clip in place would not clip a second time.
        for grad in grads:
            grad.copy_(fresh)

    return interleave(contenders, rounds=rounds, before=refill), remarks


_LOOPS = r"""
#include <cstdint>
// Plain loops with the same reads and writes as the kernels, and next to no arithmetic.
extern "C" float read_one(const float* g, int64_t n) {
  float lanes[64] = {};
  int64_t eighth = n / 8;  // eight streams, as the kernel has
  for (int64_t i = 0; i + 8 <= eighth; i += 8)
    for (int r = 0; r < 8; ++r)
      for (int l = 0; l < 8; ++l) lanes[8 * r + l] += g[r * eighth + i + l];
  float total = 0;
  for (float lane : lanes) total += lane;
  return total;
}
extern "C" void read_three_write_two(const float* g, float* m, float* p, int64_t n) {
  int64_t half = n / 128 * 64;  // two streams, as the kernel has; n is a multiple of 128
  for (int64_t at = 0; at < half; at += 64)
    for (int64_t s = at; s < n; s += half) {
      for (int64_t k = 256; k < 320; k += 16) {
        __builtin_prefetch(g + s + k, 0);
        __builtin_prefetch(m + s + k, 1);
        __builtin_prefetch(p + s + k, 1);
      }
      for (int64_t i = s; i < s + 64; ++i) {
        float x = m[i] + g[i];
        m[i] = x;
        p[i] = p[i] + x;
      }
    }
}
"""


def loops() -> ctypes.CDLL:
    """Compile the loops that measure bandwidth."""
    folder = tempfile.mkdtemp()
    source, library = Path(folder, "loops.cpp"), Path(folder, "loops.so")
    source.write_text(_LOOPS)
    subprocess.run(
        ["c++", "-O3", "-march=native", "-ffast-math", "-shared", "-fPIC", source, "-o", library],
        check=True,
    )
    loaded = ctypes.CDLL(str(library))
    loaded.read_one.restype = ctypes.c_float
    return loaded


def update_alone(rows: int, columns: int, rounds: int) -> dict[str, Timing]:
    """Time updates of one float32 matrix without model weights."""
    numel, starts = rows * columns, np.arange(rows) * columns
    segments = SegmentTable(starts, starts + columns)
    scalars = StepScalars(1, torch.device("cpu"))
    groups = [{"lr": LR, "eps": EPS, "weight_decay": DECAY}]
    scalars.fill(groups, betas=BETAS, step=10, grad_scale=1.0)
    vectors = SegmentVectors(
        *torch.zeros(3, rows), torch.full((rows,), 1 / columns), torch.zeros(rows).int()
    )

    def tensors() -> list[Tensor]:
        generator = torch.Generator().manual_seed(3)
        return [torch.randn(numel, generator=generator) for _ in range(3)]

    p2, m2, g2 = tensors()
    p1, m1, g1 = tensors()
    p0, m0, g0 = tensors()
    adam = torch.nn.Parameter(torch.randn(numel))
    adam.grad = g1
    optimizer = fused([adam])
    plain = loops()
    length = ctypes.c_int64(numel)

    def two_phase() -> None:
        cpu.segment_sum_sq_(vectors.sum_sq_SR, g2, segments)
        cpu.segment_step_size_(vectors, scalars)
        cpu.update_(BufferTensors(p2, m2, None, g2), segments, vectors, scalars)

    def single_phase() -> None:
        cpu.update_in_one_pass_(BufferTensors(p1, m1, None, g1), segments, vectors, scalars)

    def traffic() -> None:
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (g0, m0, p0)]
        plain.read_one(pointers[0], length)
        plain.read_three_write_two(*pointers, length)

    contenders: dict[str, Callable[[], object]] = {
        "torch fused AdamW": optimizer.step,
        "two-phase": two_phase,
        "single-phase": single_phase,
    }
    if torch.get_num_threads() == 1:
        contenders["two-phase traffic"] = traffic
    return interleave(contenders, rounds=rounds)


def megatron(rounds: int) -> tuple[dict[str, Timing], int]:
    """Time ``optimizer.step()`` of a real Megatron model; runs in a rank of its own."""
    from tests.megatron_job import Job, Trainer

    job = Job(
        layers=12, hidden=640, heads=10, groups=10, ffn=1792, vocab=16000, bf16=True, overlap=True,
        batch=2, micro_batches=1,
    )  # fmt: skip
    steps, numel = {}, 0
    fresh: list[tuple[Tensor, Tensor]] = []

    def trainer_of(optimizer: str, kind: str | None = None) -> Any:
        from megatron.core import parallel_state

        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        trainer = Trainer(Job(**{**vars(job), "optimizer": optimizer}))
        if kind:
            for chained in trainer.optimizer.chained_optimizers:
                for group in chained.optimizer.param_groups:
                    group.update(foreach=False, fused=kind == "fused")
        trainer.backward(0)
        for chunk in trainer.chunks:
            for buffer in chunk.buffers:
                source = torch.randn_like(buffer.grad_data) * 1e-2
                fresh.append((buffer.grad_data, source))
        return trainer

    for name, arguments in {
        "Adam-mini": ("adam_mini",),
        "Megatron, torch AdamW as it comes": ("adam",),
        "Megatron, torch fused AdamW": ("adam", "fused"),
    }.items():
        trainer = trainer_of(*arguments)
        numel = sum(p.numel() for chunk in trainer.chunks for p in chunk.parameters())

        def step(trainer: Any = trainer) -> None:
            updated, norm, _ = trainer.optimizer.step()
            assert updated
            assert norm > 2 * job.clip_grad, "nothing was clipped"

        steps[name] = step

    def refill() -> None:
        for grad, source in fresh:
            grad.copy_(source)

    return interleave(steps, rounds=rounds, before=refill), numel


def megatron_in_a_rank(rounds: int, threads: int) -> tuple[dict[str, Timing], int]:
    """Run :func:`megatron` with Megatron's imports and the CPU host in place."""
    torch.set_num_threads(threads)
    return megatron(rounds)


def main() -> None:
    """Run the selected comparisons and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument(
        "--only", nargs="+", default=["megatron", "pipeline", "update"],
        choices=["megatron", "pipeline", "update"],
    )  # fmt: skip
    parser.add_argument("--no-file", action="store_true", help="print only")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    text = [heading("Time of the optimizer step on a CPU", "benchmarks.cpu_step")]
    extra = []
    for name in ("adam-mini", "deepspeed"):
        with contextlib.suppress(PackageNotFoundError):
            extra.append(f"{name} {version(name)}")
    text.append(f"Also: {', '.join(extra)}. C++ kernels: {cpu.describe().split(',')[0]}.")
    text.append(
        f"Medians of {args.rounds} interleaved rounds; in parentheses the quartiles of the ratios "
        "within single rounds."
    )

    def add(*lines: str) -> None:
        text.extend(lines)
        print(*lines, sep="\n\n", file=sys.stderr, flush=True)

    for threads in args.threads:
        torch.set_num_threads(threads)
        add(f"## {threads} thread{'s' * (threads > 1)}")
        if "megatron" in args.only:
            from tests.ranks import run_ranks

            ((timings, numel),) = run_ranks(1, megatron_in_a_rank, args.rounds, threads)
            add(
                f"### Megatron's `optimizer.step()`, {numel / 1e6:.0f}M parameters",
                table(timings, "Megatron, torch AdamW as it comes"),
                table(timings, "Megatron, torch fused AdamW"),
            )
        if "pipeline" in args.only:
            for name, shape in SHAPES.items():
                timings, remarks = pipeline(shape, args.rounds)
                add(f"### Whole pipeline, {name}", *remarks)
                best = min(
                    (n for n in timings if n.startswith("torch")), key=lambda n: timings[n].median
                )
                bases = [best, "AdamW, these kernels", "public Adam-mini 1.1.1"]
                bases += [n for n in timings if n.startswith("DeepSpeed")]
                for base in bases:
                    add(table(timings, base))
        if "update" in args.only:
            for rows, columns in ((8192, 4096), (65536, 512), (131072, 128)):
                timings = update_alone(rows, columns, args.rounds)
                add(
                    f"### Update alone, {rows} rows of {columns}",
                    table(timings, "torch fused AdamW"),
                )
                if "two-phase traffic" in timings:
                    add(table(timings, "two-phase traffic"))
    body = "\n\n".join(text) + "\n"
    if not args.no_file:
        print(write("cpu-step", body))


if __name__ == "__main__":
    main()
