"""Pieces of this rank's state <-> entries of a checkpoint.

Imports megatron.core's checkpoint types, ``optimizer`` and ``model_space``. Used by ``checkpoint``
(Adam-mini's own formats) and ``adam_import`` (those of Megatron's Adam).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from megatron_adam_mini.mcore.model_space import ModelEntries, ModelEntry
from megatron_adam_mini.mcore.slices import ShardedBuffer
from megatron_adam_mini.optimizer import AdamMini
from megatron_adam_mini.piece_values import sum_over_segments
from megatron_adam_mini.plan.buffer_plan import Window
from megatron_adam_mini.plan.manifest import STATE_PREFIX
from megatron_adam_mini.plan.partition import ParameterBlocks
from megatron_adam_mini.plan.step_plan import DENSE, ColumnRun, Piece, RowRun
from megatron_adam_mini.state import HOST, BufferState, RankState

#: Keys of the optimizer's state dict; Megatron's own optimizers use neither.
SHARDS, OBJECTS = "adam_mini_shards", "adam_mini_objects"
#: Entries of a state dict by name, a few boxes each.
Shards = dict[str, dict[str, ShardedTensor]]


@dataclass(frozen=True)
class DomainPart:
    """What this rank has of one domain's parameters, in formats that are bound to a layout.

    Attributes:
        name: of the domain.
        data_parallel_group: ranks that share the state, ``None`` without the distributed optimizer.
        model_parallel_rank: returns the number among the parts that tensor, pipeline and, for
            experts, expert parallelism make of the model. Called where it is needed: a caller's
            own process groups may lack its group.
        chain: prefix of its keys in Megatron's formats, which have an optimizer for each domain.
    """

    name: str
    data_parallel_group: ProcessGroup | None
    model_parallel_rank: Callable[[], int]
    chain: str

    @property
    def key(self) -> str:
        """Name of this part in keys of Adam-mini's own format."""
        prefix = "" if self.name == DENSE else f"{self.name}_"
        return f"{prefix}model_parallel_{self.model_parallel_rank()}"

    @property
    def adam_key(self) -> str:
        """Prefix of the keys of Megatron's formats of buckets."""
        return f"{self.chain}optimizer.distributed.dp_group_idx_{self.model_parallel_rank()}."


@dataclass(frozen=True)
class StateView:
    """The parts of an optimizer that saving and loading use.

    Attributes:
        inner: the optimizer of this rank.
        state: its state.
        parameters: the model's parameters, in the plan's numbering.
        param_groups: groups whose values a load sets.
        saved_groups: set by a load to the checkpoint's groups, see ``param_groups.load_groups``.
        grad_scaler: Megatron's loss scaler, or ``None``.
        manifest: partition of the whole model.
        replica: number of the optimizer instance, which distinguishes holders of one slice;
            ``None`` without the distributed optimizer: every data-parallel rank holds everything.
        domains: this rank's parts of the plan's domains.
        sizes: returns the sizes of the parallel layout, recorded in checkpoints.
    """

    inner: AdamMini
    state: RankState
    parameters: Sequence[Parameter]
    param_groups: list[dict[str, Any]]
    saved_groups: list[Mapping[str, Any] | None]
    grad_scaler: Any
    manifest: dict[str, Any]
    replica: int | None
    domains: Sequence[DomainPart]
    sizes: Callable[[], dict[str, int]]

    def state_of(self, piece: Piece) -> BufferState:
        """Return the state that contains a piece."""
        return self.state.of(piece)

    def domain_of(self, piece: Piece) -> DomainPart:
        """Return the domain that a piece belongs to."""
        return self.domains[self.inner.plan.buffers[piece.buffer].domain]

    def blocks_of(self, piece: Piece) -> ParameterBlocks:
        """Return this run's blocks of a piece's parameter."""
        return self.inner.plan.parameters[piece.parameter]

    def entry_of(self, piece: Piece, entries: ModelEntries) -> ModelEntry:
        """Return where a piece's parameter lies in the whole model.

        Args:
            piece: the piece.
            entries: of the model's sharded state dict.

        Raises:
            ValueError: that dict lacks the parameter.
        """
        found = entries.find(self.parameters[piece.parameter])
        info = self.blocks_of(piece).info
        if found is None:
            raise ValueError(
                f"Parameter {info.name!r} is not in the model's sharded state dict, so Adam-mini "
                "cannot tell where its state belongs; pass the whole model's, built with "
                "keep_vars=True."
            )
        return ModelEntry(found, self.replica, is_copy=not info.in_norm)


