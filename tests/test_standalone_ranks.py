"""The stand-alone optimizer on parameters that ranks share: DDP, ``fully_shard``, tensor parallel.

Every rank also trains the whole model by itself; both must agree, element by element.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import (
    _compute_local_shape_and_global_offset as compute_local_shape_and_global_offset,
)
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel

from megatron_adam_mini import AdamMini
from megatron_adam_mini.standalone.mesh_rows import rows_of_ranks
from tests.megatron_job import Job, Trainer
from tests.plain_models import (
    GEOMETRY,
    HYPER,
    gradient,
    module_of,
    shapes_of_llama,
)
from tests.ranks import RankError, run_ranks

#: The sums of a block in float32, added up in another order, after a few steps of size 0.01.
SUM_TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}
#: Means of a block in float64, added up in another order, rounded to float32.
V_TOLERANCE = {"rtol": 1e-6, "atol": 1e-30}
STEPS = 3
MEGATRON_JOB = Job(bias=True, clip_grad=0.0, steps=5)

#: Conv1D of GPT-2, whose rows are columns, and a gated MLP under Megatron's names.
OTHERS = {
    "transformer.h.0.attn.c_attn.weight": (16, 48),
    "transformer.h.0.attn.c_proj.weight": (16, 16),
    "transformer.h.0.attn.c_attn.bias": (48,),
    "decoder.layers.0.mlp.linear_fc1.weight": (24, 16),
}


#: Experts in one weight, (experts, out, in), and (experts, in, out).
EXPERTS = {
    "a.experts.gate_up_proj": (3, 8, 6),
    "a.experts.down_proj": (3, 6, 4),
    "b.experts.gate_up_proj": (3, 6, 8),
    "b.experts.down_proj": (3, 4, 6),
}
FAMILIES = {"llama": shapes_of_llama(), "others": OTHERS, "experts": EXPERTS}


class Given(nn.Module):
    """A model whose gradients in a step are given ones, through forward and backward passes."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.inner = module_of(shapes)

    def forward(self, step: int) -> Tensor:
        total: Any = 0.0
        for name, param in self.inner.named_parameters():
            grad: Any = gradient(name, tuple(param.shape), step)
            if isinstance(param, DTensor):
                grad = distribute_tensor(grad, param.device_mesh, param.placements)
            part = (param * grad).sum()
            total = total + (part.full_tensor() if isinstance(part, DTensor) else part)
        return total


def optimizer_of(model: nn.Module, **options: Any) -> AdamMini:
    options = HYPER | GEOMETRY | options
    named = [(name.replace("inner.", ""), param) for name, param in model.named_parameters()]
    return AdamMini(named, **options)


def train(model: nn.Module, optimizer: AdamMini, steps: range = range(STEPS)) -> list[Any]:
    """Train, and return the group and the size of each all-reduce of the optimizer."""
    found: list[Any] = []
    for step in steps:
        optimizer.zero_grad()
        model(step).backward()
        with counted() as calls:
            optimizer.step()
        found += calls
    return found


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def compare(model: nn.Module, expected: nn.Module) -> None:
    for (name, a), b in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(whole(a), b.detach(), **SUM_TOLERANCE, msg=name)


@contextmanager
def counted() -> Iterator[list[Any]]:
    """Note the group and the size of each all-reduce of sums; one more asks for gradients."""
    calls: list[Any] = []
    asked: list[Any] = []
    original = distributed.all_reduce

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("op") == distributed.ReduceOp.MAX:
            assert kwargs["group"] not in asked, "once for each group"
            asked.append(kwargs["group"])
        else:
            calls.append((kwargs["group"], tensor.numel()))
        return original(tensor, *args, **kwargs)

    distributed.all_reduce = all_reduce
    try:
        yield calls
    finally:
        distributed.all_reduce = original


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard weights over a mesh as Llama's plan does; norms stay replicated."""
    row_parallel = ("o_proj.weight", "down_proj.weight")
    for name, param in list(model.named_parameters()):
        path, _, last = name.rpartition(".")
        placement: Any = Shard(1) if name.endswith(row_parallel) else Shard(0)
        if param.ndim == 1:
            placement = Replicate()
        shard = nn.Parameter(distribute_tensor(param.detach(), mesh, [placement]))
        model.get_submodule(path).register_parameter(last, shard)


