"""Models of every family that Megatron-Core has: the same run, whatever the layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_adam_mini import cli
from tests.gather import whole_tensors
from tests.megatron_job import Job
from tests.models import DELTA, HYBRID, LATENT
from tests.ranks import run_ranks
from tests.test_checkpoint import compare, load_and_show, train_and_save
from tests.test_oracle import (
    check_replicas,
    check_same_gradients,
    compare_runs,
    sharded_run,
    unsharded_run,
    world_of,
)

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
EXPERTS = replace(SMALL, experts=4)
#: The same with experts.
EXPERT_MODELS = {
    "Qwen3-MoE": replace(EXPERTS, groups=2, qk_layernorm=True, config_args={"kv_channels": 16}),
    "DeepSeek-V3": replace(
        EXPERTS,
        family="latent",
        qk_layernorm=True,
        mtp=1,
        config_args={
            **LATENT,
            "moe_layer_freq": [0, 1],
            "moe_shared_expert_intermediate_size": 32,
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
        },
    ),
    "GPT-OSS": replace(
        EXPERTS,
        # Megatron's local experts with biases cannot run backwards.
        config_args={
            "add_qkv_bias": True,
            "softmax_type": "learnable",
            "window_size": (4, 0),
            "window_attn_skip_freq": 2,
        },
    ),
    "Llama 4": replace(
        EXPERTS,
        groups=2,
        config_args={
            "qk_l2_norm": True,
            "moe_layer_freq": [0, 1],
            "moe_shared_expert_intermediate_size": 32,
            "moe_router_topk": 1,
            "moe_router_score_function": "sigmoid",
        },
    ),
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
EXPERTS_SHOWN = dict.fromkeys(EXPERT_MODELS, "mixture of experts")


@pytest.fixture(scope="module")
def unsharded() -> Any:
    """Train each model once with the oracle."""
    cache: dict[str, Any] = {}

    def run(case: str) -> Any:
        if case not in cache:
            job = replace((MODELS | EXPERT_MODELS)[case], overlap=False, bucket_size=None)
            cache[case] = run_ranks(1, unsharded_run, job)[0]
        return cache[case]

    return run


def job_of(case: str, layout: str, **changes: Any) -> Job:
    """Return a model under a layout."""
    tp = LAYOUTS[layout].get("tp", 1)
    parallel = tp > 1 and case in SEQUENCE_PARALLEL
    return replace(MODELS[case], tp=tp, sequence_parallel=parallel, **changes)


@pytest.mark.support(SHOWN, "oracle")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", MODELS)
def test_sharded_run_equals_unsharded_oracle(case: str, layout: str, unsharded: Any) -> None:
    dp = LAYOUTS[layout]["dp"]
    job = job_of(case, layout)
    compare_runs(job, run_ranks(world_of(job, dp), sharded_run, job), unsharded(case))


@pytest.mark.support(EXPERTS_SHOWN, "oracle")
@pytest.mark.parametrize("case", EXPERT_MODELS)
def test_a_model_with_experts_equals_the_unsharded_oracle(case: str, unsharded: Any) -> None:
    job = replace(EXPERT_MODELS[case], tp=2, ep=2, etp=1)
    compare_runs(job, run_ranks(4, sharded_run, job), unsharded(case))


@pytest.mark.parametrize("case", ["DeepSeek, dense", "T5"])
def test_value_as_block_equals_the_oracle_on_its_own_gradients(case: str) -> None:
    job = job_of(case, "tp2-dp2", adam_mini={"value_as_block": True}, bf16=True)
    ranks = run_ranks(4, sharded_run, job)
    check_replicas(ranks, job)
    check_same_gradients(ranks, job)


#: Only the adapter of the first layer trains.
ADAPTERS = replace(
    SMALL,
    family="adapters",
    frozen=(
        *("embedding", "output_layer", "decoder.final_layernorm", "decoder.layers.1"),
        *("decoder.layers.0.input_layernorm", "decoder.layers.0.pre_mlp_layernorm"),
        *("decoder.layers.0.mlp", "decoder.layers.0.self_attention.linear_proj"),
        "decoder.layers.0.self_attention.linear_qkv.to_wrap",
    ),
)


@pytest.mark.support("frozen parameters, LoRA", "oracle")
@pytest.mark.parametrize("distributed_optimizer", [True, False])
def test_adapters_train_although_a_whole_stage_is_frozen(distributed_optimizer: bool) -> None:
    job = replace(ADAPTERS, tp=2, pp=2, distributed_optimizer=distributed_optimizer)
    ranks = run_ranks(world_of(job, 2), sharded_run, job)
    compare_runs(job, ranks, run_ranks(1, unsharded_run, ADAPTERS)[0])
    held = {name for rank in ranks for name in rank["names"]}
    within = "decoder.layers.0.self_attention.linear_qkv.adapter"
    assert held == {f"{within}.linear_in.weight", f"{within}.linear_out.weight"}
    assert [bool(rank["names"]) for rank in ranks] == [True] * 4 + [False] * 4


@pytest.mark.support(SHOWN, "overlap")
@pytest.mark.parametrize("case", MODELS)
def test_overlap_changes_no_bit(case: str) -> None:
    with_overlap, without = (
        run_ranks(
            4, sharded_run, job_of(case, "tp2-dp2", overlap=overlap, bucket_size=None, steps=2)
        )
        for overlap in (True, False)
    )
    job = job_of(case, "tp2-dp2")
    for key in ("param", "exp_avg", "v"):
        found, expected = (
            whole_tensors([rank["final"] for rank in ranks], key, job)
            for ranks in (with_overlap, without)
        )
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert torch.equal(value, expected[name]), f"{key} {name}"


#: Fused weights are stored in parts, so both ways differ; other weights are GPT's in this respect.
RESHARDS = [(case, "tp2-dp2", "tp1-dp1") for case in MODELS] + [
    (case, "tp1-dp1", "tp2-dp2") for case in ("Nemotron-H", "Qwen3-Next, dense")
]


@pytest.mark.support(SHOWN, "reshard")
@pytest.mark.parametrize(("case", "source", "target"), RESHARDS)
def test_checkpoints_reshard(case: str, source: str, target: str, tmp_path: Path) -> None:
    saved_job, job = (job_of(case, layout, bf16=True, steps=1) for layout in (source, target))
    saved = run_ranks(
        world_of(saved_job, LAYOUTS[source]["dp"]), train_and_save, saved_job, str(tmp_path)
    )
    world = world_of(job, LAYOUTS[target]["dp"])
    compare(saved, saved_job, run_ranks(world, load_and_show, job, str(tmp_path)), job)


@pytest.mark.parametrize("case", ["Nemotron-H", "Qwen3-Next, dense", "DeepSeek, dense", "T5"])
def test_verify_knows_parts_that_are_stored_apart(case: str, tmp_path: Path) -> None:
    # Without overlap, no gather of weights is outstanding at the time of the save.
    job = job_of(case, "tp2-dp2", bf16=True, steps=1, overlap=False, bucket_size=None)
    run_ranks(4, train_and_save, job, str(tmp_path))
    assert cli.main(["verify", str(tmp_path)]) == 0
