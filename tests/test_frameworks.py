"""What frameworks do to the optimizer between two phases of a training: see docs/frameworks.md.

Each sequence does to real buffers and a real optimizer what a framework does, in the same order.
"Another device" is other memory here: whatever a framework moves is cloned, and the test looks
whether the memory that it left is gone.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from tests.megatron_job import Job, Trainer, global_names, whole_weight
from tests.ranks import RankError, run_ranks
from tests.test_checkpoint import load, model_state, save, unwrapped
from tests.test_step import NORM_TOLERANCE, digest

#: Several buckets, cut rows and heads, and one float32 parameter in the bfloat16 model.
BASE = Job(
    hidden=56, heads=4, groups=2, ffn=120, vocab=96, layers=1, bf16=True, overlap=True,
    bucket_size=3000, batch=8, float32_modules=("decoder.final_layernorm",),
)  # fmt: skip
MODES = {
    "masters": BASE,
    "remainders": replace(BASE, adam_mini={"param_remainders": True, "exp_avg_dtype": "bf16"}),
    "float32": replace(BASE, bf16=False, float32_modules=()),
    "replicated": replace(BASE, distributed_optimizer=False),
    "8 bits": replace(BASE, adam_mini={"exp_avg_dtype": "fp8"}),
}
SHARDED = ["masters", "remainders", "float32"]  # others have no buffer of weights
MOMENTS = ("exp_avg", "exp_avg_sq")
ALL = (*MOMENTS, "master_param")

Phases = Iterator[None]


def moved(tensor: Tensor) -> Tensor:
    """Return a tensor on "another device"."""
    return tensor.detach().clone()


def member_of(trainer: Trainer) -> Any:
    (member,) = trainer.optimizer.chained_optimizers
    return member


def buffers_of(trainer: Trainer) -> list[Any]:
    return [buffer for c in trainer.chunks for buffer in (*c.buffers, *c.expert_parallel_buffers)]


# Sequences: generators that leave, yield while the state is away, and come back.


def release_buffers(trainer: Trainer) -> None:
    """Keep a copy of the weights; free the memory of weights and gradients below their views."""
    for buffer in buffers_of(trainer):
        if buffer.param_data.untyped_storage().size():
            buffer.weights_on_host = moved(buffer.param_data)
            buffer.released = buffer.param_data.untyped_storage().size()
            buffer.param_data.untyped_storage().resize_(0)
        if buffer.grad_data.untyped_storage().size():
            buffer.released_grads = buffer.grad_data.untyped_storage().size()
            buffer.grad_data.untyped_storage().resize_(0)


def return_buffers(trainer: Trainer) -> None:
    for buffer in buffers_of(trainer):
        buffer.grad_data.untyped_storage().resize_(buffer.released_grads)
        buffer.grad_data.zero_()
        if not buffer.param_data.untyped_storage().size():
            buffer.param_data.untyped_storage().resize_(buffer.released)
            buffer.param_data.copy_(buffer.weights_on_host)


def move_masters(trainer: Trainer) -> None:
    """Move the main parameters by what ``.data`` of each points to."""
    for member in trainer.optimizer.chained_optimizers:
        for group in member.shard_fp32_from_float16_groups:
            for shard in group:
                if shard is not None:
                    shard.data = moved(shard.data)


def move_entries(trainer: Trainer, keys: tuple[str, ...]) -> None:
    """Move state by replacing what stands in the dictionaries of the inner optimizer."""
    for member in trainer.optimizer.chained_optimizers:
        for entry in member.optimizer.state.values():
            for key in keys:
                if key in entry:
                    entry[key] = moved(entry[key])


def verl(trainer: Trainer, keys: tuple[str, ...] = ALL) -> Phases:
    """verl: buffers, then main parameters, then moments and remainders."""
    release_buffers(trainer)
    move_masters(trainer)
    move_entries(trainer, keys)
    yield
    return_buffers(trainer)
    move_masters(trainer)
    move_entries(trainer, keys)


def ms_swift(trainer: Trainer) -> Phases:
    """ms-swift, SkyRL, AReaL (colocated), verl before remainders: these stay on the device."""
    return verl(trainer, MOMENTS)


def nemo_rl(trainer: Trainer) -> Phases:
    """NeMo-RL: Megatron's own move of the buffers; all state, but not the main parameters."""

    def move_state() -> None:
        for _, entry in trainer.optimizer.state.items():
            for key, value in entry.items():
                if torch.is_tensor(value):
                    entry[key] = moved(value)

    for buffer in buffers_of(trainer):
        buffer.param_data_cpu = torch.empty_like(buffer.param_data)  # .cpu() would alias it here
        buffer.offload_to_cpu(move_params=True, move_grads=True)
    move_state()
    yield
    for buffer in buffers_of(trainer):
        buffer.reload_from_cpu(move_params=True, move_grads=True)
    move_state()


