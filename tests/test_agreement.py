"""Bad input: every rank raises, within seconds, in words that name both sides; nobody hangs."""

from __future__ import annotations

import pickle
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from tests.megatron_job import Job, Trainer
from tests.ranks import RankError, run_ranks

#: Building a tiny model takes a second or two on a busy core; a rank that waits for a peer which
#: has raised would wait until its process group gives up, which is far later.
SECONDS = 60.0

TINY = {"layers": 1, "hidden": 16, "heads": 4, "groups": 2, "ffn": 24, "vocab": 16}


def errors_of(world_size: int, function: Callable[..., Any], *args: Any) -> list[tuple[str, str]]:
    """Run a body that must fail on every rank; return kind and text of the errors by rank."""
    begin = time.monotonic()
    with pytest.raises(RankError) as caught:
        run_ranks(world_size, function, *args, timeout=SECONDS)
    assert time.monotonic() - begin < SECONDS, "ranks were killed rather than raised"
    assert sorted(caught.value.errors) == list(range(world_size)), "a rank did not raise"
    return [caught.value.errors[rank] for rank in range(world_size)]


def rank() -> int:
    from torch import distributed

    return distributed.get_rank()


def build(job: Job) -> list[str]:
    return [entry["rule"] for entry in Trainer(job).optimizer.manifest["parameters"]]


# The same bad value on all ranks.


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"preset": "adam"},
            "Adam-mini preset='adam' is not known; allowed: paper, row, row-column, slim, first, "
            "tensor.",
        ),
        (
            {"rules": (("*.bias", "diagonal"),)},
            "Adam-mini rule 'diagonal' for pattern '*.bias' is not known; allowed: row, column, "
            "head, tensor, element.",
        ),
    ],
)
def test_unknown_option_on_all_ranks(options, text):
    assert errors_of(2, build, Job(tp=2, adam_mini=options, **TINY)) == [("ValueError", text)] * 2


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}, {}], ids=str)
def test_name_pattern_that_matches_nothing(layout):
    options = {"full_v": ("*.linear_qkv.weight", "*.lineer_fc1.weight"), "rules": (("x", "row"),)}
    job = Job(adam_mini=options, **(TINY | {"layers": 2}), **layout)
    for kind, text in errors_of(2, build, job):
        assert kind == "ValueError"
        assert text == (
            "Adam-mini name patterns ['*.lineer_fc1.weight', 'x'] match no parameter of the model. "
            "Patterns are matched with fnmatch against global names such as "
            "'decoder.layers.0.mlp.linear_fc1.weight'; --adam-mini-manifest, or manifest() of "
            "AdamMini, lists all of them."
        )


def test_name_pattern_that_matches_on_one_pipeline_stage_only():
    options = {
        "full_v": ("decoder.layers.1.*fc1*", "output_layer.weight"),
        "rules": (("embedding.*", "tensor"),),
    }
    job = Job(pp=2, adam_mini=options, **(TINY | {"layers": 2}))
    first, second = run_ranks(2, build, job)
    assert first == second
    assert first.count("element") == 2
    assert "tensor" in first


def test_head_rule_on_a_parameter_without_heads():
    job = Job(tp=2, adam_mini={"rules": (("*.linear_fc1.weight", "head"),)}, **TINY)
    for kind, text in errors_of(2, build, job):
        assert kind == "ValueError"
        assert text == (
            "Adam-mini rule 'head' was asked for parameter "
            "'decoder.layers.0.mlp.linear_fc1.weight' of role 'mlp', which has no heads; use "
            "'row', 'tensor' or 'element'."
        )


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"lr": -1.0}, "lr=-1.0 is not allowed; it must be >= 0."),
        ({"weight_decay": -0.5}, "weight_decay=-0.5 is not allowed; it must be >= 0."),
    ],
)
def test_adam_values_out_of_range(values, text):
    assert errors_of(2, build, Job(tp=2, **values, **TINY)) == [("ValueError", text)] * 2


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"adam_beta1": 1.0}, "beta1=1.0 is not allowed; it must be in [0, 1)."),
        ({"adam_beta2": -0.1}, "beta2=-0.1 is not allowed; it must be in [0, 1)."),
        ({"adam_eps": 0.0}, "eps=0.0 is not allowed; it must be > 0 (the usual value is 1e-8)."),
    ],
)
def test_betas_and_eps_out_of_range(values, text):
    assert errors_of(2, build_with_values, values) == [("ValueError", text)] * 2


