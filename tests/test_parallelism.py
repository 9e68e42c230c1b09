"""Less common layouts: against the oracle, and through Megatron's own training loop.

For the latter, one rank trains and saves. It goes on, and so do runs under each layout, with flags
of the command line: they load that checkpoint, and must end with the same weights.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.megatron_job import Job
from tests.models import HETEROGENEOUS, LATENT
from tests.ranks import run_ranks
from tests.test_oracle import (
    check_replicas,
    check_same_gradients,
    compare_runs,
    sharded_run,
    unsharded,
    world_of,
)
from tests.test_step import bits_per_step
from tests.training_run import Run, Seen, make_dataset, train

# Against the oracle.

BASE = Job(overlap=True, bucket_size=3000, steps=5)
STAGES = replace(BASE, pp=2, layers=4)
VIRTUAL = replace(STAGES, vpp=2)
ORACLE: dict[str, tuple[Job, int]] = {
    "sequence parallel, biases": (replace(BASE, tp=2, sequence_parallel=True, bias=True), 2),
    "first stage of 1 layer": (
        replace(STAGES, pipeline_args={"num_layers_in_first_pipeline_stage": 1}),
        1,
    ),
    "last stage of 1 layer, virtual stages": (
        replace(VIRTUAL, layers=6, pipeline_args={"num_layers_in_last_pipeline_stage": 2}),
        1,
    ),
    "embedding and loss count as layers, virtual stages": (
        replace(
            VIRTUAL,
            layers=6,
            pipeline_args={
                "account_for_embedding_in_pipeline_split": True,
                "account_for_loss_in_pipeline_split": True,
            },
        ),
        1,
    ),
    "layout with an embedding and a loss alone": (
        replace(VIRTUAL, pipeline_args={"pipeline_model_parallel_layout": "E|ttt|t|L"}),
        2,
    ),
    "virtual stages, aligned gather, instances": (
        replace(VIRTUAL, instances=2, ddp_args={"align_param_gather": True}),
        2,
    ),
    "context parallel, virtual stages, instances": (
        replace(VIRTUAL, cp=2, instances=2),
        1,
    ),
    "context parallel, experts": (replace(BASE, cp=2, experts=4, ep=2), 1),
    "context parallel, experts, tp2": (replace(BASE, cp=2, experts=2, ep=2, tp=2, etp=1), 1),
    "context parallel, experts, virtual stages, instances": (
        replace(VIRTUAL, cp=2, experts=2, instances=2),
        1,
    ),
    "context parallel, latent attention": (
        replace(BASE, cp=2, groups=8, family="latent", qk_layernorm=True, config_args=LATENT),
        1,
    ),
    "a frozen stage, and layers with Transformer Engine's names": (
        replace(
            BASE,
            pp=2,
            tp=2,
            fused_norms=True,
            frozen=("decoder.layers.1", "decoder.final", "output_layer", "decoder.layers.0.mlp"),
        ),
        1,
    ),
    "padded buckets, averages in the collective": (
        replace(
            BASE,
            ddp_args={"pad_buckets_for_high_nccl_busbw": True, "average_in_collective": True},
        ),
        2,
    ),
}


@pytest.mark.support(
    {
        "sequence parallel*": "sequence parallelism",
        "* of 1 layer*": "uneven pipeline stages",
        "embedding and loss*": "uneven pipeline stages",
        "layout*": "uneven pipeline stages",
        "virtual*": "virtual pipeline stages",
        "* instances": "several distributed-optimizer instances",
        "context parallel*": "context parallelism",
        "*, experts*": "expert parallelism",
        "*latent*": "multi-head latent attention",
        "a frozen*": "frozen parameters, LoRA",
        "*Transformer Engine's names": "Transformer Engine's parameter names",
        "padded buckets*": "bucket options of DDP",
    },
    "oracle",
)
@pytest.mark.parametrize("case", ORACLE)
def test_sharded_run_equals_unsharded_oracle(case: str) -> None:
    job, dp = ORACLE[case]
    compare_runs(job, run_ranks(world_of(job, dp), sharded_run, job), unsharded(job))


OWN_GRADIENTS = {
    "bf16 gradients, summed in float32": replace(
        BASE,
        bf16=True,
        grad_fp32=False,
        ddp_args={"reduce_scatter_with_fp32_accumulation": True},
    ),
    # Megatron takes the mean loss of the later tokens on each rank, though one has fewer of them.
    "context parallel, multi-token prediction": replace(BASE, cp=2, mtp=1),
}


@pytest.mark.support(
    {
        "bf16*": "bucket options of DDP",
        "context*": "context parallelism",
        "*multi-token*": "multi-token prediction",
    },
    "oracle",
)
@pytest.mark.parametrize("case", OWN_GRADIENTS)
def test_runs_equal_the_oracle_on_their_own_gradients(case: str) -> None:
    job = OWN_GRADIENTS[case]
    ranks = run_ranks(2, sharded_run, job)
    check_replicas(ranks, job)
    check_same_gradients(ranks, job)


# With and without overlap.

SMALL = Job(hidden=32, heads=4, ffn=48, vocab=64, batch=16)
OVERLAPS = {
    "sequence parallel, gate, wide heads, groups cut by tp, qk-layernorm, window": (
        replace(
            SMALL,
            tp=2,
            groups=1,
            sequence_parallel=True,
            gated_attention=True,
            qk_layernorm=True,
            config_args={"kv_channels": 12, "window_size": (2, 0)},
        ),
        4,
    ),
    "uneven stages, tied, frozen": (
        replace(
            SMALL,
            pp=2,
            layers=4,
            tied=True,
            frozen=("decoder.layers.1",),
            pipeline_args={"num_layers_in_first_pipeline_stage": 1},
        ),
        4,
    ),
    "experts, multi-token prediction": (replace(SMALL, experts=4, ep=2, mtp=1), 4),
    "experts, etp1": (replace(SMALL, experts=2, tp=2, ep=2, etp=1), 4),
    "heterogeneous layers": (
        replace(
            SMALL, hidden=64, heads=8, layers=4, family="heterogeneous", config_args=HETEROGENEOUS
        ),
        2,
    ),
    "fp16, fp16 gradients, first": (
        replace(
            SMALL,
            fp16=True,
            grad_fp32=False,
            adam_mini={"preset": "first"},
            optimizer_args={"loss_scale": 64.0},
        ),
        2,
    ),
    "bf16, remainders, bf16 m": (
        replace(SMALL, bf16=True, adam_mini={"param_remainders": True, "exp_avg_dtype": "bf16"}),
        2,
    ),
    "buckets": (replace(SMALL, ddp_args={"pad_buckets_for_high_nccl_busbw": True}), 2),
}


@pytest.mark.support({"sequence parallel*": "sequence parallelism"}, "overlap")
@pytest.mark.support({"*gate*": "attention output gate"}, "overlap")
@pytest.mark.support({"*wide heads*": "head width other than hidden / heads"}, "overlap")
@pytest.mark.support({"*qk-layernorm*": "qk-layernorm"}, "overlap")
@pytest.mark.support({"*window": "sliding-window attention"}, "overlap")
@pytest.mark.support(
    {
        "*groups cut by tp*": "fewer query groups than tensor-parallel ranks",
        "uneven*": "uneven pipeline stages",
        "*tied*": "tied embeddings",
        "*frozen": "frozen parameters, LoRA",
        "experts*": "mixture of experts",
        "experts, multi*": "expert parallelism",
        "experts, etp1": "expert tensor parallelism",
        "*multi-token*": "multi-token prediction",
        "heterogeneous*": "heterogeneous layers",
        "fp16*": "fp16 with loss scale",
        "*fp16 gradients*": "16-bit gradient buffers",
        "*first": "other partitions: first, tensor, value as block",
        "*remainders*": "16-bit remainders",
        "*bf16 m*": "m in bf16",
        "buckets": "bucket options of DDP",
    },
    "overlap",
)
@pytest.mark.parametrize("case", OVERLAPS)
def test_overlap_changes_no_bit(case: str) -> None:
    job, world = OVERLAPS[case]
    plain = run_ranks(world, bits_per_step, job)
    assert plain == run_ranks(world, bits_per_step, replace(job, overlap=True))
    assert len(set(plain[0])) == 4, "the state did not move"


# Through the training loop.

# Gradients that were added in another order, in float32, over four steps of training; relative to
# the largest weight of a tensor.
WEIGHT_TOLERANCE = 2e-5
#: Weights move by more than this times the largest in these steps.
MOVED = 1e-2

MODEL = "--num-layers 4 --global-batch-size 4"

PP2 = "--pipeline-model-parallel-size 2"
OVERLAP = "--overlap-grad-reduce --overlap-param-gather"
LAYOUTS = {
    "context parallel": ("--context-parallel-size 2", 2),
    "first stage of 1 layer": (f"{PP2} {OVERLAP} --decoder-first-pipeline-num-layers 1", 2),
    "embedding and loss count as layers": (
        "--pipeline-model-parallel-size 3 --account-for-embedding-in-pipeline-split "
        "--account-for-loss-in-pipeline-split",
        3,
    ),
    "layout, virtual stages": (
        f"{PP2} {OVERLAP} --pipeline-model-parallel-layout Et|tt|t|L --no-align-grad-reduce",
        4,
    ),
    "buckets": (
        f"{OVERLAP} --ddp-num-buckets 3 --ddp-pad-buckets-for-high-nccl-busbw "
        "--ddp-average-in-collective",
        2,
    ),
    "instances, virtual stages": (
        f"{PP2} {OVERLAP} --num-layers-per-virtual-pipeline-stage 1 "
        "--num-distributed-optimizer-instances 2",
        4,
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Seen]:
    """Return the flags that load a checkpoint of iteration 2, and the run that went on."""
    folder = tmp_path_factory.mktemp("parallelism")
    flags = f"{MODEL} {make_dataset(folder / 'text')} --save {folder / 'saved'} --save-interval 2"
    (seen,) = run_ranks(1, train, Run(f"{flags} --exit-interval 2", bf16=False))
    assert seen.error is None
    flags = f"{MODEL} {make_dataset(folder / 'text')} --load {folder / 'saved'} --exit-interval 6"
    (straight,) = run_ranks(1, train, Run(flags, bf16=False))
    return flags, straight


def weights(ranks: list[Seen], when: str) -> dict[str, np.ndarray]:
    """Return all weights of a run without tensor parallelism; copies must be bit-equal."""
    found: dict[str, Any] = {}
    for rank in ranks:
        assert rank.error is None
        for name, value in getattr(rank, when)["weights"].items():
            assert np.array_equal(found.setdefault(name, value), value), name
    return found


@pytest.mark.support(
    {
        "context parallel": "context parallelism",
        "first stage*": "uneven pipeline stages",
        "embedding*": "uneven pipeline stages",
        "*virtual stages": "virtual pipeline stages",
        "instances*": "several distributed-optimizer instances",
        "buckets": "bucket options of DDP",
    },
    "reshard",
)
@pytest.mark.parametrize("case", LAYOUTS)
def test_a_run_goes_on_as_on_one_rank(case: str, saved: tuple[str, Seen]) -> None:
    layout, world = LAYOUTS[case]
    flags, straight = saved
    ranks = run_ranks(world, train, Run(f"{flags} {layout}", bf16=False))
    assert {rank.iterations for rank in ranks} == {(2, 6)}
    start, end = weights(ranks, "start"), weights(ranks, "end")
    assert end.keys() == straight.end["weights"].keys()
    for name, expected in straight.end["weights"].items():
        assert np.array_equal(start[name], straight.start["weights"][name]), name
        largest = np.abs(expected).max()
        assert np.abs(end[name] - expected).max() <= WEIGHT_TOLERANCE * largest, name
        assert np.abs(end[name] - start[name]).max() > MOVED * largest, name
