"""What ``--adam-mini-log-heterogeneity`` prints and writes: noise of v of the whole model.

Imports ``second_moment_noise`` and everything below it. Data flow: noise of this rank's part of the
model -> that of all parts, on every rank -> table, and means over layers for writers.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megatron_adam_mini.agreement import gather
from megatron_adam_mini.plan.candidates import CANDIDATES
from megatron_adam_mini.second_moment_noise import Noise, PartNoise, measure_noise

if TYPE_CHECKING:
    from megatron_adam_mini.mcore.distributed_optimizer import AdamMiniOptimizer

#: Last part of a parameter's name that does not tell which weight of its layer it is.
_KIND_OF_TENSOR = re.compile(r"(layer_norm_)?(weight|bias)\d*")

_WIDTH = 25


def noise_of_model(optimizer: AdamMiniOptimizer) -> list[PartNoise]:
    """Return the noise of all parts of the model, on every rank; all ranks must call it.

    Empty before the first step.
    """
    if optimizer.inner.main_params.step_count == 0:
        return []
    with optimizer.optimizer.left_where_it_is():
        measured = measure_noise(optimizer.inner, optimizer.optimizer.attach())
    # By name: pipeline stages share tied embeddings, and ranks of a stage dense parameters.
    found = {(noise.name, noise.part): noise for noise in measured}
    for group in optimizer.groups_of_parts:
        for others in gather(list(found.values()), group):
            found |= {(noise.name, noise.part): noise for noise in others}
    return sorted(found.values(), key=lambda noise: _in_order(noise.name))


def noise_metrics(noise: Sequence[PartNoise]) -> dict[str, float]:
    """Return means over equal weights of all layers, by candidate and kind of weight.

    ``adam-mini/v-snr/CANDIDATE/KIND`` and ``adam-mini/v-spread/CANDIDATE/KIND``. A kind is role,
    name in the layer, and part: ``qkv.linear_qkv.query``.
    """
    values: dict[str, list[float]] = defaultdict(list)
    for part in noise:
        for candidate, found in part.by_candidate.items():
            for number, value in (("v-snr", found.snr), ("v-spread", found.spread)):
                if value is not None:
                    values[f"adam-mini/{number}/{candidate}/{_kind(part)}"].append(value)
    return {name: sum(found) / len(found) for name, found in values.items()}


def noise_table(noise: Sequence[PartNoise], manifest: Mapping[str, Any], iteration: int) -> str:
    """Return the table of all parts, and which parameters are not in it."""
    names = [f"{part.name} {part.part}".rstrip() for part in noise]
    name_width = max(map(len, [*names, "parameter"]))
    role_width = max(len(part.role) for part in noise)
    lines = [
        f"Adam-mini: v within blocks, after iteration {iteration}. Each candidate has SNR (mean^2 "
        "by variance within a block; the higher, the less is lost), spread (mean by geometric "
        "mean; 1: all equal), bytes of v.",
        f"{'parameter':<{name_width}}  {'role':<{role_width}}  {'rule':<8}{'zeros':>6}"
        + "".join(f"{candidate:>{_WIDTH}}" for candidate in CANDIDATES)
        + "  highest SNR",
    ]
    for name, part in zip(names, noise, strict=True):
        cells = (_cell(part.by_candidate.get(candidate)) for candidate in CANDIDATES)
        lines.append(
            f"{name:<{name_width}}  {part.role:<{role_width}}  {part.rule:<8}{part.zeros:>6.1%}"
            + "".join(f"{cell:>{_WIDTH}}" for cell in cells)
            + f"  {_best(part)}"
        )
    blocks = [entry["name"] for entry in manifest["parameters"] if entry["rule"] != "element"]
    if blocks:
        lines.append(
            f"not measured, because they keep one second moment per block: {', '.join(blocks)}"
        )
    return "\n".join(lines)


def _best(part: PartNoise) -> str:
    if part.best is None:
        return "-"
    snr = part.by_candidate[part.best].snr or 0.0
    return part.best if snr >= 1.0 else f"{part.best}, below 1"


def _cell(noise: Noise | None) -> str:
    if noise is None:
        return ""
    snr, spread = (_number(value) for value in (noise.snr, noise.spread))
    return f"{snr} {spread:>5} {4 * noise.num_blocks:>8,}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 100 else f"{value:.0f}" if value < 1e5 else f"{value:.0e}"


def _kind(part: PartNoise) -> str:
    path = part.name.split(".")
    last = path[-2:-1] if _KIND_OF_TENSOR.fullmatch(path[-1]) else path[-1:]
    return ".".join(filter(None, [part.role, *last, part.part]))


def _in_order(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts numbers in names by their size."""
    return [(int(word) if word.isdigit() else -1, word) for word in name.split(".")]
