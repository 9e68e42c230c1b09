"""Whole training runs with the backends that are not the default on a CPU.

``ADAM_MINI_TEST_BACKEND=NAME python -m pytest`` runs every test with a backend; here some runs
against the oracle, in a session of their own: Triton must be told to interpret before its import.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 600

#: Rows cut by data and tensor parallelism, 16-bit weights; the others before a release.
RUNS = {
    "reference": (
        "test_sharded_run_equals_unsharded_oracle[tp2-pp2-dp2]",
        "test_sixteen_bit_models_equal_the_oracle_on_their_own_gradients[bf16, float32 gradients]",
    ),
    # The interpreter takes seconds per step.
    "triton": ("test_sharded_run_equals_unsharded_oracle[tp1-pp1-dp2]",),
}


@pytest.mark.parametrize("backend", RUNS)
def test_runs_equal_the_oracle_with(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    names = [f"tests/test_oracle.py::{name}" for name in RUNS[backend]]
    environment = {"ADAM_MINI_TEST_BACKEND": backend}
    if backend == "triton":
        environment["TRITON_INTERPRET"] = "1"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *names],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert f"{len(names)} passed" in result.stdout
