"""``module:function`` of the command line -> a model, its loss and batches.

Imports torch and ``products``.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable
from typing import Any

from torch import nn

from megatron_adam_mini.heterogeneity.products import Loss

_FORM = (
    "It must have the form MODULE:FUNCTION, such as my_model:build, where MODULE can be imported "
    "from the current folder, and FUNCTION() returns (module, loss, batches): a torch module, a "
    "function loss(module, batch) -> scalar, and batches."
)


def load(target: str) -> tuple[nn.Module, Loss, Iterable[Any]]:
    """Import a module and call its function.

    Args:
        target: ``MODULE:FUNCTION``; the current folder is searched, as by ``python -m``.

    Raises:
        ValueError: the form is wrong, there is no such name, or it returns something else.
    """
    name, _, function = target.partition(":")
    if not name or not function:
        raise ValueError(f"{target!r} names no model. {_FORM}")
    if (folder := os.getcwd()) not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, and something that it imports is not
        raise ValueError(f"There is no module {name!r}. {_FORM}") from error
    if not hasattr(module, function):
        raise ValueError(f"Module {name!r} has no {function!r}. {_FORM}")
    made = getattr(module, function)()
    if not isinstance(made, tuple) or len(made) != 3 or not isinstance(made[0], nn.Module):
        raise ValueError(f"{target} returned {type(made).__name__}. {_FORM}")
    return made