def megatron_rl(trainer: Trainer) -> Phases:
    """Megatron's RL loop, and AReaL when told so: the optimizer's own methods."""
    trainer.chunks[0].offload_grad_buffers()
    trainer.optimizer.offload_to_cpu()
    yield
    trainer.chunks[0].restore_grad_buffers()
    trainer.optimizer.restore_from_cpu()


def areal_v2(trainer: Trainer) -> Phases:
    """AReaL 2: nothing in the state but empty placeholders, the tensors in a dictionary apart."""
    inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    kept = {}
    for shard, entry in inner.state.items():
        kept[shard] = {key: moved(value) for key, value in entry.items()}
        for key in entry:
            entry[key] = torch.empty(0)
    yield
    for shard, entry in inner.state.items():
        for key, value in kept[shard].items():
            entry[key] = moved(value)


def roll(trainer: Trainer) -> Phases:
    """ROLL: buffers and state get other memory by ``.data``; each kind goes into one tensor."""

    def move_weights() -> None:
        member = member_of(trainer)
        shards = [
            (param, shard, (shard.data_ptr() - param.data_ptr()) // 4)
            for params, group in zip(
                member.model_fp32_groups, member.shard_fp32_groups, strict=True
            )
            for param, shard in zip(params, group, strict=True)
        ]
        for buffer in buffers_of(trainer):
            buffer.param_data.data = moved(buffer.param_data.data)
            for param, (begin, end, _) in buffer.param_index_map.items():
                param.data = buffer.param_data[begin:end].view(param.shape)
            for bucket in buffer.buckets:
                begin, end = buffer.bucket_indices[bucket.bucket_id]
                bucket.param_data.data = buffer.param_data[begin:end]
        for param, shard, begin in shards:
            shard.data = param.data.view(-1)[begin : begin + shard.numel()]
        # Megatron 0.19 keeps slices of the memory that was left, whatever the optimizer; else its
        # collectives would go on with that.
        for chunk in trainer.chunks:
            for group in chunk.bucket_groups:
                group.cached_param_buffer_shard_list = [None] * len(group.buckets)
                group.cached_grad_buffer_shard_list = [None] * len(group.buckets)

    def drop_grads() -> None:
        for buffer in buffers_of(trainer):
            buffer.grad_data.data = torch.tensor(1, dtype=buffer.grad_dtype)
            for param in buffer.params:
                param.main_grad = torch.tensor(1, dtype=buffer.grad_dtype)
            for bucket in buffer.buckets:
                bucket.grad_data.data = torch.tensor(1, dtype=buffer.grad_dtype)

    def make_grads() -> None:
        for buffer in buffers_of(trainer):
            buffer.grad_data.data = torch.zeros(buffer.numel, dtype=buffer.grad_dtype)
            for param, (begin, end, _) in buffer.param_index_map.items():
                param.main_grad = buffer.grad_data[begin:end].view(param.shape)
            for bucket in buffer.buckets:
                begin, end = buffer.bucket_indices[bucket.bucket_id]
                bucket.grad_data.data = buffer.grad_data[begin:end]

    def into_one_tensor(tensors: list[Tensor]) -> None:
        one = torch.cat([tensor.detach() for tensor in tensors]) if tensors else None
        for tensor in tensors:
            tensor.data, one = one[: tensor.numel()], one[tensor.numel() :]

    def move_state() -> None:
        member = member_of(trainer)
        into_one_tensor([s for group in member.shard_fp32_from_float16_groups for s in group])
        into_one_tensor([e[key] for e in member.optimizer.state.values() for key in MOMENTS])

    move_weights()
    trainer.optimizer.zero_grad()
    drop_grads()
    move_state()
    yield
    move_weights()
    make_grads()
    move_state()


def some(trainer: Trainer) -> Phases:
    """No framework: every second entry, and nothing is brought back."""
    for entry in list(member_of(trainer).optimizer.state.values())[::2]:
        entry["exp_avg"] = moved(entry["exp_avg"])
        entry["exp_avg_sq"] = moved(entry["exp_avg_sq"])
    yield


def twice(trainer: Trainer) -> Phases:
    """Leave and return twice, as when two phases each believe that they are the first."""
    both = verl(trainer), verl(trainer)
    for phases in both:
        next(phases)
    yield
    for phases in both:
        next(phases, None)


def not_brought_back(trainer: Trainer) -> Phases:
    """The model comes back, the optimizer is forgotten."""
    release_buffers(trainer)
    move_masters(trainer)
    move_entries(trainer, ALL)
    yield
    return_buffers(trainer)


#: Sequence, modes, and what it leaves on the device.
SEQUENCES: dict[str, tuple[Callable[[Trainer], Phases], tuple[str, ...], set[str]]] = {
    "verl": (verl, ("masters", "remainders", "float32"), set()),
    "ms-swift": (ms_swift, ("remainders",), {"master_param"}),
    "NeMo-RL": (nemo_rl, ("masters", "remainders"), {"main"}),
    "Megatron RL": (megatron_rl, tuple(MODES), set()),
    "AReaL 2": (areal_v2, ("remainders",), set()),
    # In one tensor with v, codes of 8 bits are floats for a while.
    "ROLL": (roll, ("masters", "float32", "8 bits"), set()),
    "some": (some, ("masters",), {"main", *ALL}),
    "twice": (twice, ("masters",), set()),
    "not brought back": (not_brought_back, ("remainders",), set()),
}


@contextmanager
def away(trainer: Trainer, sequence: Callable[[Trainer], Phases]) -> Iterator[None]:
    trainer.sync_params()
    phases = sequence(trainer)
    next(phases)
    gc.collect()
    yield
    next(phases, None)


# What is compared.


def state_tensors(trainer: Trainer) -> dict[str, list[Tensor]]:
    """Return the tensors that a caller sees, by kind; main shards that are weights left out."""
    inner = trainer.optimizer.optimizer
    weights = {p.untyped_storage()._cdata for p in global_names(trainer.chunks).values()}
    found: dict[str, list[Tensor]] = {}
    for group in inner.param_groups:
        for shard in group["params"]:
            if shard.untyped_storage()._cdata not in weights:
                found.setdefault("main", []).append(shard)
            for key, tensor in inner.state[shard].items():
                found.setdefault(key, []).append(tensor)
    return found


def storages(trainer: Trainer) -> dict[str, list[StorageWeakRef]]:
    return {
        kind: [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]
        for kind, tensors in state_tensors(trainer).items()
    }


def allocated(trainer: Trainer) -> dict[str, int]:
    """Return the bytes of all memory that the state's tensors keep alive, by kind."""
    return {
        kind: sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in ts}.values())
        for kind, ts in state_tensors(trainer).items()
    }


