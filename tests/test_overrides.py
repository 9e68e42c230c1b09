"""Learning rates, weight decay and eps of single parameters, as Megatron gives them to its Adam.

Each case runs on two ranks with Megatron's Adam and with Adam-mini. In every step, each parameter
must have Adam's values; and Adam-mini must take the oracle's step with these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.gather import slices_of, whole_tensors
from tests.megatron_job import Job, Trainer
from tests.ranks import run_ranks
from tests.reference import WholeTensorAdamMini
from tests.test_oracle import SAME_GRADIENT_TOLERANCE, assert_close, labels_of
from tests.training_run import Run, make_dataset, rates_of, train

BASE = Job(tp=2, bf16=True, qk_layernorm=True, steps=3, bucket_size=3000)
DATA_PARALLEL = replace(BASE, tp=1)


def standard(config: Any, _: Trainer) -> Any:
    from megatron.core.optimizer import get_standard_config_overrides

    return get_standard_config_overrides(config)


def mup(config: Any, trainer: Trainer) -> Any:
    """Return what ``megatron.training`` makes of ``--use-mup``."""
    from megatron.core.optimizer import get_mup_config_overrides

    scaled = get_mup_config_overrides(
        config, trainer.config.mup_width_mult, optimizer_type=config.optimizer
    )
    return {**standard(config, trainer), **scaled}


def by_name(config: Any, trainer: Trainer) -> Any:
    from megatron.core.optimizer.optimizer_config import ParamKey

    return {
        **standard(config, trainer),
        ParamKey(name="*.mlp.linear_fc1.weight"): {"max_lr": 6e-3, "min_lr": 6e-4},
        ParamKey(name=("*.linear_proj.weight", "*output_layer*")): {"start_wd": 0.3, "end_wd": 0.5},
        ParamKey(attr="is_embedding_or_output_parameter"): {"wd_mult": 0.5},
    }


def by_predicate(config: Any, _: Trainer) -> Any:
    from megatron.core.optimizer.optimizer_config import (
        ParamKey,
        ParamPredicate,
        ParamWithNamePredicate,
    )

    matrices = ParamPredicate(name="matrices", fn=lambda param: param.dim() == 2)
    queries = ParamWithNamePredicate(
        name="queries", fn=lambda param, name: "linear_qkv" in name and param.dim() == 2
    )
    return {
        ParamKey(predicate=matrices): {"max_lr": 4e-3, "min_lr": 0.0},
        ParamKey(with_name_predicate=queries): {"wd_mult": 0.25},
    }


#: Name -> job, what builds the overrides, and how many values of (rate, decay, eps) there must be.
CASES: dict[str, tuple[Job, Callable[[Any, Trainer], Any], int]] = {
    "decoupled rate": (
        replace(BASE, optimizer_args={"decoupled_lr": 5e-3, "decoupled_min_lr": 1e-3}),
        standard,
        3,
    ),
    "decoupled rate, tied embeddings on two stages": (
        replace(DATA_PARALLEL, pp=2, tied=True, optimizer_args={"decoupled_lr": 5e-3}),
        standard,
        3,
    ),
    "muP": (
        replace(BASE, config_args={"use_mup": True, "mup_base_hidden_size": 16}),
        mup,
        3,
    ),
    "muP and decoupled rate": (
        replace(
            DATA_PARALLEL,
            config_args={"use_mup": True, "mup_base_hidden_size": 16},
            optimizer_args={"decoupled_lr": 5e-3},
        ),
        mup,
        3,
    ),
    "decay of the norms of Query and Key": (
        replace(DATA_PARALLEL, optimizer_args={"apply_wd_to_qk_layernorm": True}),
        standard,
        2,
    ),
    "by name and attribute": (BASE, by_name, 6),
    "by predicate": (DATA_PARALLEL, by_predicate, 3),
}


def run(jobs: list[Job], overrides: Callable[[Any, Trainer], Any]) -> list[dict[str, Any]]:
    return [run_one(job, overrides) for job in jobs]


def run_one(job: Job, overrides: Callable[[Any, Trainer], Any]) -> dict[str, Any]:
    """Train under a schedule; return what each parameter's group has in each step, and state."""
    from megatron.core import parallel_state
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    trainer = Trainer(job)
    config = trainer.optimizer.config
    trainer.optimizer = get_megatron_optimizer(config, trainer.chunks, overrides(config, trainer))
    scheduler = OptimizerParamScheduler(
        trainer.optimizer, 0.0, job.lr, 0.0, 1, 10, "linear", 0.1, 0.2, 10, "linear"
    )
    is_mini = job.optimizer == "adam_mini"
    initial = slices_of(trainer) if is_mini else None
    values, grads = [], []
    for step in range(job.steps):
        scheduler.step(1)
        values.append(rates_of(trainer.chunks, trainer.optimizer, "lr", "weight_decay", "eps"))
        trainer.backward(step)
        if is_mini:
            grads.append(slices_of(trainer, grads_only=True))
        assert trainer.optimizer.step()[0]
    found = {"values": values, "initial": initial, "grads": grads}
    found["final"] = slices_of(trainer) if is_mini else None
    parallel_state.destroy_model_parallel()
    return found


