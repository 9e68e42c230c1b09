"""Finite gradients whose squares overflow float32, and gradients that are not finite.

Gradients are written into Megatron's buffers: they are the same in every layout, and no model
must produce them. The oracle of ``reference.py`` is float64, where nothing here overflows.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.gather import Part, nearest_bfloat16, slices_of, weights_of, whole_tensors
from tests.megatron_job import Job, Trainer, global_names, shard_of, whole_shape
from tests.ranks import run_ranks
from tests.reference import WholeTensorAdamMini
from tests.test_oracle import BETAS, decay_of, labels_of
from tests.test_step import phases, state_bits

# Float32 state against float64 after one step: a few roundings of 6e-8 each. Of v and m relative to
# each element: beside huge values, small ones must stay right.
TOLERANCE = 2e-6
# Elements of m near zero, where two terms of about 1e-4 cancel.
M_ATOL = 1e-10
# Float32 AdamW against float32 Adam-mini with one block per element, two steps.
STOCK_TOLERANCE = 1e-5
# Megatron's norm: float32 throughout.
NORM_TOLERANCE = 2e-6

SMALL = Job(
    layers=1, hidden=32, heads=4, groups=2, ffn=48, vocab=64, bias=True, overlap=True,
    bucket_size=1000,
)  # fmt: skip
INF, NAN = math.inf, math.nan


@dataclass(frozen=True)
class Grads:
    """Normal noise of this size, all the same in every layout; one element may be another value."""

    size: float = 1e-3
    at: str = ""  # part of the name of the parameter with that element
    value: float = 0.0

    def whole(self, name: str, shape: tuple[int, ...]) -> Tensor:
        seed = sum(name.encode()) * 1009 + len(name)
        grad = self.size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        if self.at and self.at in name:
            grad.view(-1)[5] = self.value
        return grad


NORMAL = Grads()


def write(trainer: Trainer, grads: Grads) -> None:
    """Write gradients, times the loss scale, where the reduction of all ranks would leave them."""
    from megatron.core import parallel_state

    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    scale = float(trainer.optimizer.get_loss_scale())
    for name, param in global_names(trainer.chunks).items():
        whole = grads.whole(name, whole_shape(name, param, trainer.job)) * scale
        param.main_grad.copy_(shard_of(name, whole, param, trainer.job, tp_rank))


def in_turn(function: Any, *calls: tuple[Any, ...]) -> list[Any]:
    """Call a function several times in one rank, each time with new process groups."""
    from megatron.core import parallel_state

    found = []
    for args in calls:
        found.append(function(*args))
        parallel_state.destroy_model_parallel()
    return found


# Against the oracle.


@dataclass(frozen=True)
class Case:
    """One step with some gradients, after and before a step with normal ones."""

    grads: Grads
    clip: float
    taken: bool = True


FC1, BIAS = "linear_fc1.weight", "linear_qkv.bias"
CASES = {
    "normal": Case(NORMAL, 0.0),
    "normal, clipped": Case(NORMAL, 0.01),
    "everywhere, sums fit": Case(Grads(1e15), 0.0),
    "everywhere": Case(Grads(3e18), 0.0),
    # Sums of 32 squares fit, but the square of the clipping factor has few bits in float32.
    "everywhere, sums fit, clipped": Case(Grads(2e18), 1.0),
    "everywhere, clipped": Case(Grads(1e25), 1.0),
    "everywhere, sums fit, clipped to little": Case(Grads(8e16), 0.01),
    # The mean of the squares of 32 elements is 3.1e38.
    "one element, its block's mean fits": Case(Grads(at=FC1, value=1e20), 0.0),
    "one element, clipped": Case(Grads(at=FC1, value=1e30), 1.0),
    "one element with v of its own": Case(Grads(at=BIAS, value=1.8e19), 0.0),
    "almost the largest float32": Case(Grads(3e37), 100.0),
    "v does not fit": Case(Grads(1e20), 0.0, taken=False),
    "v of one block does not fit": Case(Grads(at=FC1, value=1.1e20), 0.0, taken=False),
    "v of one element does not fit": Case(Grads(at=BIAS, value=1.9e19), 0.0, taken=False),
    "the clipping factor does not fit": Case(Grads(1e36), 1.0, taken=False),
}


def all_cases(job: Job, by_phases: bool = False) -> dict[str, Any]:
    """Return, for each case, the state before and after its two steps, and their outcomes."""
    trainer = Trainer(job)
    optimizer = trainer.optimizer
    write(trainer, NORMAL)
    optimizer.step()
    trainer.sync_params()
    wide_sums = []
    measure = optimizer.inner.sum_squares_in_float64

    def counted() -> Any:
        wide_sums.append(1)
        return measure()

    optimizer.inner.sum_squares_in_float64 = counted
    tensors = optimizer.inner.main_params.attach().flat_tensors()
    tensors += [buffer.param_data for chunk in trainer.chunks for buffer in chunk.buffers]
    saved = [tensor.clone() for tensor in tensors]
    found = {}
    for name, case in CASES.items():
        for tensor, value in zip(tensors, saved, strict=True):
            tensor.copy_(value)
        optimizer.inner.main_params.step_count = 1
        optimizer.config.clip_grad = case.clip
        steps: list[Any] = [(None, slices_of(trainer), weights_of(trainer), None)]
        for grads in (case.grads, NORMAL):
            write(trainer, grads)
            wide_sums.clear()
            outcome = phases(trainer, case.clip) if by_phases else optimizer.step()
            trainer.sync_params()
            steps.append((outcome, slices_of(trainer), weights_of(trainer), len(wide_sums)))
        found[name] = steps, state_bits(trainer)
    return found


LAYOUTS = {
    "1 rank": (SMALL, 1),
    "1 rank, reference": (replace(SMALL, adam_mini={"backend": "reference"}), 1),
    "dp2, bf16, remainders, loss scale, no overlap": (
        replace(
            SMALL, bf16=True, overlap=False, adam_mini={"param_remainders": True},
            optimizer_args={"loss_scale": 64.0},
        ),
        2,
    ),
    "tp2-dp2": (replace(SMALL, tp=2), 4),
    # a column of gate, and of up, has 32 elements as a row does
    "tp2, columns": (replace(SMALL, tp=2, ffn=32, adam_mini={"preset": "slim"}), 2),
}  # fmt: skip


@pytest.mark.support("gradients beyond float32's squares", "oracle")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_equal_the_oracle(layout: str) -> None:
    job, world = LAYOUTS[layout]
    ranks = run_ranks(world, all_cases, job)
    for name, case in CASES.items():
        if "loss scale" in layout and "almost" in name:
            continue  # times the scale it is Inf
        steps = [
            (
                [rank[name][0][step][0] for rank in ranks],
                whole_state([rank[name][0][step][1] for rank in ranks], job),
                whole_tensors([rank[name][0][step][2] for rank in ranks], "weight", job),
                {rank[name][0][step][3] for rank in ranks},
            )
            for step in range(3)
        ]
        count, before = 1, steps[0][1]
        for grads, taken, (outcomes, after, weights, wide) in zip(
            (case.grads, NORMAL), (case.taken, True), steps[1:], strict=True
        ):
            what = f"{name}, {grads}"
            assert wide == {0} or grads != NORMAL, "normal steps must not take the slow path"
            assert {outcome[0] for outcome in outcomes} == {taken}, what
            norm, expected = oracle_step(before, grads, case.clip, count, job)
            assert {outcome[1] for outcome in outcomes} == {outcomes[0][1]}
            assert outcomes[0][1] == pytest.approx(norm, rel=NORM_TOLERANCE), what
            count += taken
            compare(after, expected if taken else before, what)
            for parameter, weight in weights.items():
                master = after["param"][parameter]
                rounded = nearest_bfloat16(master) if job.bf16 else master
                assert torch.equal(weight, rounded), f"{what}: weights of {parameter}"
            before = after


def whole_state(ranks: list[list[Part]], job: Job) -> dict[str, dict[str, Tensor]]:
    return {key: whole_tensors(ranks, key, job) for key in ("param", "exp_avg", "v")}


def oracle_step(
    state: dict[str, dict[str, Tensor]], grads: Grads, clip: float, count: int, job: Job
) -> tuple[float, dict[str, dict[str, Tensor]]]:
    """Return the norm, and the state after one step in float64."""
    given = {n: grads.whole(n, tuple(p.shape)).double() for n, p in state["param"].items()}
    norm = math.sqrt(sum(float(grad.square().sum()) for grad in given.values()))
    scale = min(1.0, clip / (norm + 1e-6)) if clip > 0.0 else 1.0
    after: dict[str, dict[str, Tensor]] = {"param": {}, "exp_avg": {}, "v": {}}
    for name, param in state["param"].items():
        oracle = WholeTensorAdamMini(param, labels_of(name, tuple(param.shape), job))
        oracle.exp_avg = state["exp_avg"][name].double()
        oracle.v[oracle.labels] = state["v"][name].double().reshape(-1)
        oracle.t = count
        decay = decay_of(tuple(param.shape), job)
        oracle.step(given[name] * scale, lr=job.lr, weight_decay=decay, **BETAS)
        after["param"][name], after["exp_avg"][name] = oracle.param, oracle.exp_avg
        after["v"][name] = oracle.v_of_elements()
    return norm, after


def compare(found: dict[str, dict[str, Tensor]], expected: Any, what: str) -> None:
    for key, atol in (("param", TOLERANCE), ("exp_avg", M_ATOL), ("v", 0.0)):
        for name, value in expected[key].items():
            assert torch.isfinite(found[key][name]).all(), f"{what}: {key} of {name}"
            np.testing.assert_allclose(
                found[key][name].double(), value.double(), rtol=TOLERANCE, atol=atol,
                err_msg=f"{what}: {key} of {name}",
            )  # fmt: skip


def test_phase_by_phase_equals_one_step_bit_for_bit() -> None:
    job = replace(SMALL, tp=2, bf16=True, optimizer_args={"loss_scale": 64.0})
    for at_once, by_phases in run_ranks(2, in_turn, all_cases, (job, False), (job, True)):
        for name in CASES:
            assert at_once[name][1] == by_phases[name][1], name
            for mine, other in zip(at_once[name][0], by_phases[name][0], strict=True):
                assert mine[0] == other[0], name


# Sums of a block that fit on each rank, but not together.


def cut_overflow(job: Job, size: float) -> tuple[Any, list[bool]]:
    trainer = Trainer(replace(job, clip_grad=0.0))
    for name, param in global_names(trainer.chunks).items():
        param.main_grad.fill_(size if "linear_proj.weight" in name else 1e-3)
    outcome = trainer.optimizer.step()
    inner = trainer.optimizer.inner
    tensors = inner.main_params.attach().flat_tensors()
    return outcome, [bool(torch.isfinite(tensor).all()) for tensor in tensors]


def test_sums_that_overflow_only_over_all_ranks() -> None:
    # A row of linear_proj has 16 elements on each of two ranks: 16 * 4e18^2 = 2.6e38 fits.
    for outcome, finite in run_ranks(2, cut_overflow, replace(SMALL, tp=2), 4e18):
        assert outcome[0]
        assert outcome[1] == pytest.approx(4e18 * 32, rel=NORM_TOLERANCE)
        assert all(finite)


def expert_overflow(job: Job) -> tuple[Any, bool]:
    """Take a step in which only v of one expert does not fit; return whether weights changed."""
    trainer = Trainer(job)
    for name, param in global_names(trainer.chunks).items():
        param.main_grad.fill_(1e20 if ".experts." in name and ".1." in name else 1e-3)
    before = state_bits(trainer)
    return trainer.optimizer.step(), state_bits(trainer) != before


@pytest.mark.parametrize("distributed_optimizer", [True, False])
def test_all_ranks_skip_the_step_if_v_of_one_expert_does_not_fit(
    distributed_optimizer: bool,
) -> None:
    job = replace(
        SMALL, experts=2, ep=2, bias=False, clip_grad=0.0,
        distributed_optimizer=distributed_optimizer,
    )  # fmt: skip
    for (updated, norm, _), changed in run_ranks(2, expert_overflow, job):
        assert (updated, changed) == (False, False)
        assert norm > 1e20


# Against Megatron's Adam.


def stock_steps(job: Job, grads: Grads) -> Any:
    """Take a normal step, one with these gradients, a normal one; return what can be compared."""
    trainer = Trainer(job)
    record = []
    for given in (NORMAL, grads, NORMAL):
        write(trainer, given)
        updated, norm, _ = trainer.optimizer.step()
        trainer.sync_params()
        weights = [p.detach().float().clone() for p in global_names(trainer.chunks).values()]
        state = torch.optim.Optimizer.state_dict(trainer.optimizer.chained_optimizers[0].optimizer)
        moments = [torch.isfinite(s[k]).all() for s in state["state"].values()
                   for k in ("exp_avg", "exp_avg_sq")]  # fmt: skip
        record.append(
            (
                updated,
                norm,
                float(trainer.optimizer.get_loss_scale()),
                weights,
                bool(torch.stack(moments).all()),
            )
        )
    return record


UNCLIPPED = replace(SMALL, clip_grad=0.0, overlap=False)
CLIPPED = replace(UNCLIPPED, clip_grad=1.0)
SCALED = replace(
    CLIPPED, fp16=True,
    optimizer_args={"initial_loss_scale": 1024.0, "hysteresis": 1, "loss_scale_window": 1},
)  # fmt: skip
ONE_1E20, ONE_NAN = Grads(at=FC1, value=1e20), Grads(at=FC1, value=NAN)
COMPARED = [
    (UNCLIPPED, Grads(1e16)),
    (UNCLIPPED, Grads(4e18)),
    (UNCLIPPED, ONE_1E20),
    (UNCLIPPED, ONE_NAN),
    *((CLIPPED, Grads(size)) for size in (0.0, 1e13, 1e18)),
    *((SCALED, Grads(at=FC1, value=value)) for value in (1e16, 1e34, INF)),
]


@pytest.fixture(scope="module")
def both() -> Any:
    """Return the records of Adam-mini with one block per element, and of Megatron's Adam."""
    calls = [
        (replace(job, optimizer=optimizer, adam_mini={"full_v": ("*",)}), grads)
        for job, grads in COMPARED
        for optimizer in ("adam_mini", "adam")
    ]
    (found,) = run_ranks(1, in_turn, stock_steps, *calls)

    def records(job: Job, grads: Grads) -> tuple[Any, Any]:
        first = 2 * COMPARED.index((job, grads))
        return found[first], found[first + 1]

    return records


