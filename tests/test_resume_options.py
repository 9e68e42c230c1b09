"""A run goes on with other flags than it began with, as users do it, and as Megatron's Adam does.

All through ``megatron.training``'s own loop. A run's configuration is its own; a checkpoint gives
state, step and schedule. Where Megatron's Adam resumes, the two are compared step by step.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_adam_mini.cli import main
from tests.adam_checkpoints import save as save_at_once
from tests.gather import slices_of, whole_tensors
from tests.megatron_job import Job, Trainer, whole_weight
from tests.ranks import run_ranks
from tests.test_checkpoint import load
from tests.training_run import Run, Seen, assert_same_state, make_dataset, train

OVERRIDE, USE = "--override-opt-param-scheduler", "--use-checkpoint-opt-param-scheduler"
#: Iterations before the checkpoint that runs go on from, and of an undisturbed run.
SAVED, LAST = 4, 8
#: Parameters with and without weight decay, by Megatron's own rules.
MATRIX, NORM = "decoder.layers.0.mlp.linear_fc1.weight", "decoder.final_layernorm.weight"
#: The scheduler and this file compute rates in another order.
RATE_TOLERANCE = 1e-9


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("data") / "text")


def go(data: str, run: Run, ranks: int = 1) -> list[Seen]:
    seen: list[Seen] = run_ranks(ranks, train, replace(run, flags=f"{data} {run.flags}"))
    return seen


def finish(data: str, run: Run) -> Seen:
    (seen,) = go(data, run)
    assert seen.error is None, seen.error
    return seen


def save(data: str, folder: Path, run: Run, ranks: int = 1) -> list[Seen]:
    flags = f"{run.flags} --save {folder} --exit-interval {SAVED}"
    seen = go(data, replace(run, flags=flags), ranks)
    assert [s.error for s in seen] == [None] * ranks
    assert any(values["exp_avg"].any() for values in seen[0].end["state"].values())
    return seen


@pytest.fixture(scope="module")
def mini(data: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Seen]:
    """A checkpoint of Adam-mini, and what was saved."""
    folder = tmp_path_factory.mktemp("mini")
    return folder, save(data, folder, Run())[0]


@pytest.fixture(scope="module")
def adam(data: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Seen]:
    """A checkpoint of Megatron's Adam, and what was saved."""
    folder = tmp_path_factory.mktemp("adam")
    return folder, save(data, folder, Run(optimizer="adam"))[0]


@pytest.fixture(scope="module")
def straight(data: str) -> Seen:
    """A run that nothing disturbed."""
    return finish(data, Run())


def rates(max_lr: float = 1e-2, min_lr: float = 1e-3, warmup: int = 2, decay: int = LAST) -> Any:
    """Return the rates of the iterations after the checkpoint."""
    return pytest.approx(
        [
            min_lr + (max_lr - min_lr) * (1 - (done - warmup) / (decay - warmup))
            for done in range(SAVED, LAST)
        ],
        rel=RATE_TOLERANCE,
    )


def of(seen: Seen, name: str) -> tuple[list[float], list[float]]:
    """Return the rates and weight decays of a parameter's steps."""
    lrs, decays = zip(*(step[name] for step in seen.steps), strict=True)
    return list(lrs), list(decays)


# The schedule.

OTHERS = "--lr 5e-3 --min-lr 5e-4 --weight-decay 0.2 --lr-warmup-iters 3 --lr-decay-iters 10"


@pytest.mark.support("resume with other flags", "test")
@pytest.mark.parametrize("source", ["mini", "adam"])
def test_another_schedule_is_in_force_when_it_overrides(
    data: str, source: str, request: pytest.FixtureRequest
) -> None:
    folder, saved = request.getfixturevalue(source)
    seen = finish(data, Run(f"--load {folder} {OTHERS} {OVERRIDE}"))
    assert of(seen, MATRIX) == (rates(5e-3, 5e-4, warmup=3, decay=10), [0.2] * 4)
    assert of(seen, NORM) == (rates(5e-3, 5e-4, warmup=3, decay=10), [0.0] * 4)
    assert seen.iterations == (SAVED, LAST)
    assert any("max_lr 0.005 (checkpoint: 0.01)" in text for text in seen.warnings)
    if source == "mini":
        assert_same_state(saved.end, seen.start)
    else:
        compare_with_adam(saved.end, seen.start)


