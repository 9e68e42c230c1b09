"""What depends on Megatron's release stands in ``mcore/compat.py``, and is there in this one."""

from __future__ import annotations

import argparse
import ast
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import megatron_adam_mini
from tests.ranks import run_ranks

FOLDER = Path(megatron_adam_mini.__file__).parent / "mcore"
MODULES = sorted(path.name for path in FOLDER.glob("*.py") if path.name != "compat.py")


def private_names(source: str) -> list[str]:
    """Return the private names that a module takes from megatron, or from modules of it."""
    tree = ast.parse(source)
    found, bound = [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron."):
            for alias in node.names:
                bound.add(alias.asname or alias.name)
                found += [alias.name] if alias.name.startswith("_") else []
        elif isinstance(node, ast.Import):
            bound |= {alias.asname for alias in node.names if alias.name.startswith("megatron.")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            private = node.attr.startswith("_") and not node.attr.startswith("__")
            found += [node.attr] if private and node.value.id in bound else []
    return found


def test_the_walk_sees_private_names():
    source = (
        "from megatron.core import optimizer as mcore_optimizer\n"
        "from megatron.core.optimizer import _get_param_groups, DistributedOptimizer\n"
        "import megatron.core.parallel_state as mpu\n"
        "mcore_optimizer._private(1)\n"
        "mpu._GLOBAL, mpu.public, self._own, mpu.__name__\n"
    )
    assert private_names(source) == ["_get_param_groups", "_private", "_GLOBAL"]


@pytest.mark.parametrize("module", MODULES)
def test_private_names_of_megatron_are_in_compat_alone(module):
    assert private_names((FOLDER / module).read_text(encoding="utf-8")) == []


def hooks_of_this_release() -> dict[str, bool]:
    from megatron_adam_mini.mcore import compat

    hooks = [value for value in vars(compat).values() if isinstance(value, compat.Hook)]
    return {
        f"{hook.module}.{hook.name}": callable(getattr(hook.place(), hook.name, None))
        for hook in hooks
        if hook is not compat.MIMO or compat.optional_module(hook.module) is not None
    }


def probes_of_this_release() -> dict[str, Any]:
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.optimizer.optimizer_config import OptimizerConfig
    from megatron.training import get_args, global_vars

    from megatron_adam_mini.mcore import compat

    facts: dict[str, Any] = {"before parsing": compat.training_arguments()}
    args = argparse.Namespace(optimizer="adam")
    global_vars.set_args(args)
    facts["arguments"] = compat.training_arguments() is get_args() is args
    facts["threshold"] = compat.grad_norm_skip_threshold(OptimizerConfig(lr=1.0))
    facts["set threshold"] = compat.grad_norm_skip_threshold(
        OptimizerConfig(lr=1.0, grad_norm_skip_threshold=2.0)
    )
    facts["gloo"] = compat.factory_defaults(get_megatron_optimizer)["use_gloo_process_groups"]
    facts["absent module"] = compat.optional_module("megatron.training.does_not_exist")
    return facts


def test_what_is_wrapped_exists_in_this_release():
    (found,) = run_ranks(1, hooks_of_this_release)
    assert len(found) == 16
    assert found == dict.fromkeys(found, True)


def test_what_is_read_exists_in_this_release():
    (found,) = run_ranks(1, probes_of_this_release)
    assert found == {
        "before parsing": None,
        "arguments": True,
        "threshold": float("inf"),
        "set threshold": 2.0,
        "gloo": True,
        "absent module": None,
    }


def other_releases() -> dict[str, Any]:
    """Probe stand-ins of what other releases, or collections that a caller made, have."""
    from megatron_adam_mini.mcore import compat

    def without_experts(param: Any, tp_group: Any = None) -> bool:
        return bool(param == "a" and tp_group == "tp")

    def with_experts(param: Any, tp_group: Any = None, expert_tp_group: Any = None) -> bool:
        return without_experts(param, tp_group) and expert_tp_group == "etp"

    duplicates = []
    for function in (without_experts, with_experts):
        compat.param_is_not_tensor_parallel_duplicate = function
        duplicates.append(compat.is_not_tp_duplicate("a", "tp", "etp"))
    few, all_groups = SimpleNamespace(tp=1), SimpleNamespace(tp=1, expt_tp=2, intra_dist_opt=3)
    layer = SimpleNamespace(
        submodules_config=SimpleNamespace(sharded_state_dict_keys_map={"a.": "b."})
    )

    def training_log(loss: Any, iteration: int, report: bool = False) -> None:
        pass

    iteration_of = compat.argument_reader(training_log, "iteration")
    parser = argparse.ArgumentParser()
    parser.add_argument("--good", help="half, 50%%, and %(default)s")
    bad = parser.add_argument("--bad")
    bad.help = "half, 50% of it"  # newer versions of Python refuse it at once
    compat.repair_help(parser)
    return {
        "duplicates": duplicates,
        "expert_tp": [compat.expert_tp_group(few), compat.expert_tp_group(all_groups)],
        "norm": [compat.norm_group(few), compat.norm_group(all_groups)],
        "prefixes": [dict(compat.stored_prefixes(module)) for module in (SimpleNamespace(), layer)],
        "iterations": [iteration_of(0, 7), iteration_of(0, iteration=7, report=True)],
        "help": [part in parser.format_help() for part in ("50%, and None", "50% of it")],
        "threshold": compat.grad_norm_skip_threshold(SimpleNamespace()),
    }


def test_what_other_releases_lack():
    (found,) = run_ranks(1, other_releases)
    assert found == {
        "duplicates": [True, True],
        "expert_tp": [1, 2],
        "norm": [None, 3],
        "prefixes": [{}, {"a.": "b."}],
        "iterations": [7, 7],
        "help": [True, True],
        "threshold": float("inf"),
    }


def places_of_an_imported_function() -> list[str]:
    from megatron_adam_mini.mcore.compat import Hook

    importer = ModuleType("importer")
    importer.dumps = json.dumps  # type: ignore[attr-defined]
    sys.modules.update(none_=None, object_=object(), importer_=importer)  # type: ignore[arg-type]
    return [place.__name__ for place in Hook("json", "dumps", imported=True).places()]


def test_what_is_no_module_is_passed_over_where_a_function_was_imported():
    """``sys.modules`` may hold anything: None forbids an import."""
    (found,) = run_ranks(1, places_of_an_imported_function)
    assert found[0] == "json"
    assert "importer" in found
