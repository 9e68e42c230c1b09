"""The promise: the same run, whatever the layout, equal to Adam-mini on whole tensors.

Two independent comparisons:

* *trajectory*: ten steps of a sharded run against ten steps of the unsharded model with the
  oracle of ``reference.py`` as optimizer, float32, every parameter and every v;
* *same gradients*: the reduced gradients of the sharded run itself, put together and fed to the
  oracle; no model noise, so that bfloat16 models can be compared as closely.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.gather import nearest_bfloat16, slices_of, weights_of, whole_tensors
from tests.megatron_job import Job, Trainer, global_names, whole_weight
from tests.models import FAMILIES
from tests.ranks import run_ranks
from tests.reference import (
    WholeTensorAdamMini,
    element_labels,
    one_label,
    qkv_labels,
    row_labels,
)

# Gradients of the sharded and the unsharded model differ by the order of float32 additions,
# about 1e-6 of their size; ten steps of training amplify that a little. Relative to the largest
# element of the tensor.
TRAJECTORY_TOLERANCE = 2e-5
# Same gradients: float32 state against float64, ten steps, a few roundings of 6e-8 each.
SAME_GRADIENT_TOLERANCE = 1e-6
# The norm of these gradients: float32 squares in another order, and a square root that halves it.
SAME_NORM_TOLERANCE = 1e-6
# Ten steps at a rate of 2e-3 move each parameter by more, or its comparison would prove nothing.
MOVED = 1e-3

BETAS = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8}


def labels_of(name: str, shape: tuple[int, ...], job: Job) -> Tensor:
    """Return the oracle's blocks, written from the design's table of presets."""
    if job.family in FAMILIES:
        return FAMILIES[job.family].labels(name, shape, job.adam_mini.get("value_as_block", False))
    preset = job.adam_mini.get("preset", "paper")
    if preset in ("row-column", "slim") and (len(shape) == 2 or "norm" in name):
        return labels_with_columns(name, shape, job, preset)
    if len(shape) == 1 and "norm" not in name:
        return one_label(*shape) if preset == "tensor" else element_labels(*shape)
    if len(shape) == 1:
        return one_label(*shape)
    if "linear_qkv" in name:
        head_dim = job.config_args.get("kv_channels", job.hidden // job.heads)
        labels = qkv_labels(job.heads, job.groups, head_dim, shape[1], job.gated_attention)
        if preset == "row":
            return row_labels(*shape)
        if preset == "tensor":
            return _merge_qkv(labels, job, {"q", "k", "v"})
        if preset == "first" or job.adam_mini.get("value_as_block"):
            return _merge_qkv(labels, job, {"v"})
        return labels
    if "router" in name and preset != "tensor":
        return element_labels(*shape)
    if preset == "first" and ("embedding" in name or "output" in name):
        return element_labels(*shape)
    return row_labels(*shape) if preset in ("paper", "row") else one_label(*shape)


def labels_with_columns(name: str, shape: tuple[int, ...], job: Job, preset: str) -> Tensor:
    """Return the blocks of a matrix, or of a norm, of the presets with columns."""
    if len(shape) == 1:
        return element_labels(*shape) if preset == "slim" else one_label(*shape)
    if "linear_qkv" in name:  # columns of Value, rows of all else
        head_dim = job.config_args.get("kv_channels", job.hidden // job.heads)
        per_group = job.heads // job.groups * (2 if job.gated_attention else 1)
        group = [False] * (per_group * head_dim + head_dim) + [True] * head_dim
        is_value = torch.tensor(group * job.groups)
        labels = row_labels(*shape)
        labels[is_value] = shape[0] + torch.arange(shape[1])
        return torch.unique(labels, return_inverse=True)[1]
    if "router" in name:
        return element_labels(*shape)
    if "linear_proj" in name or (preset == "slim" and "linear_fc" in name):
        columns = torch.arange(shape[1]).expand(shape)
        halves = 2 if job.swiglu and "linear_fc1" in name else 1  # gate above up
        half = torch.arange(shape[0]) // (shape[0] // halves)
        return columns + shape[1] * half[:, None]
    return row_labels(*shape)


def _merge_qkv(labels: Tensor, job: Job, kinds: set[str]) -> Tensor:
    """Give all Query, Key or Value rows of a fused weight (without a gate) one label per kind."""
    head_dim = job.config_args.get("kv_channels", job.hidden // job.heads)
    per_group = job.heads // job.groups
    group = ["q"] * (per_group * head_dim) + ["k"] * head_dim + ["v"] * head_dim
    merged = labels.clone()
    for row, kind in enumerate(group * job.groups):
        if kind in kinds:
            merged[row] = int(labels.max()) + 1 + "qkv".index(kind)
    return torch.unique(merged, return_inverse=True)[1]


def decay_of(shape: tuple[int, ...], job: Job) -> float:
    """Megatron decays matrices only."""
    return job.weight_decay if len(shape) > 1 else 0.0


def unsharded_run(job: Job) -> dict[str, Any]:
    """Train the whole model on one rank with the oracle as optimizer."""
    trainer = Trainer(replace(job, optimizer="sgd", distributed_optimizer=False, adam_mini={}))
    params = {n: p for n, p in global_names(trainer.chunks).items() if p.requires_grad}
    oracle = {
        n: WholeTensorAdamMini(p, labels_of(n, tuple(p.shape), job)) for n, p in params.items()
    }
    norms = []
    for step in range(job.steps):
        trainer.backward(step)
        grads = {name: param.main_grad.double() for name, param in params.items()}
        norm = float(sum(g.square().sum() for g in grads.values())) ** 0.5
        norms.append(norm)
        scale = min(1.0, job.clip_grad / (norm + 1e-6)) if job.clip_grad > 0 else 1.0
        for name, param in params.items():
            decay = decay_of(tuple(param.shape), job)
            oracle[name].step(grads[name] * scale, lr=job.lr, weight_decay=decay, **BETAS)
            param.data.copy_(oracle[name].param)
    return {
        "losses": trainer.losses,
        "norms": norms,
        "param": {name: o.param for name, o in oracle.items()},
        "v": {name: o.v_of_elements() for name, o in oracle.items()},
        "exp_avg": {name: o.exp_avg for name, o in oracle.items()},
    }


def sharded_run(job: Job) -> dict[str, Any]:
    """Train under the job's layout; return all that a rank has to show."""
    trainer = Trainer(job)
    initial = slices_of(trainer)
    grads, norms, scales = [], [], []
    for step in range(job.steps):
        scales.append(float(trainer.optimizer.get_loss_scale()))
        trainer.backward(step)
        grads.append(slices_of(trainer, grads_only=True))
        updated, norm, _ = trainer.optimizer.step()
        assert updated
        norms.append(norm)
    trainer.sync_params()
    return {
        "losses": trainer.losses,
        "norms": norms,
        "grads": grads,
        "scales": scales,
        "initial": initial,
        "final": slices_of(trainer),
        "weights": weights_of(trainer),
        "communication": trainer.optimizer.communication_per_step(),
        "names": sorted({part.name for part in initial}),
    }


