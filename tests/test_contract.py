"""docs/megatron-contract.md says what Megatron's callers find, and it is so.

Three kinds of test: the document has all names that Megatron defines or reads, and no others; each
line is true of a real job, compared with Megatron's own optimizer; and the walks and comparisons
see what is wrong.
"""

from __future__ import annotations

import importlib.util
import inspect
import io
import math
import re
import tempfile
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from tests.contract import (
    CLASSES,
    DOCUMENT,
    PACKAGES,
    VERDICTS,
    Readers,
    Row,
    members_by_class,
    members_of,
    tables,
    wrong_readers,
)
from tests.megatron_job import Job, Trainer
from tests.ranks import run_ranks

TEXT = DOCUMENT.read_text(encoding="utf-8")
ROWS = tables(TEXT)

#: Names that many other objects have as well; for these alone, what a reader calls an optimizer
#: is all that tells.
COMMON = {
    "buffers", "config", "data_parallel_group", "ddp_config", "load_state_dict", "optimizer",
    "sharded_state_dict", "state", "state_dict", "step",
}  # fmt: skip
#: What has one of the other names, and is no optimizer of these classes.
OTHERS = {
    "LayerWiseDistributedOptimizer.compute_full_param_layout",
    "buffer.offload_to_cpu",
    "param_layout.per_bucket_numel_unpadded",
}


# The document has every name.


@cache
def defined() -> dict[str, set[str]]:
    (found,) = run_ranks(1, members_by_class)
    return found


@cache
def readers() -> Readers:
    return Readers.of(installed())


def installed() -> Path:
    spec = importlib.util.find_spec("megatron")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(*spec.submodule_search_locations)


def wrong_owners(rows: list[Row], found: dict[str, set[str]], read: Iterable[str]) -> list[str]:
    """Compare names and the column "of" with Megatron's classes.

    Names with an underscore belong into the document if a module outside of ``core/optimizer``
    reads them.
    """
    documented = {row.name: row.of for row in rows if not row.of & {"type", "group", "param"}}
    kinds = (*CLASSES, "set")
    names = {n for kind in kinds for n in found[kind] if not n.startswith("_")} | set(read)
    wrong = [f"{name} has no line" for name in sorted(names - {*documented})]
    for name, of in sorted(documented.items()):
        actual = {kind for kind in kinds if name in found[kind]} or {"none"}
        if actual != of:
            wrong.append(f"{name} is of {sorted(actual)}, the document says {sorted(of)}")
        if actual == {"none"} and name not in read:
            wrong.append(f"{name} is nowhere in Megatron")
    params = {row.name for row in rows if "param" in row.of}
    wrong += [f"{name} (param)" for name in sorted(params ^ found["param"])]
    return wrong


def test_every_name_of_megatron_is_in_the_document_and_no_other() -> None:
    assert wrong_owners(ROWS, defined(), readers().names) == []
    assert sum(len(row.of & {*CLASSES}) for row in ROWS) > 100  # the walk saw something


def test_readers_are_those_of_the_document() -> None:
    here = {package for package in PACKAGES if (installed() / package).exists()}
    assert here >= {"core", "training"}
    assert wrong_readers(ROWS, readers(), here) == []


def test_no_module_calls_its_optimizer_something_else() -> None:
    """Every use of a name that only optimizers have is one that the walk of readers has found."""
    names = {row.name for row in ROWS if row.of & {*CLASSES}} - COMMON
    own = re.compile(r"(self\.|\w+\(self, )\w+")
    unseen = {
        (module, expression)
        for name in names
        for module, expression, seen in readers().by_name[name]
        if not seen and not own.match(expression) and expression not in OTHERS
    }
    assert unseen == set()


def test_each_line_has_one_verdict_and_stands_once() -> None:
    assert {row.verdict for row in ROWS} == {*VERDICTS}
    assert all(row.text for row in ROWS if row.verdict != "same")
    assert len({str(row) for row in ROWS}) == len(ROWS)


SOURCE = """
def f(self, optimizer, chained_optimizers, args, param_groups):
    optimizer.called()
    self._inner_optimizer.optimizer.value
    chained_optimizers[0].indexed = 1
    for member in optimizer.chained_optimizers:
        member.looped()
    any(part.comprehended for part in self._optimizers)
    if hasattr(optimizer, "asked") and isinstance(optimizer, (A, module.B)):
        ChainedOptimizer.static()
    args.optimizer.lower(); torch.optim.Adam(); model.forward()
    for param_group in param_groups:
        param_group["key"] = param_group.get("got") if "tested" in param_group else 1
    model.called()
"""


def test_the_walk_of_readers_sees_what_is_read() -> None:
    found = Readers()
    found.add("core.x", SOURCE)
    assert {*found.names} == {
        "asked", "called", "chained_optimizers", "comprehended", "indexed", "looped", "optimizer",
        "static", "value",
    }  # fmt: skip
    assert {*found.types} == {"A", "B"}
    assert {*found.keys} == {"key", "got", "tested"}
    assert found.by_name["called"] == {
        ("core.x", "optimizer.called", True),
        ("core.x", "model.called", False),
    }