def bits(trainer: Trainer) -> str:
    """Return a hash of all state and weights as a caller sees them."""
    trainer.sync_params()
    inner = trainer.optimizer.optimizer
    tensors = list(global_names(trainer.chunks).values())
    for group in inner.param_groups:
        for shard in group["params"]:
            tensors += [shard, *(inner.state[shard][key] for key in sorted(inner.state[shard]))]
    tensors = [moved(tensor) for tensor in tensors]  # numpy would pin the storages that are resized
    return digest(tensors) + f" {[group['step'] for group in inner.param_groups]}"


def train(trainer: Trainer, steps: range) -> str:
    for step in steps:
        assert trainer.step(step)[0]
    return bits(trainer)


def undisturbed(job: Job) -> str:
    return train(Trainer(job), range(4))


@cache
def expected(mode: str) -> list[str]:
    """Return the bits of a run without excursion, by rank."""
    found: list[str] = run_ranks(2, undisturbed, MODES[mode])
    return found


def excursion(job: Job, name: str) -> tuple[str, set[str], bool]:
    """Return the bits after training on, what stayed on the device, and whether memory grew."""
    trainer = Trainer(job)
    train(trainer, range(2))
    before, memory = storages(trainer), allocated(trainer)
    with away(trainer, SEQUENCES[name][0]):
        held = {kind for kind, refs in before.items() if not all(r.expired() for r in refs)}
    found = train(trainer, range(2, 4))
    return found, held, allocated(trainer) != memory


