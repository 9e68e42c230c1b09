"""Adam-mini's part of a sharded state dict: found there again, and matched with a checkpoint.

Imports ``checkpoint`` and ``adam_import``. Data flow: optimizer -> **StatePart** in a sharded state
dict -> ``checkpoint_calls`` (Megatron's save and load, which know the folder) -> optimizer.

What a load must ask for depends on what the checkpoint holds, and callers often do not know it when
they ask the optimizer for a sharded state dict: they make the content metadata from their own
arguments, or read that of another folder, or pass none. So every part carries its optimizer along,
in an entry that Megatron neither saves nor drops, and the load fits it to the folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject

from megatron_adam_mini.mcore import adam_import, checkpoint
from megatron_adam_mini.mcore.model_space import ModelEntries
from megatron_adam_mini.mcore.pending_load import PendingLoad
from megatron_adam_mini.mcore.state_view import StateView
from megatron_adam_mini.optimizer import AdamMini
from megatron_adam_mini.plan.manifest import MODEL_SPACE, format_of

#: Key of the part in the optimizer's state dict; Megatron's own optimizers do not use it.
PART = "adam_mini_part"
#: Key of the identity, in the optimizer's common state and in content metadata.
IDENTITY = "adam_mini"

#: Keys on the way from a state dict to a dict in it.
Path = tuple[Any, ...]


class Owner(Protocol):
    """An optimizer, as its parts see it."""

    inner: AdamMini

    def state_view(self, *, to_save: bool = False) -> StateView:
        """Return the state as it is now; to save it, also where it was moved to."""
        ...


@dataclass(frozen=True, eq=False)
class StatePart:
    """What one optimizer has put into one sharded state dict.

    Attributes:
        owner: the optimizer.
        entries: of the model's sharded state dict.
        saved_step: step count of state that is to be saved, ``None`` if it is to be loaded.
        pending: what is requested from a checkpoint, ``None`` if that is not known.
        source: identity of Adam-mini's state for which it is requested, or the format of Adam's.
        refusal: why the state that metadata described cannot be requested.
    """

    owner: Owner
    entries: ModelEntries
    saved_step: int | None = None
    pending: PendingLoad | None = None
    source: Mapping[str, Any] | str | None = None
    refusal: ValueError | None = None

    def __deepcopy__(self, _: Any) -> StatePart:
        """Return itself: a copied state dict still belongs to the same optimizer."""
        return self

    @property
    def steps(self) -> int:
        """Steps that the optimizer has taken."""
        return self.owner.inner.main_params.step_count

    def to_save(self) -> dict[str, Any]:
        """Return the optimizer's state as it is now, to be saved."""
        part = StatePart(self.owner, self.entries, saved_step=self.steps)
        with self.owner.inner.main_params.left_where_it_is():
            view = self.owner.state_view(to_save=True)
            return part._with(checkpoint.state_to_save(view, self.entries))

    def to_load(self, metadata: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return a request for the state that content metadata describe, else an open request.

        It is open, too, if that state cannot be loaded: the checkpoint may hold another.

        Raises:
            ValueError: the model's sharded state dict lacks a parameter.
        """
        view = self.owner.state_view()
        for piece in view.inner.plan.pieces:
            view.entry_of(piece, self.entries)
        identity, refusal = (metadata or {}).get(IDENTITY), None
        if identity is not None:
            try:
                return self._request(identity)
            except ValueError as error:
                refusal = error
        return StatePart(self.owner, self.entries, refusal=refusal)._with({})

    def to_load_from(self, common: Mapping[Any, Any] | None) -> dict[str, Any] | None:
        """Return a request for the state in a checkpoint; ``None`` if this part asks for it.

        Args:
            common: what the checkpoint's common state holds of the optimizer.

        Raises:
            ValueError: it cannot be loaded into this optimizer.
        """
        source = (common or {}).get(IDENTITY)
        if source is None:
            source = adam_import.format_of_adam(common)
        if self.pending is not None and self.pending.taken is None and self.source == source:
            return None
        return self._request(source)

    def taken_by(self, owner: Owner) -> PendingLoad:
        """Return what a load has read, for the optimizer to take over.

        Raises:
            ValueError: nothing was read, or it is another optimizer's, or not there any more.
        """
        if self.owner is not owner:
            raise ValueError(
                "This state was loaded for another optimizer: the sharded state dict was made by "
                "that one. Call load_state_dict of the optimizer whose sharded_state_dict was "
                "given to dist_checkpointing.load."
            )
        if self.refusal is not None:
            raise self.refusal
        if self.pending is None:
            raise ValueError(
                "Adam-mini's state was not read from the checkpoint. sharded_state_dict(..., "
                "is_loading=True) was given no content metadata with Adam-mini's identity, so it "
                "could not know what the checkpoint holds, and the load that followed did not tell "
                "it. Remedy: load with megatron.core.dist_checkpointing.load, called by that name "
                "(a function imported from there before megatron_adam_mini.register() is another), "
                "or pass metadata=load_content_metadata(folder) of the optimizer's own folder."
            )
        if self.pending.taken not in (None, self.steps):
            raise ValueError(
                "Adam-mini has taken over this state before and has trained on since, in the same "
                "memory. Load the checkpoint again."
            )
        return self.pending

    def _request(self, source: Mapping[str, Any] | str) -> dict[str, Any]:
        view = self.owner.state_view()
        if isinstance(source, str):
            pending = adam_import.prepare_load(view, self.entries, source)
        else:
            pending = checkpoint.prepare_load(view, self.entries, source)
        part = StatePart(self.owner, self.entries, pending=pending, source=source)
        return part._with(pending.state_dict())

    def _with(self, state: dict[str, Any]) -> dict[str, Any]:
        return {PART: LocalNonpersistentObject(self), **state}


def part_of(loaded: Mapping[str, Any]) -> StatePart | None:
    """Return the part in what a load returned for an optimizer; ``None``: it has none.

    Raises:
        ValueError: it is what the load should have been given.
    """
    part = loaded.get(PART)
    if isinstance(part, LocalNonpersistentObject):
        raise ValueError(
            "Adam-mini's load_state_dict was given what sharded_state_dict returned. Give that to "
            "megatron.core.dist_checkpointing.load, and what this returns to load_state_dict."
        )
    return part


def parts_in(state_dict: Any, path: Path = ()) -> Iterator[tuple[Path, StatePart]]:
    """Yield all parts of Adam-mini in a sharded state dict, each with its optimizer's path."""
    if isinstance(state_dict, dict):
        mark = state_dict.get(PART)
        if isinstance(mark, LocalNonpersistentObject):
            yield path, mark.unwrap()
            return
        for key, value in state_dict.items():
            yield from parts_in(value, (*path, key))
    elif isinstance(state_dict, list):
        for index, value in enumerate(state_dict):
            yield from parts_in(value, (*path, index))


def at(state_dict: Any, path: Path) -> Any:
    """Return the dict at a path, ``None`` if there is none."""
    for key in path:
        try:
            state_dict = state_dict[key]
        except (KeyError, IndexError, TypeError):
            return None
    return state_dict if isinstance(state_dict, dict) else None


def replaced(state_dict: Any, path: Path, new: dict[str, Any]) -> Any:
    """Return a copy of a state dict with another dict at a path; the rest is shared with it."""
    if not path:
        return new
    copy = state_dict.copy()
    copy[path[0]] = replaced(copy[path[0]], path[1:], new)
    return copy


def content_metadata(
    given: Mapping[str, Any] | None, identity: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content metadata of a checkpoint with Adam-mini's state in it.

    Args:
        given: the caller's, which is not changed: it may serve for other checkpoints, too.
        identity: of the state.
    """
    # Megatron reads this before it lets a run with other TP or PP sizes load the state.
    of_format = (
        adam_import.FULLY_RESHARDABLE
        if format_of(identity) == MODEL_SPACE
        else adam_import.DP_RESHARDABLE
    )
    return {**(given or {}), "distrib_optim_sharding_type": of_format, IDENTITY: dict(identity)}