class Example:
    constant = 1

    def __init__(self) -> None:
        self.first, self.second = 1, 2

    def method(self) -> None:
        self._late: int = 3

    @property
    def computed(self) -> int:
        return self.first


def test_the_walk_of_classes_sees_all_members() -> None:
    assert members_of(Example) == {"constant", "first", "second", "method", "_late", "computed"}


def test_a_changed_release_is_seen() -> None:
    """Of a new name, a name that is gone or moved, and another reader, each is reported."""
    removed = [row for row in ROWS if row.name != "offload_to_cpu"]
    assert wrong_owners(removed, defined(), readers().names) == ["offload_to_cpu has no line"]
    row = next(row for row in ROWS if row.name == "offload_to_cpu")
    moved = [*removed, replace(row, of=frozenset("D"))]
    (wrong,) = wrong_owners(moved, defined(), readers().names)
    assert wrong == "offload_to_cpu is of ['C', 'M'], the document says ['D']"
    gone = replace(row, name="gone", of=frozenset({"none"}))
    assert wrong_owners([*ROWS, gone], defined(), readers().names) == [
        "gone is nowhere in Megatron"
    ]
    row = next(row for row in ROWS if row.name == "save_parameter_state")
    others = [other for other in ROWS if other != row]
    (unknown,) = wrong_readers(others, readers(), {"core", "training"})
    assert unknown.startswith("save_parameter_state (name) has no line")
    more = replace(row, read_by=row.read_by | {"core.utils"})
    (wrong,) = wrong_readers([*others, more], readers(), {"core", "training"})
    assert wrong.startswith("save_parameter_state (name): ['core.utils', 'training.checkpointing']")


# Each line is true: the job.

JOB = Job(
    clip_grad=0.1,  # below every norm
    bf16=True,
    layers=1,
    bucket_size=9000,
    float32_modules=("final_layernorm",),
    optimizer_args={"log_num_zeros_in_grad": True},
)
#: Gradient norms in float32 add squares in another order.
NORM = 1e-5

PHASES = ("built", "reduced", "stepped", "changed", "scaled", "driven")


@dataclass
class Side:
    """One optimizer and its model on this rank."""

    trainer: Trainer

    @property
    def chain(self) -> Any:
        return self.trainer.optimizer

    @property
    def leaf(self) -> Any:
        return self.chain.chained_optimizers[0]

    @property
    def names(self) -> dict[Tensor, str]:
        return {p: name for chunk in self.trainer.chunks for name, p in chunk.named_parameters()}

    @property
    def model(self) -> list[Tensor]:
        return list(self.names)

    def shards(self) -> list[Tensor]:
        return [shard for group in self.leaf.param_groups for shard in group["params"]]


Check = Callable[[Side, Side], None]
#: Checks by phase of a run, in the order of this file, and by name of the line; those of keys and
#: attributes are named ``group:lr``, ``param:main_param``, ``type:ChainedOptimizer``.
CHECKS: dict[str, dict[str, Check]] = {phase: {} for phase in PHASES}


def check(phase: str, *names: str) -> Callable[[Check], Check]:
    def add(function: Check) -> Check:
        CHECKS[phase] |= dict.fromkeys(names, function)
        return function

    return add


def key_of(row: Row) -> str:
    kind = "".join(row.of & {"type", "group", "param"})
    return f"{kind}:{row.name}" if kind else row.name


def plain(value: Any, side: Side) -> Any:
    """Return a value that can be compared between two models: names for parameters, bits."""
    from megatron.core.optimizer.distrib_optimizer import Range

    if isinstance(value, Tensor):
        if value in side.names:
            return side.names[value]
        bits = value.detach().reshape(-1).contiguous().view(torch.uint8)
        return value.dtype, tuple(value.shape), bits.numpy().tobytes()
    if isinstance(value, Range):
        return value.start, value.end
    if isinstance(value, dict):
        return {plain(k, side): plain(v, side) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(item, side) for item in value)
    if isinstance(value, distributed.ProcessGroup):
        return distributed.get_backend(value), distributed.get_process_group_ranks(value)
    if hasattr(value, "buckets"):  # a buffer or a group of buckets
        return [(b.offset, b.numel_unpadded, plain(b.params_list, side)) for b in value.buckets]
    assert value is None or isinstance(value, str | int | float | set | torch.dtype), type(value)
    return value


def equal(names: Iterable[str], ours: Any, stock: Any, side: Side, other: Side) -> None:
    for name in names:
        mine, theirs = getattr(ours, name), getattr(stock, name)
        assert type(mine) is type(theirs), name
        assert plain(mine, side) == plain(theirs, other), name