#: Kinds of state tensors that have memory of their own.
KINDS = {"masters": {"main", *MOMENTS}, "remainders": {*ALL}, "float32": {*MOMENTS}}
KINDS["replicated"] = KINDS["8 bits"] = KINDS["masters"]
CASES = [(name, mode) for name, (_, modes, _) in SEQUENCES.items() for mode in modes]


@pytest.mark.support("state moved away, reset, reloaded by RL frameworks", "test")
@pytest.mark.parametrize(("name", "mode"), CASES)
def test_an_excursion_frees_its_memory_and_changes_no_bit(name: str, mode: str) -> None:
    ranks = run_ranks(2, excursion, MODES[mode], name)
    assert [found for found, _, _ in ranks] == expected(mode)
    for _, held, grown in ranks:
        assert held == SEQUENCES[name][2] & KINDS[mode]
        assert not grown


# Checkpoints, weights and placeholders while the state is away.


def save_while_away(job: Job, folder: str) -> tuple[str, bool]:
    """Return the bits after training on, and whether the save left the state where it was."""
    trainer = Trainer(job)
    train(trainer, range(2))
    with away(trainer, verl):
        return_buffers(trainer)
        refs = [ref for kind in storages(trainer).values() for ref in kind]
        save(trainer, folder)
        trainer.optimizer.state_dict()
        member_of(trainer).get_parameter_state_dp_zero()
        gc.collect()
        stayed = not any(ref.expired() for ref in refs)
    return train(trainer, range(2, 4)), stayed


def load_while_away(job: Job, folder: str) -> str:
    trainer = Trainer(job)
    train(trainer, range(1))
    with away(trainer, verl):
        return_buffers(trainer)
        load(trainer, folder)
        release_buffers(trainer)
    return train(trainer, range(2, 4))


@pytest.mark.parametrize("mode", SHARDED)
def test_checkpoints_while_the_state_is_away(mode: str, tmp_path: Path) -> None:
    """verl brings only the model back to save and to load."""
    saved = run_ranks(2, save_while_away, MODES[mode], str(tmp_path))
    assert [found for found, _ in saved] == expected(mode)
    assert all(stayed for _, stayed in saved), "a save took the state back to the device"
    assert run_ranks(2, load_while_away, MODES[mode], str(tmp_path)) == expected(mode)


def new_weights(job: Job, name: str | None) -> str:
    trainer = Trainer(job)
    train(trainer, range(2))

    def reload() -> None:
        for key, param in global_names(trainer.chunks).items():
            param.data.copy_(whole_weight(key + " of another model", tuple(param.shape)))
        trainer.optimizer.reload_model_params()

    if name is None:
        trainer.sync_params()
        reload()
    else:
        with away(trainer, SEQUENCES[name][0]):
            if name == "verl":
                return_buffers(trainer)
            reload()
    return train(trainer, range(2, 4))


@pytest.mark.parametrize("mode", SHARDED)
def test_weights_that_change_while_the_state_is_away_win(mode: str) -> None:
    job = MODES[mode]
    wanted = run_ranks(2, new_weights, job, None)
    assert wanted != expected(mode)
    for name in ("verl", "Megatron RL") if mode == "masters" else ("Megatron RL",):
        assert run_ranks(2, new_weights, job, name) == wanted


def step_on_placeholders(job: Job) -> None:
    trainer = Trainer(job)
    train(trainer, range(1))
    next(areal_v2(trainer))
    trainer.step(1)


def test_a_step_on_placeholders_is_refused() -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(2, step_on_placeholders, BASE)
    assert len(caught.value.errors) == 2
    for kind, text in caught.value.errors.values():
        assert kind == "ValueError"
        assert "shape (0,)" in text


# Resets, adapters, learning rates, names.


