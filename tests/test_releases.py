"""The oldest whole wheel that we claim, with a part of ``tests/releases.py``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from megatron_adam_mini.mcore.compat import SUITE_VERSION, TESTED_VERSIONS
from tests.support import RELEASES

ROOT = Path(__file__).resolve().parent.parent
#: The wheel of 0.16.1 has no megatron.training, which the ranks of the tests import.
OLDEST = TESTED_VERSIONS[1]
PART = "test_a_run_equals or saved_under or wrapped"
TIMEOUT_S = 240


def test_the_table_has_the_releases_that_do_not_warn() -> None:
    assert set(TESTED_VERSIONS) <= set(RELEASES)
    assert SUITE_VERSION in RELEASES


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
