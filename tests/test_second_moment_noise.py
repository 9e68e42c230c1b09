"""How unlike v is within blocks: numbers of whole tensors, whatever the layout.

Every rank gets its part of one made-up v for the whole model; the oracle computes from the whole in
numpy, and knows where Query, Key and Value lie from Megatron's documentation alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import megatron_adam_mini
from megatron_adam_mini import AdamMiniConfig
from megatron_adam_mini.plan.candidates import candidates_of
from megatron_adam_mini.plan.parameter_info import HeadGeometry, ParameterInfo
from megatron_adam_mini.second_moment_noise import average_snr
from tests.megatron_job import (
    Job,
    Trainer,
    global_names,
    is_routed,
    shard_of,
    split_rank,
    whole_shape,
)
from tests.ranks import RankError, run_ranks
from tests.test_logged_updates import WandbDouble

FULL = {"full_v": ["*"], "log_heterogeneity": 2}
BASE = Job(hidden=32, ffn=48, vocab=64, heads=4, groups=2, batch=8, steps=1, adam_mini=FULL)
LAYOUTS = {
    "one rank": (BASE, 1),
    "dp2, buckets": (replace(BASE, bucket_size=3000), 2),
    "tp2-dp2": (replace(BASE, tp=2, bucket_size=3000), 4),
    "tp2, not gated, biases": (replace(BASE, tp=2, swiglu=False, bias=True), 2),
    "tp2-pp2, tied": (replace(BASE, tp=2, pp=2, tied=True), 4),
    "tp4, a head on two ranks": (replace(BASE, tp=4, groups=1), 4),
    "experts, ep2-tp2": (replace(BASE, tp=2, ep=2, etp=1, experts=4, bf16=True), 4),
    "replicated, tp2-dp2": (replace(BASE, tp=2, distributed_optimizer=False), 4),
    "on the host": (
        replace(
            BASE,
            bf16=True,
            optimizer_args={"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5},
        ),
        2,
    ),
}
#: Sums of float64 in another order, and a variance from them.
TOLERANCE = 1e-10

Found = dict[str, Any]


def whole_v(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return v of a whole parameter: rows and columns of other scales, some elements 0."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "little")
    rng = np.random.default_rng(seed)
    if "final_layernorm" in name:
        return np.full(shape, 1e-7, np.float32)
    v = rng.lognormal(size=shape)
    for dim in range(len(shape)):
        v = v * rng.lognormal(size=[n if d == dim else 1 for d, n in enumerate(shape)])
    if len(shape) > 1:
        v[rng.random(shape) < 0.03] = 0.0
    if "word_embeddings" in name or "output_layer" in name:
        v[3:6] = 0.0
    return (1e-12 * v).astype(np.float32)


# Bodies that run in a rank.


def made_up(trainer: Trainer) -> dict[str, tuple[int, ...]]:
    """Give the state its part of the made-up v, and return the shapes of whole parameters."""
    job, inner = trainer.job, trainer.optimizer.inner
    names = {param: name for name, param in global_names(trainer.chunks).items()}
    shapes = {name: whole_shape(name, param, job) for param, name in names.items()}
    with inner.main_params.left_where_it_is():
        state = inner.main_params.attach()
        for piece in inner.plan.pieces:
            param = trainer.optimizer.member.model_params[piece.parameter]
            name = names[param]
            own = "embedding.word_embeddings.weight" if job.tied and "output" in name else name
            whole = torch.from_numpy(whole_v(own, shapes[name]))
            own_v = shard_of(name, whole, param, job, split_rank(name)).reshape(-1)
            state.v_of_elements(piece).copy_(own_v[piece.begin : piece.end])
    if job.tied:
        shapes.pop("output_layer.weight", None)
    return shapes


def measured(job: Job) -> dict[str, Any]:
    from megatron_adam_mini.mcore.noise_report import noise_of_model

    trainer = Trainer(job)
    assert noise_of_model(trainer.optimizer.member) == [], "there was no step"
    trainer.step(0)
    return {"shapes": made_up(trainer), "noise": noise_of_model(trainer.optimizer.member)}


# The oracle.


def parts_of(name: str, v: NDArray[Any], job: Job) -> dict[str, NDArray[Any]]:
    """Return v of each part, ``(rows, columns)``; heads of Query and Key one after the other."""
    v = v.astype(np.float64).reshape(len(v), -1)
    if job.swiglu and name.endswith("linear_fc1.weight"):
        return dict(zip(("gate", "up"), np.split(v, 2), strict=True))
    if not name.endswith("linear_qkv.weight"):
        return {"": v}
    dim = job.hidden // job.heads
    groups = v.reshape(job.groups, -1, v.shape[1])
    query = job.heads // job.groups * dim
    bounds = {"query": (0, query), "key": (query, query + dim), "value": (query + dim, None)}
    return {part: groups[:, a:b].reshape(-1, v.shape[1]) for part, (a, b) in bounds.items()}


def expected(name: str, shape: tuple[int, ...], job: Job) -> dict[tuple[str, str], Found]:
    found: dict[tuple[str, str], Found] = {}
    for part, v in parts_of(name, whole_v(name, shape), job).items():
        by_candidate = {"tensor": v.reshape(1, -1)}
        if v.shape[1] > 1:
            by_candidate |= {"row": v, "column": v.T}
        if part in ("query", "key"):
            by_candidate["head"] = v.reshape(-1, job.hidden // job.heads * v.shape[1])
        found[name, part] = {"zeros": (v == 0).mean()}
        for candidate, blocks in by_candidate.items():
            ratios = [b.mean() ** 2 / b.var() for b in blocks if b.var() > 1e-30 * b.mean() ** 2]
            kept = [b[b > 0] for b in blocks if b.any()]
            spreads = [b.mean() / math.exp(np.log(b).mean()) for b in kept]
            found[name, part][candidate] = (
                len(blocks),
                np.mean(ratios) if ratios else math.nan,
                np.mean(spreads) if spreads else math.nan,
            )
    return found


@pytest.mark.support("what Megatron logs", "test")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_that_of_whole_tensors(layout: str) -> None:
    job, world = LAYOUTS[layout]
    ranks = run_ranks(world, measured, job)
    shapes = {name: shape for rank in ranks for name, shape in rank["shapes"].items()}
    oracle: dict[tuple[str, str], Found] = {}
    for name, shape in shapes.items():
        oracle |= expected(name, shape, job)
    for rank in ranks:
        assert rank["noise"] == ranks[0]["noise"], "on all ranks"
    found = {(part.name, part.part): part for part in ranks[0]["noise"]}
    assert len(found) == len(ranks[0]["noise"])
    assert found.keys() == oracle.keys()
    for key, part in found.items():
        own = oracle[key]
        assert part.zeros == pytest.approx(own.pop("zeros"))
        assert part.by_candidate.keys() == own.keys(), key
        for candidate, noise in part.by_candidate.items():
            numbers = [math.nan if number is None else number for number in noise]
            same = pytest.approx(own[candidate], rel=TOLERANCE, nan_ok=True)
            assert numbers == same, (key, candidate)
        assert part.role.startswith("expert_") == is_routed(part.name)
    constant = found["decoder.final_layernorm.weight", ""]
    assert constant.by_candidate["tensor"].snr is None
    assert constant.best is None
    assert found["embedding.word_embeddings.weight", ""].zeros > 3 / 64


# Parts and rules.


def info_of(name: str, shape: tuple[int, ...], **facts: Any) -> ParameterInfo:
    geometry = HeadGeometry(num_heads=4, num_query_groups=2, head_dim=2, gated=True)
    return ParameterInfo.of(name, shape, lambda role: geometry, **facts)


@pytest.mark.parametrize(
    ("options", "rules"),
    [
        ({}, ("head", "row", "head", "row")),
        ({"preset": "row"}, ("row", "row", "row", "row")),
        ({"preset": "slim"}, ("row", "row", "row", "column")),
        ({"preset": "first"}, ("head", "tensor", "head", "tensor")),
        ({"value_as_block": True}, ("head", "row", "head", "tensor")),
        ({"rules": [("*qkv*", "element")]}, ("element",) * 4),
    ],
)
def test_parts_of_attention_have_the_rules_of_the_preset(
    options: dict[str, Any], rules: tuple[str, ...]
) -> None:
    info = info_of("decoder.layers.0.self_attention.linear_qkv.weight", (24, 3))
    found = candidates_of(info, AdamMiniConfig(full_v=("*",), **options))
    assert found.parts == ("query", "gate", "key", "value")
    assert found.part_of_row.tolist() == 2 * [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3]
    assert found.rules == rules
    assert found.of_part(0) == found.of_part(2) == ("row", "column", "head", "tensor")
    assert found.of_part(1) == found.of_part(3) == ("row", "column", "tensor")


def test_gate_and_up_are_parts_wherever_their_rows_lie() -> None:
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    info = info_of(name, (4, 3), tp_dim=0, tp_size=2, tp_rank=1, num_stacked=2)
    found = candidates_of(info, AdamMiniConfig(preset="slim", full_v=("*",)))
    assert found.parts == ("gate", "up")
    assert found.rules == ("column", "column")
    assert found.part_of_row.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]


def test_what_has_no_blocks_of_several_elements_is_no_candidate() -> None:
    config = AdamMiniConfig(full_v=("*",))
    convolution = candidates_of(info_of("x.mixer.conv1d.weight", (6, 1, 4)), config)
    assert convolution.of_part(0) == ("row", "tensor")
    for name, shape in (("x.linear_fc1.bias", (5,)), ("x.shared_experts.gate_weight", (1, 5))):
        found = candidates_of(info_of(name, shape), config)
        assert found.of_part(0) == ("tensor",)
    assert candidates_of(info_of("x.scalar", ()), config).of_part(0) == ("tensor",)


def test_average_snr_leaves_out_blocks_of_equal_v() -> None:
    assert average_snr(np.array([2.0, 5.0, 0.0]), np.array([1.0, 0.0, 0.0])) == 4.0
    assert average_snr(np.array([2.0]), np.array([0.0])) is None


# Megatron's loop.


def loop_that_logs(job: Job) -> tuple[str, dict[int, dict[str, float]]]:
    """Train with Megatron's writer on the last rank; return what was printed and written."""
    from megatron import training
    from torch import distributed

    from megatron_adam_mini.mcore.metrics import wrap_training_log

    is_last = distributed.get_rank() == distributed.get_world_size() - 1
    wandb = WandbDouble() if is_last else None
    training.get_args = lambda: SimpleNamespace(tensorboard_log_interval=1000)
    training.get_tensorboard_writer = lambda: None
    training.get_wandb_writer = lambda: wandb
    training_log = wrap_training_log(lambda loss, iteration: None)
    trainer = Trainer(job)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for step in range(job.steps):
            trainer.step(step)
            training_log({}, iteration=step + 1)
    assert len(megatron_adam_mini.metrics_of(trainer.optimizer, heterogeneity=True)) > 10
    return printed.getvalue(), wandb.logged if wandb else {}


