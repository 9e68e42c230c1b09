"""A few stretches of ``tools/soak.py``: layouts change, runs are killed, and nothing leaks."""

from __future__ import annotations

import pytest

from tools import soak


@pytest.mark.processes
def test_changing_layouts_and_kills_leave_the_run_as_it_was() -> None:
    report = soak.soak(total=20, length=8, seed=3)
    assert report["killed"] >= 1
    assert len(report["layouts"]) >= 4


def test_growth_is_found() -> None:
    stretch = soak.Stretch("ep4", 0, 1, frozenset({1}), None, 0.0)
    before = {"threads": 3, "files": 9, "groups": 20, "memory": 10**9}
    soak.check_resources(stretch, [{"before": before, "after": before}])
    for name in before:
        more = before | {name: before[name] + soak.GROWTH}
        with pytest.raises(AssertionError, match=name):
            soak.check_resources(stretch, [{"before": before, "after": more}])
