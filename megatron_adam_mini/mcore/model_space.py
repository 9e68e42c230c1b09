"""Optimizer state in the model's own coordinates, stored and read slice by slice.

Imports megatron.core's checkpoint types, ``rectangles`` and ``plan``. Data flow: the model's
sharded state dict gives the position of a shard in the whole tensor; a rank's flat piece of it
becomes boxes there. Every rank writes what it owns and reads what it needs, under any layout,
without a gather.

megatron-core 0.19 accepts such boxes only (each point was found by its failure) with an irregular
grid (``axis_fragmentations=None``) and ``prepend_axis_num=0``, not empty, and never two boxes of
one key at the same offset with different shapes. The layer goes into the key, because torch
compares all boxes of one key with each other when they span several layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensorFactory
from torch import Tensor

from megatron_adam_mini.checkpoint.rectangles import rectangles
from megatron_adam_mini.plan.manifest import LEADING_AXES


class Values(Protocol):
    """Values of elements, or what makes them when they are asked for."""

    def __getitem__(self, part: slice, /) -> Tensor:
        """Return those of a part."""
        ...


class ModelEntry:
    """Where one parameter of this rank lies in the whole model.

    Args:
        views: its tensors in the model's sharded state dict, each with its first element's
            position, see :meth:`ModelEntries.find`.
        replicas: number that distinguishes ranks with the same slice; 0 writes. ``None``: the rank
            holds the whole shard, and the model's own number applies.
        is_copy: whether other tensor- or pipeline-parallel ranks save the parameter; used where
            the model's replica numbers do not tell.
    """

    def __init__(
        self, views: list[tuple[int, ShardedTensor]], replicas: int | None, *, is_copy: bool = False
    ) -> None:
        self._views = views
        self._replicas = replicas
        self._is_copy = is_copy

    def elements(
        self, kind: str, flat: Values, begin: int, end: int, *, fold: bool = True
    ) -> list[ShardedTensor]:
        """Describe elements ``[begin, end)`` of the parameter.

        Args:
            kind: prefix of the key.
            flat: these elements, read on save; on load a tensor, shape ``(end - begin,)``, which
                is written.
            begin: first element, in the flattened tensor-parallel shard.
            end: one past the last.
            fold: whether the layer number is in the key (ours) or a leading axis (Megatron's keys).
        """
        found = []
        for start, view in self._views:
            low, high = _clip(begin - start, view), _clip(end - start, view)
            for box in rectangles(tuple(view.local_shape), low, high):
                data = flat[box.begin + start - begin : box.end + start - begin].view(box.shape)
                found.append(_box(kind, view, data, box.offset, self._replica(view), fold))
        return found

    def rows(
        self,
        kind: str,
        values: Tensor,
        begin: int,
        end: int,
        *,
        loading: bool,
        tp_rank: int | None,
    ) -> list[ShardedTensor]:
        """Describe one number for each row with elements in ``[begin, end)``.

        A row that is cut between ranks is written by the rank that holds its first element, and
        read by all of them.

        Args:
            kind: prefix of the key.
            values: one number per such row, from row ``begin // width`` on.
            begin: first element.
            end: one past the last.
            loading: whether the entries are for reading.
            tp_rank: this rank in the tensor-parallel group if every rank of the group holds a part
                of each row (row-parallel weights), else ``None``.
        """
        found = []
        for start, view in self._views:
            height, width = view.local_shape[0], math.prod(view.local_shape[1:])
            low, high = _clip(begin - start, view), _clip(end - start, view)
            if low >= high:
                continue
            whole, last = -(-low // width), high // width
            if not loading:
                spans = [(whole, -(-high // width))]
            elif whole <= last:
                # Cut rows get boxes of their own: several ranks request them, and their boxes must
                # be equal.
                spans = [(low // width, whole), (whole, last), (last, -(-high // width))]
            else:
                spans = [(last, whole)]
            lead = view.prepend_axis_num
            narrow = ShardedTensor(
                key=view.key,
                data=None,
                dtype=values.dtype,
                local_shape=(height,),
                global_shape=tuple(view.global_shape[: lead + 1]),
                global_offset=tuple(view.global_offset[: lead + 1]),
                axis_fragmentations=None,
                replica_id=view.replica_id,
                prepend_axis_num=lead,
                allow_shape_mismatch=view.allow_shape_mismatch,
            )
            replica = self._replica(view)
            if tp_rank is not None:
                replica = (replica[0], tp_rank, replica[2])
            for first, stop in spans:
                if first < stop:
                    at = start // width + first - begin // width
                    data = values[at : at + stop - first]
                    found.append(_box(kind, narrow, data, (first,), replica, True))
        return found

    def columns(
        self, kind: str, values: Tensor, num_sets: int, first_set: int, first: int
    ) -> list[ShardedTensor]:
        """Describe one number for each of some columns of a matrix, in one or several column sets.

        Args:
            kind: prefix of the key.
            values: shape ``(sets, columns)``.
            num_sets: column sets of the parameter.
            first_set: the first set.
            first: first column, counted on this rank.
        """
        view = self._views[0][1]
        if any(other.key != view.key for _, other in self._views):
            raise NotImplementedError(
                f"Parameter {view.key!r} is stored in parts with keys of their own, so that v of "
                "its columns has no place; give it the rule 'row'."
            )
        lead = view.prepend_axis_num
        narrow = ShardedTensor(
            key=view.key,
            data=None,
            dtype=values.dtype,
            local_shape=(num_sets, view.local_shape[1]),
            global_shape=(*view.global_shape[:lead], num_sets, view.global_shape[lead + 1]),
            global_offset=(*view.global_offset[:lead], 0, view.global_offset[lead + 1]),
            axis_fragmentations=None,
            replica_id=view.replica_id,
            prepend_axis_num=lead,
        )
        return [_box(kind, narrow, values, (first_set, first), self._replica(view), True)]

    def _replica(self, view: ShardedTensor) -> tuple[int, int, int]:
        if isinstance(view.replica_id, int):
            # A parallel save of the model wrote into its state dict which data-parallel rank
            # saved, and dropped what the other two numbers were.
            own = view.replica_id if self._replicas is None else self._replicas
            return (0, int(self._is_copy and self._replicas is not None), own)
        pp, tp, dp = view.replica_id
        return (pp, tp, dp if self._replicas is None else self._replicas)


class ModelEntries:
    """The parameters in a model's sharded state dict.

    They are found by identity, not by name: Megatron renames some keys, and virtual stages repeat
    them. If the dict was saved before, entries that are stored in parts (SwiGLU's gate and up
    halves) have been replaced by these parts, which are found by their place in memory.

    Args:
        model_state: the dict, which may also hold other things.
    """

    def __init__(self, model_state: Mapping[str, Any]) -> None:
        entries = [entry for entry in nested_values(model_state) if isinstance(entry, ShardedBase)]
        self._whole = {id(entry.data): entry for entry in entries}
        self._tensors = [
            entry
            for entry in entries
            if isinstance(entry, ShardedTensor)
            and isinstance(entry.data, Tensor)
            and not entry.key.startswith("optimizer.")  # of an optimizer saved in the same dict
        ]

    def find(self, param: Tensor) -> list[tuple[int, ShardedTensor]] | None:
        """Return the tensors of a parameter, each with its first element's position.

        Returns:
            ``None`` if the dict lacks the parameter or a part of it.
        """
        entry = self._whole.get(id(param))
        if entry is not None:
            return _contiguous_views(entry)
        if type(param.data) is not Tensor:  # quantized: what was saved are other tensors
            return None
        begin, size = param.data_ptr(), param.element_size()
        # By position: a weight that is stored under two names counts once, under the last.
        parts = {
            (part.data.data_ptr() - begin) // size: part
            for part in self._tensors
            if begin <= part.data.data_ptr() < begin + param.nbytes
            and (part.data.dtype, part.data.device) == (param.dtype, param.device)
        }
        inside = sorted(parts.items(), key=lambda found: found[0])
        covered = 0
        for start, part in inside:
            if start != covered or not part.data.is_contiguous():
                return None
            covered += part.data.numel()
        return inside if covered == param.numel() and inside else None


def copy_back(asked: Mapping[str, ShardedTensor], loaded: Mapping[str, Tensor]) -> None:
    """Copy what a load returned to the tensors that requested it, unless it was read in place.

    Raises:
        KeyError: a requested box was not returned.
    """
    for name, shard in asked.items():
        if loaded[name].data_ptr() != shard.data.data_ptr():
            shard.data.copy_(loaded[name].view(shard.data.shape))


def _box(
    kind: str,
    view: ShardedTensor,
    data: Tensor,
    offset: tuple[int, ...],
    replica: tuple[int, int, int],
    fold: bool,
) -> ShardedTensor:
    lead = view.prepend_axis_num
    key = _folded_key(view) if fold else view.key
    kept = tuple(view.global_offset[:lead]) if not fold else ()
    ones = (1,) * len(kept)
    inner = tuple(g + o for g, o in zip(view.global_offset[lead:], offset, strict=True))
    return ShardedTensor(
        key=kind + key,
        data=data.view(ones + tuple(data.shape)),
        dtype=data.dtype,
        local_shape=ones + tuple(data.shape),
        global_shape=tuple(view.global_shape[0 if not fold else lead :]),
        global_offset=kept + inner,
        axis_fragmentations=None,
        replica_id=replica,
        prepend_axis_num=0,
        allow_shape_mismatch=view.allow_shape_mismatch,
    )


def _folded_key(view: ShardedTensor) -> str:
    """Return the key with numbers of layer and expert in it, as for a model with unequal layers."""
    key: str = view.key
    for position in view.global_offset[: view.prepend_axis_num]:
        for axis in LEADING_AXES:
            key, found = axis.subn(rf"\g<0>{position}.", key, count=1)
            if found:
                break
        else:
            return f"{key}@{position}"
    return key


def _contiguous_views(entry: ShardedBase) -> list[tuple[int, ShardedTensor]]:
    """Return the model's tensors for one parameter, each with its first element's position.

    A factory (SwiGLU stores gate and up halves apart) is called on a tensor without memory: the
    offsets of the results tell which elements they are.
    """
    if isinstance(entry, ShardedTensor):
        return [(0, entry)]
    if not isinstance(entry, ShardedTensorFactory):
        raise TypeError(f"expected a ShardedTensor or a factory, got {type(entry).__name__}")
    twin = torch.empty(tuple(entry.data.shape), device="meta")
    parts = list(_leaves(entry.build_fn(entry.key, twin, entry.replica_id, None)))
    covered = 0
    for part in parts:
        view = part.data
        shares = view.untyped_storage()._cdata == twin.untyped_storage()._cdata
        if not shares or not view.is_contiguous() or view.storage_offset() != covered:
            raise NotImplementedError(
                f"Parameter {entry.key!r}: the model stores its parts in another order than memory "
                "has them, which Adam-mini's checkpoints do not support yet."
            )
        covered += view.numel()
    if covered != twin.numel():
        raise NotImplementedError(f"Parameter {entry.key!r}: its parts do not cover it once.")
    return [(part.data.storage_offset(), part) for part in parts]


def _leaves(tree: Any) -> Iterator[ShardedTensor]:
    if isinstance(tree, ShardedTensor):
        yield tree
    elif isinstance(tree, ShardedTensorFactory):
        yield from _leaves(tree.build())
    else:
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from _leaves(branch)


def _clip(position: int, view: ShardedTensor) -> int:
    numel: int = math.prod(view.local_shape)
    return min(max(position, 0), numel)