def build_with_values(values: dict[str, float]) -> None:
    """Build with values that a job has no field for."""
    from megatron_adam_mini.mcore import registration

    original = registration.build_optimizer

    def build_optimizer(config: Any, *rest: Any) -> Any:
        for name, value in values.items():
            setattr(config, name, value)
        return original(config, *rest)

    registration.build_optimizer = build_optimizer
    build(Job(tp=2, **TINY))


def build_elsewhere(kind: str) -> None:
    """Build where rank 1 has forgotten which device it uses, or left a gradient elsewhere."""
    trainer = Trainer(Job(**TINY))
    param = next(iter(trainer.chunks[0].parameters()))
    if rank() == ODD and kind == "weight":
        current = torch.device("cuda", 1)
        torch.cuda.current_device = lambda: current
    elif rank() == ODD:
        param.main_grad = torch.empty(param.shape, device="meta")
    trainer._build_optimizer()


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        ("weight", "on cpu, while the current device is cuda:1"),
        ("gradient", "on meta, while the current device is cpu"),
    ],
)
def test_tensors_on_another_device(kind, where):
    (_, other), (own_kind, own) = errors_of(2, build_elsewhere, kind)
    assert own_kind == "ValueError"
    assert own.startswith(f"Adam-mini found the {kind} of ")
    assert f"{where}. Remedy: call torch.cuda.set_device on this rank" in own
    assert other == f"Adam-mini could not plan its step on rank 1: ValueError: {own}"


# Ranks that differ. The interesting rank is never rank 0, whose plan the others are compared with.

GRIDS = [({"tp": 2}, 2), ({"pp": 2}, 2), ({"tp": 2, "pp": 2}, 4), ({}, 3)]
IDS = ["TP2", "PP2", "TP2xPP2", "DP3"]
ODD = 1


def build_with_rank_options(layout: dict[str, int], name: str, usual: Any, odd: Any) -> None:
    options = {name: odd if rank() == ODD else usual}
    build(Job(adam_mini=options, **(TINY | {"layers": 2}), **layout))


@pytest.mark.parametrize(("layout", "world_size"), GRIDS, ids=IDS)
def test_presets_that_differ_between_ranks(layout, world_size):
    args = (layout, "preset", "paper", "first")
    for kind, text in errors_of(world_size, build_with_rank_options, *args):
        assert kind == "RuntimeError"
        assert "Adam-mini's options differs between ranks that must share it" in text
        assert re.search(
            r'rank 0 has \{.*"preset": "paper".*\}, rank 1 has \{.*"preset": "first"', text
        )
        assert text.endswith("Start every rank with the same flags and model (also requires_grad).")


def test_patterns_that_differ_between_ranks():
    args = ({}, "full_v", ("*fc1*",), ("*fc2*",))
    for kind, text in errors_of(2, build_with_rank_options, *args):
        assert kind == "RuntimeError"
        assert re.search(r"rank 0 has .*\*fc1\*.*, rank 1 has .*\*fc2\*", text)


def build_with_frozen_parameter(layout: dict[str, int], name: str) -> None:
    job = Job(frozen=name if rank() == ODD else "", **(TINY | {"layers": 2}), **layout)
    Trainer(job)