def test_table_and_metrics_cover_the_model_at_the_interval() -> None:
    rules = {"rules": [("*fc1*", "row")], "full_v": ["*fc2*", "*qkv*", "*norm*", "*embedding*"]}
    job = replace(BASE, pp=2, steps=5, adam_mini=FULL | rules)
    (table, nothing), (silent, logged) = run_ranks(2, loop_that_logs, job)
    assert silent == ""
    assert nothing == {}
    assert logged.keys() == {2, 4}
    kinds = {name.removeprefix("adam-mini/v-snr/row/") for name in logged[4] if "v-snr/row" in name}
    assert kinds == {
        "embedding.word_embeddings",
        "mlp.linear_fc2",
        *(f"qkv.linear_qkv.{part}" for part in ("query", "key", "value")),
    }
    assert all(value > 0.0 for value in logged[4].values())
    assert table.count("Adam-mini: v within blocks, after iteration") == 2
    lines = table.splitlines()
    assert sum(" query " in line for line in lines) == 2 * job.layers
    (line,) = {line for line in lines if line.startswith("not measured")}
    assert line.count("linear_fc1") == line.count("linear_proj") == job.layers
    assert line.count("output_layer") == 1
    assert "linear_fc2" not in line
    last = [line for line in lines if "layers.1.self_attention.linear_qkv.weight value" in line]
    assert last[-1].split()[2:4] == ["qkv", "row"]
    assert re.search(r"  (row|column|tensor)(, below 1)?$", last[-1])


