"""The state as torch's optimizers show it: what callers move, replace or clear is taken over."""

from __future__ import annotations

import copy
import io
import operator
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tests.gather import slices_of
from tests.megatron_job import Job, Trainer, global_names
from tests.ranks import run_ranks

#: Several buckets, cut heads and rows, a full v for the biases, groups with and without decay.
BASE = Job(bf16=True, bias=True, bucket_size=3000, steps=4)
JOBS = {
    "masters": BASE,
    "float32": replace(BASE, bf16=False),
    "remainders, bf16 m": replace(
        BASE, adam_mini={"param_remainders": True, "exp_avg_dtype": "bf16"}
    ),
    "replicated": replace(BASE, distributed_optimizer=False),
}


def moved(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor in other memory, as on another device."""
    return tensor.detach().clone()


def leave_alone(trainer: Trainer) -> None:
    pass


def move_all(trainer: Trainer) -> None:
    inner = trainer.optimizer.optimizer
    for group in inner.param_groups:
        for shard in group["params"]:
            shard.data = moved(shard)
    for state in inner.state.values():
        for key, value in state.items():
            state[key] = moved(value)


def move_some(trainer: Trainer) -> None:
    states = list(trainer.optimizer.optimizer.state.values())
    for state in states[::2]:
        state["exp_avg"] = moved(state["exp_avg"])
    states[-1]["exp_avg_sq"] = moved(states[-1]["exp_avg_sq"])


def megatrons_own(trainer: Trainer) -> None:
    trainer.optimizer.offload_to_cpu()
    trainer.optimizer.restore_from_cpu()


def offloaded_only(trainer: Trainer) -> None:
    trainer.optimizer.offload_to_cpu()


def torch_state_dict(trainer: Trainer) -> None:
    inner = trainer.optimizer.optimizer
    saved = copy.deepcopy(inner.state_dict())
    with torch.no_grad():
        for state in inner.state.values():
            state["exp_avg"].fill_(7)
    inner.param_groups[0]["step"] = 99
    inner.load_state_dict(saved)


def new_state_objects(trainer: Trainer) -> None:
    member = trainer.optimizer.chained_optimizers[0]
    member.state = {key: dict(value) for key, value in reversed(list(member.state.items()))}
    member.param_groups = [dict(group) for group in member.param_groups]


EXCURSIONS = (
    leave_alone,
    move_all,
    move_some,
    megatrons_own,
    offloaded_only,
    torch_state_dict,
    new_state_objects,
)


def run_with_excursions(job: Job) -> list[Any]:
    """Train on once for each excursion, from one common state; return what each run ends with."""
    results = []
    for excursion in EXCURSIONS:
        trainer = Trainer(job)
        for step in range(job.steps):
            if step == 2:
                trainer.sync_params()
                excursion(trainer)
            trainer.step(step)
        trainer.sync_params()
        parts = slices_of(trainer)
        values = [part.values[key].tobytes() for part in parts for key in ("param", "exp_avg", "v")]
        weights = [
            p.detach().float().numpy().tobytes() for p in global_names(trainer.chunks).values()
        ]
        results.append((values, weights, [g["step"] for g in trainer.optimizer.param_groups]))
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
    return [result == results[0] for result in results]


@pytest.mark.parametrize("case", JOBS)
def test_training_is_bit_equal_with_and_without_an_excursion(case: str) -> None:
    for rank in run_ranks(2, run_with_excursions, JOBS[case]):
        assert dict(zip(EXCURSIONS, rank, strict=True)) == dict.fromkeys(EXCURSIONS, True)


def freed_and_current(job: Job) -> dict[str, Any]:
    """Return what becomes of the state's memory when it is moved, and what the views show."""
    trainer = Trainer(job)
    trainer.step(0)
    inner, member = trainer.optimizer.optimizer, trainer.optimizer.member
    own = ("exp_avg", "exp_avg_sq", "master_param")

    def storages() -> list[StorageWeakRef]:
        tensors = [state[key] for state in inner.state.values() for key in own if key in state]
        masters = [p for group in member.shard_fp32_from_float16_groups for p in group]
        tensors += [p for p in masters if p is not None]
        return [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]

    found: dict[str, Any] = {}
    for excursion in (move_all, offloaded_only):
        before = storages()
        assert not any(storage.expired() for storage in before)
        excursion(trainer)
        found[excursion.__name__] = all(storage.expired() for storage in before)
        trainer.step(1)
    shard = inner.param_groups[0]["params"][0]
    before = shard.detach().clone(), inner.state[shard]["exp_avg"].clone()
    trainer.step(2)
    found["views are current"] = not torch.equal(before[0], shard) and not torch.equal(
        before[1], inner.state[shard]["exp_avg"]
    )
    found["one flat tensor per kind"] = len(
        {state["exp_avg"].untyped_storage().data_ptr() for state in inner.state.values()}
    )
    return found


@pytest.mark.parametrize("case", [case for case in JOBS if case != "replicated"])
def test_moved_state_frees_its_memory(case: str) -> None:
    for found in run_ranks(2, freed_and_current, JOBS[case]):
        assert found == {
            "move_all": True,
            "offloaded_only": True,
            "views are current": True,
            "one flat tensor per kind": 1,
        }


def halved(trainer: Trainer, *, elsewhere: bool) -> None:
    """Halve the whole state, in place or by putting other tensors in its place."""
    inner = trainer.optimizer.optimizer
    tensors = [(shard, None, shard) for group in inner.param_groups for shard in group["params"]]
    tensors += [(shard, key, state[key]) for shard, state in inner.state.items() for key in state]
    for shard, key, tensor in tensors:
        if tensor.dtype == torch.int16:
            continue
        if not elsewhere:
            tensor.data.mul_(0.5)
        elif key is None:
            shard.data = tensor.detach() * 0.5
        else:
            inner.state[shard][key] = tensor * 0.5


def written_state(job: Job) -> list[bool]:
    runs = []
    for elsewhere in (None, False, True):
        trainer = Trainer(job)
        trainer.step(0)
        trainer.backward(1)  # first: halved weights change it
        if elsewhere is not None:
            halved(trainer, elsewhere=elsewhere)
        trainer.optimizer.step()
        parts = slices_of(trainer)
        runs.append([p.values[key].tobytes() for p in parts for key in ("param", "exp_avg", "v")])
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
    return [runs[1] == runs[0], runs[1] == runs[2]]


@pytest.mark.parametrize("case", JOBS)
def test_values_that_callers_write_reach_the_step(case: str) -> None:
    for rank in run_ranks(2, written_state, JOBS[case]):
        assert rank == [False, True]


def groups_and_errors(job: Job) -> dict[str, Any]:
    """Write to groups as schedulers do, and to the state as nobody should."""
    trainer = Trainer(job)
    optimizer, inner = trainer.optimizer, trainer.optimizer.optimizer
    found: dict[str, Any] = {
        "same groups": all(map(operator.is_, optimizer.param_groups, inner.param_groups)),
        "torch": isinstance(inner, torch.optim.Optimizer),
        "defaults": sorted(inner.param_groups[0].keys() & {"lr", "betas", "eps", "weight_decay"}),
    }
    shards = [shard for group in inner.param_groups for shard in group["params"]]
    before = [shard.detach().clone() for shard in shards]
    scheduler = torch.optim.lr_scheduler.LambdaLR(inner, lambda step: 0.0)
    trainer.step(0)
    found["a scheduler of torch sets lr to 0"] = all(map(torch.equal, before, shards))
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    trainer.step(1)
    found["Megatron's list sets it back"] = not any(map(torch.equal, before, shards))
    found["steps"] = {group["step"] for group in inner.param_groups}, scheduler.last_epoch
    wide = [p for p in optimizer.get_parameters() if inner.state[p]["exp_avg_sq"].shape != p.shape]
    found["per element"] = bool(wide) and all(
        inner.exp_avg_sq_per_element(p).shape == p.shape
        and set(inner.exp_avg_sq_per_element(p).tolist())
        == set(inner.state[p]["exp_avg_sq"].tolist())
        for p in wide
    )
    stream = io.BytesIO()
    torch.save(inner.state_dict(), stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=True)
    found["saved"] = torch.equal(loaded["state"][0]["exp_avg"], inner.state[shards[0]]["exp_avg"])
    twin = copy.deepcopy(inner)
    first = twin.param_groups[0]["params"][0]
    found["copied"] = (
        torch.equal(first, shards[0])
        and first.data_ptr() != shards[0].data_ptr()
        and torch.equal(twin.state[first]["exp_avg"], inner.state[shards[0]]["exp_avg"])
    )
    inner.state.clear()
    trainer.step(2)
    decay = 1 - trainer.optimizer.config.adam_beta1
    grad = trainer.optimizer.get_grads_for_grad_norm()[0]
    pieces = optimizer.inner.plan.pieces
    counted = [p for p in pieces if optimizer.inner.plan.parameters[p.parameter].info.in_norm]
    m = inner.state[inner.shards[pieces.index(counted[0])]]["exp_avg"]
    found["cleared"] = bool(torch.isclose(m, decay * grad, rtol=1e-5, atol=0).all())

    def error_of(change: Any, undo: Any) -> str:
        change()
        try:
            trainer.optimizer.step()
        except ValueError as error:
            return str(error)
        finally:
            undo()
        return "no error"

    trainer.backward(3)
    state, group = inner.state[shards[0]], inner.param_groups[0]
    kept = state["exp_avg"], group["params"], group["step"]
    found["shape"] = error_of(
        lambda: state.update(exp_avg=torch.zeros(3)), lambda: state.update(exp_avg=kept[0])
    )
    found["exchanged"] = error_of(
        lambda: group.update(params=[torch.zeros(3)]), lambda: group.update(params=kept[1])
    )
    found["counts"] = error_of(lambda: group.update(step=77), lambda: group.update(step=kept[2]))
    return found


def test_groups_state_and_clear_errors() -> None:
    for found in run_ranks(1, groups_and_errors, replace(BASE, clip_grad=0.0)):
        assert re.search(r"'exp_avg' of .* of shape \(3,\).* Assign a tensor", found.pop("shape"))
        assert re.search(r"param_groups\[0\]\['params'\].*shard.data", found.pop("exchanged"))
        assert "[3, 77]" in found.pop("counts")
        assert found == {
            "same groups": True,
            "torch": True,
            "defaults": ["betas", "eps", "lr", "weight_decay"],
            "a scheduler of torch sets lr to 0": True,
            "Megatron's list sets it back": True,
            "steps": ({2}, 0),
            "per element": True,
            "saved": True,
            "copied": True,
            "cleared": True,
        }


def copies_of(job: Job) -> list[str]:
    """Return what copying and pickling the whole optimizer raises."""
    import pickle

    found = []
    optimizer = Trainer(job).optimizer
    for copied in (copy.deepcopy, pickle.dumps):
        try:
            copied(optimizer)
            found.append("copied")
        except Exception as error:
            found.append(type(error).__name__)
    return found


def test_whole_optimizer_is_copied_and_pickled_as_megatrons_is() -> None:
    ours, stock = (
        run_ranks(1, copies_of, replace(BASE, optimizer=o)) for o in ("adam_mini", "adam")
    )
    assert ours == stock