def reset(trainer: Trainer) -> None:
    """slime and miles, with their flag to reset the optimizer at each rollout."""
    for member in trainer.optimizer.chained_optimizers:
        for group in member.optimizer.param_groups:
            assert group["step"] == 2
            group["step"] = 0
        for entry in member.optimizer.state.values():
            for key in MOMENTS:
                entry[key].zero_()


def train_reset_train(job: Job) -> tuple[dict[str, Tensor], str]:
    trainer = Trainer(job)
    train(trainer, range(2))
    weights = {name: param.detach().clone() for name, param in global_names(trainer.chunks).items()}
    reset(trainer)
    trainer.optimizer.reload_model_params()  # a new run has no more than the weights
    for step in range(2, 4):  # with the check of both frameworks before each step
        trainer.backward(step)
        assert not trainer.optimizer.prepare_grads()
        norm = trainer.optimizer.get_grad_norm()
        updated, reported, _ = trainer.optimizer.step()
        assert updated
        assert reported == pytest.approx(norm, rel=NORM_TOLERANCE)
    return weights, bits(trainer)


def start_from(job: Job, ranks: list[tuple[dict[str, Tensor], str]]) -> str:
    trainer = Trainer(job)
    for name, param in global_names(trainer.chunks).items():
        param.data.copy_(ranks[0][0][name])
    trainer.optimizer.reload_model_params()
    return train(trainer, range(2, 4))


@pytest.mark.parametrize("mode", ["masters", "remainders"])
def test_a_reset_optimizer_is_a_new_one(mode: str) -> None:
    job = MODES[mode]
    ranks = run_ranks(2, train_reset_train, job)
    assert run_ranks(2, start_from, job, ranks) == [found for _, found in ranks]


def swap_adapters(job: Job) -> tuple[str, str, str]:
    """SkyRL: copies of everything, of numbers too, are written into the living tensors."""
    trainer = Trainer(job)
    train(trainer, range(2))
    member = member_of(trainer)
    living = [tensor for b in buffers_of(trainer) for tensor in (b.param_data, b.grad_data)]
    for group in member.shard_fp32_from_float16_groups:
        for shard in group:
            living += [shard, *member.optimizer.state.get(shard, {}).values()]
    kept = [moved(tensor) for tensor in living]
    numbers = [
        {key: value for key, value in group.items() if isinstance(value, int | float)}
        for group in member.optimizer.param_groups
    ]
    first = train(trainer, range(2, 4))
    other = train(trainer, range(4, 5))
    with torch.no_grad():
        for tensor, value in zip(living, kept, strict=True):
            tensor.copy_(value)
    for group, values in zip(member.optimizer.param_groups, numbers, strict=True):
        group.update(values)
    return first, train(trainer, range(2, 4)), other


def test_adapters_are_swapped_in_place() -> None:
    job = replace(BASE, float32_modules=())  # all main parameters are in the lists that SkyRL walks
    for first, again, other in run_ranks(2, swap_adapters, job):
        assert first == again != other


def lengths_and_missing(job: Job) -> tuple[list[int], list[int], bool]:
    member = member_of(Trainer(job))
    models, mains = member.model_float16_groups, member.shard_fp32_from_float16_groups
    missing = [main is None for group in mains for main in group]
    return [len(g) for g in models], [len(g) for g in mains], all(missing)


def test_remainders_have_no_main_parameters_to_walk() -> None:
    """As with Megatron's own remainders: SkyRL and ROLL stop there, others skip them."""
    for models, mains, all_missing in run_ranks(1, lengths_and_missing, MODES["remainders"]):
        assert models == mains != [0, 0]
        assert all_missing


