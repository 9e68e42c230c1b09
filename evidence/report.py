"""Runs of a log -> a report in Markdown, with pictures beside it; nothing is trained.

Imports ``settings``, ``grid``, ``run_log``, ``comparison``, ``figures`` and ``tables``.
"""

from __future__ import annotations

from pathlib import Path

from evidence import run_log, tables
from evidence.comparison import tuned
from evidence.figures import draw_all
from evidence.grid import Plan, Results, Setting
from evidence.settings import SIZES, Run, label

_READ = """\
Losses are nats per byte on held-out files. A *gap* is the loss minus AdamW's with the same initial
weights and batches, ± the half width of its 95 % interval over seeds (t distribution). It is called
*worse* or *better* where the interval does not contain 0, else *not told apart*, which is no proof
of equality. *Spread* is the standard deviation over seeds; *edge*: the best rate is the lowest or
highest of the grid, so a better one may lie outside."""

_READ_STORAGE = """\
Losses are nats per byte on held-out files. A *gap* is the loss minus that of float32 state with the
same initial weights and batches, ± the half width of its 95 % interval over seeds (t distribution).
It is called *worse* or *better* where the interval does not contain 0, else *not told apart*, which
is no proof of equality. *Spread* is the standard deviation over seeds."""

_SETTINGS = """\
Llama-shaped models of bytes (rotary embeddings, grouped heads, gated MLP, untied embeddings). AdamW
is torch's, Adam-mini is `megatron_adam_mini.AdamMini`; both have betas 0.9 and 0.95, eps 1e-8,
weight decay 0.1 (none for norms), clipping at 1.0, and a linear warm-up before a linear decay to 0.
Each optimizer tries the same rates with one seed, and takes the best of them for all seeds, with
which another seed may be less stable. The text is the source of the Python standard library,
*docstrings* are those in it; 5 % of the files are held out, the same for all runs."""


_STORAGE = """\
The optimizer of Megatron runs (`megatron_adam_mini.optimizer`, one rank), preset `row`, beside
bfloat16 weights; the model computes in float32 with them, so that runs differ by the storage of m
and of main parameters alone. Rates are those that were found for float32 weights. All begin with
the same weights and see the same batches. *Nudged* is float32 state whose initial main parameters
have other last bits: its gap and its norms show how far runs drift apart for no reason at all."""

_NORMS = """\
Norms divided by those of float32 state, in the four quarters of the run; means of the seeds."""


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

    def picture(name: str) -> str:
        return f"![{name}]({pictures[name].name})" if name in pictures else ""

    first, seeds = plan.seeds[0], f"{len(plan.seeds)} seeds"
    parts: list[tuple[str, str, str, str]] = [
        ("In short", "Each at its own best rate:", tables.summary(plan, results), "gaps"),
        ("Settings", _SETTINGS, _settings(plan, results), ""),
        ("Each at its best rate", "", tables.at_best_rates(plan, results), "curves"),
        ("During these runs", "", tables.during(plan, results), ""),
        ("All at AdamW's best rate", "", tables.at_one_rate(plan, results), ""),
        (f"All rates, seed {first}", "", tables.all_rates(plan, results), "rates"),
    ]
    if plan.map:
        text = (
            f"{plan.map.size} parameters, {plan.map.steps} steps; a cell is the mean loss of "
            f"{len(plan.map.seeds)} seeds."
        )
        found = tables.stability(plan, results)
        parts.append(("Stability over rate and warm-up", text, found, "stability"))
    if plan.ablation:
        text = (
            f"{plan.ablation.size} parameters, {plan.ablation.steps} steps, rate "
            f"{plan.ablation.lr:g}, {seeds}; one change of the preset `paper` at a time. The gap "
            "is to AdamW with the same beta2 and warm-up."
        )
        found = tables.ablations(plan, results)
        parts.append(("Where the gap comes from", text, found, ""))
    if plan.twin:
        text = (
            f"{plan.twin.size} parameters, {plan.twin.steps} steps, rate {plan.twin.lr:g}, seed "
            f"{first}: final validation loss of the same weights and batches by "
            "`megatron_adam_mini.launch`, Megatron-Core on the CPU host, one rank, float32 and the "
            "distributed optimizer; AdamW is then Megatron's. Points are means of equal parts of "
            "the curve of training losses."
        )
        parts.append(("The same through Megatron", text, tables.twins(plan, results), ""))
    if plan.storage:
        found = tables.storages(plan, results)
        parts.append(("State in fewer bits", _STORAGE, found, ""))
        parts.append(("Drift of norms", _NORMS, tables.norms(plan, results), ""))
        parts.append(("Storage that changes no bit", "", tables.same_bits(plan, results), ""))
    sections = [_heading(plan, log, command)]
    for title, text, found, name in parts:
        if found:
            pieces = (f"## {title}", text, found, picture(name))
            sections.append("\n\n".join(piece for piece in pieces if piece))
    sections.append(_not_covered(plan, results))
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return [path, *pictures.values()]


