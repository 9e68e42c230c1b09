"""State in fewer bits, and what the step costs besides: memory, waits, order of its parts."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import megatron_adam_mini
from megatron_adam_mini import AdamMiniConfig
from megatron_adam_mini.config import EXP_AVG_DTYPES
from megatron_adam_mini.mcore.low_precision import storage_options
from tests.gather import slices_of
from tests.megatron_job import Job, Trainer, global_names
from tests.ranks import run_ranks
from tests.test_step import digest

SHARDED = Job(tp=2, pp=2, overlap=True, bucket_size=3000, steps=4, bf16=True, tied=True, bias=True)
BF16_M = {"exp_avg_dtype": "bf16"}
STOCHASTIC = {"exp_avg_dtype": "bf16", "stochastic_rounding": True}
REMAINDERS = {"param_remainders": True}


def train(job: Job) -> dict[str, Any]:
    trainer = Trainer(job)
    for step in range(job.steps):
        assert trainer.step(step)[0]
    trainer.sync_params()
    weights = global_names(trainer.chunks)
    return {
        "losses": trainer.losses,
        "digest": digest(weights.values()),
        "slices": slices_of(trainer),
        "bytes": trainer.optimizer.state_bytes(),
        "stored": [
            (str(s.param.dtype), str(s.exp_avg.dtype), s.exp_avg.numel())
            for s in trainer.optimizer.inner.main_params.attach().on_device
        ],
        "weights": {name: p.detach().float().clone() for name, p in weights.items()},
    }


def test_lean_is_remainders_and_a_stochastically_rounded_m() -> None:
    lean = AdamMiniConfig(lean=True, preset="row")
    assert replace(lean, lean=False) == AdamMiniConfig(preset="row", **STOCHASTIC | REMAINDERS)
    assert AdamMiniConfig(lean=True, exp_avg_dtype="bf16").step_fields() == lean.step_fields()


def test_lean_and_its_opposite_are_refused() -> None:
    other = [dtype for dtype in EXP_AVG_DTYPES if dtype not in ("fp32", "bf16")]
    for dtype in other:
        with pytest.raises(ValueError, match=rf"stores m as bf16, but .*--exp-avg-dtype {dtype}"):
            AdamMiniConfig(lean=True, exp_avg_dtype=dtype)
    masters = SimpleNamespace(store_param_remainders=False)
    for name in ("lean", "param_remainders"):
        message = rf"{name}=True .*16-bit remainders, but .*store_param_remainders=False"
        with pytest.raises(ValueError, match=message):
            storage_options(masters, AdamMiniConfig(**{name: True}))


@pytest.mark.support("16-bit remainders", "oracle")
def test_remainders_train_bit_for_bit_as_float32_main_parameters() -> None:
    stored = run_ranks(8, train, SHARDED)
    completed = run_ranks(8, train, replace(SHARDED, adam_mini=REMAINDERS))
    for left, right in zip(stored, completed, strict=True):
        assert left["losses"] == right["losses"]
        assert left["digest"] == right["digest"]
        for one, other in zip(left["slices"], right["slices"], strict=True):
            for key in ("param", "exp_avg", "v"):
                assert one.values[key].tobytes() == other.values[key].tobytes(), key
        assert left["bytes"]["main_param"] == 2 * right["bytes"]["main_param"]
        assert {kind for kind, _, _ in right["stored"]} == {"torch.int16"}
        elements = sum(numel for *_, numel in right["stored"])
        assert right["bytes"]["main_param"] == 2 * elements
    param = torch.from_numpy(stored[0]["slices"][0].values["param"])
    assert (param != param.bfloat16().float()).float().mean() > 0.5, "main parameters are weights"


@pytest.mark.parametrize("options", [BF16_M, STOCHASTIC | REMAINDERS])
def test_bfloat16_m_halves_its_bytes_and_trains_as_well(options: dict[str, Any]) -> None:
    job = replace(SHARDED, pp=1)
    full = run_ranks(4, train, job)
    small = run_ranks(4, train, replace(job, adam_mini=options))
    for left, right in zip(full, small, strict=True):
        assert left["bytes"]["exp_avg"] == 2 * right["bytes"]["exp_avg"]
        assert left["bytes"]["exp_avg_sq"] == right["bytes"]["exp_avg_sq"]
    # m is off by at most 2**-8 of itself, so steps are too.
    full_losses, small_losses = full[0]["losses"], small[0]["losses"]
    assert full[0]["digest"] != small[0]["digest"]
    assert small_losses == pytest.approx(full_losses, rel=2e-3)
    assert full_losses[-1] < full_losses[0] - 0.02


def test_replicas_stay_bit_equal_under_stochastic_rounding() -> None:
    """Norms on both tensor-parallel ranks, tied embeddings on both stages, data parallelism."""
    found = run_ranks(8, train, replace(SHARDED, adam_mini=STOCHASTIC))
    by_name: dict[tuple[str, Any], set[bytes]] = {}
    for rank, result in enumerate(found):
        tp_rank = rank % 2
        for name, value in result["weights"].items():
            tied = name in ("output_layer.weight", "embedding.word_embeddings.weight")
            replicated = "norm" in name or "linear_proj.bias" in name or "linear_fc2.bias" in name
            key = ("tied" if tied else name, None if replicated else tp_rank)
            by_name.setdefault(key, set()).add(value.numpy().tobytes())
    assert all(len(values) == 1 for values in by_name.values())
    assert {("tied", 0), ("tied", 1)} <= by_name.keys()


def test_stochastic_rounding_is_the_same_in_every_run_and_another_one_than_nearest() -> None:
    job = replace(SHARDED, pp=1, steps=3, adam_mini=STOCHASTIC)
    first, second = run_ranks(4, train, job), run_ranks(4, train, job)
    nearest = run_ranks(4, train, replace(job, adam_mini=BF16_M))
    assert [r["digest"] for r in first] == [r["digest"] for r in second]
    assert all(a["digest"] != b["digest"] for a, b in zip(first, nearest, strict=True))


def build_error(job: Job) -> str:
    with pytest.raises(ValueError, match="remainders") as caught:
        Trainer(job)
    return str(caught.value)


def test_remainders_of_float16_weights_are_refused_on_all_ranks() -> None:
    found = run_ranks(2, build_error, Job(fp16=True, adam_mini=REMAINDERS))
    assert all("needs bfloat16 weights, got torch.float16" in text for text in found)
    assert all("Remedy: --bf16" in text for text in found)
    assert all("--adam-mini-stochastic-rounding saves memory" in text for text in found)


# What a step costs.


class Watch(TorchDispatchMode):
    """Records operators that wait for the device, and bytes of new storage that others return."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "_to_copy")

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.allocated: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        known = {
            t.untyped_storage().data_ptr()
            for t in tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in self.WAITS:
            self.waits.append(name)
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in known:
                self.allocated.append((name, t.nbytes))
        return result


def watched_step(job: Job) -> dict[str, Any]:
    trainer = Trainer(job)
    for step in range(2):
        trainer.step(step)
    trainer.backward(2)
    adam_mini = trainer.optimizer.inner
    decision = adam_mini.decide(torch.tensor([[4.0, 0.0]], dtype=torch.float64), clip_grad=1.0)
    with Watch() as inner:
        adam_mini.sum_squares()
        adam_mini.update(decision)
    adam_mini.finish(decision)
    trainer.backward(3)
    with Watch() as whole:
        trainer.optimizer.step()
    return {
        "inner": (inner.waits, inner.allocated),
        "step": (whole.waits, sum(n for _, n in whole.allocated)),
        "collectives": trainer.optimizer.communication_per_step()["collectives"],
    }


def test_a_step_neither_allocates_nor_waits_for_the_device() -> None:
    # The specification allocates, so no other backend (ADAM_MINI_TEST_BACKEND) takes its place.
    options = STOCHASTIC | REMAINDERS | {"backend": "cpu"}
    job = replace(SHARDED, pp=1, overlap=False, tied=False, adam_mini=options)
    for found in run_ranks(4, watched_step, job):
        assert found["collectives"] >= 1, "nothing was reduced"
        assert found["inner"] == ([], [])
        waits, allocated = found["step"]
        # The norm and the number of non-finite sums are read at the end; the clipping factor is a
        # handful of scalars.
        assert len(waits) <= 2
        assert allocated <= 256


def recorded(events: list[str], name: str, call: Any) -> Any:
    def wrapper(*args: Any) -> None:
        events.append(name)
        call(*args)

    return wrapper


def order_of_events(job: Job) -> list[str]:
    trainer = Trainer(job)
    trainer.step(0)
    trainer.backward(1)
    inner, events = trainer.optimizer.inner, []
    kernels = inner.kernels

    def update_(*args: Any, **kwargs: Any) -> None:
        cut = any(args[1] is plan.cut for plan in inner.plan.buffers)
        events.append("update cut" if cut else "update uncut")
        kernels.update_(*args, **kwargs)

    names = [name for name in dir(kernels) if name.endswith("_") and name[0] != "_"]
    functions = {name: getattr(kernels, name) for name in names}
    inner.kernels = SimpleNamespace(**functions | {"update_": update_})
    for name in ("start_", "finish_"):
        wrapped = recorded(events, name, getattr(inner.collectives, name))
        setattr(inner.collectives, name, wrapped)
    trainer.optimizer.step()
    return events


def test_uncut_blocks_are_updated_while_cut_ones_are_on_the_way() -> None:
    job = Job(tp=2, bucket_size=3000, steps=2)
    for events in run_ranks(4, order_of_events, job):
        changes = [e for i, e in enumerate(events) if i == 0 or events[i - 1] != e]
        assert changes == ["start_", "update uncut", "finish_", "update cut"]


# Single phase.


@pytest.mark.support("single phase", "oracle")
def test_single_phase_equals_two_phases_without_clipping() -> None:
    """Cut rows, biases and tensor-parallel ones included; only long rows add in another order."""
    job = replace(SHARDED, clip_grad=0.0)
    two = run_ranks(8, train, job)
    one = run_ranks(8, train, replace(job, adam_mini={"single_phase": True}))
    assert [r["digest"] for r in two] == [r["digest"] for r in one]
    for left, right in zip(two, one, strict=True):
        for mine, theirs in zip(left["slices"], right["slices"], strict=True):
            for key in ("param", "exp_avg", "v"):
                assert mine.values[key].tobytes() == theirs.values[key].tobytes(), key


def single_phase_errors(jobs: list[Job]) -> list[str]:
    from megatron.core import parallel_state

    found = []
    for job in jobs:
        with pytest.raises(ValueError, match="single-phase") as caught:
            Trainer(job)
        found.append(str(caught.value))
        parallel_state.destroy_model_parallel()
    return found


def test_single_phase_is_refused_where_something_waits_for_the_norm() -> None:
    job = Job(adam_mini={"single_phase": True}, clip_grad=0.0)
    jobs = [
        replace(job, clip_grad=1.0),
        replace(job, fp16=True),
        replace(job, optimizer_args={"grad_norm_skip_threshold": 5.0}),
    ]
    reasons = ["--clip-grad 1.0 needs", "a loss scale", "grad_norm_skip_threshold 5.0 needs"]
    for found in run_ranks(2, single_phase_errors, jobs):
        for reason, text in zip(reasons, found, strict=True):
            assert reason in text
            assert "Remedy: drop --adam-mini-single-phase" in text


RECIPE = {
    "use_precision_aware_optimizer": True,
    "main_grads_dtype": torch.bfloat16,
    "exp_avg_dtype": torch.bfloat16,
    "exp_avg_sq_dtype": torch.bfloat16,
}


def registered(job: Job) -> dict[str, Any]:
    """Register before the config is made, which then may have Megatron's fields."""
    megatron_adam_mini.register()
    return train(job)


def renamed(job: Job) -> dict[str, Any]:
    """Rename the optimizer of a finished config, as a user of a recipe does, and train."""
    from megatron.core.optimizer import get_megatron_optimizer

    trainer = Trainer(replace(job, optimizer_args={}))
    config = trainer.optimizer.config
    for name, value in job.optimizer_args.items():
        setattr(config, name, value)
    config.adam_mini = None
    trainer.optimizer = get_megatron_optimizer(config, trainer.chunks)
    for group in trainer.optimizer.param_groups:
        group["weight_decay"] = job.weight_decay * group["wd_mult"]
    for step in range(job.steps):
        assert trainer.step(step)[0]
    assert config.use_precision_aware_optimizer, "the user's config is left alone"
    return {"digest": digest(global_names(trainer.chunks).values())}


def test_precision_aware_configs_store_what_transformer_engine_would() -> None:
    job = Job(bf16=True, grad_fp32=False, bucket_size=3000, steps=2)
    by_options = run_ranks(2, train, replace(job, adam_mini=BF16_M | REMAINDERS))
    by_config = run_ranks(2, registered, replace(job, optimizer_args=RECIPE))
    by_name = run_ranks(2, renamed, replace(job, optimizer_args=RECIPE))
    for expected, found, other in zip(by_options, by_config, by_name, strict=True):
        assert found["digest"] == other["digest"] == expected["digest"]
        assert found["bytes"] == expected["bytes"]
    masters = replace(job, optimizer_args=RECIPE | {"store_param_remainders": False})
    for found, expected in zip(run_ranks(2, registered, masters), by_options, strict=True):
        assert found["digest"] == expected["digest"]
        assert found["bytes"]["main_param"] == 2 * expected["bytes"]["main_param"]


def config_error(values: dict[str, Any]) -> str:
    megatron_adam_mini.register()
    try:
        Trainer(Job(bf16=True, optimizer_args=values))
    except (ValueError, NotImplementedError, AssertionError) as error:
        return str(error)
    return ""


def test_other_main_parameters_and_m_are_refused() -> None:
    def found(**values: Any) -> str:
        return run_ranks(1, config_error, values)[0]

    aware = {"use_precision_aware_optimizer": True}
    assert "--main-params-dtype fp16: allowed is fp32" in found(
        **aware, main_params_dtype=torch.float16
    )
    assert "exp_avg_dtype='fp16' is not known; allowed: fp32, bf16" in found(
        **aware, exp_avg_dtype=torch.float16
    )
    text = found(exp_avg_sq_dtype=torch.bfloat16)
    assert "--exp-avg-sq-dtype bf16 without --use-precision-aware-optimizer: allowed" in text
    assert found(exp_avg_dtype=torch.bfloat16) == ""
