"""State in Megatron's older checkpoint format, ``torch``: gathered on, or scattered from, one rank.

Imports ``stored_buckets``, ``slice_exchange`` and ``plan``. Used for ``--ckpt-format torch`` and
its conversion, and by tools that ask a distributed optimizer for its state on the first
data-parallel rank. Nothing is gathered in ``torch_dist`` checkpoints, see ``checkpoint``.

One file per tensor- and pipeline-parallel part holds, beside the identity of the state,
``parameters``: for each parameter of the part, by checkpoint key, ``param`` and ``exp_avg``,
float32, shape ``(elements,)``, and ``exp_avg_sq``, float32: one value per row, repeated for the
rows of one block, or per element if the parameter keeps one per element; where columns have v, 0,
and ``exp_avg_sq_columns``, shape ``(column sets, columns)``, has it. So it loads under any
number of data-parallel ranks and any bucket size, but under no other tensor- or pipeline-parallel
layout.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.distributed import ProcessGroup

from megatron_adam_mini.agreement import gather as gather_objects
from megatron_adam_mini.agreement import on_all_ranks
from megatron_adam_mini.mcore.entries import copy_float32
from megatron_adam_mini.mcore.frozen import note_new_pieces, start_new_pieces
from megatron_adam_mini.mcore.pending_load import PendingLoad
from megatron_adam_mini.mcore.slice_exchange import from_first, gathered, is_first, scattered
from megatron_adam_mini.mcore.state_view import StateView
from megatron_adam_mini.mcore.stored_buckets import (
    KINDS,
    MEMBERS,
    PARAMETERS,
    BucketValues,
    StoredBuffers,
    StoredParameters,
    no_values,
    parameter_of,
)
from megatron_adam_mini.mcore.stored_v import sums_over_segments
from megatron_adam_mini.piece_values import first_of_segments, v_per_element
from megatron_adam_mini.plan.manifest import (
    changes_blocks,
    identity_of,
    partition_of_checkpoint,
    short_hash,
)
from megatron_adam_mini.plan.step_plan import Piece
from megatron_adam_mini.state import HOST

#: Key of the identity.
IDENTITY = "adam_mini"


def identity(view: StateView) -> dict[str, Any]:
    """Return the identity of the state in this format.

    It says nothing of layout or shapes, which are those of the parameters beside it.
    """
    found = identity_of(
        view.manifest, view.inner.config, checkpoint_format=PARAMETERS, saved_from={}
    )
    return {key: value for key, value in found.items() if key != "manifest_hash"}


def gather(
    view: StateView,
    groups: Sequence[ProcessGroup | None],
    *,
    everywhere: bool = False,
    empty: bool = False,
) -> dict[str, Any] | None:
    """Return the state of all parameters of this model-parallel part, on the CPU.

    Args:
        view: the optimizer.
        groups: for each domain, the data-parallel ranks that share the state; all must call it.
            ``None``: this rank holds everything.
        everywhere: return it on all ranks; otherwise that of each domain on the first of the group,
            and ``None`` where there is nothing.
        empty: return zeros, and communicate nothing.
    """
    plan = view.inner.plan
    found: dict[str, dict[str, Any]] = {}
    received = [everywhere or is_first(group) for group in groups]
    for number, bucket in _buckets(view):
        buffer = plan.buffers[number]
        group, layout = groups[buffer.domain], buffer.slices[bucket].bucket
        if empty:
            whole = no_values(layout.numel)
        else:
            mine = _slice_values(view, number, bucket)
            whole = {
                kind: gathered(mine[kind], group, view.inner.device, everywhere) for kind in KINDS
            }
        for placement in layout.placements if received[buffer.domain] else ():
            blocks = plan.parameters[placement.parameter]
            found[blocks.info.checkpoint_key] = parameter_of(whole, placement, blocks)
    if not received[0] and not found:
        return None
    return {IDENTITY: identity(view), PARAMETERS: found}


def scatter(
    view: StateView, groups: Sequence[ProcessGroup | None], read: Callable[[], Any]
) -> None:
    """Take the state of all parameters from the first rank of each domain's group.

    All ranks of the job must call it.

    Args:
        view: the optimizer, modified in place.
        groups: as for :func:`gather`.
        read: returns what :func:`gather` returned, or what Megatron's Adam did, a chain of
            optimizers as a list or under the key ``MEMBERS``; called on the first rank of a group
            only.

    Raises:
        ValueError: the state is of another layout, its partition must not be converted, or ranks
            have files of different checkpoints.
    """
    of_buffer = [buffer.domain for buffer in view.inner.plan.buffers]
    firsts = [
        is_first(group) and (number == 0 or number in of_buffer)
        for number, group in enumerate(groups)
    ]
    failure = "Adam-mini's state was not loaded"
    stored = on_all_ranks(lambda: _as_mapping(read()) if any(firsts) else {}, failure)
    saved = from_first({k: stored[k] for k in (IDENTITY,) if k in stored}, groups[0])
    _refuse_mixture(saved)
    # Checked before any rank changes its state, or waits for another.
    source = on_all_ranks(lambda: _checked(view, saved.get(IDENTITY), stored, firsts), failure)
    pending = PendingLoad(view.state, average=True)
    if isinstance(source, StoredParameters):
        pending.average = changes_blocks(source.sources, view.inner.plan.parameters)
        note_new_pieces(view, saved[IDENTITY], source.sources, pending)
        start_new_pieces(view, pending)
    for number, bucket in _buckets(view):
        group, first = groups[of_buffer[number]], firsts[of_buffer[number]]
        whole = source.bucket(number, bucket) if first else {}
        window = view.inner.plan.buffers[number].slices[bucket].window
        mine = {
            kind: scattered(whole.get(kind), group, window.numel, view.inner.device)
            for kind in KINDS
        }
        for index, piece in _pieces(view, number, bucket):
            here = _in_slice(piece, window.in_buffer.start)
            pending.elements[index] = mine["exp_avg_sq"][here]
            if index not in pending.new:
                state = view.state_of(piece)
                state.store(piece.window, {"param": mine["param"][here]})
                pending.floats.append((state, piece.window, {"exp_avg": mine["exp_avg"][here]}))
    _set_v(view, pending)  # m may be stored relative to it
    for state, window, floats in pending.floats:
        state.store(window, floats)


def _refuse_mixture(saved: Mapping[str, Any]) -> None:
    """Check that all ranks have state of one kind; all ranks must call it.

    Args:
        saved: the identity of the state, under its key; empty for state of Adam.

    Raises:
        ValueError: they have not.
    """
    first, *others = gather_objects(short_hash(saved))
    other = next((rank for rank, found in enumerate(others, 1) if found != first), None)
    if other is not None:
        raise ValueError(
            f"Ranks 0 and {other} have optimizer state of different runs: of Adam-mini and of "
            "Adam, or with other options. Load files of one checkpoint, or use --no-load-optim."
        )


def _checked(
    view: StateView,
    saved: Mapping[str, Any] | None,
    stored: Mapping[Any, Any],
    firsts: Sequence[bool],
) -> StoredParameters | StoredBuffers:
    """Return what is stored as this run's buckets, if it fits.

    Args:
        view: the optimizer.
        saved: identity of the state, ``None`` if it is of Adam.
        stored: the state; empty on ranks that do not read it.
        firsts: by domain, whether this rank does.

    Raises:
        ValueError: it does not fit.
    """
    found: StoredParameters | StoredBuffers = StoredBuffers(view, stored)
    if saved is not None:
        sources = partition_of_checkpoint(
            saved, view.manifest, view.inner.config, view.inner.plan.parameters
        )
        found = StoredParameters(view, stored.get(PARAMETERS, {}), sources)
    for number, buffer in enumerate(view.inner.plan.buffers):
        if firsts[buffer.domain]:
            found.check(number)
    return found


def _set_v(view: StateView, pending: PendingLoad) -> None:
    for number, piece in enumerate(view.inner.plan.pieces):
        elements = pending.elements[number]
        if piece.is_elementwise:
            view.state.v_of_elements(piece).copy_(elements)
        elif not pending.average:
            values = first_of_segments(view.inner.plan, piece, elements)
            view.state.v_of_segments(piece).copy_(values)
    if pending.average:
        view.inner.average_into_v(view.state, sums_over_segments(view, pending))


def _buckets(view: StateView) -> list[tuple[int, int]]:
    """Return numbers of buffer and bucket of all buckets."""
    buffers = view.inner.plan.buffers
    return [(number, i) for number, plan in enumerate(buffers) for i in range(len(plan.slices))]


def _pieces(view: StateView, buffer: int, bucket: int) -> list[tuple[int, Piece]]:
    return [
        (number, piece)
        for number, piece in enumerate(view.inner.plan.pieces)
        if (piece.buffer, piece.bucket) == (buffer, bucket)
    ]


def _in_slice(piece: Piece, start: int) -> slice:
    here = piece.window.in_buffer
    return slice(here.start - start, here.stop - start)


def _slice_values(view: StateView, number: int, bucket: int) -> BucketValues:
    """Return this rank's slice of a bucket: float32, on the CPU, gaps between parameters zero."""
    window = view.inner.plan.buffers[number].slices[bucket].window
    values = no_values(window.numel)
    for _, piece in _pieces(view, number, bucket):
        here, state = _in_slice(piece, window.in_buffer.start), view.state_of(piece)
        for kind in ("param", "exp_avg"):
            copy_float32(state, kind, piece.window, values[kind][here])
        stored = view.state.v_of_elements if piece.is_elementwise else view.state.v_of_segments
        v = stored(piece).to(HOST)
        values["exp_avg_sq"][here] = v_per_element(view.inner.plan, piece, v)
    return values


def _as_mapping(stored: Any) -> dict[Any, Any]:
    return {MEMBERS: stored} if isinstance(stored, list) else dict(stored)


def read_file(filename: str, *, check: bool) -> Any:
    """Read a file of parameter state, and no code.

    Args:
        filename: the file.
        check: whether to read it once before, to compare its checksums.

    Raises:
        ValueError: it is missing, damaged, or holds more than plain data and tensors.
    """
    try:
        if check:
            with zipfile.ZipFile(filename) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise zipfile.BadZipFile(f"checksum of {damaged} is wrong")
        return torch.load(filename, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"Optimizer state {filename!r} cannot be read: {error}. Restore the file, load an "
            "earlier checkpoint (--ckpt-step), or use --no-load-optim."
        ) from error