def same_value(*names: str) -> Check:
    def compare(ours: Side, stock: Side) -> None:
        equal(names, ours.leaf, stock.leaf, ours, stock)

    return compare


for _name in (
    "buffers", "data_parallel_group", "data_parallel_group_gloo", "data_parallel_group_idx",
    "distributed_optimizer_instance_id", "expert_tp_group", "gbuf_idx_to_model_idx_map",
    "gbuf_ranges", "grad_stats_parallel_group", "model_float16_groups", "model_fp32_groups",
    "model_param_gbuf_map", "model_param_group_index_map", "optimizer_state_keys",
    "per_bucket_numel", "per_bucket_numel_unpadded", "per_model_bucket_groups",
    "per_model_buffers", "shard_float16_groups",
    "shard_fp32_from_float16_groups", "shard_fp32_groups", "tp_group",
    "checkpoint_fully_reshardable_formats",
):  # fmt: skip
    check("built", _name)(same_value(_name))


# Built: nothing has run yet, so that all values are Megatron's.


@check("built", "type:ChainedOptimizer")
def _chain_is_a_chain(ours: Side, stock: Side) -> None:
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    assert isinstance(ours.chain, ChainedOptimizer)
    assert isinstance(stock.chain, ChainedOptimizer)


@check("built", "type:DistributedOptimizer")
def _member_is_no_distributed_optimizer(ours: Side, stock: Side) -> None:
    from megatron.core.optimizer import DistributedOptimizer, MegatronOptimizer

    assert isinstance(ours.leaf, MegatronOptimizer)
    assert not isinstance(ours.leaf, DistributedOptimizer)
    assert isinstance(stock.leaf, DistributedOptimizer)


@check("built", "chained_optimizers")
def _one_member(ours: Side, stock: Side) -> None:
    for side in (ours, stock):
        assert type(side.chain.chained_optimizers) is list
        assert len(side.chain.chained_optimizers) == 1
        assert not hasattr(side.leaf, "chained_optimizers")
        assert side.chain.chained_optimizers[0] is side.leaf


@check("built", "optimizer")
def _inner_optimizer(ours: Side, stock: Side) -> None:
    for side in (ours, stock):
        assert isinstance(side.leaf.optimizer, torch.optim.Optimizer)
        assert side.chain.optimizer is side.leaf.optimizer
    refuses(ours.leaf.optimizer.step, NotImplementedError, "takes no step of its own")
    group = {"params": [torch.zeros(1)]}
    refuses(lambda: ours.leaf.optimizer.add_param_group(group), NotImplementedError, "planned")


@check("built", "config", "model_chunks", "ddp_config")
def _what_was_given(ours: Side, stock: Side) -> None:
    for side in (ours, stock):
        assert side.chain.config is side.leaf.config
        assert side.leaf.config.clip_grad == JOB.clip_grad
        for optimizer in (side.chain, side.leaf):
            assert type(optimizer.model_chunks) is list
            assert all(map(lambda a, b: a is b, optimizer.model_chunks, side.trainer.chunks))
        assert side.leaf.ddp_config is side.trainer.chunks[0].ddp_config


@check("built", "is_stub_optimizer")
def _no_stub(ours: Side, stock: Side) -> None:
    for optimizer in (ours.chain, ours.leaf, stock.chain, stock.leaf):
        assert optimizer.is_stub_optimizer is False


@check("built", "init_state_fn")
def _state_exists(ours: Side, stock: Side) -> None:
    before = plain(list(ours.leaf.optimizer.state.values()), ours)
    assert before
    assert ours.leaf.init_state_fn(ours.leaf.optimizer, ours.leaf.config) is None
    assert plain(list(ours.leaf.optimizer.state.values()), ours) == before
    assert callable(stock.leaf.init_state_fn)
    assert not stock.leaf.optimizer.state


@check("built", "grad_scaler")
def _no_scaler(ours: Side, stock: Side) -> None:
    assert ours.leaf.grad_scaler is stock.leaf.grad_scaler is None


@check("built", "get_grad_stats_parallel_group", "grads_states_parallel_group_is_shared")
def _groups_of_statistics(ours: Side, stock: Side) -> None:
    for side in (ours, stock):
        assert side.chain.grads_states_parallel_group_is_shared() is True
        assert side.chain.get_grad_stats_parallel_group() is side.leaf.grad_stats_parallel_group
        assert side.leaf.get_grad_stats_parallel_group() is side.leaf.grad_stats_parallel_group


@check("built", "has_grad_norm_group")
def _no_norms_apart(ours: Side, stock: Side) -> None:
    for optimizer in (ours.chain, ours.leaf, stock.chain, stock.leaf):
        assert optimizer.has_grad_norm_group("mtp") is False
        refuses(lambda o=optimizer: o.has_grad_norm_group("x"), ValueError, "grad_norm_group 'x'")


