"""A program's default dtype and device (``torch.set_default_...``) are not those of our tensors."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import megatron_adam_mini
from megatron_adam_mini import AdamMini
from tests.megatron_job import Job, Trainer
from tests.ranks import run_ranks
from tests.test_step import state_bits

PACKAGE = Path(megatron_adam_mini.__file__).parent
JOB = Job(layers=1, hidden=16, heads=2, groups=1, ffn=24, vocab=32, batch=8, bf16=True)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def test_tensors_are_made_with_a_dtype_and_a_device() -> None:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        on_cpus_only = path.parent.name in ("checkpoint", "convert")
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            makes = name in {f"torch.{kind}" for kind in ("zeros", "ones", "empty", "full")}
            is_complete = "dtype" in given and ("device" in given or on_cpus_only)
            if makes and not is_complete and given.get("device") != "'meta'":
                found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert not found


def train(job: Job, dtype: torch.dtype) -> tuple[list[Any], str]:
    """Train, and give the state away and take it back; only the optimizer sees the dtype."""

    class Lower(Trainer):
        def _build_optimizer(self) -> Any:
            with default_dtype(dtype):
                return super()._build_optimizer()

    trainer, reports = Lower(job), []
    for step in range(2):
        trainer.backward(step)
        with default_dtype(dtype):
            reports.append(trainer.optimizer.step())
    member = trainer.optimizer.member
    with default_dtype(dtype):
        member.load_parameter_state_from_dp_zero(member.get_parameter_state_dp_zero())
    return reports, state_bits(trainer)


@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_megatron_trains_the_same(fraction: float) -> None:
    offload = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": fraction}
    job = Job(**{**vars(JOB), "optimizer_args": offload if fraction else {}})
    (plain,) = run_ranks(1, train, job, torch.float32)
    (lower,) = run_ranks(1, train, job, torch.bfloat16)
    assert [updated for updated, _, _ in plain[0]] == [True, True]
    assert lower == plain


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_model_without_megatron_trains_the_same(device: str) -> None:
    def weights(dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4))
        data = torch.randn(16, 8)
        with default_dtype(dtype), torch.device(device):
            rules = {"*weight": "row", "*bias": "tensor"}
            optimizer = AdamMini(model.named_parameters(), lr=1e-2, rules=rules)
        for _ in range(3):
            model(data).square().mean().backward()
            with default_dtype(dtype), torch.device(device):
                optimizer.step()
            optimizer.zero_grad()
        return list(model.parameters())

    for plain, lower in zip(weights(torch.float32), weights(torch.bfloat16, device), strict=True):
        assert torch.equal(plain, lower)