def shard_model(model: nn.Module, layout: str) -> None:
    world = distributed.get_world_size()
    if layout == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    elif layout == "fsdp columns":
        mesh = init_device_mesh("cpu", (world,))
        fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(p.ndim - 1))
    elif layout == "fsdp middle":
        mesh = init_device_mesh("cpu", (world,))
        fully_shard(model, mesh=mesh, shard_placement_fn=lambda _: Shard(1))
    elif layout == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh)
    elif layout == "tp":
        tensor_parallel(model, init_device_mesh("cpu", (world,)))
    elif layout == "fsdp tp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
        tensor_parallel(model, mesh["tp"])
        fully_shard(model, mesh=mesh["dp"])


def train_sharded(layout: str, options: dict[str, Any], family: str = "llama") -> list[int]:
    """Return the sizes of the all-reduces of one step."""
    shapes = FAMILIES[family]
    model, expected = Given(shapes), Given(shapes)
    shard_model(model, layout)
    assert all(isinstance(param, DTensor) for param in model.parameters())
    optimizer = optimizer_of(model, **options)
    calls = train(model, optimizer)
    train(expected, optimizer_of(expected, **options))
    compare(model, expected)
    groups = [group for group, _ in calls]
    assert len(groups) == STEPS * len(set(groups)), "one all-reduce for each group and step"
    return [numel for _, numel in calls[: len(set(groups))]]


@pytest.mark.parametrize(
    ("layout", "world", "options", "sizes"),
    [
        # Norms only: 2 ranks of 8 rows cut no head.
        ("fsdp", 2, {}, [3]),
        # 16 rows in slices of 6, 6, 4: heads of 4 rows begin at 0, 4, 8, 12.
        ("fsdp", 3, {}, None),
        # Without norms nothing is cut.
        ("fsdp", 2, {"full_v": ("*norm*",)}, []),
        ("fsdp", 4, {"rules": {"*": "tensor"}}, None),
        ("fsdp columns", 2, {}, None),
        ("hsdp", 4, {}, [3]),
        ("tp", 2, {}, [32]),
        ("tp", 4, {"value_as_block": True}, None),
        ("fsdp tp", 4, {}, None),
        ("fsdp", 3, {"preset": "slim"}, None),
        ("fsdp tp", 4, {"preset": "slim"}, None),
    ],
)
def test_blocks_are_completed_over_the_mesh(layout, world, options, sizes):
    for found in run_ranks(world, train_sharded, layout, options):
        assert sizes is None or found == sizes


@pytest.mark.parametrize(("layout", "world"), [("fsdp", 3), ("tp", 2), ("fsdp tp", 4)])
def test_fused_and_transposed_weights_are_completed(layout, world):
    run_ranks(world, train_sharded, layout, {"num_query_groups": None}, "others")


@pytest.mark.parametrize(
    ("layout", "sizes"),
    # Whole experts; else dimension 1 or 2 is cut: inputs of one of the two layouts, three experts
    # with 8 + 6 outputs.
    [("fsdp", []), ("fsdp middle", [42]), ("fsdp columns", [42])],
)
def test_experts_in_one_weight_are_completed(layout, sizes):
    assert run_ranks(2, train_sharded, layout, {}, "experts") == [sizes] * 2


def test_rows_of_ranks_are_those_that_torch_cuts():
    """Also uneven ones, and what fully_shard makes of tensor-parallel weights where it is even."""
    for num_rows, first, second in product(range(1, 20), range(1, 5), range(1, 5)):
        cases = {((first, 1), (second, 1)): (Shard(0), Shard(0))}
        if num_rows % (first * second) == 0:
            cases[(first, second), (second, 1)] = _StridedShard(0, split_factor=second), Shard(0)
        for cuts, placements in cases.items():
            ranks = product(range(first), range(second))
            for rank, rows in zip(ranks, rows_of_ranks(num_rows, cuts), strict=True):
                (count,), (begin,) = compute_local_shape_and_global_offset(
                    (num_rows,), (first, second), list(rank), placements
                )
                assert rows.tolist() == list(range(begin, begin + count))


def train_with_ddp() -> None:
    model, expected = Given(shapes_of_llama()), Given(shapes_of_llama())
    wrapped = DistributedDataParallel(model)
    assert not train(wrapped, AdamMini(unwrapped(wrapped), **HYPER, **GEOMETRY))
    train(expected, optimizer_of(expected))
    compare(model, expected)


