"""``megatron-adam-mini memory`` against what Megatron and the optimizer really allocate."""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import re
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import plan_scale
from megatron_adam_mini import cli
from megatron_adam_mini.collectives import DomainGroups
from megatron_adam_mini.config import AdamMiniConfig
from megatron_adam_mini.estimate.buckets import plan_stage, stage_blocks
from megatron_adam_mini.estimate.flags import add_flags, model_of, parallel_of, vars_of
from megatron_adam_mini.estimate.memory import FORMATS, KINDS, Planner, Sharing, largest_rank
from megatron_adam_mini.estimate.models import MODELS, Model
from megatron_adam_mini.estimate.parallel import Parallel, flag, stage_layers
from megatron_adam_mini.optimizer import AdamMini
from megatron_adam_mini.plan.layout import state_starts
from megatron_adam_mini.plan.parameter_info import ParameterInfo
from megatron_adam_mini.plan.segments import slice_size
from megatron_adam_mini.plan.step_plan import DomainLayout, plan_step
from tests.megatron_job import MOE, Job, Trainer
from tests.meta_megatron import ranks_of
from tests.models import LATENT
from tests.ranks import run_ranks

# Real runs: one for each form of the state. Layouts are covered without memory, below.

LLAMA = Job(bf16=True)
#: Options of a run, by the command's name for what they make of the state.
OPTIONS: dict[str, dict[str, Any]] = {
    "adam_mini": {},
    "adam_mini_remainders": {"param_remainders": True},
    "adam_mini_bf16_m": {"exp_avg_dtype": "bf16"},
    "adam_mini_fp8_m": {"exp_avg_dtype": "fp8"},
    "adam_mini_remainders_bf16_m": {"lean": True},
    "adam_mini_remainders_fp8_m": {"param_remainders": True, "exp_avg_dtype": "fp8"},
}
RUNS = {
    "tp2-pp2-dp2, overlap, small buckets": (
        replace(LLAMA, tp=2, pp=2, layers=4, overlap=True, bucket_size=3000),
        8,
        "adam_mini",
    ),
    "tied, biases, pp2-dp2": (
        replace(LLAMA, pp=2, tied=True, bias=True, swiglu=False, overlap=True, bucket_size=3000),
        4,
        "adam_mini_remainders",
    ),
    "heads cut by tp4, gate, qk norms, value as block": (
        replace(
            LLAMA,
            tp=4,
            groups=1,
            gated_attention=True,
            qk_layernorm=True,
            adam_mini={"value_as_block": True},
        ),
        4,
        "adam_mini_bf16_m",
    ),
    "experts and a shared one, tp2-ep2-etp1": (
        replace(
            LLAMA,
            tp=2,
            ep=2,
            etp=1,
            experts=4,
            config_args={"moe_shared_expert_intermediate_size": 32},
        ),
        4,
        "adam_mini_remainders_bf16_m",
    ),
    "a dense stage, multi-token prediction, pp2-ep2": (
        replace(
            LLAMA,
            pp=2,
            ep=2,
            experts=4,
            mtp=1,
            overlap=True,
            bucket_size=3000,
            config_args={"moe_layer_freq": [0, 1]},
        ),
        4,
        "adam_mini",
    ),
    "FP8 weights, experts, ep2-dp4": (
        replace(LLAMA, ep=2, experts=4, fp8="current", overlap=True, bucket_size=3000, layers=1),
        4,
        "adam_mini_fp8_m",
    ),
    "latent attention, tp2-dp2": (
        replace(LLAMA, tp=2, sequence_parallel=True, family="latent", config_args=LATENT),
        4,
        "adam_mini_remainders",
    ),
    "virtual stages, odd dp, busbw padding, bf16 gradients": (
        replace(
            LLAMA,
            pp=2,
            vpp=2,
            layers=4,
            grad_fp32=False,
            ddp_args={"pad_buckets_for_high_nccl_busbw": True},
        ),
        6,
        "adam_mini_remainders_fp8_m",
    ),
}