@pytest.mark.parametrize("source", ["mini", "adam"])
def test_the_schedule_of_the_checkpoint_is_in_force_when_it_is_used(
    data: str, source: str, request: pytest.FixtureRequest
) -> None:
    folder, _ = request.getfixturevalue(source)
    seen = finish(data, Run(f"--load {folder} {OTHERS} {USE}"))
    # Megatron's scheduler sets the first step's decay before it takes the checkpoint's; also for
    # Adam, see below.
    assert of(seen, MATRIX) == (rates(), [0.2] + [0.1] * 3)
    assert {group["max_lr"] for group in seen.end["groups"]} == {1e-2}
    assert {group["min_lr"] for group in seen.end["groups"]} == {1e-3}


def test_a_changed_rate_is_refused_by_the_scheduler_on_all_ranks(
    data: str, mini: tuple[Path, Seen]
) -> None:
    for seen in go(data, Run(f"--load {mini[0]} --lr 5e-3"), ranks=2):
        kind, text = seen.error or ("", "")
        assert kind == "AssertionError"
        assert "for learning rate do not match" in text


@pytest.mark.parametrize(
    "flags",
    [
        f"--weight-decay 0.2 --lr-warmup-iters 3 --lr-decay-iters 10 {OVERRIDE}",
        f"--weight-decay 0.2 --lr-warmup-iters 3 --lr-decay-iters 10 {USE}",
        "--iterations-to-skip 6 7 --no-load-rng",
        "--finetune --lr 5e-3",
        "--no-load-optim --lr 5e-3",
    ],
)
def test_where_adam_goes_on_the_steps_are_the_same(
    data: str, mini: tuple[Path, Seen], adam: tuple[Path, Seen], flags: str
) -> None:
    own = finish(data, Run(f"--load {mini[0]} {flags}"))
    theirs = finish(data, Run(f"--load {adam[0]} {flags}", optimizer="adam"))
    assert own.steps == theirs.steps
    assert (own.iterations, own.samples) == (theirs.iterations, theirs.samples)
    assert own.start["schedule"] == theirs.start["schedule"]
    assert own.end["step"] == theirs.end["step"]
    fresh = "--finetune" in flags or "--no-load-optim" in flags
    assert own.start["step"] == {0 if fresh else SAVED}
    for name, values in own.start["state"].items():
        if fresh:
            assert np.array_equal(values["param"], mini[1].end["weights"][name].reshape(-1)), name
            assert not values["exp_avg"].any(), name
            assert not values["exp_avg_sq"].any(), name
    if not fresh:
        assert_same_state(own.start, mini[1].end)


def test_adam_itself_refuses_another_rate_whatever_the_flags(
    data: str, adam: tuple[Path, Seen]
) -> None:
    """If this fails, Megatron has mended it: compare its steps with ours instead."""
    (seen,) = go(data, Run(f"--load {adam[0]} --lr 5e-3 {OVERRIDE}", optimizer="adam"))
    assert seen.error is not None
    assert seen.error[0] == "KeyError"


def test_betas_and_eps_are_those_of_the_flags(data: str, mini: tuple[Path, Seen]) -> None:
    flags = "--adam-beta1 0.8 --adam-beta2 0.95 --adam-eps 1e-6"
    seen = finish(data, Run(f"--load {mini[0]} {flags}"))
    for group in seen.end["groups"]:
        assert (tuple(group["betas"]), group["eps"]) == ((0.8, 0.95), 1e-6)
    (warning,) = seen.warnings
    assert "betas (0.8, 0.95) (checkpoint: (0.9, 0.999)), eps 1e-06 (checkpoint: 1e-08)" in warning


def compare_with_adam(saved: dict[str, Any], started: dict[str, Any]) -> None:
    assert started["step"] == saved["step"] == {SAVED}
    for name, values in started["state"].items():
        for key in ("param", "exp_avg"):
            assert np.array_equal(values[key], saved["state"][name][key]), f"{key} of {name}"
        mean = saved["state"][name]["exp_avg_sq"].mean()
        if name == NORM:  # one block
            assert values["exp_avg_sq"] == pytest.approx([mean])


# Overrides of parameter groups.

