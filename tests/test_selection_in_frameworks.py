"""How frameworks that build Megatron's config come to Adam-mini: docs/frameworks.md.

Their calls are repeated in own words; the frameworks were read, not run.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import pickle
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed

from megatron_adam_mini import AdamMiniConfig
from megatron_adam_mini.mcore import unattached
from tests.megatron_job import Job, Trainer
from tests.ranks import RankError, run_ranks

JOB = Job(layers=1, bf16=True, batch=4)
FLAGS = "--adam-mini-preset first --adam-mini-full-v '*.a b' x --exp-avg-dtype bf16"
OPTIONS = AdamMiniConfig(preset="first", full_v=("*.a b", "x"), exp_avg_dtype="bf16")


def test_options_come_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(unattached.VARIABLE, raising=False)
    assert unattached.options_of_process() == AdamMiniConfig()
    monkeypatch.setenv(unattached.VARIABLE, FLAGS)
    assert unattached.options_of_process() == OPTIONS


def test_options_of_the_config_come_first_and_are_no_dict(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(unattached.VARIABLE, FLAGS)
    assert unattached.options_of(SimpleNamespace(adam_mini=None)) == OPTIONS
    row = AdamMiniConfig(preset="row")
    assert unattached.options_of(SimpleNamespace(adam_mini=row)) == row
    for other in ({"preset": "row"}, {}, "row"):
        with pytest.raises(TypeError, match=r"must be an AdamMiniConfig, .*\(\*\*dict\)"):
            unattached.options_of(SimpleNamespace(adam_mini=other))


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ("--adam-mini-prest first", "unrecognized arguments: --adam-mini-prest first"),
        ("--adam-mini-preset rows", "invalid choice: 'rows'"),
        ("--lr 1", "unrecognized arguments"),
        ("--adam-mini-stochastic-rounding", "exp_avg_dtype='bf16'"),
        ("--adam-mini-full-v '*.a", "ADAM_MINI_FLAGS=.* No closing quotation"),
    ],
)
def test_wrong_flags_in_the_environment_are_an_error(
    flags: str, text: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(unattached.VARIABLE, flags)
    with pytest.raises(ValueError, match=text):
        unattached.options_of_process()


def test_flags_in_the_environment_beside_those_of_the_command_line_are_an_error(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(unattached, "_kept", OPTIONS)
    monkeypatch.setenv(unattached.VARIABLE, " ")
    assert unattached.options_of_process() == OPTIONS
    monkeypatch.setenv(unattached.VARIABLE, "--adam-mini-preset row")
    with pytest.raises(ValueError, match=r"^ADAM_MINI_FLAGS='--adam-mini-preset row' .* unset"):
        unattached.options_of_process()


class FrameworksTrainer(Trainer):
    """Its optimizer's config is made by the framework."""

    def __init__(self, job: Job, config: Any) -> None:
        self.made = config
        super().__init__(job)

    def _build_optimizer(self) -> Any:
        from megatron.core.optimizer import get_megatron_optimizer

        return get_megatron_optimizer(config=self.made, model_chunks=self.chunks)


def options_of(config: Any) -> AdamMiniConfig:
    trainer = FrameworksTrainer(JOB, config)
    assert trainer.step(0)[0]
    (member,) = trainer.optimizer.chained_optimizers
    found: AdamMiniConfig = member.inner.config
    return found


def verl() -> AdamMiniConfig:
    """verl, SkyRL: a module named in the config is imported; then a config of keywords."""
    from megatron.core.optimizer import OptimizerConfig

    os.environ[unattached.VARIABLE] = "--adam-mini-preset first"
    importlib.import_module("megatron_adam_mini.mcore.workers")
    values: dict[str, Any] = {"optimizer": "adam_mini", "lr": 1e-3, "min_lr": 0.0, "clip_grad": 1.0}
    values |= {"bf16": True, "params_dtype": torch.bfloat16, "use_distributed_optimizer": True}
    values |= {"use_precision_aware_optimizer": True}  # override_optimizer_config
    return options_of(OptimizerConfig(**values))


def one_rank_is_started_with_wrong_flags() -> None:
    from megatron.core.optimizer import OptimizerConfig

    rank = distributed.get_rank()
    os.environ[unattached.VARIABLE] = f"--adam-mini-{'prest' if rank else 'preset'} first"
    importlib.import_module("megatron_adam_mini.mcore.workers")
    values: dict[str, Any] = {
        "optimizer": "adam_mini",
        "lr": 1e-3,
        "use_distributed_optimizer": True,
    }
    values |= {"bf16": True, "params_dtype": torch.bfloat16}
    FrameworksTrainer(JOB, OptimizerConfig(**values))


def test_wrong_flags_of_one_rank_are_an_error_on_all():
    with pytest.raises(RankError) as caught:
        run_ranks(2, one_rank_is_started_with_wrong_flags)
    assert caught.value.errors[0][0] == "RuntimeError"
    assert "rank 1 found ValueError: ADAM_MINI_FLAGS=" in caught.value.errors[0][1]
    assert caught.value.errors[1][0] == "ValueError"


def slime(hook: str) -> AdamMiniConfig:
    """slime, miles: one process parses the flags, others get the arguments and build of them."""
    from megatron.training.arguments import parse_args

    import megatron_adam_mini

    with megatron_adam_mini.register():  # the process that parses, by the launcher
        sys.argv = ["train.py", *["--optimizer", "adam_mini", "--adam-mini-preset", "first"]]
        sys.argv += [
            "--use-distributed-optimizer",
            "--bf16",
            "--lr",
            "1e-3",
            "--min-lr",
            "0",
            "--own",
            "flag",
        ]
        text = pickle.dumps(parse_args(ignore_unknown_args=True))
    args = pickle.loads(text)
    args.params_dtype = torch.bfloat16
    module, _, name = hook.rpartition(".")
    getattr(importlib.import_module(module), name)(args)
    from megatron.core.optimizer import OptimizerConfig

    fields = [field.name for field in dataclasses.fields(OptimizerConfig)]
    config = OptimizerConfig(
        **{name: getattr(args, name) for name in fields if hasattr(args, name)}
    )
    config.timers = None
    return options_of(config)


@pytest.mark.support("selection in frameworks that build Megatron's config", "test")
def test_a_module_that_is_imported_registers_and_options_are_in_the_environment():
    assert run_ranks(2, verl) == [AdamMiniConfig(preset="first", param_remainders=True)] * 2


@pytest.mark.support("selection in frameworks that build Megatron's config", "test")
def test_a_function_that_gets_the_arguments_keeps_the_options():
    found = run_ranks(2, slime, "megatron_adam_mini.mcore.workers.register_with")
    assert found == [AdamMiniConfig(preset="first")] * 2
