"""The marker ``support``: which test shows which feature, and the table in ``docs/support.md``.

    @pytest.mark.support("context parallelism", "oracle")
    @pytest.mark.support({"cp2*": "context parallelism"}, "oracle")  # by the names of its cases

says that the test, or those of its cases whose name matches, show a feature; ``COLUMNS`` has the
columns. ``tools/support_table.py`` runs these tests with this module as pytest's plugin, and writes
the table. A feature without a test stands there with empty cells.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from megatron_adam_mini.mcore import preflight, preflight_model

ROOT = Path(__file__).resolve().parents[1]

#: Column in a marker -> its heading.
COLUMNS = {
    "oracle": "oracle parity",
    "overlap": "overlap parity",
    "reshard": "checkpoint reshard",
    "conversion": "conversion",
    "test": "shown by",
    "train": "train",
    "release overlap": "overlap",
    "release reshard": "reshard",
    "resume": "resume",
    "adam": "import from Adam",
    "experts": "experts",
    "launch": "launch",
    "register": "register",
    "patch": "patch",
    "neighbours": "checkpoints of the neighbours",
    "plain": "plain PyTorch",
}
FOUR = ("oracle", "overlap", "reshard", "conversion")
OF_RELEASES = (
    "train", "release overlap", "release reshard", "resume", "adam", "experts", "launch",
    "register", "patch", "neighbours",
)  # fmt: skip
#: Version -> row of the section on releases, oldest first.
RELEASES = {
    "0.16.1": "0.16.1 (tree core_v0.16.1)",
    "0.17.1": "0.17.1",
    "0.18.2": "0.18.2",
    "0.19.2": "0.19.2",
    "0.20.0": "main, 0.20.0 (d98e8a64, 2026-08-22)",
}
#: What the suite runs with: torch, and versions of Python.
SUITE_TORCH = re.findall(
    r"^torch==(.+)$", (ROOT / "requirements/runtime.txt").read_text(encoding="utf-8"), re.M
)[0]
SUITE_PYTHONS = ("3.12", "3.13")
OF_OTHERS = (*(column for column in OF_RELEASES if column != "neighbours"), "plain")
#: Rows of the section on other versions of torch and Python; see :func:`row_of`.
OTHERS = (
    "torch 2.11.0, Megatron-Core 0.19.2",
    "Python 3.11, Megatron-Core 0.16.1",
)
#: What a cell says where a feature cannot matter.
NO_MATTER = "-"


@dataclass(frozen=True)
class Feature:
    """A row.

    Attributes:
        name: as in markers.
        without: columns that say nothing about it: what they show does not depend on it.
    """

    name: str
    without: tuple[str, ...] = ()


LAYOUT = ("conversion",)  # converters read checkpoints, which say nothing of the layout
KERNEL = ("reshard", "conversion")  # nothing of it is stored

#: Heading -> columns and rows.
SECTIONS: dict[str, tuple[tuple[str, ...], tuple[Feature, ...]]] = {
    "Parallelism": (
        FOUR,
        (
            Feature("tensor parallelism"),
            Feature("pipeline parallelism"),
            Feature("data parallelism, distributed optimizer"),
            Feature("data parallelism, replicated state"),
            Feature("virtual pipeline stages", LAYOUT),
            Feature("uneven pipeline stages", LAYOUT),
            Feature("sequence parallelism", KERNEL),
            Feature("context parallelism", LAYOUT),
            Feature("expert parallelism", LAYOUT),
            Feature("expert tensor parallelism", LAYOUT),
            Feature("several distributed-optimizer instances", LAYOUT),
            Feature("bucket options of DDP", LAYOUT),
            Feature("parameter gather within the step", KERNEL),
            Feature("block sums within the backward pass", KERNEL),
            Feature("heads, rows and norms cut by any boundary", LAYOUT),
        ),
    ),
    "Models": (
        FOUR,
        (
            Feature("GPT, Llama: GQA, SwiGLU or GELU, biases"),
            Feature("fewer query groups than tensor-parallel ranks"),
            Feature("head width other than hidden / heads"),
            Feature("tied embeddings"),
            Feature("qk-layernorm"),
            Feature("attention output gate"),
            Feature("sliding-window attention", KERNEL),
            Feature("heterogeneous layers"),
            Feature("mixture of experts"),
            Feature("multi-head latent attention"),
            Feature("multi-token prediction"),
            Feature("Mamba, hybrid, gated delta"),
            Feature("BERT, T5, vision"),
            Feature("LLaVA: vision model, projector, language model"),
            Feature("frozen parameters, LoRA"),
            Feature("Transformer Engine's parameter names"),
        ),
    ),
    "Precision and modes": (
        FOUR,
        (
            Feature("float32"),
            Feature("bf16 with float32 main parameters"),
            Feature("16-bit gradient buffers", KERNEL),
            Feature("float32 modules in a 16-bit model"),
            Feature("fp16 with loss scale"),
            Feature("m in bf16"),
            Feature("m in 8 bits"),
            Feature("16-bit remainders"),
            Feature("single phase", KERNEL),
            Feature("gradients beyond float32's squares", KERNEL),
            Feature("other partitions: first, tensor, value as block"),
            Feature("FP8 parameters, with a stand-in for Transformer Engine's"),
            Feature("decoupled learning rate, muP, overrides"),
            Feature("qk-clip"),
            Feature("CPU offload"),
        ),
    ),
    "Around training": (
        ("test",),
        (
            Feature("gradient norm, zeros, skipped steps as Megatron's Adam"),
            Feature("what Megatron logs"),
            Feature("every method and attribute of Megatron's optimizers"),
            Feature("resume after a kill or a full disk"),
            Feature("resume with other flags"),
            Feature("start from Megatron's Adam, in every format"),
            Feature("checkpoint format torch, and its conversion"),
            Feature("checkpoints as frameworks save and load them"),
            Feature("damaged or malicious checkpoints are refused"),
            Feature("inspect, verify and convert without a cluster"),
            Feature("conversion from and to the public adam_mini"),
            Feature("state moved away, reset, reloaded by RL frameworks"),
            Feature("Megatron-Bridge: recipes, YAML, overrides, scheduler, metrics"),
            Feature("selection in frameworks that build Megatron's config"),
            Feature("memory of each rank before a run"),
            Feature("search of layouts that fit a GPU's memory"),
            Feature("CPU kernels: instruction sets, threads"),
            Feature("Triton kernels in the interpreter; on one H100 by tools/gpu_check.sh"),
        ),
    ),
    "Releases of Megatron-Core": (OF_RELEASES, tuple(map(Feature, RELEASES.values()))),
    "Other versions of torch and Python": (OF_OTHERS, tuple(map(Feature, OTHERS))),
}

#: Feature, column, name of the test file without folder and ending.
Shown = tuple[str, str, str]


def features() -> dict[str, tuple[str, ...]]:
    """Return the columns that can show each feature."""
    return {
        feature.name: tuple(column for column in columns if column not in feature.without)
        for columns, rows in SECTIONS.values()
        for feature in rows
    }


# Markers.


def claims(mark: pytest.Mark) -> Iterator[tuple[str, str, str]]:
    """Yield the pattern of cases, feature and column of a marker.

    Raises:
        ValueError: the marker names what is not in ``SECTIONS``, or a column that cannot show it.
    """
    what, column = mark.args
    for pattern, feature in what.items() if isinstance(what, dict) else [("*", what)]:
        if column not in features().get(feature, ()):
            raise ValueError(
                f"marker support({feature!r}, {column!r}): SECTIONS of tests/support.py has no "
                "such row, or the column does not apply to it. Remedy: use a row and column that "
                "are there, or add them."
            )
        yield pattern, feature, column


def claimed() -> set[Shown]:
    """Return what all markers of the tests claim."""
    found = set()
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        module = importlib.import_module(f"tests.{path.stem}")
        found |= {
            (feature, column, path.stem)
            for mark in marks_of(module)
            for _, feature, column in claims(mark)
        }
    return found


def marks_of(module: Any) -> Iterator[pytest.Mark]:
    """Yield the markers ``support`` of a module, its tests and its classes."""
    for value in (module, *vars(module).values()):
        if value is module or getattr(value, "__module__", None) == module.__name__:
            marks = value.__dict__.get("pytestmark", []) if hasattr(value, "__dict__") else []
            marks = marks if isinstance(marks, list) else [marks]
            yield from (m.mark if hasattr(m, "mark") else m for m in marks if m.name == "support")
            if isinstance(value, type):
                yield from (
                    mark
                    for method in vars(value).values()
                    for mark in getattr(method, "pytestmark", [])
                    if mark.name == "support"
                )


def row_of(megatron: str, torch: str, python: str) -> str:
    """Return what ``tests/releases.py`` calls an environment in which it runs, by its versions."""
    others = [f"torch {torch}"] if torch != SUITE_TORCH else []
    others += [f"Python {python}"] if python not in SUITE_PYTHONS else []
    return ", ".join([*others, f"Megatron-Core {megatron}"]) if others else RELEASES[megatron]


def claimed_of_releases() -> set[Shown]:
    """Return what ``tests/releases.py`` shows if it passes in every environment."""
    return {
        (row, column, "releases")
        for rows, columns in ((RELEASES.values(), OF_RELEASES), (OTHERS, OF_OTHERS))
        for row in rows
        for column in columns
    }


# The plugin: what the marked tests of a run have shown.


class Outcomes:
    """Collects outcomes of marked tests, in the process that starts the others."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.passed: set[Shown] = set()
        self.failed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        shown = [tuple(value) for name, value in report.user_properties if name == "support"]
        if report.outcome == "failed":
            self.failed.add(report.nodeid)
        elif report.when == "call" and report.outcome == "passed":
            self.passed.update(shown)

    def pytest_sessionfinish(self) -> None:
        text = json.dumps({"passed": sorted(self.passed), "failed": sorted(self.failed)})
        Path(self.path).write_text(text, encoding="utf-8")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--support-outcomes", metavar="FILE", help="write what marked tests show")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(config.getoption("--support-outcomes")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        case = item.callspec.id if hasattr(item, "callspec") else ""
        for mark in item.iter_markers("support"):
            for pattern, feature, column in claims(mark):
                if fnmatchcase(case, pattern):
                    item.user_properties.append(("support", (feature, column, item.path.stem)))