def walk_chain(job: Job) -> None:
    from megatron.core.optimizer import ChainedOptimizer

    trainer = Trainer(job)
    optimizer, member = trainer.optimizer, member_of(trainer)
    inner = member.optimizer

    def leaves(optimizer: Any) -> Iterator[Any]:
        for sub in getattr(optimizer, "chained_optimizers", ()):
            yield from leaves(sub)
        if not hasattr(optimizer, "chained_optimizers"):
            yield optimizer

    assert isinstance(optimizer, ChainedOptimizer)  # verl, ms-swift, NeMo-RL, SkyRL, ROLL
    assert not isinstance(member, ChainedOptimizer)
    assert list(leaves(optimizer)) == [member]  # miles
    assert isinstance(inner, torch.optim.Optimizer)
    assert inner is optimizer.optimizer
    assert not hasattr(optimizer, "optimizers")  # AReaL asks for these names in turn
    # NeMo-RL: a chain's state has keys of its own, a single optimizer is asked by _get_state.
    assert [entry for _, entry in optimizer.state.items()] == list(inner.state.values())
    assert member._get_state() is inner.state
    # SkyRL makes the state if there is none, slime keeps Megatron from making it.
    assert inner.state
    member.init_state_fn(inner, member.config)
    # ROLL looks for these classes, and stops if there are none of them.
    names = [cls.__name__ for cls in type(member).__mro__]
    assert "DistributedOptimizer" not in names
    assert "Float16OptimizerWithFloat16Params" not in names
    # Megatron takes the learning rate away while it builds what a GPT checkpoint loads into.
    train(trainer, range(1))
    before = [moved(shard) for group in inner.param_groups for shard in group["params"]]
    rates = []
    waiting = [optimizer]
    while waiting:
        found = waiting.pop()
        if hasattr(found, "chained_optimizers"):
            waiting.extend(found.chained_optimizers)
            continue
        for group in found.optimizer.param_groups:
            rates.append((group, group["lr"]))
            group["lr"] = 0.0
    trainer.step(1)
    after = [shard for group in inner.param_groups for shard in group["params"]]
    assert all(map(torch.equal, before, after))
    for group, rate in rates:
        group["lr"] = rate
    trainer.step(2)
    assert not all(map(torch.equal, before, after))
    for sub in optimizer.chained_optimizers:  # SkyRL's set_lr
        for group in sub.param_groups:
            group["lr"] = 0.5
    assert {group["lr"] for group in inner.param_groups} == {0.5}


def test_callers_that_walk_the_chain_come_to_an_end() -> None:
    run_ranks(2, walk_chain, BASE)


def name_and_write_masters(job: Job) -> None:
    trainer = Trainer(job)
    trainer.step(0)
    trainer.sync_params()
    member = member_of(trainer)
    names = {}
    for name, param in global_names(trainer.chunks).items():
        if param.dtype == torch.bfloat16:
            assert param.main_param_sharded
            if param.main_param is not None:
                names[id(param.main_param)] = name
    # miles prints hashes by name: each shard is the main_param of a parameter, as an object.
    shards = [shard for group in member.shard_fp32_from_float16_groups for shard in group]
    assert {id(shard) for shard in shards} == set(names)
    assert member.optimizer.state_dict()["state"]
    # ms-swift gives new tokens a weight, and the main parameter with it, where DP is 1.
    if trainer.dp_size == 1:
        weight = global_names(trainer.chunks)["embedding.word_embeddings.weight"]
        weight.data[:2] = 0.5
        with torch.no_grad():
            weight.main_param.copy_(weight.view(-1))
        for group in member.optimizer.param_groups:
            group["lr"] = 0.0
        trainer.step(1)
        trainer.sync_params()
        assert (weight[:2] == 0.5).all()
    # miles drops the weights between phases, and makes them from the main parameters again.
    weights = [moved(buffer.param_data) for buffer in buffers_of(trainer)]
    for buffer in buffers_of(trainer):
        if buffer.param_dtype != torch.float32:  # of these it keeps copies
            buffer.param_data.fill_(float("nan"))
    for sub in trainer.optimizer.chained_optimizers:
        sub._copy_main_params_to_model_params()
    for chunk in trainer.chunks:
        chunk.start_param_sync(force_sync=True)
    for buffer, wanted in zip(buffers_of(trainer), weights, strict=True):
        for begin, end, _ in buffer.param_index_map.values():
            assert torch.equal(buffer.param_data[begin:end], wanted[begin:end])


@pytest.mark.parametrize("world", [1, 2])
def test_main_parameters_have_names_and_give_the_weights(world: int) -> None:
    run_ranks(world, name_and_write_masters, BASE)


# Checkpoints as frameworks write and read them.

CONSTANT = {"distrib_optim_sharding_type": "dp_reshardable"}