LAYER = "decoder.layers.0"
FC1, FC2 = f"{LAYER}.mlp.linear_fc1.weight", f"{LAYER}.mlp.linear_fc2.weight"
PROJ = f"{LAYER}.self_attention.linear_proj.weight"
FIELDS: dict[str, dict[str, Any]] = {
    "*linear_fc1*": {"max_lr": 2e-2, "min_lr": 2e-3},
    "*linear_fc2*": {"start_wd": 0.3, "end_wd": 0.3, "wd_mult": 0.5},
    "*linear_proj*": {"optimizer": "adam_mini"},
}
CHANGED: dict[str, dict[str, Any]] = {
    "*linear_fc1*": {"max_lr": 4e-2, "min_lr": 2e-3},
    "*linear_fc2*": {"start_wd": 0.4, "end_wd": 0.4, "wd_mult": 0.25},
}


@pytest.fixture(scope="module")
def overridden(data: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Seen]:
    folder = tmp_path_factory.mktemp("overridden")
    return folder, save(data, folder, Run(overrides=FIELDS))[0]


def test_overrides_of_each_field_come_back(data: str, overridden: tuple[Path, Seen]) -> None:
    folder, saved = overridden
    seen = finish(data, Run(f"--load {folder}", overrides=FIELDS))
    assert_same_state(saved.end, seen.start)
    assert of(seen, FC1) == (rates(2e-2, 2e-3), [0.1] * 4)
    assert of(seen, FC2) == (rates(), [0.15] * 4)
    assert of(seen, PROJ) == (rates(), [0.1] * 4)
    assert seen.warnings == []


@pytest.mark.parametrize("flags", [OVERRIDE, USE])
def test_changed_overrides(data: str, overridden: tuple[Path, Seen], flags: str) -> None:
    folder, saved = overridden
    seen = finish(data, Run(f"--load {folder} {flags}", overrides=CHANGED))
    assert_same_state(saved.end, seen.start)
    used = flags == USE
    assert of(seen, FC1) == (rates(2e-2 if used else 4e-2, 2e-3), [0.1] * 4)
    # A multiplier makes another group of it; nothing in the checkpoint says which it was.
    assert of(seen, FC2) == (rates(), [0.1] * 4)
    assert "max_lr 0.04 (checkpoint: 0.02)" in seen.warnings[0]
    assert "has no match in the checkpoint: max_lr 0.01" in seen.warnings[0]
    assert len(seen.warnings) == 1 + used
    assert all("keeps this run's" in text for text in seen.warnings[1:])


def test_overrides_that_come_and_go(data: str, overridden: tuple[Path, Seen]) -> None:
    folder, saved = overridden
    seen = finish(data, Run(f"--load {folder} --decoupled-lr 3e-2 --decoupled-min-lr 3e-3"))
    assert_same_state(saved.end, seen.start)
    assert of(seen, "output_layer.weight") == (rates(3e-2, 3e-3), [0.1] * 4)
    for name in (FC1, FC2, PROJ):
        assert of(seen, name) == (rates(), [0.1] * 4)


# State in fewer bits.

LEAN = "--adam-mini-lean"


def test_a_run_goes_on_with_a_lean_state(data: str, mini: tuple[Path, Seen]) -> None:
    folder, saved = mini
    seen = finish(data, Run(f"--load {folder} {LEAN}"))
    expected = deepcopy(saved.end)  # other tests use it, too
    for values in expected["state"].values():
        values["exp_avg"] = torch.from_numpy(values["exp_avg"]).bfloat16().float().numpy()
    assert_same_state(expected, seen.start)
    assert seen.warnings == [
        "The checkpoint's run stored float32 main parameters and m as fp32; this run stores 16-bit "
        "remainders and m as bf16, rounded stochastically. Main parameters are the same, bit for "
        "bit, and so is v; m is rounded to bf16 once, now."
    ]


@pytest.mark.parametrize("flags", ["", "--ckpt-format torch"])
def test_a_lean_run_goes_on_as_if_undisturbed_or_without_the_flag(
    data: str, tmp_path: Path, flags: str
) -> None:
    saved = save(data, tmp_path, Run(f"{flags} {LEAN}"))[0]
    seen = finish(data, Run(f"{flags} --load {tmp_path} {LEAN}"))
    assert seen.warnings == []
    assert_same_state(saved.end, seen.start)
    if not flags:
        assert_same_state(finish(data, Run(LEAN)).end, seen.end)
    seen = finish(data, Run(f"{flags} --load {tmp_path}"))
    assert_same_state(saved.end, seen.start)
    (warning,) = seen.warnings
    assert "this run stores float32 main parameters and m as fp32" in warning
    assert warning.endswith("m is that of the checkpoint.")


