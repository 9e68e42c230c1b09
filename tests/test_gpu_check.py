"""The GPU scripts in benchmarks/gpu, as far as they go without a GPU: one try, and what they read.

What they find on a GPU is in benchmarks/results; nothing here says anything about that.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import report
from benchmarks.gpu.training import parse

ROOT = Path(__file__).parents[1]


def start(folder, *command, **environment):
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {
            "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "OUT": str(folder),
            "OMP_NUM_THREADS": "1", **environment,
        },
    )  # fmt: skip


@pytest.mark.parametrize("stage", ["bench", "train"])
def test_refuses_without_a_gpu(stage, tmp_path):
    result = start(tmp_path, sys.executable, "-m", f"benchmarks.gpu.{stage}")
    assert result.returncode == 1
    assert "found no CUDA device" in result.stderr
    assert not list(tmp_path.iterdir())


def test_kernels_equal_the_reference_in_the_interpreter(tmp_path):
    pytest.importorskip("triton")
    result = start(
        tmp_path, sys.executable, "-m", "benchmarks.gpu.parity", "--device", "cpu", "--small",
        "--workers", "1", "--rounds", "1", "--seed", "3", TRITON_INTERPRET="1",
    )  # fmt: skip
    record = json.loads((tmp_path / "parity.json").read_text())
    assert result.returncode == 0, record["failures"]
    assert record["facts"]["cases"] == 1


def test_a_bench_becomes_a_result(tmp_path):
    result = start(
        tmp_path, sys.executable, "-m", "benchmarks.gpu.bench", "--device", "cpu", "--tiny",
        "--samples", "2", "--only", "one bucket", "preset first",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    record = json.loads((tmp_path / "bench.json").read_text())
    assert [row["case"] for row in record["rows"]] == [
        "one bucket",
        "torch, one bucket",
        "preset first",
    ]
    assert record["rows"][0]["bytes"] == 26
    assert record["rows"][2]["bytes"] > 26
    assert record["rows"][2]["ratio"] > 0
    text = report.report([record])
    assert "| preset first |" in text
    assert "Failures: none." in text


def test_results_of_several_devices_are_not_mixed():
    records = [{"environment": {"device": name}, "began": "2026-01-01"} for name in "ab"]
    with pytest.raises(ValueError, match="several devices: a, b"):
        report.report(records)


LOG = """
 iteration 1/ 2 | elapsed time per iteration (ms): 900.0 | lm loss: 5.5E+00 | grad norm: 2.5 |
 iteration 2/ 2 | elapsed time per iteration (ms): 100.0 | lm loss: 5.25E+00 | grad norm: 2.0 |
MEASURED {"peak_GB": 1.5}
"""


def test_reads_the_log_of_a_training():
    found = parse(LOG, "0")
    assert found["ok"]
    assert found["losses"] == [5.5, 5.0]
    assert found["norms"] == [2.5, 2.0]
    assert found["ms"] == 500.0
    assert found["peak_GB"] == 1.5
    found = parse("torch.OutOfMemoryError: CUDA out of memory.", "1")
    assert not found["ok"]
    assert found["why"] == "out of memory"


def test_names_the_stages(tmp_path):
    result = start(tmp_path, "bash", "tools/gpu_check.sh", "train4")
    assert result.returncode == 2
    assert "unknown stage 'train4'; allowed: probe parity" in result.stderr
