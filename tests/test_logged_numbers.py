"""What Megatron logs of a run: the numbers of its Adam, and the true ones, on every rank.

Adam-mini keeps one v per element here, so that it trains as Adam does, and the weights of both stay
equal. True numbers are computed in float64 from whole tensors.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_adam_mini import rounding, state
from megatron_adam_mini.plan import buffer_plan
from megatron_adam_mini.plan.buffer_plan import Window
from megatron_adam_mini.plan.shares import Share
from tests.gather import slices_of, whole_tensors
from tests.megatron_job import Job, Trainer
from tests.ranks import run_ranks, start_program
from tests.test_resume import launch

ADAM_LIKE = {"full_v": ["*"]}
BASE = Job(
    layers=1,
    hidden=32,
    ffn=48,
    vocab=64,
    batch=16,
    steps=2,
    lr=2e-2,
    optimizer_args={"log_num_zeros_in_grad": True},
    adam_mini=ADAM_LIKE,
)
BF16 = {"bf16": True}
HALF = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5}
MODES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16": BF16,
    "fp16": {"fp16": True, "optimizer_args": {"initial_loss_scale": 4.0}},
    "bf16 gradients": BF16 | {"grad_fp32": False},
    "bf16 m": BF16 | {"adam_mini": {"exp_avg_dtype": "bf16"}},
    "remainders": BF16 | {"adam_mini": {"param_remainders": True}},
    "state on the host": BF16 | {"optimizer_args": HALF},
}
MAIN = ["bf16", "remainders"]
#: They train bit for bit as float32 main parameters on the device do, so the log is the same.
AS_BF16 = ["remainders", "state on the host"]
OVERLAP = replace(BASE, tp=2, overlap=True, bucket_size=3000)
LAYOUTS = {
    "tp2-dp2, overlap": (OVERLAP, 4, [name for name in MODES if name != "state on the host"]),
    "tp2-dp2": (replace(BASE, tp=2), 4, [*MAIN, "state on the host"]),
    "tp2-dp2, replicated": (replace(OVERLAP, distributed_optimizer=False), 4, ["float32", *MAIN]),
    "pp2, tied": (replace(BASE, pp=2, layers=2, tied=True), 2, MAIN),
    "two instances": (replace(BASE, instances=2), 2, MAIN),
}
# Megatron adds squares in float32 (two roundings of the norm itself at most), ours in float64.
NORM_TOLERANCE = 1e-6
# Adam's own update rounds otherwise, by 6e-8 of a step of 1e-2 of a weight; bf16 weights that
# round to the other neighbour then change the gradients of the next step.
TRAINED_TOLERANCE = 2e-6
# float16 weights have float16 norms without Apex or Transformer Engine, here and there.
FLOAT16_TOLERANCE = 2**-10


class TrainingLoop(Trainer):
    """A trainer that builds its model as ``megatron.training`` does."""

    def _build_optimizer(self) -> Any:
        from megatron.core import tensor_parallel
        from megatron.training import global_vars

        global_vars.set_args(SimpleNamespace(bf16=self.job.bf16, use_megatron_fsdp=False))
        for chunk in self.chunks:
            for param in chunk.parameters():
                tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(param)
        return super()._build_optimizer()


def mode(layout: Job, name: str, optimizer: str) -> Job:
    """Return the job of a layout in one of the precision modes."""
    changes = dict(MODES[name])
    for key in ("optimizer_args", "adam_mini"):
        changes[key] = getattr(layout, key) | changes.get(key, {})
    return replace(layout, optimizer=optimizer, **changes)


def logged_by(job: Job) -> list[dict[str, Any]]:
    """Return what the training loop logs after each step, and what it should be computed from."""
    from megatron.core import parallel_state
    from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
    from megatron.training import training

    trainer = TrainingLoop(job)
    params = [param for chunk in trainer.chunks for param in chunk.parameters()]
    attributes = [set(vars(param)) for param in params]
    steps = []
    for step in range(job.steps):
        updated, grad_norm, num_zeros = trainer.step(step)
        steps.append(
            {
                "updated": updated,
                "grad norm": float(grad_norm),
                "zeros": num_zeros,
                # As train() calls it: before the next forward pass gathers the weights.
                "params norm": training.calc_params_l2_norm(trainer.chunks),
                "of weights": training.calc_params_l2_norm(trainer.chunks, True),
                "loss scale": trainer.optimizer.get_loss_scale().item(),
                "lr": get_canonical_lr_for_logging(trainer.optimizer.param_groups),
                "groups": trainer.optimizer.grad_norms_by_group,
                "slices": slices_of(trainer) if job.optimizer == "adam_mini" else None,
            }
        )
    left = [set(vars(param)) - before for param, before in zip(params, attributes, strict=True)]
    assert not any(name.startswith("main_param") for names in left for name in names)
    parallel_state.destroy_model_parallel()
    return steps


def in_modes(layout: Job, names: list[str], optimizer: str) -> dict[str, Any]:
    return {name: logged_by(mode(layout, name, optimizer)) for name in names}


def whole_norm(ranks: list[Any], key: str, job: Job) -> tuple[float, int]:
    """Return norm and zeros of all parameters together, each counted once."""
    whole = whole_tensors([rank["slices"] for rank in ranks], key, job)
    if job.tied:
        whole.pop("output_layer.weight", None)
    squares = sum(float(value.double().square().sum()) for value in whole.values())
    return math.sqrt(squares), sum(int((value == 0).sum()) for value in whole.values())


@pytest.mark.support("what Megatron logs", "test")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_number_is_adams_or_true(layout: str) -> None:
    job, world, names = LAYOUTS[layout]
    ours = run_ranks(world, in_modes, job, names, "adam_mini")
    stock = run_ranks(world, in_modes, job, [n for n in names if n not in AS_BF16], "adam")
    for name in names:
        for step in range(job.steps):
            here = [rank[name][step] for rank in ours]
            check_step(here, mode(job, name, "adam_mini"))
            if name in AS_BF16:
                for rank in ours:
                    for key in ("params norm", "grad norm", "zeros"):
                        assert rank[name][step][key] == rank["bf16"][step][key], key
                continue
            for mine, other in zip(here, [rank[name][step] for rank in stock], strict=True):
                check_against_adam(mine, other, name, first=step == 0, instances=job.instances)


def check_step(ranks: list[dict[str, Any]], job: Job) -> None:
    """Compare the numbers of all ranks with the true ones."""
    keys = ["updated", "grad norm", "zeros", "loss scale", "lr"]
    # Of the other types Megatron reads the weights, which overlap leaves partly old on each rank.
    if job.bf16 or not (job.overlap and job.distributed_optimizer):
        keys.append("params norm")
    for key in keys:
        assert len({rank[key] for rank in ranks}) == 1, f"ranks disagree on {key}"
    log = ranks[0]
    norm, zeros = whole_norm(ranks, "grad", job)
    assert log["grad norm"] == pytest.approx(norm / log["loss scale"], rel=NORM_TOLERANCE)
    assert log["zeros"] == zeros
    assert log["lr"] == job.lr
    assert log["groups"] == {}
    if job.bf16:
        norm, _ = whole_norm(ranks, "param", job)
        assert log["params norm"] == pytest.approx(norm, rel=NORM_TOLERANCE)


def check_against_adam(
    mine: dict[str, Any], other: dict[str, Any], name: str, *, first: bool, instances: int
) -> None:
    for key in ("updated", "loss scale", "lr", "groups"):
        assert mine[key] == other[key], key
    if first:  # with equal weights, gradients are equal
        assert mine["grad norm"] == pytest.approx(other["grad norm"], rel=NORM_TOLERANCE)
        assert mine["zeros"] == other["zeros"]
    tolerance = FLOAT16_TOLERANCE if name == "fp16" else TRAINED_TOLERANCE
    assert mine["of weights"] == pytest.approx(other["of weights"], rel=FLOAT16_TOLERANCE)
    # Megatron counts the shards of every instance.
    expected = other["params norm"] / math.sqrt(instances)
    assert mine["params norm"] == pytest.approx(expected, rel=tolerance)


def norms_of_the_first(job: Job) -> list[float]:
    """Return the norm of a model before and after another one got an optimizer."""
    from megatron.core import parallel_state
    from megatron.training import training

    first = TrainingLoop(job)
    first.step(0)
    norms = [training.calc_params_l2_norm(first.chunks)]
    parallel_state.destroy_model_parallel()
    other = TrainingLoop(replace(job, layers=job.layers + 1))
    norms.append(training.calc_params_l2_norm(first.chunks))
    del other  # not before: the last one that was built is looked at
    return norms


def test_norm_of_a_model_is_that_of_its_own_optimizer() -> None:
    """As of an actor, after its critic got one, too."""
    ((before, after),) = run_ranks(1, norms_of_the_first, mode(BASE, "remainders", "adam_mini"))
    assert before == after


def test_norm_of_joined_main_parameters_is_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    value = torch.randn(100, generator=torch.Generator().manual_seed(0))
    weight, remainders = rounding.split(value)
    buffer: Any = SimpleNamespace(weight=weight)
    plan: Any = None
    share = Share(0, False, plan, slice(0, 100), slice(0, 0))
    held = state.BufferState(buffer, share, remainders, torch.empty(0), torch.empty(0))
    joined: list[int] = []

    def join(*args: torch.Tensor) -> torch.Tensor:
        joined.append(args[0].numel())
        return rounding.join(*args)

    monkeypatch.setattr(state, "join", join)
    monkeypatch.setattr(buffer_plan, "PART_NUMEL", 40)
    norm = held.norm(Window(slice(3, 100), slice(3, 100)))
    assert float(norm) == pytest.approx(float(value[3:].double().norm()), rel=NORM_TOLERANCE)
    assert joined == [40, 40, 17]


def rows_and_groups(job: Job) -> dict[str, Any]:
    """Return what Megatron prints of each shard, and the groups that its scheduler has set."""
    from megatron.core import parallel_state
    from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides
    from megatron.core.optimizer_param_scheduler import (
        OptimizerParamScheduler,
        get_canonical_lr_for_logging,
    )
    from megatron.training.utils import print_params_min_max_norm

    trainer = TrainingLoop(job)
    config = replace(trainer.optimizer.config, decoupled_lr=0.5, decoupled_min_lr=0.25)
    if job.optimizer == "adam_mini":
        config.adam_mini = trainer.optimizer.config.adam_mini
    overrides = get_standard_config_overrides(config)
    optimizer = get_megatron_optimizer(config, trainer.chunks, overrides)
    scheduler = OptimizerParamScheduler(
        optimizer, 0.0, 0.125, 0.0, 2, 10, "linear", 0.1, 0.2, 10, "linear"
    )
    groups, canonical = [], []
    for _ in range(4):
        scheduler.step(1)
        canonical.append(get_canonical_lr_for_logging(optimizer.param_groups))
        groups.append(
            [
                {key: value for key, value in group.items() if key in GROUP_FIELDS}
                | {"elements": sum(param.numel() for param in group["params"])}
                for group in optimizer.param_groups
            ]
        )
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if optimizer.param_groups:
            print_params_min_max_norm(optimizer, 1)
    parallel_state.destroy_model_parallel()
    return {"rows": printed.getvalue().splitlines(), "groups": groups, "lr": canonical}


GROUP_FIELDS = {"lr", "weight_decay", "wd_mult", "max_lr", "min_lr", "default_config"}
MIXED = replace(BASE, bf16=True, float32_modules=("final_layernorm", "input_layernorm"))
SHARDS = {
    "float32, tp2": replace(BASE, tp=2),
    "bf16": replace(BASE, bf16=True),
    "mixed types": MIXED,
    "mixed types, replicated": replace(MIXED, distributed_optimizer=False),
    "remainders": replace(BASE, bf16=True, adam_mini=ADAM_LIKE | {"param_remainders": True}),
    "frozen stage": replace(
        BASE, pp=2, layers=2, frozen=("decoder.layers.1", "decoder.final", "output_layer")
    ),
}


def of_all(jobs: list[Job]) -> list[dict[str, Any]]:
    return [rows_and_groups(job) for job in jobs]


def test_shards_and_groups_are_printed_and_scheduled_as_adams() -> None:
    jobs = list(SHARDS.values())
    ours = run_ranks(2, of_all, jobs)
    stock = run_ranks(2, of_all, [replace(job, optimizer="adam") for job in jobs])
    for mine, other in zip(ours, stock, strict=True):
        for case, one, theirs in zip(SHARDS, mine, other, strict=True):
            assert one["groups"] == theirs["groups"], case
            assert one["lr"] == theirs["lr"], case
            if case == "remainders":  # bf16 shards, as those of Megatron's precision-aware Adam
                one["rows"], theirs["rows"] = (
                    [row.rpartition(",")[0] for row in rows]
                    for rows in (one["rows"], theirs["rows"])
                )
            assert one["rows"] == theirs["rows"], case
    sizes = [len(case["rows"]) for case in ours[0]]
    assert min(sizes) > 3
    rates = {group["lr"] for group in ours[0][0]["groups"][-1]}
    assert len(rates) == 2, "one rate for embedding and output, one for the rest"


def bytes_in_the_formula(job: Job) -> tuple[int, int, int]:
    """Return what Megatron's formula gives for Adam-mini if it gives 10**6 for Adam."""
    from megatron.training import theoretical_memory_usage

    from megatron_adam_mini.mcore.metrics import wrap_state_memory

    optimizer = TrainingLoop(job).optimizer
    assert hasattr(theoretical_memory_usage.compute_weight_and_optimizer_memory, "__wrapped__")
    elements = sum(shard.numel() for shard in optimizer.get_parameters())
    tensors = [t for state in optimizer.optimizer.state.values() for t in state.values()]
    if not job.adam_mini.get("param_remainders"):
        tensors += optimizer.get_parameters()
    memory = [tensor.untyped_storage() for tensor in tensors]
    held = sum({storage.data_ptr(): storage.nbytes() for storage in memory}.values())
    return wrap_state_memory(lambda *_, **__: 10**6)(None, verbose=True), elements, held