def key_rows(name: str, job: Job) -> Tensor:
    """Return which rows of a fused QKV are of Keys.

    Softmax does not see a Key's bias, so its gradient is zero but for rounding (v is about 1e-14),
    which Adam then scales up: trajectories of that noise differ between layouts. What the update
    makes of it is compared by check_same_gradients.
    """
    if job.family in FAMILIES:
        job = FAMILIES[job.family].job_of(name, job)
    head_dim = job.config_args.get("kv_channels", job.hidden // job.heads)
    per_group = job.heads // job.groups
    queries = per_group * head_dim * (2 if job.gated_attention else 1)
    group = [False] * queries + [True] * head_dim + [False] * head_dim
    return torch.tensor(group * job.groups)


def world_of(job: Job, dp: int) -> int:
    return job.tp * job.pp * job.cp * dp


def assert_close(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    scale = float(expected.abs().max()) or 1.0
    error = float((found.double() - expected.double()).abs().max()) / scale
    assert error <= tolerance, f"{what}: relative error {error:.2e} > {tolerance:.0e}"


def is_output(name: str) -> bool:
    """Return whether a parameter is the output layer, a copy of the embedding if they are tied."""
    return name.endswith("output_layer.weight")


def check_same_gradients(ranks: list[dict[str, Any]], job: Job) -> None:
    """Feed the run's own gradients to the oracle, and compare all state."""
    start = whole_tensors([r["initial"] for r in ranks], "param", job)
    final = {
        key: whole_tensors([r["final"] for r in ranks], key, job)
        for key in ("param", "exp_avg", "v")
    }
    oracle = {
        name: WholeTensorAdamMini(value, labels_of(name, tuple(value.shape), job))
        for name, value in start.items()
    }
    for step in range(job.steps):
        grads = whole_tensors([r["grads"][step] for r in ranks], "grad", job)
        grads = {name: grad / ranks[0]["scales"][step] for name, grad in grads.items()}
        if job.tied:
            grads = {name: grad for name, grad in grads.items() if not is_output(name)}
        norm = float(sum(g.double().square().sum() for g in grads.values())) ** 0.5
        assert norm == pytest.approx(ranks[0]["norms"][step], rel=SAME_NORM_TOLERANCE)
        scale = min(1.0, job.clip_grad / (norm + 1e-6)) if job.clip_grad > 0 else 1.0
        for name, grad in grads.items():
            decay = decay_of(tuple(grad.shape), job)
            oracle[name].step(grad.double() * scale, lr=job.lr, weight_decay=decay, **BETAS)
    for name, expected in oracle.items():
        if job.tied and is_output(name):
            continue
        assert_close(final["param"][name], expected.param, SAME_GRADIENT_TOLERANCE, f"param {name}")
        assert_close(
            final["exp_avg"][name], expected.exp_avg, SAME_GRADIENT_TOLERANCE, f"exp_avg {name}"
        )
        assert_close(
            final["v"][name], expected.v_of_elements(), SAME_GRADIENT_TOLERANCE, f"v {name}"
        )


def check_replicas(ranks: list[dict[str, Any]], job: Job) -> None:
    """Weights must be bit-equal wherever they are held, and equal to the rounded masters."""
    weights = whole_tensors([r["weights"] for r in ranks], "weight", job)
    masters = whole_tensors([r["final"] for r in ranks], "param", job)
    for name, weight in weights.items():
        if name.startswith(job.frozen or ("-",)):
            assert name not in masters
            assert torch.equal(weight, whole_weight(name, tuple(weight.shape))), f"{name}: frozen"
            continue
        master = masters[name]
        if job.bf16:
            same = torch.equal(weight, nearest_bfloat16(master)) or torch.equal(weight, master)
        elif job.fp16:
            same = torch.equal(weight, master.half().float())
        else:
            same = torch.equal(weight, master)
        assert same, f"{name}: model weights are not the rounded main parameters"
    if job.tied and job.pp > 1:
        (output,) = filter(is_output, weights)
        embedding = output.replace("output_layer", "embedding.word_embeddings")
        assert torch.equal(weights[embedding], weights[output])


BASE = Job(overlap=True, bucket_size=3000)
LAYOUTS = {
    "tp1-pp1-dp1": (BASE, 1),
    "tp2-pp1-dp1": (replace(BASE, tp=2), 1),
    "tp1-pp2-dp1": (replace(BASE, pp=2), 1),
    "tp1-pp1-dp2": (BASE, 2),
    "tp1-pp1-dp3": (BASE, 3),
    "tp2-pp2-dp2": (replace(BASE, tp=2, pp=2), 2),
    "tp4-pp1-dp2": (replace(BASE, tp=4), 2),
    "tp1-pp1-dp8": (BASE, 8),
    "one bucket, no overlap, tp2-pp2-dp2": (Job(tp=2, pp=2), 2),
    "heads cut by tp: 1 group, tp4": (replace(BASE, tp=4, groups=1), 2),
    "a slice cuts a head on one tp rank only": (
        Job(tp=2, pp=2, heads=4, groups=1, ffn=96, vocab=288),
        2,
    ),
    "heads whole, groups cut by tp: 2 groups, tp4": (replace(BASE, tp=4, groups=2), 2),
    "heads cut by tp: 1 group, tp8": (replace(BASE, tp=8, groups=1), 1),
    "heads cut by tp: 2 groups, tp8": (replace(BASE, tp=8, groups=2), 1),
    "every parameter its own bucket, norms over several slices": (replace(BASE, bucket_size=1), 8),
    "hidden 56, dp3": (replace(BASE, hidden=56, heads=4, groups=2, ffn=120), 3),
    "a slice with embedding rows only": (Job(vocab=1024), 8),
    "gated attention, biases, qk-layernorm": (
        replace(BASE, tp=2, gated_attention=True, bias=True, qk_layernorm=True),
        2,
    ),
    "GELU with biases, no GLU": (replace(BASE, tp=2, swiglu=False, bias=True), 2),
    "tied embeddings": (replace(BASE, tied=True, tp=2, pp=2), 2),
    "virtual pipeline stages": (replace(BASE, layers=4, pp=2, vpp=2), 1),
    "several optimizer instances": (replace(BASE, instances=2, tp=2), 4),
    "context parallel, cp2": (replace(BASE, cp=2), 1),
    "context parallel, cp2-dp2": (replace(BASE, cp=2), 2),
    "context parallel, cp2-tp2": (replace(BASE, cp=2, tp=2), 1),
    "context parallel, cp2-pp2": (replace(BASE, cp=2, pp=2), 1),
    "context parallel, cp4, sliding window": (
        replace(BASE, cp=4, config_args={"window_size": (3, 0)}),
        1,
    ),
    "replicated state": (replace(BASE, distributed_optimizer=False, tp=2), 2),
    "no clipping": (replace(BASE, clip_grad=0.0), 3),
}


_unsharded: dict[str, dict[str, Any]] = {}


def unsharded(job: Job) -> dict[str, Any]:
    """Train each distinct model once, whatever the number of layouts compared with it."""
    plain = replace(
        job, tp=1, pp=1, cp=1, vpp=None, ep=1, etp=None, instances=1, overlap=False,
        bucket_size=None, distributed_optimizer=True, sequence_parallel=False, ddp_args={},
        pipeline_args={},
    )  # fmt: skip
    key = repr(plain)
    if key not in _unsharded:
        _unsharded[key] = run_ranks(1, unsharded_run, plain)[0]
    return _unsharded[key]


#: Names of cases -> what they show.
SHOWN = {
    "tp[24]-*": "tensor parallelism",
    "tp?-pp2-*": "pipeline parallelism",
    "tp?-pp?-dp[238]": "data parallelism, distributed optimizer",
    "replicated state": "data parallelism, replicated state",
    "virtual pipeline stages": "virtual pipeline stages",
    "context parallel*": "context parallelism",
    "several optimizer instances": "several distributed-optimizer instances",
    "*heads*": "heads, rows and norms cut by any boundary",
    "GELU with biases, no GLU": "GPT, Llama: GQA, SwiGLU or GELU, biases",
    "heads cut by tp*": "fewer query groups than tensor-parallel ranks",
    "gated attention*": "attention output gate",
    "*qk-layernorm": "qk-layernorm",
    "tied embeddings": "tied embeddings",
    "*sliding window": "sliding-window attention",
    "tp1-pp1-dp1": "float32",
}


@pytest.mark.support(SHOWN, "oracle")
@pytest.mark.parametrize("case", LAYOUTS)
def test_sharded_run_equals_unsharded_oracle(case: str) -> None:
    job, dp = LAYOUTS[case]
    compare_runs(job, run_ranks(world_of(job, dp), sharded_run, job), unsharded(job))


def compare_runs(job: Job, ranks: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """Compare a sharded run with the unsharded one, and with the oracle on its own gradients."""
    for rank in ranks:
        np.testing.assert_allclose(rank["norms"], expected["norms"], rtol=TRAJECTORY_TOLERANCE)
    # Ranks of the last stage have the mean loss of their own tokens, as many on each.
    losses = np.mean([rank["losses"] for rank in ranks if rank["losses"]], axis=0)
    np.testing.assert_allclose(losses, expected["losses"], rtol=TRAJECTORY_TOLERANCE)
    check_replicas(ranks, job)
    check_same_gradients(ranks, job)
    for key in ("param", "v", "exp_avg"):
        found = whole_tensors([r["final"] for r in ranks], key, job)
        for name, value in expected[key].items():
            told = slice(None) if "linear_qkv.bias" not in name else ~key_rows(name, job)
            assert_close(found[name][told], value[told], TRAJECTORY_TOLERANCE, f"{key} {name}")
    start = whole_tensors([r["initial"] for r in ranks], "param", job)
    moved = [
        float((start[n] - expected["param"][n]).abs().max())
        for n in start
        if n in expected["param"]
    ]
    assert min(moved) > MOVED


#: Columns of Value, projections and MLPs: sums of columns cross slices and tensor-parallel ranks.
ROW_COLUMN = replace(BASE, adam_mini={"preset": "row-column"})
SLIM = replace(BASE, adam_mini={"preset": "slim"})

PARTITIONS = {
    "row-column, rows cut by slices": (replace(ROW_COLUMN, tp=2), 3),
    "slim, one rank": (SLIM, 1),
    "slim, rows cut by slices": (replace(SLIM, bucket_size=1), 3),
    "slim, tp2-dp2, sequence parallel": (replace(SLIM, tp=2, sequence_parallel=True), 2),
    "slim, pp2, tied embeddings": (replace(SLIM, pp=2, tied=True), 2),
    "slim, Value on one of four ranks": (replace(SLIM, tp=4, groups=1), 1),
    "slim, replicated state": (replace(SLIM, tp=2, distributed_optimizer=False), 2),
    "slim, several instances": (replace(SLIM, instances=2, tp=2), 2),
    "slim, GELU with biases": (replace(SLIM, tp=2, swiglu=False, bias=True), 2),
    "row": (replace(BASE, adam_mini={"preset": "row"}, tp=2, pp=2), 2),
    "first": (replace(BASE, adam_mini={"preset": "first"}, tp=2, groups=2), 3),
    "tensor, heads on all ranks": (
        replace(BASE, adam_mini={"preset": "tensor"}, tp=4, groups=1),
        2,
    ),
    "tensor, one rank": (replace(BASE, adam_mini={"preset": "tensor"}), 1),
    "tensor, replicated state": (
        replace(BASE, adam_mini={"preset": "tensor"}, distributed_optimizer=False, tp=2),
        2,
    ),
    "value as one block": (replace(BASE, adam_mini={"value_as_block": True}, tp=2, pp=2), 2),
    "value as one block, several instances": (
        replace(BASE, adam_mini={"value_as_block": True}, tp=2, instances=2),
        4,
    ),
}


@pytest.mark.support("other partitions: first, tensor, value as block", "oracle")
@pytest.mark.parametrize("case", PARTITIONS)
def test_other_partitions_equal_the_oracle_on_their_own_gradients(case: str) -> None:
    job, dp = PARTITIONS[case]
    ranks = run_ranks(world_of(job, dp), sharded_run, job)
    check_replicas(ranks, job)
    check_same_gradients(ranks, job)


PRECISIONS = {
    "bf16, float32 gradients": (replace(BASE, bf16=True, tp=2, pp=2), 2),
    "bf16, bf16 gradients": (replace(BASE, bf16=True, grad_fp32=False), 3),
    "bf16, replicated state": (replace(BASE, bf16=True, distributed_optimizer=False, tp=2), 2),
    "float32 and bf16 parameters in one group": (
        replace(
            BASE, bf16=True, float32_modules=("final_layernorm", "q_layernorm"), qk_layernorm=True
        ),
        3,
    ),
    "float32 and bf16 parameters, gathered at once": (
        replace(
            BASE, bf16=True, float32_modules=("final_layernorm",), overlap=False, bucket_size=None
        ),
        3,
    ),
    "bf16, tied embeddings": (replace(BASE, bf16=True, tied=True, pp=2), 2),
    "fp16, fp16 gradients, a loss scale that grows": (
        replace(
            BASE,
            fp16=True,
            grad_fp32=False,
            tp=2,
            optimizer_args={"initial_loss_scale": 64.0, "loss_scale_window": 4},
        ),
        2,
    ),
    "fp16, float32 gradients, constant loss scale": (
        replace(BASE, fp16=True, pp=2, optimizer_args={"loss_scale": 512.0}),
        2,
    ),
}


@pytest.mark.support(
    {
        "bf16, float32 gradients": "bf16 with float32 main parameters",
        "bf16, bf16 gradients": "16-bit gradient buffers",
        "float32 and bf16*": "float32 modules in a 16-bit model",
        "fp16*": "fp16 with loss scale",
    },
    "oracle",
)
@pytest.mark.parametrize("case", PRECISIONS)
def test_sixteen_bit_models_equal_the_oracle_on_their_own_gradients(case: str) -> None:
    job, dp = PRECISIONS[case]
    ranks = run_ranks(world_of(job, dp), sharded_run, job)
    check_replicas(ranks, job)
    check_same_gradients(ranks, job)
