"""One run: a model from a seed, trained for some steps, validated on held-out files.

Imports torch, the package's ``AdamMini``, ``settings``, ``corpora``, ``model`` and ``storage``.
"""

from __future__ import annotations

import math
import time
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from evidence import corpora
from evidence.model import Llama
from evidence.settings import SIZES, Run, Size
from evidence.storage import StoredAdamMini
from megatron_adam_mini import AdamMini

BETA1, EPS, WEIGHT_DECAY, CLIP = 0.9, 1e-8, 0.1, 1.0
#: Samples of the held-out files, the same in every run, evenly spread.
VALIDATION_SAMPLES = 256
#: Times that a run is validated, evenly spread; the last one is its end.
VALIDATIONS = 4
#: Points of the curve of training losses, each the mean of as many steps.
POINTS = 50
#: A mean loss above it ends a run: it has diverged.
DIVERGED = 12.0


def rate(run: Run, step: int) -> float:
    """Return the learning rate of a step, counted from 0: Megatron's linear warm-up, then decay."""
    if step < run.warmup:
        return run.lr * step / run.warmup
    return run.lr * (run.steps - step) / (run.steps - run.warmup)


def batch_generator(seed: int) -> torch.Generator:
    """Return what draws the batches of a run."""
    return torch.Generator().manual_seed(1000 + seed)


def initial_model(size: Size, seed: int) -> Llama:
    """Return the model that all optimizers begin with."""
    torch.manual_seed(seed)
    return Llama(size)


def make_optimizer(run: Run, model: nn.Module) -> Optimizer | StoredAdamMini:
    """Return AdamW or Adam-mini over a model; one-dimensional parameters do not decay."""
    named = list(model.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [item for item in named if item[1].ndim > 1]},
        {"params": [item for item in named if item[1].ndim <= 1], "weight_decay": 0.0},
    ]
    values: dict[str, Any] = {
        "lr": run.lr,
        "betas": (BETA1, run.beta2),
        "eps": EPS,
        "weight_decay": WEIGHT_DECAY,
    }
    if run.storage:
        return StoredAdamMini(model, run, {k: v for k, v in values.items() if k != "lr"})
    if run.optimizer == "adamw":
        return torch.optim.AdamW(groups, **values)
    size = SIZES[run.size]
    return AdamMini(
        groups,
        **values,
        num_heads=size.heads,
        num_query_groups=size.groups,
        preset=run.optimizer,
        rules=dict(run.rules),
        value_as_block=run.value_as_block,
    )


def train(run: Run) -> dict[str, Any]:
    """Train one model.

    Returns:
        What the log keeps: ``validation``: step -> loss; ``training``: mean losses of equal parts
        of the run; ``rise``: the most that a mean of a part lies above the lowest before it;
        ``diverged``; ``parameters``; ``second_moments``: how many numbers v has; ``tokens``;
        ``digest`` of the corpus; ``seconds``. With ``run.storage`` also ``state``, a hash of the
        state at the end, and ``norms``: what is watched -> a norm after each part of the run.
    """
    size = SIZES[run.size]
    corpus = corpora.read(run.corpus)
    model = initial_model(size, run.seed).to(run.device)
    optimizer = make_optimizer(run, model)
    generator = batch_generator(run.seed)
    validated_at = {round(run.steps * part / VALIDATIONS) for part in range(1, VALIDATIONS + 1)}
    losses: list[float] = []
    watched: list[dict[str, float]] = []
    validation: dict[int, float] = {}
    began = time.perf_counter()
    for step in range(run.steps):
        batch = corpora.draw(
            corpus.training, samples=size.batch, sequence=size.sequence, generator=generator
        )
        losses.append(_step(model, optimizer, batch, lr=rate(run, step), device=run.device))
        if not losses[-1] < DIVERGED:
            break
        if isinstance(optimizer, StoredAdamMini) and (step + 1) % max(1, run.steps // POINTS) == 0:
            watched.append(optimizer.norms())
        if step + 1 in validated_at:
            validation[step + 1] = validate(model, corpus.validation, size, run.device)
    curve = _means(losses)
    lowest, rise = math.inf, 0.0
    for value in curve:
        lowest = min(lowest, value)
        rise = max(rise, value - lowest)
    return {
        "validation": {str(step): round(loss, 5) for step, loss in validation.items()},
        "training": [round(value, 4) for value in curve],
        "rise": round(rise, 4),
        "diverged": run.steps not in validation,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "second_moments": _second_moments(optimizer, model),
        "tokens": run.steps * size.batch * size.sequence,
        "digest": corpus.digest,
        "seconds": round(time.perf_counter() - began, 1),
        **(_state(optimizer, watched) if isinstance(optimizer, StoredAdamMini) else {}),
    }


def _state(optimizer: StoredAdamMini, watched: list[dict[str, float]]) -> dict[str, Any]:
    names = watched[0] if watched else ()
    norms = {name: [float(f"{point[name]:.6g}") for point in watched] for name in names}
    return {"state": optimizer.digest(), "norms": norms}


def _step(
    model: nn.Module,
    optimizer: Optimizer | StoredAdamMini,
    batch: tuple[Tensor, Tensor],
    *,
    lr: float,
    device: str,
) -> float:
    tokens, labels = (part.to(device) for part in batch)
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        loss = model(tokens, labels)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def validation_starts(tokens: Tensor, size: Size) -> Tensor:
    """Return where the samples for validation begin."""
    return torch.linspace(0, len(tokens) - size.sequence - 1, VALIDATION_SAMPLES).long()


@torch.no_grad()
def validate(model: nn.Module, tokens: Tensor, size: Size, device: str) -> float:
    """Return the mean loss of the held-out samples, in nats per token."""
    total = 0.0
    for part in validation_starts(tokens, size).split(32):
        batch = corpora.at(tokens, part, sequence=size.sequence)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            total += float(model(*(one.to(device) for one in batch))) * len(part)
    return total / VALIDATION_SAMPLES


def _means(losses: list[float]) -> list[float]:
    """Return the means of ``POINTS`` equal parts, of fewer if there are fewer steps."""
    count = min(POINTS, len(losses))
    cuts = [round(part * len(losses) / count) for part in range(count + 1)]
    return [sum(losses[low:high]) / (high - low) for low, high in pairwise(cuts)]


def _second_moments(optimizer: Optimizer | StoredAdamMini, model: nn.Module) -> int:
    if isinstance(optimizer, AdamMini | StoredAdamMini):
        return sum(entry["blocks"] for entry in optimizer.manifest())
    return sum(parameter.numel() for parameter in model.parameters())