def allocated(job: Job) -> dict[str, Any]:
    """Return what this rank holds, counted from the tensors."""
    from megatron.core import parallel_state

    trainer = Trainer(job)
    buffers = [
        buffer
        for chunk in trainer.chunks
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
    ]
    found = {
        "bytes": {
            "weights": sum(buffer.param_data.nbytes for buffer in buffers),
            "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        },
        "pp_rank": parallel_state.get_pipeline_model_parallel_rank(),
    }
    if job.optimizer == "adam_mini":
        found["bytes"].update(trainer.optimizer.state_bytes())
        # Vectors, and tables of the CPU's kernels.
        for kind in ("step_vectors", "launch_tables", "host_launch_tables"):
            found["bytes"].pop(kind, None)
    else:
        trainer.step(0)
        states: dict[str, int] = {"main_param": 0, "exp_avg": 0, "exp_avg_sq": 0}
        for member in trainer.optimizer.chained_optimizers:
            for group in member.shard_fp32_from_float16_groups:
                states["main_param"] += sum(shard.nbytes for shard in group)
            for state in member.optimizer.state.values():
                for kind in ("exp_avg", "exp_avg_sq"):
                    states[kind] += state[kind].nbytes
        found["bytes"].update(states)
    return found


def flags_of(job: Job, world: int) -> list[str]:
    """Spell a job as Megatron's command line would, apart from the package."""
    data = world // (job.tp * job.pp * job.cp)
    flags = [
        *("--num-layers", job.layers, "--hidden-size", job.hidden, "--ffn-hidden-size", job.ffn),
        *("--num-attention-heads", job.heads, "--padded-vocab-size", job.vocab),
        *("--group-query-attention", "--num-query-groups", job.groups),
        *("--position-embedding-type", "rope", "--normalization", "RMSNorm"),
        *("--transformer-impl", "local"),
        *("--tensor-model-parallel-size", job.tp, "--pipeline-model-parallel-size", job.pp),
        *("--context-parallel-size", job.cp, "--data-parallel-size", data),
    ]
    switches = {
        "--swiglu": job.swiglu,
        "--disable-bias-linear": not job.bias,
        "--untie-embeddings-and-output-weights": not job.tied,
        "--qk-layernorm": job.qk_layernorm,
        "--attention-output-gate": job.gated_attention,
        "--overlap-grad-reduce": job.overlap,
        "--grad-reduce-in-bf16": not job.grad_fp32,
        "--fp8-param-gather": job.fp8 is not None,
        "--ddp-pad-buckets-for-high-nccl-busbw": "pad_buckets_for_high_nccl_busbw" in job.ddp_args,
        "--adam-mini-value-as-block": job.adam_mini.get("value_as_block", False),
    }
    flags += [name for name, on in switches.items() if on]
    if job.experts:
        given = MOE | job.config_args
        flags += ["--num-experts", job.experts, "--expert-model-parallel-size", job.ep]
        flags += ["--moe-ffn-hidden-size", given["moe_ffn_hidden_size"]]
        flags += ["--expert-tensor-parallel-size", job.etp or job.tp]
        if "moe_layer_freq" in given:
            flags += ["--moe-layer-freq", str(given["moe_layer_freq"])]
        if "moe_shared_expert_intermediate_size" in given:
            size = given["moe_shared_expert_intermediate_size"]
            flags += ["--moe-shared-expert-intermediate-size", size]
    if job.family == "latent":
        flags = [flag for flag in flags if flag != "--group-query-attention"]
        at = flags.index("--num-query-groups")
        flags[at : at + 2] = ["--multi-latent-attention"]
        for name in ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim"):
            flags += [f"--{name.replace('_', '-')}", job.config_args[name]]
        flags += ["--v-head-dim", job.config_args["v_head_dim"]]
    if job.mtp:
        flags += ["--mtp-num-layers", job.mtp]
    if job.bucket_size:
        flags += ["--ddp-bucket-size", job.bucket_size]
    if job.vpp:
        flags += ["--num-virtual-stages-per-pipeline-rank", job.vpp]
    return [str(flag) for flag in flags]


def run_cli(capsys: Any, *flags: str) -> dict[str, Any]:
    assert cli.main(["memory", *flags, "--json", "--every-rank"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


@pytest.mark.support("memory of each rank before a run", "test")
@pytest.mark.parametrize("case", RUNS)
def test_every_byte_of_a_real_run(case: str, capsys: Any) -> None:
    job, world, form = RUNS[case]
    options = {**job.adam_mini, **OPTIONS[form]}
    ranks = run_ranks(world, allocated, replace(job, adam_mini=options))
    report = run_cli(capsys, *flags_of(job, world))
    assert report["every_rank"][form] == [rank["bytes"] for rank in ranks]

    # The summary is the maximum over ranks.
    totals = [sum(rank["bytes"].values()) for rank in ranks]
    largest = report["optimizers"][form]["largest_rank"]
    assert largest["total"] == max(totals) == totals[largest["rank"]]
    assert largest["stage"] == ranks[largest["rank"]]["pp_rank"]
    for stage in report["stages"]:
        own = [
            t for t, rank in zip(totals, ranks, strict=True) if rank["pp_rank"] == stage["stage"]
        ]
        assert stage["optimizers"][form]["total"] == max(own)


def test_every_byte_of_state_in_host_memory(capsys: Any) -> None:
    job, world, form = RUNS["tied, biases, pp2-dp2"]
    flags = ["--optimizer-cpu-offload", "--optimizer-offload-fraction", "0.4"]
    offloaded = replace(
        job,
        adam_mini={**OPTIONS[form], "preset": "first"},
        optimizer_args={"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.4},
    )
    ranks = [rank["bytes"] for rank in run_ranks(world, allocated, offloaded)]
    assert all(rank.pop("host_staging") for rank in ranks)
    report = run_cli(capsys, *flags_of(job, world), "--adam-mini-preset", "first", *flags)
    assert report["every_rank"][form] == ranks
    on_device = [sum(n for kind, n in rank.items() if "host" not in kind) for rank in ranks]
    assert report["optimizers"][form]["largest_rank"]["total"] == max(on_device)
    assert report["every_rank"]["adam"][0]["host_exp_avg"] == 0 < ranks[0]["host_exp_avg_sq"]


def test_what_fp8_weights_exclude_is_left_out_or_refused(capsys: Any) -> None:
    flags = [*LLAMA_FLAGS.split(), "--fp8-param-gather"]
    assert [*run_cli(capsys, *flags)["every_rank"]] == [
        *("adam", "adam_mini", "adam_mini_bf16_m", "adam_mini_fp8_m")
    ]
    assert cli.main(["memory", *flags, "--optimizer-cpu-offload"]) == 2
    assert "drop one of the two" in capsys.readouterr().err


def test_every_byte_of_megatrons_adam(capsys: Any) -> None:
    job, world, _ = RUNS["tied, biases, pp2-dp2"]
    ranks = run_ranks(world, allocated, replace(job, optimizer="adam"))
    report = run_cli(capsys, *flags_of(job, world))
    assert report["every_rank"]["adam"] == [rank["bytes"] for rank in ranks]


# Every rank of any layout, against what Megatron builds of the same flags without memory.

LLAMA_FLAGS = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 8 --padded-vocab-size 256 --swiglu "
    "--disable-bias-linear --normalization RMSNorm --position-embedding-type rope "
    "--untie-embeddings-and-output-weights"
)
MIXTRAL = "--model mixtral-8x7b-like --num-layers 8"
GPT_FLAGS = (
    "--num-layers 4 --hidden-size 96 --num-attention-heads 8 --vocab-size 250 "
    "--max-position-embeddings 24"
)
MOE_FLAGS = "--num-experts 8 --moe-ffn-hidden-size 32 --moe-layer-freq [0]+[1]*3"
SHARED_FLAGS = "--moe-shared-expert-intermediate-size 48 --moe-shared-expert-gate"
LATENT_FLAGS = (
    "--multi-latent-attention --kv-lora-rank 24 --qk-head-dim 16 --qk-pos-emb-head-dim 8 "
    "--v-head-dim 12"
)
COUNTED = "--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split"
TP, PP, CP, DP = (
    f"--{kind}-parallel-size" for kind in ("tensor-model", "pipeline-model", "context", "data")
)
EP, ETP = "--expert-model-parallel-size", "--expert-tensor-parallel-size"
OVERLAP = "--overlap-grad-reduce"
#: Where there are more ranks than this, that many are looked at.
MOST_RANKS = 8

ON_META = {
    "7b": "--model llama-2-7b",
    "7b, buckets by default": f"--model llama-2-7b {TP} 2 {DP} 3 {OVERLAP}",
    "8b": f"--model llama-3-8b {TP} 4 {DP} 2",
    "70b": f"--model llama-3-70b {TP} 8 {PP} 4 {DP} 8 {OVERLAP}",
    "405b": f"--model llama-3-405b {TP} 8 {PP} 16 {DP} 8 {OVERLAP} {COUNTED}",
    "405b, heads cut by tp": f"--model llama-3-405b {TP} 8 {PP} 16 {DP} 2 {COUNTED} "
    "--num-query-groups 1",
    "mixtral, experts beside dense": f"{MIXTRAL} {TP} 2 {DP} 4 {OVERLAP}",
    "mixtral, ep8 etp1": f"{MIXTRAL} {TP} 4 {ETP} 1 {EP} 8 {DP} 16 {OVERLAP}",
    "mixtral, ep4 etp2 pp2": f"{MIXTRAL} {TP} 2 {ETP} 2 {EP} 4 {PP} 2 {DP} 8",
    "deepseek": f"--model deepseek-v3-like {TP} 8 {PP} 16 {ETP} 1 {EP} 64 {DP} 16 {OVERLAP} "
    "--decoder-first-pipeline-num-layers 3 --decoder-last-pipeline-num-layers 2",
    "prediction": f"{LLAMA_FLAGS} {PP} 2 {DP} 2 --mtp-num-layers 2",
    "prediction, tied": f"{GPT_FLAGS} --position-embedding-type rope {TP} 2 {PP} 2 "
    "--mtp-num-layers 1",
    "prediction by experts, one stage": f"{LLAMA_FLAGS} {EP} 2 {DP} 2 --num-experts 4 "
    "--mtp-num-layers 1",
    "llama": LLAMA_FLAGS,
    "llama, small buckets": f"{LLAMA_FLAGS} {TP} 2 {PP} 2 {DP} 2 {OVERLAP} --ddp-bucket-size 3000",
    "llama, number of buckets": f"{LLAMA_FLAGS} {DP} 3 {OVERLAP} --ddp-num-buckets 5",
    "llama, several instances, cp": f"{LLAMA_FLAGS} {CP} 2 {DP} 4 "
    "--num-distributed-optimizer-instances 2",
    "llama, vpp, busbw, bf16 gradients": f"{LLAMA_FLAGS} {PP} 2 {DP} 3 --grad-reduce-in-bf16 "
    f"--num-virtual-stages-per-pipeline-rank 2 --ddp-pad-buckets-for-high-nccl-busbw {OVERLAP}",
    "llama, vpp by layers, counted": f"{LLAMA_FLAGS} --num-layers 6 {PP} 2 {DP} 2 {COUNTED} "
    "--num-layers-per-virtual-pipeline-stage 2",
    "gpt": f"{GPT_FLAGS} {TP} 2",
    "gpt, tied over stages": f"{GPT_FLAGS} {TP} 2 {PP} 4 {DP} 2 {OVERLAP} --ddp-bucket-size 9000",
    "gpt, tied over virtual stages": f"{GPT_FLAGS} {PP} 2 {DP} 2 "
    "--num-virtual-stages-per-pipeline-rank 2",
    "gpt, gate, norms of q and k": f"{GPT_FLAGS} {TP} 4 --group-query-attention "
    "--attention-output-gate --qk-layernorm --kv-channels 20",
    "gpt, uneven stages": f"{GPT_FLAGS} --num-layers 5 {PP} 2 --add-qkv-bias "
    "--decoder-first-pipeline-num-layers 2",
    "gpt, sizes by default": f"{GPT_FLAGS} --swiglu --untie-embeddings-and-output-weights "
    "--make-vocab-size-divisible-by 20",
    "experts": f"{LLAMA_FLAGS} {MOE_FLAGS} {SHARED_FLAGS} {TP} 2 {EP} 2 {ETP} 1 {DP} 5",
    "experts with biases": f"{GPT_FLAGS} {MOE_FLAGS} {TP} 2 {ETP} 1 {EP} 4 {PP} 2 {DP} 4",
    "experts in every other layer": f"{LLAMA_FLAGS} {EP} 2 {DP} 2 --num-experts 4 "
    "--moe-layer-freq 2",
    "latent attention": f"{LLAMA_FLAGS} {LATENT_FLAGS} {TP} 2 {DP} 2",
    "latent attention, low rank, norms": f"{LLAMA_FLAGS} {LATENT_FLAGS} --q-lora-rank 48 "
    f"--qk-layernorm {TP} 2",
}

#: Options of the partition of some of them.
META_OPTIONS: dict[str, dict[str, Any]] = {
    "8b": {"preset": "tensor"},
    "405b, heads cut by tp": {"value_as_block": True},
    "llama, several instances, cp": {"full_v": ("*fc1.weight",)},
    "gpt, gate, norms of q and k": {"preset": "first"},
    "llama, vpp, busbw, bf16 gradients": {"preset": "slim"},
    "experts": {"preset": "slim"},
    "latent attention": {"preset": "row-column"},
}


@pytest.fixture(scope="module")
def megatron() -> Iterator[Executor]:
    """A process that stands for one rank after the other, Megatron imported once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as executor:
        yield executor


def megatrons_flags(model: Model, layout: Parallel) -> list[str]:
    """Spell a description for Megatron's own parser; what has Megatron's default is left out."""
    given = []
    for description, kind in ((model, Model), (layout, Parallel)):
        for field in fields(kind):
            value = getattr(description, field.name)
            if value == field.default or field.name == "data_parallel_size":
                continue
            name = {"add_bias_linear": "--disable-bias-linear"}.get(field.name, flag(field.name))
            given += [name] if isinstance(value, bool) else [name, str(value)]
    positions = model.max_position_embeddings or 8
    return [*given, "--seq-length", "8", "--max-position-embeddings", str(positions)]


def with_local_experts(info: ParameterInfo, model: Model, layout: Parallel) -> ParameterInfo:
    """Number an expert among those of its rank, as plans do: all ranks hold as many."""
    local = (model.num_experts or 1) // layout.expert_model_parallel_size

    def number(match: re.Match[str]) -> str:
        return f"local_experts.{int(match[1]) % local}."

    return replace(info, name=re.sub(r"local_experts\.(\d+)\.", number, info.name))


@pytest.mark.parametrize("case", ON_META)
def test_every_rank_is_what_megatron_builds(case: str, megatron: Executor) -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    args = parser.parse_args(ON_META[case].split())
    model, layout = replace(model_of(args), transformer_impl="local"), parallel_of(args)
    options = AdamMiniConfig(**META_OPTIONS.get(case, {}))
    world = layout.world_size
    ranks = sorted({world * i // MOST_RANKS + i % 2 for i in range(MOST_RANKS)} | {world - 1})
    ranks = [rank for rank in ranks if rank < world]
    found = megatron.submit(ranks_of, megatrons_flags(model, layout), world, ranks).result()
    stages = Planner(model, layout, options).stages(layout)
    for rank, held in zip(ranks, found, strict=True):
        chunks = stage_blocks(
            model,
            layout,
            options,
            pp_rank=held.pp_rank,
            tp_rank=held.tp_rank,
            expert_tp_rank=held.expert_tp_rank,
        )
        plan = plan_stage(model, layout, chunks, pp_rank=held.pp_rank)
        found_here = [with_local_experts(info, model, layout) for info in held.parameters]
        assert [blocks.info for blocks in plan.parameters] == found_here
        assert plan.dense == held.dense
        assert plan.expert == held.expert
        # The slices that the rank owns of Megatron's buckets, walked as the optimizer does.
        owned = [(buffer, held.dense_slice) for buffer in held.dense]
        owned += [(buffer, held.expert_slice) for buffer in held.expert]
        sizes = [
            slice_size(bucket, plan.parameters, number)
            for buffer, number in owned
            for bucket in buffer.buckets
        ]
        stage, place = stages[held.pp_rank], rank % (world // layout.pp)
        assert stage.elements[place] == sum(size.num_elements for size in sizes)
        second_moments = sum(size.num_segments + size.num_elementwise for size in sizes)
        assert stage.second_moments[place] == second_moments
        state_numel = sum(state_starts(buffer, number)[1] for buffer, number in owned)
        assert stage.state_numel[place] == state_numel


# Public models.


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-13b", 13_015_864_320),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3-70b", 70_553_706_496),
        ("llama-3-405b", 405_853_388_800),
        ("mixtral-8x7b-like", 46_702_792_704),
        # 671,026,419,200 as published, less the router's 58 x 256 biases, which are no parameters.
        ("deepseek-v3-like", 671_026_419_200 - 58 * 256),
    ],
)
def test_public_parameter_counts(name: str, count: int) -> None:
    assert Planner(MODELS[name], Parallel(), AdamMiniConfig()).num_parameters() == count


def test_llama_2_7b_needs_half_of_m_and_v(capsys: Any) -> None:
    report = run_cli(capsys, "--model", "llama-2-7b")
    adam, mini = (report["optimizers"][name]["largest_rank"] for name in ("adam", "adam_mini"))
    state = {"adam": adam["exp_avg"] + adam["exp_avg_sq"], "mini": mini["exp_avg"]}
    assert state["adam"] == 2 * 4 * 6_738_415_616
    assert state["mini"] == 4 * 6_738_415_616
    # v: per token; per layer a head each of Q and K, V, projection and MLP rows; norms.
    rows = 2 * 32000 + 32 * (32 + 32 + 4096 + 4096 + 2 * 11008 + 4096 + 2) + 1
    assert mini["exp_avg_sq"] == 4 * rows
    assert cli.main(["memory", "--model", "llama-2-7b"]) == 0
    text = capsys.readouterr().out
    assert "53.907" in text
    assert "26.958" in text


@pytest.mark.parametrize("form", OPTIONS)
def test_llama_2_7b_as_the_optimizer_allocates_it(form: str) -> None:
    """The optimizer itself, on tensors that have shapes and no memory, beside Adam's 8 bytes."""
    meta, options = torch.device("meta"), AdamMiniConfig(**OPTIONS[form])
    model, parallel = MODELS["llama-2-7b"], Parallel()
    plan = plan_stage(model, parallel, stage_blocks(model, parallel, options, pp_rank=0), pp_rank=0)
    (buffer,) = plan.dense
    (bucket,) = buffer.buckets
    weight = torch.empty(bucket.numel, dtype=torch.bfloat16, device=meta)
    flat = SimpleNamespace(
        grad=torch.empty(bucket.numel, device=meta), weight=weight, values=weight.__getitem__
    )
    step_plan = plan_step(plan.parameters, [DomainLayout("dense", (buffer,))])
    group = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    owners = [0] * len(plan.parameters)
    optimizer = AdamMini(step_plan, options, [flat], [DomainGroups()], [group], owners, device=meta)
    found = optimizer.state_bytes()
    (stage,) = Planner(model, parallel, options).stages(parallel)
    assert found["main_param"] + found["exp_avg"] + found["exp_avg_sq"] == sum(
        largest_rank([stage], FORMATS[form])[kind]
        for kind in ("main_param", "exp_avg", "exp_avg_sq")
    )
    adam = 8 * 6_738_415_616
    share = (found["exp_avg"] + found["exp_avg_sq"]) / adam
    bytes_of_m = 1 if "fp8" in form else 2 if "bf16" in form else 4
    assert share == pytest.approx(bytes_of_m / 8, abs=2e-4)
    assert found["main_param"] == (2 if "remainders" in form else 4) * bucket.numel
    assert found["exp_avg_sq"] < 5_000_000
    # Sum, group, domain, number of the first element; of segments also size, step and scales.
    per_entry = 4 + 4 + 1 + 4 * options.stochastic_rounding
    per_segment = 4 + 4 + 8 * ("fp8" in form)
    vectors = per_entry * len(step_plan.parameter_SR) + per_segment * step_plan.num_segments
    # Nothing is exchanged on one rank, but sums may have a gap behind them.
    assert vectors <= found["step_vectors"] < vectors + 16


@pytest.mark.parametrize(("name", "per_shard"), [(n, f) for n, f in FORMATS.items() if n != "adam"])
def test_how_far_a_saving_reaches(name: str, per_shard: Any) -> None:
    """Compare with bytes per parameter, 6 + state / d, where v of blocks is next to nothing."""
    planner = Planner(MODELS["llama-2-7b"], Parallel(), AdamMiniConfig())
    sharing = Sharing(planner)
    state = per_shard.main_param + per_shard.exp_avg
    state += 0 if per_shard.blocks else per_shard.exp_avg_sq
    for share in (0.01, 0.05):
        # share * (6 + 12 / d) = (12 - state) / d
        expected = ((12 - state) - 12 * share) / (6 * share)
        found = sharing.largest(name, share)
        assert found is not None
        assert abs(found - expected) < 1.01
        assert sharing.saving(name, found) >= share > sharing.saving(name, found + 1)


def test_a_saving_that_is_never_reached() -> None:
    planner = Planner(MODELS["llama-3-8b"], Parallel(), AdamMiniConfig(full_v=("*",)))
    assert Sharing(planner).largest("adam_mini", 0.01) is None


def test_experts_share_by_their_own_group() -> None:
    model = replace(MODELS["mixtral-8x7b-like"], num_layers=2)
    layout = Parallel(
        tensor_model_parallel_size=2,
        data_parallel_size=8,
        expert_model_parallel_size=4,
        expert_tensor_parallel_size=1,
    )
    (stage,) = Planner(model, layout, AdamMiniConfig()).stages(layout)
    assert (layout.dense_shards, layout.expert_shards) == (8, 4)
    assert stage.elements.shape == (16,)
    expert = 2 * 2 * 3 * 4096 * 14336  # layers, experts per rank, matrices
    dense = stage.num_parameters - expert
    assert stage.elements.sum() == 2 * dense + 4 * expert


def test_documented_output_is_the_real_one(capsys: Any) -> None:
    text = (Path(__file__).parent.parent / "docs" / "memory.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```console\n\$ (.*?[^\\])\n(.*?)\n```", text, flags=re.S)
    blocks = [block for block in blocks if "--gpu-memory" not in block[0]]  # see test_search
    assert len(blocks) == 3
    for command, output in blocks:
        program, *arguments = command.replace("\\\n", "").split()
        assert program == "megatron-adam-mini"
        assert cli.main(arguments) == 0
        assert capsys.readouterr().out == output + "\n"


def test_added_traffic_of_llama_2_7b_at_tp8_dp8_stays_within_its_target() -> None:
    result = plan_scale.plan(plan_scale.cases()[0])
    assert plan_scale.cases()[0].parallel.world_size == 64
    assert result.most.collectives <= 2
    assert 0 < result.share <= 1e-4
    # Rows of the two row-parallel weights of each layer, over the data-parallel ranks.
    assert result.most.tp_bytes >= 4 * 32 * 2 * 4096 / 8


def communication(job: Job) -> tuple[int, int, dict[str, int]]:
    """Return stage, segments, and bytes by group that a step adds on this rank."""
    from megatron.core import parallel_state

    optimizer = Trainer(job).optimizer
    stage = parallel_state.get_pipeline_model_parallel_rank()
    segments = optimizer.inner.plan.num_segments
    return stage, segments, optimizer.communication_per_step()["by_group"]


def test_plan_scale_says_what_a_run_with_multi_token_prediction_adds() -> None:
    """On every data-parallel rank of both stages, of which the last predicts."""
    dense_first = {"moe_layer_freq": [0, 1]}
    layout = {"tp": 2, "pp": 2, "ep": 2, "etp": 1, "overlap": True, "bucket_size": 3000}
    job = replace(LLAMA, experts=4, mtp=1, config_args=dense_first, **layout)
    parser = argparse.ArgumentParser()
    add_flags(parser)
    args = parser.parse_args(flags_of(job, 8))
    planned = {
        stage: plan_scale.describe(model_of(args), parallel_of(args), AdamMiniConfig(), stage)
        for stage in range(2)
    }
    ranks = run_ranks(8, communication, job)
    for number, (stage, segments, by_group) in enumerate(ranks):
        if number % 2:
            continue  # the second tensor-parallel rank
        added = plan_scale.plan_rank(*planned[stage], (number % 4) // 2 / 2, 1)
        assert (added.segments, added.collectives) == (segments, len(by_group))
        assert added.dp_bytes == sum(n for group, n in by_group.items() if group.endswith("dp"))
        assert added.tp_bytes == sum(n for group, n in by_group.items() if group.endswith("tp"))
    assert ranks[4][1] != ranks[6][1]
    assert {"dense dp", "dense tp"} <= ranks[4][2].keys()


# Layouts.


@pytest.mark.parametrize(
    ("layout", "layers", "expected"),
    [
        (Parallel(pipeline_model_parallel_size=2), 4, [[(0, 2)], [(2, 4)]]),
        (
            Parallel(pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2),
            8,
            [[(0, 2), (4, 6)], [(2, 4), (6, 8)]],
        ),
        (
            Parallel(
                pipeline_model_parallel_size=2,
                num_layers_per_virtual_pipeline_stage=2,
                account_for_embedding_in_pipeline_split=True,
                account_for_loss_in_pipeline_split=True,
            ),
            6,
            [[(0, 1), (3, 5)], [(1, 3), (5, 6)]],
        ),
        (
            Parallel(
                pipeline_model_parallel_size=4,
                decoder_first_pipeline_num_layers=1,
                decoder_last_pipeline_num_layers=1,
            ),
            8,
            [[(0, 1)], [(1, 4)], [(4, 7)], [(7, 8)]],
        ),
    ],
)
def test_layers_of_stages(layout: Parallel, layers: int, expected: list[Any]) -> None:
    found = stage_layers(layout, layers)
    assert [[(r.start, r.stop) for r in stage] for stage in found] == expected


def test_vocabulary_is_padded_by_tensor_parallel_size() -> None:
    model = MODELS["llama-3-8b"]
    assert model.vocabulary(1) == 128256
    assert model.vocabulary(8) == math.ceil(128256 / 1024) * 1024 == 129024


def test_flags_override_the_public_model(capsys: Any) -> None:
    flags = ("--model", "llama-2-7b", "--num-layers", "4", "--padded-vocab-size", "256")
    report = run_cli(capsys, *flags)
    expected = {**vars_of(MODELS["llama-2-7b"]), "num_layers": 4}
    assert report["model"] == {**expected, "vocab_size": None, "padded_vocab_size": 256}


def test_world_size_is_another_way_to_say_data_parallel_size(capsys: Any) -> None:
    size = ("--model", "llama-3-8b", "--tensor-model-parallel-size", "2")
    one = run_cli(capsys, *size, "--world-size", "8")
    assert one == run_cli(capsys, *size, "--data-parallel-size", "4")
    assert set(one["every_rank"]["adam"][0]) == set(KINDS)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "--num-layers, --hidden-size, --num-attention-heads missing. Give them, or --model"),
        ("--model llama-2-7b --pipeline-model-parallel-size 5", "32 layers are not divisible by"),
        (
            "--model llama-2-7b --tensor-model-parallel-size 3",
            "--num-attention-heads=32 is not divisible by --tensor-model-parallel-size=3",
        ),
        (
            "--model llama-3-8b --num-attention-heads 36 --kv-channels 128 --num-query-groups 4 "
            "--tensor-model-parallel-size 6 --ffn-hidden-size 12288",
            "--num-query-groups=4 must be a multiple or a divisor of",
        ),
        ("--model llama-2-7b --ffn-hidden-size 11009 --tensor-model-parallel-size 2", "=11009 is"),
        ("--model llama-2-7b --num-query-groups 8", "without --group-query-attention; add that"),
        ("--model llama-2-7b --world-size 6 --tensor-model-parallel-size 4", "not a multiple of"),
        ("--model llama-2-7b --world-size 6 --data-parallel-size 6", "give one of them"),
        ("--model llama-2-7b --expert-model-parallel-size 2 --data-parallel-size 2", "has none"),
        (
            "--model mixtral-8x7b-like --expert-model-parallel-size 3 --data-parallel-size 3",
            "--num-experts=8 is not divisible by --expert-model-parallel-size=3",
        ),
        ("--model mixtral-8x7b-like --expert-model-parallel-size 8", "1 ranks are not divisible"),
        ("--model mixtral-8x7b-like --moe-layer-freq [1]*31", "for each of the 32 layers"),
        ("--model mixtral-8x7b-like --moe-layer-freq __import__('os')", "cannot be read; give"),
        ("--model llama-2-7b --data-parallel-size 0", "=0 is not allowed; it must be at least 1"),
        ("--model llama-2-7b --adam-mini-full-v nothing*", "['nothing*'] match no parameter"),
        ("--model llama-2-7b --every-rank", "add --json"),
        (
            "--model llama-2-7b --pipeline-model-parallel-size 3 "
            "--decoder-first-pipeline-num-layers 9",
            "23 layers are left for the 2 other pipeline stages",
        ),
        (
            "--model llama-2-7b --data-parallel-size 3 --num-distributed-optimizer-instances 2",
            "not divisible by --num-distributed-optimizer-instances=2",
        ),
        ("--model llama-2-7b --num-virtual-stages-per-pipeline-rank 2", "at least 2; raise it"),
        ("--model llama-2-7b --position-embedding-type learned_absolute", "need --max-position"),
    ],
)
def test_impossible_layouts_are_refused(flags: str, message: str, capsys: Any) -> None:
    assert cli.main(["memory", *flags.split()]) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert not output.out
