"""Runs of a log -> pictures.

Imports matplotlib, ``settings``, ``grid`` and ``comparison``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evidence.comparison import Comparison, losses_of, stability_map, tuned
from evidence.grid import Plan, Results, best_rate
from evidence.settings import OPTIMIZERS, label

_COLORS = dict(
    zip(OPTIMIZERS, ("black", *(f"C{number}" for number in range(len(OPTIMIZERS)))), strict=False)
)


def draw_all(plan: Plan, results: Results, stem: Path) -> dict[str, Path]:
    """Draw what the log has complete runs for.

    Args:
        plan: what was asked.
        results: what is done.
        stem: path and beginning of the name of each picture.

    Returns:
        Name -> path of each picture: ``curves``, ``gaps``, ``rates``, ``stability``.
    """
    made = {}
    drawings: dict[str, Callable[[Plan, Results], Figure | None]] = {
        "curves": curves,
        "gaps": gaps,
        "rates": rates,
        "stability": stability,
    }
    for name, draw in drawings.items():
        figure = draw(plan, results)
        if figure is not None:
            made[name] = stem.with_name(f"{stem.name}-{name}.png")
            figure.savefig(made[name], dpi=100)
    return made


def curves(plan: Plan, results: Results) -> Figure | None:
    """Draw the training losses at each optimizer's best rate, mean and range of the seeds."""
    shown = [(one, found) for one in plan.settings if (found := tuned(plan, one, results))]
    if not shown:
        return None
    figure, panels = _panels(len(shown))
    for axes, (setting, found) in zip(panels, shown, strict=True):
        for entry in found:
            runs = [plan.run(setting, entry.optimizer, entry.lr, seed) for seed in plan.seeds]
            seeds = list(zip(*(results[run]["training"] for run in runs), strict=False))
            steps = [setting.steps * (part + 1) / len(seeds) for part in range(len(seeds))]
            color = _COLORS[entry.optimizer]
            text = f"{label(entry.optimizer)}, lr {entry.lr:g}"
            axes.plot(steps, [statistics.fmean(s) for s in seeds], color=color, label=text)
            axes.fill_between(
                steps, [min(s) for s in seeds], [max(s) for s in seeds], color=color, alpha=0.12
            )
        finals = [entry.mean for entry in found if math.isfinite(entry.mean)]
        axes.set(title=setting.name, xlabel="step", ylabel="training loss (nats per byte)")
        axes.set_ylim(min(finals) - 0.1, min(finals) + 1.4)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    return figure


def gaps(plan: Plan, results: Results) -> Figure | None:
    """Draw gaps to AdamW, both at their best rates, against size and against length."""
    found = {one: tuned(plan, one, results) for one in plan.settings if one.corpus == "source"}
    found = {setting: entries for setting, entries in found.items() if len(entries) > 1}
    if not found:
        return None
    first = next(iter(found))
    by_size = [one for one in found if one.steps == first.steps]
    by_length = sorted((one for one in found if one.size == first.size), key=lambda s: s.steps)
    shown = [(by_size, [s.size for s in by_size], f"parameters; {first.steps} steps")]
    if len(by_length) > 1:
        lengths = [str(setting.steps) for setting in by_length]
        shown.append((by_length, lengths, f"steps; {first.size} parameters"))
    figure = Figure(figsize=(1 + 5 * len(shown), 4.4), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, (settings, names, text) in zip(panels, shown, strict=True):
        _draw_gaps(axes, [found[setting] for setting in settings])
        axes.set_xticks(range(len(names)), names)
        axes.set_xlabel(text)
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("loss above AdamW (nats per byte)")
    lines, names = panels[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=2 * len(shown), frameon=False)
    figure.suptitle("Each at its best rate: mean, 95 % interval and values of the seeds")
    return figure


def _draw_gaps(axes: Axes, columns: list[list[Comparison]]) -> None:
    names = [
        name for name in OPTIMIZERS[1:] if any(e.optimizer == name for c in columns for e in c)
    ]
    axes.axhline(0, color=_COLORS["adamw"], linewidth=1)
    for place, name in enumerate(names):
        shift = (place - (len(names) - 1) / 2) * 0.15
        points = [
            (at + shift, entry.gap)
            for at, column in enumerate(columns)
            for entry in column
            if entry.optimizer == name and entry.gap and math.isfinite(entry.gap.mean)
        ]
        axes.errorbar(
            [x for x, _ in points],
            [gap.mean for _, gap in points],
            yerr=[gap.half_width if math.isfinite(gap.half_width) else 0 for _, gap in points],
            fmt="o",
            capsize=3,
            color=_COLORS[name],
            label=label(name),
        )
        for x, gap in points:
            axes.plot([x + 0.04] * len(gap.values), gap.values, "_", color=_COLORS[name])
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -0.15), min(high, 0.25))


def rates(plan: Plan, results: Results) -> Figure | None:
    """Draw the final loss of the first seed against the learning rate."""
    shown = [
        one
        for one in plan.settings
        if best_rate(plan, one, plan.optimizers[0], results) is not None
    ]
    if not shown:
        return None
    figure, panels = _panels(len(shown))
    for axes, setting in zip(panels, shown, strict=True):
        for optimizer in plan.optimizers:
            runs = [plan.run(setting, optimizer, lr, plan.seeds[0]) for lr in setting.rates]
            losses = losses_of(runs, results)
            if losses is not None:
                color = _COLORS[optimizer]
                axes.plot(setting.rates, losses, "o-", color=color, label=label(optimizer))
        axes.set_xscale("log", base=2)
        axes.set_xticks(setting.rates, [f"{lr:g}" for lr in setting.rates])
        axes.set(title=setting.name, xlabel="learning rate", ylabel="validation loss")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    return figure


def stability(plan: Plan, results: Results) -> Figure | None:
    """Draw the final loss over learning rate and warm-up, for each optimizer."""
    if plan.map is None:
        return None
    found_of = {name: stability_map(plan, name, results) for name in plan.optimizers}
    losses = {name: found for name, found in found_of.items() if found}
    if not losses:
        return None
    shown = [value for found in losses.values() for row in found for value in row]
    lowest = min(shown)
    figure = Figure(figsize=(3.6 * len(losses) + 0.8, 3.4), layout="constrained")
    panels = figure.subplots(1, len(losses), squeeze=False)[0]
    for axes, (name, found) in zip(panels, losses.items(), strict=True):
        image = axes.imshow(found, cmap="viridis_r", vmin=lowest, vmax=lowest + 1.0, aspect="auto")
        for y, row in enumerate(found):
            for x, value in enumerate(row):
                text = f"{value:.2f}" if math.isfinite(value) else "div."
                color = "white" if value > lowest + 0.5 else "black"
                axes.text(x, y, text, ha="center", va="center", color=color, fontsize="x-small")
        axes.set_xticks(
            range(len(plan.map.rates)), [f"{lr:g}" for lr in plan.map.rates], rotation=45
        )
        axes.set_yticks(range(len(plan.map.warmups)), map(str, plan.map.warmups))
        axes.set(title=label(name), xlabel="learning rate", ylabel="steps of warm-up")
    figure.colorbar(image, ax=panels, label="validation loss")
    figure.suptitle(f"{plan.map.size} parameters, {plan.map.steps} steps, mean of the seeds")
    return figure


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    columns = min(count, 4)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(4 * columns, 3.4 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in panels[count:]:
        unused.remove()
    return figure, panels[:count]
