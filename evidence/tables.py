"""Comparisons -> tables of the report.

Imports ``settings``, ``grid`` and ``comparison``. Each function returns a
part of a Markdown text, empty if the log has nothing for it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

from evidence.comparison import (
    Comparison,
    Gap,
    ablation,
    at_equal_rate,
    gaps_during,
    losses_of,
    stability_map,
    stored,
    tuned,
    twin_runs,
)
from evidence.grid import STORED_OTHERWISE, Plan, Results, Setting, Storage
from evidence.settings import label

_COMPARISON = ("setting", "", "numbers in v", "rate", "loss", "spread", "gap", "of each seed", "")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; empty without rows."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) if rows else ""


def summary(plan: Plan, results: Results) -> str:
    """Return a line for each preset: its gaps at its best rates."""
    rows = []
    for name in plan.optimizers:
        gaps = [
            entry.gap
            for setting in plan.settings
            for entry in tuned(plan, setting, results)
            if entry.optimizer == name and entry.gap
        ]
        if not gaps:
            continue
        means = [gap.mean for gap in gaps]
        values = [value for gap in gaps for value in gap.values]
        verdicts = [gap.verdict for gap in gaps]
        rows.append(
            (
                label(name),
                f"{len(gaps)}",
                f"{statistics.median(means):+.3f}",
                f"{min(means):+.3f} to {max(means):+.3f}",
                f"{sum(value > 0 for value in values)} of {len(values)}",
                *(str(verdicts.count(word)) for word in ("worse", "not told apart", "better")),
            )
        )
    header = (
        *("", "settings", "median of their gaps", "range", "seeds above AdamW"),
        *("worse", "not told apart", "better"),
    )
    return table(header, rows)


def at_best_rates(plan: Plan, results: Results) -> str:
    """Return all settings, each optimizer at its own best rate."""
    compared = [(one, tuned(plan, one, results)) for one in plan.settings]
    return table(_COMPARISON, [row for one, found in compared for row in _rows(one, found)])


def at_one_rate(plan: Plan, results: Results) -> str:
    """Return all settings, all optimizers at AdamW's best rate."""
    compared = [(one, at_equal_rate(plan, one, results)) for one in plan.settings]
    return table(_COMPARISON, [row for one, found in compared for row in _rows(one, found)])


def _rows(setting: Setting, found: Sequence[Comparison]) -> list[tuple[str, ...]]:
    return [
        (
            setting.name,
            label(entry.optimizer),
            f"{entry.second_moments:,}",
            f"{entry.lr:g}" + (" (edge)" if entry.at_edge else ""),
            f"{entry.mean:.3f}",
            f"{entry.spread:.3f}",
            _gap(entry.gap),
            " ".join(f"{value:+.3f}" for value in entry.gap.values) if entry.gap else "",
            entry.gap.verdict if entry.gap else "",
        )
        for entry in found
    ]


def _gap(gap: Gap | None) -> str:
    if gap is None:
        return ""
    if not math.isfinite(gap.mean):
        return "diverged"
    return f"{gap.mean:+.3f} ± {gap.half_width:.3f}"


def during(plan: Plan, results: Results) -> str:
    """Return the gaps at the best rates while the runs go on."""
    rows = []
    for setting in plan.settings:
        for name, gaps in gaps_during(plan, setting, results).items():
            found = (f"{step}: {_gap(gap)}" for step, gap in gaps.items())
            rows.append((setting.name, label(name), ", ".join(found)))
    return table(("setting", "", "step: gap"), rows)


def all_rates(plan: Plan, results: Results) -> str:
    """Return the losses of the first seed at each rate, a table for each grid of rates."""
    tables = []
    for rates in dict.fromkeys(setting.rates for setting in plan.settings):
        rows = []
        for setting in (one for one in plan.settings if one.rates == rates):
            for name in plan.optimizers:
                runs = [plan.run(setting, name, lr, plan.seeds[0]) for lr in rates]
                losses = losses_of(runs, results)
                if losses is not None:
                    values = (f"{loss:.3f}" for loss in losses)
                    rows.append((setting.name, label(name), *values))
        tables.append(table(("setting", "", *(f"{lr:g}" for lr in rates)), rows))
    return "\n\n".join(tables)