def unwrapped(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, param in model.named_parameters():
        assert name.startswith("module.inner.")
        yield name.replace("inner.", ""), param


def test_replicas_of_ddp_need_no_collective():
    run_ranks(2, train_with_ddp)


def partial_gradients() -> None:
    """Sequence parallelism leaves a norm's gradient as parts that nobody has added up."""
    mesh = init_device_mesh("cpu", (2,))
    model, expected = module_of({"norm.weight": (8,)}), module_of({"norm.weight": (8,)})
    grad = gradient("norm.weight", (8,), 0)
    param = nn.Parameter(distribute_tensor(model.norm.weight.detach(), mesh, [Replicate()]))
    param.grad = DTensor.from_local(grad / 2, mesh, [Partial()])
    AdamMini([("norm.weight", param)], **HYPER).step()
    expected.norm.weight.grad = grad
    AdamMini(expected.named_parameters(), **HYPER).step()
    torch.testing.assert_close(whole(param), expected.norm.weight.detach(), **SUM_TOLERANCE)


def test_gradients_that_are_partial_sums_are_added_up():
    run_ranks(2, partial_gradients)


def partial_parameter() -> None:
    mesh = init_device_mesh("cpu", (1,))
    param = nn.Parameter(DTensor.from_local(torch.ones(4), mesh, [Partial()]))
    AdamMini([("norm.weight", param)])


def test_parameters_that_are_partial_sums_are_refused():
    with pytest.raises(RankError) as caught:
        run_ranks(1, partial_parameter)
    ((kind, text),) = caught.value.errors.values()
    assert kind == "NotImplementedError"
    assert "norm.weight" in text
    assert "Replicate and Shard" in text
    assert "redistribute" in text


def missing_gradients() -> None:
    """A rank without a gradient takes part in the sums of the others."""
    model = Given(shapes_of_llama())
    shard_model(model, "fsdp")
    optimizer = optimizer_of(model)
    model(0).backward()
    model.inner.model.norm.weight.grad = None
    before = whole(model.inner.model.norm.weight).clone()
    optimizer.step()
    assert torch.equal(whole(model.inner.model.norm.weight), before)
    assert model.inner.model.norm.weight not in optimizer.state


def test_a_parameter_without_a_gradient_stays_as_it_is():
    run_ranks(2, missing_gradients)


def gradients_of_one_rank(options: dict[str, Any]) -> None:
    """Only the first rank has a gradient, of its rows, or as a partial sum; and then nobody has."""
    mesh = init_device_mesh("cpu", (2,))
    first = not distributed.get_rank()
    given = {"norm.weight": Shard(0), "ln_1.weight": Replicate(), "fc.weight": Replicate()}
    shapes = {"norm.weight": (8,), "ln_1.weight": (8,), "fc.weight": (4, 3)}
    model, expected = module_of(shapes), module_of(shapes)
    shards = {
        name: nn.Parameter(distribute_tensor(param.detach(), mesh, [given[name]]))
        for name, param in model.named_parameters()
    }
    optimizer = AdamMini(shards.items(), **HYPER, **options)
    reference = AdamMini(expected.named_parameters(), **HYPER, **options)
    for step in range(2):
        for name, param in expected.named_parameters():
            grad = gradient(name, tuple(param.shape), step)
            if name == "norm.weight":
                grad[4:] = 0  # rows of the second rank
            param.grad = grad
            shard = shards[name]
            part = grad[:4] if name == "norm.weight" else grad
            placement = shard.placements if name == "norm.weight" else [Partial()]
            shard.grad = DTensor.from_local(part, mesh, placement) if first else None
        optimizer.step()
        reference.step()
    for (name, a), b in zip(shards.items(), expected.parameters(), strict=True):
        torch.testing.assert_close(whole(a), b.detach(), **SUM_TOLERANCE, msg=name)
        assert int(optimizer.state[a]["step"]) == 2
        assert first or a.grad is None
    before = [whole(param).clone() for param in shards.values()]
    optimizer.zero_grad()
    optimizer.step()
    for a, b in zip(shards.values(), before, strict=True):
        assert torch.equal(whole(a), b)


@pytest.mark.parametrize("options", [{}, {"rules": {"*": "row"}}, {"full_v": ("*",)}])
def test_a_rank_without_a_gradient_has_zeros_if_another_one_has_one(options):
    run_ranks(2, gradients_of_one_rank, {"rules": {"*": "tensor"}} | options, timeout=60.0)


def make_stage(options: dict[str, Any], grouped: bool, layout: str | None = None) -> list[str]:
    """Make the optimizer of a pipeline stage, or of a whole model; return what it logged."""
    stage = distributed.get_rank()
    shapes = shapes_of_llama()
    if layout is None:
        names = ("model.embed_tokens", "model.norm"), ("model.layers", "lm_head")
        shapes = {name: shape for name, shape in shapes.items() if name.startswith(names[stage])}
    model = Given(shapes)
    if layout is not None:
        shard_model(model, layout)
    group = {"process_group": distributed.group.WORLD} if grouped else {}
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_adam_mini").addHandler(handler)
    train(model, optimizer_of(model, **options, **group))
    return records


def errors_of_stages(*args: Any) -> list[tuple[str, str]]:
    with pytest.raises(RankError) as caught:
        run_ranks(2, make_stage, *args, timeout=60.0)
    assert len(caught.value.errors) == 2
    return [*caught.value.errors.values()]


def test_a_rule_for_another_pipeline_stage_is_no_error():
    first, last = run_ranks(2, make_stage, {"rules": {"lm_head.weight": "tensor"}}, False)
    assert not last
    assert "'lm_head.weight' match no parameter" in first[0]
    assert "process_group=torch.distributed.group.WORLD" in first[0]
    assert run_ranks(2, make_stage, {"rules": {"lm_head.weight": "tensor"}}, True) == [[], []]


def test_what_one_stage_refuses_is_refused_on_all():
    for kind, text in errors_of_stages({"rules": {"*lm_haed*": "tensor"}}, True):
        assert kind == "ValueError"
        assert "['*lm_haed*'] match no parameter" in text
    (first, text), (last, _) = errors_of_stages({"num_heads": None}, True)
    assert (first, last) == ("RuntimeError", "ValueError")
    assert "on rank 1: ValueError" in text
    assert "needs num_heads=" in text


def test_a_rule_that_matches_nothing_where_all_ranks_hold_all_parameters():
    for kind, text in errors_of_stages({"rules": {"*lm_haed*": "tensor"}}, False, "fsdp"):
        assert kind == "ValueError"
        assert "'*lm_haed*' match no parameter" in text


def unusual_shards() -> None:
    """Rows without columns on one rank; and a mesh whose parameters lie in other memory."""
    mesh = init_device_mesh("cpu", (2,))
    weight = nn.Parameter(distribute_tensor(torch.ones(4, 1), mesh, [Shard(1)]))
    weight.grad = distribute_tensor(torch.tensor([[1.0], [2.0], [3.0], [4.0]]), mesh, [Shard(1)])
    for rule in ("row", "tensor"):
        optimizer = AdamMini([("fc.weight", weight)], rules={"*": rule}, **HYPER)
        optimizer.step()
        v = optimizer.state[weight]["row_exp_avg_sq"].to_local()
        squares = torch.tensor([1.0, 4.0, 9.0, 16.0] if rule == "row" else [7.5] * 4)
        torch.testing.assert_close(v, (1 - HYPER["betas"][1]) * squares)  # type: ignore[index]
    # What from_local reads of a mesh of GPUs, while CPUOffloadPolicy keeps parameters on the host.
    weight = nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]))
    weight.grad = distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)])
    mesh._device_type = "meta"
    assert mesh.device_type == "meta"
    optimizer = AdamMini([("fc.weight", weight)], rules={"*": "row"}, **HYPER)
    optimizer.step()
    assert optimizer.state[weight]["row_exp_avg_sq"].to_local().device.type == "cpu"


