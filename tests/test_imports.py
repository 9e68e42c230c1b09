"""Imports point downwards and go in no circle, and only ``mcore/`` knows Megatron.

Imports for type checkers and inside of functions count, too: what a module must know of to be read
is a matter of design, not of when Python runs the import.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import pytest

import megatron_adam_mini

PACKAGE = "megatron_adam_mini"
ROOT = Path(megatron_adam_mini.__file__).parent

#: A module may import from its own folder and from those in a line before it, not from neighbours.
LAYERS = (
    ("config",),
    ("partition_flags", "adam_rules"),
    ("plan",),
    ("checkpoint", "estimate"),
    ("agreement", "exchange", "piece_values", "rounding"),
    ("code_scales",),
    ("collectives",),
    ("state",),
    ("flat_state",),
    ("main_params",),
    ("kernels",),
    ("hyper_parameters", "step_vectors", "coupled_decay"),
    ("wide_sums", "host_update", "gradient_samples"),
    ("overlapped_sums",),
    ("decision",),
    ("wide_means", "early_buffers"),
    ("optimizer", "standalone"),
    ("convert", "update_sizes", "second_moment_noise", "heterogeneity"),
    ("mcore",),
    ("cpu_host",),
    ("launch", "cli"),
)

#: What stands below a folder and is none of its business all the same.
FORBIDDEN = {
    "checkpoint": {"config", "plan"},  # what the entries mean is not known there
    "mcore": {"convert", "estimate"},  # a run needs no tools
}

#: Kernels are the same functions in each module, and the CPU host answers without any order.
NO_FLOW_OF_MODULES = {"kernels", "cpu_host"}

#: Third-party packages that each layer may import (what the modules' first lines promise).
THIRD_PARTY = {
    "config": set(),
    "partition_flags": set(),
    "adam_rules": set(),
    "plan": {"numpy"},
    "checkpoint": {"numpy", "torch"},
    "estimate": {"numpy", "matplotlib"},
    "agreement": {"torch"},
    "exchange": {"torch"},
    "code_scales": {"torch"},
    "piece_values": {"numpy", "torch"},
    "collectives": {"torch"},
    "rounding": {"torch"},
    "state": {"torch"},
    "flat_state": {"torch"},
    "main_params": {"torch"},
    "kernels": {"numpy", "torch", "triton"},
    "hyper_parameters": {"torch"},
    "step_vectors": {"numpy", "torch"},
    "coupled_decay": {"torch"},
    "wide_sums": {"torch"},
    "wide_means": {"torch"},
    "early_buffers": set(),
    "host_update": {"numpy", "torch"},
    "gradient_samples": {"numpy", "torch"},
    "overlapped_sums": {"numpy", "torch"},
    "decision": {"torch"},
    "optimizer": {"torch"},
    "standalone": {"numpy", "torch"},
    "update_sizes": {"torch"},
    "second_moment_noise": {"numpy", "torch"},
    "heterogeneity": {"numpy", "torch", "matplotlib", "tqdm"},
    "convert": {"numpy", "torch", "tqdm"},
    "mcore": {"numpy", "torch", "megatron"},
    "cpu_host": {"torch"},
    "launch": set(),
    "cli": set(),
    "__init__": set(),
}

#: Modules that promise less than their layer allows.
STANDARD_LIBRARY_ONLY = (
    "mcore/preflight.py",
    "mcore/preflight_groups.py",
    "mcore/preflight_model.py",
    "mcore/preflight_step.py",
    "mcore/arguments.py",
    "cpu_host/flags.py",
)

MODULES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))
FOLDERS = sorted({module.split("/")[0] for module in MODULES if "/" in module})


def layer_of(module: str) -> str:
    """Return the layer of ``a/b.py`` or of the dotted rest ``a.b`` of a package's module."""
    return module.removesuffix(".py").replace("/", ".").split(".")[0]


def height(layer: str) -> int:
    return next(index for index, layers in enumerate(LAYERS) if layer in layers)


def imports_of(source: str, module: str) -> list[tuple[str, bool]]:
    """Return ``(dotted name, runs when the module is imported)`` of every import statement."""
    found = []
    package = [PACKAGE, *module.split("/")[:-1]]

    def visit(node: ast.AST, eager: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((alias.name, eager) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, node.module or ""]).strip(".")
            # `from folder import name` may name a module.
            own = origin.split(".")[0] == PACKAGE
            names = [f"{origin}.{alias.name}" for alias in node.names] if own else [origin]
            found.extend((name, eager) for name in names)
        inner = eager and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.body:
                visit(child, False)
            for child in node.orelse:
                visit(child, inner)
            return
        for child in ast.iter_child_nodes(node):
            visit(child, inner)

    visit(ast.parse(source), True)
    return found


