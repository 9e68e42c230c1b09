"""``make check`` leaves out the tests that start processes, and no others; see ``conftest``."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests import ranks
from tests.conftest import starts_processes
from tests.test_examples import demo


def directly() -> None:
    ranks.run_ranks(1, print)


def through_a_function() -> None:
    directly()


def in_a_function_of_its_own() -> Callable[[], None]:
    def inner() -> None:
        through_a_function()

    return inner


def through_an_import() -> None:
    from tests.ranks import start_program

    start_program(1, print, log=None, folder=None)


class Holder:
    def method(self) -> None:
        subprocess.run(["true"], check=True)


def through_a_class() -> None:
    Holder().method()


def through_an_example() -> None:
    demo.run_command([], None)


def not_at_all() -> None:
    sorted(map(len, [sys.path]))


@pytest.mark.parametrize(
    "function",
    [
        directly,
        through_a_function,
        in_a_function_of_its_own,
        through_an_import,
        through_a_class,
        through_an_example,
    ],
)
def test_functions_that_start_processes_are_seen(function: Callable[..., None]) -> None:
    assert starts_processes(function)


def test_others_are_not() -> None:
    assert not starts_processes(not_at_all, 3, "text", None, len, sys)


def test_a_process_that_was_not_foreseen_fails_the_test() -> None:
    hidden = importlib.import_module("sub" + "process")
    with pytest.raises(pytest.fail.Exception, match=r"mark it with @pytest\.mark\.processes"):
        hidden.run([sys.executable, "-c", ""], check=True)