def test_ranks_without_columns_know_v_and_v_lies_where_the_parameter_does():
    run_ranks(2, unusual_shards)


def train_and_save(layout: str, path: str) -> None:
    model = Given(shapes_of_llama())
    shard_model(model, layout)
    optimizer = optimizer_of(model)
    train(model, optimizer)
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    checkpoint.save(state, checkpoint_id=path)


def load_and_train(layout: str, path: str) -> None:
    """Load under another layout, go on, and compare with a run that nothing interrupted."""
    model, expected = Given(shapes_of_llama()), Given(shapes_of_llama())
    shard_model(model, layout)
    for param in model.parameters():
        local = param.to_local() if isinstance(param, DTensor) else param
        local.detach().zero_()
    optimizer = optimizer_of(model, lr=1.0)
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    checkpoint.load(state, checkpoint_id=path)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    assert optimizer.param_groups[0]["lr"] == HYPER["lr"]
    train(model, optimizer, range(STEPS, 2 * STEPS))
    train(expected, optimizer_of(expected), range(2 * STEPS))
    compare(model, expected)


def whole_state(path: str) -> None:
    """Save and load the state as whole tensors of rank 0, as Hugging Face's tools do."""
    model = Given(shapes_of_llama())
    shard_model(model, "fsdp")
    optimizer = optimizer_of(model)
    train(model, optimizer)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    if not distributed.get_rank():
        v = saved["state"]["inner.model.layers.0.self_attn.q_proj.weight"]["row_exp_avg_sq"]
        assert v.shape == (16,)
        assert len(v.unique()) == 4
    restored = optimizer_of(model)
    restored.zero_grad()  # torch makes no state for optimizers that have gradients
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(model, restored, saved, options=options)
    for param, state in optimizer.state.items():
        for key, value in state.items():
            other = restored.state[param][key]
            assert torch.equal(whole(other), whole(value)) if isinstance(value, Tensor) else True
            assert type(other) is type(value), key