# The table.


def table(shown: Iterable[Shown]) -> str:
    """Return the document that says what is shown."""
    cells: dict[tuple[str, str], list[str]] = {}
    for feature, column, file in sorted(shown):
        cells.setdefault((feature, column), []).append(f"`{file}`")
    parts = [HEAD]
    for title, (columns, rows) in SECTIONS.items():
        parts.append(f"\n## {title}\n\n" + _row("feature", *(COLUMNS[c] for c in columns)))
        parts.append(_row(*["---"] * (1 + len(columns))))
        for feature in rows:
            parts.append(
                _row(
                    feature.name,
                    *(
                        NO_MATTER
                        if column in feature.without
                        else ", ".join(cells.get((feature.name, column), []))
                        for column in columns
                    ),
                )
            )
    parts.append("\n## Refused at start-up\n\n" + REFUSED + _row("flag", "why", "remedy"))
    parts.append(_row("---", "---", "---"))
    parts += [_row(f"**No**: {flag}", *why) for flag, *why in REFUSALS]
    return "\n".join(parts) + "\n"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


HEAD = """# What is supported

Written by `python tools/support_table.py` from tests that ran; do not edit. A cell names the files
in `tests/` whose marked tests passed; an empty cell: no test shows it; `-`: the column says nothing
about the feature.

* *oracle parity*: parameters, m and every v equal Adam-mini on whole tensors, element by element,
  within bounds that have names.
* *overlap parity*: with gradient reduction and parameter gather overlapped, the same bits as
  without.
* *checkpoint reshard*: saved under one layout, loaded under another, every value bit for bit.
* *conversion*: from and to Megatron's Adam, offline or with `--load`.

The rows of releases and versions come from `tools/releases.sh`, which runs `tests/releases.py` on
each; all other tables are of Megatron-Core 0.19.2 with torch 2.14.1 and Python 3.12. The wheel of
0.16.1 contains megatron.core alone, with which scripts that call `register()` train; the rest ran
with megatron.training of its tag. Its router of experts needs Transformer Engine, for whose absence
the tests define one name. torch 2.11 is the oldest that is allowed. 2.8 passed the same tests, but
one of six runs of that of experts ended in a segmentation fault of a rank, whose cause is not
known; 2.6 and 2.7 lack a function that AdamMini for plain PyTorch needs. torch 2.9, 2.10, 2.15,
Python 3.10 and 3.14 were not tried."""