@check("built", "param_groups")
def _groups(ours: Side, stock: Side) -> None:
    assert len(ours.chain.param_groups) == len(stock.chain.param_groups) == 2
    for side in (ours, stock):
        assert type(side.chain.param_groups) is type(side.leaf.param_groups) is list
        assert side.leaf.param_groups is side.leaf.optimizer.param_groups
        assert all(map(lambda a, b: a is b, side.chain.param_groups, side.leaf.param_groups))


@check("built", "get_parameters", "group:params")
def _shards(ours: Side, stock: Side) -> None:
    for mine, theirs in ((ours.leaf, stock.leaf), (ours.chain, stock.chain)):
        shards, others = mine.get_parameters(), theirs.get_parameters()
        assert type(shards) is type(others) is list
        assert all(map(lambda a, b: a is b, shards, ours.shards()))
        assert plain(shards, ours) == plain(others, stock)
        assert [vars(shard) for shard in shards] == [vars(shard) for shard in others]
        assert any(shard.tensor_model_parallel for shard in shards if shard.numel() > 64)


@check(
    "built", "group:lr", "group:max_lr", "group:min_lr", "group:lr_mult", "group:weight_decay",
    "group:wd_mult", "group:betas", "group:eps", "group:default_config", "group:is_decoupled_lr",
    "group:is_expert_parallel", "group:step", "group:start_wd", "group:end_wd", "group:optimizer",
)  # fmt: skip
def _keys_of_groups(ours: Side, stock: Side) -> None:
    from megatron.core.optimizer.optimizer import param_group_identifier_keys

    torchs = torchs_keys()
    documented = {row.name for row in ROWS if "group" in row.of}
    for group, other in zip(ours.leaf.param_groups, stock.leaf.param_groups, strict=True):
        assert {*group} == {*other} - torchs | {"step"}
        assert {*group, *param_group_identifier_keys} == documented
        for key in {*other} - torchs - {"params"}:
            assert group[key] == other[key], key
            assert type(group[key]) is type(other[key]), key
        assert group["step"] == 0


def torchs_keys() -> set[str]:
    """Return the keys of groups that torch's AdamW has for itself."""
    return {*torch.optim.AdamW([torch.zeros(1)]).defaults} - {"lr", "betas", "eps", "weight_decay"}


@check("built", "state")
def _state(ours: Side, stock: Side) -> None:
    from megatron.core.optimizer.optimizer import ProxyDict

    assert type(ours.chain.state) is type(stock.chain.state) is ProxyDict
    assert ours.leaf.state is ours.leaf.optimizer.state
    assert list(ours.leaf.state) == [key for _, key in ours.chain.state]
    assert {*ours.leaf.state} == {*ours.shards()}


@check("built", "param:main_param", "param:main_param_sharded")
def _main_params(ours: Side, stock: Side) -> None:
    for param, other in zip(ours.model, stock.model, strict=True):
        assert hasattr(param, "main_param") == hasattr(other, "main_param")
        if hasattr(param, "main_param"):
            assert param.main_param_sharded is other.main_param_sharded is True
            assert plain(param.main_param, ours) == plain(other.main_param, stock)
            assert param.main_param is None or any(param.main_param is s for s in ours.shards())


@check("built", "param_to_name")
def _names(ours: Side, stock: Side) -> None:
    stock.leaf._param_name(stock.model[0])  # makes the table
    equal(["param_to_name"], ours.leaf, stock.leaf, ours, stock)


@check("built", "compute_full_param_layout")
def _layout(ours: Side, stock: Side) -> None:
    assert ours.leaf.compute_full_param_layout is type(stock.leaf).compute_full_param_layout


@check("built", "opt_group_ranges")
def _ranges_of_groups(ours: Side, stock: Side) -> None:
    """Megatron's ``orig_group`` is the group once, and a copy since torch has loaded its state."""
    for mine, theirs, group in zip(
        ours.leaf.opt_group_ranges, stock.leaf.opt_group_ranges, ours.leaf.param_groups, strict=True
    ):
        assert {*mine} == {*theirs}
        assert plain(mine["params"], ours) == plain(theirs["params"], stock)
        assert mine["orig_group"] is mine["orig_group_idx"] is group
        others = theirs["orig_group"]["params"]
        assert plain(mine["orig_group"]["params"], ours) == plain(others, stock)


@check("built", "split_state_dict_if_needed")
def _no_split(ours: Side, stock: Side) -> None:
    for side in (ours, stock):
        state_dict = {"param_state": {}}
        assert side.leaf.split_state_dict_if_needed(state_dict) is None
        assert state_dict == {"param_state": {}}


@check("built", "save_state_dict_to_file", "load_state_dict_from_file")
def _of_other_optimizers(ours: Side, stock: Side) -> None:
    for name in ("save_state_dict_to_file", "load_state_dict_from_file"):
        assert not any(hasattr(o, name) for o in (ours.chain, ours.leaf, stock.chain, stock.leaf))