@pytest.mark.parametrize("options", [{}, {"param_remainders": True, "exp_avg_dtype": "bf16"}])
def test_theoretical_memory_is_adam_minis(options: dict[str, Any]) -> None:
    job = replace(BASE, bf16=True, adam_mini=options)
    for logged, elements, held in run_ranks(2, bytes_in_the_formula, job):
        saved = 10**6 - logged
        assert saved == 12 * elements - held
        assert saved > (7 if options else 3) * elements


def single_phase(job: Job) -> Any:
    return TrainingLoop(job).step(0)


def test_a_norm_that_nobody_computes_is_not_logged_as_a_number() -> None:
    job = replace(BASE, clip_grad=0.0, adam_mini={"single_phase": True})
    (updated, norm, zeros), *_ = run_ranks(1, single_phase, job)
    assert (updated, norm) == (True, None)
    assert zeros > 0
    (_, stock, _), *_ = run_ranks(1, single_phase, replace(job, optimizer="adam"))
    (_, norm, _), *_ = run_ranks(1, single_phase, replace(job, adam_mini={}))
    assert norm == pytest.approx(stock, rel=NORM_TOLERANCE), "also where nothing is clipped"


ROOT = Path(__file__).parents[1]
# float16, with a loss scale that is too large at first, so that steps are skipped.
FLAGS = """
    --num-layers 1 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --seq-length 16
    --max-position-embeddings 16 --swiglu --normalization RMSNorm --position-embedding-type rope
    --disable-bias-linear --untie-embeddings-and-output-weights --attention-dropout 0
    --hidden-dropout 0 --tokenizer-type NullTokenizer --vocab-size 257 --mock-data
    --make-vocab-size-divisible-by 1 --no-create-attention-mask-in-dataloader --split 90,10,0
    --eval-iters 0 --eval-interval 1000 --seed 3 --micro-batch-size 2 --global-batch-size 4
    --train-iters 5 --lr 1e-2 --min-lr 1e-3 --lr-decay-style linear --lr-warmup-iters 2
    --decoupled-lr 5e-3 --decoupled-min-lr 1e-3 --weight-decay 0.1 --use-distributed-optimizer
    --fp16 --initial-loss-scale 1048576 --hysteresis 1 --log-interval 1
    --log-params-norm --log-num-zeros-in-grad --timing-log-level 2 --log-timers-to-tensorboard
    --log-memory-to-tensorboard --tensorboard-log-interval 1
""".split()  # noqa: SIM905
#: Timers within 'optimizer', as Megatron prints them.
TIMERS = {
    "adam": {
        "optimizer-copy-to-main-grad",
        "optimizer-unscale-and-check-inf",
        "optimizer-inner-step",
        "optimizer-copy-main-to-model-params",
    },
    "adam_mini": {
        "optimizer-clip-main-grad",
        "optimizer-count-zeros",
        "optimizer-inner-step",
    },
}
#: Of numbers that training changes, in the last digits of which two runs may differ.
RUN_TOLERANCE = 1e-3


