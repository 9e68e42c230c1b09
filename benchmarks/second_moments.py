"""How Adam's second moment v varies within the blocks that rules could make of a weight.

    python -m benchmarks.second_moments hybrid|delta|latent [--steps 300] [--seeds 3]

Trains a small model of bytes (the source of the Python standard library) with Megatron's Adam and,
for parts of its weights, compares candidates for blocks of one second moment: a row, a column, the
rows of a head, the whole part.

* *SNR*: ``mean(v)^2 / variance(v)`` within a block, averaged over blocks, over ten times in the
  last 70 % of the run, over layers and over seeds; the larger, the less is lost when v is averaged
  over the block. SlimAdam (Kalra et al., arXiv:2503.01843) compresses where it exceeds 1.
* *Within*: the share of the variance of ``log v`` in the part that lies within blocks, which is
  what averaging removes; the rest lies between blocks, and is kept.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.report import heading, write
from megatron_adam_mini.second_moment_noise import average_snr
from tests import megatron_job, models
from tests.megatron_job import Job, Trainer
from tests.ranks import run_ranks

VOCABULARY = 256
HIDDEN = 64
MODEL = Job(
    hidden=HIDDEN, heads=4, groups=2, ffn=160, vocab=VOCABULARY, batch=16, micro_batches=1,
    sequence=64, optimizer="adam", distributed_optimizer=False, lr=2e-3,
)  # fmt: skip


class Part(NamedTuple):
    """Rows of a weight that are one projection.

    Attributes:
        name: of the part; empty: the weight is a single one.
        rows: number of them in each period of the weight.
        rule: of the preset ``paper``, one of ``CANDIDATES`` or ``element``.
        head_rows: rows of a head or group, ``None`` if there are none.
    """

    name: str
    rows: int
    rule: str
    head_rows: int | None = None


@dataclass(frozen=True)
class Weight:
    """A kind of weight: end of its name, its parts, and how often they repeat down its rows."""

    end: str
    parts: tuple[Part, ...]
    periods: int = 1


MLP = (
    Weight("linear_fc1.weight", (Part("", 2 * MODEL.ffn, "row"),)),
    Weight("linear_fc2.weight", (Part("", HIDDEN, "row"),)),
)
# Of size 16 are all heads and groups.
ATTENTION = Weight(
    "linear_qkv.weight",
    (Part("Query", 32, "head", 16), Part("Key", 16, "head", 16), Part("Value", 16, "row", 16)),
    periods=2,
)
PROJECTION = Weight("linear_proj.weight", (Part("", HIDDEN, "row"),))
MIXER_OUTPUT = Weight("out_proj.weight", (Part("", HIDDEN, "row"),))


def vectors(*ends: str, size: int) -> tuple[Weight, ...]:
    """Return vectors with a number for each head."""
    return tuple(Weight(end, (Part("", size, "element"),)) for end in ends)


class DeepHybrid(models.Hybrid):
    """Mamba, attention and MLP layers, several of each."""

    pattern = "M-M*-"


models.FAMILIES["deep hybrid"] = DeepHybrid()

#: Name -> title, job, weights.
CASES: dict[str, tuple[str, Job, tuple[Weight, ...]]] = {
    "hybrid": (
        "Mamba with attention and MLP",
        Job(
            **vars(MODEL)
            | {"family": "deep hybrid", "layers": 5, "swiglu": False, "ffn": 2 * MODEL.ffn}
            | {"config_args": models.HYBRID | {"mamba_state_dim": 16}}
        ),
        (
            Weight(
                "in_proj.weight",
                (
                    *(Part(name, 128, "row", 16) for name in ("z", "x")),
                    *(Part(name, 32, "row", 16) for name in ("B", "C")),
                    Part("dt", 8, "row"),
                ),
            ),
            Weight("in_proj.weight", (Part("all", 328, "row"),)),
            Weight(
                "conv1d_weight",
                (
                    Part("x", 128, "element", 16),
                    *(Part(name, 32, "element", 16) for name in ("B", "C")),
                ),
            ),
            *vectors("A_log", "mixer.D", "dt_bias", size=8),
            MIXER_OUTPUT,
            ATTENTION,
            PROJECTION,
            *MLP,
        ),
    ),
    "delta": (
        "gated delta net and MLP",
        Job(
            **vars(MODEL)
            | {"family": "delta", "layers": 2}
            | {
                "config_args": models.DELTA
                | {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
            }
        ),
        (
            Weight(
                "in_proj.weight",
                (
                    *(Part(name, 32, "row", 16) for name in ("query", "key")),
                    *(Part(name, 64, "row", 16) for name in ("value", "z")),
                    *(Part(name, 4, "row") for name in ("beta", "alpha")),
                ),
            ),
            Weight("in_proj.weight", (Part("all", 200, "row"),)),
            Weight(
                "conv1d.weight",
                (
                    *(Part(name, 32, "element", 16) for name in ("query", "key")),
                    Part("value", 64, "element", 16),
                ),
            ),
            *vectors("A_log", "dt_bias", size=4),
            MIXER_OUTPUT,
            *MLP,
        ),
    ),
    "latent": (
        "latent attention and MLP",
        Job(
            **vars(MODEL)
            | {"family": "latent", "layers": 2, "groups": 4, "qk_layernorm": True}
            | {
                "config_args": models.LATENT
                | {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_head_dim": 16}
                | {"qk_pos_emb_head_dim": 8, "v_head_dim": 16, "kv_channels": 16}
            }
        ),
        (
            Weight("linear_q_down_proj.weight", (Part("", 32, "row"),)),
            Weight("linear_q_up_proj.weight", (Part("Query", 24, "head", 24),), periods=4),
            Weight(
                "linear_q_up_proj.weight",
                (Part("not rotated", 16, "head", 16), Part("rotated", 8, "head", 8)),
                periods=4,
            ),
            Weight(
                "linear_kv_down_proj.weight",
                (Part("latent", 16, "row"), Part("rotary Key", 8, "row", 8)),
            ),
            Weight(
                "linear_kv_up_proj.weight",
                (Part("Key", 16, "head", 16), Part("Value", 16, "row", 16)),
                periods=4,
            ),
            PROJECTION,
            *MLP,
        ),
    ),
}
CANDIDATES = ("row", "column", "head", "whole")


# On the rank.


class TextTrainer(Trainer):
    """Trains on text, from Megatron's own initial weights.

    Args:
        job: of the run.
        text: all of it, one byte each.
        seed: of weights and data.
    """

    def __init__(self, job: Job, text: Tensor, seed: int) -> None:
        self.text, self.seed = text, seed
        megatron_job.set_weights = lambda model, job: None
        super().__init__(job)

    def _build_chunk(self, vp_stage: int | None) -> Any:
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        model_parallel_cuda_manual_seed(self.seed, force_reset_rng=True)
        torch.manual_seed(self.seed)
        return super()._build_chunk(vp_stage)

    def batch_of(self, step: int) -> Tensor:
        """Return windows of the text at random places, shape ``(batch, sequence + 1)``."""
        generator = torch.Generator().manual_seed(1_000_000 * (1 + self.seed) + step)
        last = len(self.text) - self.job.sequence - 1
        starts = torch.randint(0, last, (self.job.batch, 1), generator=generator)
        return self.text[starts + torch.arange(self.job.sequence + 1)].long()


def read_text() -> Tensor:
    """Return modules of the Python standard library, one after the other."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return torch.frombuffer(
        bytearray(b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))),
        dtype=torch.uint8,
    )