@dataclass
class PendingLoad:
    """What was requested from a checkpoint, until the load has returned it.

    Attributes:
        state: the state that is read into; the optimizer's, if nobody has moved it since.
        asked: entries by name, as in the state dict.
        floats: state, window, and float32 tensors that the entries of ``param`` and ``exp_avg``
            are views of; see ``BufferState.store``.
        rows: row values of each piece, by the piece's number. These and the next two are in host
            memory.
        columns: v of this rank's columns of all sets, likewise; shape ``(sets, columns)``.
        sources: blocks of the checkpoint's v, by parameter.
        elements: element values of each piece whose v is averaged over blocks.
        objects: entries that are not tensors.
        average: whether v is averaged over blocks rather than copied.
        adam_format: format of Megatron's Adam that is read, ``None`` for Adam-mini's own.
        new: numbers of pieces whose parameters were frozen when the checkpoint was saved.
        taken: step count with which the optimizer has taken over what was read, ``None``: not yet.
    """

    state: RankState
    asked: Shards = field(default_factory=dict)
    floats: list[tuple[BufferState, Window, dict[str, Tensor]]] = field(default_factory=list)
    rows: dict[int, Tensor] = field(default_factory=dict)
    columns: dict[int, Tensor] = field(default_factory=dict)
    sources: Sequence[ParameterBlocks | None] = ()
    elements: dict[int, Tensor] = field(default_factory=dict)
    objects: dict[str, ShardedObject] = field(default_factory=dict)
    average: bool = False
    adam_format: str | None = None
    new: set[int] = field(default_factory=set)
    taken: int | None = None

    def floats_of(
        self, state: BufferState, window: Window, *, weights: bool = True
    ) -> dict[str, Tensor]:
        """Return float32 tensors into which ``param`` and ``exp_avg`` of a window are read.

        They are views of the state, or, where it cannot be read in place, in host memory.

        Args:
            state: state of the buffer.
            window: part of it.
            weights: whether to read main parameters that are the model's weights, too.
        """
        views = state.float32_views(window)
        if not state.owns_main_param:
            # Before the optimizer, the model takes over its weights, which may have fewer bits.
            views["param"] = None
            if not weights:
                del views["param"]
        values = {
            kind: torch.empty(window.numel, dtype=torch.float32, device=HOST)
            if view is None
            else view
            for kind, view in views.items()
        }
        self.floats.append((state, window, values))
        return values

    def state_dict(self) -> dict[str, Any]:
        """Return the requested entries as a state dict."""
        return {
            key: dict(value)
            for key, value in ((SHARDS, self.asked), (OBJECTS, self.objects))
            if value  # an empty entry would become part of the common state
        }


def add_entries(shards: Shards, name: str, found: list[ShardedTensor]) -> None:
    """Add entries under a name, unless there are none: an empty dict would become common state."""
    if found:
        shards[name] = {str(index): shard for index, shard in enumerate(found)}


def tp_rank_of_rows(view: StateView, piece: Piece) -> int | None:
    """Return the tensor-parallel rank if every rank of its group holds a part of each row."""
    blocks = view.blocks_of(piece)
    return blocks.info.tp_rank if blocks.info.row_parallel else None


@dataclass(frozen=True)
class HostCopy:
    """``param`` or ``exp_avg`` of a window that is not kept as float32; each slice is a new copy.

    In host memory, which a checkpoint's float32 values need anyway: in device memory, there may be
    no place for them. Megatron's writer does not clone tensors that fill their storage, so each
    box of a checkpoint gets one.

    Attributes:
        state: state of the buffer.
        kind: ``param`` or ``exp_avg``.
        window: part of it.
    """

    state: BufferState
    kind: str
    window: Window

    def __getitem__(self, part: slice) -> Tensor:
        """Return elements of the window, float32."""
        window = self.window.part(part.start, part.stop)
        values = torch.empty(window.numel, dtype=torch.float32, device=HOST)
        for where, of_part in window.parts():
            values[where] = self.state.as_float32(of_part, self.kind)
        return values


