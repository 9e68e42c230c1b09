"""m in 8 bits: codes against torch's own type, the mean of their noise, whole runs, checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_adam_mini import rounding
from megatron_adam_mini.config import CHECKPOINT_FORMATS, AdamMiniConfig
from megatron_adam_mini.kernels import BufferTensors, cpu, reference
from tests.gather import slices_of, whole_tensors
from tests.megatron_job import Job, Trainer, global_names
from tests.ranks import run_ranks
from tests.reference import WholeTensorAdamMini
from tests.test_checkpoint import BASE, compare, load, load_and_show, save, train_and_save
from tests.test_kernels import assert_equal_bits, one_segment, scalars_of, vectors_of
from tests.test_oracle import BETAS, SAME_GRADIENT_TOLERANCE, assert_close, decay_of, labels_of
from tests.test_step import digest

CODES = torch.arange(256, dtype=torch.uint8)
#: What codes stand for, by torch's own type; 0x7F and 0xFF are NaN.
VALUES = CODES.view(torch.float8_e4m3fn).float()
GRID = VALUES[:127].double()
SCALES = [2.0**k for k in (-64, -63, -20, -1, 0, 1, 7, 63, 64)]
#: All noises.
NOISE = torch.arange(2**16)

FP8 = {"exp_avg_dtype": "fp8"}
SHARDED = Job(tp=2, overlap=True, bucket_size=3000, steps=4, bf16=True, tied=True, bias=True)


def gap_of(ratio: Tensor) -> Tensor:
    """Return the distance of the codes on both sides of values that are not negative."""
    above = torch.searchsorted(GRID, ratio.double(), right=True).clamp(max=126)
    return GRID[above] - GRID[above - 1]


# The codes.


@pytest.mark.parametrize("scale", SCALES)
def test_every_code_comes_back(scale: float) -> None:
    found = rounding.from_fp8(CODES, torch.tensor(scale))
    nan = VALUES.isnan()
    assert torch.equal(found[~nan].double(), VALUES[~nan].double() * scale), "not exact in float32"
    assert found[nan].isnan().all()
    one = torch.tensor(scale)
    for code in (
        rounding.to_fp8(found, one),
        rounding.to_fp8_stochastic(found, one, torch.tensor(0)),
        rounding.to_fp8_stochastic(found, one, torch.tensor(2**16 - 1)),
    ):
        assert torch.equal(code[~nan], CODES[~nan])
        assert (code[nan] & 0x7F == 0x7F).all()


def test_scales_are_the_largest_powers_of_two_that_roots_of_v_reach() -> None:
    v = torch.logspace(-37, 38, 5000, dtype=torch.float64).float()
    v = torch.cat([v, 2.0 ** torch.arange(-126.0, 128), (4.0 ** torch.arange(64)).nextafter(v[:1])])
    scale, root = rounding.fp8_scale(v).double(), v.double().sqrt()
    assert ((scale <= root) & (root < 2 * scale)).all()
    assert (torch.frexp(scale)[0] == 0.5).all()
    special = torch.tensor([0.0, 1e-45, float("inf"), float("nan")])
    assert rounding.fp8_scale(special).tolist() == [2.0**-64, 2.0**-64, 2.0**64, 2.0**64]


def test_the_mean_over_all_noises_is_the_value() -> None:
    """But for 1 part in 2**16 of the distance between two codes: noise has 16 bits."""
    generator = torch.Generator().manual_seed(1)
    exponent = torch.randint(-14, 9, (60,), generator=generator)
    value = (1 + torch.rand(60, generator=generator)) * 2.0**exponent
    value = torch.cat([value, GRID[[1, 7, 8, 126]].float(), torch.tensor([447.9, 2.0**-9 / 3])])
    one = torch.ones(())
    for sign in (1, -1):
        code = rounding.to_fp8_stochastic(sign * value[:, None], one, NOISE)
        found = rounding.from_fp8(code, one).double()
        inside = value < 448
        gap = gap_of(value)
        assert ((found - sign * value[:, None]).abs() < gap[:, None])[inside].all()
        bias = found.mean(dim=1) - sign * value.double()
        assert (bias.abs() <= gap * 2.0**-16)[inside].all()


@pytest.mark.parametrize("seen", [1.0, 0.05])
def test_codes_alone_add_little_to_the_norm_of_m(seen: float) -> None:
    """Rows with gradients in a share of the steps, as embeddings have, against a float32 m."""
    generator = torch.Generator().manual_seed(3)
    rows, columns, beta1, beta2 = 128, 32, 0.9, 0.95
    v, m, codes = torch.zeros(rows, 1), torch.zeros(rows, columns), torch.zeros(rows, columns)
    squares = torch.zeros(2)
    for _ in range(300):
        grad = torch.randn(rows, columns, generator=generator)
        grad *= torch.rand(rows, 1, generator=generator) < seen
        before = rounding.fp8_scale(v)
        v = beta2 * v + (1 - beta2) * grad.square().mean(dim=1, keepdim=True)
        m = beta1 * m + (1 - beta1) * grad
        decoded = rounding.from_fp8(codes.to(torch.uint8), before)
        noise = torch.randint(2**16, m.shape, generator=generator)
        scale = rounding.fp8_scale(v)
        codes = rounding.to_fp8_stochastic(beta1 * decoded + (1 - beta1) * grad, scale, noise)
        squares += torch.stack([m.square().sum(), rounding.from_fp8(codes, scale).square().sum()])
    assert 1 < (squares[1] / squares[0]).sqrt() < 1.006


def test_the_nearest_code_is_torchs_and_too_large_values_stay_the_largest() -> None:
    value = torch.randn(10_000, generator=torch.Generator().manual_seed(2)) * 60
    own = value.to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(rounding.to_fp8(value, torch.ones(())), own)
    large = torch.tensor([448.0, 449.0, 1e6, 3e38, float("inf"), float("nan")])
    for scale in (1.0, 2.0**-64):
        for found in (
            rounding.to_fp8(large, torch.tensor(scale)),
            rounding.to_fp8_stochastic(large, torch.tensor(scale), torch.tensor(2**16 - 1)),
        ):
            assert (found & 0x7F).tolist() == [126, 126, 126, 126, 127, 127]


def test_the_cpp_kernels_read_and_write_every_code() -> None:
    """All pairs of codes and scales; values of all exponents, special ones among them."""
    exponents = torch.arange(0, 256) << 23
    bits = torch.cat([exponents, exponents + 0x412345, exponents + 0x7FFFFF])
    values = torch.cat([bits, bits - 2**31]).to(torch.int32).view(torch.float32)
    scalars = scalars_of(grad_scale=1.0)
    for before in (2.0**-64, 2.0**-3, 2.0**64):
        for after in (2.0**-64, 1.0, 2.0**64):
            grad = torch.cat([torch.zeros(256), values])
            codes = torch.cat([CODES, torch.zeros(len(values), dtype=torch.uint8)])
            n, found = len(grad), []
            vectors = vectors_of(
                1,
                step_size_S=torch.ones(1),
                origin_SR=torch.tensor([12345], dtype=torch.int32),
                exp_avg_scale_S2=torch.tensor([[before, after]]),
            )
            for backend in (cpu, reference):
                tensors = BufferTensors(torch.zeros(n), codes.clone(), None, grad)
                backend.update_(tensors, one_segment(n), vectors, scalars)
                param = torch.where(tensors.param.isnan(), torch.nan, tensors.param)
                found.append((param, tensors.exp_avg))
            assert_equal_bits(*found)


def test_small_numbers_survive_where_processors_flush_subnormal_ones() -> None:
    """Neither small codes nor small float16 gradients may pass through subnormal float32."""
    halves = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16)
    scalars, n = scalars_of(grad_scale=1.0), len(halves)
    vectors = vectors_of(
        1,
        step_size_S=torch.ones(1),
        origin_SR=torch.zeros(1, dtype=torch.int32),
        exp_avg_scale_S2=torch.ones(1, 2),
    )
    found = []
    for flush in (False, True):
        tensors = BufferTensors(torch.zeros(n), CODES[:127].repeat(n)[:n].clone(), None, halves)
        if not torch.set_flush_denormal(flush):
            pytest.skip("this processor cannot flush subnormal numbers")
        try:
            cpu.update_(tensors, one_segment(n), vectors, scalars)
        finally:
            torch.set_flush_denormal(False)
        found.append((tensors.param, tensors.exp_avg))
    assert_equal_bits(*found)


def test_options_that_name_8_bits() -> None:
    assert AdamMiniConfig(exp_avg_dtype="fp8").stochastic_rounding
    with pytest.raises(ValueError, match=r"Nearest to int8 \(--exp-avg-dtype\) is fp8"):
        AdamMiniConfig(exp_avg_dtype="int8")


# Runs.


def stepwise(job: Job) -> dict[str, Any]:
    """Return state before each step and after the last, and gradients of each."""
    trainer = Trainer(job)
    states, grads = [slices_of(trainer)], []
    for step in range(job.steps):
        trainer.backward(step)
        grads.append(slices_of(trainer, grads_only=True))
        assert trainer.optimizer.step()[0]
        states.append(slices_of(trainer))
    trainer.sync_params()
    return {
        "states": states,
        "grads": grads,
        "losses": trainer.losses,
        "bytes": trainer.optimizer.state_bytes(),
        "numel": sum(len(p.values["param"]) for p in states[0]),
    }


@pytest.mark.support("m in 8 bits", "oracle")
@pytest.mark.parametrize(
    ("job", "world"),
    [
        (replace(SHARDED, adam_mini=FP8 | {"param_remainders": True}), 4),
        (replace(SHARDED, tp=1, tied=False, adam_mini=FP8 | {"preset": "slim"}), 2),
    ],
    ids=["TP2 x DP2, remainders", "DP2, columns and elements"],
)
def test_each_step_is_the_oracles_and_m_one_of_two_codes(job: Job, world: int) -> None:
    """From the run's own state before each step, m in float64; copies of m are bit-equal."""
    ranks = run_ranks(world, stepwise, replace(job, clip_grad=0.0))
    errors = []
    for step in range(job.steps):
        now, then = (
            {
                key: whole_tensors([r["states"][at] for r in ranks], key, job)
                for key in ("param", "exp_avg", "v")
            }
            for at in (step, step + 1)
        )
        grads = whole_tensors([r["grads"][step] for r in ranks], "grad", job)
        for name, grad in grads.items():
            oracle = WholeTensorAdamMini(
                now["param"][name], labels_of(name, tuple(grad.shape), job)
            )
            oracle.exp_avg, oracle.t = now["exp_avg"][name].double(), step
            v = now["v"][name].double().reshape(-1)
            oracle.v = torch.zeros_like(oracle.v).index_copy_(0, oracle.labels, v)
            decay = decay_of(tuple(grad.shape), job)
            oracle.step(grad.double(), lr=job.lr, weight_decay=decay, **BETAS)
            assert_close(then["param"][name], oracle.param, SAME_GRADIENT_TOLERANCE, name)
            assert_close(then["v"][name], oracle.v_of_elements(), SAME_GRADIENT_TOLERANCE, name)
            # The power of two from v as it is stored: a rounding may have moved it over an edge.
            exponent = torch.frexp(then["v"][name].double().sqrt())[1] - 1
            scale = 2.0 ** exponent.clamp(min=-64).double()
            found, m = then["exp_avg"][name].double() / scale, oracle.exp_avg / scale
            assert torch.isin(found.abs(), GRID).all(), f"{name}: not a code"
            assert found.abs().max() > 0
            gap = gap_of(m.abs())
            error = ((found - m) / gap).reshape(-1)
            # m of the kernels is float32, and may lie on the other side of a code.
            assert error.abs().max() <= 1 + 1e-4, name
            errors.append(error)
    error = torch.cat(errors)
    # Standard deviation of one: at most 1/2. Four of the mean's.
    assert abs(float(error.mean())) <= 4 * 0.5 / len(error) ** 0.5
    assert 0.3 < float(error.std()) < 0.5