@pytest.mark.parametrize("size", [1e16, 4e18])
def test_without_clipping_it_decides_as_megatrons_adam(size: float, both: Any) -> None:
    ours, stock = both(UNCLIPPED, Grads(size))
    for mine, theirs in zip(ours, stock, strict=True):
        assert mine[0] is theirs[0] is True
        if math.isfinite(theirs[1]):
            assert mine[1] == pytest.approx(theirs[1], rel=NORM_TOLERANCE)
        for a, b in zip(mine[3], theirs[3], strict=True):
            np.testing.assert_allclose(a, b, rtol=STOCK_TOLERANCE, atol=STOCK_TOLERANCE * 1e-3)
    # Megatron's norm overflows; ours is that of the gradients.
    assert math.isinf(stock[1][1]) == (size > 1e17)
    assert math.isfinite(ours[1][1])


def test_where_megatrons_adam_gets_an_infinite_v_the_step_is_skipped(both: Any) -> None:
    ours, stock = both(UNCLIPPED, ONE_1E20)
    assert [(mine[0], mine[4]) for mine in ours] == [(True, True), (False, True), (True, True)]
    assert ours[1][1] == pytest.approx(1e20, rel=NORM_TOLERANCE)
    # That element of Megatron's Adam has v = Inf from then on, and never moves again.
    assert [(theirs[0], theirs[4]) for theirs in stock] == [
        (True, True), (True, False), (True, False),
    ]  # fmt: skip