def test_a_whole_run_logs_what_a_run_of_adam_logs(tmp_path: Path) -> None:
    lines, events, timers = {}, {}, {}
    with contextlib.ExitStack() as stack:
        runs = {}
        for name in ("adam", "adam_mini"):
            folder = tmp_path / name
            options = ["--optimizer", name, "--tensorboard-dir", str(folder / "events")]
            options += ["--data-cache-path", str(folder / "cache")]
            options += ["--adam-mini-full-v", "*"] if name == "adam_mini" else []
            arguments = ["--cpu-host", "examples/pretrain_llama.py", *FLAGS, *options]
            run = start_program(1, launch, arguments, log=tmp_path / f"{name}.log", folder=ROOT)
            runs[name] = stack.enter_context(run)
        for name, run in runs.items():
            assert run.wait(150.0) == 0, run.output()[-4000:]
            lines[name] = list(fields_of(run.output()))
            timers[name] = set(re.findall(r"^ +(\S+) \.+: ", run.output(), re.MULTILINE))
            events[name] = scalars_of(tmp_path / name / "events")
    assert len(lines["adam"]) == 5
    for mine, other in zip(lines["adam_mini"], lines["adam"], strict=True):
        assert list(mine) == list(other), "the same fields in the same order"
        for key, value in mine.items():
            if not key.startswith("elapsed"):
                assert value == pytest.approx(other[key], rel=RUN_TOLERANCE, abs=RUN_TOLERANCE), key
    assert [line["number of skipped iterations"] for line in lines["adam_mini"]] == [1, 1, 0, 0, 0]

    assert timers["adam_mini"] - timers["adam"] == TIMERS["adam_mini"] - TIMERS["adam"]
    assert timers["adam"] - timers["adam_mini"] == TIMERS["adam"] - TIMERS["adam_mini"]
    assert timers["adam_mini"] >= TIMERS["adam_mini"] | {"optimizer", "params-all-gather"}

    own = {tag for tag in events["adam_mini"] if tag.startswith("adam-mini/")}
    named = {name: {f"{timer}-time" for timer in found} for name, found in TIMERS.items()}
    shared = events["adam_mini"].keys() - own - named["adam_mini"]
    assert shared == events["adam"].keys() - named["adam"]
    assert {"mem-allocated-bytes", "params-norm", "num-zeros", "learning-rate"} <= shared
    for tag in shared:
        if not tag.startswith("mem-") and not tag.endswith("time"):
            mine, other = (dict(events[name][tag]) for name in ("adam_mini", "adam"))
            assert mine.keys() == other.keys(), tag
            assert mine == pytest.approx(other, rel=RUN_TOLERANCE), tag


def fields_of(output: str) -> Iterator[dict[str, float]]:
    """Yield the numbers of each iteration's line by their names."""
    for line in re.findall(r"iteration +\d+/ +\d+ \|(.*)\|", output):
        yield {
            name.strip(): float(value)
            for name, value in (field.split(":") for field in line.split("|"))
        }


def scalars_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return step and value of all that TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }
