"""Which 8 bits m should have: what a code does to updates and to the loss of a small model.

    python -m benchmarks.moment_codes [--steps 500] [--seeds 3]

Trains a Llama of 0.13M parameters on bytes of the Python standard library (see ``evidence``) with
``AdamMini(preset="row")``. After each step m is replaced by what would have been stored of it:

* *E4M3 relative to v*: ``megatron_adam_mini.rounding``; no scales in memory;
* *int8*: the nearest of 255 equal steps of the largest ``|m|`` of 128 elements, as block-wise
  quantization does (Dettmers et al., arXiv:2110.02861), with one float32 scale for each 128;
* *int8, companded*: the same of ``2 x / (1 + |x|)``, ``x`` in units of that largest ``|m|``, which
  makes the steps finer near 0 (as FlashOptim does for m).

Error: the norm of what storing changes in ``m / sqrt(v)``, by the norm of ``m / sqrt(v)``, median
over steps. Largest: of ``|m| / sqrt(v)``, rounded up to at most twice as much; 448 is the largest
that E4M3 holds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import heading, write
from evidence import corpora, training
from evidence.settings import SIZES, Run
from megatron_adam_mini import rounding

SIZE, RATE, BLOCK = "0.13M", 2e-3, 128
#: What :func:`stored` is given: m, v of its elements, and noise in [0, 2**16), ``None``: nearest.
Code = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def relative_to_v(m: Tensor, v: Tensor, noise: Tensor | None) -> Tensor:
    """Return m after it was stored as E4M3."""
    scale = rounding.fp8_scale(v)
    if noise is None:
        return rounding.from_fp8(rounding.to_fp8(m, scale), scale)
    return rounding.from_fp8(rounding.to_fp8_stochastic(m, scale, noise), scale)


def int8(m: Tensor, _: Tensor, noise: Tensor | None) -> Tensor:
    """Return m after it was stored in equal steps."""
    return _by_largest(m, noise, lambda x: x, lambda x: x)


def companded(m: Tensor, _: Tensor, noise: Tensor | None) -> Tensor:
    """Return m after it was stored in steps that are finer near 0."""
    return _by_largest(m, noise, lambda x: 2 * x / (1 + x.abs()), lambda x: x / (2 - x.abs()))


def _by_largest(
    m: Tensor,
    noise: Tensor | None,
    compand: Callable[[Tensor], Tensor],
    expand: Callable[[Tensor], Tensor],
) -> Tensor:
    padded = torch.nn.functional.pad(m.flatten(), (0, -m.numel() % BLOCK)).view(-1, BLOCK)
    largest = padded.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
    x = padded / largest
    steps = compand(x) * 127
    if noise is None:
        code = steps.round()
    else:
        low = steps.floor()
        below, above = expand(low / 127), expand((low + 1).clamp(max=127) / 127)
        share = (x - below) / (above - below).clamp(min=1e-30)
        noises = torch.nn.functional.pad(noise.flatten(), (0, -m.numel() % BLOCK)).view(-1, BLOCK)
        code = (low + (noises < share * 2**16)).clamp(max=127)
    return (expand(code / 127) * largest).flatten()[: m.numel()].view_as(m)


CODES: dict[str, tuple[Code | None, bool]] = {
    "float32": (None, False),
    "E4M3 relative to v": (relative_to_v, True),
    "E4M3 relative to v, nearest": (relative_to_v, False),
    "int8": (int8, True),
    "int8, nearest": (int8, False),
    "int8, companded": (companded, True),
    "int8, companded, nearest": (companded, False),
}


class Stored:
    """Replaces m of an optimizer by what a code keeps of it, and measures the difference."""

    def __init__(self, code: Code | None, stochastic: bool, seed: int) -> None:
        self.code, self.stochastic = code, stochastic
        self.errors: list[float] = []
        self.largest = 0.0
        self._generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.Optimizer) -> None:
        """Treat the m of all parameters."""
        squares = torch.zeros(2, dtype=torch.float64)
        for state in optimizer.state.values():
            m = state["exp_avg"]
            (v,) = (state[k] for k in ("exp_avg_sq", "row_exp_avg_sq") if k in state)
            v = v.view(-1, *[1] * (m.ndim - 1)).expand_as(m).contiguous()
            noise = None
            if self.stochastic:
                noise = torch.randint(2**16, m.shape, generator=self._generator)
            kept = m if self.code is None else self.code(m, v, noise)
            root = v.sqrt() + training.EPS
            squares += torch.stack([((kept - m) / root).square().sum(), (m / root).square().sum()])
            self.largest = max(self.largest, float((m.abs() / rounding.fp8_scale(v)).max()))
            m.copy_(kept)
        self.errors.append(float((squares[0] / squares[1].clamp(min=1e-30)).sqrt()))


def train(name: str, steps: int, seed: int) -> dict[str, Any]:
    """Return validation loss, error, and largest ratio of one run."""
    code, stochastic = CODES[name]
    size, corpus = SIZES[SIZE], corpora.read("source")
    run = Run(
        optimizer="row", size=SIZE, lr=RATE, warmup=steps // 10, steps=steps, seed=seed, beta2=0.95
    )
    model = training.initial_model(size, seed)
    optimizer, stored = training.make_optimizer(run, model), Stored(code, stochastic, seed)
    generator = training.batch_generator(seed)
    for step in range(steps):
        batch = corpora.draw(
            corpus.training, samples=size.batch, sequence=size.sequence, generator=generator
        )
        training._step(model, optimizer, batch, lr=training.rate(run, step), device="cpu")
        stored(optimizer)
    return {
        "loss": training.validate(model, corpus.validation, size, "cpu"),
        "error": statistics.median(stored.errors),
        "largest": stored.largest,
    }


def main() -> None:
    """Run all codes, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CODES}
    for seed in range(1, args.seeds + 1):
        for name in CODES:
            found[name].append(train(name, args.steps, seed))
            print(name, seed, found[name][-1], flush=True)
    lines = [
        heading("m in 8 bits: codes", "benchmarks.moment_codes"),
        f"\n{args.steps} steps, {args.seeds} seeds, {SIZE} parameters, rate {RATE}; rounded "
        "stochastically where it does not say nearest. See the docstring of the script.\n",
        "\n| code | bytes | validation loss of each seed | above float32 | error | largest |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    full = [one["loss"] for one in found["float32"]]
    for name, runs in found.items():
        losses = [one["loss"] for one in runs]
        gaps = [one - other for one, other in zip(losses, full, strict=True)]
        num_bytes = 4 if name == "float32" else 1 if "v" in name else 1 + 4 / BLOCK
        lines.append(
            f"| {name} | {num_bytes:g} | {' '.join(f'{x:.4f}' for x in losses)} | "
            f"{' '.join(f'{x:+.4f}' for x in gaps)} | "
            f"{statistics.mean(one['error'] for one in runs):.4f} | "
            f"{max(one['largest'] for one in runs):.1f} |"
        )
    print(write("moment-codes", "\n".join(lines) + "\n"))


if __name__ == "__main__":
    main()