#: Flag, reason and remedy: the tables of ``preflight``, and what other modules check besides.
REFUSALS = (
    *preflight._REFUSED.values(),
    (
        "--ckpt-format torch_dcp, --ckpt-format fsdp_dtensor",
        "its state is saved by every rank in torch_dist checkpoints, or in format torch",
        "--ckpt-format torch_dist",
    ),
    (
        "--ckpt-format torch with another --expert-tensor-parallel-size",
        "it has a file for each tensor-parallel rank",
        "--ckpt-format torch_dist",
    ),
    *(
        (f"{flag} with --fp8-param-gather", reason, "drop one of the two")
        for flag, reason in preflight._REFUSED_WITH_FP8.values()
    ),
    (
        "MXFP8 parameters",
        "they are gathered in bfloat16 through the memory of the gradients",
        "another --fp8-recipe, or no --fp8-param-gather",
    ),
    preflight_model.UNKNOWN_WEIGHTS,
    preflight_model.MIMO,
    ("--non-persistent-ckpt-type", "it is not supported yet", "drop the flag"),
    (
        "decoupled_weight_decay=False with 16-bit gradients",
        "the decay is added to gradients, where 16 bits would lose it",
        "--accumulate-allreduce-grads-in-fp32",
    ),
)

REFUSED = """On every rank, before the first step, with reason and remedy (`test_arguments`):

"""


def read_table(text: str) -> set[Shown]:
    """Return what a document says is shown; the inverse of :func:`table`."""
    shown = set()
    columns: list[str] = []
    keys = {heading: column for column, heading in COLUMNS.items()}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| feature |"):
            columns = [keys[cell] for cell in cells[1:]]
        elif line.startswith("| ") and cells[0] in features():
            for column, cell in zip(columns, cells[1:], strict=True):
                shown |= {(cells[0], column, file) for file in re.findall(r"`(\w+)`", cell)}
    return shown
