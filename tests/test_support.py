"""The table of what is supported: it says what markers claim, and only what ran can get there."""

from __future__ import annotations

import importlib.util
import json
from fnmatch import filter as filter_cases
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from megatron_adam_mini.mcore import preflight
from tests import support

spec = importlib.util.spec_from_file_location(
    "support_table", support.ROOT / "tools/support_table.py"
)
assert spec is not None
assert spec.loader is not None
support_table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(support_table)


def test_the_table_says_what_the_markers_say() -> None:
    found = support_table.TABLE.read_text(encoding="utf-8")
    shown = support.read_table(found)
    # An empty cell of a release did not run: another command writes those rows, release by release.
    claimed = support.claimed() | (shown & support.claimed_of_releases())
    assert shown == claimed, "run python tools/support_table.py with the test files that differ"
    assert found == support.table(claimed), "run python tools/support_table.py"


def id_of(values: Any) -> str:
    """Return pytest's name of a case whose values are texts."""
    return "-".join(map(str, values)) if isinstance(values, tuple) else str(values)


def test_every_pattern_of_cases_matches_one() -> None:
    for path in sorted((support.ROOT / "tests").glob("test_*.py")):
        module = importlib.import_module(f"tests.{path.stem}")
        for value in vars(module).values():
            marks = getattr(value, "pytestmark", []) if callable(value) else []
            values = [map(id_of, mark.args[1]) for mark in marks if mark.name == "parametrize"]
            cases = ["-".join(case) for case in product(*values)]
            for mark in marks:
                for pattern, feature, _ in support.claims(mark) if mark.name == "support" else ():
                    assert filter_cases(cases, pattern), f"{path.name}: {pattern!r} of {feature!r}"


@pytest.mark.parametrize(
    "args",
    [
        ("no such feature", "oracle"),
        ("context parallelism", "no such column"),
        ("context parallelism", "conversion"),
        ({"*": "resume with other flags"}, "oracle"),
    ],
)
def test_a_marker_that_names_what_is_not_there_is_an_error(args: Any) -> None:
    with pytest.raises(ValueError, match="Remedy: use a row and column"):
        list(support.claims(pytest.mark.support(*args).mark))


def test_the_table_is_read_as_it_was_written() -> None:
    shown = {
        ("tensor parallelism", "oracle", "test_oracle"),
        ("tensor parallelism", "oracle", "test_other"),
        ("qk-layernorm", "reshard", "test_checkpoint"),
        ("resume with other flags", "test", "test_resume_options"),
    }
    text = support.table(shown)
    assert support.read_table(text) == shown
    assert "| tensor parallelism | `test_oracle`, `test_other` |  |  |  |" in text
    assert "| context parallelism |  |  |  | - |" in text
    for flag, reason, remedy in preflight._REFUSED.values():
        assert f"| **No**: {flag} | {reason} | {remedy} |" in text


def test_a_run_of_some_files_leaves_the_others() -> None:
    old = support.table({("float32", "oracle", "test_a"), ("qk-layernorm", "oracle", "test_b")})
    new = {("float32", "overlap", "test_a")}
    assert support_table.merged(old, new, {"test_a"}) == new | {
        ("qk-layernorm", "oracle", "test_b")
    }
    assert support_table.merged(old, new, set()) == new


class Report:
    """What the plugin reads of a test's report."""

    def __init__(self, outcome: str, when: str = "call") -> None:
        self.nodeid, self.outcome, self.when = "test_a.py::test", outcome, when
        self.user_properties = [("support", ["float32", "oracle", "test_a"]), ("other", 1)]


@pytest.mark.parametrize(
    ("reports", "passed", "failed"),
    [
        ([Report("passed", "setup"), Report("passed")], 1, 0),
        ([Report("passed", "setup"), Report("skipped")], 0, 0),
        ([Report("passed", "setup"), Report("failed")], 0, 1),
        ([Report("failed", "setup")], 0, 1),
    ],
    ids=["passed", "skipped", "failed", "setup failed"],
)
def test_only_what_passed_is_shown(
    reports: list[Any], passed: int, failed: int, tmp_path: Path
) -> None:
    outcomes = support.Outcomes(str(tmp_path / "outcomes.json"))
    for report in reports:
        outcomes.pytest_runtest_logreport(report)
    outcomes.pytest_sessionfinish()
    found = json.loads((tmp_path / "outcomes.json").read_text())
    assert [len(found["passed"]), len(found["failed"])] == [passed, failed]