@pytest.mark.parametrize(
    ("layout", "world_size", "name"),
    [
        ({"tp": 2}, 2, "decoder.layers.0.mlp.linear_fc1"),
        ({}, 3, "decoder.layers.1.self_attention.linear_qkv"),
        ({"tp": 2, "pp": 2}, 4, "decoder.layers.0.input_layernorm"),
    ],
    ids=["TP2", "DP3", "TP2xPP2"],
)
def test_parameter_frozen_on_one_rank(layout, world_size, name):
    for kind, text in errors_of(world_size, build_with_frozen_parameter, layout, name):
        assert kind == "RuntimeError"
        assert text.startswith(
            "Adam-mini's layout of pipeline stage 0 differs between ranks that must share it: "
        )
        assert "rank 0" in text
        assert f"rank {ODD}" in text
        # The parameter itself is named, not the first one whose offset it moved.
        assert f"{name}.weight" in text


def test_last_parameter_frozen_on_one_rank_is_named():
    """The last entry of a layout has no counterpart to differ from."""
    for kind, text in errors_of(2, check_records_of_different_length):
        assert kind == "RuntimeError"
        assert "rank 0 has" in text
        assert re.search(r"['\"]b['\"]", text)


def check_records_of_different_length() -> None:
    from megatron_adam_mini.agreement import PlanRecord, check_agreement

    layout = [{"name": "a"}, {"name": "b"}] if rank() == 0 else [{"name": "a"}]
    check_agreement(PlanRecord({}, {"stage": layout}), patterns=())


def build_with_experts_on_one_rank() -> None:
    build(Job(pp=2, experts=2 if rank() == ODD else None, **(TINY | {"layers": 2})))


def test_a_model_with_experts_on_one_stage_whose_config_lacks_them_on_the_other():
    """Norms of experts and of dense parameters travel in one message, which would not match."""
    for kind, text in errors_of(2, build_with_experts_on_one_rank):
        assert kind == "RuntimeError"
        assert re.search(
            r'rank 0 has \{.*"domains": \["dense"\].*, rank 1 has .*\["dense", "expert"\]', text
        )


def build_with_failure(layout: dict[str, int], kind: type[Exception], culprits: list[int]) -> None:
    from megatron_adam_mini.mcore import rank_plan

    original = rank_plan.collect_parameters

    def collect_parameters(*args: Any, **kwargs: Any) -> Any:
        if rank() in culprits:
            raise kind("6 attention heads are not divisible by 4 query groups")
        return original(*args, **kwargs)

    rank_plan.collect_parameters = collect_parameters
    build(Job(**(TINY | {"layers": 2}), **layout))


@pytest.mark.parametrize(
    ("layout", "world_size", "kind"),
    [
        (*grid, kind)
        for grid, kind in zip(
            GRIDS, (ValueError, NotImplementedError, TypeError, ValueError), strict=True
        )
    ],
    ids=IDS,
)
def test_exception_while_planning_on_one_rank(layout, world_size, kind):
    found = errors_of(world_size, build_with_failure, layout, kind, [ODD])
    reason = "6 attention heads are not divisible by 4 query groups"
    for index, (name, text) in enumerate(found):
        if index == ODD:
            assert (name, text) == (kind.__name__, reason)
        else:
            assert name == "RuntimeError"
            assert text == (
                f"Adam-mini could not plan its step on rank {ODD}: {kind.__name__}: {reason}"
            )


@pytest.mark.parametrize("kind", [AttributeError, KeyError, AssertionError, RuntimeError])
def test_unforeseen_exception_while_planning_on_one_rank(kind):
    """A mistake of our own, or an unforeseen model, must not leave the others waiting."""
    found = errors_of(2, build_with_failure, {"tp": 2}, kind, [ODD])
    assert found[ODD][0] == kind.__name__
    assert found[0][0] == "RuntimeError"
    assert f"could not plan its step on rank {ODD}: {kind.__name__}" in found[0][1]


def test_several_ranks_that_fail_raise_their_own_errors():
    found = errors_of(3, build_with_failure, {}, ValueError, [1, 2])
    assert [kind for kind, _ in found] == ["RuntimeError", "ValueError", "ValueError"]
    assert "on rank 1" in found[0][1]


