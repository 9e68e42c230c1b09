"""Short runs of ``megatron.training``'s ``pretrain``, seen from inside.

``train`` runs the example script in a rank, as the launcher does, and returns what the optimizer
was like when training began, in each step, and at the end.
"""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import distributed

from tests import fused_adam
from tests.megatron_job import global_names
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parent.parent
#: The smallest Llama that has every kind of matrix; data-parallel ranks share the state.
MODEL = """
    --num-layers 1 --hidden-size 16 --ffn-hidden-size 24 --num-attention-heads 2
    --seq-length 8 --max-position-embeddings 8 --swiglu --normalization RMSNorm
    --position-embedding-type rope --disable-bias-linear --untie-embeddings-and-output-weights
    --attention-dropout 0 --hidden-dropout 0 --tokenizer-type NullTokenizer --vocab-size 257
    --make-vocab-size-divisible-by 1 --use-distributed-optimizer --micro-batch-size 1 --seed 3
    --split 100,0,0 --eval-iters 0 --eval-interval 1000 --log-interval 1
    --no-create-attention-mask-in-dataloader
    --save-interval 1000
"""
#: Of 8 iterations, the first two warm the rate up, the others bring it down on a line.
SCHEDULE = """
    --global-batch-size 2 --train-iters 8 --lr 1e-2 --min-lr 1e-3 --lr-warmup-iters 2
    --lr-decay-style linear --weight-decay 0.1
"""
#: Two stages of two virtual ones each, whose schedule starts reductions and gathers by itself.
OVERLAPPING_STAGES = """
    --num-layers 4 --global-batch-size 4 --pipeline-model-parallel-size 2
    --num-layers-per-virtual-pipeline-stage 1 --overlap-grad-reduce --overlap-param-gather
    --ckpt-format torch
"""