class SkyRL:
    """SkyRL, AReaL: one folder; the same literal as metadata of each save and load."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, trainer: Trainer) -> None:
        state = model_state(trainer, {})
        optimizer = trainer.optimizer.sharded_state_dict(state, metadata=dict(CONSTANT))
        write({**state, "optimizer": optimizer}, self.folder)

    def load(self, trainer: Trainer) -> None:
        state = model_state(trainer, {})
        state["optimizer"] = trainer.optimizer.sharded_state_dict(
            state, is_loading=True, metadata=dict(CONSTANT)
        )
        loaded = read(state, self.folder)
        load_model(trainer, loaded)
        trainer.optimizer.load_state_dict(loaded["optimizer"])


class Roll(SkyRL):
    """ROLL: the optimizer's dictionary alone, before the model; one metadata object for all."""

    def save(self, trainer: Trainer) -> None:
        state = model_state(trainer, {})
        write(
            trainer.optimizer.sharded_state_dict(state, metadata=CONSTANT),
            self.folder / "optimizer",
        )
        write(state, self.folder / "model")

    def load(self, trainer: Trainer) -> None:
        state = trainer.optimizer.sharded_state_dict(
            model_state(trainer, {}), is_loading=True, metadata=CONSTANT
        )
        trainer.optimizer.load_state_dict(read(state, self.folder / "optimizer"))
        load_model(trainer, read(model_state(trainer, {}), self.folder / "model"))


class Verl(SkyRL):
    """verl: a folder each, each with new metadata; that of the model serves for both loads."""

    def save(self, trainer: Trainer) -> None:
        metadata = {**CONSTANT, "chained_optim_avoid_prefix": True}
        state = model_state(trainer, dict(metadata))
        optimizer = {"optimizer": trainer.optimizer.sharded_state_dict(state, metadata=metadata)}
        constant = {**CONSTANT, "chained_optim_avoid_prefix": True}
        write(state, self.folder / "model", content_metadata=constant)
        write(optimizer, self.folder / "optimizer", content_metadata=constant)

    def load(self, trainer: Trainer) -> None:
        from megatron.core import dist_checkpointing

        metadata = dist_checkpointing.load_content_metadata(str(self.folder / "model"))
        state = model_state(trainer, dict(metadata))
        load_model(trainer, read(dict(state), self.folder / "model"))
        optimizer = trainer.optimizer.sharded_state_dict(state, is_loading=True, metadata=metadata)
        loaded = read({"optimizer": optimizer}, self.folder / "optimizer")
        trainer.optimizer.load_state_dict(loaded["optimizer"])


def write(state: dict[str, Any], folder: Path, **kwargs: Any) -> None:
    from megatron.core import dist_checkpointing

    folder.mkdir(exist_ok=True)
    torch.distributed.barrier()
    dist_checkpointing.save(state, str(folder), **kwargs)


def read(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    from megatron.core import dist_checkpointing

    return dist_checkpointing.load(state, str(folder))


def load_model(trainer: Trainer, loaded: dict[str, Any]) -> None:
    (chunk,) = unwrapped(trainer)
    chunk.load_state_dict(loaded["model"])


def save_and_resume(job: Job, format: type[SkyRL], folder: Path) -> tuple[str, str]:
    """Return the bits of going on, and of loading in the same process and going on."""
    trainer, checkpoint = Trainer(job), format(folder)
    train(trainer, range(2))
    checkpoint.save(trainer)
    went_on = train(trainer, range(2, 4))
    checkpoint.load(trainer)
    return went_on, train(trainer, range(2, 4))


def resume(job: Job, format: type[SkyRL], folder: Path) -> str:
    trainer = Trainer(job)
    train(trainer, range(1))
    format(folder).load(trainer)
    return train(trainer, range(2, 4))


@pytest.mark.support("checkpoints as frameworks save and load them", "test")
@pytest.mark.parametrize("format", [SkyRL, Roll, Verl])
def test_checkpoints_with_metadata_that_say_nothing_of_the_optimizer(
    format: type[SkyRL], tmp_path: Path
) -> None:
    for went_on, loaded in run_ranks(2, save_and_resume, BASE, format, tmp_path):
        assert went_on == loaded
        assert went_on in expected("masters")
    assert run_ranks(2, resume, BASE, format, tmp_path) == expected("masters")
