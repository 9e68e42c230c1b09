"""Imports point downwards, and only ``mcore/`` knows Megatron."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_adam_mini

PACKAGE = "megatron_adam_mini"
ROOT = Path(megatron_adam_mini.__file__).parent

#: A module may import from its own layer and from those before it.
LAYERS = (
    ("config",),
    ("partition_flags", "adam_rules"),
    ("plan",),
    ("checkpoint", "estimate"),
    ("agreement", "collectives", "rounding"),
    ("state",),
    ("kernels",),
    ("optimizer",),
    ("convert",),
    ("mcore",),
    ("cpu_host",),
    ("launch", "cli"),
)

#: Third-party packages that each layer may import (what the modules' first lines promise).
THIRD_PARTY = {
    "config": set(),
    "partition_flags": set(),
    "adam_rules": set(),
    "plan": {"numpy"},
    "checkpoint": {"numpy", "torch"},
    "estimate": {"numpy"},
    "agreement": {"torch"},
    "collectives": {"numpy", "torch"},
    "rounding": {"torch"},
    "state": {"torch"},
    "kernels": {"numpy", "torch", "triton"},
    "optimizer": {"numpy", "torch"},
    "convert": {"numpy", "torch", "tqdm"},
    "mcore": {"numpy", "torch", "megatron"},
    "cpu_host": {"torch"},
    "launch": set(),
    "cli": set(),
    "__init__": set(),
}

#: Modules that promise less than their layer allows.
STANDARD_LIBRARY_ONLY = ("mcore/preflight.py", "mcore/arguments.py", "cpu_host/flags.py")

MODULES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))


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
            # `from package import name` may name a module.
            names = [f"{origin}.{alias.name}" for alias in node.names]
            found.extend((name, eager) for name in (names if origin == PACKAGE else [origin]))
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
        (f"{PACKAGE}.kernels", True),
        (f"{PACKAGE}.config", True),
        (f"{PACKAGE}.plan", True),
        (f"{PACKAGE}.__version__", True),
        ("megatron.core", False),
        (f"{PACKAGE}.mcore.factory", False),
    ]
    assert own_layers(found) == ["kernels", "config", "plan", "mcore"]


def test_every_module_has_a_layer():
    known = {name for layers in LAYERS for name in layers} | {"__init__"}
    assert {layer_of(module) for module in MODULES} <= known


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module):
    layer = layer_of(module)
    imports = imports_in(module)
    if layer == "__init__":
        # The package's front door: the config at once, Megatron's side only when asked for.
        assert own_layers([i for i in imports if i[1]]) == ["config"]
        assert set(own_layers(imports)) <= {"config", "mcore"}
        return
    upwards = [other for other in own_layers(imports) if height(other) > height(layer)]
    assert not upwards, f"{module} imports {upwards}, which stand above {layer}"


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


@pytest.mark.parametrize("module", [m for m in MODULES if layer_of(m) == "cpu_host"])
def test_cpu_host_stands_alone(module):
    assert set(own_layers(imports_in(module))) <= {"cpu_host"}


@pytest.mark.parametrize("layer", ["optimizer", "kernels", "collectives", "plan"])
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