def _heading(plan: Plan, log: Path, command: str) -> str:
    made = run_log.environments(log)
    machines = {f"{one['device']}, torch {one['torch']}, Python {one['python']}" for one in made}
    hours = sum(result["seconds"] for result in run_log.read(log).values()) / 3600
    title = "Adam-mini against AdamW" if plan.settings else "Adam-mini with its state in fewer bits"
    read = _READ if plan.settings else _READ_STORAGE
    return (
        f"# {title}, {max(one['date'] for one in made)}\n\n"
        f"Command: `{command}`. This report is made from [its log]({log.name}) alone.\n"
        f"Machine: {'; '.join(sorted(machines))}. The runs took {hours:.1f} hours together, one "
        f"thread each.\n\n{read}"
    )


def _settings(plan: Plan, results: Results) -> str:
    rows = []
    for setting in plan.settings:
        result = next((r for run, r in results.items() if _is_of(run, setting)), None)
        if result is not None:
            size = SIZES[setting.size]
            heads = f"{size.heads} heads, {size.groups} groups"
            rows.append(
                (
                    setting.name,
                    f"{size.layers} x {size.hidden}, FFN {size.ffn}, {heads}",
                    f"{size.batch} x {size.sequence}",
                    f"{result['parameters']:,}",
                    f"{result['tokens'] / result['parameters']:.1f}",
                    str(round(setting.steps * plan.warmup)),
                    ", ".join(f"{lr:g}" for lr in setting.rates),
                    f"`{result['digest']}`",
                )
            )
    header = (
        *("setting", "model", "batch", "parameters", "tokens per parameter"),
        *("warm-up", "rates", "digest of the text"),
    )
    return tables.table(header, rows)


def _is_of(run: Run, setting: Setting) -> bool:
    same = (run.size, run.steps, run.corpus) == (setting.size, setting.steps, setting.corpus)
    return same and run.trainer == "torch"


def _not_covered(plan: Plan, results: Results) -> str:
    missing = []
    for setting in plan.settings:
        found = {entry.optimizer for entry in tuned(plan, setting, results)}
        if names := [label(name) for name in plan.optimizers if name not in found]:
            missing.append(f"{setting.name} ({', '.join(names)})")
    largest = max((result.get("parameters", 0) for result in results.values()), default=0)
    seeds = max((len(test.seeds) for test in plan.storage), default=len(plan.seeds))
    lines = [
        "## What nothing is known of",
        "",
        f"* Models of more than {largest:,} parameters, other texts, tokenizers and batch sizes, "
        "models without rotary embeddings, products in low precision.",
        f"* More than {seeds} seeds: intervals are wide, and small gaps are not seen.",
        "* Rates beside those of the grid; a warm-up, betas or weight decay tuned for each.",
    ]
    if plan.storage:
        lines.append(
            "* State in fewer bits with other presets than `row`, in longer runs, on GPUs."
        )
    if plan.map and not tables.stability(plan, results):
        missing.append("the map of rate and warm-up")
    if plan.ablation and not tables.ablations(plan, results):
        missing.append("the ablation")
    if plan.twin and not tables.twins(plan, results):
        missing.append("the same through Megatron")
    if missing:
        lines.append(f"* Asked for, and not complete in the log: {'; '.join(missing)}.")
    return "\n".join(lines)
