"""The oldest whole wheel that we claim, with a part of ``tests/releases.py``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from megatron_adam_mini.mcore.compat import SUITE_VERSION, TESTED_VERSIONS
from tests.support import OTHERS, RELEASES, SUITE_PYTHONS

ROOT = Path(__file__).resolve().parent.parent
#: The wheel of 0.16.1 has no megatron.training, which the ranks of the tests import.
OLDEST = TESTED_VERSIONS[1]
PART = "test_a_run_equals or saved_under or wrapped"
TIMEOUT_S = 240


def test_the_table_has_the_releases_that_do_not_warn() -> None:
    assert set(TESTED_VERSIONS) <= set(RELEASES)
    assert SUITE_VERSION in RELEASES


def test_the_metadata_claims_what_ran() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ran = [tuple(map(int, v.split("."))) for v in re.findall(r"torch (\S+),", " ".join(OTHERS))]
    assert f"torch>={min(ran)[0]}.{min(ran)[1]}" in project["dependencies"]
    pythons = [*re.findall(r"Python (\S+),", " ".join(OTHERS)), *SUITE_PYTHONS]
    assert project["requires-python"] == f">={pythons[0]}"
    named = [c.rpartition(" ")[2] for c in project["classifiers"] if ":: Python ::" in c]
    assert named == pythons
    (core,) = (n for n in project["optional-dependencies"]["megatron"] if "megatron-core" in n)
    assert f">={TESTED_VERSIONS[0]},<={SUITE_VERSION}," in core


def test_the_oldest_wheel_trains_and_reshards(tmp_path: Path) -> None:
    install = [sys.executable, "-m", "pip", "install", "--quiet"]
    wheels = ["--no-deps", "--target", str(tmp_path), f"megatron-core=={OLDEST}", "pyyaml"]
    installed = subprocess.run(
        [*install, *wheels], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert installed.returncode == 0, installed.stderr
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-q", "tests/releases.py", "-k", PART],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert ended.returncode == 0, ended.stdout[-4000:]
    assert "3 passed" in ended.stdout