def test_megatrons_adam_without_a_loss_scale_writes_nan(both: Any) -> None:
    ours, stock = both(UNCLIPPED, ONE_NAN)
    assert stock[1][0]
    assert any(weight.isnan().any() for weight in stock[1][3])
    assert (ours[1][0], ours[1][1]) == (False, None)
    assert all(map(torch.equal, ours[1][3], ours[0][3]))


def test_megatrons_clipping_by_an_infinite_norm_is_a_step_without_gradients(both: Any) -> None:
    ours, stock = both(CLIPPED, Grads(1e18))
    _, without = both(CLIPPED, Grads(0.0))
    assert ours[1][0] is stock[1][0] is True
    assert math.isinf(stock[1][1])
    for a, b in zip(stock[1][3], without[1][3], strict=True):
        assert torch.equal(a, b)
    assert not all(map(torch.equal, ours[1][3], stock[1][3]))
    # Ours clips by the true norm: as Megatron's Adam does with smaller gradients.
    for mine, theirs in zip(ours, both(CLIPPED, Grads(1e13))[1], strict=True):
        for a, b in zip(mine[3], theirs[3], strict=True):
            np.testing.assert_allclose(a, b, rtol=STOCK_TOLERANCE, atol=STOCK_TOLERANCE * 1e-3)