# Reduced: gradients of the same weights and data are there; the two runs are alike.


@check("reduced", "prepare_grads")
def _prepared(ours: Side, stock: Side) -> None:
    before = gradients(ours)
    for optimizer in (ours.chain, ours.leaf, stock.chain, stock.leaf):
        assert optimizer.prepare_grads() is False
    assert gradients(ours) == before
    grads, others = ([shard.grad for shard in side.shards()] for side in (ours, stock))
    assert plain(grads, ours) == plain(others, stock)


@check("reduced", "get_grads_for_grad_norm")
def _gradients(ours: Side, stock: Side) -> None:
    for group in (None, "mtp"):
        found = ours.leaf.get_grads_for_grad_norm(group)
        assert type(found) is list
        assert (group is None) == bool(found)
        mine = sorted(plain(found, ours))
        assert mine == sorted(plain(stock.leaf.get_grads_for_grad_norm(group), stock))


@check("reduced", "get_grad_norm")
def _norm(ours: Side, stock: Side) -> None:
    for mine, theirs in ((ours.leaf, stock.leaf), (ours.chain, stock.chain)):
        close_floats(mine.get_grad_norm(), theirs.get_grad_norm())


@check("reduced", "count_zeros")
def _zeros(ours: Side, stock: Side) -> None:
    for mine, theirs in ((ours.leaf, stock.leaf), (ours.chain, stock.chain)):
        found, other = mine.count_zeros(), theirs.count_zeros()
        assert found == other > 0  # tokens that do not occur
        assert type(found) is type(other)


@check("reduced", "clip_grad_norm")
def _clipped(ours: Side, stock: Side) -> None:
    before = gradients(ours)
    norm = stock.leaf.get_grad_norm()
    close_floats(ours.leaf.clip_grad_norm(norm / 2), norm)
    assert gradients(ours) == before
    close_floats(stock.leaf.clip_grad_norm(norm / 2), norm)
    assert gradients(stock) != before


@check("reduced", "step_with_ready_grads")
def _stepped(ours: Side, stock: Side) -> None:
    """After the clipping above: half of the gradient went into the first moment."""
    for side in (ours, stock):
        before = plain(side.shards(), side)
        assert side.chain.step_with_ready_grads() is True
        assert plain(side.shards(), side) != before
    close_moments(ours, stock)
    assert [group["step"] for group in ours.leaf.param_groups] == [1, 1]


def gradients(side: Side) -> list[Any]:
    return [plain(param.main_grad, side) for param in side.model]


def close_moments(ours: Side, stock: Side) -> None:
    for mine, theirs in zip(ours.shards(), stock.shards(), strict=True):
        moments = ours.leaf.state[mine]["exp_avg"], stock.leaf.state[theirs]["exp_avg"]
        torch.testing.assert_close(*moments, rtol=NORM, atol=1e-12)


def close_floats(mine: Any, theirs: Any) -> None:
    assert type(mine) is type(theirs) is float
    assert math.isclose(mine, theirs, rel_tol=NORM)


# Stepped: a whole step was taken after that; the two runs differ from here on.


@check("stepped", "step")
def _whole_step(ours: Side, stock: Side) -> None:
    result, other = ours.trainer.step(1), stock.trainer.step(1)
    assert type(result) is type(other) is tuple
    assert [type(part) for part in result] == [type(part) for part in other] == [bool, float, int]
    assert result[0] is other[0] is True
    ours.trainer.backward(2)
    for chunk in ours.trainer.chunks:
        for buffer in chunk.buffers:
            buffer.grad_data.fill_(math.inf)
    before = plain(ours.shards(), ours)
    assert ours.chain.step() == (False, None, None)
    assert plain(ours.shards(), ours) == before


@check("stepped", "grad_norms_by_group")
def _norms_by_group(ours: Side, stock: Side) -> None:
    assert ours.chain.grad_norms_by_group == stock.chain.grad_norms_by_group == {}
    assert ours.leaf.grad_norms_by_group == stock.leaf.grad_norms_by_group == {}


@check("stepped", "get_loss_scale", "scale_loss")
def _loss_scale(ours: Side, stock: Side) -> None:
    for mine, theirs in ((ours.leaf, stock.leaf), (ours.chain, stock.chain)):
        assert plain(mine.get_loss_scale(), ours) == plain(theirs.get_loss_scale(), stock)
        loss = torch.tensor(3.0)
        assert plain(mine.scale_loss(loss), ours) == plain(theirs.scale_loss(loss), stock)


