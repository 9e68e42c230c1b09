"""Which group of a checkpoint is which of a run, and which weight of a state dict whose.

``tests/test_resume_options.py`` does it in whole runs; here are the cases that these do not have.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.ranks import run_ranks

PLAIN = {"wd_mult": 1.0, "lr_mult": 1.0, "max_lr": 0.1, "min_lr": 0.0, "default_config": True}


def group(**values: Any) -> dict[str, Any]:
    found = {**PLAIN, "is_expert_parallel": False, "is_decoupled_lr": False, **values}
    if "max_lr" in values:
        found.setdefault("default_config", False)
        found["default_config"] = values.get("default_config", False)
    return found


def saved(number: int, **values: Any) -> dict[str, Any]:
    return {**group(**values), "lr": number / 8, "weight_decay": number / 16, "step": 3}


#: Name -> groups of the run, those of the checkpoint, which of these each takes its rate from, and
#: which it would take bounds from.
CASES: dict[str, tuple[list[Any], list[Any], list[int | None], list[int | None]]] = {
    "order does not matter": (
        [group(), group(wd_mult=0.0)],
        [saved(0, wd_mult=0.0), saved(1)],
        [1, 0],
        [1, 0],
    ),
    "another optimizer's name is no difference": (
        [group(optimizer="adam_mini")],
        [saved(0, optimizer="adam")],
        [0],
        [0],
    ),
    "other bounds": (
        [group(max_lr=0.2, default_config=True), group(max_lr=0.4)],
        [saved(0), saved(1, max_lr=0.4)],
        [None, 1],
        [0, 1],
    ),
    "the default rate is now what an override was, and the reverse": (
        [group(max_lr=0.4, default_config=True), group(max_lr=0.1)],
        [saved(0), saved(1, max_lr=0.4)],
        [None, None],
        [0, 1],
    ),
    "two of a kind have changed": (
        [group(max_lr=0.2), group(max_lr=0.3)],
        [saved(0, max_lr=0.4), saved(1, max_lr=0.5)],
        [None, None],
        [None, None],
    ),
    "one has become two": (
        [group(max_lr=0.2), group(max_lr=0.3)],
        [saved(0, max_lr=0.4)],
        [None, None],
        [None, None],
    ),
    "the other one of a kind is known": (
        [group(max_lr=0.2), group(max_lr=0.5)],
        [saved(0, max_lr=0.4), saved(1, max_lr=0.5)],
        [None, 1],
        [0, 1],
    ),
    "two overrides that amount to the same": (
        [group(max_lr=0.2), group(max_lr=0.2)],
        [saved(0, max_lr=0.2), saved(0, max_lr=0.2)],
        [0, 0],
        [0, 0],
    ),
    "weight decay of its own": (
        [group(start_wd=0.1, end_wd=0.2)],
        [saved(0), saved(1, start_wd=0.1, end_wd=0.3)],
        [None],
        [1],
    ),
    "names of NeMo": (
        [group()],
        [{**saved(0, wd_mult=0.0), "pre_wd_mult": 0.0}, _nemo := {}],
        [1],
        [1],
    ),
    "releases that do not note the default": (
        [group()],
        [{k: v for k, v in saved(0).items() if k != "default_config"}],
        [0],
        [0],
    ),
    "nothing saved": ([group()], [], [None], [None]),
}
_nemo.update({k: v for k, v in saved(1).items() if k != "wd_mult"}, pre_wd_mult=1.0)


def loaded() -> dict[str, Any]:
    from megatron_adam_mini.mcore.param_groups import BOUNDS, load_groups, take_bounds

    found = {}
    for name, (groups, others, _, _) in CASES.items():
        groups = [{**one, "lr": 9.0, "weight_decay": 9.0, "betas": (0.9, 0.9)} for one in groups]
        configured = [dict(one) for one in groups]
        matches = load_groups(groups, others)
        rates = [(one.pop("lr"), one.pop("weight_decay")) for one in groups]
        for one in configured:
            del one["lr"], one["weight_decay"]
        assert groups == configured, "more than rates was taken"
        take_bounds(groups, matches)
        bounds = [{key: one[key] for key in BOUNDS if key in one} for one in groups]
        found[name] = rates, bounds
    return found


def test_groups_take_rates_and_bounds_of_their_own_in_the_checkpoint() -> None:
    (found,) = run_ranks(1, loaded)
    for name, (groups, others, rates_of, bounds_of) in CASES.items():
        rates, bounds = found[name]
        assert rates == [
            (9.0, 9.0) if i is None else (others[i]["lr"], others[i]["weight_decay"])
            for i in rates_of
        ], name
        for own, number, one in zip(groups, bounds_of, bounds, strict=True):
            source = own if number is None else others[number]
            assert one == {key: source[key] for key in one}, name


def model_and_weights(*names: str) -> tuple[Any, dict[str, Any]]:
    model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 3, bias=False) for name in names})
    return model, {f"{name}.weight": torch.full((3, 2), float(i)) for i, name in enumerate(names)}


def found_weights() -> dict[str, Any]:
    from megatron_adam_mini.mcore.model_weights import weights_by_parameter

    wrapped = torch.nn.ModuleDict({"module": model_and_weights("a", "b")[0]})
    first, weights = model_and_weights("a", "b")
    second, others = model_and_weights("c")
    first["b"].weight.requires_grad_(False)

    def values(chunks: list[Any], state: dict[str, Any]) -> Any:
        try:
            return [float(w[0, 0]) for w in weights_by_parameter(chunks, state).values()]
        except ValueError as error:
            return str(error)

    return {
        "bare": values([wrapped], weights),
        "model": values([wrapped], {"model": weights, "args": None}),
        "prefixed": values([wrapped], {"model": {f"module.{k}": v for k, v in weights.items()}}),
        "frozen": values([first], {"a.weight": weights["a.weight"]}),
        "chunks": values([first, second], {"model0": weights, "model1": others}),
        "NeMo": values([first, second], {"model_0": weights, "model_1": others}),
        "no chunk": values([first, second], {"model0": weights}),
        "missing": values([wrapped], {"model": {"a.weight": weights["a.weight"]}}),
        "shape": values([first], {"a.weight": torch.zeros(2, 2)}),
    }


def test_weights_in_a_state_dict_are_found_by_name() -> None:
    (found,) = run_ranks(1, found_weights)
    assert found["bare"] == found["model"] == found["prefixed"] == [0.0, 1.0]
    assert found["frozen"] == [0.0]
    assert found["chunks"] == found["NeMo"] == [0.0, 0.0]
    assert "no 'model1' or 'model_1'" in found["no chunk"]
    assert "no tensor for parameter 'b.weight'" in found["missing"]
    assert "has shape (3, 2) in the model, (2, 2) in the state dict" in found["shape"]


@pytest.mark.parametrize(("beta1", "beta2", "expected"), [(0.9, 0.95, 1.10), (0.9, 0.999, 6.57)])
def test_how_large_first_updates_without_bias_correction_are(
    beta1: float, beta2: float, expected: float
) -> None:
    (found,) = run_ranks(1, first_updates, beta1, beta2)
    m = v = 0.0
    largest = 0.0
    for _ in range(200):
        m, v = beta1 * m + (1 - beta1), beta2 * v + (1 - beta2)
        largest = max(largest, m / v**0.5)
    assert found == pytest.approx(largest)
    assert round(found, 2) == expected


def first_updates(beta1: float, beta2: float) -> float:
    from megatron_adam_mini.mcore.frozen import _first_updates

    return _first_updates(beta1, beta2)
