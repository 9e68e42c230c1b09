"""State that is not a tensor: read without running foreign code, and written back as it was.

Imports torch. ``args`` of a Megatron run contain enumerations and classes of Megatron. They are
read as inert stand-ins, which keep the stored data and are written back as the originals; so
neither Megatron nor a certain release is needed.
"""

from __future__ import annotations

import argparse
import copyreg
import io
import pickle
import types
from typing import Any, ClassVar

import torch

from megatron_adam_mini.checkpoint.errors import UnreadableError

#: Stand-ins replace names that start with one of these; others are refused.
_KNOWN_PREFIXES = (
    "megatron.",
    "transformer_engine.",
    "numpy.",
    "numpy._core.",
    "pathlib.",
    "signal.",
    "types.SimpleNamespace",
    "_io.BytesIO",
)


class _StandIn:
    """An object of a class that is not imported: its arguments and its state."""

    arguments: tuple[Any, ...]
    state: Any
    called: bool

    def __new__(cls, *arguments: Any) -> _StandIn:
        self = super().__new__(cls)
        self.arguments, self.state, self.called = arguments, None, False
        return self

    def __init__(self, *_: Any) -> None:
        self.called = True  # else unpickling did not call the constructor

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __reduce_ex__(self, _: Any) -> Any:
        if self.called:
            return type(self), self.arguments, self.state
        return copyreg.__newobj__, (type(self), *self.arguments), self.state  # type: ignore[attr-defined]

    def __str__(self) -> str:
        return f"{type(self).__name__}{self.arguments}"


#: The pickler in Python: only this one can be made to write a name that is not imported.
_PurePickler: Any = vars(pickle)["_Pickler"]


class _Pickler(_PurePickler):  # type: ignore[misc]
    """Writes a stand-in's class under the name of the original."""

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if isinstance(obj, type) and issubclass(obj, _StandIn):
            self.write(pickle.GLOBAL + f"{obj.__module__}\n{obj.__name__}\n".encode())
            self.memoize(obj)
            return
        super().save_global(obj, name)

    # The pure-Python pickler finds the function for a class here.
    dispatch: ClassVar[dict[type, Any]] = {**_PurePickler.dispatch}


def _save_type(pickler: _Pickler, obj: Any) -> None:
    if isinstance(obj, type) and issubclass(obj, _StandIn):
        pickler.save_global(obj)
    else:
        _PurePickler.save_type(pickler, obj)


_Pickler.dispatch[type] = _save_type


def load_common(data: bytes, where: str) -> dict[str, Any]:
    """Return the common state that ``torch.save`` wrote, with ``weights_only=True``.

    Args:
        data: content of the checkpoint's ``common_state`` entry, or of ``common.pt``.
        where: for messages.

    Raises:
        UnreadableError: it cannot be read, or contains a class that no Megatron checkpoint needs.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data))
        strange = [name for name in sorted(names) if not _known(name)]
        if strange:
            raise pickle.UnpicklingError(f"it names {strange[0]}, which is not allowed")
        # Only names that are not allowed yet: leaving the context also removes those that
        # Megatron, if it runs in this process, has allowed.
        known: list[Any] = [
            (argparse.Namespace if name == "argparse.Namespace" else _stand_in(name), name)
            for name in names
        ]
        with torch.serialization.safe_globals(known):
            found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can fail in any way
        raise UnreadableError(f"{where} cannot be read: {error}") from error
    if isinstance(found, list) and len(found) == 1:  # a Megatron ShardedObject
        found = found[0]
    if not isinstance(found, dict):
        raise UnreadableError(f"{where} holds a {type(found).__name__}, not a dict.")
    return found


def save_common(state: dict[str, Any], *, as_object: bool) -> bytes:
    """Return bytes that both :func:`load_common` and Megatron can read.

    Args:
        state: common state.
        as_object: for the entry ``common_state``; else for the file ``common.pt``.
    """
    module = types.ModuleType("pickle")
    vars(module).update(vars(pickle))
    module.Pickler = _Pickler  # type: ignore[attr-defined]
    buffer = io.BytesIO()
    torch.save([state] if as_object else state, buffer, pickle_module=module)
    return buffer.getvalue()


def _known(name: str) -> bool:
    return name == "argparse.Namespace" or name.startswith(_KNOWN_PREFIXES)


def _stand_in(path: str) -> type:
    module, _, name = path.rpartition(".")
    return type(name, (_StandIn,), {"__module__": module})