def test_8_bits_quarter_the_bytes_of_m_and_train_as_well() -> None:
    job = replace(SHARDED, pp=1)
    full = run_ranks(4, stepwise, job)
    small = run_ranks(4, stepwise, replace(job, adam_mini=FP8))
    for left, right in zip(full, small, strict=True):
        assert left["bytes"]["exp_avg"] == 4 * right["bytes"]["exp_avg"]
        assert left["bytes"]["exp_avg_sq"] == right["bytes"]["exp_avg_sq"]
    assert small[0]["losses"] == pytest.approx(full[0]["losses"], rel=2e-3)
    assert small[0]["losses"] != full[0]["losses"]


# Checkpoints.


@pytest.mark.support("m in 8 bits", "reshard")
@pytest.mark.parametrize("checkpoint_format", CHECKPOINT_FORMATS)
def test_m_of_8_bits_is_saved_as_float32_and_comes_back(
    checkpoint_format: str, tmp_path: Path
) -> None:
    options = {"checkpoint_format": checkpoint_format}
    job = replace(BASE, tp=2, adam_mini=FP8 | options)
    saved = run_ranks(4, train_and_save, job, str(tmp_path))
    for other in (FP8 | options, options):
        other_job = replace(job, adam_mini=other)
        compare(saved, job, run_ranks(2, load_and_show, other_job, str(tmp_path)), other_job)
    if checkpoint_format == "model_space":
        other_job = replace(job, tp=1, pp=2, bucket_size=5000)
        compare(saved, job, run_ranks(2, load_and_show, other_job, str(tmp_path)), other_job)