def measure(name: str, steps: int, seed: int) -> dict[str, Any]:
    """Train with one seed; return the last losses, and (SNR, share) by part and candidate."""
    _, job, weights = CASES[name]
    trainer = TextTrainer(job, read_text(), seed)
    found: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}
    samples = {round(steps * (0.3 + 0.07 * number)) for number in range(1, 11)}
    for step in range(1, steps + 1):
        rate = job.lr * min(step / (0.05 * steps), 1.05 * (1 - step / (steps + 1)))
        for group in trainer.optimizer.param_groups:
            group["lr"] = rate
        trainer.step(step)
        if step in samples:
            for place, candidate, numbers in compare(trainer, weights):
                found.setdefault(place, {}).setdefault(candidate, []).append(numbers)
    means = {
        place: {
            candidate: tuple(map(statistics.mean, zip(*numbers, strict=True)))
            for candidate, numbers in by_candidate.items()
        }
        for place, by_candidate in found.items()
    }
    losses = trainer.losses[-max(1, steps // 20) :]
    return {"means": means, "loss": statistics.mean(losses)}


def compare(trainer: Trainer, weights: tuple[Weight, ...]) -> list[Any]:
    """Return (weight, part), candidate, (SNR, share) of all layers, as they are now."""
    (chunk,) = trainer.chunks
    optimizer = trainer.optimizer.chained_optimizers[0].optimizer
    found = []
    for full_name, param in chunk.named_parameters():
        for weight in weights:
            if not full_name.endswith(weight.end):
                continue
            v = optimizer.state[param]["exp_avg_sq"].double()
            v = v.reshape(weight.periods, len(v) // weight.periods, -1)
            parts = v.split([part.rows for part in weight.parts], dim=1)
            for part, own in zip(weight.parts, parts, strict=True):
                place = (weight.end.removesuffix(".weight"), part.name)
                for candidate, blocks in candidates(own.flatten(0, 1), part.head_rows).items():
                    found.append((place, candidate, (snr(blocks), share_within(blocks))))
    return found


def candidates(v: Tensor, head_rows: int | None) -> dict[str, Tensor]:
    """Return v of a part by block, shape ``(blocks, elements of each)``, for each candidate."""
    found = {"whole": v.reshape(1, -1)}
    if v.shape[1] > 1:
        found |= {"row": v, "column": v.T}
    if head_rows is not None and head_rows < len(v):
        found["head"] = v.reshape(len(v) // head_rows, -1)
    return found


def snr(blocks: Tensor) -> float:
    """Return mean^2 / variance within blocks, averaged over blocks."""
    variance, mean = torch.var_mean(blocks, dim=1, correction=0)
    return average_snr(mean.numpy(), variance.numpy()) or math.inf


def share_within(blocks: Tensor) -> float:
    """Return the share of the variance of ``log v`` that lies within blocks."""
    logs = blocks.log()
    return float(logs.var(dim=1, correction=0).mean() / logs.var(correction=0))


# In the parent process.


def table(weights: tuple[Weight, ...], runs: list[dict[str, Any]]) -> list[str]:
    """Return the rows of the table: mean over runs of SNR, and share in percent."""
    lines = [
        f"| weight | part | rule | {' | '.join(CANDIDATES)} |",
        f"|---|---|---|{'---|' * len(CANDIDATES)}",
    ]
    for weight in weights:
        for part in weight.parts:
            place = (weight.end.removesuffix(".weight"), part.name)
            cells = [cell([run["means"][place].get(c) for run in runs]) for c in CANDIDATES]
            first = f"| `{place[0]}` | {part.name} | `{part.rule}` |"
            lines.append(f"{first} {' | '.join(cells)} |")
    return lines


def cell(numbers: list[Any]) -> str:
    """Return SNR with the least and the largest of a seed, and the share."""
    if None in numbers:
        return ""
    ratios, shares = zip(*numbers, strict=True)
    spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
    return f"{statistics.mean(ratios):.2f}{spread}, {statistics.mean(shares):.0%}"


def main() -> None:
    """Train, print the table, and write the dated result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=CASES)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    title, job, weights = CASES[args.model]
    runs = [
        run_ranks(1, measure, args.model, args.steps, seed, timeout=570)[0]
        for seed in range(args.seeds)
    ]
    losses = ", ".join(f"{run['loss']:.3f}" for run in runs)
    explanation = __doc__[__doc__.index("Trains") :]
    text = "\n".join(
        [
            heading(f"Second moments: {title}", "benchmarks.second_moments"),
            explanation,
            f"Model: hidden {job.hidden}, {job.layers} layers; batches of {job.batch} windows of "
            f"{job.sequence} bytes, {args.steps} steps, largest rate {job.lr:g} with 5 % warm-up "
            f"and linear decay, betas 0.9 and 0.95, weight decay {job.weight_decay:g}, clipped at "
            f"{job.clip_grad:g}, float32. Loss at the end, by seed: {losses} nats per byte.\n",
            "A cell: SNR (least and largest of a seed), within. *rule*: of the preset `paper`.\n",
            *table(weights, runs),
            "",
        ]
    )
    print(text)
    print(write(f"second-moments-{args.model}", text))


if __name__ == "__main__":
    main()