@pytest.mark.support("decoupled learning rate, muP, overrides", "oracle")
@pytest.mark.parametrize("case", CASES)
def test_each_parameter_has_adams_rates_and_takes_the_oracles_step(case: str) -> None:
    job, overrides, distinct = CASES[case]
    found = run_ranks(2, run, [job, replace(job, optimizer="adam")], overrides)
    for mini, adam in found:
        assert mini["values"] == adam["values"]
    ranks = [mini for mini, _ in found]
    by_name = {key: value for rank in ranks for key, value in rank["values"][-1].items()}
    assert len(set(by_name.values())) == distinct, by_name
    check_oracle(ranks, job)


def check_oracle(ranks: list[dict[str, Any]], job: Job) -> None:
    """Feed the run's own gradients to the oracle, with Megatron's values for each parameter."""
    start = whole_tensors([r["initial"] for r in ranks], "param", job)
    oracle = {
        name: WholeTensorAdamMini(value, labels_of(name, tuple(value.shape), job))
        for name, value in start.items()
    }
    for step in range(job.steps):
        grads = whole_tensors([r["grads"][step] for r in ranks], "grad", job)
        counted = [g for name, g in grads.items() if not (job.tied and name.startswith("output"))]
        norm = float(sum(g.double().square().sum() for g in counted)) ** 0.5
        scale = min(1.0, job.clip_grad / (norm + 1e-6))
        for rank in ranks:
            for name, (lr, decay, eps) in rank["values"][step].items():
                name = name.removeprefix("module.")
                grad = grads.pop(name, None)
                if grad is not None:
                    oracle[name].step(
                        grad * scale, lr=lr, beta1=0.9, beta2=0.95, eps=eps, weight_decay=decay
                    )
        assert not grads, f"no rank has a rate for {sorted(grads)}"
    for key, of in (("param", "param"), ("exp_avg", "exp_avg"), ("v", "v_of_elements")):
        final = whole_tensors([r["final"] for r in ranks], key, job)
        for name, one in oracle.items():
            expected = one.v_of_elements() if key == "v" else getattr(one, of)
            assert_close(final[name], expected, SAME_GRADIENT_TOLERANCE, f"{key} {name}")


def refused(job: Job, values: dict[str, Any]) -> str:
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.optimizer.optimizer_config import ParamKey

    trainer = Trainer(job)
    overrides = {ParamKey(name="*word_embeddings*"): values}
    try:
        get_megatron_optimizer(trainer.optimizer.config, trainer.chunks, overrides)
    except (ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"eps": 0.0}, "ValueError: eps=0.0 is not allowed; it must be > 0"),
        ({"weight_decay": -0.1}, "ValueError: weight_decay=-0.1 is not allowed; it must be >= 0"),
        (
            {"betas": (0.8, 0.95)},
            "NotImplementedError: Adam-mini got parameter groups with different betas "
            "[(0.8, 0.95), (0.9, 0.95)]",
        ),
    ],
)
def test_overrides_that_cannot_be_used_are_refused_at_start_up(
    values: dict[str, Any], text: str
) -> None:
    # The last stage has no such parameter, but it has the group.
    for found in run_ranks(2, refused, Job(pp=2, layers=2), values):
        assert found.startswith(text)


FLAGS = "--qk-layernorm --no-weight-decay-cond-type apply_wd_to_qk_layernorm --use-mup \
    --mup-base-hidden-size 4 --decoupled-lr 3e-2 --decoupled-min-lr 3e-3 --exit-interval 3"


def test_flags_reach_the_groups_in_a_training_loop(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data")
    found = {
        optimizer: run_ranks(1, train, Run(f"{data} {FLAGS}", optimizer=optimizer))[0]
        for optimizer in ("adam_mini", "adam")
    }
    mini, adam = found["adam_mini"], found["adam"]
    assert mini.error is adam.error is None
    assert len(mini.steps) == 3
    assert mini.steps == adam.steps
    last = mini.steps[-1]
    hidden, norm, output, query_norm = (
        last[name]
        for name in (
            "decoder.layers.0.mlp.linear_fc1.weight",
            "decoder.final_layernorm.weight",
            "output_layer.weight",
            "decoder.layers.0.self_attention.q_layernorm.weight",
        )
    )
    assert hidden == (norm[0] / 4, 0.1)
    assert output == (3 * norm[0], 0.1)
    assert (norm[1], query_norm) == (0.0, (norm[0], 0.1))
    for seen in (mini, adam):
        eps = {group["eps"] for group in seen.start["groups"]}
        assert eps == {1e-8, 0.25e-8}