def test_m_of_float32_becomes_the_nearest_codes(tmp_path: Path) -> None:
    job = replace(BASE, tp=2)
    saved = run_ranks(4, train_and_save, job, str(tmp_path))
    loaded = run_ranks(2, load_and_show, replace(job, adam_mini=FP8), str(tmp_path))
    before, after = (
        {k: whole_tensors([r[0] for r in ranks], k, job) for k in ("param", "exp_avg", "v")}
        for ranks in (saved, loaded)
    )
    for name, m in before["exp_avg"].items():
        for key in ("param", "v"):
            assert torch.equal(before[key][name], after[key][name])
        scale = 2.0 ** (torch.frexp(after["v"][name].double().sqrt())[1] - 1).double()
        nearest = (m.double() / scale).float().to(torch.float8_e4m3fn).double() * scale
        assert torch.equal(after["exp_avg"][name].double(), nearest)


def train(job: Job, folder: str, begin: int) -> tuple[str, list[bytes]]:
    """Train to the end, from a checkpoint unless ``begin`` is 0; save in the middle."""
    trainer = Trainer(job)
    if begin:
        load(trainer, folder)
    for step in range(begin, job.steps):
        trainer.step(step)
        if step == 1 and not begin:
            save(trainer, folder)
    trainer.sync_params()
    moments = [p.values[k].tobytes() for p in slices_of(trainer) for k in ("exp_avg", "v")]
    return digest(global_names(trainer.chunks).values()), moments


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    job = replace(BASE, steps=4, adam_mini=FP8 | {"param_remainders": True})
    assert run_ranks(2, train, job, str(tmp_path), 0) == run_ranks(2, train, job, str(tmp_path), 2)


