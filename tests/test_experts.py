"""Mixtures of experts: the same run under any expert-parallel layout, equal to the oracle.

Experts are reduced over groups of their own: expert-data parallel and expert-tensor parallel.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.megatron_job import Job
from tests.ranks import run_ranks
from tests.test_oracle import (
    check_replicas,
    check_same_gradients,
    compare_runs,
    sharded_run,
    unsharded,
    world_of,
)

BASE = Job(experts=4, overlap=True, bucket_size=3000, steps=5)
# gloo has no gather of unequal parts, which the other dispatcher needs if experts are split.
GATHERED = {"moe_token_dispatcher_type": "allgather"}
LAYOUTS = {
    "ep1-dp2": (BASE, 2),
    "ep2-dp2": (replace(BASE, ep=2), 2),
    "ep4-dp4": (replace(BASE, ep=4), 4),
    "ep2-dp4": (replace(BASE, ep=2), 4),
    "tp2-ep2-etp2-dp2": (replace(BASE, tp=2, ep=2, config_args=GATHERED), 2),
    "tp2-ep2-etp1-dp2": (replace(BASE, tp=2, ep=2, etp=1), 2),
    "tp2-ep1-etp1-dp1": (replace(BASE, tp=2, etp=1), 1),
    "tp1-ep2-etp2-dp4": (replace(BASE, ep=2, etp=2, config_args=GATHERED), 4),
    "pp2-ep2-dp2": (replace(BASE, pp=2, ep=2), 2),
    "experts on the second stage only, pp2-ep2": (
        replace(BASE, pp=2, ep=2, config_args={"moe_layer_freq": [0, 1]}),
        2,
    ),
    "virtual stages, pp2-ep2": (replace(BASE, layers=4, pp=2, vpp=2, ep=2), 2),
    "several optimizer instances, ep2": (replace(BASE, ep=2, instances=2), 4),
    "replicated state, ep2": (replace(BASE, ep=2, distributed_optimizer=False), 4),
    "shared experts, tp2-ep2": (
        replace(
            BASE,
            tp=2,
            ep=2,
            config_args={"moe_shared_expert_intermediate_size": 32, **GATHERED},
        ),
        2,
    ),
    "no GLU, ep2": (replace(BASE, ep=2, swiglu=False), 2),
    "no clipping, ep2": (replace(BASE, ep=2, clip_grad=0.0), 2),
}


@pytest.mark.support(
    {
        "ep?-*": "expert parallelism",
        "*etp*": "expert tensor parallelism",
        "*": "mixture of experts",
    },
    "oracle",
)
@pytest.mark.parametrize("case", LAYOUTS)
def test_a_run_with_experts_equals_the_unsharded_oracle(case: str) -> None:
    job, dp = LAYOUTS[case]
    compare_runs(job, run_ranks(world_of(job, dp), sharded_run, job), unsharded(job))


OTHERS = {
    "bf16": replace(BASE, ep=2, bf16=True),
    "bf16, bf16 gradients": replace(BASE, ep=2, bf16=True, grad_fp32=False),
    "tensor": replace(BASE, ep=2, adam_mini={"preset": "tensor"}),
    "first": replace(BASE, tp=2, ep=2, etp=1, adam_mini={"preset": "first"}),
}


@pytest.mark.parametrize("case", OTHERS)
def test_others_equal_the_oracle_on_their_own_gradients(case: str) -> None:
    job = OTHERS[case]
    ranks = run_ranks(world_of(job, 2), sharded_run, job)
    check_replicas(ranks, job)
    check_same_gradients(ranks, job)


MTP = {
    "one rank": (replace(BASE, experts=None, mtp=1), 1),
    "pp2-dp2": (replace(BASE, experts=None, mtp=1, pp=2), 2),
    "tp2-dp2, tied": (replace(BASE, experts=None, mtp=2, tp=2, tied=True), 2),
    "experts, pp2-ep2": (replace(BASE, mtp=1, pp=2, ep=2), 2),
}


@pytest.mark.support("multi-token prediction", "oracle")
@pytest.mark.parametrize("case", MTP)
def test_multi_token_prediction_equals_the_unsharded_oracle(case: str) -> None:
    job, dp = MTP[case]
    compare_runs(job, run_ranks(world_of(job, dp), sharded_run, job), unsharded(job))