@check("stepped", "zero_grad")
def _zeroed(ours: Side, stock: Side) -> None:
    for side in (ours, stock):
        for optimizer in (side.chain, side.leaf):
            for set_to_none in (False, True):
                for param in side.model:
                    param.grad = torch.ones_like(param)
                assert optimizer.zero_grad(set_to_none) is None
                # Megatron clears those of which the rank has a shard.
                groups = [*side.leaf.model_float16_groups, *side.leaf.model_fp32_groups]
                owned = [param for group in groups for param in group]
                left = [p.grad for p in (owned if side is stock else side.model)]
                assert all(grad is None if set_to_none else not grad.any() for grad in left)


# Changed: somebody else wrote weights or state.


@check("changed", "start_param_sync_for_bucket_group_subset")
def _gathered(ours: Side, stock: Side) -> None:
    """What the other rank owns comes back; what this rank owns stays."""
    for side in (ours, stock):
        before = plain([p.data for p in side.model], side)
        kept = [[s.clone() for s in group] for group in side.leaf.shard_float16_groups]
        kept32 = [[s.clone() for s in group] for group in side.leaf.shard_fp32_groups]
        for param in side.model:
            param.data.zero_()
        for groups, values in (
            (side.leaf.shard_float16_groups, kept),
            (side.leaf.shard_fp32_groups, kept32),
        ):
            for group, value in zip(groups, values, strict=True):
                for shard, was in zip(group, value, strict=True):
                    shard.detach().copy_(was)
        side.leaf.start_param_sync_for_bucket_group_subset()
        assert plain([p.data for p in side.model], side) == before


@check("changed", "_copy_main_params_to_param_buffer")
def _copied(ours: Side, stock: Side) -> None:
    for side in (ours, stock):
        before = plain([p.data for p in side.model], side)
        for group in side.leaf.shard_float16_groups:
            for shard in group:
                shard.zero_()
        for bucket_group in side.trainer.chunks[0].bucket_groups:
            bucket_group.param_gather_dispatched = True
        assert side.leaf._copy_main_params_to_param_buffer() is None
        assert plain([p.data for p in side.model], side) == before
        assert not any(g.param_gather_dispatched for g in side.trainer.chunks[0].bucket_groups)


@check("changed", "prepare_model_params_for_param_sync")
def _nothing_to_prepare(ours: Side, stock: Side) -> None:
    for side in (ours, stock):
        before = plain([p.data for p in side.model], side)
        for optimizer in (side.chain, side.leaf):
            assert optimizer.prepare_model_params_for_param_sync() is None
        assert plain([p.data for p in side.model], side) == before


@check("changed", "reload_model_params")
def _reloaded(ours: Side, stock: Side) -> None:
    """Main parameters are the weights that somebody has written."""
    for optimizer in (lambda side: side.leaf, lambda side: side.chain):
        for param, other in zip(ours.model, stock.model, strict=True):
            value = torch.randn(param.shape, generator=torch.Generator().manual_seed(param.numel()))
            param.data.copy_(value)
            other.data.copy_(value)
        assert optimizer(ours).reload_model_params() is None
        assert optimizer(stock).reload_model_params() is None
        assert plain(ours.shards(), ours) == plain(stock.shards(), stock)
        for side in (ours, stock):
            names = dict(side.leaf.model_chunks[0].named_parameters())
            wide = {
                name.replace("module.", ""): param.detach().float() * 1.001
                for name, param in names.items()
            }
            assert optimizer(side).reload_model_params({"model": wide}) is None
        assert plain(ours.shards(), ours) == plain(stock.shards(), stock)


@check("changed", "offload_to_cpu", "restore_from_cpu")
def _offloaded(ours: Side, stock: Side) -> None:
    for side in (ours, stock):
        held = [*side.shards(), *side.leaf.state.values()]
        before = plain(held, side)
        for optimizer in (side.chain, side.leaf):
            assert optimizer.offload_to_cpu() is None
            assert plain(held, side) == before
            assert optimizer.restore_from_cpu() is None
            assert plain(held, side) == before


@check("changed", "sharded_state_dict")
def _sharded(ours: Side, stock: Side) -> None:
    for side in (ours, stock):
        for optimizer in (side.chain, side.leaf):
            for is_loading in (False, True):
                model = side.trainer.chunks[0].sharded_state_dict()
                metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
                found = optimizer.sharded_state_dict(model, is_loading, metadata=metadata)
                assert type(found) is dict
                assert found


@check("changed", "state_dict", "load_state_dict")
def _dicts(ours: Side, stock: Side) -> None:
    torchs = torchs_keys()
    for mine, theirs in ((ours.leaf, stock.leaf), (ours.chain, stock.chain)):
        found, other = mine.state_dict(), theirs.state_dict()
        assert {*found} == {*other} | {"adam_mini"}
        assert {*found["optimizer"]} == {*other["optimizer"]} == {"param_groups"}
        groups, others = found["optimizer"]["param_groups"], other["optimizer"]["param_groups"]
        assert [{*group} for group in groups] == [{*group} - torchs for group in others]
        torch.save(found, io.BytesIO())
        for group, own in zip(groups, mine.param_groups, strict=True):
            assert group["step"] == own["step"] > 0
            group["step"] += 5
        assert mine.load_state_dict(found) is None
        assert [group["step"] for group in mine.param_groups] == [g["step"] for g in groups]