@pytest.mark.parametrize(("value", "finite"), [(1e16, True), (1e34, True), (INF, False)])
def test_only_inf_and_nan_lower_the_loss_scale(value: float, finite: bool, both: Any) -> None:
    ours, stock = both(SCALED, Grads(at=FC1, value=value))
    assert [mine[2] for mine in ours] == [theirs[2] for theirs in stock]
    assert (ours[1][2] > 1024.0) == finite
    assert [mine[0] for mine in ours] == [theirs[0] for theirs in stock] == [True, finite, True]
    assert all(mine[4] for mine in ours)


# What is logged.


def messages(job: Job, grads: Grads) -> tuple[Any, bool, list[str]]:
    trainer = Trainer(job)
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_adam_mini").addHandler(handler)
    for _ in range(2):
        write(trainer, grads)
        before = state_bits(trainer)
        outcome = trainer.optimizer.step()
    logging.getLogger("megatron_adam_mini").removeHandler(handler)
    return outcome, state_bits(trainer) == before, found


LOGGED = {
    "v does not fit": (Grads(at="layers.0.mlp.linear_fc1.bias", value=1e20), 0.0, False),
    "the factor does not fit": (Grads(3e37), 1.0, False),
    "taken": (Grads(at=FC1, value=1e20), 1.0, True),
    "not finite": (Grads(at="layers.0.mlp.linear_fc1.bias", value=NAN), 1.0, False),
}


