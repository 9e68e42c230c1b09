"""Models of every family that Megatron-Core has: the same run, whatever the layout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.megatron_job import Job
from tests.models import DELTA, HYBRID, LATENT
from tests.ranks import run_ranks
from tests.test_oracle import compare_runs, sharded_run, unsharded_run, world_of

SMALL = Job(
    hidden=32, heads=4, groups=4, ffn=48, vocab=64, overlap=True, bucket_size=2000, steps=4,
    batch=16,
)  # fmt: skip

MODELS = {
    "DeepSeek, dense": replace(SMALL, family="latent", qk_layernorm=True, config_args=LATENT),
    "Qwen3, dense": replace(SMALL, groups=2, qk_layernorm=True, config_args={"kv_channels": 16}),
    "Nemotron-H": replace(
        SMALL, family="hybrid", groups=2, layers=3, swiglu=False, config_args=HYBRID
    ),
    "Qwen3-Next, dense": replace(SMALL, family="delta", config_args=DELTA),
    "BERT": replace(SMALL, family="bert", swiglu=False, bias=True),
    "T5": replace(SMALL, family="t5", layers=1, swiglu=False, bias=True),
    "CLIP": replace(SMALL, family="vision", swiglu=False, bias=True),
}
LAYOUTS = {"tp1-dp1": {"dp": 1}, "tp2-dp2": {"tp": 2, "dp": 2}}
#: Without it, Megatron does not sum the gradients of norms within these layers rightly over ranks.
SEQUENCE_PARALLEL = ("DeepSeek, dense", "Qwen3-Next, dense")

#: Row in docs/support.md of the cases that show it.
SHOWN = {
    "DeepSeek*": "multi-head latent attention",
    "Qwen3, dense*": "head width other than hidden / heads",
    "Nemotron-H*": "Mamba, hybrid, gated delta",
    "Qwen3-Next*": "Mamba, hybrid, gated delta",
    "BERT*": "BERT, T5, vision",
    "T5*": "BERT, T5, vision",
    "CLIP*": "BERT, T5, vision",
}


@pytest.fixture(scope="module")
def unsharded() -> Any:
    """Train each model once with the oracle."""
    cache: dict[str, Any] = {}

    def run(case: str) -> Any:
        if case not in cache:
            job = replace(MODELS[case], overlap=False, bucket_size=None)
            cache[case] = run_ranks(1, unsharded_run, job)[0]
        return cache[case]

    return run


@pytest.mark.support(SHOWN, "oracle")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", MODELS)
def test_sharded_run_equals_unsharded_oracle(case: str, layout: str, unsharded: Any) -> None:
    layout_args = dict(LAYOUTS[layout])
    dp = layout_args.pop("dp")
    job = replace(MODELS[case], **layout_args)
    job = replace(job, sequence_parallel=job.tp > 1 and case in SEQUENCE_PARALLEL)
    compare_runs(job, run_ranks(world_of(job, dp), sharded_run, job), unsharded(case))