# What is not loaded, or not saved.


def test_a_checkpoint_without_optimizer_state_is_refused_as_for_adam(
    data: str, tmp_path: Path
) -> None:
    save(data, tmp_path, Run("--no-save-optim"))
    for optimizer in ("adam_mini", "adam"):
        (seen,) = go(data, Run(f"--load {tmp_path}", optimizer=optimizer))
        assert seen.error == ("KeyError", "'optimizer'")
    seen = finish(data, Run(f"--load {tmp_path} --no-load-optim"))
    assert (seen.iterations, seen.start["step"]) == ((SAVED, LAST), {0})


def test_main_parameters_come_from_the_weights_of_the_checkpoint(data: str, tmp_path: Path) -> None:
    """From float32 weights into a bfloat16 model, in format torch, which keeps all their bits."""
    saved = save(data, tmp_path, Run("--ckpt-format torch", bf16=False), ranks=2)[0].end["weights"]
    load = f"--load {tmp_path} --ckpt-format torch --no-load-optim --load-main-params-from-ckpt"
    for flags in ("", "--adam-mini-param-remainders"):
        seen = go(data, Run(f"{load} {flags}"), ranks=2)
        assert [s.error for s in seen] == [None, None]
        started = joined([s.start for s in seen])
        assert started.keys() == saved.keys()
        for name, values in started.items():
            weight = seen[0].start["weights"][name]
            assert np.array_equal(values["param"], saved[name].reshape(-1)), name
            assert not np.array_equal(weight, saved[name]), f"{name}: bfloat16 has all its bits"
            assert np.allclose(weight, saved[name], rtol=2**-8)
            assert not values["exp_avg"].any(), name


# The loop.


def test_a_run_that_ended_for_want_of_time_goes_on(
    data: str, straight: Seen, tmp_path: Path
) -> None:
    keep = f"--save {tmp_path} --load {tmp_path} --exit-duration-in-mins 5"
    seen = finish(data, Run(keep, minutes=6.0))
    assert seen.iterations == (0, 1)
    seen = finish(data, Run(keep))
    assert seen.iterations == (1, LAST)
    assert_same_state(straight.end, seen.end)


def test_a_growing_batch_goes_on(data: str, tmp_path: Path) -> None:
    growing = Run(
        schedule="--global-batch-size 4 --rampup-batch-size 1 1 12 --train-samples 24 --lr 1e-2 "
        "--lr-warmup-samples 4 --lr-decay-style linear"
    )
    whole = finish(data, growing)
    save(data, tmp_path, growing)
    rest = finish(data, replace(growing, flags=f"--load {tmp_path}"))
    assert whole.steps[SAVED:] == rest.steps
    assert whole.samples == rest.samples
    assert whole.samples[0] < LAST * 4, "the batch never grew"
    assert_same_state(whole.end, rest.end)


def test_skipped_iterations_change_nothing(data: str, mini: tuple[Path, Seen]) -> None:
    whole = finish(data, Run("--iterations-to-skip 6 7"))
    rest = finish(data, Run(f"--load {mini[0]} --iterations-to-skip 6 7"))
    assert whole.samples == rest.samples == (2 * LAST, 4)
    assert whole.end["step"] == {LAST - 2}
    assert_same_state(whole.end, rest.end)


# Frozen parameters.


@pytest.mark.parametrize(("flags", "ranks"), [("", 2), ("--ckpt-format torch", 1)])
def test_a_parameter_that_was_frozen_starts_anew(
    data: str, tmp_path: Path, flags: str, ranks: int
) -> None:
    first = save(data, tmp_path, Run(flags, frozen=("linear_fc1",)), ranks)
    then = go(data, Run(f"--load {tmp_path} {flags}"), ranks)
    assert [seen.error for seen in then] == [None] * ranks
    saved, started = (joined([s.end for s in first]), joined([s.start for s in then]))
    new = started.pop(FC1)
    assert started.keys() == saved.keys()
    for name, values in saved.items():
        for key in ("param", "exp_avg"):
            assert np.array_equal(values[key], started[name][key]), f"{key} of {name}"
    assert np.array_equal(new["param"], first[0].end["weights"][FC1].reshape(-1))
    assert not new["exp_avg"].any()
    assert not new["exp_avg_sq"].any()
    assert {*then[0].start["step"]} == {SAVED}
    assert joined([s.end for s in then])[FC1]["exp_avg"].all()
    # For equal gradients, max over k of (1 - 0.9^k) / sqrt(1 - 0.999^k).
    (warning,) = then[0].warnings
    assert FC1 in warning
    assert "up to 6.6 times" in warning
    assert not any(seen.warnings for seen in then[1:])


