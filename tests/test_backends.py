"""Whole training runs with the backends that are not the default on a CPU.

``ADAM_MINI_TEST_BACKEND=NAME python -m pytest`` runs every test with a backend; here some runs
against the oracle: rows cut by data and tensor parallelism, 16-bit weights.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.test_oracle import (
    LAYOUTS,
    PRECISIONS,
    check_replicas,
    check_same_gradients,
    compare_runs,
    sharded_run,
    unsharded_run,
    world_of,
)

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 600

REFERENCE = {"backend": "reference"}


def test_reference_equals_the_oracle() -> None:
    job, dp = LAYOUTS["tp2-pp2-dp2"]
    job = replace(job, adam_mini=REFERENCE)
    (expected,) = run_ranks(1, unsharded_run, replace(job, tp=1, pp=1))
    compare_runs(job, run_ranks(world_of(job, dp), sharded_run, job), expected)


def test_reference_equals_the_oracle_with_sixteen_bit_weights() -> None:
    job, dp = PRECISIONS["bf16, float32 gradients"]
    job = replace(job, adam_mini=REFERENCE)
    ranks = run_ranks(world_of(job, dp), sharded_run, job)
    check_replicas(ranks, job)
    check_same_gradients(ranks, job)


def test_triton_equals_the_oracle() -> None:
    """In a session of its own: Triton must be told to interpret before its import.

    One run, because the interpreter takes seconds per step; the others before a release.
    """
    pytest.importorskip("triton")
    name = "tests/test_oracle.py::test_sharded_run_equals_unsharded_oracle[tp1-pp1-dp2]"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", name],
        cwd=ROOT,
        env=os.environ | {"ADAM_MINI_TEST_BACKEND": "triton", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert "1 passed" in result.stdout