OPTIMIZERS = {
    "adam_mini": "--optimizer adam_mini",
    "adam": "--optimizer adam --dist-ckpt-optim-fully-reshardable",
}


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        flags: after those of the model; a flag that stands there already is overridden.
        optimizer: ``adam_mini``, or ``adam`` for Megatron's own.
        bf16: whether weights are bfloat16.
        frozen: parameters whose name contains one of these are not trained.
        overrides: values of parameter groups by name pattern, besides Megatron's own.
        minutes: how long ago it began, as ``--exit-duration-in-mins`` sees it.
        schedule: other flags that stand in for ``SCHEDULE``.
        non_finite: iterations, counted from 0, whose reduced gradients are Inf.
        non_finite_on: on these ranks.
        non_finite_in: of parameters whose name contains this.
    """

    flags: str = ""
    optimizer: str = "adam_mini"
    bf16: bool = True
    frozen: tuple[str, ...] = ()
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    minutes: float = 0.0
    schedule: str = SCHEDULE
    non_finite: tuple[int, ...] = ()
    non_finite_on: tuple[int, ...] = (0, 1)
    non_finite_in: str = ""


@dataclass
class Seen:
    """What a rank saw.

    Attributes:
        start: groups, step and state after start-up, see ``look_at``.
        steps: (learning rate, weight decay) by parameter, before each step.
        scaler: for each step whether it was taken, and had no norm; then the loss scaler's state.
        end: as ``start``, at the end.
        iterations: number of the first iteration to do at the start, and at the end.
        samples: consumed, and skipped, at the end.
        error: type and text, ``None`` if the run ended well.
        warnings: what Adam-mini logged.
    """

    start: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, tuple[float, ...]]] = field(default_factory=list)
    scaler: list[tuple[Any, ...]] = field(default_factory=list)
    end: dict[str, Any] = field(default_factory=dict)
    iterations: tuple[int, int] = (-1, -1)
    samples: tuple[int, int] = (-1, -1)
    error: tuple[str, str] | None = None
    warnings: list[str] = field(default_factory=list)


def make_dataset(prefix: Path) -> str:
    """Write a small dataset; return the flags that select it."""
    run_ranks(1, _tokenize, str(prefix))
    return f"--data-path {prefix} --data-cache-path {prefix.parent / 'cache'}"


def _tokenize(prefix: str) -> None:
    sys.path.insert(0, str(ROOT / "examples"))
    import tokenize_bytes

    sys.argv = ["tokenize_bytes.py", "--max-bytes", "20000", "--output-prefix", prefix]
    tokenize_bytes.main()


def train(run: Run) -> Seen:
    """Do a run in a rank."""
    from megatron.training import get_args, training

    from megatron_adam_mini import launch

    seen = Seen()
    live: list[Any] = []
    _prepare(run, seen)
    setup = training.setup_model_and_optimizer

    def setup_and_look(*args: Any, **kwargs: Any) -> Any:
        live[:] = chunks, optimizer, scheduler = setup(*args, **kwargs)
        seen.start = look_at(*live)
        seen.iterations = (get_args().iteration, -1)
        step = optimizer.step

        def look_and_step() -> Any:
            seen.steps.append(rates_of(chunks, optimizer))
            if get_args().curr_iteration in run.non_finite:
                _spoil_gradients(chunks, run)
            result = step()
            seen.scaler.append((result[0], result[1] is None, *_scaler_state(optimizer)))
            return result

        optimizer.step = look_and_step
        return chunks, optimizer, scheduler

    training.setup_model_and_optimizer = setup_and_look
    script = str(ROOT / "examples/pretrain_llama.py")
    flags = f"{MODEL} {run.schedule} {OPTIMIZERS[run.optimizer]} {run.flags}".split()
    try:
        launch.main(["--cpu-host", script, *flags, *["--bf16"] * run.bf16])
    except SystemExit as end:  # as --exit-interval ends a run
        if end.code:
            raise
    except Exception as error:
        seen.error = (type(error).__name__, str(error))
        return seen
    args = get_args()
    seen.end = look_at(*live)
    seen.iterations = (seen.iterations[0], args.curr_iteration + 1)
    seen.samples = (args.consumed_train_samples, args.skipped_train_samples)
    return seen


def _spoil_gradients(chunks: list[Any], run: Run) -> None:
    if distributed.get_rank() in run.non_finite_on:
        for name, param in chunks[0].named_parameters():
            if run.non_finite_in in name:
                param.main_grad.view(-1)[-1] = float("inf")


def _scaler_state(optimizer: Any) -> tuple[Any, ...]:
    # Megatron's Adam has a scaler of its own for experts, the last.
    scaler = optimizer.chained_optimizers[-1].grad_scaler
    state = {} if scaler is None else scaler.state_dict()
    return tuple((key, float(value)) for key, value in state.items())


def _prepare(run: Run, seen: Seen) -> None:
    """Do to Megatron what a user's own script would do, and listen."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.optimizer.optimizer_config import ParamKey
    from megatron.training import training

    if run.optimizer == "adam":
        fused_adam.install()
    # The module was imported when the server of ranks started, long before this run.
    training._TRAIN_START_TIME = time.time() - 60 * run.minutes
    init, configure = GPTModel.__init__, training.get_megatron_optimizer_config

    def init_and_freeze(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        for name, param in self.named_parameters():
            param.requires_grad_(not any(part in name for part in run.frozen))

    def configure_and_override(args: Any) -> Any:
        config, overrides = configure(args)
        named = {ParamKey(name=pattern): values for pattern, values in run.overrides.items()}
        return config, {**overrides, **named}

    GPTModel.__init__ = init_and_freeze
    if run.overrides:
        training.get_megatron_optimizer_config = configure_and_override
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: seen.warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_adam_mini").addHandler(handler)


def look_at(chunks: list[Any], optimizer: Any, scheduler: Any) -> dict[str, Any]:
    """Return groups without parameters, step, schedule, weights, and state by parameter."""
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    member = optimizer.chained_optimizers[0]
    state = {
        name: {
            key: tensor.detach().float().numpy().copy()
            for key, tensor in {"param": _main_param(member, shard), **moments}.items()
        }
        for name, shard in _shards(chunks, member).items()
        for moments in (_moments(member, shard),)
    }
    return {
        "groups": groups,
        "step": {group.get("step", 0) for group in groups},
        "schedule": scheduler.state_dict(),
        "state": state,
        "weights": {
            name: param.detach().float().numpy().copy()
            for name, param in global_names(chunks).items()
        },
    }


def rates_of(chunks: list[Any], optimizer: Any, *keys: str) -> dict[str, tuple[float, ...]]:
    """Return values of the groups of the parameters that this rank updates.

    Default keys: learning rate and weight decay.
    """
    keys = keys or ("lr", "weight_decay")
    # Megatron's Adam has a member of its own for experts.
    shards = {
        id(shard): name
        for member in optimizer.chained_optimizers
        for name, shard in _shards(chunks, member).items()
    }
    return {
        shards[id(shard)]: tuple(group[key] for key in keys)
        for group in optimizer.param_groups
        for shard in group["params"]
    }


def _shards(chunks: list[Any], member: Any) -> dict[str, Any]:
    """Return main shards by name, as Megatron's distributed optimizer lists them."""
    names = {param: name for name, param in global_names(chunks).items()}
    models = [*member.model_float16_groups, *member.model_fp32_groups]
    if any(shard is not None for group in member.shard_fp32_from_float16_groups for shard in group):
        shards = [*member.shard_fp32_from_float16_groups, *member.shard_fp32_groups]
    else:  # remainders
        shards = [*member.shard_float16_groups, *member.shard_fp32_groups]
        own = {s.data_ptr(): s for group in member.param_groups for s in group["params"]}
        shards = [[own[shard.data_ptr()] for shard in group] for group in shards]
    return {
        names[param]: shard
        for params, group in zip(models, shards, strict=True)
        for param, shard in zip(params, group, strict=True)
    }


def _main_param(member: Any, shard: Any) -> Any:
    remainder = member.optimizer.state[shard].get("master_param")
    if remainder is None:
        return shard
    from megatron_adam_mini.rounding import join

    return join(shard, remainder)


def _moments(member: Any, shard: Any) -> dict[str, Any]:
    state = member.optimizer.state[shard]
    return {key: state[key] for key in ("exp_avg", "exp_avg_sq") if key in state}


def assert_same_state(left: dict[str, Any], right: dict[str, Any]) -> None:
    """Compare steps and state bit for bit."""
    assert left["step"] == right["step"]
    assert left["state"].keys() == right["state"].keys()
    for name, tensors in left["state"].items():
        for key, values in tensors.items():
            assert np.array_equal(values, right["state"][name][key]), f"{key} of {name}"
