"""Which tests start other processes: found here, so that ``make check`` can leave them out.

``make check`` runs the tests that need one process. Nobody has to mark the others: a test that can
reach ``run_ranks``, ``start_program`` or ``subprocess``, also through functions, classes and
fixtures of the tests and examples, gets the mark ``processes`` below. One that starts a process all
the same fails, whoever runs it.
"""

from __future__ import annotations

import inspect
import multiprocessing.process
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

# Before torch is imported, here and in what tests start. Two tests at a time on two cores leave one
# for each; on a busy machine, threads that wait for each other took up to six times the CPU time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

STARTERS = {"run_ranks", "start_program", "subprocess"}
ROOT = Path(__file__).parents[1]
FOLDERS = (ROOT / "tests", ROOT / "examples")

#: Where subprocess and multiprocessing begin; whoever called these asked for a process.
STANDARD = {subprocess.__file__, multiprocessing.process.__file__}

#: Take half a minute each. They come first: a worker that begins one last lets the others wait.
LONG = (
    "tests/test_triton.py::test_interpreted",
    "tests/test_soak.py::test_changing_layouts_and_kills_leave_the_run_as_it_was",
    "tests/test_backends.py::test_triton_equals_the_oracle",
    "tests/test_evidence.py::test_the_whole_program",
    "tests/test_releases.py::test_the_oldest_wheel_trains_and_reshards",
)

_running: pytest.Item | None = None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.nodeid not in LONG)
    for item in items:
        if isinstance(item, pytest.Function) and starts_processes(*functions_of(item)):
            item.add_marker("processes")


def functions_of(item: pytest.Function) -> Iterator[Any]:
    """Yield a test, its class and fixtures, and its parameters, which may be functions."""
    yield item.function
    yield item.cls
    for definitions in item._fixtureinfo.name2fixturedefs.values():
        yield from (definition.func for definition in definitions)
    if hasattr(item, "callspec"):
        yield from item.callspec.params.values()


def starts_processes(*values: Any) -> bool:
    """Return whether functions of the tests name a starter, or a function that does, and so on."""
    waiting, seen = list(values), set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, type) and is_ours(value):
            waiting.extend(vars(value).values())
        function = inspect.unwrap(value) if callable(value) else value
        if not isinstance(function, FunctionType) or not is_ours(function) or function in seen:
            continue
        seen.add(function)
        starts, named = looked_up(function)
        if starts:
            return True
        waiting += named
    return False


@cache
def looked_up(function: FunctionType) -> tuple[bool, list[Any]]:
    """Return whether a function names a starter, and the values of all names in it."""
    names = names_in(function.__code__)
    found = [function.__globals__[name] for name in names if name in function.__globals__]
    modules = [value for value in found if isinstance(value, ModuleType) and is_ours(value)]
    found += [getattr(module, name, None) for module in modules for name in names]
    return bool(names & STARTERS), [value for value in found if callable(value)]


def is_ours(value: Any) -> bool:
    """Return whether a module, or the module of a function or class, is of tests or examples."""
    name = value.__name__ if isinstance(value, ModuleType) else value.__module__
    return in_folders(getattr(sys.modules.get(name), "__file__", None))


@cache
def in_folders(file: str | None) -> bool:
    return file is not None and any(folder in Path(file).parents for folder in FOLDERS)


def names_in(code: CodeType) -> set[str]:
    """Return the names that a function uses, functions in it included."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*map(names_in, inner))


def pytest_configure() -> None:
    _guard(subprocess.Popen, "__init__")
    _guard(multiprocessing.process.BaseProcess, "start")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    global _running
    _running = item


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    global _running
    _running = None


def _guard(kind: type, name: str) -> None:
    original = getattr(kind, name)

    def guarded(*args: Any, **kwargs: Any) -> Any:
        if _running and not _running.get_closest_marker("processes") and _called_by_tests():
            pytest.fail(
                f"{_running.nodeid} starts a process, which tests/conftest.py did not see; "
                "mark it with @pytest.mark.processes."
            )
        return original(*args, **kwargs)

    setattr(kind, name, guarded)


def _called_by_tests() -> bool:
    """Return whether a test asked for the process, and not a library for purposes of its own."""
    frame = sys._getframe(2)
    while frame.f_back and frame.f_code.co_filename in STANDARD:
        frame = frame.f_back
    return in_folders(frame.f_code.co_filename)
