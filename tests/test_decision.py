"""Decisions of a step without Megatron: what callers may change, and when they may read."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_adam_mini.decision import Decision, Decisions
from megatron_adam_mini.kernels import select_backend

CPU = torch.device("cpu")


@pytest.fixture(params=["reference", "cpu"])
def decisions(request: pytest.FixtureRequest) -> Decisions:
    return Decisions(select_backend(request.param, CPU), CPU)


def sums(*rows: tuple[float, float]) -> Tensor:
    """Return squared norm and number of non-finite sums of each domain."""
    return torch.tensor(rows, dtype=torch.float64)


def test_clipping_may_change_from_step_to_step(decisions: Decisions) -> None:
    expected = {1.0: 1 / 5.000001, 0.0: 1.0, 10.0: 1.0, 2.5: 2.5 / 5.000001}
    for clip_grad, scale in expected.items():
        found = decisions.decide(sums((9.0, 0.0), (16.0, 0.0)), clip_grad=clip_grad)
        assert isinstance(found.grad_scale, Tensor)
        assert found.grad_scale.dtype == torch.float32
        assert float(found.grad_scale) == pytest.approx(scale, rel=1e-7)
        assert float(found.grad_scale_in_float64) == pytest.approx(scale, rel=1e-15)
        assert found.read() == (True, 5.0, False)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_loss_scale_is_taken_out_of_the_norm(decisions: Decisions, shape: tuple[int, ...]) -> None:
    inv_scale = torch.full(shape, 2.0**-10)
    found = decisions.decide(sums((2.0**22, 0.0)), inv_scale=inv_scale, clip_grad=1.0)
    assert float(found.grad_scale) == pytest.approx(2.0**-10 / 2.000001, rel=1e-7)
    assert found.read() == (True, 2.0, False)


@pytest.mark.parametrize(
    ("rows", "options", "outcome"),
    [
        ([(1.0, 1.0)], {}, (False, 1.0, True)),
        ([(1.0, 0.0), (math.inf, 1.0)], {}, (False, math.inf, True)),
        ([(9.0, 0.0)], {"skip_threshold": 2.0}, (False, 3.0, False)),
        ([(9.0, 0.0)], {"skip_threshold": 3.0}, (True, 3.0, False)),
        ([(2.0**126, 0.0)], {}, (True, 2.0**63, False)),
        ([(2.0**127, 0.0)], {}, (False, 2.0**63.5, True)),
        ([(2.0**126, 0.0)], {"clip_grad": 0.5}, (False, 2.0**63, True)),
    ],
)
def test_skipped_steps(
    decisions: Decisions,
    rows: list[tuple[float, float]],
    options: dict[str, float],
    outcome: tuple[bool, float, bool],
) -> None:
    found = decisions.decide(sums(*rows), **options)
    assert math.isfinite(float(found.grad_scale)) == outcome[0]
    assert found.read() == outcome
    assert found.in_doubt == outcome[2]


def test_without_sums_the_step_is_taken_as_it_is() -> None:
    found = Decision()
    assert found.grad_scale == 1.0
    assert found.read() == (True, None, False)


def test_a_decision_is_read_before_the_next_one_is_made(decisions: Decisions) -> None:
    read, unread, last = (decisions.decide(sums((4.0, 0.0))) for _ in range(3))
    for late in (read, unread):
        with pytest.raises(RuntimeError, match="call read\\(\\) or finish\\(\\)"):
            late.read()
    kept = last.read()
    decisions.decide(sums((9.0, 0.0)))
    assert last.read() == kept == (True, 2.0, False)


class FakeEvent:
    """Counts what is asked of it."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def record(self, _: Any) -> None:
        self.calls.append("record")

    def synchronize(self) -> None:
        self.calls.append("synchronize")


def test_on_a_gpu_it_is_copied_at_once_and_only_the_copy_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decisions, event = Decisions(select_backend("reference", CPU), CPU), FakeEvent()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    monkeypatch.setattr(decisions, "_on_host", torch.zeros(3, dtype=torch.float64))
    monkeypatch.setattr(decisions, "_copied", event)
    found = decisions.decide(sums((4.0, 0.0)))
    assert event.calls == ["record"]
    decisions.values_3.fill_(math.nan)  # nothing of the device is read any more
    assert [found.read() for _ in range(2)] == [(True, 2.0, False)] * 2
    assert event.calls == ["record", "synchronize"]
