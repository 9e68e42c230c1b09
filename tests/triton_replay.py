"""Triton's kernels in its interpreter: each step launches the same; run by test_triton.py.

So a captured step would be right: what differs from step to step is read from memory.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

assert os.environ.get("TRITON_INTERPRET") == "1", "run by tests/test_triton.py"

from megatron_adam_mini.optimizer import AdamMini
from tests import triton_interpreter
from tests.recorded_step import record
from tests.warm_up import make_rank

triton_interpreter.install()

MODES = ["small state, bf16 gradients", "columns", "elementwise", "single phase"]


class Rank:
    """One rank, whose learning rate, weight decay, loss scale and gradients change in each step."""

    def __init__(self, mode: str) -> None:
        self.optimizer: AdamMini = make_rank(mode, "triton")
        self.inv_scale = torch.ones(1)
        for tensor in self.optimizer.main_params.attach().flat_tensors():
            tensor.zero_()
        self.options: dict[str, Any] = {}
        if not self.optimizer.config.single_phase:
            self.options = {"clip_grad": 1.0, "inv_scale": self.inv_scale}
        self.optimizer.warm_up(**self.options)

    def change(self, step: int) -> None:
        """Set what differs from step to step."""
        generator = torch.Generator().manual_seed(step)
        self.inv_scale.fill_(2.0**-step)
        for buffer in self.optimizer.buffers:
            buffer.grad.copy_(torch.randn(len(buffer.grad), generator=generator) * 2.0**step)
        for number, group in enumerate(self.optimizer.main_params.param_groups):
            group["lr"] = 1e-3 * (step + 1) * (number + 1)
            group["weight_decay"] = 0.1 / (step + 1)

    def bits(self) -> list[torch.Tensor]:
        """Return copies of the state and the weights."""
        tensors = self.optimizer.main_params.attach().flat_tensors()
        tensors += [buffer.weight for buffer in self.optimizer.buffers]
        return [tensor.clone().view(torch.int16) for tensor in tensors]


@pytest.mark.parametrize("mode", MODES)
def test_steps_launch_the_same_and_may_be_launched_again(mode: str) -> None:
    stepped, launched = Rank(mode), Rank(mode)
    recordings = []
    for step in range(3):
        for rank in (stepped, launched):
            rank.change(step)
        recordings.append(record(stepped.optimizer, **stepped.options))
        if step == 0:
            again = record(launched.optimizer, **launched.options)
        else:
            scalars, hyper = launched.optimizer.scalars, launched.optimizer.hyper
            hyper.write(scalars, scalars.grad_scale if launched.options else 1.0)
            again.launch_again()
        for rank in (stepped, launched):
            rank.optimizer.main_params.step_count += 1
        for found, expected in zip(launched.bits(), stepped.bits(), strict=True):
            assert torch.equal(found, expected), f"step {step}"
    first, second, third = (recording.described() for recording in recordings)
    assert len(first) > 3
    assert first == second == third
