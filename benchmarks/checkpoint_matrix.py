"""Save optimizer state under one layout, load it under another, and count values that differ.

    python -m benchmarks.checkpoint_matrix [--layouts tp1-dp1 ...] [--formats ours ...]

Every pair of the layouts below, for Adam-mini's ``model_space`` and for the formats of Megatron's
own Adam (torch's AdamW in Megatron's distributed optimizer): ``dp_reshardable`` and
``fully_reshardable``, the latter also with one bucket per buffer, as a control. Saves and loads are
real, as in ``tests/test_checkpoint.py``. Main parameter, m and v of every element are gathered
before the save and after the load, and compared bit for bit; before each load all are set to NaN,
so values that are not loaded count as wrong.

Megatron's Adam needs help for this comparison, since without Transformer Engine or Apex it cannot
load into a new run at all (see the last table): one training step before the load creates its
state, and for ``fully_reshardable`` the missing entry ``step``, for which its load raises KeyError,
is ignored. Adam-mini is loaded without help.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import heading, write
from tests.gather import slices_of, whole_tensors
from tests.megatron_job import Job, Trainer
from tests.ranks import RankError, run_ranks
from tests.test_checkpoint import BASE, adam_state, load, save

LAYOUTS = {
    "tp1-dp1": (BASE, 1),
    "dp3": (BASE, 3),
    "dp4": (BASE, 4),
    "tp2-pp2-dp2": (replace(BASE, tp=2, pp=2), 8),
    "tp4-dp2": (replace(BASE, tp=4), 8),
    "pp2-vpp2-dp2": (replace(BASE, pp=2, vpp=2), 4),
    "pp4-dp2": (replace(BASE, pp=4), 8),
    "tp2-dp4": (replace(BASE, tp=2), 8),
}


@dataclass(frozen=True)
class Format:
    """An optimizer and a checkpoint format."""

    title: str
    optimizer: str
    sharding: str
    options: dict[str, Any] = field(default_factory=dict)

    def job(self, layout: str) -> Job:
        """Return the job for this format under a layout."""
        return replace(LAYOUTS[layout][0], optimizer=self.optimizer, **self.options)


FORMATS = {
    "ours": Format("Adam-mini, `model_space`", "adam_mini", "fully_reshardable"),
    "dp_reshardable": Format("Megatron's Adam, `dp_reshardable`", "adam", "dp_reshardable"),
    "fully_reshardable": Format(
        "Megatron's Adam, `fully_reshardable`", "adam", "fully_reshardable"
    ),
    "one_bucket": Format(
        "Megatron's Adam, `fully_reshardable`, one bucket",
        "adam",
        "fully_reshardable",
        {"bucket_size": None},
    ),
}
KEYS = {"adam_mini": ("param", "exp_avg", "v"), "adam": ("param", "exp_avg", "exp_avg_sq")}


@dataclass(frozen=True)
class Cell:
    """Outcome of one load: the numbers of wrong and of all values, or an error and its text."""

    wrong: int = 0
    total: int = 0
    error: str = ""

    def __str__(self) -> str:
        """Return the text of the table."""
        if self.error:
            return self.error.split(":")[0]
        return f"{self.wrong:,} wrong" if self.wrong else "equal"


# On the ranks.


def state_of(trainer: Trainer) -> Any:
    """Return the optimizer state of this rank."""
    return slices_of(trainer) if trainer.job.optimizer == "adam_mini" else adam_state(trainer)


@torch.no_grad()
def poison(trainer: Trainer) -> None:
    """Set the whole state to NaN (modified in place)."""
    if trainer.job.optimizer == "adam_mini":
        state = trainer.optimizer.inner.main_params.attach()
        tensors = state.flat_tensors()
        tensors += [held.buffer.weight for held in state.on_device if held.param is None]
    else:
        inner = trainer.optimizer.chained_optimizers[0].optimizer
        tensors = [param for group in inner.param_groups for param in group["params"]]
        for state in inner.state.values():
            tensors += [state["exp_avg"], state["exp_avg_sq"]]
    for tensor in tensors:
        tensor.fill_(float("nan"))


def train_and_save(job: Job, folder: str, sharding: str) -> Any:
    """Train and save; return the state."""
    trainer = Trainer(job)
    for step in range(job.steps):
        trainer.step(step)
    trainer.sync_params()
    save(trainer, folder, sharding)
    return state_of(trainer)


def load_all(job: Job, folders: dict[str, str], helped: bool) -> dict[str, Any]:
    """Load the checkpoints in turn; return the states (or an error's name) by key."""
    trainer = Trainer(job)
    if job.optimizer == "adam" and helped:
        trainer.step(1000)
        ignore_missing_step(trainer)
    found: dict[str, Any] = {}
    for key, folder in folders.items():
        if helped:
            poison(trainer)
        try:
            load(trainer, folder, parallel=True)
        except Exception as error:
            found[key] = describe(type(error).__name__, str(error))
        else:
            found[key] = state_of(trainer)
    return found


def ignore_missing_step(trainer: Trainer) -> None:
    """Patch Megatron to load tensors although AdamW's ``step`` is stored elsewhere."""
    member = trainer.optimizer.chained_optimizers[0]
    original = member._set_main_param_and_optimizer_states
    member._set_main_param_and_optimizer_states = lambda param, tensors: original(
        param, {"step": None, **tensors}
    )


def step_then_load(job: Job, folders: dict[str, str]) -> dict[str, Any]:
    """Load after one step, with no other help."""
    trainer = Trainer(job)
    trainer.step(1000)
    for folder in folders.values():
        load(trainer, folder, parallel=True)
    return dict.fromkeys(folders, state_of(trainer))


# In the parent process.


def wholes(parts: list[Any], job: Job) -> dict[tuple[str, str], torch.Tensor]:
    """Return every tensor of the state, by kind and parameter."""
    return {
        (key, name): value
        for key in KEYS[job.optimizer]
        for name, value in whole_tensors(parts, key, job).items()
    }


def compare(saved: dict[tuple[str, str], torch.Tensor], loaded: list[Any], job: Job) -> Cell:
    """Count the values that differ."""
    errors = [found for found in loaded if isinstance(found, str)]
    if errors:
        return Cell(error=cause(errors))
    try:
        after = wholes(loaded, job)
    except AssertionError as error:
        return Cell(error=describe("RanksDisagree", str(error)))
    assert after.keys() == saved.keys()
    wrong = sum(int((saved[key] != value).sum()) for key, value in after.items())
    return Cell(wrong, sum(value.numel() for value in after.values()))


def describe(kind: str, text: str) -> str:
    """Return an error in one line, its name first."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{kind}: {lines[0][:200]}" if lines else kind


def cause(errors: list[str]) -> str:
    """Return the error that caused the others: when a rank ends, its peers fail too."""
    own = [error for error in errors if "Connection closed by peer" not in error]
    return (own or errors)[0]


def run_or_error(
    world: int, function: Callable[..., Any], *args: Any, timeout: float
) -> list[Any] | str:
    """Return the results of the ranks, or their error."""
    try:
        return run_ranks(world, function, *args, timeout=timeout)
    except RankError as error:
        return cause([describe(kind, text) for kind, text in error.errors.values()])


class Matrix:
    """The cells of one format."""

    def __init__(self, key: str, names: list[str], root: str, timeout: float) -> None:
        self.format = FORMATS[key]
        self.names = names
        self.timeout = timeout
        self.folders = {name: str(Path(root, f"{key}-{name}")) for name in names}
        self.saved: dict[str, dict[tuple[str, str], torch.Tensor]] = {}
        self.cells: dict[tuple[str, str], Cell] = {}

    def save(self, name: str) -> None:
        """Train and save under one layout."""
        job, world = self.format.job(name), LAYOUTS[name][1]
        Path(self.folders[name]).mkdir()
        found = run_or_error(
            world,
            train_and_save,
            job,
            self.folders[name],
            self.format.sharding,
            timeout=self.timeout,
        )
        if isinstance(found, str):
            for target in self.names:
                self.cells[name, target] = Cell(error=f"{found} (in the save)")
            return
        self.saved[name] = wholes(found, job)
        for key, value in self.saved[name].items():
            assert value.isfinite().all(), key
            assert value.any(), f"{key} never moved"

    def load(self, target: str, sources: list[str]) -> None:
        """Load checkpoints under one layout in one job; if it fails, load each in its own job."""
        job, world = self.format.job(target), LAYOUTS[target][1]
        folders = {name: self.folders[name] for name in sources}
        timeout = self.timeout * len(sources)
        found = run_or_error(world, load_all, job, folders, True, timeout=timeout)
        for name in sources:
            if not isinstance(found, str):
                states = [rank[name] for rank in found]
                self.cells[name, target] = compare(self.saved[name], states, job)
            elif len(sources) == 1:
                self.cells[name, target] = Cell(error=found)
            else:
                self.load(target, [name])

    def without_help(self) -> str:
        """Load once under the layout that saved; return a row of the last table."""
        name = next(iter(self.saved))
        job, world = self.format.job(name), LAYOUTS[name][1]
        folders = {name: self.folders[name]}
        texts = []
        for function, extra in ((load_all, (False,)), (step_then_load, ())):
            found = run_or_error(world, function, job, folders, *extra, timeout=self.timeout)
            if not isinstance(found, str):
                errors = [rank[name] for rank in found if isinstance(rank[name], str)]
                found = cause(errors) if errors else "loads"
            texts.append(found)
        return f"| {self.format.title} | {texts[0]} | {texts[1]} |"

    def table(self) -> str:
        """Return a Markdown table: saved under the row's layout, loaded under the column's."""
        lines = ["| saved \\ loaded | " + " | ".join(self.names) + " |"]
        lines.append("|---" * (len(self.names) + 1) + "|")
        for source in self.names:
            row = [str(self.cells[source, target]) for target in self.names]
            lines.append(f"| {source} | " + " | ".join(row) + " |")
        errors = Counter(cell.error for cell in self.cells.values() if cell.error)
        if errors:
            lines += ["", "Errors, the first of each load:", ""]
            lines += [f"* {count} times `{error}`" for error, count in errors.most_common()]
        return "\n".join(lines)

    def summary(self) -> str:
        """Return one row: the numbers of pairs that are equal, are wrong, or fail."""
        cells = self.cells.values()
        wrong = sum(cell.wrong > 0 for cell in cells)
        errors = sum(bool(cell.error) for cell in cells)
        return f"| {self.format.title} | {len(cells) - wrong - errors} | {wrong} | {errors} |"


def main() -> None:
    """Run the matrix, print it, and write the dated result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for each load")
    parser.add_argument("--no-file", action="store_true", help="only print")
    args = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        matrices = [Matrix(key, args.layouts, root, args.timeout) for key in args.formats]
        for matrix in matrices:
            for name in args.layouts:
                matrix.save(name)
            for target in args.layouts:
                if matrix.saved:
                    matrix.load(target, list(matrix.saved))
            print(f"{time.monotonic() - begun:.0f} s: {matrix.summary()}", flush=True)
        bare = "\n".join(matrix.without_help() for matrix in matrices if matrix.saved)
    text = report(matrices, bare, time.monotonic() - begun)
    print(text)
    if not args.no_file:
        print(f"written to {write('checkpoint-matrix', text)}")


def report(matrices: list[Matrix], bare: str, seconds: float) -> str:
    """Return the whole result file."""
    totals = sorted({c.total for matrix in matrices for c in matrix.cells.values() if c.total})
    names = matrices[0].names
    lines = [
        heading("Checkpoints across layouts", "benchmarks.checkpoint_matrix"),
        f"Wall time {seconds / 60:.0f} min. Model: {BASE.layers} layers, hidden {BASE.hidden}, "
        f"{BASE.heads} heads, {BASE.groups} groups, feed-forward {BASE.ffn}, vocabulary "
        f"{BASE.vocab}, bf16; bucket size {BASE.bucket_size:,}; {BASE.steps} steps before a save. "
        f"Each load compares {' or '.join(f'{total:,}' for total in totals)} values: main "
        "parameter, m and v of each element.\n",
        __doc__.split("\n\n", 2)[2].replace("``", "`"),
        f"| of {len(names) ** 2} pairs | equal | wrong values | error |\n|---|---|---|---|",
        *(matrix.summary() for matrix in matrices),
        *(f"\n## {matrix.format.title}\n\n{matrix.table()}" for matrix in matrices),
        f"\n## Without help, saved and loaded under {names[0]}\n",
        "| format | new run | run that has made one step |\n|---|---|---|",
        bare,
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    # The ranks import this module by its name; they could not find a function of ``__main__``.
    from benchmarks import checkpoint_matrix

    checkpoint_matrix.main()
