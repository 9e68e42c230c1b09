"""State in Megatron's older checkpoint format, ``torch``: gathered on, or scattered from, one rank.

Imports torch.distributed, ``stored_v`` and ``plan``. Used for ``--ckpt-format torch`` and its
conversion, and by tools that ask a distributed optimizer for its state on the first data-parallel
rank. Nothing is gathered in ``torch_dist`` checkpoints, see ``checkpoint``.

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
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from megatron_adam_mini.agreement import on_all_ranks
from megatron_adam_mini.mcore.frozen import note_new_pieces, start_new_pieces
from megatron_adam_mini.mcore.pending_load import PendingLoad
from megatron_adam_mini.mcore.slices import ShardedBuffer
from megatron_adam_mini.mcore.state_view import StateView
from megatron_adam_mini.mcore.stored_v import (
    elements_of,
    rows_and_columns_of,
    sums_over_segments,
)
from megatron_adam_mini.piece_values import first_of_segments, v_per_element
from megatron_adam_mini.plan.buffer_plan import PART_NUMEL
from megatron_adam_mini.plan.layout import Placement
from megatron_adam_mini.plan.manifest import changes_blocks, identity_of, partition_of_checkpoint
from megatron_adam_mini.plan.partition import ParameterBlocks
from megatron_adam_mini.plan.step_plan import Piece
from megatron_adam_mini.state import HOST

KINDS = ("param", "exp_avg", "exp_avg_sq")
#: v of columns.
COLUMNS = "exp_avg_sq_columns"
#: Key of a list of what each optimizer in a chain of Megatron's has, dense and experts.
MEMBERS = "members"
#: Format of this module, in the identity of the state.
PARAMETERS = "parameters"

#: ``param`` and ``exp_avg``, and v per element, of one whole bucket: float32, ``(bucket.numel,)``.
BucketValues = dict[str, Tensor]


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
    found: dict[str, dict[str, Tensor]] = {}
    received = [everywhere or _is_first(group) for group in groups]
    for number, bucket in _buckets(view):
        domain = view.inner.plan.buffers[number].domain
        group, receives = groups[domain], received[domain]
        slice_plan = view.inner.plan.buffers[number].slices[bucket]
        if empty:
            whole = {
                kind: torch.zeros(slice_plan.bucket.numel, dtype=torch.float32, device=HOST)
                for kind in KINDS
            }
        else:
            mine = _slice_values(view, number, bucket)
            whole = {
                kind: _gathered(mine[kind], group, view.inner.device, everywhere) for kind in KINDS
            }
        for placement in slice_plan.bucket.placements if receives else ():
            blocks = view.inner.plan.parameters[placement.parameter]
            values = {k: flat[placement.start : placement.end].clone() for k, flat in whole.items()}
            if blocks.pattern is not None:
                values |= _v_of_blocks(blocks, values["exp_avg_sq"])
            found[blocks.info.checkpoint_key] = values
    if not received[0] and not found:
        return None
    return {"adam_mini": identity(view), PARAMETERS: found}


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
        ValueError: the state is of another layout, or its partition must not be converted.
    """
    of_buffer = [buffer.domain for buffer in view.inner.plan.buffers]
    firsts = [
        _is_first(group) and (number == 0 or number in of_buffer)
        for number, group in enumerate(groups)
    ]
    failure = "Adam-mini's state was not loaded"
    stored = on_all_ranks(lambda: _as_mapping(read()) if any(firsts) else {}, failure)
    saved = _from_first({k: stored[k] for k in ("adam_mini",) if k in stored}, groups[0])
    blocks = list(view.inner.plan.parameters)
    pending = PendingLoad(view.state, average=True)
    if "adam_mini" in saved:
        sources = on_all_ranks(
            lambda: partition_of_checkpoint(
                saved["adam_mini"], view.manifest, view.inner.config, blocks
            ),
            failure,
        )
        pending.average = changes_blocks(sources, blocks)
        note_new_pieces(view, saved["adam_mini"], sources, pending)
        start_new_pieces(view, pending)

        def check() -> None:
            for plan in (p for p in view.inner.plan.buffers if firsts[p.domain]):
                for placement in (p for held in plan.slices for p in held.bucket.placements):
                    source = sources[placement.parameter]
                    if source is not None:
                        _stored_parameter(stored[PARAMETERS], source, placement)

        def values_of(number: int, bucket: int) -> BucketValues:
            return _bucket_of_parameters(view, stored[PARAMETERS], sources, number, bucket)
    else:

        def check() -> None:
            for number, domain in enumerate(of_buffer):
                if firsts[domain]:
                    _buffer_of_adam(view, stored, number)

        def values_of(number: int, bucket: int) -> BucketValues:
            return _bucket_of_adam(view, stored, number, bucket)

    on_all_ranks(check, failure)  # before any rank waits for another
    for number, bucket in _buckets(view):
        group, first = groups[of_buffer[number]], firsts[of_buffer[number]]
        whole = values_of(number, bucket) if first else {}
        window = view.inner.plan.buffers[number].slices[bucket].window
        mine = {
            kind: _scattered(whole.get(kind), group, window.numel, view.inner.device)
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


def _slice_values(view: StateView, number: int, bucket: int) -> dict[str, Tensor]:
    """Return this rank's slice of a bucket: float32, on the CPU, gaps between parameters zero."""
    window = view.inner.plan.buffers[number].slices[bucket].window
    values = {kind: torch.zeros(window.numel, dtype=torch.float32, device=HOST) for kind in KINDS}
    for _, piece in _pieces(view, number, bucket):
        here, state = _in_slice(piece, window.in_buffer.start), view.state_of(piece)
        for where, part in piece.window.parts():
            for kind in ("param", "exp_avg"):
                values[kind][here][where] = state.as_float32(part, kind)
        stored = view.state.v_of_elements if piece.is_elementwise else view.state.v_of_segments
        v = stored(piece).to(HOST)
        values["exp_avg_sq"][here] = v_per_element(view.inner.plan, piece, v)
    return values


def _bucket_of_parameters(
    view: StateView,
    parameters: Mapping[str, Mapping[str, Tensor]],
    sources: Sequence[ParameterBlocks | None],
    number: int,
    bucket: int,
) -> BucketValues:
    """Lay stored parameters out as a bucket of this run."""
    layout = view.inner.plan.buffers[number].slices[bucket].bucket
    whole = {kind: torch.zeros(layout.numel, dtype=torch.float32, device=HOST) for kind in KINDS}
    for placement in layout.placements:
        source = sources[placement.parameter]
        if source is None:
            continue
        stored = _stored_parameter(parameters, source, placement)
        for kind, flat in whole.items():
            values = stored[kind]
            if kind == "exp_avg_sq" and source.pattern is not None:
                columns = stored.get(COLUMNS)
                values = elements_of(source, values, columns, 0, source.info.numel)
            flat[placement.start : placement.end] = values
    return whole


def _v_of_blocks(blocks: ParameterBlocks, elements: Tensor) -> dict[str, Tensor]:
    """Return v of rows, and of columns if there are any, from v of all elements of a shard."""
    rows, columns = rows_and_columns_of(blocks, elements)
    return {"exp_avg_sq": rows} | ({} if columns is None else {COLUMNS: columns})


def _stored_parameter(
    parameters: Mapping[str, Mapping[str, Tensor]], source: ParameterBlocks, placement: Placement
) -> Mapping[str, Tensor]:
    key, numel = source.info.checkpoint_key, placement.end - placement.start
    found = parameters.get(key)
    if found is None or found["param"].numel() != numel:
        has = "lacks it" if found is None else f"has {found['param'].numel()} elements of it"
        raise ValueError(
            f"This rank has {numel} elements of {key!r}, and the file of the checkpoint {has}: it "
            "was saved under another tensor- or pipeline-parallel layout, and format torch loads "
            "under its own only. Load it under that layout and save it with --ckpt-format "
            "torch_dist (or --ckpt-convert-format torch_dist), which loads under any."
        )
    return found


def _bucket_of_adam(
    view: StateView, stored: Mapping[Any, Any], number: int, bucket: int
) -> BucketValues:
    """Lay a buffer of Megatron's Adam out as a bucket: there, buckets lack their padding."""
    found, sizes = _buffer_of_adam(view, stored, number)
    begin, numel = sum(sizes[:bucket]), view.inner.plan.buffers[number].slices[bucket].bucket.numel
    whole = {kind: torch.zeros(numel, dtype=torch.float32, device=HOST) for kind in KINDS}
    for kind, flat in whole.items():
        flat[: sizes[bucket]] = found[kind][begin : begin + sizes[bucket]]
    return whole


def _buffer_of_adam(
    view: StateView, stored: Mapping[Any, Any], number: int
) -> tuple[dict[str, Any], list[int]]:
    """Return a buffer's entry in the state of Adam, and the sizes of its buckets there."""
    buffer = view.inner.buffers[number]
    assert isinstance(buffer, ShardedBuffer)
    buckets = range(len(view.inner.plan.buffers[number].slices))
    sizes = [buffer.unpadded_numel(index) for index in buckets]
    members = stored.get(MEMBERS, (stored,))
    domain = view.inner.plan.buffers[number].domain
    found = buffer.of_megatrons_state(members[domain] or {}) if domain < len(members) else None
    if found is None or found["numel_unpadded"] != sum(sizes):
        has = "nothing" if found is None else f"{found['numel_unpadded']} elements"
        raise ValueError(
            f"The file of Megatron's Adam has {has} for buffer {number}, this rank "
            f"{sum(sizes)} elements. Format torch loads under the layout that it was saved with; "
            "save it again with --ckpt-format torch_dist, or use --no-load-optim."
        )
    return found, sizes


def _gathered(
    values: Tensor, group: ProcessGroup | None, device: torch.device, everywhere: bool
) -> Tensor:
    """Join the slices of all ranks, in the order of ranks; all of it on the CPU.

    Args:
        values: this rank's slice.
        group: all ranks, or ``None``.
        device: of the model, through which parts are sent unless the group is gloo's.
        everywhere: whether to return it on all ranks; otherwise on the first, on others anything.
    """
    if group is None:
        return values
    receives = everywhere or group.rank() == 0
    whole = torch.empty(
        group.size() if receives else 0, len(values), dtype=torch.float32, device=HOST
    )
    for part in _parts(len(values), group):
        mine = values[part].to(_device_of(group, device))
        slices = [torch.empty_like(mine) for _ in range(group.size() if receives else 0)]
        if everywhere:
            distributed.all_gather(slices, mine, group=group)
        else:
            first = distributed.get_global_rank(group, 0)
            distributed.gather(mine, slices or None, dst=first, group=group)
        for row, received in zip(whole, slices, strict=True):
            row[part] = received
    return whole.view(-1)


def _scattered(
    whole: Tensor | None, group: ProcessGroup | None, numel: int, device: torch.device
) -> Tensor:
    """Return this rank's slice of what the first rank has; both on the CPU."""
    if group is None:
        assert whole is not None
        return whole
    mine = torch.empty(numel, dtype=torch.float32, device=HOST)
    first = distributed.get_global_rank(group, 0)
    for part in _parts(numel, group):
        slices = None
        if whole is not None:
            rows = whole.view(group.size(), numel)
            slices = [row[part].to(_device_of(group, device)) for row in rows]
        received = torch.empty(
            len(mine[part]), dtype=torch.float32, device=_device_of(group, device)
        )
        distributed.scatter(received, slices, src=first, group=group)
        mine[part] = received
    return mine


def _parts(numel: int, group: ProcessGroup) -> list[slice]:
    """Return parts of a slice, so short that those of all ranks together take little memory."""
    length = max(PART_NUMEL // group.size(), 1)
    return [slice(begin, min(begin + length, numel)) for begin in range(0, numel, length)]


def _as_mapping(stored: Any) -> dict[Any, Any]:
    return {MEMBERS: stored} if isinstance(stored, list) else dict(stored)


def _is_first(group: ProcessGroup | None) -> bool:
    return group is None or group.rank() == 0


def _from_first(value: dict[str, Any], group: ProcessGroup | None) -> dict[str, Any]:
    if group is None:
        return value
    found: list[dict[str, Any]] = [value]
    distributed.broadcast_object_list(found, src=distributed.get_global_rank(group, 0), group=group)
    return found[0]


def _device_of(group: ProcessGroup, device: torch.device) -> torch.device:
    return HOST if distributed.get_backend(group) == "gloo" else device


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