def build_with_odd_heads() -> None:
    """One rank believes in another number of query groups."""
    from dataclasses import replace

    from megatron_adam_mini.plan.parameter_info import HeadGeometry

    original = HeadGeometry.of

    def heads(config: Any, role: str) -> Any:
        found = original(config, role)
        return replace(found, num_query_groups=3) if rank() == ODD else found

    HeadGeometry.of = heads
    build(Job(tp=2, **TINY))


def test_heads_not_divisible_on_one_rank():
    usual, odd = errors_of(2, build_with_odd_heads)
    reason = (
        "Parameter 'decoder.layers.0.self_attention.linear_qkv.weight': 4 attention heads are not "
        "divisible by 3 query groups; choose numbers that are."
    )
    assert odd == ("ValueError", reason)
    assert usual == (
        "RuntimeError",
        f"Adam-mini could not plan its step on rank {ODD}: ValueError: {reason}",
    )


def build_with_rank_value(name: str, usual: Any, odd: Any) -> None:
    value = odd if rank() == ODD else usual
    if name == "wrapped":
        from megatron.core import optimizer

        original = optimizer.get_megatron_optimizer

        def get_megatron_optimizer(config: Any, chunks: Any) -> Any:
            return original(config, chunks if value else [chunk.module for chunk in chunks])

        optimizer.get_megatron_optimizer = get_megatron_optimizer
        build(Job(tp=2, **TINY))
    elif name == "optimizer_args":
        build(Job(tp=2, optimizer_args=value, **TINY))
    else:
        build(Job(tp=2, **{name: value}, **TINY))


@pytest.mark.parametrize(
    ("name", "usual", "odd", "kind", "text"),
    [
        ("lr", 1e-3, -1e-3, "ValueError", "lr=-0.001 is not allowed"),
        ("wrapped", True, False, "TypeError", "DistributedDataParallel"),
        (
            "optimizer_args",
            {},
            {"optimizer_cuda_graph": True},
            "NotImplementedError",
            "--optimizer-cuda-graph",
        ),
    ],
    ids=["lr", "wrapped", "flag"],
)
def test_value_refused_on_one_rank_only(name, usual, odd, kind, text):
    """Checks that need no plan must reach all ranks too: the others would wait in a collective."""
    found = errors_of(2, build_with_rank_value, name, usual, odd)
    assert found[ODD][0] == kind
    assert text in found[ODD][1]
    assert found[0][0] == "RuntimeError"
    assert f"rank {ODD}: {kind}: " in found[0][1]
    assert text in found[0][1]


def test_manifest_that_cannot_be_written(tmp_path):
    """Only rank 0 writes it, and the others must not go on without rank 0."""
    path = str(tmp_path / "no such folder" / "manifest.json")
    found = errors_of(2, build, Job(tp=2, adam_mini={"manifest": path}, **TINY))
    assert all(path in text for _, text in found), found


def test_manifest_that_cannot_be_written_in_the_end():
    """A file system may be full only when there is something to write."""
    found = errors_of(2, build, Job(tp=2, adam_mini={"manifest": "/dev/full"}, **TINY))
    assert all("'/dev/full' cannot be written: No space left" in text for _, text in found), found


def build_with_overrides(values: Sequence[dict[str, Any]]) -> None:
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.optimizer.optimizer_config import ParamKey

    trainer = Trainer(Job(pp=2, **TINY | {"layers": 2}))
    names = ("*word_embeddings*", "embedding.*", "module.*embedding*")
    overrides = {ParamKey(name=name): one for name, one in zip(names, values, strict=False)}
    get_megatron_optimizer(trainer.optimizer.config, trainer.chunks, overrides)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([{"max_lr": 1e-3}, {}, {"max_lr": 2e-3}], "Conflicting overrides for max_lr"),
        ([{"betas": [0.9, 0.95]}], "unhashable type: 'list'"),
    ],
)
def test_overrides_of_a_parameter_that_one_pipeline_stage_has(values, reason):
    """Megatron gathers all groups, and the other stages would wait for the first one's."""
    for kind, text in errors_of(2, build_with_overrides, values):
        assert kind in ("ValueError", "RuntimeError")
        assert "embedding.word_embeddings.weight' cannot be used: " + reason in text
        assert "Remedy: give all that match a parameter the same value" in text