def state_and_m(job: Job, given: Any) -> tuple[Any, Tensor]:
    """Return a torch-style state dict, of training or as it was given, and m of its shards."""
    trainer = Trainer(job)
    optimizer = trainer.optimizer.member.optimizer
    if given is None:
        trainer.step(0)
        trainer.sync_params()
    else:
        optimizer.load_state_dict(given)
    view = trainer.optimizer.member.state_view()
    pieces = view.inner.plan.pieces
    m = [view.state_of(piece).as_float32(piece.window, "exp_avg") for piece in pieces]
    return optimizer.state_dict(), torch.cat(m)


def loaded_from_floats(job: Job) -> tuple[Tensor, Tensor]:
    """Return m before and after a load of a state dict in which codes became floats."""
    trainer = Trainer(job)
    trainer.step(0)
    optimizer = trainer.optimizer.member.optimizer
    saved = optimizer.state_dict()
    floats = {
        number: {**state, "exp_avg": state["exp_avg"].float()}
        for number, state in saved["state"].items()
    }
    codes = [torch.cat([state["exp_avg"] for state in optimizer.state.values()])]
    optimizer.load_state_dict({**saved, "state": floats})
    codes.append(torch.cat([state["exp_avg"] for state in optimizer.state.values()]))
    return codes[0], codes[1]


