"""Let Triton's interpreter look for what it replaces once, not in every call of a function.

Before a kernel and before each function that a kernel calls, it lists all members of
``triton.language`` and replaces those that are built in. That takes a third of its time. Here the
list is made once; what is replaced, and by what, stays the interpreter's.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from triton.language.core import is_builtin
from triton.runtime import interpreter


def install() -> None:
    """Replace the search."""
    interpreter._patch_builtin = _patch_builtin


def _patch_builtin(package: Any, *rest: Any) -> None:
    for name in _names_of_builtins(package):
        member = getattr(package, name)
        if is_builtin(member):  # not replaced yet
            interpreter._patch_attr(package, name, member, *rest)


@cache
def _names_of_builtins(package: Any) -> list[str]:
    """Return the names in a module or class of which nothing has been replaced yet."""
    return [name for name, member in inspect.getmembers(package) if is_builtin(member)]