@pytest.mark.parametrize("source", ["mini", "adam"])
def test_state_of_a_parameter_that_is_frozen_now_is_left_out(
    data: str, source: str, request: pytest.FixtureRequest
) -> None:
    folder, saved = request.getfixturevalue(source)
    seen = finish(data, Run(f"--load {folder}", frozen=("linear_fc1",)))
    assert seen.start["step"] == {SAVED}
    assert seen.start["state"].keys() == saved.end["state"].keys() - {FC1}
    for name, values in seen.start["state"].items():
        for key in ("param", "exp_avg"):
            assert np.array_equal(values[key], saved.end["state"][name][key]), f"{key} of {name}"
    assert np.array_equal(seen.end["weights"][FC1], saved.end["weights"][FC1])
    if source == "mini":
        (warning,) = seen.warnings
        assert "not read" in warning
        assert FC1 in warning


def train_and_save(job: Job, folder: str) -> Any:
    trainer = Trainer(job)
    for step in range(job.steps):
        trainer.step(step)
    save_at_once(trainer, folder, None)
    return slices_of(trainer)


def load_after_steps(job: Job, folder: str) -> Any:
    trainer = Trainer(job)
    for step in range(3):  # so that the state has moved
        trainer.step(step)
    load(trainer, folder)
    return slices_of(trainer), trainer.optimizer.inner.main_params.step_count


@pytest.mark.support("frozen parameters, LoRA", "reshard")
def test_a_frozen_parameter_starts_under_another_layout_and_in_moved_state(tmp_path: Path) -> None:
    thawed = "decoder.layers.1.mlp.linear_fc1.weight"  # on one of the stages
    saved_job = Job(pp=2, bf16=True, frozen=(thawed,), bucket_size=1, steps=2)
    job = Job(tp=2, bf16=True, adam_mini={"param_remainders": True})
    saved = run_ranks(2, train_and_save, saved_job, str(tmp_path))
    loaded = run_ranks(2, load_after_steps, job, str(tmp_path))
    assert [steps for _, steps in loaded] == [2, 2]
    for key in ("param", "exp_avg", "v"):
        before = whole_tensors(saved, key, saved_job)
        after = whole_tensors([parts for parts, _ in loaded], key, job)
        started = after.pop(thawed)
        assert after.keys() == before.keys()
        for name, value in after.items():
            assert torch.equal(value, before[name]), f"{key} of {name}"
        if key == "param":  # never trained
            assert torch.equal(started, whole_weight(thawed, tuple(started.shape)).bfloat16())
        else:
            assert not started.any()
    assert main(["verify", str(tmp_path)]) == 0


def test_state_that_adam_did_not_save_is_named(data: str, tmp_path: Path) -> None:
    save(data, tmp_path, Run(optimizer="adam", frozen=("linear_fc1",)))
    for seen in go(data, Run(f"--load {tmp_path}"), ranks=2):
        _, text = seen.error or ("", "")
        assert ".decoder.layers.mlp.linear_fc1.weight is missing" in text
        assert "no more trained parameters" in text


def test_flat_buckets_of_other_parameters_are_refused(data: str, tmp_path: Path) -> None:
    save(data, tmp_path, Run("--adam-mini-checkpoint-format buckets"))
    (seen,) = go(data, Run(f"--load {tmp_path}", frozen=("linear_fc1",)))
    _, text = seen.error or ("", "")
    assert f"1 parameters ({FC1}) are frozen now" in text


def joined(ranks: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Join the slices of data-parallel ranks; v of a block that two ranks share stands twice."""
    found: dict[str, dict[str, Any]] = {}
    for name in {name for rank in ranks for name in rank["state"]}:
        parts = [rank["state"][name] for rank in ranks if name in rank["state"]]
        found[name] = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    return found