def to_save(state: BufferState, window: Window) -> dict[str, Tensor | HostCopy]:
    """Return ``param`` and ``exp_avg`` of a window, for a writer that may be asynchronous."""
    return {
        kind: HostCopy(state, kind, window) if data is None else view_to_save(data)
        for kind, data in state.float32_views(window).items()
    }


def view_to_save(data: Tensor) -> Tensor:
    """Return a view of the state, float32, for a writer that may be asynchronous.

    On the CPU, Megatron's writer clones views but hands over tensors that fill their storage; were
    that the state's own, the next step would write into the checkpoint. On a GPU everything is
    copied to the host.
    """
    fills = data.nbytes == data.untyped_storage().nbytes()
    return data.clone() if fills and data.device.type == "cpu" else data


def rows_from_v(view: StateView, piece: Piece, v: Tensor) -> Tensor:
    """Return v of every row with elements in the piece, from row ``begin // width`` on.

    Args:
        view: the optimizer.
        piece: the piece.
        v: of its segments.

    Returns:
        New values; 0 for rows whose columns have v.
    """
    width = view.blocks_of(piece).info.row_numel
    rows = v.new_zeros(-(-piece.end // width) - piece.begin // width)
    for run in view.inner.plan.runs_of(piece):
        if isinstance(run, RowRun):
            first, last = run.start_S + piece.begin, run.end_S + piece.begin
            # Segments end at row ends or at the slice's end, so only the first can start within.
            counts = torch.from_numpy(-(-last // width) - first // width).to(v.device)
            start = int(first[0]) // width - piece.begin // width
            stop = -(-int(last[-1]) // width) - piece.begin // width
            rows[start:stop] = v[run.entries].repeat_interleave(counts, output_size=stop - start)
    return rows


def v_from_rows(view: StateView, piece: Piece, rows: Tensor) -> None:
    """Set v of the piece's segments from row values, in host memory; see :func:`rows_from_v`."""
    width = view.blocks_of(piece).info.row_numel
    v = view.state.v_of_segments(piece)
    for run in view.inner.plan.runs_of(piece):
        if isinstance(run, RowRun):
            row = (run.start_S + piece.begin) // width - piece.begin // width
            v[run.entries] = rows[torch.from_numpy(row)]


def columns_from_v(view: StateView, piece: Piece, v: Tensor) -> list[tuple[int, int, Tensor]]:
    """Return v of the columns whose first element, over all rows of their set, is in the piece.

    Args:
        view: the optimizer.
        piece: the piece.
        v: of its segments.

    Returns:
        Column set, first column (counted on this rank) and new values of each run of such columns.
    """
    blocks = view.blocks_of(piece)
    found = []
    for run in view.inner.plan.runs_of(piece):
        if isinstance(run, ColumnRun):
            first = first_element(blocks, run.column_set) - piece.begin
            if first <= run.begin < first + run.width:
                count = min(run.width - run.column, run.end - run.begin)
                values = v[run.entries][:count].clone()
                found.append((run.column_set, run.column, values))
    return found


def first_element(blocks: ParameterBlocks, column_set: int) -> int:
    """Return the first element of a column set in the shard, also if it is on another rank."""
    assert blocks.pattern is not None
    segments = np.arange(len(blocks.pattern.segment_rows), dtype=np.int64)
    (at,) = np.flatnonzero(blocks.pattern.column_set_of(segments) == column_set)[:1]
    row = int(blocks.pattern.row_bounds(segments)[0][at]) - blocks.info.row_offset
    return row * blocks.info.row_numel


def v_from_columns(view: StateView, piece: Piece, columns: Tensor) -> None:
    """Set v of the piece's segments that are columns.

    Args:
        view: the optimizer.
        piece: the piece.
        columns: v of this rank's columns of all sets, in host memory, shape ``(sets, columns)``.
    """
    v = view.state.v_of_segments(piece)
    for run in view.inner.plan.runs_of(piece):
        if isinstance(run, ColumnRun):
            values = columns[run.column_set].roll(-run.column)
            v[run.entries] = values[: run.entries.stop - run.entries.start]


def sums_over_segments(view: StateView, pending: PendingLoad) -> Tensor:
    """Return, for each segment, the sum of its elements' v in the checkpoint; in host memory."""
    inner = view.inner
    sum_S = torch.zeros(inner.plan.num_segments, dtype=torch.float32, device=HOST)
    for number, piece in enumerate(inner.plan.pieces):
        out = sum_S[piece.segments]
        if not len(out) or number in pending.new:
            continue
        if number in pending.elements:
            elements = pending.elements[number]
        else:
            rows, columns = pending.rows.get(number), pending.columns.get(number)
            source = pending.sources[piece.parameter]
            assert source is not None
            elements = elements_of(source, rows, columns, piece.begin, piece.end)
        out.copy_(sum_over_segments(inner.plan, piece, elements))
    return sum_S


def elements_of(
    source: ParameterBlocks, rows: Tensor | None, columns: Tensor | None, begin: int, end: int
) -> Tensor:
    """Return v of elements ``[begin, end)`` of a shard, from v of its rows and columns.

    Args:
        source: its blocks.
        rows: v of its rows from row ``begin // width`` on, if some rows are whole blocks.
        columns: v of this rank's columns of all sets, shape ``(sets, columns)``, if there are any.
        begin: first element.
        end: one past the last.
    """
    assert source.pattern is not None
    width = source.info.row_numel
    first, last = begin // width, -(-end // width)
    if columns is None:
        assert rows is not None
        found = rows[: last - first, None].expand(-1, width)
    else:
        offset = source.info.row_offset
        of_set = source.pattern.column_set_of_rows()[first + offset : last + offset]
        chosen = torch.from_numpy(of_set).to(columns.device)
        found = columns[chosen.clamp(min=0)]
        if rows is not None:
            found = torch.where(chosen[:, None] < 0, rows[: last - first, None], found)
    return found.reshape(-1)[begin - first * width : end - first * width]


def need_buckets(view: StateView, checkpoint_format: str) -> None:
    """Refuse a checkpoint of flat buckets in a run without buckets.

    Raises:
        ValueError: the run does not use the distributed optimizer.
    """
    if view.replica is None:
        raise ValueError(
            f"The checkpoint's optimizer state has the format {checkpoint_format}: flat buckets of "
            "the distributed optimizer, which this run does not use. Add "
            "--use-distributed-optimizer, or save it in the run that wrote it in a format that "
            "loads anywhere: Adam-mini's model_space, or Adam's fully_reshardable."
        )


def bucket_shards(view: StateView, pending: PendingLoad | None) -> Shards:
    """Return ``param`` and ``exp_avg`` of whole slices, without padding at the bucket's end.

    Args:
        view: the optimizer.
        pending: the load that requests them; ``None``: to save them.
    """
    shards: Shards = {}
    first_of, numbers = [], Counter[int]()
    for plan in view.inner.plan.buffers:  # buckets are numbered within their domain
        first_of.append(numbers[plan.domain])
        numbers[plan.domain] += len(plan.slices)
    for state in view.state.everywhere:
        assert isinstance(state.buffer, ShardedBuffer)
        domain = view.domains[state.plan.domain]
        for index, slice_plan, window in state.share.windows:
            begin = window.in_buffer.start - slice_plan.bucket.offset
            numel = state.buffer.unpadded_numel(index)
            length = min(begin + window.numel, numel) - begin
            if length <= 0:
                continue
            number = first_of[state.share.number] + index
            held = window.part(0, length)
            floats = to_save(state, held) if pending is None else pending.floats_of(state, held)
            for kind, values in floats.items():
                flat = values[0:length]
                # A slice that is on device and host has a part for each.
                parts = shards.setdefault(f"{domain.name}_bucket_{kind}.{number}", {})
                parts[str(len(parts))] = ShardedTensor(
                    key=f"{STATE_PREFIX}bucket.{kind}.{domain.key}.bucket_{number}",
                    data=flat,
                    dtype=flat.dtype,
                    local_shape=(length,),
                    global_shape=(numel,),
                    global_offset=(begin,),
                    axis_fragmentations=None,
                    replica_id=(0, 0, view.replica or 0),
                )
    return shards