@check(
    "changed", "save_parameter_state", "load_parameter_state", "get_parameter_state_dp_zero",
    "load_parameter_state_from_dp_zero",
)  # fmt: skip
def _parameter_state(ours: Side, stock: Side) -> None:
    """Both save; only ours is loaded: Megatron's cannot load what it saves of torch's AdamW."""
    rank = distributed.get_rank()
    folder = [tempfile.mkdtemp() if rank == 0 else ""]
    distributed.broadcast_object_list(folder)
    for number, side in enumerate((ours, stock)):
        for name, optimizer in (("chain", side.chain), ("leaf", side.leaf)):
            assert optimizer.save_parameter_state(f"{folder[0]}/{name} {number}") is None
        found = side.leaf.get_parameter_state_dp_zero()
        assert type(found) is (dict if rank == 0 else type(None))
    distributed.barrier()
    assert len([*Path(folder[0]).iterdir()]) == 4

    def loads(*call: Any, **options: Any) -> bool:
        for tensor in state_of(ours):
            tensor.detach().fill_(1.0)
        assert call[0](*call[1:], **options) is None
        return plain(state_of(ours), ours) == kept

    kept = plain(state_of(ours), ours)
    assert loads(ours.chain.load_parameter_state, f"{folder[0]}/leaf 0")
    assert loads(ours.leaf.load_parameter_state, f"{folder[0]}/chain 0")
    parameter_state = ours.leaf.get_parameter_state_dp_zero()
    assert loads(ours.leaf.load_parameter_state_from_dp_zero, parameter_state)
    refuses(
        lambda: ours.chain.load_parameter_state(f"{folder[0]}/leaf 0", update_legacy_format=True),
        NotImplementedError,
        "--ckpt-convert-update-legacy-dist-opt-format",
    )
    # That of Adam. Megatron mixes up parameters of one group that are float32 and 16 bit.
    ours.chain.load_parameter_state(f"{folder[0]}/chain 1")
    mine, theirs = (
        [[s, side.leaf.state[s]["exp_avg"]] for s in side.leaf.param_groups[0]["params"]]
        for side in (ours, stock)
    )
    assert plain(mine, ours) == plain(theirs, stock)


def state_of(side: Side) -> list[Any]:
    states = [side.leaf.state[shard] for shard in side.shards()]
    return [*side.shards(), *(s["exp_avg"] for s in states), *(s["exp_avg_sq"] for s in states)]


# With a loss scale.


@check("scaled", "found_inf", "grad_scaler", "get_loss_scale", "scale_loss")
def _scaled(ours: Side, stock: Side) -> None:
    for side in (ours, stock):
        side.trainer.backward(0)
    equal(["found_inf"], ours.leaf, stock.leaf, ours, stock)
    norms = [side.chain.step()[1] for side in (ours, stock)]
    close_floats(*norms)
    equal(["found_inf"], ours.leaf, stock.leaf, ours, stock)
    assert type(ours.leaf.grad_scaler) is type(stock.leaf.grad_scaler)
    assert ours.leaf.grad_scaler.state_dict() == stock.leaf.grad_scaler.state_dict()
    assert float(ours.leaf.get_loss_scale()) == 8.0
    _loss_scale(ours, stock)
    for side in (ours, stock):
        side.trainer.backward(1)
        for param in side.model:
            param.main_grad.fill_(math.inf)
        assert side.chain.step() == (False, None, None)
    equal(["found_inf"], ours.leaf, stock.leaf, ours, stock)
    assert ours.leaf.found_inf.tolist() == [1.0]


# Driven: by an optimizer of Megatron's that clips the gradients of its members itself.


@check("driven", "MimoOptimizer")
def _driven(ours: Side, stock: Side) -> None:
    from megatron.core.models.mimo.optimizer import MimoOptimizer, ModuleOptimizerInfo

    results = []
    for side in (ours, stock):
        member = ModuleOptimizerInfo(side.chain, grid=None, pg_collection=None, is_active=True)
        outer = MimoOptimizer({"language": member}, side.chain.config)
        side.trainer.backward(0)
        results.append(outer.step())
        outer.zero_grad()
        outer.prepare_model_params_for_param_sync()
        assert outer.param_groups == side.chain.param_groups
        assert outer.get_loss_scale() == 1.0
    (updated, norm, zeros), (_, other_norm, other_zeros) = results
    assert (updated, zeros) == (True, other_zeros)
    assert norm > JOB.clip_grad
    close_floats(norm, other_norm)
    close_moments(ours, stock)


# Refused.