def test_codes_that_a_state_dict_holds_as_floats_are_codes() -> None:
    """As of a framework that keeps m and v in one tensor for a while."""
    ((before, after),) = run_ranks(1, loaded_from_floats, replace(BASE, pp=1, adam_mini=FP8))
    assert before.any()
    assert torch.equal(before, after)


@pytest.mark.parametrize("other", ["fp32", "bf16"])
def test_state_dicts_as_torchs_keep_m_under_another_storage(other: str) -> None:
    job = replace(BASE, pp=1, bf16=True, adam_mini={"full_v": ("*fc1*",)})
    other_job = replace(job, adam_mini=job.adam_mini | {"exp_avg_dtype": other})
    codes_job = replace(job, adam_mini=job.adam_mini | FP8)
    ((saved, codes),) = run_ranks(1, state_and_m, codes_job, None)
    ((given, same),) = run_ranks(1, state_and_m, other_job, saved)
    assert torch.equal(same, codes)  # all codes times their scales are bfloat16 numbers
    ((_, again),) = run_ranks(1, state_and_m, codes_job, given)
    assert torch.equal(again, codes)


def test_state_dicts_as_torchs_do_not_lose_or_invent_remainders() -> None:
    job = replace(BASE, pp=1, bf16=True)
    jobs = (job, replace(job, adam_mini={"param_remainders": True}))
    saved = [run_ranks(1, state_and_m, each, None)[0][0] for each in jobs]
    for own, same, other in zip(jobs, saved, reversed(saved), strict=True):
        with pytest.raises(Exception, match="remainders or --adam-mini-lean in both or none"):
            run_ranks(1, state_and_m, own, other)
        run_ranks(1, state_and_m, own, same)


def errors_of_assignments(job: Job) -> list[str]:
    """Return what steps say to state of another kind."""
    trainer, found = Trainer(job), []
    trainer.backward(0)
    state = next(iter(trainer.optimizer.member.optimizer.state.values()))
    numel, kept = len(state["exp_avg"]), dict(state)
    for change in (
        {"exp_avg": torch.full((numel,), 0.5)},  # no code; a zero would be one
        {"exp_avg": torch.zeros(numel, dtype=torch.int8)},
        {"master_param": torch.zeros(numel)},
    ):
        state.update(change)
        with pytest.raises(ValueError, match="was replaced by a tensor of") as caught:
            trainer.optimizer.step()
        found.append(str(caught.value))
        state.update(kept)
    assert trainer.optimizer.step()[0]
    return found


def test_state_of_another_kind_is_an_error_and_not_cut_to_integers() -> None:
    job = replace(BASE, layers=1, adam_mini=FP8 | {"param_remainders": True})
    (found,) = run_ranks(1, errors_of_assignments, job)
    kinds = [
        ("'exp_avg'", "torch.float32", "torch.uint8"),
        ("'exp_avg'", "torch.int8", "torch.uint8"),
        ("'master_param'", "torch.float32", "torch.int16"),
    ]
    for text, (key, given, own) in zip(found, kinds, strict=True):
        assert text.startswith(key)
        assert f"of {given}; Adam-mini's has {own} here" in text
