"""README's ways in, one for each audience, executed: only sizes and others' scripts differ."""

from __future__ import annotations

import importlib
import os
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from megatron_adam_mini import AdamMiniConfig, cli
from tests.ranks import run_ranks
from tests.training_run import MODEL

ROOT = Path(__file__).resolve().parents[1]
#: In the place of "your own flags".
FLAGS = "--mock-data --global-batch-size 2 --train-iters 1 --lr 1e-3 --lr-decay-style constant"


def ways() -> dict[str, list[str]]:
    """Return the lines of each audience's code."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("## Where you come from\n")[1].split("\n## ")[0].split("Adam-mini ([")[0]
    found = re.findall(r"\*\*(.+?)\*\*:.*?\n\n```\w+\n(.*?)```", section, re.DOTALL)
    return {audience: code.splitlines() for audience, code in found}


def commands(audience: str) -> list[list[str]]:
    """Return the words of each command; without the comment, continued lines as one."""
    text = "\n".join(ways()[audience]).replace("\\\n", "")
    return [shlex.split(line.removeprefix("$ "), comments=True) for line in text.splitlines()]


def test_each_audience_has_six_lines_at_most():
    assert list(ways()) == ["Megatron-LM", "Megatron-Bridge", "RL frameworks", "Plain PyTorch"]
    assert all(0 < len(lines) <= 6 for lines in ways().values())


def pretrain(arguments: list[str]) -> str:
    from megatron.training import get_args

    from megatron_adam_mini import launch

    launch.main(["--cpu-host", *arguments])
    return str(get_args().optimizer)


def test_megatron_lm(capsys: Any):
    memory, training = commands("Megatron-LM")
    assert memory[0] == "megatron-adam-mini"
    assert cli.main(memory[1:]) in (0, None)
    assert "adam_mini" in capsys.readouterr().out.lower().replace("-", "_")
    assert training[0] == "torchrun"
    module = training.index("-m")
    assert training[module + 1] == "megatron_adam_mini.launch"
    arguments = " ".join(training[module + 2 :]).replace("...", f"{MODEL} {FLAGS}").split()
    assert arguments[0] == "pretrain_gpt.py"
    arguments[0] = str(ROOT / "examples/pretrain_llama.py")
    assert run_ranks(2, pretrain, arguments) == ["adam_mini"] * 2


def recipe(code: str) -> None:
    from megatron_adam_mini.mcore.bridge import AdamMiniOptimizerConfig
    from tests.test_bridge import JOB, BridgeTrainer, recipes_config

    cfg = SimpleNamespace(optimizer=recipes_config(JOB))
    exec(code, {"cfg": cfg})
    assert type(cfg.optimizer) is AdamMiniOptimizerConfig
    cfg.optimizer.finalize()
    assert BridgeTrainer(JOB, cfg.optimizer).step(0)[0]


def test_megatron_bridge():
    from tests.test_bridge import with_double

    run_ranks(1, with_double, recipe, "\n".join(ways()["Megatron-Bridge"]))


def worker(variable: str, module: str, optimizer: str) -> AdamMiniConfig:
    from megatron.core.optimizer import OptimizerConfig

    from tests.test_selection_in_frameworks import options_of

    name, _, value = variable.partition("=")
    os.environ[name] = value
    importlib.import_module(module)
    bf16 = {"bf16": True, "params_dtype": torch.bfloat16, "use_distributed_optimizer": True}
    return options_of(OptimizerConfig(optimizer=optimizer, lr=1e-3, min_lr=0.0, **bf16))


def test_rl_frameworks():
    """What verl does with these two values; verl is not installed."""
    export, command = commands("RL frameworks")
    assert export[0] == "export"
    given = dict(word.split("=") for word in command if "=" in word)
    module = given["actor_rollout_ref.model.external_lib"]
    optimizer = given["actor_rollout_ref.actor.optim.optimizer"]
    found = run_ranks(1, worker, export[1], module, optimizer)
    assert found == [AdamMiniConfig(param_remainders=True)]


def test_plain_pytorch():
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1))
    scope: dict[str, Any] = {"model": model}
    exec("\n".join(ways()["Plain PyTorch"]), scope)
    losses = []
    for _ in range(20):
        loss = model(torch.eye(4)).square().mean()
        scope["optimizer"].zero_grad()
        loss.backward()
        scope["optimizer"].step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