def refuses(call: Callable[[], Any], kind: type, *parts: str) -> None:
    with pytest.raises(kind) as found:
        call()
    assert all(part in str(found.value) for part in parts), found.value


def refused(row: Row, side: Side) -> None:
    """Call what a line says is refused, with as many arguments as it takes."""
    kind, _, message = row.message.partition(": ")
    for optimizer in [side.leaf] * bool(row.of - {"C"}) + [side.chain] * ("C" in row.of):
        method = getattr(optimizer, row.name)
        needed = [
            None
            for parameter in inspect.signature(method).parameters.values()
            if parameter.default is parameter.empty and parameter.kind < parameter.VAR_POSITIONAL
        ]
        with pytest.raises(Exception) as found:  # noqa: PT011 (compared below)
            method(*needed)
        assert type(found.value).__name__ == kind
        assert str(found.value).startswith(message)


# Each line is true: the tests.


def outcomes() -> dict[str, str]:
    """Run all checks; return the traceback of each that fails, by line.

    After a failure the ranks may disagree about collectives, so that only the checks of the first
    phase, which has few, go on after one.
    """
    found: dict[str, str] = {}

    def run(phase: str, ours: Side, stock: Side) -> None:
        for function in dict.fromkeys(CHECKS[phase].values()):
            names = [name for name, other in CHECKS[phase].items() if other is function]
            try:
                function(ours, stock)
            except Exception:
                found.update(dict.fromkeys(names, traceback.format_exc()))
                if phase != "built":
                    raise

    try:
        ours, stock = two_sides(JOB)
        run("built", ours, stock)
        for row in ROWS:
            if row.verdict == "refused":
                try:
                    refused(row, ours)
                except Exception:
                    found[key_of(row)] = traceback.format_exc()
        for side in (ours, stock):
            side.trainer.backward(0)
        for phase in ("reduced", "stepped", "changed"):
            run(phase, ours, stock)
        run("scaled", *two_sides(replace(JOB, optimizer_args={"loss_scale": 8.0})))
        run("driven", *two_sides(JOB))
    except Exception:
        found["not reached"] = traceback.format_exc()
    return found


def two_sides(job: Job) -> list[Side]:
    from megatron.core import parallel_state

    found = []
    for optimizer in ("adam_mini", "adam"):
        parallel_state.destroy_model_parallel()
        found.append(Side(Trainer(replace(job, optimizer=optimizer))))
    return found


@cache
def outcomes_of_ranks() -> list[dict[str, str]]:
    return run_ranks(2, outcomes)


def test_every_check_passes_to_the_last() -> None:
    assert [found.get("not reached") for found in outcomes_of_ranks()] == [None, None]


@pytest.mark.support("every method and attribute of Megatron's optimizers", "test")
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_what_the_document_says_is_so(row: Row) -> None:
    checked = {name for checks in CHECKS.values() for name in checks}
    assert (key_of(row) in checked) == (row.verdict != "refused"), "no check, or one too many"
    for rank, found in enumerate(outcomes_of_ranks()):
        assert key_of(row) not in found, f"rank {rank}\n{found[key_of(row)]}"


def names_that_fail(job: Job) -> dict[str, str]:
    """Read every name of the document, before and after a step."""
    ours = Side(Trainer(job))
    found = {}
    for _ in range(2):
        for row in ROWS:
            owners = [ours.leaf] * bool(row.of & {*"MPD", "set"}) + [ours.chain] * ("C" in row.of)
            for optimizer in owners:
                try:
                    getattr(optimizer, row.name)
                except Exception as error:
                    found[row.name] = f"{type(error).__name__}: {error}"
        assert ours.trainer.step(0)[0] is True
    return found


MODES = {
    "float32": Job(layers=1),
    "fp16": Job(
        layers=1, fp16=True, grad_fp32=False, optimizer_args={"initial_loss_scale": 2.0**10}
    ),
    "remainders": Job(
        layers=1, bf16=True, adam_mini={"param_remainders": True, "exp_avg_dtype": "bf16"}
    ),
    "single phase": Job(layers=1, clip_grad=0.0, adam_mini={"single_phase": True}),
    "nothing to train": Job(layers=1, frozen=("",)),
    "replicated": Job(layers=1, bf16=True, distributed_optimizer=False),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_name_is_there_in_every_mode(mode: str) -> None:
    (found,) = run_ranks(1, names_that_fail, MODES[mode])
    if mode == "replicated":  # as with Megatron's, which has no such table then
        assert {found.pop(name) for name in sorted(OWNED_RANGES)} == {
            "AttributeError: Ranges of buffers exist with the distributed optimizer only, as "
            "Megatron's do: without it, each rank owns all of them."
        }
    assert found == {}


#: Tables of which rank owns which part of a buffer.
OWNED_RANGES = {
    "gbuf_ranges", "model_param_gbuf_map", "model_param_group_index_map", "opt_group_ranges",
}  # fmt: skip