def imports_in(module: str) -> list[tuple[str, bool]]:
    return imports_of((ROOT / module).read_text(encoding="utf-8"), module)


def own_layers(imports: list[tuple[str, bool]]) -> list[str]:
    """Return the layers of this package among imports; names of the package itself are left out."""
    known = {name for layers in LAYERS for name in layers}
    rests = [n.split(".")[1] for n, _ in imports if n.startswith(PACKAGE + ".")]
    return [rest for rest in rests if rest in known or (ROOT / f"{rest}.py").exists()]


def module_of(name: str) -> str | None:
    """Return the file of a dotted name: a module, or the module that has the name."""
    if name.split(".")[0] != PACKAGE:
        return None
    parts = name.split(".")[1:]
    for length in range(len(parts), -1, -1):
        path = "/".join(parts[:length])
        for file in (f"{path}.py", f"{path}/__init__.py".lstrip("/")):
            if file in MODULES:
                return file
    return None


@cache
def import_graph() -> dict[str, set[str]]:
    """Return which modules of this package each module imports."""
    graph = {}
    for module in MODULES:
        named = {module_of(name) for name, _ in imports_in(module)}
        graph[module] = {other for other in named if other is not None} - {module}
    return graph


def reachable(graph: Mapping[str, Iterable[str]], start: str) -> set[str]:
    """Return what a node leads to, over one arrow or more."""
    found: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(graph[node])
    return found


def in_circles(graph: Mapping[str, Iterable[str]]) -> set[str]:
    return {node for node in graph if node in reachable(graph, node)}


def data_flow(docstring: str) -> list[list[str]]:
    """Return the names in double backticks of each stage of ``Data flow: a -> b | c -> d.``"""
    _, found, text = docstring.partition("Data flow:")
    if not found:
        return []
    text = re.sub(r"\([^()]*\)", "", text.split("\n\n")[0])  # what is in brackets explains
    return [re.findall(r"``([\w.]+)``", stage) for stage in text.split("->")]


def test_the_walk_sees_imports():
    source = (
        "import torch\n"
        "from . import layout\n"
        "from ..config import X\n"
        "from megatron_adam_mini import plan, __version__\n"
        "if TYPE_CHECKING:\n    import megatron.core\n"
        "def f():\n    from megatron_adam_mini.mcore.factory import build_optimizer\n"
    )
    found = imports_of(source, "kernels/new.py")
    assert found == [
        ("torch", True),
        (f"{PACKAGE}.kernels.layout", True),
        (f"{PACKAGE}.config.X", True),
        (f"{PACKAGE}.plan", True),
        (f"{PACKAGE}.__version__", True),
        ("megatron.core", False),
        (f"{PACKAGE}.mcore.factory.build_optimizer", False),
    ]
    assert own_layers(found) == ["kernels", "config", "plan", "mcore"]


def test_the_walk_finds_modules():
    assert module_of(f"{PACKAGE}.config.AdamMiniConfig") == "config.py"
    assert module_of(f"{PACKAGE}.plan.layout") == "plan/layout.py"
    assert module_of(f"{PACKAGE}.kernels.select_backend") == "kernels/__init__.py"
    assert module_of(f"{PACKAGE}.register") == module_of(PACKAGE) == "__init__.py"
    assert module_of("torch.nn") is None


def test_the_walk_sees_circles_and_order():
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": {"b"}, "d": set(), "e": {"a"}}
    assert in_circles(graph) == {"b", "c"}
    assert in_circles({"a": {"b"}, "b": set()}) == set()
    text = "Title.\n\nData flow: ``a`` (x -> ``z``) -> ``b`` |\n``c`` -> ``d``.\n\n``e`` -> ``f``"
    assert data_flow(text) == [["a"], ["b", "c"], ["d"]]
    assert data_flow("Title.") == []


def test_every_module_has_a_layer():
    known = {name for layers in LAYERS for name in layers} | {"__init__"}
    assert {layer_of(module) for module in MODULES} <= known


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module):
    layer = layer_of(module)
    imports = imports_in(module)
    if layer == "__init__":
        # The package's front door: the config at once, the optimizers only when asked for.
        assert own_layers([i for i in imports if i[1]]) == ["config"]
        assert set(own_layers(imports)) <= {"config", "mcore", "standalone"}
        return
    others = set(own_layers(imports)) - {layer}
    upwards = {other for other in others if height(other) >= height(layer)}
    assert not upwards, f"{module} imports {upwards}, which do not stand below {layer}"
    assert not others & FORBIDDEN.get(layer, set())


