"""Runs of a log -> a report in Markdown, with pictures beside it; nothing is trained.

Imports ``settings``, ``grid``, ``run_log``, ``comparison`` and ``figures``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evidence import run_log
from evidence.comparison import (
    Comparison,
    Gap,
    ablation,
    at_equal_rate,
    losses_of,
    stability_map,
    tuned,
)
from evidence.figures import draw_all, label, name_of
from evidence.grid import Plan, Results, Setting
from evidence.settings import SIZES


def write(plan: Plan, log: Path, path: Path, command: str) -> list[Path]:
    """Write the report and its pictures.

    Args:
        plan: what was asked; what of it is missing in the log is said.
        log: JSON lines.
        path: of the report.
        command: that the report names as the one that trained.

    Returns:
        All files that were written.
    """
    results = run_log.read(log)
    pictures = draw_all(plan, results, path.with_suffix(""))
    sections = [
        _heading(log, command),
        _summary(plan, results),
        _picture(pictures, "gaps"),
        _settings(plan, results),
        _tuned(plan, results),
        _picture(pictures, "curves"),
        _equal_rate(plan, results),
        _rates(plan, results),
        _picture(pictures, "rates"),
        _stability(plan, results),
        _picture(pictures, "stability"),
        _ablation(plan, results),
        _not_covered(plan, results),
    ]
    path.write_text("\n\n".join(section for section in sections if section) + "\n")
    return [path, *pictures.values()]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def gap_text(gap: Gap | None) -> str:
    """Return a gap and its interval; empty for ``None``."""
    if gap is None:
        return ""
    if not math.isfinite(gap.mean):
        return "diverged"
    return f"{gap.mean:+.3f} ± {gap.half_width:.3f}"


def _heading(log: Path, command: str) -> str:
    found = run_log.environments(log)
    dates = sorted({one["date"] for one in found})
    devices = sorted(
        {f"{one['device']}, torch {one['torch']}, Python {one['python']}" for one in found}
    )
    seconds = sum(result["seconds"] for result in run_log.read(log).values())
    return (
        f"# Adam-mini against AdamW, {dates[-1]}\n\n"
        f"Command: `{command}`; this report is made from [its log]({log.name}) alone. "
        f"Device: {'; '.join(devices)}. All runs of the log together took {seconds / 3600:.1f} hours of one core, "
        "which other programs shared.\n\n"
        "Losses are nats per byte on held-out files. A *gap* is the loss minus AdamW's with the same initial "
        "weights and batches; ± is the 95 % interval of the mean over seeds (t distribution). *Worse* and *better* "
        "are said where that interval does not contain 0, *not told apart* elsewhere, which is no proof of equality."
    )


def _summary(plan: Plan, results: Results) -> str:
    names = [name for name in plan.optimizers if name != "adamw"]
    rows = []
    for name in names:
        gaps = [
            (setting, entry.gap)
            for setting in plan.settings
            for entry in tuned(plan, setting, results)
            if entry.optimizer == name and entry.gap
        ]
        if not gaps:
            continue
        values = [value for _, gap in gaps for value in gap.values]
        counts = [
            sum(gap.verdict == word for _, gap in gaps)
            for word in ("worse", "not told apart", "better")
        ]
        means = [gap.mean for _, gap in gaps]
        rows.append(
            (
                label(name),
                str(len(gaps)),
                f"{statistics.fmean(means):+.3f}",
                f"{min(means):+.3f} to {max(means):+.3f}",
                f"{sum(value > 0 for value in values)} of {len(values)}",
                *map(str, counts),
            )
        )
    if not rows:
        return ""
    header = (
        "",
        "settings",
        "mean gap",
        "of single settings",
        "seeds above AdamW",
        "worse",
        "not told apart",
        "better",
    )
    return "## In short\n\nEach at its own best rate:\n\n" + table(header, rows)


def _settings(plan: Plan, results: Results) -> str:
    rows = []
    for setting in plan.settings:
        result = next((r for run, r in results.items() if _is_of(run, setting)), None)
        if result is None:
            continue
        size = SIZES[setting.size]
        rows.append(
            (
                name_of(setting),
                f"{size.layers} x {size.hidden}, FFN {size.ffn}, {size.heads} / {size.groups} heads",
                f"{size.batch} x {size.sequence}",
                f"{result['parameters']:,}",
                f"{result['tokens'] / result['parameters']:.1f}",
                str(round(setting.steps * plan.warmup)),
                ", ".join(f"{lr:g}" for lr in setting.rates),
                result["digest"],
            )
        )
    header = (
        "setting",
        "model",
        "batch",
        "parameters",
        "tokens per parameter",
        "warm-up",
        "rates",
        "corpus",
    )
    return (
        "## Settings\n\nLlama-shaped models of bytes (RoPE, grouped heads, gated MLP, untied embeddings), float32 "
        "on a CPU. AdamW is torch's, Adam-mini `megatron_adam_mini.AdamMini`, both with betas 0.9 and 0.95, eps "
        "1e-8, weight decay 0.1 (none for norms), clipping at 1.0, linear warm-up and linear decay to 0. Each "
        f"optimizer tries the same rates with seed {plan.seeds[0]} and takes the best one for all of "
        f"{len(plan.seeds)} seeds. The text is the Python standard library's source, 5 % of the files held out; "
        "*docstrings* are those of the same files.\n\n" + table(header, rows)
    )


def _is_of(run: Any, setting: Setting) -> bool:
    return (run.size, run.steps, run.corpus) == (setting.size, setting.steps, setting.corpus)


def _comparison_rows(setting: Setting, found: Sequence[Comparison]) -> list[tuple[str, ...]]:
    return [
        (
            name_of(setting),
            label(entry.optimizer),
            f"{entry.second_moments:,}",
            f"{entry.lr:g}" + (" (edge)" if entry.at_edge else ""),
            f"{entry.mean:.3f}",
            f"{entry.spread:.3f}",
            gap_text(entry.gap),
            " ".join(f"{value:+.3f}" for value in entry.gap.values) if entry.gap else "",
            entry.gap.verdict if entry.gap else "",
        )
        for entry in found
    ]


_COMPARISON = ("setting", "optimizer", "numbers in v", "rate", "loss", "spread", "gap", "seeds", "")


def _tuned(plan: Plan, results: Results) -> str:
    rows = [
        row for one in plan.settings for row in _comparison_rows(one, tuned(plan, one, results))
    ]
    return (
        "## Each at its best rate\n\n*Spread* is the standard deviation over seeds; *edge*: the best rate is the "
        "lowest or highest of the grid, so a better one may lie outside.\n\n"
        + table(_COMPARISON, rows)
    )


def _equal_rate(plan: Plan, results: Results) -> str:
    rows = [
        row
        for one in plan.settings
        for row in _comparison_rows(one, at_equal_rate(plan, one, results))
    ]
    return "## All at AdamW's best rate\n\n" + table(_COMPARISON, rows)


def _rates(plan: Plan, results: Results) -> str:
    rows = []
    for setting in plan.settings:
        for optimizer in plan.optimizers:
            found = []
            for lr in setting.rates:
                losses = losses_of([plan.run(setting, optimizer, lr, plan.seeds[0])], results)
                found.append(f"{lr:g}: " + (f"{losses[0]:.3f}" if losses else "not run"))
            rows.append((name_of(setting), label(optimizer), ", ".join(found)))
    return f"## All rates, seed {plan.seeds[0]}\n\n" + table(
        ("setting", "optimizer", "rate: loss"), rows
    )


def _stability(plan: Plan, results: Results) -> str:
    if plan.map is None:
        return ""
    maps = {name: stability_map(plan, name, results) for name in plan.optimizers}
    adamw = maps.pop("adamw", None)
    if adamw is None:
        return ""
    rows = []
    best = min(value for row in adamw for value in row)
    for name, found in {"adamw": adamw, **maps}.items():
        if found is None:
            continue
        flat = [value for row in found for value in row]
        pairs = list(zip(flat, (value for row in adamw for value in row), strict=True))
        above = [value - other for value, other in pairs if math.isfinite(value - other)]
        rows.append(
            (
                label(name),
                f"{min(flat):.3f}",
                f"{sum(value < best + 0.1 for value in flat)} of {len(flat)}",
                f"{sum(value < best + 0.2 for value in flat)} of {len(flat)}",
                "" if name == "adamw" else f"{sum(value > 0 for value in above)} of {len(above)}",
                "" if name == "adamw" else f"{statistics.fmean(above):+.3f}",
            )
        )
    header = (
        "",
        "best",
        "cells within 0.1 of AdamW's best",
        "within 0.2",
        "cells above AdamW",
        "mean gap",
    )
    return (
        f"## Stability: rate x warm-up\n\n{plan.map.size} parameters, {plan.map.steps} steps, "
        f"{len(plan.seeds)} seeds; a cell is the mean final loss.\n\n" + table(header, rows)
    )


def _ablation(plan: Plan, results: Results) -> str:
    found = ablation(plan, results)
    if plan.ablation is None or not found:
        return ""
    rows = [
        (
            change.name,
            f"{statistics.fmean(change.losses):.3f}",
            gap_text(change.to_adamw) if not change.name.startswith("AdamW") else "",
            gap_text(change.to_paper),
        )
        for change in found
    ]
    return (
        f"## Where the gap comes from\n\n{plan.ablation.size} parameters, {plan.ablation.steps} steps, rate "
        f"{plan.ablation.lr:g}, {len(plan.seeds)} seeds. One change of the preset `paper` each; *gap* is to AdamW "
        "with the same beta2 and warm-up.\n\n"
        + table(("", "loss", "gap to AdamW", "change against paper"), rows)
    )


def _not_covered(plan: Plan, results: Results) -> str:
    missing = [
        f"{name_of(setting)}: {label(name)}"
        for setting in plan.settings
        for name in plan.optimizers
        if name not in {entry.optimizer for entry in tuned(plan, setting, results)}
    ]
    largest = max((result["parameters"] for result in results.values()), default=0)
    lines = [
        f"* Models of more than {largest:,} parameters, other texts and tokenizers, models without RoPE, low "
        "precision, other batch sizes.",
        f"* More than {len(plan.seeds)} seeds. With so few, intervals are wide, and a small gap is not seen.",
        "* Rates between and outside of the grid, tuning of warm-up, betas or weight decay for each optimizer.",
    ]
    if missing:
        lines.append(f"* Asked for, but not complete in the log: {'; '.join(missing)}.")
    return "## What nothing is known of\n\n" + "\n".join(lines)
def _picture(pictures: dict[str, Path], name: str) -> str:
    return f"![{name}]({pictures[name].name})" if name in pictures else ""
