"""Heads of other sizes and numbers, and layers with configs of their own, against the oracle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.megatron_job import Job
from tests.models import HETEROGENEOUS
from tests.ranks import run_ranks
from tests.test_checkpoint import compare, load_and_show, train_and_save
from tests.test_oracle import compare_runs, sharded_run, unsharded, world_of

BASE = Job(overlap=True, bucket_size=3000, steps=5)
LAYERS = replace(BASE, family="heterogeneous", layers=4, config_args=HETEROGENEOUS)
CASES: dict[str, tuple[Job, int]] = {
    "wide heads, cut by tp": (
        replace(BASE, tp=2, groups=1, config_args={"kv_channels": 12}),
        2,
    ),
    "narrow heads, one group": (
        replace(BASE, heads=4, groups=1, qk_layernorm=True, config_args={"kv_channels": 4}),
        3,
    ),
    "output gate, groups cut by tp, qk-layernorm": (
        replace(BASE, tp=4, groups=2, gated_attention=True, qk_layernorm=True),
        1,
    ),
    "sliding window": (replace(BASE, tp=2, config_args={"window_size": (2, 0)}), 1),
    "heterogeneous layers, tp2-dp2": (replace(LAYERS, tp=2), 2),
    "heterogeneous layers, pp2-dp2": (replace(LAYERS, pp=2), 2),
}


@pytest.mark.support(
    {
        "wide heads*": "head width other than hidden / heads",
        "narrow heads*": "head width other than hidden / heads",
        "*cut by tp*": "fewer query groups than tensor-parallel ranks",
        "output gate*": "attention output gate",
        "*qk-layernorm": "qk-layernorm",
        "sliding window": "sliding-window attention",
        "heterogeneous*": "heterogeneous layers",
    },
    "oracle",
)
@pytest.mark.parametrize("case", CASES)
def test_sharded_run_equals_unsharded_oracle(case: str) -> None:
    job, dp = CASES[case]
    compare_runs(job, run_ranks(world_of(job, dp), sharded_run, job), unsharded(job))


@pytest.mark.support("heterogeneous layers", "reshard")
def test_heterogeneous_layers_load_under_another_layout(tmp_path: Path) -> None:
    job = replace(LAYERS, tp=2, bf16=True, steps=2)
    saved = run_ranks(4, train_and_save, job, str(tmp_path))
    other = replace(job, tp=1, pp=2)
    compare(saved, job, run_ranks(2, load_and_show, other, str(tmp_path)), other)


@pytest.mark.support(
    {
        "fewer groups": "fewer query groups than tensor-parallel ranks",
        "wide heads": "head width other than hidden / heads",
    },
    "reshard",
)
@pytest.mark.parametrize("case", ["fewer groups", "wide heads"])
def test_heads_cut_by_tensor_parallelism_load_under_another_layout(
    case: str, tmp_path: Path
) -> None:
    wide = {"kv_channels": 12} if case == "wide heads" else {}
    job = replace(BASE, tp=4, groups=2, bf16=True, qk_layernorm=True, steps=2, config_args=wide)
    saved = run_ranks(4, train_and_save, job, str(tmp_path))
    other = replace(job, tp=1)
    compare(saved, job, run_ranks(2, load_and_show, other, str(tmp_path)), other)