# Models that are not supported.


def build_unwrapped() -> None:
    from megatron.core import optimizer

    original = optimizer.get_megatron_optimizer
    optimizer.get_megatron_optimizer = lambda config, chunks: original(
        config, [chunk.module for chunk in chunks]
    )
    build(Job(tp=2, **TINY))


def test_model_that_is_not_wrapped():
    text = (
        "Adam-mini needs model chunks wrapped in megatron.core's DistributedDataParallel, got "
        "GPTModel; wrap them as megatron.training.get_model does."
    )
    assert errors_of(2, build_unwrapped) == [("TypeError", text)] * 2


def build_with_changed_parameters(what: str) -> None:
    """Change one parameter after the model is built, just before the optimizer sees it."""
    import torch

    original = Trainer._build_optimizer

    def build_optimizer(self: Trainer) -> Any:
        params = {n: p for chunk in self.chunks for n, p in chunk.named_parameters()}
        name = next(n for n in params if n.endswith("mlp.linear_fc1.weight"))
        if what == "quantized":

            class QuantizedTensor(torch.Tensor):
                pass

            # What Transformer Engine does: the parameter's data is a tensor of another class.
            params[name].__class__ = type("Float8Parameter", (torch.nn.Parameter,), {})
            data = params[name].detach().as_subclass(QuantizedTensor)
            type(params[name]).data = property(lambda _: data)
        elif what == "dtype":
            data = params[name].detach().double()
            params[name].__class__ = type("DoubleParameter", (torch.nn.Parameter,), {})
            type(params[name]).dtype = property(lambda _: torch.float64)
            type(params[name]).data = property(lambda _: data)
        elif what == "norm group":
            params[name].grad_norm_group = "mtp"
        return original(self)

    Trainer._build_optimizer = build_optimizer
    build(Job(tp=2, **TINY))


FC1 = "'decoder.layers.0.mlp.linear_fc1.weight'"


@pytest.mark.parametrize(
    ("what", "text"),
    [
        (
            "quantized",
            f"Parameter {FC1} is a QuantizedTensor of torch.float32; Adam-mini updates plain "
            "float32, bfloat16 and float16 parameters, and quantized ones that Megatron-Core knows "
            "as Transformer Engine's. Train without quantized parameters.",
        ),
        (
            "dtype",
            f"Parameter {FC1} is a Tensor of torch.float64; Adam-mini updates plain float32, "
            "bfloat16 and float16 parameters, and quantized ones that Megatron-Core knows as "
            "Transformer Engine's. Train without quantized parameters.",
        ),
        (
            "norm group",
            f"Parameter {FC1} has a gradient norm of its own ('mtp'), as --mtp-detach-heads makes "
            "it, while Adam-mini has one norm for all parameters. Train without "
            "--mtp-detach-heads.",
        ),
    ],
)
def test_parameter_that_is_not_supported(what, text):
    found = errors_of(2, build_with_changed_parameters, what)
    assert found == [("NotImplementedError", text)] * 2


def step_with_different_betas() -> tuple[str, bool]:
    trainer = Trainer(Job(tp=2, bias=True, **TINY))
    assert len(trainer.optimizer.param_groups) > 1
    before = [p.detach().clone() for p in trainer.optimizer.get_parameters()]
    trainer.optimizer.param_groups[0]["betas"] = (0.8, 0.95)
    trainer.backward(0)
    try:
        trainer.optimizer.step()
    except NotImplementedError as error:
        text = str(error)
    assert trainer.optimizer.inner.main_params.step_count == 0, "a refused step was counted"
    after = trainer.optimizer.get_parameters()
    return text, all(bool((a == b).all()) for a, b in zip(before, after, strict=True))