@pytest.mark.parametrize(
    ("saved", "ranks", "loaded", "others"),
    [
        ("none", 1, "fsdp", 3),
        ("fsdp", 3, "fsdp tp", 4),
        ("fsdp tp", 4, "fsdp", 2),
        ("tp", 2, "none", 1),
    ],
)
def test_a_distributed_checkpoint_loads_under_another_layout(
    saved, ranks, loaded, others, tmp_path
):
    run_ranks(ranks, train_and_save, saved, str(tmp_path))
    run_ranks(others, load_and_train, loaded, str(tmp_path))


def test_whole_state_goes_to_rank_0_and_back(tmp_path):
    run_ranks(2, whole_state, str(tmp_path))


def go_on_from_adamw(layout: str) -> None:
    shapes = {**shapes_of_llama(), **EXPERTS} if layout == "fsdp columns" else shapes_of_llama()
    model, expected = Given(shapes), Given(shapes)
    shard_model(model, layout)
    optimizers = []
    for module in (model, expected):
        adamw = torch.optim.AdamW(module.parameters(), **HYPER)
        train(module, adamw)  # type: ignore[arg-type]
        optimizer = optimizer_of(module, lr=1.0)
        optimizer.load_adamw_state_dict(adamw.state_dict())
        optimizers.append(optimizer)
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        for key in ("row_exp_avg_sq", "exp_avg_sq"):
            if key in optimizers[1].state[b]:
                sharded, value = (o.state[p][key] for o, p in zip(optimizers, (a, b), strict=True))
                torch.testing.assert_close(whole(sharded), value, **V_TOLERANCE)
    for module, optimizer in zip((model, expected), optimizers, strict=True):
        train(module, optimizer, range(STEPS, 2 * STEPS))
    compare(model, expected)


@pytest.mark.parametrize(("layout", "world"), [("fsdp", 3), ("fsdp columns", 2), ("fsdp tp", 4)])
def test_state_of_adamw_is_averaged_over_whole_blocks(layout, world):
    run_ranks(world, go_on_from_adamw, layout)


def train_in_megatron(plain: bool) -> tuple[list[float], dict[str, Any]]:
    """Train a small Llama of Megatron-Core, by its own optimizer's path or by the plain one."""
    trainer = Trainer(MEGATRON_JOB)
    named = dict(trainer.chunks[0].module.named_parameters())
    groups = [
        {
            "params": [(name, p) for name, p in named.items() if (p.ndim > 1) is matrix],
            "weight_decay": MEGATRON_JOB.weight_decay if matrix else 0.0,
        }
        for matrix in (True, False)
    ]
    heads = {"num_heads": MEGATRON_JOB.heads, "num_query_groups": MEGATRON_JOB.groups}
    optimizer = AdamMini(groups, lr=MEGATRON_JOB.lr, betas=(0.9, 0.95), **heads)
    for step in range(MEGATRON_JOB.steps):
        if plain:
            trainer.backward(step)
            for param in named.values():
                param.grad = param.main_grad.clone()
            optimizer.step()
            optimizer.zero_grad()
        else:
            trainer.step(step)
    return trainer.losses, {name: param.detach().numpy() for name, param in named.items()}


def test_a_model_of_megatron_trains_as_by_the_distributed_optimizer():
    ((losses, expected),) = run_ranks(1, train_in_megatron, False)
    ((plain_losses, actual),) = run_ranks(1, train_in_megatron, True)
    assert plain_losses == pytest.approx(losses, rel=1e-6)
    for name, value in expected.items():
        torch.testing.assert_close(
            torch.from_numpy(actual[name]), torch.from_numpy(value), **SUM_TOLERANCE, msg=name
        )