def test_modules_import_each_other_in_no_circle():
    assert in_circles(import_graph()) == set()


def test_folders_import_each_other_in_no_circle():
    folders: dict[str, set[str]] = {layer_of(module): set() for module in MODULES}
    for module, others in import_graph().items():
        folders[layer_of(module)] |= {layer_of(other) for other in others} - {layer_of(module)}
    assert len(folders) > len(FOLDERS)
    assert in_circles(folders) == set()


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_says_what_lives_there(folder):
    assert f"{folder}/__init__.py" in MODULES
    docstring = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text()))
    assert docstring, f"{folder}/__init__.py has no docstring"
    first, *rest = docstring.splitlines()
    assert re.fullmatch(r"\S[^.!?]*(\.\w[^.!?]*)*\.", first), f"{first!r} is not one sentence"
    assert not rest or not rest[0], "a blank line comes after it"


@pytest.mark.parametrize("folder", FOLDERS)
def test_data_flow_of_a_folder_is_the_order_of_its_imports(folder):
    """What the docstring names first imports nothing that it names later."""
    docstring = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text())) or ""
    stages = [[f"{folder}/{name}.py" for name in names] for names in data_flow(docstring)]
    if folder in NO_FLOW_OF_MODULES:
        return
    assert any(stages), f"{folder}/__init__.py names no data flow"
    assert {module for stage in stages for module in stage} <= set(MODULES)
    for index, stage in enumerate(stages):
        later = {module for others in stages[index + 1 :] for module in others}
        for module in stage:
            assert not reachable(import_graph(), module) & later, module


@pytest.mark.parametrize("module", MODULES)
def test_third_party_imports_are_those_that_the_layer_promises(module):
    standard = set(sys.stdlib_module_names) | {PACKAGE}
    third_party = {name.split(".")[0] for name, _ in imports_in(module)} - standard
    allowed = set() if module in STANDARD_LIBRARY_ONLY else THIRD_PARTY[layer_of(module)]
    if module.startswith("kernels/triton_"):
        allowed = allowed | {"triton"}
    assert third_party <= allowed


@pytest.mark.parametrize("module", [m for m in MODULES if layer_of(m) != "mcore"])
def test_only_mcore_imports_megatron(module):
    names = [name for name, _ in imports_in(module)]
    assert not [name for name in names if name.split(".")[0] == "megatron"]


@pytest.mark.parametrize("module", [m for m in MODULES if "/triton_" not in m])
def test_only_the_triton_backend_imports_triton(module):
    assert not [name for name, _ in imports_in(module) if name.split(".")[0] == "triton"]


@pytest.mark.parametrize("module", [m for m in MODULES if not m.endswith("/plot.py")])
def test_only_pictures_import_matplotlib(module):
    assert not [name for name, _ in imports_in(module) if name.split(".")[0] == "matplotlib"]


@pytest.mark.parametrize("module", [m for m in MODULES if layer_of(m) == "cpu_host"])
def test_cpu_host_stands_alone(module):
    assert set(own_layers(imports_in(module))) <= {"cpu_host"}


@pytest.mark.parametrize("layer", ["optimizer", "standalone", "kernels", "collectives", "plan"])
def test_nothing_of_the_optimizer_needs_the_cpu_host(layer):
    for module in MODULES:
        if layer_of(module) == layer:
            assert "cpu_host" not in own_layers(imports_in(module))


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import megatron_adam_mini", ("torch", "numpy", "megatron")),
        ("from megatron_adam_mini import AdamMiniConfig; AdamMiniConfig()", ("torch", "megatron")),
        ("import megatron_adam_mini.launch", ("torch", "megatron")),
        ("import megatron_adam_mini.plan.layout", ("torch", "megatron")),
        ("import megatron_adam_mini.estimate.report", ("torch", "megatron")),
        ("import megatron_adam_mini.optimizer", ("megatron",)),
        ("from megatron_adam_mini import AdamMini", ("megatron", "triton")),
    ],
)
def test_what_an_import_pulls_in(statement, absent):
    code = f"import sys; {statement}; print(*sorted({{n.split('.')[0] for n in sys.modules}}))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT.parent,
        timeout=120,
    )
    loaded = result.stdout.split()
    assert PACKAGE in loaded
    assert not set(absent) & set(loaded)