def test_betas_that_differ_between_groups():
    for text, unchanged in run_ranks(2, step_with_different_betas):
        assert text == (
            "Adam-mini got parameter groups with different betas [(0.8, 0.95), (0.9, 0.95)]; all "
            "groups must share one pair. Give the groups different lr or weight_decay instead."
        )
        assert unchanged


# The check alone, without a model.


def check_records(differ: str) -> str:
    from megatron_adam_mini.agreement import PlanRecord, check_agreement

    stage = f"pipeline stage {rank() // 2}"
    layout = [{"name": "a", "at": [0, 4]}, {"name": "b", "at": [4, 8]}]
    if differ == "stages":
        layout.append({"name": stage})  # stages may differ from each other
    if differ == "layout" and rank() == 3:
        layout[1]["at"] = [5, 9]
    matched = frozenset({"a*"} if rank() == 3 else ())
    check_agreement(PlanRecord({"preset": "paper"}, {stage: layout}, matched), patterns=("a*",))
    return "agreed"


@pytest.mark.parametrize("differ", ["nothing", "stages"])
def test_plans_that_agree(differ):
    assert run_ranks(4, check_records, differ) == ["agreed"] * 4


def gathered_when_layouts_differ() -> list[int]:
    """Return how many bytes of this rank all are given when one entry of 10,000 differs."""
    from torch import distributed

    from megatron_adam_mini.agreement import PlanRecord, check_agreement

    original, sizes = distributed.all_gather_object, []

    def all_gather_object(gathered: list[Any], value: Any, group: Any = None) -> None:
        sizes.append(len(pickle.dumps(value)))
        original(gathered, value, group=group)

    distributed.all_gather_object = all_gather_object
    layout = [{"name": f"layer {n}", "at": n} for n in range(10_000)]
    layout[-1]["at"] += rank() == ODD
    with pytest.raises(RuntimeError, match=r"entry 9999 is .* on rank 0 .* on rank 1"):
        check_agreement(PlanRecord({}, {"stage": layout}), patterns=())
    return sizes


def test_no_rank_gathers_the_layouts_of_all_others():
    for (size,) in run_ranks(3, gathered_when_layouts_differ):
        assert size < 1000


def test_layouts_are_compared_within_a_stage_and_both_sides_are_shown():
    for kind, text in errors_of(4, check_records, "layout"):
        assert kind == "RuntimeError"
        assert text == (
            "Adam-mini's layout of pipeline stage 1 differs between ranks that must share it: "
            'entry 1 is {"name": "b", "at": [4, 8]} on rank 2 and {"name": "b", "at": [5, 9]} on '
            "rank 3. Start every rank with the same flags and model (also requires_grad)."
        )


def test_single_process_needs_no_process_group():
    from megatron_adam_mini.agreement import PlanRecord, check_agreement

    record = PlanRecord({}, {"stage": [{"name": "a"}]}, frozenset({"a"}))
    check_agreement(record, patterns=("a",))
    with pytest.raises(ValueError, match=r"patterns \['b'\] match no parameter"):
        check_agreement(record, patterns=("a", "b"))
    with pytest.raises(KeyError, match="own error"):
        check_agreement(PlanRecord({}, error=KeyError("own error")), patterns=())


def build_with_other_config(job: Job) -> str:
    import copy

    from megatron_adam_mini.mcore.factory import build_optimizer

    trainer = Trainer(job)
    config = copy.copy(trainer.optimizer.config)
    config.use_distributed_optimizer = not config.use_distributed_optimizer
    with pytest.raises(ValueError, match="give both the same value") as caught:
        build_optimizer(config, trainer.chunks)
    return str(caught.value)


@pytest.mark.parametrize("distributed_optimizer", [True, False])
def test_configs_that_disagree_on_the_distributed_optimizer(distributed_optimizer):
    job = Job(distributed_optimizer=distributed_optimizer)
    for text in run_ranks(2, build_with_other_config, job):
        assert f"{not distributed_optimizer} in OptimizerConfig" in text