def stability(plan: Plan, results: Results) -> str:
    """Return how much of the map of rates and warm-ups is good."""
    maps = {name: stability_map(plan, name, results) for name in plan.optimizers if plan.map}
    cells = {
        name: [value for row in found for value in row] for name, found in maps.items() if found
    }
    if "adamw" not in cells:
        return ""
    adamw = cells["adamw"]
    best = min(adamw)
    rows = []
    for name, losses in cells.items():
        gaps = [loss - other for loss, other in zip(losses, adamw, strict=True)]
        gaps = [gap for gap in gaps if math.isfinite(gap)] if name != "adamw" else []
        near = (f"{sum(loss < best + d for loss in losses)} of {len(losses)}" for d in (0.1, 0.2))
        above = f"{sum(gap > 0 for gap in gaps)} of {len(gaps)}" if gaps else ""
        mean = f"{statistics.fmean(gaps):+.3f}" if gaps else ""
        rows.append((label(name), f"{min(losses):.3f}", *near, above, mean))
    header = (
        *("", "best cell", "cells within 0.1 of AdamW's best", "within 0.2"),
        *("cells above AdamW's", "mean gap"),
    )
    return table(header, rows)


def ablations(plan: Plan, results: Results) -> str:
    """Return what each change of the preset ``paper`` does."""
    rows = [
        (
            change.name,
            f"{statistics.fmean(change.losses):.3f}",
            _gap(change.to_adamw) if change.to_adamw else "",
            _gap(change.to_paper),
        )
        for change in ablation(plan, results)
    ]
    return table(("", "loss", "gap to AdamW", "change against paper"), rows)


def twins(plan: Plan, results: Results) -> str:
    """Return the losses of the same runs in plain PyTorch and by Megatron."""
    rows = [
        (
            label(pair.optimizer),
            f"{pair.torch:.5f}",
            f"{pair.megatron:.5f}",
            f"{pair.difference:.4f} of {pair.points}",
        )
        for pair in twin_runs(plan, results)
    ]
    return table(("", "plain PyTorch", "Megatron", "largest difference of points"), rows)


def storages(plan: Plan, results: Results) -> str:
    """Return the losses of each way to store the state, beside the first of its test."""
    rows = [
        (
            test.name,
            f"{test.lr:g}",
            entry.way,
            f"{statistics.fmean(entry.losses):.3f}",
            f"{statistics.stdev(entry.losses):.3f}" if len(entry.losses) > 1 else "",
            _gap(entry.gap) if len(entry.losses) > 1 else "",
            " ".join(f"{value:+.3f}" for value in entry.gap.values) if entry.gap else "",
            entry.gap.verdict if entry.gap and len(entry.losses) > 1 else "",
        )
        for test in _of_losses(plan)
        for entry in stored(plan, test, results)
    ]
    header = ("setting", "rate", "state", "loss", "spread", "gap to float32", "of each seed", "")
    return table(header, rows)


def norms(plan: Plan, results: Results) -> str:
    """Return how norms drift away from those of the first way to store the state."""
    rows = [
        (
            test.name,
            entry.way,
            *(" ".join(f"{value:.3f}" for value in ratios) for ratios in entry.norms.values()),
        )
        for test in _of_losses(plan)
        for entry in stored(plan, test, results)
        if entry.gap
    ]
    watched = ("m", "weights", "m of the embedding", "embedding")
    return table(("setting", "state", *watched), rows)


def same_bits(plan: Plan, results: Results) -> str:
    """Return which ways to store the state give the same bits as another."""
    rows = []
    for test in plan.storage:
        if test in _of_losses(plan):
            continue
        for base, way in zip(test.ways[::2], test.ways[1::2], strict=True):
            pair = replace(test, ways=(base, way))
            for entry in stored(plan, pair, results)[1:]:
                same = "the same bits" if entry.same_bits else "DIFFERENT"
                rows.append((test.name, base, entry.way, same))
    return table(("setting", "state", "other state", "losses, main parameters, m"), rows)


def _of_losses(plan: Plan) -> list[Storage]:
    return [test for test in plan.storage if set(test.ways) <= {*STORED_OTHERWISE}]