@pytest.fixture(scope="module")
def logged() -> dict[str, Any]:
    calls = [
        (replace(SMALL, overlap=False, clip_grad=clip), grads) for grads, clip, _ in LOGGED.values()
    ]
    ranks = run_ranks(2, in_turn, messages, *calls)
    return dict(zip(LOGGED, zip(*ranks, strict=True), strict=True))


@pytest.mark.parametrize("case", LOGGED)
def test_what_happened_is_logged_once_with_the_parameter(case: str, logged: Any) -> None:
    grads, _, taken = LOGGED[case]
    (outcome, _, first), _ = logged[case]
    for same, unchanged, found in logged[case]:
        assert same == outcome
        assert unchanged is not taken
        assert len(found) <= 1, "once, in two steps"
    assert outcome[0] is taken
    assert len(first) == 1, "rank 0 says it"
    texts = " ".join(text for *_, found in logged[case] for text in found)
    if case == "not finite":
        assert outcome == (False, None, None)
        assert "skipping a step: non-finite gradients" in texts
    else:
        assert "gradients are finite" in texts
        assert f"{outcome[1]:.3g}" in texts
    assert ("decoder.layers.0.mlp.linear_fc1.bias" in texts) == grads.at.endswith("bias")
    assert ("skipping" in texts) is not taken


def test_the_threshold_for_norms_comes_first() -> None:
    job = replace(SMALL, overlap=False, optimizer_args={"grad_norm_skip_threshold": 1e6})
    ((outcome, unchanged, found),) = run_ranks(1, messages, job, Grads(1e25))
    assert not outcome[0]
    assert outcome[1] > 1e26
    assert unchanged
    assert all("exceeds grad_norm_skip_threshold" in text for text in found)