def test_blocks_only_are_refused_with_the_remedy() -> None:
    job = replace(BASE, pp=2, adam_mini={"log_heterogeneity": 1})
    with pytest.raises(RankError, match=r"ValueError: --adam-mini-log-hetero.*--adam-mini-full-v"):
        run_ranks(2, Trainer, job)
    with pytest.raises(ValueError, match="log_heterogeneity=-1 is not allowed"):
        AdamMiniConfig(log_heterogeneity=-1)


def build_with_heads_that_do_not_match(job: Job) -> None:
    from megatron_adam_mini.mcore import param_info

    original = param_info._describe
    wrong = HeadGeometry(num_heads=4, num_query_groups=2, head_dim=7)
    param_info._describe = lambda *args: (
        replace(info, heads=wrong) if (info := original(*args)).heads else info
    )
    Trainer(job)


def test_heads_that_do_not_match_are_refused_at_the_start() -> None:
    with pytest.raises(RankError, match=r"make 56; check --num-attention-heads"):
        run_ranks(1, build_with_heads_that_do_not_match, BASE)


def test_gate_and_up_in_turns_are_refused() -> None:
    job = replace(BASE, experts=4, config_args={"moe_mlp_glu_interleave_size": 4})
    with pytest.raises(RankError, match=r"NotImplementedError: --adam-mini-log-het.* alternate"):
        run_ranks(1, Trainer, job)
